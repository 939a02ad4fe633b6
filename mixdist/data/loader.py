"""Which rows a rank reads for a global batch: pure arithmetic, no communication."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixdist.data.dataset import Dataset
from mixdist.noise import permutation
from mixdist.terms import Batch


def share(count: int, rank: int, world: int) -> range:
    """The positions of 0 to count - 1 that belong to a rank: contiguous, the first ranks have one more.

    Args:
        count: what is shared.
        rank: whose share, from 0 to world - 1.
        world: among how many.
    """
    assert count >= 0, f"share({count}, {rank}, {world})"
    assert 0 <= rank < world, f"share({count}, {rank}, {world})"
    least, extra = divmod(count, world)
    start = rank * least + min(rank, extra)
    return range(start, start + least + (rank < extra))


@dataclass(frozen=True, eq=False)
class Shard:
    """This rank's rows of one global batch.

    Args:
        rows: the rows that this rank loads; there may be none.
        counts: how many rows each rank of the world loads.
    """

    rows: Batch
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.rows["id"]) in self.counts, f"{len(self.rows['id'])} rows against counts {self.counts}"

    @property
    def size(self) -> int:
        """Rows that this rank loads."""
        return len(self.rows["id"])

    @property
    def total(self) -> int:
        """Rows of the global batch."""
        return sum(self.counts)

    def to(self, device: torch.device) -> Shard:
        """The same rows on a device."""
        return Shard({name: column.to(device, non_blocking=True) for name, column in self.rows.items()}, self.counts)

    def split(self, num_parts: int) -> list[Shard]:
        """Cut every rank's rows into exactly ``num_parts`` parts, so that all ranks agree on each part's counts.

        Args:
            num_parts: number of parts, such as micro-batches; parts are as even as possible and may be empty.

        Raises:
            ValueError: if ``num_parts`` is less than 1.
        """
        if num_parts < 1:
            raise ValueError(f"num_parts ({num_parts}) must be at least 1: set it to 1 for one part.")
        parts = []
        for part in range(num_parts):
            mine = share(len(self.rows["id"]), part, num_parts)
            rows = {name: column[mine.start : mine.stop] for name, column in self.rows.items()}
            parts.append(Shard(rows, tuple(len(share(count, part, num_parts)) for count in self.counts)))
        return parts


class Loader:
    """Random access to the global batches of a data set, of which every rank takes its share.

    The order is a function of (seed, phase, epoch) alone. A last, smaller batch is used like any other.

    Args:
        dataset: the data set, whole on every rank.
        batch_size: rows of the global batch.
        seed: the run's seed.
        phase: the trainer's phase.
        rank: this rank.
        world_size: number of ranks.
        ordered: keeps the data set's own order, as for evaluation.

    Raises:
        ValueError: if ``batch_size`` is less than 1.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        phase: int = 0,
        rank: int = 0,
        world_size: int = 1,
        ordered: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size ({batch_size}) must be at least 1: it counts the rows of all ranks together.")
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        self.dataset, self.batch_size, self.seed, self.phase = dataset, batch_size, seed, phase
        self.rank, self.world_size, self.ordered = rank, world_size, ordered
        self._epoch: int | None = None
        self._order = torch.arange(len(dataset))

    @property
    def num_batches(self) -> int:
        """Global batches of an epoch."""
        return -(-len(self.dataset) // self.batch_size)

    def batch(self, epoch: int, index: int) -> Shard:
        """This rank's share of a global batch.

        Args:
            epoch: the epoch within the phase.
            index: the batch within the epoch, from 0 to ``num_batches`` - 1.

        Raises:
            ValueError: if the seed is not from 0 to 2**64 - 1.
        """
        assert 0 <= index < self.num_batches, f"batch {index} of {self.num_batches}"
        positions = self._positions(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        mine = share(len(positions), self.rank, self.world_size)
        counts = tuple(len(share(len(positions), rank, self.world_size)) for rank in range(self.world_size))
        return Shard(self.dataset.take(positions[mine.start : mine.stop]), counts)

    def _positions(self, epoch: int) -> Tensor:
        if not self.ordered and epoch != self._epoch:
            self._order = permutation(self.seed, self.phase, epoch, len(self.dataset))
            self._epoch = epoch
        return self._order
