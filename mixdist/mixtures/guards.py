"""What belongs to the whole process, put back after a call of what a user wrote: generators and settings of torch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's float32 matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "torch's deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
}
Generator = tuple[Callable[[], Any], Callable[[Any], Any]]


class Touched(NamedTuple):
    """What a call drew from, and what it changed, by names; known at the end of :func:`guarded`."""

    drawn_from: list[str]
    changed: list[str]

    @property
    def told(self) -> str:
        """What it did, in words; empty where it did nothing."""
        did = [f"draws from {name}" for name in self.drawn_from] + [f"changes {name}" for name in self.changed]
        return did[0] if did else ""


@contextmanager
def guarded() -> Iterator[Touched]:
    """Put global generators and settings back at the end, and name those that were not as before."""
    touched = Touched([], [])
    generators: dict[str, Generator] = {
        "torch's global generator": (torch.get_rng_state, torch.set_rng_state),
        "NumPy's global generator": (np.random.get_state, np.random.set_state),
        "Python's global generator": (random.getstate, random.setstate),
    }
    if torch.cuda.is_initialized():
        generators["torch's global CUDA generator"] = (torch.cuda.get_rng_state, torch.cuda.set_rng_state)
    states = {name: get() for name, (get, _) in generators.items()}
    settings = {name: get() for name, (get, _) in SETTINGS.items()}
    try:
        yield touched
    finally:
        for name, (get, put) in generators.items():
            if not _equal(get(), states[name]):
                put(states[name])
                touched.drawn_from.append(name)
        for name, (get, put) in SETTINGS.items():
            if get() != settings[name]:
                put(settings[name])
                touched.changed.append(name)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True)) if isinstance(a[1], np.ndarray) else a == b
