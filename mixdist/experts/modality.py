"""One modality of a row as an expert: q(z|x_m) and p(x_m|z) for a latent that all modalities share.

Shape letters: R rows, N latents of a row, L shared dimensions, P private ones, T places of a text, V its words.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mixdist.arguments import check_arguments
from mixdist.experts.expert import Expert
from mixdist.experts.location_scale import KINDS, PosteriorName, Prior
from mixdist.nets.categorical import Categorical, class_field
from mixdist.nets.likelihood import Likelihood, MeanName, check_levels
from mixdist.nets.mlp import MLP, flat
from mixdist.nets.network import Network
from mixdist.terms import Batch, ExpertTerms, Posterior, Spec, real_field

ModalityLikelihood = Literal["gaussian", "laplace", "bernoulli", "continuous_bernoulli", "logistic", "categorical"]


class Modality(Expert):
    """An encoder and a decoder of one field, for :class:`mixdist.mixtures.MMVAE` and its like; alone it is a VAE.

    Images take ``network: mixdist.nets.Conv``, vectors ``mixdist.nets.MLP``, texts ``mixdist.nets.Text`` with
    ``likelihood: categorical``: texts are classes (T,) of which one is padding, labels classes ().

    The last P dimensions of z are the modality's own (Lee and Pavlovic 2021; Palumbo et al. 2023): only its decoder
    reads them, and they never leave its rank. Where another modality's latent is decoded they come from their prior.

    Alone, loss = -log p(x|z) + KL(q(z|x) || p(z)) with an analytic KL and scales 1 of the shared part of p(z).

    Args:
        spec: the data set's fields.
        latent: L; a mixture gives its own.
        posterior: of q(z|x) and p(z), laplace or normal; a mixture gives its own.
        field: which field it models.
        private: P.
        network: of encoder and decoder; unset, an MLP with one hidden layer of 400.
        likelihood: as of :class:`mixdist.nets.likelihood.Likelihood`, or categorical.
        scale: of a Gaussian, Laplace or logistic likelihood, or "learned".
        mean: sigmoid when x lies in [0, 1], identity otherwise.
        padding: the class of a text that counts for nothing; null for none.
        learn_prior: whether the scales of the private prior learn.

    Raises:
        ValueError: a field that is missing or does not suit likelihood or network; a number of dimensions or a scale
            out of range.

    Examples:
        >>> import torch
        >>> from mixdist.experts import Modality
        >>> from mixdist.terms import Field
        >>> spec = {"x0": Field((1, 8, 8), torch.uint8, 1 / 255), "words": Field((5,), torch.int16, num_classes=9)}
        >>> image = Modality(spec, latent=3, field="x0", private=2)
        >>> loc, scale = image.encode({"x0": torch.zeros(4, 1, 8, 8)})
        >>> loc.shape, scale.shape
        (torch.Size([4, 5]), torch.Size([4, 5]))
        >>> text = Modality(spec, latent=3, field="words", likelihood="categorical", padding=0)
        >>> text.log_prob({"words": torch.zeros(4, 5, dtype=torch.int64)}, torch.zeros(4, 2, 3))[0]  # padding alone
        tensor([0., 0.], grad_fn=<SelectBackward0>)
    """

    def __init__(
        self,
        spec: Spec,
        latent: int = 20,
        posterior: PosteriorName = "laplace",
        field: str = "x",
        private: int = 0,
        network: Network | None = None,
        likelihood: ModalityLikelihood = "laplace",
        scale: float | Literal["learned"] = 0.75,
        mean: MeanName = "sigmoid",
        padding: int | None = None,
        learn_prior: bool = True,
    ) -> None:
        check_arguments(Modality.__init__, locals(), "Modality's ")
        super().__init__()
        for name, value, least in (("latent", latent, 1), ("private", private, 0)):
            if value < least:
                raise ValueError(f"Modality's {name} ({value}) must be from {least} on: give a whole number")
        if scale != "learned" and not (isinstance(scale, (int, float)) and 0 < scale < math.inf):
            raise ValueError(f"Modality's scale ({scale}) must be a positive number or learned: give 0.75, for example")
        self.likelihood, self.row = _likelihood(spec, field, likelihood, scale, mean, padding)
        network = MLP([400]) if network is None else network
        self.field, self.fields, self.shape = field, (field,), spec[field].shape
        self.latent, self.private, self.noise_shape = latent, private, (latent + private,)
        self.kind = KINDS[posterior]
        self.prior = Prior(posterior, private, learn_prior)
        self.encoder = network.encoder(self.row, 2 * (latent + private))
        self.decoder = network.decoder(latent + private, self.row)
        self.log_px_is, self.levels = self.likelihood.is_a, self.likelihood.levels

    @property
    def is_text(self) -> bool:
        """Whether it models classes."""
        return isinstance(self.likelihood, Categorical)

    def numbers(self, rows: Batch) -> Tensor:
        """Return its field as flat rows of numbers, (R, D)."""
        x = rows[self.field]
        if isinstance(self.likelihood, Categorical):
            return self.likelihood.one_hot(x, next(self.parameters()).dtype)
        return flat(x, self.shape)

    def encode(self, rows: Batch) -> tuple[Tensor, Tensor]:
        """Return location and scale of q(z|x), each (R, L + P)."""
        x = self.numbers(rows)
        loc, raw = self.encoder(x).to(x.dtype).chunk(2, dim=-1)
        # A copy: what engines hang on an expert's results they lose on views.
        return loc.clone(), torch.cat(
            [self.kind.scale(part) for part in raw.split([self.latent, self.private], -1)], dim=-1
        )

    def log_prob(self, rows: Batch, z: Tensor) -> Tensor:
        """Return log p(x|z), nats: of one latent of each row (R, L + P) to (R,), or of N (R, N, L + P) to (R, N)."""
        x, num_rows = self.numbers(rows), z.shape[:-1]
        output = self.decoder(z.reshape(-1, z.shape[-1])).to(x.dtype)
        if len(num_rows) > 1:
            x, output = x[:, None], output.unflatten(0, num_rows)
        return self.likelihood.log_prob(x, output)

    def decode(self, z: Tensor) -> Tensor:
        """Return the mean of p(x|z), (R, *shape of x), for z (R, L + P); of texts the likeliest words."""
        output = self.decoder(z)
        if isinstance(self.likelihood, Categorical):
            return self.likelihood.likeliest(output).reshape(-1, *self.shape)
        return self.likelihood.mean(output).reshape(-1, *self.shape)

    def draw_private(self, eps: Tensor) -> Tensor:
        """Return private latents from their prior, given standard normal numbers (..., P)."""
        return self.prior.draw(eps)

    def private_ratio(self, w: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """Return log p(w) - log q(w) of private latents (..., P), nats, q of this location and scale."""
        return self.prior.log_prob(w) - self.kind.log_prob(w, loc, scale).sum(-1)

    def _kl(self, loc: Tensor, scale: Tensor) -> Tensor:
        shared = self.kind.kl(loc[..., : self.latent], scale[..., : self.latent], 1.0)
        own = self.prior.kl(loc[..., self.latent :], scale[..., self.latent :])
        return torch.cat([shared, own], dim=-1)

    def forward(self, rows: Batch, eps: Tensor | None) -> ExpertTerms:
        assert eps is not None
        loc, scale = self.encode(rows)
        z = loc + scale * self.kind.standard(eps)
        log_px, kl = self.log_prob(rows, z), self._kl(loc, scale).sum(-1)
        return ExpertTerms(kl - log_px, log_px, kl)

    def posterior(self, rows: Batch) -> Posterior:
        loc, scale = self.encode(rows)
        return Posterior(loc, self._kl(loc, scale))


def _likelihood(
    spec: Spec,
    field: str,
    name: ModalityLikelihood,
    scale: float | Literal["learned"],
    mean: MeanName,
    padding: int | None,
) -> tuple[Likelihood, tuple[int, ...]]:
    """Return p(x|z) of a field, and the shape of its rows as networks see them."""
    if name != "categorical":
        described = real_field(spec, field, "Modality")
        if padding is not None:
            raise ValueError(f"Modality's padding ({padding}) is for texts: set likelihood to categorical, or drop it")
        levels = check_levels(described, field, "Modality") if name == "logistic" else None
        return Likelihood(name, scale, mean, levels), described.shape
    if field not in spec:
        raise ValueError(f"Modality needs the field {field!r}, but the data has {sorted(spec)}: set its field argument")
    num_classes = class_field(spec[field], field, "Modality")
    if padding is not None and not 0 <= padding < num_classes:
        raise ValueError(f"Modality's padding ({padding}) must be a class of {field!r}, from 0 to {num_classes - 1}")
    return Categorical(num_classes, padding), (spec[field].num_values, num_classes)
