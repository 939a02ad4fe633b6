"""Base classes of data: samples by position, a data set in memory, a source that loads data sets."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from mixdist.arguments import check_argument, check_fields
from mixdist.data.order import Epoch, shuffled
from mixdist.terms import STORED_INTEGERS, STORED_REALS, Batch, Field, Spec


class Samples(ABC):
    """The samples of a data set by position, in memory or elsewhere.

    Attributes:
        spec: the fields of a sample.
        label: the name of the field that holds the class, or None.
        class_names: the names of its classes, or empty.
        log_density_N: the log density of each sample if the source knows it, or None.
        attribute: the name of the field that holds binary attributes, or None.
        attribute_names: their names, or empty.
    """

    spec: Spec
    label: str | None
    class_names: tuple[str, ...]
    log_density_N: Tensor | None
    attribute: str | None
    attribute_names: tuple[str, ...]

    @property
    @abstractmethod
    def ids(self) -> Tensor:
        """Return the global id of each sample, int64 (N,), all different."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of the samples' content."""

    @abstractmethod
    def start(
        self, index: Tensor, epoch: Epoch | None = None, fields: Sequence[str] | None = None
    ) -> Callable[[], Batch]:
        """Start an asynchronous read; return a callable that blocks until the rows are there (call it once).

        Args:
            index: positions, int64.
            epoch: the key of the augmentation of training; None for samples without augmentation.
            fields: the fields to read beside "id"; None for all.

        Raises:
            ValueError: raised by the returned callable: a sample cannot be read.
        """

    def part(self, index: Tensor) -> Self:
        """Return the samples at the positions ``index``, int64, ascending.

        Raises:
            ValueError: these samples cannot be cut.
        """
        raise ValueError(f"{type(self).__name__} cannot be cut: write its part method, or leave valid and --rows out")

    def first(self, num_rows: int) -> Self:
        """Return the first ``num_rows`` samples in the data set's order, or all if there are fewer."""
        return self.part(torch.arange(min(num_rows, len(self))))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_classes(self) -> int | None:
        """Return the number of classes of the label; None without a label."""
        return None if self.label is None or self.label not in self.spec else self.spec[self.label].num_classes

    def take(self, index: Tensor, epoch: Epoch | None = None, fields: Sequence[str] | None = None) -> Batch:
        """Return the samples at the positions ``index``, as stored; arguments and errors as for ``start``."""
        return self.start(index, epoch, fields)()

    def ordered(self, positions: Tensor, epoch: Epoch, batch_size: int) -> Tensor:
        """Return positions in the order of an epoch, for batches of ``batch_size``."""
        return shuffled(positions, epoch)

    @property
    def order_options(self) -> dict[str, Any]:
        """Return, as JSON, what decides the order of an epoch beside the samples; a run is resumed with the same only.

        A class with an ``ordered`` of its own returns the options of that.
        """
        return {"order": "full"}

    @property
    def in_memory(self) -> bool:
        """Return whether samples are in memory and need no read."""
        return True

    @property
    def ahead(self) -> int:
        """Return how many batches to start before they are needed; 0 for samples in memory."""
        return 0

    def unreadable(self, rank: int, world_size: int) -> list[tuple[int, str]]:
        """Return id and reason of the samples in a rank's share that cannot be read, if such samples are left out."""
        return []

    def without(self, ids: Sequence[int]) -> Samples:
        """Return the samples without those of the given ids.

        Raises:
            ValueError: more samples than may be left out.
        """
        assert not ids, f"{len(ids)} samples in memory cannot be read"
        return self

    def close(self) -> None:  # noqa: B027
        """End worker processes and close files, if there are any."""


