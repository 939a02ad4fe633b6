"""Convolutional networks for images of any size, one halving of the size a level.

Shape letters: R rows, C channels, H height, W width, D = C H W. A row passes through on its own: there is no batch
normalisation, so a row's result does not depend on the others, nor on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from mixdist.arguments import check_arguments
from mixdist.nets.mlp import ACTIVATIONS, ActivationName, Affine
from mixdist.nets.network import Network

NormName = Literal["none", "group"]
_KERNELS, _STRIDE = (3, 4, 5), 2
_BRANCH_GAIN = 0.1


class Conv(Network):
    """Convolutions of stride 2, each of which halves both sides of an image; a decoder mirrors the encoder's sizes.

    Args:
        channels: of each level, from the image inwards.
        residual: adds a residual block to each level.
        norm: none or group (GroupNorm; rows stay independent).
        activation: of the hidden layers.
        kernel: side of the kernels of the levels, 3 to 5; residual blocks have 3.

    Examples:
        >>> import torch
        >>> from mixdist.nets import Conv
        >>> Conv([16, 32], norm="group").encoder((3, 9, 6), 20)(torch.zeros(5, 162)).shape
        torch.Size([5, 20])
        >>> Conv([16, 32]).decoder(10, (3, 9, 6), num_maps=2)(torch.zeros(5, 10)).shape
        torch.Size([5, 324])
    """

    widths = ("channels",)

    def __init__(
        self,
        channels: Sequence[int] = (32, 64, 128),
        residual: bool = False,
        norm: NormName = "none",
        activation: ActivationName = "relu",
        kernel: int = 3,
    ) -> None:
        check_arguments(Conv.__init__, locals(), "Conv's ")
        self.channels, self.residual, self.norm = tuple(channels), residual, norm
        self.activation, self.kernel = activation, kernel

    def encoder(self, shape: tuple[int, ...], num_outputs: int) -> ConvEncoder:
        return ConvEncoder(self, image_shape(shape, "Conv"), num_outputs)

    def decoder(self, num_inputs: int, shape: tuple[int, ...], num_maps: int = 1) -> ConvDecoder:
        channels, height, width = image_shape(shape, "Conv")
        return ConvDecoder(self, num_inputs, (num_maps * channels, height, width))

    def sizes(self, image: tuple[int, int, int]) -> list[tuple[int, int]]:
        """Return height and width of an image and after each level.

        Raises:
            ValueError: no level, a width below 1, another kernel, an image too small for so many levels, or a norm over
                a single value.
        """
        if self.kernel not in _KERNELS:
            raise ValueError(f"kernel ({self.kernel}) must be one of {list(_KERNELS)}: choose a side")
        channels, size = list(self.channels), image[1:]
        if not channels or min(channels) < 1:
            raise ValueError(f"channels {channels} must be at least one number from 1: give one for each level")
        sizes = [size]
        for level, width in enumerate(channels):
            if min(size) < 2:
                raise ValueError(
                    f"channels {channels} have {len(channels)} levels, but images of {image[1]}x{image[2]} are "
                    f"{size[0]}x{size[1]} after {level}, and each level halves both sides: give at most {level}"
                )
            size = (-(-size[0] // 2), -(-size[1] // 2))
            sizes.append(size)
            if self.norm == "group" and width * math.prod(size) == 1:
                raise ValueError(f"norm 'group' has a single value at level {level} of channels {channels}: widen it")
        return sizes

    def padding(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the padding that maps sides h to ceil(h / 2); for kernels of an even side it depends on h."""
        return (self.kernel - 1 + size[0] % 2) // 2, (self.kernel - 1 + size[1] % 2) // 2

    def after(self, width: int) -> list[nn.Module]:
        """Return norm and activation of a convolution with ``width`` channels."""
        return norm_and_activation(width, self.norm, ACTIVATIONS[self.activation]())


