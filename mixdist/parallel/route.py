"""Rows sent between the ranks of an EP group: their origin, the experts that see them, their packing into bytes.

Shape letters: B rows of this rank, R rows received here, E all experts, e experts on this rank, T pairs of a row
and an expert, P ranks of the EP group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mixdist.parallel.costs import ID_BYTES
from mixdist.parallel.wire import Pending
from mixdist.terms import Batch, Spec, places


class Arrivals(NamedTuple):
    """How many rows and pairs a sparse route moves, known on the host before anything is sent.

    Args:
        rows: that arrive here from each member of the EP group, (P,).
        pairs: of these rows and each expert here, from each member, (P, e).
        sent_rows: that this rank sends to each member, (P,).
        sent_pairs: of these rows and each expert of all, (E,).
        seen: rows of this rank that any expert sees.
    """

    rows: list[int]
    pairs: list[list[int]]
    sent_rows: list[int]
    sent_pairs: list[int]
    seen: int

    @staticmethod
    def of_experts(on: Sequence[bool], experts: Sequence[range], counts_P: Sequence[int], me: int) -> Arrivals:
        """Return what arrives where some experts see every row and the others none: no rank has to ask.

        Args:
            on: which experts see rows, (E,).
            experts: of each member.
            counts_P: rows of each member.
            me: this member.
        """
        here, own = [on[e] for e in experts[me]], counts_P[me]
        return Arrivals(
            rows=[n * any(here) for n in counts_P],
            pairs=[[n * one for one in here] for n in counts_P],
            sent_rows=[own * any(on[e] for e in theirs) for theirs in experts],
            sent_pairs=[own * one for one in on],
            seen=own * any(on),
        )


class Pairs(NamedTuple):
    """The rows that this rank sends to one member when not every expert sees every row.

    Args:
        rows: indices of the rows sent, each once.
        row_T: index of the row of each pair.
        expert_T: global number of the expert of each pair.
    """

    rows: Tensor
    row_T: Tensor
    expert_T: Tensor

    @staticmethod
    def of(routed_BE: Tensor, experts: range, num_rows: int, num_pairs: int) -> Pairs:
        """Return the rows that at least one of a member's experts sees, given how many they and their pairs are."""
        here_Be = routed_BE[:, experts.start : experts.stop]
        row_T, expert_T = pairs_of(here_Be, num_pairs)
        return Pairs(places(here_Be.any(1), num_rows), row_T, expert_T + experts.start)


@dataclass
class Route:
    """Rows sent from every rank of an EP group to every other, and the layout for the way back.

    Args:
        counts: how many rows arrive from each member of the EP group.
        spec: the fields sent, "id" first.
        own: this rank's packed rows that stay here.
        pending: the other ranks' packed rows; None in a group of one.
        me: this rank's position in the EP group.
        num_experts: e.
        num_own: B.
        sent: the rows sent to each member; None when every expert sees every row.
        arrivals: how many they are; None likewise.
    """

    counts: Sequence[int]
    spec: Spec
    own: Tensor
    pending: Pending | None
    me: int
    num_experts: int
    num_own: int
    sent: list[Pairs] | None = None
    arrivals: Arrivals | None = None
    _mask_Re: Tensor | None = None
    _pairs: tuple[Tensor, Tensor] | None = None

    @property
    def mask_Re(self) -> Tensor | None:
        """True where an expert here sees a row, once the rows have arrived; None where every expert sees every row."""
        assert self.sent is None or self._mask_Re is not None, "wait for rows() first"
        return self._mask_Re

    @property
    def num_rows(self) -> int:
        """Return R, the number of rows here, with this rank's own."""
        return sum(self.counts)

    def rows(self) -> Batch:
        """Wait for the rows and return them as stored; call it again for the same rows."""
        packed = self.own
        if self.pending is not None:
            width = self.own.shape[1]
            sizes = [0 if p == self.me else n * width for p, n in enumerate(self.counts)]
            arrived = [part.view(-1, width) for part in self.pending.wait().split(sizes)]
            packed = torch.cat([*arrived[: self.me], self.own, *arrived[self.me + 1 :]])
            self.own, self.pending = packed, None
        if self.sent is None:
            return unpack(packed, self.spec)
        data = packed.shape[1] - mask_bytes(self.num_experts)
        self._mask_Re = unpack_mask(packed[:, data:], self.num_experts)
        return unpack(packed[:, :data], self.spec)

    def by_member(self, field: Tensor) -> list[Tensor]:
        """Split a field (R, ...) into each member's rows."""
        return list(field.split(list(self.counts)))

    @property
    def seen_e(self) -> list[int] | None:
        """How many rows each expert here sees; None where every expert sees every row."""
        return None if self.arrivals is None else [sum(column) for column in zip(*self.arrivals.pairs, strict=True)]

    @property
    def num_pairs(self) -> list[int]:
        """How many pairs each member sends here."""
        assert self.arrivals is not None
        return [sum(pairs_e) for pairs_e in self.arrivals.pairs]

    @property
    def here(self) -> tuple[Tensor, Tensor]:
        """Row and expert here of each pair, those of each member together, once the rows have arrived: (T,) each."""
        if self._pairs is None:
            assert self.mask_Re is not None
            self._pairs = pairs_of(self.mask_Re, sum(self.num_pairs))
        return self._pairs

    def pairs(self, field: Tensor) -> list[Tensor]:
        """Return the pairs (T, ...) of a field (R, e, ...), for each member."""
        return list(field[self.here].split(self.num_pairs))


