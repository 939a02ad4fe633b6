"""Calls of what a user wrote on a few rows, to see that it is a pure function of each row alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixdist.messages import describe_failure, one_line
from mixdist.mixtures.guards import guarded
from mixdist.mixtures.held import astray
from mixdist.terms import Batch

Argument = Batch | Tensor | None
"""An argument with the row axis first: rows by field, or a tensor such as noise."""
Columns = Mapping[str, Tensor]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6}
COARSE = 1e-3
"""Relative differences that rounding does not reach: by dtype, where float32 results are then computed once more in
float64; and where that cannot be tried."""


class Fault(ValueError):
    """What is wrong with something that a user wrote; names class and method, and says what to do."""


@dataclass(frozen=True)
class Probe:
    """A method on a few rows, and what its results must be.

    Args:
        who: names it in messages: its key in the config, its class and the method.
        call: calls it with the modules and the arguments.
        modules: those that it runs; their parameters and buffers must stay as they are.
        read: returns the result's columns, row axis first, by name, given the result and the number of rows; raises
            ValueError with what is wrong.
        dtype: of the columns; None for any.
        takes_none: whether it may be given no rows at all.
        covered: whether parity tests show that it is a pure function of each row alone: it is called once.
    """

    who: str
    call: Callable[..., Any]
    modules: tuple[nn.Module, ...]
    read: Callable[[Any, int], Columns]
    dtype: torch.dtype | None = None
    takes_none: bool = False
    covered: bool = False

    def __call__(self, *args: Argument) -> Any:
        """Return the result on the rows given, once it is seen to be right.

        It is called again on each half of the rows in reverse order and, where it may be, on none.

        Raises:
            Fault: it fails, its results are not what they must be, or it is no pure function of each row alone.
        """
        if self.covered:
            return self._run(args)[0]
        result, columns = self._pure(args)
        num_rows, device = _num_rows(args), _tensors(args)[0].device
        backwards = torch.arange(num_rows - 1, -1, -1, device=device)
        halves = backwards.tensor_split(2) if num_rows > 1 else (torch.zeros(2, dtype=torch.int64, device=device),)
        with torch.no_grad():
            for index in halves:  # both: the largest row of all lies in one of them
                again = self._run(_take(args, index))[1]
                name = _differing(columns, again, index)
                if name and self._depends(args, index):
                    raise Fault(f"{self.who} {self._why(name, args, index)}")
            if self.takes_none:
                self._run(_take(args, backwards[:0]))
        return result

    def _pure(self, args: Sequence[Argument]) -> tuple[Any, Columns]:
        """Run it, and check that it changes no state, neither its own nor that of a global generator."""
        states = [module_state(m) for m in self.modules]
        with guarded() as touched:
            found = self._run(args)
        if touched.changed:
            raise Fault(f"{self.who} {touched.told}: leave it as it is")
        if touched.drawn_from:
            raise Fault(
                f"{self.who} {touched.told}{self._first(nn.modules.dropout._DropoutNd)}, so a row's result "
                f"would depend on the layout: set noise_shape, and take random numbers from eps, which is keyed by row"
            )
        for module, state in zip(self.modules, states, strict=True):
            if changed := [name for name, mark in module_state(module).items() if state.get(name) != mark]:
                raise Fault(
                    f"{self.who} changes {changed[0]} of {type(module).__name__} as it runs"
                    f"{self._first(nn.modules.batchnorm._NormBase)}, so that its results depend on the other rows of "
                    f"the batch or on those before: keep no state, and treat each row by itself, as nn.LayerNorm and "
                    f"nn.GroupNorm do"
                )
        return found

    def _run(self, args: Sequence[Argument]) -> tuple[Any, Columns]:
        given, kept, written = _each(args, lambda t: t), _each(args, torch.clone), _versions(args)
        try:
            result = self.call(*self.modules, *given)
        except Fault:
            raise
        except Exception as error:
            failed = f"{self.who} fails on {_shapes(args)} ({describe_failure(error)})"
            raise Fault(f"{failed}: {self._remedy()}") from error
        if not _same(given, args, kept) or _versions(args) != written:
            raise Fault(f"{self.who} changes what it is given: work on a copy, as x = x - 1 in place of x -= 1")
        return result, self._columns(result, args)

    def _columns(self, result: Any, args: Sequence[Argument]) -> Columns:
        try:
            columns = self.read(result, _num_rows(args))
        except ValueError as fault:
            raise Fault(f"{self.who} {fault}") from None
        device = _tensors(args)[0].device
        for name, column in columns.items():
            if column.device != device:
                raise Fault(f"{self.who} returns {name} on {column.device}, but rows are on {device}: move it there")
            if self.dtype is not None and column.dtype != self.dtype:
                raise Fault(
                    f"{self.who} returns {name} of {column.dtype}, expected {self.dtype}, the run's dtype: compute it "
                    f"from the rows without a change of dtype"
                )
        return columns

    def _remedy(self) -> str:
        """Return what to do about a failure: what is not registered is not moved to the run's dtype and device."""
        for module in self.modules:
            for path in astray(module, beyond=False):
                return (
                    f"{path} is no parameter of {type(module).__name__}, keep modules in nn.ModuleList and tensors as "
                    f"nn.Parameter"
                )
        return "fix it"

    def _first(self, kind: type[nn.Module]) -> str:
        """Name the first submodule of a kind, the likely cause."""
        named = (pair for one in self.modules for pair in one.named_modules())
        return next((f" ({type(m).__name__} at {path})" for path, m in named if isinstance(m, kind) and m.training), "")

    def _depends(self, args: Sequence[Argument], index: Tensor) -> bool:
        """Return whether results differ by more than rounding, as copies in float64 tell; both are run anew."""
        if all(t.dtype != torch.float32 for t in _tensors(args) if t.is_floating_point()):
            return True
        try:
            modules = [copy.deepcopy(module).double() for module in self.modules]
            wide = _each(args, lambda t: t.double() if t.is_floating_point() else t)
            some = _take(wide, index)
            whole, alone = (self.read(self.call(*modules, *one), _num_rows(one)) for one in (wide, some))
            if all(column.dtype != torch.float32 for column in whole.values()):
                return bool(_differing(whole, alone, index))
        except Exception:  # something in it has a dtype of its own
            pass
        return bool(_differing(self._run(args)[1], self._run(_take(args, index))[1], index, COARSE))

    def _why(self, name: str, args: Sequence[Argument], index: Tensor) -> str:
        everything = torch.arange(_num_rows(args), device=index.device)
        if _differing(self._run(args)[1], self._run(args)[1], everything):
            return (
                f"returns another {name} when it is called again with the same arguments: it must be a pure function "
                f"of rows and noise; keep no state, and take random numbers from eps"
            )
        return (
            f"returns {name} that depends on the other rows of the batch{self._culprit(args, index)}, so that it would "
            f"depend on the number of ranks: treat each row by itself, as nn.LayerNorm and nn.GroupNorm do"
        )

    def _culprit(self, args: Sequence[Argument], index: Tensor) -> str:
        """Name the first submodule whose output for a row depends on the other rows."""
        with _recorded(self.modules) as whole:
            self._run(args)
        with _recorded(self.modules) as part:
            self._run(_take(args, index))
        for (who, given, out), (_, given_again, again) in zip(whole, part, strict=False):
            pairs = (given, given_again), (out, again)
            if all((len(a), len(b)) == (_num_rows(args), len(index)) for a, b in pairs):
                before, after = (_differing({who: a}, {who: b}, index, COARSE) for a, b in pairs)
                if after and not before:
                    return f" ({who})"
        return ""


