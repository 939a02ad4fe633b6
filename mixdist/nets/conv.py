"""Convolutional networks for images of any size, one halving of the size a level.

Shape letters: R rows, C channels, H height, W width, D = C H W. A row passes through on its own: there is no batch
normalisation, so a row's result does not depend on the others, nor on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

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

    def __init__(
        self,
        channels: Sequence[int] = (32, 64, 128),
        residual: bool = False,
        norm: NormName = "none",
        activation: ActivationName = "relu",
        kernel: int = 3,
    ) -> None:
        self.channels, self.residual, self.norm = tuple(channels), residual, norm
        self.activation, self.kernel = activation, kernel

    def encoder(self, shape: tuple[int, ...], num_outputs: int) -> ConvEncoder:
        image = _image_shape(shape)
        return ConvEncoder(image, self.channels, num_outputs, self.residual, self.norm, self.activation, self.kernel)

    def decoder(self, num_inputs: int, shape: tuple[int, ...], num_maps: int = 1) -> ConvDecoder:
        channels, height, width = _image_shape(shape)
        image = (num_maps * channels, height, width)
        return ConvDecoder(num_inputs, image, self.channels, self.residual, self.norm, self.activation, self.kernel)


class ConvEncoder(nn.Module):
    """Images to vectors: a level is a convolution of stride 2 (sides h to ceil(h / 2)), norm, activation; then one
    affine map.

    Both ends of a side are padded by floor((k - 1 + h mod 2) / 2) for kernels of side k.

    Weights are drawn from U(-a, a) with a = sqrt(6 / n), n the inputs of one output (He et al. 2015, eq. 10); biases
    start at zero. The affine map is drawn as in :class:`mixdist.nets.mlp.Affine`.

    Args:
        image: (C, H, W).
        channels: of each level, from the image inwards.
        num_out: features given.
        residual: adds a 3x3 block x + conv(activation(norm(conv(x)))) to each level (He et al. 2016); its second
            convolution starts at a tenth, so that the block starts near the identity.
        norm: none, or group: GroupNorm (Wu and He 2018) with at most 8 groups of at least 4 channels.
        activation: by name.
        kernel: side k of each level's kernel, 3 to 5.

    Raises:
        ValueError: no level, a width below 1, another kernel, an image too small for so many levels, or a norm over a
            single value.
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        channels: Sequence[int],
        num_out: int,
        residual: bool = False,
        norm: NormName = "none",
        activation: ActivationName = "relu",
        kernel: int = 3,
    ) -> None:
        super().__init__()
        sizes = _sizes(image, channels, norm, kernel)
        self.image = image
        levels: list[nn.Module] = []
        for num_in, width, size in zip((image[0], *channels), channels, sizes, strict=False):
            down = nn.Conv2d(num_in, width, kernel, _STRIDE, padding=_padding(size, kernel))
            _start(down, num_in * kernel**2)
            levels += [down, *_after(width, norm, activation)]
            if residual:
                levels.append(Residual(width, norm, activation))
        self.levels = nn.Sequential(*levels)
        self.head = Affine(channels[-1] * math.prod(sizes[-1]), _positive("num_out", num_out))

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
        num_in: features taken.
        image: (channels_out, H, W).
        channels: of each level, from the image inwards, as in the encoder.
        residual: adds a block to each level, before its size is doubled.
        norm: none or group.
        activation: by name.
        kernel: side of each level's kernel, 3 to 5.

    Raises:
        ValueError: as the encoder.
    """

    def __init__(
        self,
        num_in: int,
        image: tuple[int, int, int],
        channels: Sequence[int],
        residual: bool = False,
        norm: NormName = "none",
        activation: ActivationName = "relu",
        kernel: int = 3,
    ) -> None:
        super().__init__()
        sizes = _sizes(image, channels, norm, kernel)
        self.start = (channels[-1], *sizes[-1])
        self.stem = Affine(_positive("num_in", num_in), math.prod(self.start))
        self.activation = ACTIVATIONS[activation]()
        levels: list[nn.Module] = []
        for i in reversed(range(len(channels))):
            width, num_out = channels[i], channels[i - 1] if i else image[0]
            if residual:
                levels.append(Residual(width, norm, activation))
            more = ((sizes[i][0] + kernel) % 2, (sizes[i][1] + kernel) % 2)
            up = nn.ConvTranspose2d(width, num_out, kernel, _STRIDE, _padding(sizes[i], kernel), more)
            _start(up, width * kernel**2 / _STRIDE**2)
            levels += [up, *_after(num_out, norm, activation)] if i else [up]
        self.levels = nn.Sequential(*levels)

    def forward(self, z: Tensor) -> Tensor:
        """Return flat rows (R, channels_out H W) for vectors (R, num_in)."""
        return self.levels(self.activation(self.stem(z)).reshape(z.shape[0], *self.start)).flatten(1)


class Residual(nn.Module):
    """x + conv(activation(norm(conv(x)))), 3x3, at one size and width (He et al. 2016).

    Args:
        width: channels.
        norm: none or group.
        activation: by name.
    """

    def __init__(self, width: int, norm: NormName, activation: ActivationName) -> None:
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        _start(first, width * 3**2)
        _start(second, width * 3**2, _BRANCH_GAIN)
        self.branch = nn.Sequential(first, *_after(width, norm, activation), second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def _image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(
            f"network Conv needs images (channels, height, width), but rows have shape {shape}: "
            "set field to one that holds images, or use mixdist.nets.MLP"
        )
    return shape[0], shape[1], shape[2]


def _sizes(image: tuple[int, int, int], channels: Sequence[int], norm: NormName, kernel: int) -> list[tuple[int, int]]:
    """Return height and width of the image and after each level."""
    if kernel not in _KERNELS:
        raise ValueError(f"kernel ({kernel}) must be one of {list(_KERNELS)}: choose a side")
    if not channels or min(channels) < 1:
        raise ValueError(f"channels {list(channels)} must be at least one number from 1: give one for each level")
    size = image[1:]
    sizes = [size]
    for level, width in enumerate(channels):
        if min(size) < 2:
            raise ValueError(
                f"channels {list(channels)} have {len(channels)} levels, but images of {image[1]}x{image[2]} are "
                f"{size[0]}x{size[1]} after {level}, and each level halves both sides: give at most {level}"
            )
        size = (-(-size[0] // 2), -(-size[1] // 2))
        sizes.append(size)
        if norm == "group" and width * math.prod(size) == 1:
            raise ValueError(f"norm 'group' has a single value at level {level} of channels {list(channels)}: widen it")
    return sizes


def _padding(size: tuple[int, int], kernel: int) -> tuple[int, int]:
    """Return the padding that maps sides h to ceil(h / 2); for kernels of an even side it depends on h."""
    return (kernel - 1 + size[0] % 2) // 2, (kernel - 1 + size[1] % 2) // 2


def _after(width: int, norm: NormName, activation: ActivationName) -> list[nn.Module]:
    act = ACTIVATIONS[activation]()
    if norm == "none":
        return [act]
    # Groups of one channel would remove the mean of every plane, which at 1x1 is all that it has.
    groups = next(g for g in (8, 4, 2, 1) if g == 1 or (width % g == 0 and width // g >= 4))
    return [nn.GroupNorm(groups, width), act]


def _start(conv: nn.Conv2d | nn.ConvTranspose2d, num_inputs: float, gain: float = 1.0) -> None:
    bound = gain * math.sqrt(6 / num_inputs)
    nn.init.uniform_(conv.weight, -bound, bound)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} ({value}) must be at least 1: fix the widths")
    return value
