"""Parameters whose values are apart: what reads one is told, instead of being given a part or freed memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from mixdist.parallel.agreement import Agreed

_ASKS = {"__get__", "__set__", "__delete__", "size", "stride", "dim", "numel", "element_size", "is_contiguous"}
_ASKS |= {"is_floating_point", "is_complex", "is_signed", "untyped_storage", "data_ptr", "storage_offset", "get_device"}
"""Functions of a tensor that read none of its values; tools that look for what is in memory call them."""


def take_apart(parameter: nn.Parameter, said: str) -> Callable[[], None]:
    """Refuse whatever would read a parameter's values from now on; return what ends that.

    A sum of a ``DTensor`` is that of the rows which are here, and one of a tensor whose memory is free ends a process.

    Args:
        parameter: an ordinary one, or a ``DTensor``; shape, dtype, device and gradient are still to be had.
        said: what is told, one line.
    """
    kind: Any = type(parameter)
    parameter.__class__ = _refusing(kind)  # type: ignore[assignment]
    parameter.apart = said  # type: ignore[attr-defined]

    def undo() -> None:
        parameter.__class__ = kind
        del vars(parameter)["apart"]

    return undo


@cache
def _refusing(kind: type[torch.Tensor]) -> type[torch.Tensor]:
    """Return a kind of tensor that refuses to be read."""

    def refuse(args: Any, kwargs: Any) -> None:
        leaves = tree_leaves((args, kwargs))
        raise Agreed(next(vars(leaf)["apart"] for leaf in leaves if "apart" in getattr(leaf, "__dict__", ())))

    class Ordinary(kind):  # type: ignore[misc, valid-type]
        def __repr__(self) -> str:
            return f"<{vars(self)['apart']}>"

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            reads = getattr(func, "__self__", None) in (torch.Tensor.data, torch.Tensor.T, torch.Tensor.mT)
            if func.__name__ not in _ASKS or reads:
                refuse(args, kwargs or {})
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))

    class Sharded(kind):  # type: ignore[misc, valid-type]
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            refuse(args, kwargs or {})

    return Ordinary if kind in (torch.Tensor, nn.Parameter) else Sharded
