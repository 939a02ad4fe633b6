"""What an optimiser remembers, by the names of parameters: for checkpoints, and for experts that move."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable", "maximize")
"""Flags of an optimiser that leave its state as it is."""


class Slot(NamedTuple):
    """A parameter's name, the tensor that its optimiser knows it by, and its place in that tensor (None: all of it)."""

    name: str
    tensor: Tensor
    place: int | None = None


def read_optimizer(optimizer: Optimizer, slots: Iterable[Slot]) -> dict[str, Tensor]:
    """Return an optimiser's state: "<parameter>.<key>" to tensor."""
    state: dict[str, Tensor] = {}
    for name, tensor, place in slots:
        for key, value in optimizer.state.get(tensor, {}).items():
            value = torch.as_tensor(value)
            state[f"{name}.{key}"] = value if place is None or not value.dim() else value[place]
    return state


def write_optimizer(optimizer: Optimizer, slots: Iterable[Slot], state: dict[str, Tensor]) -> None:
    """Put back what ``read_optimizer`` returned; tensors of a parameter's shape go to its device."""
    group, places = optimizer.param_groups[0], list(slots)
    own = [
        (tensor, place, key.rpartition(".")[2], value)
        for name, tensor, place in places
        for key, value in state.items()
        if key.rpartition(".")[0] == name
    ]
    # What is one number beside a larger parameter, as NAdam's mu_product, is one for a whole stack, too.
    larger = [(key, value) for tensor, place, key, value in own if tensor.dim() > (place is not None)]
    single = {"step"} | {key for key, value in larger if not value.dim()}
    for tensor, place, key, value in own:
        # As in torch: a step counter stays on the CPU, but where a fused optimiser reads it on the device.
        moves = key not in single or group.get("fused") or group.get("capturable")
        value = value.to(tensor.device if moves else value.device, copy=True)
        if place is None or key in single:
            optimizer.state[tensor][key] = value
        else:
            optimizer.state[tensor].setdefault(key, torch.zeros_like(tensor, dtype=value.dtype))[place] = value


def kind(optimizer: Optimizer) -> str:
    """Name an optimiser as far as its state depends on it: class, and flags such as amsgrad."""
    flags = [k for k, v in optimizer.defaults.items() if v is True and k not in IMPLEMENTATION]
    return " ".join([type(optimizer).__name__, *sorted(flags)])


def fast_forward(schedule: LRScheduler, steps: int) -> None:
    """Bring a schedule to where it is after ``steps`` steps: it is a pure function of them."""
    with warnings.catch_warnings():
        # torch warns that no optimiser has stepped yet: it has, in the run that is resumed.
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(steps):
            schedule.step()


def check_elementwise(make: Callable[[list[Tensor]], Optimizer], why: str, remedy: str) -> None:
    """Check by two steps that an optimiser steps a matrix as it steps its rows one by one.

    Args:
        make: makes an optimiser for parameters.
        why: what needs that.
        remedy: what to do besides taking another optimiser.

    Raises:
        ValueError: it does not.

    Examples:
        >>> check_elementwise(torch.optim.Adam, "FSDP", "take Native")
        >>> try:
        ...     check_elementwise(torch.optim.Adafactor, "FSDP", "take Native")
        ... except ValueError as error:
        ...     print(str(error)[:61])
        train.optimizer (Adafactor) does not work element by element,
    """
    start = torch.tensor([[1.0, 2.0], [3.0, -5.0]], dtype=torch.float64)
    gradient = torch.tensor([[0.5, -2.0], [-1.0, 4.0]], dtype=torch.float64)
    whole = nn.Parameter(start.clone())
    rows: list[Tensor] = [nn.Parameter(row.clone()) for row in start]
    optimizers = make([whole]), make(rows)
    with suppress(AssertionError):  # capturable optimisers want CUDA
        for _ in range(2):
            whole.grad = gradient * whole.detach()
            for row, part in zip(rows, gradient, strict=True):
                row.grad = part * row.detach()
            for optimizer in optimizers:
                optimizer.step()
    if not torch.allclose(whole, torch.stack(rows), rtol=1e-9, atol=1e-12, equal_nan=True):
        raise ValueError(
            f"train.optimizer ({type(optimizers[0]).__name__}) does not work element by element, as {why} needs: "
            f"{remedy}, or choose one that does, such as torch.optim.Adam"
        )
