"""The regression expert of the supervised mixture (seed documents 000 and 001): y from x.

Shape letters: R rows, E experts (leading, only in a stack), D features.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mixdist.arguments import check_arguments
from mixdist.experts.expert import Expert
from mixdist.nets.likelihood import Likelihood
from mixdist.nets.mlp import MLP, flat
from mixdist.nets.network import Network
from mixdist.terms import Batch, ExpertTerms, Spec, real_field


class Regressor(Expert):
    """y from x by a network.

    loss = sum_d (y_d - yhat_d)^2 for ``likelihood="squared"`` (seed document 000), else -log p(y|x) in nats, a density
    of y, with which :class:`mixdist.mixtures.SoftMinLoss` is -log p(y|x) of the mixture (seed document 001, section 4).

    Args:
        spec: the data set's fields.
        network: x to the mean of y; unset, an affine map.
        likelihood: squared, gaussian or laplace.
        scale: standard deviation (gaussian) or Laplace scale, or "learned"; without effect on squared.
        input: the field x.
        target: the field y.

    Raises:
        ValueError: a field that is missing or holds classes; a scale that is not positive.

    Examples:
        >>> import torch
        >>> from mixdist.experts import Regressor
        >>> from mixdist.nets import MLP
        >>> from mixdist.terms import Field
        >>> expert = Regressor({"x": Field((6,), torch.float32), "y": Field((2,), torch.float32)}, network=MLP([16]))
        >>> expert.predict({"x": torch.zeros(5, 6)}).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        spec: Spec,
        network: Network | None = None,
        likelihood: Literal["squared", "gaussian", "laplace"] = "squared",
        scale: float | Literal["learned"] = "learned",
        input: str = "x",
        target: str = "y",
    ) -> None:
        check_arguments(Regressor.__init__, locals(), "Regressor's ")
        super().__init__()
        x, y = real_field(spec, input, "Regressor"), real_field(spec, target, "Regressor")
        self.input, self.target, self.fields, self.shape = input, target, (input, target), y.shape
        network = MLP([]) if network is None else network
        self.input_shape, self.stackable = x.shape, network.stackable
        self.net = network.encoder(x.shape, y.num_values)
        self.likelihood = None if likelihood == "squared" else Likelihood(likelihood, scale, "identity")
        self.log_px_is = None if self.likelihood is None else self.likelihood.is_a

    def forward(self, rows: Batch, eps: Tensor | None) -> ExpertTerms:
        y, output = flat(rows[self.target], self.shape), self.net(flat(rows[self.input], self.input_shape))
        if self.likelihood is None:
            return ExpertTerms((y - output).square().sum(-1))
        log_py = self.likelihood.log_prob(y, output)
        return ExpertTerms(-log_py, log_py)

    def predict(self, rows: Batch) -> Tensor:
        return self.net(flat(rows[self.input], self.input_shape)).reshape(-1, *self.shape)
