"""The softmax gate of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mixdist.gates.softmax import Softmax
from mixdist.nets.conv import ConvEncoder, NormName, image_shape
from mixdist.nets.mlp import ActivationName
from mixdist.terms import Spec


class ConvSoftmax(Softmax):
    """q(e|x) = softmax(f(x) / temperature) with f a convolutional encoder; all but f is the softmax gate's.

    Args:
        spec: the data set's fields.
        num_experts: the number of experts.
        channels: of each level, each of which halves both sides of the image.
        residual: adds a residual block to each level.
        norm: none or group (GroupNorm; rows stay independent).
        activation: of the hidden layers.
        field: which field it reads.
        softmax: the other options of :class:`mixdist.gates.Softmax`, but ``hidden``.

    Raises:
        ValueError: a field that is missing or holds no images (channels, height, width); images too small for so many
            levels; what the softmax gate refuses.
    """

    def __init__(
        self,
        spec: Spec,
        num_experts: int,
        channels: Sequence[int] = (16, 32),
        residual: bool = False,
        norm: NormName = "none",
        activation: ActivationName = "relu",
        field: str = "x",
        **softmax: Any,
    ) -> None:
        super().__init__(spec, num_experts, hidden=(), activation=activation, field=field, **softmax)
        image = image_shape(spec[field].shape, "ConvSoftmax", field)
        # In the place of the base's linear map.
        self.add_module("net", ConvEncoder(image, channels, num_experts, residual, norm, activation))
