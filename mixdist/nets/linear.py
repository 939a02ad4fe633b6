"""Linear paths beside any network, so that what is made of it can begin as a linear model.

Shape letters: R rows, E experts (leading, only in a stack), D numbers of a row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mixdist.arguments import check_arguments
from mixdist.nets.mlp import Affine
from mixdist.nets.network import Network


class LinearPaths(Network):
    """Another network with an affine map beside each of its modules: y = net(x) + x W + b.

    The last layer of ``net`` starts at zero, so y is the affine map's alone until the first step; what it should be to
    begin with is the start's to say (:class:`mixdist.mixtures.PCAStart`), and as drawn it is that of
    :class:`mixdist.nets.mlp.Affine`. Stacks of experts are one product where the network's are.

    Args:
        network: the other network; its modules end in a linear layer or a convolution, without an activation after it.
        rate: how fast the affine maps learn beside the network, under Adam and others whose steps do not grow with the
            gradient: W and b are kept divided by it. Weights that begin as principal components are small, and of many
            inputs; at the rate of a network they are lost in the first steps. 0: they stay as they begin.

    Raises:
        ValueError: a rate that is negative or above 1; a module of the network that has no layers, or whose output is
            not 0 with its last layer at 0.

    Examples:
        >>> import torch
        >>> from mixdist.nets import Conv, LinearPaths
        >>> encoder = LinearPaths(Conv([16, 32])).encoder((3, 8, 8), 20)
        >>> x = torch.rand(5, 192)
        >>> torch.equal(encoder(x), encoder.linear(x))
        True
    """

    def __init__(self, network: Network, rate: float = 1.0) -> None:
        check_arguments(LinearPaths.__init__, locals(), "LinearPaths' ")
        if not 0 <= rate <= 1:
            raise ValueError(f"LinearPaths' rate ({rate}) must be from 0 to 1: give 0.02, for example")
        self.network, self.rate, self.stackable = network, rate, network.stackable

    def encoder(self, shape: tuple[int, ...], num_outputs: int) -> Paths:
        return Paths(self.network.encoder(shape, num_outputs), math.prod(shape), num_outputs, self.rate)

    def decoder(self, num_inputs: int, shape: tuple[int, ...], num_maps: int = 1) -> Paths:
        net = self.network.decoder(num_inputs, shape, num_maps)
        return Paths(net, num_inputs, num_maps * math.prod(shape), self.rate)


class Paths(nn.Module):
    """net(x) + c (x W + b), the first term 0 until the first step; c is the rate, or 1 where that is 0.

    Args:
        net: maps (R, num_in) to (R, num_out).
        num_in: numbers taken.
        num_out: numbers given.
        rate: of the affine map, beside 1 for the net.
    """

    def __init__(self, net: nn.Module, num_in: int, num_out: int, rate: float = 1.0) -> None:
        super().__init__()
        _silence(net, num_in)
        self.net, self.linear, self.unit = net, Affine(num_in, num_out), rate or 1.0
        self.set_linear(self.linear.weight.detach().clone(), self.linear.bias.detach().clone())
        self.linear.requires_grad_(rate > 0)

    @torch.no_grad()
    def set_linear(self, weight: Tensor, bias: Tensor) -> None:
        """Set the affine map to x W + b."""
        self.linear.weight.copy_(weight / self.unit)
        self.linear.bias.copy_(bias / self.unit)

    def forward(self, x: Tensor) -> Tensor:
        y, linear = self.net(x), self.linear(x)
        if linear.dim() == 3 or self.unit != 1.0:
            # Of one row, both biases of a stack would get one tensor as their gradient: added to and clipped twice.
            linear = linear * self.unit
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
