"""How rows reach the rank that trains on them: it reads them itself, or they cross the wire.

Positions are places in the data set, ascending. Both readers give the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from mixdist.data import Epoch, Samples
from mixdist.data.loader import share
from mixdist.parallel import costs
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.route import pack, unpack
from mixdist.parallel.wire import Wire
from mixdist.terms import Batch, Spec

T = TypeVar("T")
Delivery = Literal["read", "wire"]
Wanted = Callable[[int], Tensor]
"""Gives the positions that a rank wants, ascending; every rank can tell for every other."""


class Reader(Protocol):
    """Brings rows to ranks."""

    def start(self, wanted: Wanted, fields: Sequence[str], epoch: Epoch | None = None) -> Callable[[], Batch]:
        """Begin to bring this rank the rows it wants; what is given waits for them and is called once, in turn.

        Every rank calls both. Rows are as stored, in ascending order of position, and augmented for an epoch of
        training where one is given.
        """


class OwnReader:
    """Every rank can reach the whole data set and reads what it wants: nothing crosses the wire.

    Args:
        dataset: every rank can reach all of it.
        mesh: this rank's place.
    """

    def __init__(self, dataset: Samples, mesh: Mesh) -> None:
        self.dataset, self.mesh = dataset, mesh

    def start(self, wanted: Wanted, fields: Sequence[str], epoch: Epoch | None = None) -> Callable[[], Batch]:
        rows = self.dataset.start(wanted(self.mesh.rank), epoch, fields)
        return lambda: {name: column.to(self.mesh.device) for name, column in rows().items()}


class WireReader:
    """Each rank reads its contiguous share of the data set, and rows go once to each rank that wants them.

    Since every rank can tell what the others want, nothing but rows and their ids is sent, and a rank reads those of
    its share that somebody wants, each once. A share of a data set in memory is laid out once and kept.

    Args:
        dataset: of which this rank reads its share only.
        mesh: this rank's place.
        wire: the counted collectives.
    """

    def __init__(self, dataset: Samples, mesh: Mesh, wire: Wire) -> None:
        self.dataset, self.mesh, self.wire = dataset, mesh, wire
        self.held = [share(len(dataset), rank, mesh.world_size) for rank in range(mesh.world_size)]
        self.laid_out: dict[tuple[str, ...], Tensor] = {}

    def start(self, wanted: Wanted, fields: Sequence[str], epoch: Epoch | None = None) -> Callable[[], Batch]:
        spec = {name: self.dataset.spec[name] for name in fields}
        own = self.held[self.mesh.rank]
        if self.dataset.in_memory:
            if tuple(fields) not in self.laid_out:
                rows = self.dataset.take(torch.arange(own.start, own.stop), fields=fields)
                self.laid_out = {tuple(fields): pack(rows, spec)}
            packed = self.laid_out[tuple(fields)]
            return lambda: self._exchange(wanted, spec, packed, lambda index: index - own.start)
        asked = [self._within(wanted(rank), self.mesh.rank) for rank in range(self.mesh.world_size)]
        read = torch.cat(asked).unique()
        begun = self.dataset.start(read, epoch, fields)
        return lambda: self._exchange(wanted, spec, pack(begun(), spec), lambda index: torch.searchsorted(read, index))

    def _exchange(self, wanted: Wanted, spec: Spec, packed: Tensor, place: Callable[[Tensor], Tensor]) -> Batch:
        """Send each rank what it wants of this rank's share; ``place`` tells where in ``packed`` positions are."""
        me, world, device = self.mesh.rank, range(self.mesh.world_size), self.mesh.device
        index = wanted(me)
        own = packed.index_select(0, place(self._within(index, me))).to(device)
        if self.mesh.world is None:
            return unpack(own, spec)
        others = [rank for rank in world if rank != me]
        parts = [packed.index_select(0, place(self._within(wanted(rank), me))) for rank in others]
        sizes = iter([part.numel() for part in parts])
        width = costs.row_bytes(spec.values())
        sent = [0 if rank == me else next(sizes) for rank in world]
        received = [0 if rank == me else width * len(self._within(index, rank)) for rank in world]
        self.wire.meter.wire_bytes_min += sum(len(part) for part in parts) * width
        flat = torch.cat([part.reshape(-1) for part in parts]).to(device)
        arrived = list(self.wire.all_to_all(flat, sent, received, self.mesh.world).wait().split(received))
        arrived[me] = own
        return unpack(torch.cat([part.reshape(-1, width) for part in arrived]), spec)

    def _within(self, index: Tensor, rank: int) -> Tensor:
        """The positions that a rank holds."""
        held = self.held[rank]
        first, last = torch.searchsorted(index, torch.tensor([held.start, held.stop])).tolist()
        return index[first:last]


class Brought(NamedTuple):
    """Rows of batches on this rank.

    Args:
        rows: as stored, each once.
        place: tells for a batch the places of this replica's part of it among the rows.
    """

    rows: Batch
    place: Callable[[Tensor], Tensor]


def bring(
    reader: Reader,
    mesh: Mesh,
    batches: Callable[[int], Sequence[Tensor]],
    fields: Sequence[str],
    epoch: Epoch | None = None,
) -> Callable[[], Brought]:
    """Begin to bring each rank the rows of batches of positions, of which every replica takes its part.

    Every rank calls it, and what it gives, which waits for the rows.

    Args:
        reader: brings rows, each once to a rank.
        mesh: this rank's place.
        batches: gives those that are for a member of the EP group; every rank can tell for every member.
        fields: to be brought.
        epoch: of training; None for rows as they are.
    """
    placement = mesh.placement

    def part(batch: Tensor, rank: int) -> Tensor:
        mine = share(len(batch), placement.replica_of(rank), placement.num_replicas)
        return batch[mine.start : mine.stop]

    def wanted(rank: int) -> Tensor:
        parts = [part(batch, rank) for batch in batches(placement.member_of(rank))]
        return torch.cat(parts).unique() if parts else torch.zeros(0, dtype=torch.int64)

    wanted = lru_cache(maxsize=None)(wanted)
    begun, index = reader.start(wanted, fields, epoch), wanted(mesh.rank)
    return lambda: Brought(begun(), lambda batch: torch.searchsorted(index, part(batch, mesh.rank)).to(mesh.device))


def prefetched(starts: Iterable[Callable[[], Callable[[], T]]]) -> Iterator[T]:
    """Wait for things one after another, each begun before the one before it is given away.

    Args:
        starts: each begins something and gives what waits for it.
    """
    begun: Callable[[], T] | None = None
    for start in starts:
        following = start()
        if begun is not None:
            yield begun()
        begun = following
    if begun is not None:
        yield begun()
