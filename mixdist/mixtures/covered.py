"""Modules that need no calls on parts of the rows: the package's own, which parity tests run on every layout."""

from __future__ import annotations

from torch import nn

from mixdist.mixtures.held import OF_TORCH

BY_ROW = frozenset(
    {
        nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, nn.Identity,
        nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.LayerNorm, nn.GroupNorm,
        nn.ReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.LeakyReLU,
    }
)  # fmt: skip
"""Modules of torch that treat each row by itself, draw nothing and keep no state."""


def is_covered(module: nn.Module) -> bool:
    """Return whether a module and all inside it are of the package or of :data:`BY_ROW`, as they were made.

    Hooks and functions that an instance has of its own may do anything.
    """
    return all(_is_plain(one) for one in module.modules())


def is_packaged(one: object) -> bool:
    """Return whether the class of an object is the package's own."""
    return type(one).__module__.partition(".")[0] == "mixdist"


def _is_plain(one: nn.Module) -> bool:
    own = (value for name, value in vars(one).items() if name not in OF_TORCH)
    known = type(one) in BY_ROW or is_packaged(one)
    return known and not (one._forward_hooks or one._forward_pre_hooks or any(map(callable, own)))
