"""Rows as users give them in Python, made the rows of numbers that modules read.

Shape letters: N rows.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixdist.messages import one_line
from mixdist.mixtures.contracts import IN_RANGE
from mixdist.nets.likelihood import Likelihood
from mixdist.terms import STORED_INTEGERS, Batch, Field, Spec


class Rowed:
    """Base of models in one process: takes rows as users have them.

    Args:
        spec: the fields of rows.
        dtype: of real numbers.
    """

    def __init__(self, spec: Spec, dtype: torch.dtype) -> None:
        self.spec, self.dtype = spec, dtype

    def rows(self, given: Tensor | np.ndarray | Batch) -> Batch:
        """Turn what a user gives into rows of numbers.

        Raises:
            ValueError: an unknown field, rows of another shape, or numbers that cannot be this field's.
        """
        named = given if isinstance(given, dict) else {"x": given}
        rows = {name: self._field(name, _tensor(name, values)) for name, values in named.items() if name != "id"}
        lengths = {name: len(column) for name, column in rows.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"rows have fields of lengths {lengths}: give at least one field, all equally long")
        num_rows = next(iter(lengths.values()))
        ids = _tensor("id", named.get("id", torch.arange(num_rows)))
        if ids.shape != (num_rows,) or ids.dtype not in STORED_INTEGERS:
            raise ValueError(
                f"id has shape {tuple(ids.shape)} of {ids.dtype}: give one whole number for each of {num_rows} rows"
            )
        return rows | {"id": ids.long()}

    def _field(self, name: str, values: Tensor) -> Tensor:
        if name not in self.spec:
            raise ValueError(f"field {name!r} is not one of the model's: give {sorted(self.spec)}")
        field = self.spec[name]
        axes = [n for n in values.shape[1:] if n != 1]  # an axis of one place changes no order
        if not values.dim() or axes not in ([n for n in field.shape if n != 1], [field.num_values]):
            wanted = ", ".join(map(str, ("N", *field.shape)))
            last = values.dim() == 4 and values.shape[1:] == (*field.shape[1:], *field.shape[:1])
            raise ValueError(
                f"field {name!r} has shape {tuple(values.shape)}: give N rows as ({wanted})"
                f"{', with numpy.moveaxis(rows, -1, 1)' if last else ''}"
            )
        if values.is_complex() or (field.num_classes is not None and values.is_floating_point()):
            wanted = "whole numbers" if field.num_classes else "real numbers"
            raise ValueError(f"field {name!r} is {values.dtype}, expected {wanted}: convert it")
        values = values.reshape(-1, *field.shape)
        whole = not values.is_floating_point() and (values.dtype != torch.bool or field.dtype == torch.bool)
        if whole and field.dequantised:  # a level itself stands for the middle of its values
            values = values.double() + 0.5
        stored = field.num_classes is not None or (whole and (field.dtype in STORED_INTEGERS or field.dequantised))
        numbers = field.values(values, self.dtype) if stored else values.to(self.dtype)
        if values.numel():
            self._check_numbers(name, field, values.double() if stored else numbers, stored)
            if stored and field.num_classes is None:
                self._check_scaled(name, field, values, numbers)
        return numbers

    def _check_scaled(self, name: str, field: Field, stored: Tensor, numbers: Tensor) -> None:
        """Check stored numbers, once they are scaled, against what the likelihoods of the field can model.

        Raises:
            ValueError: they lie beyond it.
        """
        low, high = self._limits(name)
        least, most = (float(end) for end in numbers.aminmax())
        if not (low - IN_RANGE <= least and most <= high + IN_RANGE):
            ends = " to ".join(f"{float(end):g}" for end in stored.double().aminmax())
            first, last = sorted(
                (low - field.offset) / field.scale if math.isfinite(low) else low for low in (low, high)
            )
            raise ValueError(
                f"field {name!r} has whole numbers from {ends}, which the scale {field.scale:g} makes {least:g} to "
                f"{most:g}, expected {low:g} to {high:g}: give them as stored, {first:g} to {last:g}, or scaled"
            )

    def _limits(self, name: str) -> tuple[float, float]:
        """Return the range that the likelihoods of a field can model."""
        limits = [one.limits for one in self._likelihoods(name) if one.limits is not None]
        return max([-math.inf, *(low for low, _ in limits)]), min([math.inf, *(high for _, high in limits)])

    def _check_numbers(self, name: str, field: Field, given: Tensor, stored: bool) -> None:
        """Check numbers of a field against what they can be, as they are stored or as models see them.

        Raises:
            ValueError: they cannot be this field's.
        """
        low, high, remedy = -math.inf, math.inf, "remove what is no number"
        if field.num_classes is not None:
            low, high, remedy = 0.0, field.num_classes - 1.0, "give classes"
        elif field.dtype in STORED_INTEGERS:
            low, high = (0.0, 1.0) if field.dtype == torch.bool else _ends(field.dtype)
            remedy = f"give stored numbers of {field.dtype}"
            if not stored:
                low, high = sorted((low * field.scale + field.offset, high * field.scale + field.offset))
                remedy = f"give them as stored, whole numbers of {field.dtype}, or scaled"
        if not stored:
            ends = self._limits(name)
            low, high = max(low, ends[0]), min(high, ends[1])
        least, most = (float(end) for end in given.aminmax())
        if not (low - IN_RANGE <= least and most <= high + IN_RANGE) or not math.isfinite(most - least):
            if math.isfinite(most - least) and remedy.startswith("remove"):
                remedy = "bring them to the scale of the rows that the model was trained on"
            raise ValueError(
                f"field {name!r} has numbers from {least:g} to {most:g}, expected {low:g} to {high:g}: {remedy}"
            )

    def _likelihoods(self, name: str) -> Iterator[Likelihood]:
        """Yield the likelihoods of what models a field."""
        yield from ()


def _ends(dtype: torch.dtype) -> tuple[float, float]:
    """Return the least and the largest number of an integer type."""
    info = torch.iinfo(dtype)
    return float(info.min), float(info.max)


def whole_number(number: Any) -> int:
    """Return a whole number of any type; -1 for what is none."""
    try:
        return operator.index(number)
    except (TypeError, ValueError, RuntimeError):
        return -1


def _tensor(name: str, values: Any) -> Tensor:
    return dense(f"field {name!r}", values)


def dense(name: str, values: Any) -> Tensor:
    """Return what a user gives as a tensor in CPU memory.

    Args:
        name: of the values, for messages.
        values: a dense tensor, an array, or what becomes one.

    Raises:
        ValueError: it cannot be made one.
    """
    try:
        if isinstance(values, np.ma.MaskedArray):
            raise TypeError("a masked array")
        found = torch.as_tensor(values)
        if found.is_nested or found.layout != torch.strided:
            raise TypeError("a nested tensor" if found.is_nested else f"layout {found.layout}")
        return found.to("cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} cannot be made a tensor ({one_line(str(error))}): give a dense tensor or an array"
        ) from error


def draws(num_samples: Any, seed: Any) -> tuple[int, int]:
    """Return how many samples are to be drawn, and the seed.

    Raises:
        ValueError: one is no whole number, or out of range.
    """
    if whole_number(num_samples) < 0:
        raise ValueError(f"num_samples ({num_samples!r}) must be a whole number from 0: give how many to draw")
    if not 0 <= whole_number(seed) < 2**64:
        raise ValueError(f"seed ({seed!r}) must be a whole number from 0 to 2**64 - 1: choose another")
    return whole_number(num_samples), whole_number(seed)
