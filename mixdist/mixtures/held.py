"""What objects hold beside parameters and buffers: numbers, words and tensors, also in lists, dicts and dataclasses."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, np.generic)
OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
"""Attributes of every module, which are not its user's."""
_LONGEST, _AT_ONCE = 60, 1 << 20


def held(owner: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values and tensors that an object holds in attributes, with their paths, such as ``more[0].weight``.

    Of a module and those inside it: what is neither parameter nor buffer of a checkpoint. A list of values is one
    value. What a module in a list has as parameters and buffers is held too.
    """
    seen: set[int] = set()
    if not isinstance(owner, nn.Module):
        yield from _of_attributes("", owner, seen)
        return
    for at, inner in owner.named_modules():
        yield from _of_attributes(at, inner, seen)
        for name in inner._non_persistent_buffers_set:
            if (buffer := inner._buffers[name]) is not None:
                yield f"{at}.{name}".lstrip("."), buffer


def _of_attributes(at: str, owner: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    for name, value in vars(owner).items() if hasattr(owner, "__dict__") else ():
        if not (isinstance(owner, nn.Module) and name in OF_TORCH):
            yield from _inside(f"{at}.{name}".lstrip("."), value, seen)


def _inside(path: str, value: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (*PLAIN, Tensor, np.ndarray)) or _is_list_of_values(value):
        yield path, value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield from ((f"{path}.{name}", t) for name, t in (*value.named_parameters(), *value.named_buffers()))
        yield from ((f"{path}.{name}", one) for name, one in held(value))
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _inside(f"{path}[{key!r}]", one, seen)
    elif isinstance(value, (list, tuple)):
        for i, one in enumerate(value):
            yield from _inside(f"{path}[{i}]", one, seen)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _inside(f"{path}.{field.name}", getattr(value, field.name, None), seen)


def _is_list_of_values(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(one, PLAIN) for one in value)


def as_text(value: Any) -> str:
    """Return a value as text that is another for another value; short, with a digest where it is long."""
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=repr)
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ... ({sha256(text.encode()).hexdigest()[:8]})"


def marks(tensor: Tensor) -> list[float]:
    """Return the norm of a tensor, and a sum of its numbers with weights by place: others, up to rounding, for others.

    What is no number, or infinite, counts as a large number.
    """
    numbers = tensor.detach().flatten()
    weights = torch.cos(torch.arange(min(len(numbers), _AT_ONCE), dtype=torch.float64, device=numbers.device))
    squares, total = 0.0, 0.0
    for part in numbers.split(_AT_ONCE) if len(numbers) else ():
        part = part.double().nan_to_num(1.5e6, 1e6, -1e6)
        squares, total = squares + float(part @ part), total + float(part @ weights[: len(part)])
    return [math.sqrt(squares), total]


def astray(module: nn.Module, beyond: bool = True) -> dict[str, Tensor]:
    """Return by path the tensors that require a gradient, and that a module holds without having them as parameters.

    Args:
        module: the module; they lie in lists, dicts or plain attributes.
        beyond: also those in attributes of its classes, and global ones in the files of these.
    """
    own = {id(p) for p in module.parameters()}
    found = dict(held(module))
    for kind in type(module).__mro__ if beyond else ():
        if kind.__module__.partition(".")[0] in ("mixdist", "torch", "builtins"):
            continue
        for place in (vars(kind), vars(sys.modules.get(kind.__module__, kind))):
            for name, value in place.items():
                if isinstance(value, (Tensor, nn.Module, list, tuple, dict)) and not name.startswith("__"):
                    found |= dict(_inside(name, value, set()))
    return {path: t for path, t in found.items() if isinstance(t, Tensor) and _learns(t) and id(t) not in own}


def _learns(tensor: Tensor) -> bool:
    return tensor.requires_grad and tensor.is_leaf
