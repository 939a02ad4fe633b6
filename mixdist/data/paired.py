"""Rows of several fields put together from several data sets, by an index and without copies.

Shape letters: N rows, R rows read, M data sets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from mixdist.data.dataset import Samples
from mixdist.data.order import Epoch
from mixdist.noise import Purpose, permutation
from mixdist.terms import Batch, Field, Spec

PRESENT = "present"
"""The field (M,), uint8 of 0 and 1, that says which modalities a row has; without it, all."""


@dataclass(frozen=True, eq=False)
class Paired(Samples):
    """Samples whose row n consists of one row of each of several data sets: row ``index_NM[n, m]`` of data set m.

    Nothing is copied: a row is put together when it is read, whether the parts are in memory or in shards. A part's
    augmentation is keyed by the part's own ids.

    Args:
        parts: M data sets.
        fields: for each of them the names of its fields, by their names in the rows.
        index_NM: positions in the parts, int64; -1 where a row has nothing of that part: its fields are 0.
        columns: "id", and fields that are in memory beside the parts, each (N, ...).
        column_spec: of these, without "id".
        label: the field of ``columns`` that holds the class, or None.
        class_names: its classes' names, or empty.

    Examples:
        >>> import torch
        >>> from mixdist.data import Blobs, Digits, Paired
        >>> digits, blobs = Digits().load().train, Blobs(num_features=3).load().train
        >>> index = torch.tensor([[0, 5], [0, 6], [1, -1]])
        >>> rows = Paired((digits, blobs), ({"image": "x"}, {"point": "x"}), index, {"id": torch.arange(3)}, {})
        >>> {name: tuple(column.shape) for name, column in rows.take(torch.tensor([0, 2])).items()}
        {'id': (2,), 'image': (2, 1, 8, 8), 'point': (2, 3)}
        >>> rows.take(torch.tensor([2]))["point"]
        tensor([[0., 0., 0.]])
    """

    parts: tuple[Samples, ...]
    fields: tuple[Mapping[str, str], ...]
    index_NM: Tensor
    columns: Batch
    column_spec: Spec
    label: str | None = None
    class_names: tuple[str, ...] = ()

    log_density_N = None
    attribute = None
    attribute_names = ()

    def __post_init__(self) -> None:
        names = [name for own in (*self.fields, self.column_spec) for name in own]
        assert len(set(names)) == len(names), f"fields {names}"
        assert self.index_NM.shape == (len(self.ids), len(self.parts)), f"index {tuple(self.index_NM.shape)}"

    @property
    def spec(self) -> Spec:  # type: ignore[override]
        return {n: p.spec[f] for p, own in zip(self.parts, self.fields, strict=True) for n, f in own.items()} | dict(
            self.column_spec
        )

    @property
    def ids(self) -> Tensor:
        return self.columns["id"]

    @property
    def fingerprint(self) -> str:
        """Return the sha256 of the parts' fingerprints, their fields' names, the index and the columns."""
        digest = hashlib.sha256()
        for part, own in zip(self.parts, self.fields, strict=True):
            digest.update(f"{part.fingerprint} {sorted(own.items())}".encode())
        for column in (self.index_NM, *(self.columns[name] for name in sorted(self.columns))):
            digest.update(column.contiguous().numpy().data)
        return digest.hexdigest()

    def start(
        self, index: Tensor, epoch: Epoch | None = None, fields: Sequence[str] | None = None
    ) -> Callable[[], Batch]:
        names, places_RM = self.spec if fields is None else fields, self.index_NM[index]
        started = []
        for part, own, places_R in zip(self.parts, self.fields, places_RM.unbind(1), strict=True):
            if wanted := {name: field for name, field in own.items() if name in names}:
                there_R = places_R >= 0
                started.append((wanted, there_R, part.start(places_R[there_R], epoch, list(wanted.values()))))

        def finish() -> Batch:
            rows = {n: self.columns[n].index_select(0, index) for n in ("id", *self.column_spec) if n in ("id", *names)}
            for wanted, there_R, wait in started:
                found = wait()
                rows |= {name: _spread(found[field], there_R) for name, field in wanted.items()}
            return rows

        return finish

    def part(self, index: Tensor) -> Self:
        columns = {name: column[index] for name, column in self.columns.items()}
        return replace(self, index_NM=self.index_NM[index], columns=columns)

    @property
    def in_memory(self) -> bool:
        return all(part.in_memory for part in self.parts)

    @property
    def ahead(self) -> int:
        return max(part.ahead for part in self.parts)

    def unreadable(self, rank: int, world_size: int) -> list[tuple[int, str]]:
        found = []
        for part, place_N in zip(self.parts, self.index_NM.unbind(1), strict=True):
            id_N = part.ids[place_N.clamp(min=0)]
            for bad, why in part.unreadable(rank, world_size):
                found += [(int(row), why) for row in self.ids[(id_N == bad) & (place_N >= 0)]]
        return found

    def without(self, ids: Sequence[int]) -> Self:
        return self.part(torch.isin(self.ids, torch.as_tensor(ids)).logical_not().nonzero()[:, 0])

    def close(self) -> None:
        for part in self.parts:
            part.close()


def _spread(found: Tensor, there_R: Tensor) -> Tensor:
    """Return rows with 0 where there is none."""
    if bool(there_R.all()):
        return found
    whole = found.new_zeros((len(there_R), *found.shape[1:]))
    whole[there_R] = found
    return whole


def present_field(num_modalities: int) -> Field:
    """Return the field that says which modalities a row has."""
    return Field((num_modalities,), torch.uint8)


def members(class_N: Tensor, of_class: int) -> Tensor:
    """Return the positions of the rows of a class, ascending."""
    return (class_N == of_class).nonzero()[:, 0]


def keyed_order(positions_N: Tensor, seed: int, *key: int) -> Tensor:
    """Return positions in an order that is keyed by the data's seed and by up to three numbers."""
    phase, epoch, part = (*key, 0, 0, 0)[:3]
    return positions_N[permutation(seed, phase, epoch, len(positions_N), part, Purpose.DATA)]


def check_label(label: str, taken: Collection[str], asked_by: str) -> None:
    """Check that a source's label has a name of its own among the fields of rows.

    Raises:
        ValueError: it has not.
    """
    if label in (*taken, PRESENT):
        raise ValueError(
            f"{asked_by}: the name {label!r} is that of the label of the first source, too: name one of them otherwise"
        )


def labels_of(samples: Samples, asked_by: str) -> Tensor:
    """Return the class of each sample, int64 (N,).

    Raises:
        ValueError: the data set has no label.
    """
    if samples.label is None:
        raise ValueError(f"{asked_by} pairs rows by class, and a source has no label: name one whose rows have classes")
    column: Any = samples.take(torch.arange(len(samples)), fields=[samples.label])[samples.label]
    return column.long()