def pairs_of(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return row and column where a mask of rows is True, (count,) each."""
    flat, width = places(mask, count), max(mask.shape[1], 1)
    return flat // width, flat % width


def pack(rows: Batch, spec: Spec) -> Tensor:
    """Return the id and the named fields of each row as bytes, side by side: (B, bytes of a row)."""
    parts = [rows["id"].reshape(-1, 1).view(torch.uint8)]
    for name, field in spec.items():
        stored = rows[name].reshape(len(rows["id"]), field.num_values).contiguous()
        parts.append(stored.view(torch.uint8))
    return torch.cat(parts, dim=1)


def unpack(packed: Tensor, spec: Spec) -> Batch:
    """Return the rows that ``pack`` packed."""
    widths = [ID_BYTES, *(field.num_bytes for field in spec.values())]
    id_bytes, *parts = packed.split(widths, dim=1)
    # A copy, not contiguous(): that keeps a single row at an unaligned address, which cannot be viewed as wide numbers.
    own = torch.contiguous_format
    rows = {"id": id_bytes.clone(memory_format=own).view(torch.int64).reshape(-1)}
    for (name, field), part in zip(spec.items(), parts, strict=True):
        rows[name] = part.clone(memory_format=own).view(field.dtype).reshape(-1, *field.shape)
    return rows


def mask_bytes(num_experts: int) -> int:
    """Return the bytes of a row's mask over a member's experts; a member with one expert needs none."""
    return -(-num_experts // 8) if num_experts > 1 else 0


def pack_mask(mask_Re: Tensor) -> Tensor:
    """Return a mask with eight experts in a byte: (R, bytes)."""
    num_rows, num_experts = mask_Re.shape
    width = mask_bytes(num_experts)
    bits = torch.zeros(num_rows, 8 * width, dtype=torch.uint8, device=mask_Re.device)
    if width:
        bits[:, :num_experts] = mask_Re
    return (bits.view(num_rows, width, 8) << _shifts(mask_Re)).sum(2, dtype=torch.uint8)


def unpack_mask(packed: Tensor, num_experts: int) -> Tensor:
    """Return the mask that ``pack_mask`` packed; a row sent to a member with one expert is for that expert."""
    if num_experts == 1:
        return torch.ones(len(packed), 1, dtype=torch.bool, device=packed.device)
    bits = (packed[:, :, None] >> _shifts(packed)) & 1
    return bits.flatten(1)[:, :num_experts].bool()


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
