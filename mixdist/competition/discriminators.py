"""Discriminators of the data against one expert's samples, whose logits score how well that expert explains a row.

Shape letters: R rows, S rows of samples.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mixdist.nets.mlp import MLP, flat
from mixdist.nets.network import Network
from mixdist.terms import Spec, real_field


class Discriminator(nn.Module):
    """A network with one output, the logit of "x is data".

    Like an expert it is pure: it draws no random numbers and does not communicate, and a row's logit depends on no
    other row. For a network of your own, subclass :class:`mixdist.nets.Network`.

    Args:
        spec: the data set's fields.
        network: rows to logits; unset, an MLP with two hidden layers of 500, those of seed document 004, section 8.1.
            ``Conv([64, 128, 256])`` has the filters of its section 8.2.
        field: which field it reads; the one that its expert samples.

    Raises:
        ValueError: a field that is missing, holds classes or does not suit the network.

    Examples:
        >>> import torch
        >>> from mixdist.competition import Discriminator
        >>> from mixdist.nets import Conv
        >>> from mixdist.terms import Field
        >>> discriminator = Discriminator({"x": Field((1, 28, 28), torch.uint8, 1 / 255)}, Conv([16, 32]))
        >>> discriminator(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5])
    """

    def __init__(self, spec: Spec, network: Network | None = None, field: str = "x") -> None:
        super().__init__()
        network = MLP([500, 500]) if network is None else network
        self.fields, self.shape = (field,), real_field(spec, field, "Discriminator").shape
        self.net = network.encoder(self.shape, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logit l(x) = log D(x) - log(1 - D(x)) of "x is data" for rows (R, *shape of x): (R,).

        At the optimum of :func:`discriminator_loss` it is log dP_data(x) - log dP_samples(x), nats.
        """
        return self.net(flat(x, self.shape)).squeeze(-1)


def discriminator_loss(logits_data_R: Tensor, logits_samples_S: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log D(x) for rows of the data and -log(1 - D(x)) for samples, with D = sigmoid(l): (R,) and (S,), nats.

    The mean of the first plus the mean of the second is least where

        D(x) = dP_data(x) / (dP_data(x) + dP_samples(x)),    so    l(x) = log dP_data(x) - log dP_samples(x),

    equation (5) of seed document 004 and the line below it: a row's log density under the expert is -l(x), up to the
    data's own, which all experts share. Both are softplus of a logit, so no logarithm of a small number is taken.

    Args:
        logits_data_R: l of rows of the data.
        logits_samples_S: l of the expert's samples.
    """
    return F.softplus(-logits_data_R), F.softplus(logits_samples_S)
