"""Transposed convolutions from a feature map to an image: the shared decoder of a mixture of convolutional components.

Shape letters: R rows, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from mixdist.arguments import check_arguments
from mixdist.nets.conv import NormName, image_shape, norm_and_activation, start_conv
from mixdist.nets.mlp import ACTIVATIONS, ActivationName
from mixdist.nets.network import Network


class Deconv(Network):
    """Transposed 3x3 convolutions that take a feature map, not a vector: seed document 002, section V-B.

    The seed's sub-decoders give 8x8x256 numbers, and its shared decoder has seven layers: here six widths and the layer
    that gives the image. It does not say which layers double the sides; here they are spread evenly, the last among
    them, so that 8x8 becomes 64x64 in layers 3, 5 and 7 and 32x32 in layers 4 and 7. Sides that are no multiple are
    reached as :class:`mixdist.nets.Conv` reaches them: 7x7, 14x14, 28x28.

    Args:
        feature: channels, height and width of the map that comes in, as a flat row: a component has as many
            ``features``.
        channels: of the layers before the last one, from the feature to the image.
        norm: none or group, as of :class:`mixdist.nets.Conv`.
        activation: of all layers but the last one.

    Examples:
        >>> import torch
        >>> from mixdist.nets import Deconv
        >>> Deconv([4, 8, 8], [8, 8, 8, 4, 4, 4]).decoder(256, (3, 32, 32))(torch.zeros(5, 256)).shape
        torch.Size([5, 3072])
    """

    widths = ("channels",)

    def __init__(
        self,
        feature: Sequence[int] = (256, 8, 8),
        channels: Sequence[int] = (256, 256, 128, 128, 64, 64),
        norm: NormName = "none",
        activation: ActivationName = "relu",
    ) -> None:
        check_arguments(Deconv.__init__, locals(), "Deconv's ")
        self.feature, self.channels = tuple(feature), tuple(channels)
        self.norm, self.activation = norm, activation
        if len(self.feature) != 3 or min(self.feature) < 1:
            raise ValueError(f"Deconv's feature {list(feature)} must be channels, height and width: give [256, 8, 8]")
        if any(width < 1 for width in self.channels):
            raise ValueError(f"Deconv's channels {list(channels)} must be numbers from 1: give one for each layer")

    def encoder(self, shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        raise ValueError("network Deconv makes decoders only: take mixdist.nets.Conv for an encoder")

    def decoder(self, num_inputs: int, shape: tuple[int, ...], num_maps: int = 1) -> DeconvDecoder:
        channels, height, width = image_shape(shape, "Deconv")
        if num_inputs != math.prod(self.feature):
            raise ValueError(
                f"Deconv's feature {list(self.feature)} has {math.prod(self.feature)} numbers, and {num_inputs} come "
                f"in: set feature to the shape of what it is given, or the components' features to "
                f"{math.prod(self.feature)}"
            )
        return DeconvDecoder(self, (num_maps * channels, height, width))

    def sizes(self, image: tuple[int, int, int]) -> list[tuple[int, int]]:
        """Return height and width of the feature and after each doubling, up to the image's.

        Raises:
            ValueError: no doubling leads there, or fewer layers than doublings.
        """
        sizes, wanted = [(image[1], image[2])], self.feature[1:]
        while sizes[0] != wanted and max(sizes[0]) > 1:
            sizes.insert(0, (-(-sizes[0][0] // 2), -(-sizes[0][1] // 2)))
        if sizes[0] != wanted:
            halved = ", ".join(f"{h}x{w}" for h, w in reversed(sizes))
            raise ValueError(
                f"Deconv's feature {list(self.feature)} does not become images of {image[1]}x{image[2]} by doubling "
                f"its sides: give it one of {halved}"
            )
        if len(sizes) - 1 > len(self.channels) + 1:
            raise ValueError(
                f"Deconv's channels {list(self.channels)} make {len(self.channels) + 1} layers, and from "
                f"{wanted[0]}x{wanted[1]} to {image[1]}x{image[2]} there are {len(sizes) - 1} doublings: give at least "
                f"{len(sizes) - 2} numbers"
            )
        return sizes


class DeconvDecoder(nn.Module):
    """Flat feature maps to flat images.

    A layer is the transpose of a 3x3 convolution, of stride 2 where it doubles the sides, else 1; then norm and
    activation, which the last layer does not have. Weights are drawn as those of :class:`mixdist.nets.Conv`.

    Args:
        net: the options of all layers.
        image: (channels_out, H, W).
    """

    def __init__(self, net: Deconv, image: tuple[int, int, int]) -> None:
        super().__init__()
        sizes, widths = net.sizes(image), (*net.channels, image[0])
        self.feature, num, doublings = net.feature, len(widths), len(sizes) - 1
        layers: list[nn.Module] = []
        for i, (num_in, width) in enumerate(zip((net.feature[0], *net.channels), widths, strict=True)):
            done, after = i * doublings // num, (i + 1) * doublings // num
            stride = 1 + after - done
            height, across = sizes[after]
            more = ((height + 1) % 2, (across + 1) % 2) if stride == 2 else (0, 0)
            layer = nn.ConvTranspose2d(num_in, width, 3, stride, 1, more)
            start_conv(layer, num_in * 9 / stride**2)
            layers.append(layer)
            if i + 1 < num:
                layers += norm_and_activation(width, net.norm, ACTIVATIONS[net.activation]())
        self.layers = nn.Sequential(*layers)

    def forward(self, feature: Tensor) -> Tensor:
        """Return flat rows (R, channels_out H W) for flat feature maps (R, C H W)."""
        return self.layers(feature.reshape(-1, *self.feature)).flatten(1)
