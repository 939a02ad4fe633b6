"""torch's ``fully_shard`` on a module, and the way back, which torch has not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from inspect import isfunction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mixdist.parallel.wire import Group, Wire


def cuttable(parameter: Tensor) -> bool:
    """Return whether a parameter has rows with numbers, which ``fully_shard`` cuts."""
    return parameter.dim() > 0 and parameter.numel() > 0


def units(module: nn.Module, unit_bytes: int) -> Iterator[nn.Module]:
    """Yield what is brought together by itself: large elements of ``nn.Sequential``, which always calls them.

    An element that is an ``nn.Sequential`` itself is looked into; one that shares a parameter with another is none.

    Args:
        module: an expert.
        unit_bytes: what counts as large, bytes of parameters.
    """
    uses = Counter(p for _, p in module.named_parameters(remove_duplicate=False))
    found: set[nn.Module] = set()
    inside: set[nn.Module] = set()
    for container in module.modules():
        if container in inside or not isinstance(container, nn.Sequential):
            continue
        for element in container:
            own = list(element.parameters())
            if isinstance(element, nn.Sequential) or element in found or any(uses[p] > 1 for p in own):
                continue
            if own and sum(p.numel() * p.element_size() for p in own) >= unit_bytes:
                found.add(element)
                inside.update(element.modules())
                yield element


def shard(module: nn.Module, unit_bytes: int, mesh: Any, group: Group, wire: Wire) -> Callable[[], None]:
    """Apply ``fully_shard`` to an expert and its units; return what makes the modules again what they were.

    A gradient is the sum over members, never their mean. Values are freed after a forward pass and brought together
    once more for the backward pass. So it is with every public method, of it and of its parts, that is called from
    outside with tensors.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    undo, found = remember(module), list(units(module, unit_bytes))
    whole = {p for p in module.parameters() if not cuttable(p)}
    guarded = callables(module, found)
    for unit in [*found, module]:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        unit.set_custom_all_gather(Gather(group, wire))  # type: ignore[operator]
        unit.set_custom_reduce_scatter(Reduce(group, wire))  # type: ignore[operator]
        unit.set_gradient_divide_factor(1.0)  # type: ignore[operator]
        unit.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
    vars(module)["_run"] = _run
    register_fsdp_forward_method(module, "_run")
    inside = Inside(module)
    for part, name in guarded:
        setattr(part, name, inside.guard(getattr(part, name), vars(module)["_run"]))
    # Now, and not in the first pass: a unit that is run by itself before would take itself for the outermost.
    fully_shard.state(module)._lazy_init()  # type: ignore[attr-defined]
    return undo


def _run(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return call(*args, **kwargs)


def callables(module: nn.Module, found: Sequence[nn.Module]) -> list[tuple[nn.Module, str]]:
    """Name what may be called of an expert from outside: public methods of it and its parts, ``forward`` of its parts.

    Units bring themselves together. What an instance has in place of its class's method stays as it is.
    """
    inside = {part for unit in found for part in unit.modules()}
    named = []
    for part in module.modules():
        if part in inside:
            continue
        kind = type(part)
        own = kind.__mro__[: kind.__mro__.index(nn.Module)]
        names = dict.fromkeys(name for one in own for name in vars(one) if not hasattr(nn.Module, name))
        runs = part is not module and kind.forward is not nn.Module.forward
        public = [name for name in names if not name.startswith("_") and isfunction(getattr(kind, name))]
        named += [(part, name) for name in [*public, *["forward"] * runs] if name not in vars(part)]
    return named


class Inside:
    """Whether an expert runs: what it calls of itself meanwhile brings nothing together once more.

    Args:
        module: the expert.
    """

    def __init__(self, module: nn.Module) -> None:
        self.depth = 0
        module.register_forward_pre_hook(lambda *_: self._go(1), prepend=True)
        module.register_forward_hook(lambda *_: self._go(-1), always_call=True)

    def _go(self, step: int) -> None:
        self.depth += step

    def guard(self, method: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method that brings values together where it is called from outside, with tensors.

        Args:
            method: of the expert or a part of it.
            run: calls a method with its arguments once values are together.
        """

        @wraps(method)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self.depth or not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
                return method(*args, **kwargs)
            self._go(1)
            try:
                return run(method, *args, **kwargs)
            finally:
                self._go(-1)

        return guarded


def remember(module: nn.Module) -> Callable[[], None]:
    """Return what takes from modules all that ``fully_shard`` puts into them: it has no way back itself."""
    from torch.distributed._composable_state import _module_state_mapping

    before = [(m, type(m), set(vars(m)), dict(m._parameters), _hooks(m)) for m in module.modules()]

    def undo() -> None:
        for m, kind, names, parameters, hooks in before:
            m.__class__ = kind
            _module_state_mapping.pop(m, None)
            for name in set(vars(m)) - names:
                del vars(m)[name]
            m._parameters.update(parameters)
            for name, entries in _hooks(m).items():
                for key in entries - hooks[name]:
                    del vars(m)[name][key]

    return undo


def _hooks(module: nn.Module) -> Mapping[str, set[Any]]:
    return {name: set(value) for name, value in vars(module).items() if "hooks" in name and isinstance(value, dict)}


class _Counted:
    """A collective of FSDP2 on our wire: counted, timed, and with our error where a rank is lost."""

    def __init__(self, group: Group, wire: Wire) -> None:
        self.group, self.wire = group, wire

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class Gather(_Counted):
    """Every member's part to every member."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Group, async_op: bool = False) -> None:
        self.wire.all_gather_into(output_tensor, input_tensor, self.group).wait()


class Reduce(_Counted):
    """The sum of each part to its member."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Group, op: Any, async_op: bool = False
    ) -> None:
        self.wire.reduce_scatter(output_tensor, input_tensor, self.group).wait()
