"""A centre of its own for any network.

Shape letters: R rows, D numbers of a row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mixdist.arguments import check_arguments
from mixdist.nets.network import Network


class Centred(Network):
    """Another network around a centre c: its encoder is net(x - c), its decoder net(z) + c.

    Values are centred over all rows; to a network whose rows lie together far from 0 they look almost alike. c is 0
    until a start sets it (:class:`mixdist.mixtures.ClusterStart`: to the mean of the expert's cluster); it does not
    learn, and is saved with the weights. Of a decoder that gives scales, too, it is added to the means alone.

    Args:
        network: the other network.

    Examples:
        >>> import torch
        >>> from mixdist.nets import MLP, Centred
        >>> decoder = Centred(MLP([8])).decoder(2, (3,))
        >>> z, before = torch.zeros(1, 2), decoder(torch.zeros(1, 2))
        >>> decoder.set(torch.tensor([1.0, 2.0, 3.0]))
        >>> decoder(z) - before
        tensor([[1., 2., 3.]], grad_fn=<SubBackward0>)
    """

    def __init__(self, network: Network) -> None:
        check_arguments(Centred.__init__, locals(), "Centred's ")
        self.network = network

    def encoder(self, shape: tuple[int, ...], num_outputs: int) -> Around:
        return Around(self.network.encoder(shape, num_outputs), math.prod(shape), decodes=False)

    def decoder(self, num_inputs: int, shape: tuple[int, ...], num_maps: int = 1) -> Around:
        return Around(self.network.decoder(num_inputs, shape, num_maps), math.prod(shape), decodes=True)


class Around(nn.Module):
    """net(x - c) of an encoder, net(z) + c of a decoder.

    Args:
        net: the network's module.
        size: D.
        decodes: it is a decoder.
    """

    centre_D: Tensor

    def __init__(self, net: nn.Module, size: int, decodes: bool) -> None:
        super().__init__()
        self.net, self.decodes = net, decodes
        self.register_buffer("centre_D", torch.zeros(size))

    @torch.no_grad()
    def set(self, centre_D: Tensor) -> None:
        """Set c.

        Raises:
            ValueError: it has not as many numbers as a row.
        """
        if centre_D.shape != self.centre_D.shape:
            raise ValueError(
                f"a centre of {len(centre_D)} numbers does not fit rows of {len(self.centre_D)}: name the field that "
                f"the expert models"
            )
        self.centre_D.copy_(centre_D)

    def forward(self, x: Tensor) -> Tensor:
        if not self.decodes:
            return self.net(x - self.centre_D)
        y = self.net(x)
        return y + pad(self.centre_D, (0, y.shape[-1] - len(self.centre_D)))
