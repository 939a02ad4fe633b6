"""Linear paths beside any network, so that what is made of it can begin as a linear model.

Shape letters: R rows, E experts (leading, only in a stack), D numbers of a row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mixdist.nets.mlp import Affine
from mixdist.nets.network import Network


class LinearPaths(Network):
    """Another network with an affine map beside each of its modules: y = net(x) + x W + b.

    The last layer of ``net`` starts at zero, so y is the affine map's alone until the first step; what it should be to
    begin with is the start's to say (:class:`mixdist.mixtures.PCAStart`), and as drawn it is that of
    :class:`mixdist.nets.mlp.Affine`. Stacks of experts are one product where the network's are.

    Args:
        network: the other network; its modules end in a linear layer or a convolution, without an activation after it.

    Raises:
        ValueError: a module of the network that has no layers, or whose output is not 0 with its last layer at 0.

    Examples:
        >>> import torch
        >>> from mixdist.nets import Conv, LinearPaths
        >>> encoder = LinearPaths(Conv([16, 32])).encoder((3, 8, 8), 20)
        >>> x = torch.rand(5, 192)
        >>> torch.equal(encoder(x), encoder.linear(x))
        True
    """

    def __init__(self, network: Network) -> None:
        self.network, self.stackable = network, network.stackable

    def encoder(self, shape: tuple[int, ...], num_outputs: int) -> Paths:
        return Paths(self.network.encoder(shape, num_outputs), math.prod(shape), num_outputs)

    def decoder(self, num_inputs: int, shape: tuple[int, ...], num_maps: int = 1) -> Paths:
        net = self.network.decoder(num_inputs, shape, num_maps)
        return Paths(net, num_inputs, num_maps * math.prod(shape))


class Paths(nn.Module):
    """net(x) + x W + b, the first term 0 until the first step.

    Args:
        net: maps (R, num_in) to (R, num_out).
        num_in: numbers taken.
        num_out: numbers given.
    """

    def __init__(self, net: nn.Module, num_in: int, num_out: int) -> None:
        super().__init__()
        _silence(net, num_in)
        self.net, self.linear = net, Affine(num_in, num_out)

    def forward(self, x: Tensor) -> Tensor:
        y, linear = self.net(x), self.linear(x)
        if linear.dim() == 3:
            # Of one row, both biases of a stack would get one tensor as their gradient: added to and clipped twice.
            linear = linear * 1.0
        return y + linear


@torch.no_grad()
def _silence(net: nn.Module, num_in: int) -> None:
    """Set the last layer of a network to 0, and see that its output is 0 then."""
    named = [(name, layer) for name, layer in net.named_modules() if any(True for _ in layer.parameters(recurse=False))]
    kind = type(net).__name__
    if not named:
        raise ValueError(
            f"network LinearPaths around {kind}, which has no layers with parameters: name another network"
        )
    name, last = named[-1]
    for parameter in last.parameters(recurse=False):
        parameter.zero_()
    output = net(torch.linspace(-1.0, 1.0, 2 * num_in).reshape(2, num_in))
    if not output.is_meta and not bool((output == 0).all()):
        worst = float(output.abs().max())
        raise ValueError(
            f"network LinearPaths around {kind}, whose output is {worst:.6g} with its last layer ({name or kind}) at "
            f"0, expected 0: end it with a linear layer, and no activation after it"
        )
