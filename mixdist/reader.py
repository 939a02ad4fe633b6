"""How rows reach the rank that trains on them: it reads them itself, or they cross the wire.

Positions are places in the data set, ascending. Both readers give the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from mixdist.data import Dataset
from mixdist.data.loader import share
from mixdist.mesh import Mesh
from mixdist.route import ID_BYTES, pack, unpack
from mixdist.terms import Batch
from mixdist.wire import Wire

Delivery = Literal["read", "wire"]
Wanted = Callable[[int], Tensor]
"""Gives the positions that a rank wants, ascending; every rank can tell for every other."""


class Reader(Protocol):
    """Brings rows to ranks."""

    def fetch(self, wanted: Wanted, fields: Sequence[str]) -> Batch:
        """Give this rank the rows it wants, as stored, in ascending order of position; every rank calls it."""


class OwnReader:
    """Every rank can reach the whole data set and reads what it wants: nothing crosses the wire.

    Args:
        dataset: whole on every rank.
        mesh: this rank's place.
    """

    def __init__(self, dataset: Dataset, mesh: Mesh) -> None:
        self.dataset, self.mesh = dataset, mesh

    def fetch(self, wanted: Wanted, fields: Sequence[str]) -> Batch:
        index = wanted(self.mesh.rank)
        rows = self.dataset.rows
        return {name: rows[name].index_select(0, index).to(self.mesh.device) for name in ("id", *fields)}


class WireReader:
    """Each rank reads its contiguous share of the data set, and rows go once to each rank that wants them.

    Since every rank can tell what the others want, nothing but rows and their ids is sent.

    Args:
        dataset: of which this rank reads its share only.
        mesh: this rank's place.
        wire: the counted collectives.
    """

    def __init__(self, dataset: Dataset, mesh: Mesh, wire: Wire) -> None:
        self.mesh, self.wire, self.spec = mesh, wire, dataset.spec
        self.held = [share(len(dataset), rank, mesh.world_size) for rank in range(mesh.world_size)]
        mine = self.held[mesh.rank]
        self.rows = dataset.take(torch.arange(mine.start, mine.stop))
        self.laid_out: dict[tuple[str, ...], Tensor] = {}

    def fetch(self, wanted: Wanted, fields: Sequence[str]) -> Batch:
        spec = {name: self.spec[name] for name in fields}
        me, world, device = self.mesh.rank, range(self.mesh.world_size), self.mesh.device
        index, packed = wanted(me), self._packed(tuple(fields))
        own = packed.index_select(0, self._within(index, me) - self.held[me].start).to(device)
        if self.mesh.world is None:
            return unpack(own, spec)
        first, others = self.held[me].start, [rank for rank in world if rank != me]
        parts = [packed.index_select(0, self._within(wanted(rank), me) - first) for rank in others]
        sizes = iter([part.numel() for part in parts])
        width = ID_BYTES + sum(field.num_bytes for field in spec.values())
        sent = [0 if rank == me else next(sizes) for rank in world]
        received = [0 if rank == me else width * len(self._within(index, rank)) for rank in world]
        self.wire.meter.wire_bytes_least += sum(len(part) for part in parts) * width
        flat = torch.cat([part.reshape(-1) for part in parts]).to(device)
        arrived = list(self.wire.all_to_all(flat, sent, received, self.mesh.world).wait().split(received))
        arrived[me] = own
        return unpack(torch.cat([part.reshape(-1, width) for part in arrived]), spec)

    def _packed(self, fields: tuple[str, ...]) -> Tensor:
        """This rank's share, laid out once for the fields that travel."""
        if fields not in self.laid_out:
            rows = {name: self.rows[name] for name in ("id", *fields)}
            self.laid_out = {fields: pack(rows, {name: self.spec[name] for name in fields})}
        return self.laid_out[fields]

    def _within(self, index: Tensor, rank: int) -> Tensor:
        """The positions that a rank holds."""
        held = self.held[rank]
        first, last = torch.searchsorted(index, torch.tensor([held.start, held.stop])).tolist()
        return index[first:last]


def bring(
    reader: Reader, mesh: Mesh, batches: Callable[[int], Sequence[Tensor]], fields: Sequence[str]
) -> tuple[Batch, Callable[[Tensor], Tensor]]:
    """Bring each rank the rows of batches of positions, of which every replica takes its part; every rank calls it.

    Args:
        reader: brings rows, each once to a rank.
        mesh: this rank's place.
        batches: gives those that are for a member of the EP group; every rank can tell for every member.
        fields: to be brought.

    Returns:
        this rank's rows, and what tells for a batch the places of this replica's part among them.
    """
    placement = mesh.placement

    def part(batch: Tensor, rank: int) -> Tensor:
        mine = share(len(batch), placement.replica_of(rank), placement.num_replicas)
        return batch[mine.start : mine.stop]

    def wanted(rank: int) -> Tensor:
        parts = [part(batch, rank) for batch in batches(placement.member_of(rank))]
        return torch.cat(parts).unique() if parts else torch.zeros(0, dtype=torch.int64)

    wanted = lru_cache(maxsize=None)(wanted)
    rows, index = reader.fetch(wanted, fields), wanted(mesh.rank)
    return rows, lambda batch: torch.searchsorted(index, part(batch, mesh.rank)).to(mesh.device)