def shown(value: Any) -> str:
    """Return what a value is, for messages."""
    if isinstance(value, Tensor):
        return "a nested tensor" if value.is_nested else f"a tensor {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"


def check_json(who: str, value: Any) -> dict[str, Any]:
    """Return what a method returns, once it is seen to be a dict that JSON can hold.

    Raises:
        Fault: it is something else.
    """
    if not isinstance(value, Mapping):
        raise Fault(f"{who} returns {shown(value)}, expected a dict: return one, an empty one for nothing")
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise Fault(
            f"{who} returns what JSON cannot hold ({one_line(str(error))}): return numbers, words, lists, dicts"
        ) from None
    return dict(value)


def check_column(name: str, value: Any, shape: tuple[int, ...], remedy: str) -> Tensor:
    """Return a column of numbers, once it is seen to have a shape.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"returns {name} as {shown(value)}, expected a tensor {shape}: {remedy}")
    if value.is_nested or value.layout != torch.strided:
        kind = "a nested tensor" if value.is_nested else f"of layout {value.layout}"
        raise ValueError(f"returns {name} {kind}, expected a dense tensor {shape}: return its to_dense()")
    if value.shape != shape:
        raise ValueError(f"returns {name} of shape {tuple(value.shape)}, expected {shape}: {remedy}")
    return value


def reached(outputs: Sequence[Tensor]) -> dict[int, Tensor]:
    """Return all leaves that the graphs of some tensors lead to, by their ids."""
    nodes = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen, leaves = set(nodes), {id(t): t for t in outputs if t.grad_fn is None and t.requires_grad}
    for node in nodes:  # which grows
        if isinstance(variable := getattr(node, "variable", None), Tensor):
            leaves[id(variable)] = variable
        fresh = [inner for inner, _ in node.next_functions if inner is not None and inner not in seen]
        seen.update(fresh)
        nodes += fresh
    return leaves


@contextmanager
def _recorded(modules: Sequence[nn.Module]) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Record every submodule that is called, in order, its first argument and its output."""
    calls: list[tuple[str, Tensor, Tensor]] = []

    def watch(path: str, module: nn.Module) -> Any:
        def keep(one: nn.Module, inputs: Any, output: Any) -> None:
            if all(isinstance(t, Tensor) and t.dim() for t in (*inputs[:1], output)):
                calls.append((f"{type(one).__name__} at {path}", inputs[0].detach(), output.detach()))

        return module.register_forward_hook(keep)

    handles = [watch(path, m) for one in modules for path, m in one.named_modules() if path]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def module_state(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Return marks of parameters, buffers and modes, which change with them."""
    modes = {f"{path}.training".lstrip("."): (int(one.training), 0) for path, one in module.named_modules()}
    return modes | {
        f"{path}.{name}".lstrip("."): (id(t), t._version)
        for path, one in module.named_modules()
        for name, t in (*one._parameters.items(), *one._buffers.items())
        if t is not None
    }


def _each(args: Sequence[Argument], change: Callable[[Tensor], Tensor]) -> list[Argument]:
    """Return arguments with each tensor changed, in dicts of their own."""
    return [
        {name: change(t) for name, t in one.items()} if isinstance(one, dict) else None if one is None else change(one)
        for one in args
    ]


def _tensors(args: Sequence[Argument]) -> list[Tensor]:
    return [t for one in args if one is not None for t in (one.values() if isinstance(one, dict) else (one,))]


def _versions(args: Sequence[Argument]) -> list[int]:
    """Return how often each tensor was written to; autograd refuses one that was, be it with the same numbers."""
    return [0 if t.is_inference() else t._version for t in _tensors(args)]


def _num_rows(args: Sequence[Argument]) -> int:
    return len(_tensors(args)[0])


def _take(args: Sequence[Argument], index: Tensor) -> list[Argument]:
    return _each(args, lambda t: t.detach()[index])


def _same(given: Sequence[Argument], args: Sequence[Argument], kept: Sequence[Argument]) -> bool:
    """Return whether arguments are what they were: the same fields, tensors and numbers."""
    names = [list(one) if isinstance(one, dict) else None for one in given]
    if names != [list(one) if isinstance(one, dict) else None for one in args]:
        return False
    groups = zip(_tensors(given), _tensors(args), _tensors(kept), strict=True)
    return all(a is b and torch.equal(b.nan_to_num(), c.nan_to_num()) for a, b, c in groups)


def _shapes(args: Sequence[Argument]) -> str:
    rows = [f"{name} {tuple(t.shape)}" for one in args if isinstance(one, dict) for name, t in one.items()]
    others = [None if one is None else tuple(one.shape) for one in args if not isinstance(one, dict)]
    return ", ".join(rows + [f"{'noise ' if rows else ''}{shape}" for shape in others])


def _differing(columns: Columns, again: Columns, index: Tensor, least: float = 0.0) -> str:
    """Name the first column whose rows ``index`` differ by more than rounding from what came of them alone."""
    for name, column in columns.items():
        one, other = column.detach()[index], again[name].detach()
        if not one.is_floating_point():
            if not torch.equal(one, other):
                return name
            continue
        tolerance = max(TOLERANCE.get(one.dtype, 10 * COARSE), least)
        finite = one[one.isfinite()]
        scale = finite.abs().max() if finite.numel() else one.new_ones(())
        if not torch.isclose(one, other, rtol=0.0, atol=tolerance * float(scale), equal_nan=True).all():
            return name
    return ""
