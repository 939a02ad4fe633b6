"""The rows of any source as samples of shards: each row one .npy array whose fields have names.

Shape letters: N rows of a split.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mixdist.data.dataset import Samples, Splits
from mixdist.data.fields import describe_spec, dtype_of
from mixdist.data.formats import Listing, Part, Sample
from mixdist.data.shards.index import ABOUT_ROWS

TAKEN_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class RowsPart(Part):
    """A split with the source's own ids.

    Args:
        id_N: of its rows, int64, in the order of the split.
    """

    id_N: NDArray[np.int64] | None = None

    def sample(self, row: int) -> Sample:
        assert self.id_N is not None
        label = None if self.label_N is None else int(self.label_N[row])
        return Sample(int(self.id_N[row]), f"{self.split} row {row}", self.split, row, label, b"")


@dataclass
class RowReader:
    """Reads rows in this process, which has the source; those that lie together are taken at once.

    Args:
        splits: by name.
        packed: the fields that a row's array holds.
    """

    splits: dict[str, Samples]
    packed: tuple[str, ...]
    _last: tuple[str, int, NDArray[Any]] | None = field(default=None, repr=False)

    def read(self, sample: Sample) -> bytes:
        """Return a row's fields, as stored, as one .npy array."""
        number, place = divmod(sample.row, TAKEN_AT_ONCE)
        if self._last is None or self._last[:2] != (sample.file, number):
            self._last = sample.file, number, self._block(self.splits[sample.file], number)
        stream = io.BytesIO()
        np.save(stream, self._last[2][place], allow_pickle=False)
        return stream.getvalue()

    def _block(self, samples: Samples, number: int) -> NDArray[Any]:
        first = number * TAKEN_AT_ONCE
        index = torch.arange(first, min(first + TAKEN_AT_ONCE, len(samples)))
        rows = samples.take(index, fields=self.packed)
        packed = np.zeros(len(index), dtype_of({name: samples.spec[name] for name in self.packed}))
        for name in self.packed:
            packed[name] = rows[name].numpy()
        return packed


def list_rows(splits: Splits[Samples], source: str) -> tuple[Listing, dict[str, Any]]:
    """Return the rows of a source as samples of shards, and, as JSON, what their fields are.

    The label, one number a row, is each sample's ``cls``; all other fields are in its array.

    Args:
        splits: of the source.
        source: its name, for messages.

    Raises:
        ValueError: rows that are drawn anew in each epoch, or have another spec in another split; no field but the
            label.
    """
    named = {name: rows for name, rows in splits._asdict().items() if rows is not None}
    train = splits.train
    if drawn := [name for name, field in train.spec.items() if field.drawn]:
        raise ValueError(
            f"{source} draws the field {drawn[0]!r} of its rows ({train.spec[drawn[0]].drawn}), and shards would fix "
            f"it: prepare the source inside of it, and put it around Shards"
        )
    if odd := [name for name, rows in named.items() if dict(rows.spec) != dict(train.spec)]:
        raise ValueError(f"{source} has other fields in {odd[0]} rows than in train rows: give all splits one spec")
    label = train.label if train.label and train.spec[train.label].shape == () else None
    packed = tuple(name for name in train.spec if name != label)
    if not packed:
        raise ValueError(f"{source} has no field beside its label: name a source with rows")
    parts = []
    for name, rows in named.items():
        everything = torch.arange(len(rows))
        label_N = None if label is None else rows.take(everything, fields=[label])[label].long().numpy()
        parts.append(RowsPart(name, 0, len(rows), name, label_N=label_N, id_N=rows.ids.numpy()))
    about = {
        "spec": describe_spec(train.spec),
        "label": train.label,
        "attribute": train.attribute,
        "attribute_names": list(train.attribute_names),
    }
    assert set(about) == ABOUT_ROWS
    digest = sha256("".join(rows.fingerprint for rows in named.values()).encode()).hexdigest()
    return Listing(tuple(parts), RowReader(named, packed), digest, class_names=tuple(train.class_names)), about
