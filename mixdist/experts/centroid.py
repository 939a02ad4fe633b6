"""The centre of a cluster as an expert: with hard assignments a mixture of these is k-means (seed document 004).

Shape letters: R rows, E experts (leading, only in a stack), D features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mixdist.arguments import check_arguments
from mixdist.experts.expert import Expert
from mixdist.nets.mlp import flat
from mixdist.stats import normal_sum_log_prob
from mixdist.terms import Batch, ExpertTerms, Field, Spec, real_field

_FIRST_SPREAD = 0.1


class Centroid(Expert):
    """A VAE whose encoder is the constant mu and whose decoder is the identity (seed document 004, section 6).

    loss = -log N(x; mu, s^2 I) = |x - mu|^2 / (2 s^2) + D (log s + log(2 pi) / 2), nats, from differences taken
    directly. Its gradient, averaged over the rows of a cluster, is (mu - mean(x)) / s^2: a step of plain gradient
    descent with learning rate s^2 on all of them moves mu to their mean, the exact M-step of k-means.

    z has the dimensions of x, is N(0, I) whatever x is, and plays no part in training: p(x|z) is the point mu + s z, so
    p(x) = N(x; mu, s^2 I) and ``log_px_R`` is exact. ``sample`` and ``draw`` both give mu + s z.

    mu starts about the middle of the data's values, 1/2 for levels on [0, 1] and the offset for all others, plus
    normal numbers of standard deviation 0.1.

    Args:
        spec: the data set's fields.
        scale: the standard deviation s, in units of x.
        field: which field it models.

    Raises:
        ValueError: a field that is missing or holds classes; a scale that is not positive.

    Examples:
        >>> import torch
        >>> from mixdist.experts import Centroid
        >>> from mixdist.terms import Field
        >>> expert = Centroid({"x": Field((2,), torch.float32)})
        >>> with torch.no_grad():
        ...     losses = expert({"x": expert.mean + torch.tensor([[0.0, 0.0], [3.0, 4.0]])}, None).loss_R
        >>> losses.diff()  # half the squared distance
        tensor([12.5000])
    """

    stackable = True
    log_px_is = "density"

    def __init__(self, spec: Spec, scale: float = 1.0, field: str = "x") -> None:
        check_arguments(Centroid.__init__, locals(), "Centroid's ")
        super().__init__()
        described = real_field(spec, field, "Centroid")
        if not 0 < scale < math.inf:
            raise ValueError(f"Centroid's scale ({scale}) must be a positive number: give a standard deviation")
        self.field, self.fields, self.shape, self.scale = field, (field,), described.shape, scale
        self.noise_shape = (described.num_values,)
        # (1, D) broadcasts over (R, D), and (E, 1, D) over (E, R, D) when experts are stacked.
        self.mean = nn.Parameter(_middle(described) + _FIRST_SPREAD * torch.randn(1, described.num_values))

    def forward(self, rows: Batch, eps: Tensor | None) -> ExpertTerms:
        x = flat(rows[self.field], self.shape)
        mean = self.mean.expand(*self.mean.shape[:-2], x.shape[-2], -1)
        log_px = normal_sum_log_prob(x, mean, math.log(self.scale))
        return ExpertTerms(-log_px, log_px)

    def reconstruct(self, rows: Batch) -> Tensor:
        # repeat, not expand: a view of a parameter requires its gradient even under no_grad.
        return self.mean.repeat(len(rows[self.field]), 1).reshape(-1, *self.shape)

    def sample(self, eps: Tensor) -> Tensor:
        return (self.mean + self.scale * eps).reshape(-1, *self.shape)

    def draw(self, eps: Tensor, uniform: Tensor) -> Tensor:
        return self.sample(eps)


def _middle(field: Field) -> float:
    """Return the middle of a field's values, as far as its description determines it."""
    are_levels = field.dtype == torch.uint8 and field.scale < 1 and not field.offset
    return 0.5 if are_levels else field.offset
