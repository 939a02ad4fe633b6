"""How rows reach the rank that trains on them: it reads them itself, or they cross the wire.

Positions are places in the data set, ascending. Both readers give the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
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
"""Returns the positions that a rank wants, ascending; every rank can compute them for every other."""

PIECE_BYTES = 1 << 28
"""Rows that a rank holds at once while its experts train: an epoch's at most."""


class Reader(Protocol):
    """Brings rows to ranks."""

    def start(self, wanted: Wanted, fields: Sequence[str], epoch: Epoch | None = None) -> Callable[[], Batch]:
        """Start to bring this rank its rows; return a callable that blocks until they are there.

        Every rank calls both, the callable once and in order. Rows are as stored, in ascending order of position, and
        augmented for an epoch of training where one is given.
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
    its share that some rank wants, each once. A share of a data set in memory is laid out once and kept.

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
            if (key := tuple(fields)) not in self.laid_out:
                self.laid_out = {key: pack(self.dataset.take(torch.arange(own.start, own.stop), fields=fields), spec)}
            packed = self.laid_out[key]
            return lambda: self._exchange(wanted, spec, packed, lambda index: index - own.start)
        read = torch.cat([self._within(wanted(rank), self.mesh.rank) for rank in range(self.mesh.world_size)]).unique()
        begun = self.dataset.start(read, epoch, fields)
        return lambda: self._exchange(wanted, spec, pack(begun(), spec), lambda index: torch.searchsorted(read, index))

    def _exchange(self, wanted: Wanted, spec: Spec, packed: Tensor, place: Callable[[Tensor], Tensor]) -> Batch:
        """Send each rank what it wants of this rank's share; ``place`` returns where in ``packed`` positions are."""
        me, world, device = self.mesh.rank, range(self.mesh.world_size), self.mesh.device
        index = wanted(me)
        own = packed.index_select(0, place(self._within(index, me))).to(device)
        if self.mesh.world is None:
            return unpack(own, spec)
        parts = [packed[:0] if r == me else packed.index_select(0, place(self._within(wanted(r), me))) for r in world]
        width = costs.row_bytes(spec.values())
        sent = [part.numel() for part in parts]
        received = [0 if rank == me else width * len(self._within(index, rank)) for rank in world]
        self.wire.meter.wire_bytes_min += sum(len(part) for part in parts) * width
        flat = torch.cat([part.reshape(-1) for part in parts]).to(device)
        arrived = list(self.wire.all_to_all(flat, sent, received, self.mesh.world).wait().split(received))
        arrived[me] = own
        return unpack(torch.cat([part.reshape(-1, width) for part in arrived]), spec)

    def _within(self, index: Tensor, rank: int) -> Tensor:
        """Return those of the positions that a rank holds."""
        held = self.held[rank]
        first, last = torch.searchsorted(index, torch.tensor([held.start, held.stop])).tolist()
        return index[first:last]


class Brought(NamedTuple):
    """Rows of batches on this rank.

    Args:
        rows: as stored, each once.
        place: returns the places of this replica's part of a batch among the rows.
    """

    rows: Batch
    place: Callable[[Tensor], Tensor]

    def places(self, batches: Iterable[Tensor]) -> list[tuple[Tensor, int]]:
        """Return for each batch the places of this replica's part among the rows, and the size of the whole."""
        return [(self.place(batch), len(batch)) for batch in batches]


def bring(
    reader: Reader,
    mesh: Mesh,
    batches: Callable[[int], Sequence[Tensor]],
    fields: Sequence[str],
    epoch: Epoch | None = None,
) -> Callable[[], Brought]:
    """Start to bring each rank the rows of batches of positions, of which every replica takes its part.

    Every rank calls it, and the callable that it returns, which blocks until the rows are there.

    Args:
        reader: brings rows, each once to a rank.
        mesh: this rank's place.
        batches: returns those of a member of the EP group; every rank can compute them for every member.
        fields: to be brought.
        epoch: of training; None for rows as they are.
    """
    placement = mesh.placement

    def part(batch: Tensor, rank: int) -> Tensor:
        mine = share(len(batch), placement.replica_of(rank), placement.num_replicas)
        return batch[mine.start : mine.stop]

    @cache
    def wanted(rank: int) -> Tensor:
        parts = [part(batch, rank) for batch in batches(placement.member_of(rank))]
        return torch.cat(parts).unique() if parts else torch.zeros(0, dtype=torch.int64)

    begun, index = reader.start(wanted, fields, epoch), wanted(mesh.rank)
    return lambda: Brought(begun(), lambda batch: torch.searchsorted(index, part(batch, mesh.rank)).to(mesh.device))


def prefetched(starts: Iterable[Callable[[], Callable[[], T]]]) -> Iterator[T]:
    """Yield results in order, starting each one before the previous is yielded.

    Args:
        starts: each starts something and returns a callable that blocks until its result is there.
    """
    begun: Callable[[], T] | None = None
    for start in starts:
        following = start()
        if begun is not None:
            yield begun()
        begun = following
    if begun is not None:
        yield begun()


def pieces_of_epoch(
    reader: Reader,
    mesh: Mesh,
    dataset: Samples,
    fields: Sequence[str],
    epoch: Epoch,
    homes: Sequence[Sequence[int]],
    own: Callable[[int], Tensor],
    batch_size: int,
) -> Iterator[tuple[Brought, Callable[[int], Sequence[Tensor]]]]:
    """Yield an epoch of experts that train by themselves in pieces; every rank goes through them.

    A piece is as many batches of every expert as fit into memory, mostly all of them: the rows of this rank's experts,
    and a function that returns an expert's batches, positions in the data set. Pieces depend on nothing that a rank
    alone knows.

    Args:
        reader: brings rows.
        mesh: this rank's place.
        dataset: the samples.
        fields: that experts read.
        epoch: names the order, with each expert's number.
        homes: each member's experts.
        own: returns the positions of an expert's samples; every rank can compute them for every expert.
        batch_size: of every expert.
    """

    @cache
    def batches(e: int) -> Sequence[Tensor]:
        mine = own(e)
        return dataset.ordered(mine, replace(epoch, expert=e), batch_size).split(batch_size) if len(mine) else ()

    row_bytes = sum(dataset.spec[name].num_bytes for name in fields)
    several = max(1, PIECE_BYTES // (row_bytes * batch_size * max(map(len, homes))))
    most = max(len(own(e)) for experts in homes for e in experts)

    def begin(first: int) -> Callable[[], tuple[Brought, Callable[[int], Sequence[Tensor]]]]:
        def some(e: int) -> Sequence[Tensor]:
            return batches(e)[first : first + several]

        begun = bring(reader, mesh, lambda member: [b for e in homes[member] for b in some(e)], fields, epoch)
        return lambda: (begun(), some)

    return prefetched(partial(begin, first) for first in range(0, max(1, math.ceil(most / batch_size)), several))
