"""The rows that a rank reads for a global batch: pure arithmetic, no communication."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mixdist.data.dataset import Samples
from mixdist.data.order import Epoch, digest
from mixdist.terms import Batch


def share(count: int, rank: int, world: int) -> range:
    """Return the positions from 0 to count - 1 that belong to a rank: contiguous; the first ranks may have one more.

    Args:
        count: number of positions.
        rank: from 0 to world - 1.
        world: number of ranks.
    """
    assert count >= 0, f"share({count}, {rank}, {world})"
    assert 0 <= rank < world, f"share({count}, {rank}, {world})"
    least, extra = divmod(count, world)
    start = rank * least + min(rank, extra)
    return range(start, start + least + (rank < extra))


@dataclass(frozen=True, eq=False)
class RankBatch:
    """This rank's rows of one global batch.

    Args:
        rows: the rows that this rank loads, possibly none.
        counts: number of rows that each rank of the world loads.

    Examples:
        >>> import torch
        >>> from mixdist.data import RankBatch
        >>> batch = RankBatch({"id": torch.arange(3)}, counts=(3, 2))
        >>> batch.size, batch.total
        (3, 5)
        >>> [part.counts for part in batch.split(2)]
        [(2, 1), (1, 1)]
    """

    rows: Batch
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.rows["id"]) in self.counts, f"{len(self.rows['id'])} rows against counts {self.counts}"

    @property
    def size(self) -> int:
        """Return the number of rows that this rank loads."""
        return len(self.rows["id"])

    @property
    def total(self) -> int:
        """Return the number of rows of the global batch."""
        return sum(self.counts)

    def to(self, device: torch.device) -> RankBatch:
        """Return the same rows on a device."""
        return RankBatch(
            {name: column.to(device, non_blocking=True) for name, column in self.rows.items()}, self.counts
        )

    def split(self, num_parts: int) -> list[RankBatch]:
        """Split every rank's rows into exactly ``num_parts`` parts, so that all ranks agree on each part's counts.

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
            parts.append(RankBatch(rows, tuple(len(share(count, part, num_parts)) for count in self.counts)))
        return parts


class Loader:
    """Random access to the global batches of a data set, of which every rank loads its share.

    The order is a function of (seed, phase, epoch) alone, independent of ranks and workers. A last, smaller batch is
    used like any other. If samples are not in memory, the batches that follow are started in advance.

    Args:
        dataset: the data set; every rank can reach all of it.
        batch_size: rows of the global batch.
        seed: the run's seed.
        phase: the trainer's phase.
        rank: this rank.
        world_size: number of ranks.
        ordered: keep the data set's own order and leave out augmentation, as for evaluation.
        epochs: number of epochs; no batch is started beyond them.
        pin: put rows into pinned memory, from which a CUDA device copies while it computes.

    Raises:
        ValueError: if ``batch_size`` is less than 1.

    Examples:
        Two ranks read the two halves of the batch that one process reads:

        >>> from mixdist.data import Blobs, Loader
        >>> train = Blobs(rows=100).load().train
        >>> whole = Loader(train, batch_size=8, seed=0).batch(epoch=0, index=0)
        >>> halves = [Loader(train, 8, seed=0, rank=rank, world_size=2).batch(0, 0) for rank in (0, 1)]
        >>> [half.counts for half in halves]
        [(4, 4), (4, 4)]
        >>> sum((half.rows["id"].tolist() for half in halves), []) == whole.rows["id"].tolist()
        True
    """

    def __init__(
        self,
        dataset: Samples,
        batch_size: int,
        seed: int,
        phase: int = 0,
        rank: int = 0,
        world_size: int = 1,
        ordered: bool = False,
        epochs: int = 1,
        pin: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size ({batch_size}) must be at least 1: it counts the rows of all ranks together.")
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        self.dataset, self.batch_size, self.seed, self.phase = dataset, batch_size, seed, phase
        self.rank, self.world_size, self.ordered = rank, world_size, ordered
        self.epochs, self.pin = epochs, pin
        self._all = torch.arange(len(dataset))
        self._orders: dict[int, Tensor] = {}
        self._started: dict[tuple[int, int], Callable[[], Batch]] = {}

    @property
    def num_batches(self) -> int:
        """Return the number of global batches of an epoch."""
        return -(-len(self.dataset) // self.batch_size)

    def batch(self, epoch: int, index: int) -> RankBatch:
        """Return this rank's share of a global batch.

        Args:
            epoch: the epoch within the phase.
            index: the batch within the epoch, from 0 to ``num_batches`` - 1.

        Raises:
            ValueError: if the seed is not from 0 to 2**64 - 1, or a sample cannot be read.
        """
        assert 0 <= index < self.num_batches, f"batch {index} of {self.num_batches}"
        number = epoch * self.num_batches + index
        wanted = [divmod(n, self.num_batches) for n in range(number, number + 1 + self.dataset.ahead)]
        wanted = wanted[:1] + [place for place in wanted[1:] if place[0] < self.epochs]
        self._started = {place: self._started.get(place) or self._start(*place) for place in wanted}
        rows = self._started.pop((epoch, index))()
        if self.pin:
            rows = {name: column.pin_memory() for name, column in rows.items()}
        positions = self._positions(epoch, index)
        return RankBatch(rows, tuple(len(share(len(positions), r, self.world_size)) for r in range(self.world_size)))

    def ids(self, epoch: int, index: int) -> Tensor:
        """Return the ids of this rank's share of a global batch."""
        positions = self._positions(epoch, index)
        mine = share(len(positions), self.rank, self.world_size)
        return self.dataset.ids[positions[mine.start : mine.stop]]

    def order_digest(self, epoch: int) -> str:
        """Return the digest of the ids in an epoch's order."""
        return digest(self.dataset.ids[self._order(epoch)])

    def _start(self, epoch: int, index: int) -> Callable[[], Batch]:
        positions = self._positions(epoch, index)
        mine = share(len(positions), self.rank, self.world_size)
        at = None if self.ordered else Epoch(self.seed, self.phase, epoch)
        return self.dataset.start(positions[mine.start : mine.stop], at)

    def _positions(self, epoch: int, index: int) -> Tensor:
        """Return the positions of a global batch."""
        return self._order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]

    def _order(self, epoch: int) -> Tensor:
        """Return all positions in the order of an epoch; those of this one and the one before are kept."""
        if self.ordered:
            return self._all
        if epoch not in self._orders:
            before = {e: kept for e, kept in self._orders.items() if e == epoch - 1}
            order = self.dataset.ordered(self._all, Epoch(self.seed, self.phase, epoch), self.batch_size)
            self._orders = {**before, epoch: order}
        return self._orders[epoch]
