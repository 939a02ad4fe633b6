"""Modules that need no calls on parts of the rows: the package's own, which parity tests run on every layout."""

from __future__ import annotations

from types import FunctionType

import torch
from torch import nn
from torch.nn.modules import module as of_all_modules

from mixdist.mixtures.held import OF_TORCH

BY_ROW = frozenset(
    {
        nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, nn.Identity,
        nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.GroupNorm,
        nn.ReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.LeakyReLU,
    }
)  # fmt: skip
"""Modules of torch that treat each row by itself, draw nothing and keep no state. Not ``Conv1d`` and ``LayerNorm``: to
them flat rows may be one row of as many channels."""
_TENSORS = frozenset({torch.Tensor, nn.Parameter, type(None)})


def is_covered(module: nn.Module) -> bool:
    """Return whether a module and all inside it are of the package or of :data:`BY_ROW`, as they were written.

    Hooks, functions that an instance or a class was given later, and tensors of classes of their own, which say what
    operations do, may do anything.
    """
    if of_all_modules._global_forward_hooks or of_all_modules._global_forward_pre_hooks:
        return False
    inside = list(module.modules())
    return all(map(_is_plain, inside)) and all(map(_is_as_written, {type(one) for one in inside}))


def is_covered_in_a_stack(module: nn.Module) -> bool:
    """Return whether a stackable module is covered, and has no parameters but in modules of the package."""
    return is_covered(module) and all(is_packaged(one) or not one._parameters for one in module.modules())


def is_packaged(one: object) -> bool:
    """Return whether an object is of a class of the package, as it was written."""
    kind = type(one)
    return (
        _of(kind) == "mixdist" and _is_as_written(kind) and not any(callable(getattr(kind, n, None)) for n in vars(one))
    )


def _is_plain(one: nn.Module) -> bool:
    own = (value for name, value in vars(one).items() if name not in OF_TORCH)
    tensors = {type(t) for t in (*one._parameters.values(), *one._buffers.values())}
    changed = one._forward_hooks or one._forward_pre_hooks or any(map(callable, own))
    return (type(one) in BY_ROW or _of(type(one)) == "mixdist") and tensors <= _TENSORS and not changed


def _is_as_written(kind: type) -> bool:
    """Return whether the functions of a class are of the package that it is of."""
    kinds = [one for one in kind.__mro__ if one not in (nn.Module, object)]
    return all(_of(f) == _of(one) for one in kinds for f in vars(one).values() if isinstance(f, FunctionType))


def _of(what: type | FunctionType) -> str:
    return what.__module__.partition(".")[0]
