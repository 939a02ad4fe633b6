"""An epoch of experts that train by themselves: batches of each expert's own samples, brought piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

from torch import Tensor

from mixdist.competition.delivery import Brought, Reader, bring, prefetched
from mixdist.data import Epoch, Samples
from mixdist.parallel.mesh import Mesh

PIECE_BYTES = 1 << 28
"""Rows that a rank holds at once while its experts train: an epoch's at most."""


class Piece(NamedTuple):
    """Some batches of every expert, with their rows where they are trained on.

    Args:
        brought: the rows of this rank's experts.
        batches: gives an expert's batches in this piece, positions in the data set.
    """

    brought: Brought
    batches: Callable[[int], Sequence[Tensor]]

    def places(self, e: int) -> list[tuple[Tensor, int]]:
        """For each batch of an expert the places in the rows of this replica's part, and the size of the whole."""
        return [(self.brought.place(batch), len(batch)) for batch in self.batches(e)]


class Pieces:
    """Brings the epochs of experts; every rank has one.

    Args:
        dataset: the samples.
        reader: brings rows.
        mesh: this rank's place.
        fields: that experts read.
    """

    def __init__(self, dataset: Samples, reader: Reader, mesh: Mesh, fields: Sequence[str]) -> None:
        self.dataset, self.reader, self.mesh, self.fields = dataset, reader, mesh, fields
        self.row_bytes = sum(dataset.spec[name].num_bytes for name in fields)

    def of(
        self, epoch: Epoch, homes: Sequence[Sequence[int]], own: Callable[[int], Tensor], batch_size: int
    ) -> Iterator[Piece]:
        """Return an epoch in pieces; every rank goes through them.

        A piece is so many batches of every expert as fit into memory: all of them, mostly. Which those are depends on
        nothing that a rank alone knows.

        Args:
            epoch: names the order, with each expert's number.
            homes: each member's experts.
            own: gives the positions of an expert's samples; every rank can tell for every expert.
            batch_size: of every expert.
        """

        owned = cache(own)

        @cache
        def batches(e: int) -> Sequence[Tensor]:
            if not len(owned(e)):
                return ()
            return self.dataset.ordered(owned(e), replace(epoch, expert=e), batch_size).split(batch_size)

        several = max(1, PIECE_BYTES // (self.row_bytes * batch_size * max(map(len, homes))))
        busiest = max(len(owned(e)) for experts in homes for e in experts)
        num_pieces = max(1, math.ceil(busiest / (several * batch_size)))

        def begin(piece: int) -> Callable[[], Piece]:
            def some(e: int) -> Sequence[Tensor]:
                return batches(e)[piece * several : (piece + 1) * several]

            def wanted(member: int) -> list[Tensor]:
                return [batch for e in homes[member] for batch in some(e)]

            begun = bring(self.reader, self.mesh, wanted, self.fields, epoch)
            return lambda: Piece(begun(), some)

        return prefetched(partial(begin, piece) for piece in range(num_pieces))
