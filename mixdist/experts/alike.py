"""Whether one expert's ``forward`` is another's, but for parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn


def are_alike(one: nn.Module, other: nn.Module) -> bool:
    """Return whether modules of one class have the same numbers, words, options and buffers, also inside.

    Objects of other kinds are not compared.
    """
    if _settings(one) != _settings(other):
        return False
    named, others = dict(one.named_buffers()), dict(other.named_buffers())
    return named.keys() == others.keys() and all(
        a.shape == others[name].shape and (a.is_meta or torch.equal(a, others[name])) for name, a in named.items()
    )


def _settings(module: nn.Module) -> dict[tuple[str, str], Any]:
    """Return numbers and words by module and name, also in tuples; of dataclasses their text."""
    return {
        (path, name): repr(value) if dataclasses.is_dataclass(value) else value
        for path, one in module.named_modules()
        for name, value in vars(one).items()
        if dataclasses.is_dataclass(value) or _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) or (isinstance(value, tuple) and all(map(_is_plain, value)))
