"""A device that is not there: tensors that lie in host memory, and are held apart from the host's own.

A CUDA device is told from the host by three things: what is copied to it, what is read back from it (each read waits
for all that runs there), and operators that refuse tensors of both. ``Elsewhere`` is a tensor that holds another one,
names the device "meta", and has no memory of its own, so whatever reads it must pass an operator. ``Device`` sees every
operator below autograd, with those of backward passes. It runs them on the tensors held, and counts:

- operators: those that would start on the device; views, which start nothing, are left out;
- copies: a host tensor that goes to the device: ``to``, ``copy_``, ``torch.tensor(..., device)``, ``new_tensor``, an
  index that lies on the host. A Python number in an operator is none, nor is a constructor such as ``zeros`` or
  ``arange``;
- reads: device to host (``cpu``, ``item``, ``tolist``, ``bool``), and operators whose result has a size that only the
  device knows: ``nonzero``, indexing by a mask, ``repeat_interleave`` without ``output_size``, ``unique``; and checks
  of linear algebra, which read an error code.

Copies and reads are named by the function of mixdist that they come from, as "noise.Draw._words". The host's tensors of
one number may meet the device's, as in CUDA; any others raise.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
aten = torch.ops.aten
SIZED_THERE = {
    aten.nonzero,
    aten.masked_select,
    aten.repeat_interleave,
    aten._unique2,
    aten.unique_dim,
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.equal,
    aten._linalg_check_errors,
    aten._linalg_eigh,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index_put}
STRICT = {aten.cat, aten.stack, aten._foreach_norm}
PACKAGE = Path(__file__).parents[1] / "mixdist"


class Elsewhere(Tensor):
    """A tensor of the device; outside ``Device`` it can do nothing."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside the device")


class Device(TorchDispatchMode):
    """Runs what is asked of the device, and counts it.

    Attributes:
        operators: how many started there; ``noise``: of these in draws.
        copies: host tensors that went there, by who sent them.
        reads: what was read back, by who read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drawing = False
        self.clear()

    def clear(self) -> None:
        """Count from 0."""
        self.operators = self.noise = self.draws = 0
        self.copies: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()

    @contextmanager
    def running(self) -> Iterator[Device]:
        """Be the device "meta"."""
        with _Made(), self:
            yield self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = dict(kwargs or {}), func.overloadpacket
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        here = any(isinstance(one, Elsewhere) for one in given)
        there = kwargs.get("device") == DEVICE or (here and kwargs.get("device") is None)
        if not here and not there:
            return func(*args, **kwargs)
        self._count(func, packet, args, given, here, there)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if (packet is aten._to_copy and not there) or (packet is aten.copy_ and not isinstance(args[0], Elsewhere)):
            return found
        wrappers = {id(one.held): one for one in given if isinstance(one, Elsewhere)}

        def wrapped(one: Any) -> Any:
            return wrappers[id(one)] if id(one) in wrappers else Elsewhere(one) if isinstance(one, Tensor) else one

        return tree_map(wrapped, found)

    def _count(self, func: Any, packet: Any, args: Any, given: list[Tensor], here: bool, there: bool) -> None:
        hosts = [one for one in given if not isinstance(one, Elsewhere)]
        if packet is aten._to_copy:
            if not here:
                self.copies[_place()] += 1
            if not there:
                self.reads[_place()] += 1
        elif packet is aten.copy_ and hosts:
            (self.copies if isinstance(args[0], Elsewhere) else self.reads)[_place()] += 1
        elif packet in INDEXING:
            indices = [one for one in args[1] if one is not None]
            self.copies[_place()] += sum(not isinstance(one, Elsewhere) for one in indices)
            self.reads[_place()] += sum(one.dtype in (torch.bool, torch.uint8) for one in indices)
            assert all(any(one is index for index in indices) or not one.dim() for one in hosts), f"{func}: host tensor"
        elif packet in SIZED_THERE:
            self.reads[_place()] += 1
        elif func.namespace != "c10d":
            assert all(not one.dim() and packet not in STRICT for one in hosts), f"{func}: tensors of the host as well"
        if not func.is_view and packet not in (aten.detach, aten._local_scalar_dense, aten.lift_fresh):
            self.operators += 1
            self.noise += self.drawing


class _Made(TorchFunctionMode):
    """What makes tensors of numbers of Python, or changes what a tensor is, above the operators."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is Tensor.new_tensor:
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(args[0].device)
        if func is Tensor.data.__set__ and isinstance(args[0], Elsewhere):  # type: ignore[attr-defined]
            args[0].held = args[1].held
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            places = tuple(torch.tensor(one) if isinstance(one, list) else one for one in places)
            args = (args[0], places, *args[2:])
        if func is Tensor.tolist:
            args = (args[0].cpu(),)
        if func in (Tensor.untyped_storage, Tensor.data_ptr):
            args = (_held(args[0]),)
        return func(*args, **kwargs)


def _held(one: Any) -> Any:
    return one.held if isinstance(one, Elsewhere) else one


def _place() -> str:
    """Name the function of mixdist that runs."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents:
            return f"{path.stem}.{frame.f_code.co_qualname.replace('.<locals>', '')}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside"