@dataclass(frozen=True, eq=False)
class Dataset(Samples):
    """Samples in memory with their spec.

    Args:
        rows: "id" (int64, each one different) and a tensor (N, *shape) for each field of the spec.
        spec: the fields.
        label: the name of the field that holds the class, or None. A model uses it only if its config says so.
        class_names: the names of its classes, or empty.
        log_density_N: log p of each row's values if the source knows it, float64 (N,), nats. It is not part of the
            rows: ``take`` and the fingerprint leave it out.
        attribute: the name of the field (A,), uint8 of 0 and 1, that holds binary attributes, or None. A model
            uses it only if its config says so.
        attribute_names: their A names, or empty.

    Raises:
        ValueError: if there are no rows, a number is not finite, a class out of range, or an attribute not 0 or 1.

    Examples:
        >>> import torch
        >>> from mixdist.data import Dataset
        >>> from mixdist.terms import Field
        >>> rows = {"id": torch.tensor([7, 8, 9]), "x": torch.tensor([0, 128, 255], dtype=torch.uint8)}
        >>> dataset = Dataset(rows, {"x": Field((), torch.uint8, scale=1 / 255)})
        >>> dataset.take(torch.tensor([2, 0]))
        {'id': tensor([9, 7]), 'x': tensor([255,   0], dtype=torch.uint8)}
    """

    rows: Batch
    spec: Spec
    label: str | None = None
    class_names: tuple[str, ...] = ()
    log_density_N: Tensor | None = None
    attribute: str | None = None
    attribute_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_argument("rows", self.rows, dict)
        check_fields(self, but=("rows",))
        if odd := [name for name, column in self.rows.items() if not isinstance(column, Tensor)]:
            kind = type(self.rows[odd[0]]).__name__
            raise ValueError(f"field {odd[0]!r} is a {kind}, expected a tensor: take torch.as_tensor of it")
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
            check_field(name, field)
            self._check(name, field)
        self._check_attributes()
        self._check_log_density()

    @property
    def ids(self) -> Tensor:
        return self.rows["id"]

    @property
    def fingerprint(self) -> str:
        """Return the sha256 of every field, ids first."""
        digest = hashlib.sha256()
        for name in ("id", *sorted(self.spec)):
            digest.update(self.rows[name].contiguous().numpy().data)
        return digest.hexdigest()

    def start(
        self, index: Tensor, epoch: Epoch | None = None, fields: Sequence[str] | None = None
    ) -> Callable[[], Batch]:
        return partial(self._take, index, ("id", *(self.spec if fields is None else fields)))

    def _take(self, index: Tensor, names: tuple[str, ...]) -> Batch:
        # For rows of bytes index_select takes a tenth of the time of indexing.
        return {name: self.rows[name].index_select(0, index) for name in names}

    def part(self, index: Tensor) -> Self:
        known = self.log_density_N
        rows = self._take(index, ("id", *self.spec))
        return replace(self, rows=rows, log_density_N=None if known is None else known[index])

    def _check(self, name: str, field: Field) -> None:
        column = self.rows[name]
        if column.shape != (len(self), *field.shape) or column.dtype != field.dtype:
            expected = f"{(len(self), *field.shape)} of {field.dtype}"
            raise ValueError(
                f"field {name!r} is {tuple(column.shape)} of {column.dtype}, expected {expected}: fix its spec"
            )
        if field.num_classes is not None:
            expected, remedy = f"a class from 0 to {field.num_classes - 1}", "correct the label or num_classes"
            classes = column.long()  # 256 classes would overflow a comparison of bytes
            self._require((classes >= 0) & (classes < field.num_classes), name, expected, remedy)
        elif column.is_floating_point():
            self._require(column.isfinite(), name, "a finite number", "fix or remove this sample")

    def _check_attributes(self) -> None:
        name, field = self.attribute, self.spec.get(self.attribute or "")
        if name is not None:
            if field is None or len(field.shape) != 1 or field.dtype != torch.uint8 or field.num_classes is not None:
                raise ValueError(
                    f"attribute {name!r} must be a field (attributes,) of torch.uint8 without num_classes: declare it "
                    "in the spec"
                )
            self._require(self.rows[name] <= 1, name, "0 or 1", "correct the attributes of this sample")
        if len(self.attribute_names) not in (0, field.shape[0] if field else 0):
            expected = f"{field.shape[0]}: name each attribute or none" if field else "0: declare attribute as well"
            raise ValueError(f"attribute_names ({len(self.attribute_names)}) must be {expected}")

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
                f"log_density_N of sample {self.rows['id'][row]} ({log_p_N[row]}) must be a finite number: fix or "
                "remove this sample"
            )

    def _require(self, good: Tensor, name: str, expected: str, remedy: str) -> None:
        if good.all():
            return
        where = tuple(good.logical_not().nonzero()[0].tolist())
        value, sample = self.rows[name][where].item(), self.rows["id"][where[0]].item()
        raise ValueError(f"field {name!r} of sample {sample} holds {value}, expected {expected}: {remedy}.")


def check_field(name: str, field: Field) -> None:
    """Check the description of a field.

    Raises:
        ValueError: a type that rows cannot be stored in, or numbers that mean nothing.
    """
    stored = STORED_INTEGERS if isinstance(field, Field) and field.num_classes else (*STORED_INTEGERS, *STORED_REALS)
    if not isinstance(field, Field) or field.dtype not in stored:
        given = getattr(field, "dtype", type(field).__name__)
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in stored)
        raise ValueError(f"field {name!r} is {given}, expected a Field of {known}: store it as one of these")
    check_fields(field, f"field {name!r}: ", but=("shape",))
    if not isinstance(field.shape, tuple) or not all(isinstance(n, int) and n > 0 for n in field.shape):
        raise ValueError(f"field {name!r} has shape {field.shape}, expected a tuple of numbers from 1: fix its spec")
    if not (math.isfinite(field.scale) and field.scale and math.isfinite(field.offset)):
        raise ValueError(
            f"field {name!r} has scale {field.scale} and offset {field.offset}, expected finite ones, and a scale that "
            f"is not 0: fix its spec"
        )


S = TypeVar("S", bound=Samples)


class Splits(NamedTuple, Generic[S]):
    """The parts of a data set; no id is in two of them.

    Args:
        train: what a mixture is trained on.
        test: read by the last step alone, which tells how good the result is.
        valid: read to choose settings and the best checkpoint, where the source has such rows of its own; a config's
            ``valid`` cuts them out of the training rows of any other.

    Examples:
        >>> from mixdist.data import Blobs, Splits
        >>> train, test, _ = Blobs(rows=90, test_rows=30).load()
        >>> [len(rows) for rows in Splits(train.first(80), test, valid=train.first(10))]
        [80, 30, 10]
    """

    train: S
    test: S
    valid: S | None = None


class Source(ABC):
    """A data set that a config can name.

    Examples:
        A source of your own loads two data sets whose ids are all different:

        >>> import torch
        >>> from mixdist.data import Dataset, Source, Splits
        >>> from mixdist.terms import Field
        >>> class Waves(Source):
        ...     def load(self):
        ...         spec, parts = {"x": Field((), torch.float32)}, (torch.arange(80), torch.arange(80, 100))
        ...         return Splits(*(Dataset({"id": ids, "x": (ids / 10).sin()}, spec) for ids in parts))
        >>> splits = Waves().load()
        >>> len(splits.train), len(splits.test), splits.valid
        (80, 20, None)
    """

    @abstractmethod
    def load(self) -> Splits:
        """Read the training set, the held-out test set and, where there is one, the validation set.

        Ids are global over all and belong to the samples: they follow the source's own order, not the run's seed.
        """
