"""Small networks, written so that one expert and a stack of experts run the same lines.

Shape letters: R rows, E experts, D features. Every module here acts on the last axis; when its parameters carry a
leading expert axis (put there by :class:`mixdist.experts.bank.ExpertBank`), inputs of shape (R, D) are shared by all
experts, inputs of shape (E, R, D) are each expert's own, and outputs have shape (E, R, D).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from mixdist.arguments import check_arguments
from mixdist.nets.network import Network

ActivationName = Literal["relu", "sigmoid", "tanh", "elu", "silu", "gelu", "softplus"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
}


class Affine(nn.Module):
    """y = x W + b with W stored [in, out], so that a stack of experts is one batched product.

    W is drawn from U(-a, a) with a = sqrt(6 / (in + out)) (Glorot and Bengio 2010, eq. 16); b starts at zero.
    """

    autocast_weights = True
    """Its parameters are read by products alone, which autocast rounds to bfloat16 (``engines/masters.py``)."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_in, num_out))
        self.bias = nn.Parameter(torch.zeros(num_out))
        bound = math.sqrt(6 / (num_in + num_out))
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 2:
            return torch.addmm(self.bias, x, self.weight)
        if x.dim() == 2:
            x = x.expand(self.weight.shape[0], *x.shape)
        return torch.baddbmm(self.bias.unsqueeze(-2), x, self.weight)


class FeedForward(nn.Module):
    """Affine maps with an activation between them, none after the last.

    Args:
        widths: features of the input, of each hidden layer and of the output.
        activation: between the layers.

    Raises:
        ValueError: a width below 1.
    """

    def __init__(self, widths: Sequence[int], activation: ActivationName = "relu") -> None:
        super().__init__()
        if min(widths) < 1:
            raise ValueError(f"layer widths {list(widths)} must all be at least 1: fix hidden")
        layers: list[nn.Module] = []
        for num_in, num_out in pairwise(widths):
            layers += [Affine(num_in, num_out), ACTIVATIONS[activation]()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class MLP(Network):
    """Fully connected layers; a decoder has the encoder's hidden layers in reverse. Stacks of experts are one product.

    Args:
        hidden: widths of the hidden layers, from the row inwards; none for an affine map.
        activation: of the hidden layers.

    Examples:
        >>> import torch
        >>> from mixdist.nets import MLP
        >>> MLP([128]).encoder((1, 28, 28), 20)(torch.zeros(5, 784)).shape
        torch.Size([5, 20])
        >>> MLP([128]).decoder(10, (1, 28, 28))(torch.zeros(5, 10)).shape
        torch.Size([5, 784])
    """

    widths, stackable = ("hidden",), True

    def __init__(self, hidden: Sequence[int] = (128,), activation: ActivationName = "relu") -> None:
        check_arguments(MLP.__init__, locals(), "MLP's ")
        self.hidden, self.activation = tuple(hidden), activation

    def encoder(self, shape: tuple[int, ...], num_outputs: int) -> FeedForward:
        return FeedForward([math.prod(shape), *self.hidden, num_outputs], self.activation)

    def decoder(self, num_inputs: int, shape: tuple[int, ...], num_maps: int = 1) -> FeedForward:
        return FeedForward([num_inputs, *reversed(self.hidden), num_maps * math.prod(shape)], self.activation)


def flat(x: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Return (R, D) for rows (R, *shape), and (E, R, D) for each expert's own rows (E, R, *shape); also where R is 0.

    Args:
        x: rows.
        shape: of one row; unset, all axes but the first.
    """
    shape = x.shape[1:] if shape is None else shape
    return x.reshape(*x.shape[: x.dim() - len(shape)], math.prod(shape))
