"""What every source of data gives: rows in memory as they are stored, and what their numbers mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

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

    Raises:
        ValueError: if there are no rows, a number is not finite, or a class is out of range.
    """

    rows: Batch
    spec: Spec
    label: str | None = None
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ids = self.rows["id"]
        if len(ids) == 0:
            raise ValueError("the data set has 0 samples, expected at least 1: raise its size or its limit.")
        assert (ids.dtype, ids.ndim) == (torch.int64, 1), f"ids are {ids.dtype} {tuple(ids.shape)}"
        assert (ids.sort().values.diff() > 0).all(), "ids are not unique"
        assert self.rows.keys() == {"id", *self.spec}, f"rows {sorted(self.rows)} against fields {sorted(self.spec)}"
        assert self.label is None or self.spec[self.label].num_classes is not None, f"{self.label} has no classes"
        assert len(self.class_names) in (0, self.num_classes), f"{len(self.class_names)} names of classes"
        for name, field in self.spec.items():
            self._check(name, field)

    def __len__(self) -> int:
        return len(self.rows["id"])

    @property
    def num_classes(self) -> int | None:
        """Classes of the label; None without a label."""
        return None if self.label is None else self.spec[self.label].num_classes

    def take(self, index: Tensor) -> Batch:
        """The rows at the positions ``index`` (int64), as stored."""
        return {name: column[index] for name, column in self.rows.items()}

    def _check(self, name: str, field: Field) -> None:
        column = self.rows[name]
        assert column.shape == (len(self), *field.shape), f"{name}: {tuple(column.shape)} against {field.shape}"
        assert column.dtype == field.dtype, f"{name}: {column.dtype} against {field.dtype}"
        if field.num_classes is not None:
            expected, remedy = f"a class from 0 to {field.num_classes - 1}", "correct the label or num_classes"
            classes = column.long()  # 256 classes would overflow a comparison of bytes
            self._require((classes >= 0) & (classes < field.num_classes), name, expected, remedy)
        elif column.is_floating_point():
            self._require(column.isfinite(), name, "a finite number", "mend or remove this sample")

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
