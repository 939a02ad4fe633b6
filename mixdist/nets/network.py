"""The base class of networks: descriptions that make encoders and decoders for rows of a given shape.

Shape letters: R rows, E experts (leading, only in a stack), D numbers of a row.
"""

from __future__ import annotations

from torch import nn


class Network:
    """Base of all networks: subclass it, keep the options in ``__init__``, and return modules from ``encoder``.

    Experts, gates and discriminators take one as their argument ``network``, and make from it the modules they need. A
    description holds no parameters, so that all experts share one. All its modules act on flat rows and on each row
    alone: no batch statistics, no random draws. Their layers are drawn in the order in which they are made.

    Attributes:
        widths: the names of the arguments that are widths of hidden layers, numbers or lists of numbers: ``mixdist
            baseline vae --size mixture`` scales them.
        stackable: True when the modules also accept parameters with a leading expert axis, as those of
            :class:`mixdist.nets.MLP` do: (R, D) or (E, R, D) to (E, R, ...).

    Examples:
        >>> import math, torch
        >>> from mixdist.gates import Softmax
        >>> from mixdist.nets import Network
        >>> from mixdist.terms import Field
        >>> class Linear(Network):
        ...     def encoder(self, shape, num_outputs):
        ...         return torch.nn.Linear(math.prod(shape), num_outputs)
        >>> gate = Softmax({"x": Field((1, 8, 8), torch.float32)}, num_experts=3, network=Linear())
        >>> gate({"x": torch.zeros(5, 1, 8, 8)}, None).log_resp_BE.shape
        torch.Size([5, 3])
    """

    widths: tuple[str, ...] = ()
    stackable: bool = False

    def encoder(self, shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        """Return a module that maps flat rows (R, D), D = prod(shape), to (R, num_outputs).

        Raises:
            ValueError: rows of that shape are not for this network.
        """
        raise NotImplementedError(f"{type(self).__name__} has no encoder")

    def decoder(self, num_inputs: int, shape: tuple[int, ...], num_maps: int = 1) -> nn.Module:
        """Return a module that maps (R, num_inputs) to flat rows (R, num_maps * D), one map after another.

        Args:
            num_inputs: numbers taken.
            shape: of one row, D = prod(shape).
            num_maps: numbers for each of the D values, such as 2 for a mean and a scale: ``output.chunk(2, -1)``.

        Raises:
            ValueError: rows of that shape are not for this network.
        """
        raise NotImplementedError(f"{type(self).__name__} has no decoder")
