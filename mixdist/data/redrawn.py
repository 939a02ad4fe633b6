"""Rows whose numbers are drawn from what another data set has: levels with noise, or zeros and ones.

Shape letters: R rows read.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from mixdist.data.dataset import Samples
from mixdist.data.order import Epoch
from mixdist.noise import EVALUATION_PHASE, Draw, Purpose
from mixdist.terms import DEQUANTISED, Batch, Field, Spec, real_field

AT_ONCE = 4096
"""Rows in memory that are checked at once."""


class Redraw(ABC):
    """How the numbers of a field are drawn, keyed by row."""

    @abstractmethod
    def field(self, field: Field, name: str) -> Field:
        """Return the field as it is then.

        Raises:
            ValueError: it cannot be drawn from such numbers.
        """

    @abstractmethod
    def bad(self, stored: Tensor, field: Field) -> Tensor:
        """Return which stored numbers (R, ...) it cannot be drawn from."""

    @abstractmethod
    def draw(self, stored: Tensor, field: Field, ids_R: Tensor, epoch: Epoch | None) -> Tensor:
        """Return numbers as stored then; a function of the ids and the epoch, or of the ids alone without one."""


@dataclass(frozen=True)
class Dequantise(Redraw):
    """Level k of n becomes k + u, u uniform on (0, 1): (k + u) / n as models see it. In training u is new each epoch.

    Args:
        seed: of the draws outside of training.
    """

    seed: int

    def field(self, field: Field, name: str) -> Field:
        steps = round(1 / field.scale) if 0 < field.scale <= 1 else 0
        if field.dtype != torch.uint8 or field.offset or not 1 <= steps <= 255 or abs(steps * field.scale - 1) > 1e-6:
            raise ValueError(
                f"Dequantised needs bytes that mean levels on [0, 1], as uint8 with scale 1/255, but the field "
                f"{name!r} is {field.dtype} with scale {field.scale:.6g} and offset {field.offset:.6g}: name another"
            )
        return Field(field.shape, torch.float32, 1 / (steps + 1), drawn=f"{DEQUANTISED} (seed {self.seed})")

    def bad(self, stored: Tensor, field: Field) -> Tensor:
        return stored > round(1 / field.scale)

    def draw(self, stored: Tensor, field: Field, ids_R: Tensor, epoch: Epoch | None) -> Tensor:
        return stored.float() + _uniform(Purpose.DEQUANTISE, self.seed, field, ids_R, epoch)


@dataclass(frozen=True)
class Binarise(Redraw):
    """A number p of [0, 1] becomes 1 with probability p, else 0.

    Args:
        kind: static: the same draw always; dynamic: in training a new one each epoch; threshold: 1 from 0.5 on.
        seed: of the draws, of dynamic ones outside of training.
    """

    kind: Literal["static", "dynamic", "threshold"]
    seed: int

    def field(self, field: Field, name: str) -> Field:
        how = "at 0.5" if self.kind == "threshold" else f"{self.kind}, seed {self.seed}"
        return Field(field.shape, torch.uint8, drawn=f"binarised ({how})")

    def bad(self, stored: Tensor, field: Field) -> Tensor:
        values = field.values(stored, torch.float32)
        return ~((values >= 0) & (values <= 1))

    def draw(self, stored: Tensor, field: Field, ids_R: Tensor, epoch: Epoch | None) -> Tensor:
        values = field.values(stored, torch.float32)
        if self.kind == "threshold":
            return (values >= 0.5).byte()
        at = epoch if self.kind == "dynamic" else None
        return (_uniform(Purpose.BINARISE, self.seed, field, ids_R, at) < values).byte()


def _uniform(purpose: Purpose, seed: int, field: Field, ids_R: Tensor, epoch: Epoch | None) -> Tensor:
    """Return numbers uniform on (0, 1), (R, *shape), keyed by row, in an epoch with the run's seed, else the data's."""
    if epoch is None:
        draw = Draw(seed, purpose, EVALUATION_PHASE)
    else:
        draw = Draw(epoch.seed, purpose, epoch.phase, epoch.number)
    return draw.uniform(ids_R, [0], field.shape)[0]


@dataclass(frozen=True, eq=False)
class Redrawn(Samples):
    """The samples of another data set with one field drawn anew when it is read.

    Args:
        inner: the data set.
        name: of the field.
        how: it is drawn.

    Raises:
        ValueError: the field cannot be drawn so.
    """

    inner: Samples
    name: str
    how: Redraw

    log_density_N = None  # of other numbers

    def __post_init__(self) -> None:
        kind = {Dequantise: "Dequantised", Binarise: "Binarised"}.get(type(self.how), type(self.how).__name__)
        real_field(self.inner.spec, self.name, kind)
        self.how.field(self.inner.spec[self.name], self.name)

    @property
    def spec(self) -> Spec:  # type: ignore[override]
        return {**self.inner.spec, self.name: self.how.field(self.inner.spec[self.name], self.name)}

    @property
    def label(self) -> str | None:  # type: ignore[override]
        return self.inner.label

    @property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.inner.class_names

    @property
    def attribute(self) -> str | None:  # type: ignore[override]
        return self.inner.attribute

    @property
    def attribute_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.inner.attribute_names

    @property
    def ids(self) -> Tensor:
        return self.inner.ids

    @property
    def fingerprint(self) -> str:
        """Return the sha256 of the data set's fingerprint, the field's name and how it is drawn."""
        return hashlib.sha256(f"{self.inner.fingerprint} {self.name} {self.spec[self.name].drawn}".encode()).hexdigest()

    def start(
        self, index: Tensor, epoch: Epoch | None = None, fields: Sequence[str] | None = None
    ) -> Callable[[], Batch]:
        wait = self.inner.start(index, epoch, fields)

        def finish() -> Batch:
            rows = wait()
            if self.name not in rows:
                return rows
            field = self.inner.spec[self.name]
            self._check(rows)
            return {**rows, self.name: self.how.draw(rows[self.name], field, rows["id"], epoch)}

        return finish

    def check(self) -> None:
        """Check all rows of a data set in memory; others are checked as they are read.

        Raises:
            ValueError: the field of a row cannot be drawn so.
        """
        if self.inner.in_memory:
            for part in torch.arange(len(self)).split(AT_ONCE):
                self._check(self.inner.take(part, fields=[self.name]))

    def _check(self, rows: Batch) -> None:
        field, stored = self.inner.spec[self.name], rows[self.name]
        bad = self.how.bad(stored, field)
        if bad.any():
            where = tuple(bad.nonzero()[0].tolist())
            ends = f"0 to {1 / field.scale:.0f}" if isinstance(self.how, Dequantise) else "0 to 1 as models see it"
            value = field.values(stored[where], torch.float64) if isinstance(self.how, Binarise) else stored[where]
            raise ValueError(
                f"field {self.name!r} of sample {rows['id'][where[0]]} holds {value.item():g}, expected {ends} to draw "
                f"from: fix this sample, or take the source as it is"
            )

    def part(self, index: Tensor) -> Self:
        return replace(self, inner=self.inner.part(index))

    def ordered(self, positions: Tensor, epoch: Epoch, batch_size: int) -> Tensor:
        return self.inner.ordered(positions, epoch, batch_size)

    @property
    def order_options(self) -> dict[str, Any]:
        return self.inner.order_options

    @property
    def in_memory(self) -> bool:
        """Return False: what is drawn differs between epochs, so it is not to be laid out once."""
        return False

    @property
    def ahead(self) -> int:
        return self.inner.ahead

    def unreadable(self, rank: int, world_size: int) -> list[tuple[int, str]]:
        return self.inner.unreadable(rank, world_size)

    def without(self, ids: Sequence[int]) -> Samples:
        return replace(self, inner=self.inner.without(ids))

    def close(self) -> None:
        self.inner.close()
