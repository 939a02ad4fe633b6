"""Samples in tar shards, as a data set.

Shape letters: N samples of this data set, M all samples of the index, A attributes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixdist.data.augment import Augment
from mixdist.data.dataset import Samples
from mixdist.data.loader import share
from mixdist.data.order import Epoch, OrderName, shuffled, shuffled_blocks
from mixdist.data.shards.index import ShardIndex
from mixdist.data.shards.reader import Pool, Wanted
from mixdist.terms import Batch, Spec

_SURVEYED_AT_ONCE = 512


@dataclass(frozen=True)
class Shelf:
    """What the parts of a data set in shards share.

    Args:
        index: of the shards.
        pool: reads their samples.
        column_M: which member of each sample is its content.
        order: full, or blocks of neighbours; see :func:`mixdist.data.order.shuffled_blocks`.
        block: neighbours in a block.
        window: blocks that are mixed.
        ahead: batches that are started before they are needed.
        on_error: raise, or skip samples that cannot be read.
        max_skipped: the largest part of them that may be skipped.
    """

    index: ShardIndex
    pool: Pool
    column_M: NDArray[np.int64]
    order: OrderName = "blocks"
    block: int = 64
    window: int = 128
    ahead: int = 2
    on_error: str = "raise"
    max_skipped: float = 0.01

    def wanted(self, places: NDArray[np.int64]) -> list[Wanted]:
        """Return where samples lie, by their places in the index."""
        columns, shards = self.column_M[places], np.searchsorted(self.index.starts, places, side="right") - 1
        members, crcs = self.index.member_NM2[places, columns], self.index.crc_NM[places, columns]
        names = [shard.name for shard in self.index.shards]
        found = zip(shards.tolist(), members.tolist(), crcs.tolist(), strict=True)
        return [Wanted(names[shard], offset, size, crc) for shard, (offset, size), crc in found]

    def described(self, place: int, reason: str) -> str:
        """Return which sample is bad, and why."""
        shard, offset, _, _ = self.wanted(np.array([place]))[0]
        return f"sample {self.index.id_N[place]} in shard {shard} at offset {offset}: {reason}"


@dataclass(eq=False)
class ShardSamples(Samples):
    """Samples in shards, read and decoded when they are asked for.

    Args:
        shelf: where they are.
        places: of the samples in the index, ascending, int64 (N,).
        spec: the fields: "x", and where they are wanted "y" and "attributes"; or those of rows.
        label_N: class of each, as stored; None without a label, or with one that is read with its row.
        attribute_NA: attributes of each; None without them.
        class_names: of the label.
        attribute_names: A names.
        augment: what happens to images in training; None for nothing.
        label: the field that holds the class.
        attribute: the field that holds attributes.
    """

    shelf: Shelf
    places: NDArray[np.int64]
    spec: Spec
    label_N: Tensor | None = None
    attribute_NA: Tensor | None = None
    class_names: tuple[str, ...] = ()
    attribute_names: tuple[str, ...] = ()
    augment: Augment | None = None
    label: str | None = None
    attribute: str | None = None

    log_density_N = None

    def __post_init__(self) -> None:
        self._ids = torch.from_numpy(self.shelf.index.id_N[self.places])

    @property
    def ids(self) -> Tensor:
        return self._ids

    @property
    def fingerprint(self) -> str:
        """Return the sha256 of the index, of which of its samples these are, and of how they are decoded."""
        digest = hashlib.sha256(self.shelf.index.fingerprint.encode())
        how = replace(self.shelf.pool.reading, storage=None)  # type: ignore[arg-type]
        digest.update(f"{how} {self.label} {self.class_names}".encode())
        digest.update(self.places.tobytes())
        return digest.hexdigest()

    def start(
        self, index: Tensor, epoch: Epoch | None = None, fields: Sequence[str] | None = None
    ) -> Callable[[], Batch]:
        names = self.spec if fields is None else fields
        places = self.places[index.numpy()]
        known = {self.label: self.label_N, self.attribute: self.attribute_NA}
        kept = {name: column for name, column in known.items() if name is not None and column is not None}
        read = [name for name in names if name not in kept]
        started = self.shelf.pool.start(self.shelf.wanted(places)) if read else None

        def finish() -> Batch:
            rows = {"id": self._ids[index]}
            if started is not None:
                arrays, bad = started()
                if bad:
                    raise ValueError(
                        f"{self.shelf.described(int(places[bad[0].place]), bad[0].reason)}; mixdist verify --decode "
                        f"finds all such samples, data.init_args.on_error skip leaves them out"
                    )
                if arrays.dtype.names:
                    rows |= {name: torch.from_numpy(arrays[name].copy()) for name in read}
                else:
                    rows["x"] = torch.from_numpy(arrays)
                if epoch is not None and self.augment is not None:
                    rows["x"] = self.augment(rows["x"], rows["id"], epoch)
            rows |= {name: column.index_select(0, index) for name, column in kept.items() if name in names}
            return rows

        return finish

    def part(self, index: Tensor) -> Self:
        label_N, attribute_NA = (None if c is None else c[index] for c in (self.label_N, self.attribute_NA))
        return replace(self, places=self.places[index.numpy()], label_N=label_N, attribute_NA=attribute_NA)

    def ordered(self, positions: Tensor, epoch: Epoch, batch_size: int) -> Tensor:
        if self.shelf.order == "full":
            return shuffled(positions, epoch)
        return shuffled_blocks(positions, epoch, self.shelf.block, self.shelf.window, batch_size)

    @property
    def order_options(self) -> dict[str, Any]:
        shelf = self.shelf
        blocks = {"block": shelf.block, "window": shelf.window} if shelf.order == "blocks" else {}
        return {"order": shelf.order, **blocks}

    @property
    def in_memory(self) -> bool:
        return False

    @property
    def ahead(self) -> int:
        return self.shelf.ahead if self.shelf.pool.workers else 0

    def unreadable(self, rank: int, world_size: int) -> list[tuple[int, str]]:
        """Return id and reason of the samples in a rank's share that cannot be read: each is read and decoded once.

        Known before the first step, the samples that are left out are the same on any layout, and no batch is short.
        """
        if self.shelf.on_error == "raise":
            return []
        own = self.places[share(len(self), rank, world_size)]
        found = []
        for first in range(0, len(own), _SURVEYED_AT_ONCE):
            part = own[first : first + _SURVEYED_AT_ONCE]
            _, bad = self.shelf.pool.start(self.shelf.wanted(part))()
            for place, reason in ((int(part[one.place]), one.reason) for one in bad):
                found.append((int(self.shelf.index.id_N[place]), self.shelf.described(place, reason)))
        return found

    def without(self, ids: Sequence[int]) -> Self:
        if len(ids) > self.shelf.max_skipped * len(self):
            raise ValueError(
                f"{len(ids)} of {len(self)} samples cannot be read, more than data.init_args.max_skipped "
                f"({self.shelf.max_skipped:g}) of them: see mixdist verify --decode, fix them, or raise it"
            )
        return self.part(torch.isin(self._ids, torch.as_tensor(ids)).logical_not().nonzero()[:, 0])

    def close(self) -> None:
        self.shelf.pool.close()
        self.shelf.pool.reading.storage.close()
