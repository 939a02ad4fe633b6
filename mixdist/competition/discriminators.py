"""Discriminators: each tells the data from one expert's samples, and so how much of the data that expert explains.

Shape letters: R rows, S rows of samples, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mixdist.experts.expert import real_field
from mixdist.nets.conv import ConvEncoder, NormName, image_shape
from mixdist.nets.mlp import MLP, ActivationName, flat
from mixdist.terms import Spec


class Discriminator(nn.Module):
    """Base of all discriminators: subclass it, set ``fields``, and return one logit a row.

    Like an expert it is pure: it draws nothing and never communicates, and a row's logit depends on no other row. The
    first argument of ``__init__`` is the data set's :data:`mixdist.terms.Spec`; all others come from ``init_args`` in a
    config.

    Attributes:
        fields: the one field of a row that it reads, which is the one that its expert samples.
    """

    fields: tuple[str, ...] = ("x",)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logit l(x) = log D(x) - log(1 - D(x)) of "x is data" for rows (R, *shape of x): (R,).

        At the optimum of :func:`discriminator_loss` it is log dP_data(x) - log dP_samples(x), nats.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward")


class MLPDiscriminator(Discriminator):
    """An MLP on flat rows; two hidden layers of 500 are those of seed document 004, section 8.1.

    Args:
        spec: the data set's fields.
        hidden: widths of the hidden layers; none for a linear map.
        activation: of the hidden layers.
        field: which field it reads.

    Raises:
        ValueError: a field that is missing or holds classes; a width below 1.
    """

    def __init__(
        self,
        spec: Spec,
        hidden: Sequence[int] = (500, 500),
        activation: ActivationName = "relu",
        field: str = "x",
    ) -> None:
        super().__init__()
        described = real_field(spec, field, "MLPDiscriminator")
        self.fields, self.shape = (field,), described.shape
        self.net = MLP([described.num_values, *hidden, 1], activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(flat(x, self.shape)).squeeze(-1)


class ConvDiscriminator(Discriminator):
    """Convolutions, each of which halves both sides, and a linear layer; 64, 128 and 256 filters are those of seed
    document 004, section 8.2.

    Args:
        spec: the data set's fields.
        channels: of each level, from the image inwards.
        norm: none or group (GroupNorm; rows stay independent).
        activation: of the levels.
        field: which field it reads.

    Raises:
        ValueError: a field that is missing, holds classes or no images (channels, height, width); images too small
            for so many levels; a width below 1.
    """

    def __init__(
        self,
        spec: Spec,
        channels: Sequence[int] = (64, 128, 256),
        norm: NormName = "none",
        activation: ActivationName = "relu",
        field: str = "x",
    ) -> None:
        super().__init__()
        image = image_shape(real_field(spec, field, "ConvDiscriminator").shape, "ConvDiscriminator", field)
        self.fields = (field,)
        self.net = ConvEncoder(image, channels, 1, norm=norm, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


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
