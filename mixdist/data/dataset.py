"""What every source of data gives: rows in memory as they are stored, and what their numbers mean."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mixdist.terms import Batch, Field, Spec


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows with their spec.

    Args:
        rows: "id" (int64, each one different) and a tensor (N, *shape) for each field of the spec.
        spec: the fields.
        label: the name of the field that holds the class, if there is one. No model is trained on it unasked.
        class_names: names of its classes, or empty.
        log_density_N: log p of each row's values where the source knows it, float64 (N,), nats. It is knowledge about
            the rows, not part of them: ``take`` and the fingerprint leave it out.

    Raises:
        ValueError: if there are no rows, a number is not finite, or a class is out of range.
    """

    rows: Batch
    spec: Spec
    label: str | None = None
    class_names: tuple[str, ...] = ()
    log_density_N: Tensor | None = None

    def __post_init__(self) -> None:
        if "id" not in self.rows or self.rows.keys() != {"id", *self.spec}:
            raise ValueError(
                f"rows have the fields {sorted(self.rows)}, expected {sorted({'id', *self.spec})}: add or drop"
            )
        ids = self.rows["id"]
        if ids.dtype != torch.int64 or ids.ndim != 1 or len(ids.unique()) != len(ids):
            raise ValueError(
                f"id ({ids.dtype}, {tuple(ids.shape)}) must be one int64 a row, all different: number the rows"
            )
        if len(ids) == 0:
            raise ValueError("the data set has 0 samples, expected at least 1: raise its size or its limit.")
        if self.label is not None and self.num_classes is None:
            raise ValueError(f"label {self.label!r} must be a field with num_classes: declare them in the spec")
        if len(self.class_names) not in (0, self.num_classes):
            raise ValueError(
                f"class_names ({len(self.class_names)}) must be {self.num_classes}: name each class or none"
            )
        for name, field in self.spec.items():
            self._check(name, field)
        self._check_log_density()

    def __len__(self) -> int:
        return len(self.rows["id"])

    @property
    def num_classes(self) -> int | None:
        """Classes of the label; None without a label."""
        return None if self.label is None or self.label not in self.spec else self.spec[self.label].num_classes

    @property
    def fingerprint(self) -> str:
        """Name the rows by their content: sha256 over every field, ids first."""
        digest = hashlib.sha256()
        for name in ("id", *sorted(self.spec)):
            digest.update(self.rows[name].contiguous().numpy().data)
        return digest.hexdigest()

    def take(self, index: Tensor) -> Batch:
        """The rows at the positions ``index`` (int64), as stored."""
        return {name: column[index] for name, column in self.rows.items()}

    def first(self, num_rows: int) -> Dataset:
        """The first rows, in the data set's order; all of them where there are no more."""
        rows = {name: column[:num_rows] for name, column in self.rows.items()}
        known = self.log_density_N
        return replace(self, rows=rows, log_density_N=None if known is None else known[:num_rows])

    def _check(self, name: str, field: Field) -> None:
        column = self.rows[name]
        if column.shape != (len(self), *field.shape) or column.dtype != field.dtype:
            expected = f"{(len(self), *field.shape)} of {field.dtype}"
            raise ValueError(
                f"field {name!r} is {tuple(column.shape)} of {column.dtype}, expected {expected}: mend its spec"
            )
        if field.num_classes is not None:
            expected, remedy = f"a class from 0 to {field.num_classes - 1}", "correct the label or num_classes"
            classes = column.long()  # 256 classes would overflow a comparison of bytes
            self._require((classes >= 0) & (classes < field.num_classes), name, expected, remedy)
        elif column.is_floating_point():
            self._require(column.isfinite(), name, "a finite number", "mend or remove this sample")

    def _check_log_density(self) -> None:
        log_p_N = self.log_density_N
        if log_p_N is None:
            return
        if log_p_N.shape != (len(self),) or log_p_N.dtype != torch.float64:
            raise ValueError(
                f"log_density_N ({log_p_N.dtype}, {tuple(log_p_N.shape)}) must be float64 ({len(self)},): give one for "
                "each row or None"
            )
        if not log_p_N.isfinite().all():
            row = int(log_p_N.isfinite().logical_not().nonzero()[0])
            raise ValueError(
                f"log_density_N of sample {self.rows['id'][row]} ({log_p_N[row]}) must be a finite number: mend or "
                "remove this sample"
            )

    def _require(self, good: Tensor, name: str, expected: str, remedy: str) -> None:
        if good.all():
            return
        where = tuple(good.logical_not().nonzero()[0].tolist())
        value, sample = self.rows[name][where].item(), self.rows["id"][where[0]].item()
        raise ValueError(f"field {name!r} of sample {sample} holds {value}, expected {expected}: {remedy}.")


class Source(ABC):
    """Where a data set comes from."""

    @abstractmethod
    def load(self) -> tuple[Dataset, Dataset]:
        """Read the training set and the held-out test set.

        Ids are global over both and belong to the samples: they follow the source's own order, not the run's seed.
        """