class ConvEncoder(nn.Module):
    """Images to vectors: a level is a convolution of stride 2 (sides h to ceil(h / 2)), norm, activation; then one
    affine map.

    Both ends of a side are padded by floor((k - 1 + h mod 2) / 2) for kernels of side k.

    Weights are drawn from U(-a, a) with a = sqrt(6 / n), n the inputs of one output (He et al. 2015, eq. 10); biases
    start at zero. The affine map is drawn as in :class:`mixdist.nets.mlp.Affine`.

    Args:
        net: the options of all levels. A residual block x + conv(activation(norm(conv(x)))) (He et al. 2016) starts
            near the identity: its second convolution at a tenth. GroupNorm (Wu and He 2018) has at most 8 groups of at
            least 4 channels.
        image: (C, H, W).
        num_out: features given.
    """

    def __init__(self, net: Conv, image: tuple[int, int, int], num_out: int) -> None:
        super().__init__()
        sizes, self.image = net.sizes(image), image
        levels: list[nn.Module] = []
        for num_in, width, size in zip((image[0], *net.channels), net.channels, sizes, strict=False):
            down = nn.Conv2d(num_in, width, net.kernel, _STRIDE, padding=net.padding(size))
            start_conv(down, num_in * net.kernel**2)
            levels += [down, *net.after(width)]
            if net.residual:
                levels.append(Residual(net, width))
        self.levels = nn.Sequential(*levels)
        self.head = Affine(net.channels[-1] * math.prod(sizes[-1]), num_out)

    def forward(self, x: Tensor) -> Tensor:
        """Return (R, num_out) for flat rows (R, D), or images (R, C, H, W)."""
        # flatten, not view: in memory of channels_last the rows are in another order.
        return self.head(self.levels(x.reshape(x.shape[0], *self.image)).flatten(1))


class ConvDecoder(nn.Module):
    """Vectors to images: the mirror of :class:`ConvEncoder`; each level goes back to exactly the encoder's size there.

    A level is the transpose of the encoder's convolution there (3x3 takes on one CPU core half the time of 4x4, a third
    of convolution and pixel shuffle, a fifth of nearest neighbours and convolution), so each side is padded as there
    and gets (h + k) mod 2 more at its end; then norm and activation, which the image's own planes at the end do not
    have. The weights start as in the encoder.

    Args:
        net: the options of all levels; a residual block stands before its level's size is doubled.
        num_in: features taken.
        image: (channels_out, H, W).
    """

    def __init__(self, net: Conv, num_in: int, image: tuple[int, int, int]) -> None:
        super().__init__()
        sizes, channels = net.sizes(image), net.channels
        self.start = (channels[-1], *sizes[-1])
        self.stem = Affine(num_in, math.prod(self.start))
        self.activation = ACTIVATIONS[net.activation]()
        levels: list[nn.Module] = []
        for i in reversed(range(len(channels))):
            width, num_out = channels[i], channels[i - 1] if i else image[0]
            if net.residual:
                levels.append(Residual(net, width))
            more = ((sizes[i][0] + net.kernel) % 2, (sizes[i][1] + net.kernel) % 2)
            up = nn.ConvTranspose2d(width, num_out, net.kernel, _STRIDE, net.padding(sizes[i]), more)
            start_conv(up, width * net.kernel**2 / _STRIDE**2)
            levels += [up, *net.after(num_out)] if i else [up]
        self.levels = nn.Sequential(*levels)

    def forward(self, z: Tensor) -> Tensor:
        """Return flat rows (R, channels_out H W) for vectors (R, num_in)."""
        return self.levels(self.activation(self.stem(z)).reshape(z.shape[0], *self.start)).flatten(1)


class Residual(nn.Module):
    """x + conv(activation(norm(conv(x)))), 3x3, at one size and width."""

    def __init__(self, net: Conv, width: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        start_conv(first, width * 3**2)
        start_conv(second, width * 3**2, _BRANCH_GAIN)
        self.branch = nn.Sequential(first, *net.after(width), second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def norm_and_activation(width: int, norm: NormName, activation: nn.Module) -> list[nn.Module]:
    """Return what stands after a convolution with ``width`` channels."""
    if norm == "none":
        return [activation]
    # Groups of one channel would remove the mean of every plane, which at 1x1 is all that it has.
    groups = next(g for g in (8, 4, 2, 1) if g == 1 or (width % g == 0 and width // g >= 4))
    return [nn.GroupNorm(groups, width), activation]


def image_shape(shape: tuple[int, ...], network: str) -> tuple[int, int, int]:
    """Return channels, height and width of rows.

    Raises:
        ValueError: they are no images; the message names the network.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(
            f"network {network} needs images (channels, height, width), but rows have shape {shape}: "
            "set field to one that holds images, or use mixdist.nets.MLP"
        )
    return shape[0], shape[1], shape[2]


def start_conv(conv: nn.Conv2d | nn.ConvTranspose2d, num_inputs: float, gain: float = 1.0) -> None:
    """Draw a convolution's weights from U(-a, a), a = gain sqrt(6 / n), n the inputs of one output; no biases."""
    bound = gain * math.sqrt(6 / num_inputs)
    nn.init.uniform_(conv.weight, -bound, bound)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
