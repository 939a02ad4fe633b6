"""Convolutions over the places of a text.

Shape letters: R rows, T places, V words, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from mixdist.arguments import check_arguments
from mixdist.nets.mlp import ACTIVATIONS, ActivationName, Affine
from mixdist.nets.network import Network

_KERNEL, _STRIDE = 3, 2


class Text(Network):
    """An embedding of words, then convolutions of stride 2 along the text; a decoder mirrors the sizes.

    It takes rows (T, V) of one-hot words, as :class:`mixdist.experts.Modality` gives them.

    Args:
        embedding: numbers of a word.
        channels: of each level, from the text inwards.
        activation: of the hidden layers.

    Examples:
        >>> import torch
        >>> from mixdist.nets import Text
        >>> Text(8, [16, 32]).encoder((10, 50), 6)(torch.zeros(5, 500)).shape
        torch.Size([5, 6])
        >>> Text(8, [16, 32]).decoder(6, (10, 50))(torch.zeros(5, 6)).shape
        torch.Size([5, 500])
    """

    widths = ("channels",)

    def __init__(
        self, embedding: int = 128, channels: Sequence[int] = (128, 256), activation: ActivationName = "relu"
    ) -> None:
        check_arguments(Text.__init__, locals(), "Text's ")
        self.embedding, self.channels, self.activation = embedding, tuple(channels), activation

    def encoder(self, shape: tuple[int, ...], num_outputs: int) -> TextEncoder:
        return TextEncoder(self, _text_shape(shape), num_outputs)

    def decoder(self, num_inputs: int, shape: tuple[int, ...], num_maps: int = 1) -> TextDecoder:
        places, words = _text_shape(shape)
        return TextDecoder(self, num_inputs, (places, num_maps * words))

    def sizes(self, places: int) -> list[int]:
        """Return the length of a text and after each level.

        Raises:
            ValueError: a width below 1, or a text too short for so many levels.
        """
        widths, sizes = [self.embedding, *self.channels], [places]
        if min(widths) < 1:
            raise ValueError(f"embedding and channels {widths} must all be at least 1: fix them")
        for level in range(len(self.channels)):
            if sizes[-1] < 2:
                raise ValueError(
                    f"channels {list(self.channels)} have {len(self.channels)} levels, but texts of {places} places "
                    f"have 1 after {level}, and each level halves them: give at most {level}"
                )
            sizes.append(-(-sizes[-1] // _STRIDE))
        return sizes


class TextEncoder(nn.Module):
    """One-hot words to a vector: embedding, levels of a convolution and an activation, one affine map.

    Args:
        net: the options of all levels.
        text: (T, V).
        num_out: features given.
    """

    def __init__(self, net: Text, text: tuple[int, int], num_out: int) -> None:
        super().__init__()
        sizes, self.text = net.sizes(text[0]), text
        self.embed = Affine(text[1], net.embedding)
        levels: list[nn.Module] = []
        for num_in, width in zip((net.embedding, *net.channels), net.channels, strict=False):
            levels += [_start(nn.Conv1d(num_in, width, _KERNEL, _STRIDE, padding=1)), ACTIVATIONS[net.activation]()]
        self.levels = nn.Sequential(*levels)
        self.head = Affine((net.embedding, *net.channels)[-1] * sizes[-1], num_out)

    def forward(self, x: Tensor) -> Tensor:
        """Return (R, num_out) for flat rows (R, T V)."""
        words = self.embed(x.reshape(-1, self.text[1])).unflatten(0, (x.shape[0], self.text[0]))
        return self.head(self.levels(words.transpose(1, 2)).flatten(1))


class TextDecoder(nn.Module):
    """Vectors to scores of words: the mirror of :class:`TextEncoder`.

    Args:
        net: the options of all levels.
        num_in: features taken.
        text: (T, V).
    """

    def __init__(self, net: Text, num_in: int, text: tuple[int, int]) -> None:
        super().__init__()
        sizes, widths = net.sizes(text[0]), (net.embedding, *net.channels)
        self.start = (widths[-1], sizes[-1])
        self.stem, activation = Affine(num_in, math.prod(self.start)), ACTIVATIONS[net.activation]
        levels: list[nn.Module] = [activation()]
        for level in reversed(range(len(net.channels))):
            # The transpose of the encoder's convolution goes back to its length, odd or even.
            more = (sizes[level] + 1) % 2
            up = nn.ConvTranspose1d(widths[level + 1], widths[level], _KERNEL, _STRIDE, 1, more)
            levels += [_start(up), activation()]
        self.levels = nn.Sequential(*levels)
        self.words = Affine(net.embedding, text[1])

    def forward(self, z: Tensor) -> Tensor:
        """Return flat rows (R, T V) for vectors (R, num_in)."""
        maps = self.levels(self.stem(z).reshape(z.shape[0], *self.start))
        places = maps.transpose(1, 2)
        return self.words(places.flatten(0, 1)).unflatten(0, places.shape[:2]).flatten(1)


def _text_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(
            f"network Text needs texts (places, words), but rows have shape {shape}: set likelihood to categorical and "
            f"field to one that holds texts, or use mixdist.nets.MLP"
        )
    return shape[0], shape[1]


def _start(conv: nn.Conv1d | nn.ConvTranspose1d) -> nn.Module:
    """Draw weights from U(-a, a) with a = sqrt(6 / n), n the inputs of one output (He et al. 2015, eq. 10)."""
    num_inputs = conv.in_channels * _KERNEL / (_STRIDE if isinstance(conv, nn.ConvTranspose1d) else 1)
    bound = math.sqrt(6 / num_inputs)
    nn.init.uniform_(conv.weight, -bound, bound)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
