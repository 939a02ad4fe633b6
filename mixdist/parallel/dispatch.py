"""Rows to experts and small fields back: the four primitives and the sums over the batch.

Shape letters: B rows of this rank, R rows routed here (those of the whole EP group, in rank order, when dense),
E all experts, e experts on this rank, P ranks of the EP group, W all ranks.

Local losses sum to the global loss, so the adjoint of each primitive is the transpose of what it moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mixdist.parallel import costs
from mixdist.parallel.collectives import OverBatch, Shapes, flatten, move, unflatten
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.route import Arrivals, Pairs, Route, pack, pack_mask
from mixdist.parallel.wire import Pending, Wire
from mixdist.terms import Batch, Spec

Fields = Sequence[str] | Sequence[Sequence[str]]


class Dispatch:
    """The four primitives over one EP group.

    Every rank of a group calls them in the same order, whatever its rows; that is what keeps them from hanging.

    Args:
        mesh: this rank's place.
        wire: the counted collectives.
        spec: the fields of stored rows.
    """

    def __init__(self, mesh: Mesh, wire: Wire, spec: Spec) -> None:
        self.mesh, self.wire, self.spec = mesh, wire, spec
        self.over_batch = OverBatch(mesh, wire)
        placement = mesh.placement
        self.experts = [placement.experts_of(p) for p in range(placement.ep_size)]
        self.num_experts = [len(experts) for experts in self.experts]
        self.members = placement.ep_ranks(mesh.replica)

    def send(self, rows: Batch, fields: Fields, counts: Sequence[int]) -> Route:
        """Start sending the named fields of this rank's rows, as stored, to all experts of the EP group.

        Args:
            rows: B stored rows with "id".
            fields: the fields that experts read: the same for all members of the EP group, or a list a member.
            counts: rows of every rank of the world.
        """
        specs_P = self._specs(fields)
        counts_P = [counts[rank] for rank in self.members]
        packed = {tuple(spec): pack(rows, spec) for spec in specs_P}
        parts = [packed[tuple(spec)] for spec in specs_P]
        pending, me = self._start(parts, counts_P, specs_P), self.mesh.member
        return Route(counts_P, specs_P[me], parts[me], pending, me, self._here, len(rows["id"]))

    def send_some(self, rows: Batch, fields: Fields, routed_BE: Tensor, arrivals: Arrivals) -> Route:
        """Start sending each row once to each member of the EP group that has an expert for it.

        Args:
            rows: B stored rows with "id".
            fields: the fields that experts read: the same for all members of the EP group, or a list a member.
            routed_BE: True where the expert sees the row.
            arrivals: how many rows and pairs go and come, as ``arrivals`` returns.
        """
        specs_P, parts, me = self._specs(fields), [], self.mesh.member
        packed = {tuple(spec): pack(rows, spec) for spec in specs_P}
        sent = [
            Pairs.of(routed_BE, experts, num_rows, sum(arrivals.sent_pairs[experts.start : experts.stop]))
            for experts, num_rows in zip(self.experts, arrivals.sent_rows, strict=True)
        ]
        for pairs, experts, spec in zip(sent, self.experts, specs_P, strict=True):
            mask = routed_BE[pairs.rows, experts.start : experts.stop]
            parts.append(torch.cat([packed[tuple(spec)][pairs.rows], pack_mask(mask)], dim=1))
        pending = self._start(parts, arrivals.rows, specs_P)
        return Route(arrivals.rows, specs_P[me], parts[me], pending, me, self._here, len(rows["id"]), sent, arrivals)

    def send_to(self, rows: Batch, fields: Fields, on: Sequence[bool], counts: Sequence[int]) -> Route:
        """Start sending every row to the experts that are on, and to no other, as ``send`` does to all."""
        arrivals = Arrivals.of_experts(on, self.experts, [counts[rank] for rank in self.members], self.mesh.member)
        ids_B = rows["id"]
        routed_BE = torch.stack([torch.full_like(ids_B, one, dtype=torch.bool) for one in on], dim=1)  # made there
        return self.send_some(rows, fields, routed_BE, arrivals)

    def _specs(self, fields: Fields) -> list[Spec]:
        """Return the fields that go to each member of the EP group."""
        lists = [fields] * len(self.experts) if all(isinstance(name, str) for name in fields) else fields
        assert len(lists) == len(self.experts)
        return [{str(name): self.spec[str(name)] for name in names} for names in lists]

    def arrivals(self, routed: Sequence[Tensor]) -> list[Arrivals]:
        """Tell, for each of some plans (B, E), how many rows and pairs every member of the EP group sends to every one.

        A statistic of the batch that every rank must know before it can receive; counted as sync. It is all that the
        host asks a device for on the way of these rows.
        """
        sent = [
            torch.cat([torch.stack([r[:, e.start : e.stop].any(1).sum() for e in self.experts]), r.sum(0), _seen(r)])
            for r in routed
        ]
        told_WMC = self.over_batch.gather(torch.stack(sent)[None], [1] * self.mesh.world_size).tolist()
        me, size, here = self.mesh.member, len(self.experts), self.experts[self.mesh.member]
        found = []
        for part, own in enumerate(told_WMC[self.mesh.rank]):
            theirs = [told_WMC[rank][part] for rank in self.members]
            pairs = [one[size + here.start : size + here.stop] for one in theirs]
            found.append(Arrivals([one[me] for one in theirs], pairs, own[:size], own[size:-1], own[-1]))
        return found

    def _start(self, parts: Sequence[Tensor], counts: Sequence[int], specs_P: Sequence[Spec]) -> Pending | None:
        """Start moving packed rows: parts[p] to member p, counts[p] rows from it."""
        if self.mesh.ep_group is None:
            return None
        me = self.mesh.member
        widths_P = [costs.row_bytes(spec.values()) for spec in specs_P]
        self.wire.meter.wire_bytes_min += costs.rows([len(part) for part in parts], widths_P, me)
        return self.wire.all_to_all(
            *flatten(parts, me, [(n, parts[me].shape[1]) for n in counts]), group=self.mesh.ep_group
        )

    def combine(self, field: Tensor, route: Route) -> Tensor:
        """Bring the experts' field (R, e, ...) back to the rows' own ranks: (B, E, ...), zero where unseen."""
        if route.sent is not None:
            return self._combine_some(field, route, route.sent)
        if self.mesh.ep_group is None:
            return field
        shapes = [(route.num_own, n, *field.shape[2:]) for n in self.num_experts]
        self._count(field, costs.combine(route.counts, self.num_experts, route.me, field.shape[2:].numel()))
        return torch.cat(self._move(route.by_member(field), shapes), dim=1)

    def _combine_some(self, field: Tensor, route: Route, sent: list[Pairs]) -> Tensor:
        width = field.shape[2:]
        parts = route.pairs(field)
        back = [(len(pairs.row_T), *width) for pairs in sent]
        self._count_pairs(field, parts, back)
        pairs_T = torch.cat(self._move(parts, back))
        row_T, expert_T = (torch.cat([getattr(p, name) for p in sent]) for name in ("row_T", "expert_T"))
        result = field.new_zeros(route.num_own, self.mesh.placement.num_experts, *width)
        return result.index_put((row_T, expert_T), pairs_T)

    def spread(self, field: Tensor, route: Route) -> Tensor:
        """Take a field (B, E, ...) of this rank's rows to the experts: (R, e, ...); the transpose of combine."""
        if route.sent is None and self.mesh.ep_group is None:
            return field
        return self._at_experts(self._move(*self._to_experts(field, route)), field, route)

    def start_spread(self, field: Tensor, route: Route) -> Callable[[], Tensor]:
        """As ``spread``, under way and without a gradient: what is returned waits for the field."""
        field = field.detach()
        if route.sent is None and self.mesh.ep_group is None:
            return lambda: field
        parts, shapes = self._to_experts(field, route)
        if self.mesh.ep_group is None:
            return lambda: self._at_experts(parts, field, route)
        flat, sent, sizes = flatten(parts, route.me, shapes)
        pending = self.wire.all_to_all(flat, sent, sizes, self.mesh.ep_group)

        def finish() -> Tensor:
            return self._at_experts(unflatten(pending.wait(), parts[route.me], route.me, shapes, sizes), field, route)

        return finish

    def _to_experts(self, field: Tensor, route: Route) -> tuple[list[Tensor], list[tuple[int, ...]]]:
        """Split a field by the members it goes to and count it: the parts, and the shapes of what arrives."""
        width = field.shape[2:]
        if route.sent is None:
            self._count(field, costs.spread(route.counts, self.num_experts, route.me, width.numel()))
            return list(field.split(self.num_experts, dim=1)), [(n, self._here, *width) for n in route.counts]
        parts = [field[pairs.row_T, pairs.expert_T] for pairs in route.sent]
        shapes = [(n, *width) for n in route.num_pairs]
        self._count_pairs(field, parts, shapes)
        return parts, shapes

    def _at_experts(self, arrived: list[Tensor], field: Tensor, route: Route) -> Tensor:
        if route.mask_Re is None:
            return torch.cat(arrived)
        result = field.new_zeros(route.num_rows, self._here, *field.shape[2:])
        return result.index_put(route.here, torch.cat(arrived))

    def exchange(self, field: Tensor, route: Route) -> Tensor:
        """Show every expert's field (R, e, ...) to every rank of the EP group: (R, E, ...); dense routing only."""
        assert route.sent is None
        if self.mesh.ep_group is None:
            return field
        shapes = [(route.num_rows, n, *field.shape[2:]) for n in self.num_experts]
        self._count(field, costs.exchange(route.counts, self.num_experts, route.me, field.shape[2:].numel()))
        return torch.cat(self._move([field] * len(shapes), shapes), dim=1)

    def combine_sum(self, field: Tensor, weights: Tensor, route: Route) -> Tensor:
        """Return sum over experts of weights (B, E) times the experts' field (R, e, ...), at the rows' ranks: (B, ...).

        A rank's own experts are summed before anything is sent. Experts that do not see a row add nothing to it.
        """
        local = torch.einsum("re,re...->r...", self.spread(weights, route), field)
        if route.sent is not None:
            parts, shapes = route.by_member(local), [(len(pairs.rows), *local.shape[1:]) for pairs in route.sent]
            received = [len(pairs.rows) for pairs in route.sent]
            self._count(local, costs.pairs(route.counts, received, route.me, local.shape[1:].numel()))
            summed = local.new_zeros(route.num_own, *local.shape[1:])
            for pairs, part in zip(route.sent, self._move(parts, shapes), strict=True):
                summed = summed.index_add(0, pairs.rows, part)
            return summed
        if self.mesh.ep_group is None:
            return local
        shapes = [(route.num_own, *local.shape[1:])] * len(route.counts)
        self._count(local, costs.combine_sum(route.counts, route.me, local.shape[1:].numel()))
        return torch.stack(self._move(route.by_member(local), shapes)).sum(0)

    @property
    def _here(self) -> int:
        return self.num_experts[self.mesh.member]

    def _move(self, parts: Sequence[Tensor], shapes: Shapes) -> list[Tensor]:
        return move(parts, self.mesh.member, shapes, self.wire.all_to_all, self.mesh.ep_group)

    def _count(self, field: Tensor, numbers: costs.Numbers) -> None:
        """Count the minimum bytes of a move: the numbers sent and, where their gradient comes back, those returned."""
        differentiated = field.requires_grad and torch.is_grad_enabled()
        self.wire.meter.wire_bytes_min += numbers.num_bytes(field.element_size(), differentiated)

    def _count_pairs(self, field: Tensor, parts: Sequence[Tensor], shapes: Shapes) -> None:
        sent, received = [len(part) for part in parts], [shape[0] for shape in shapes]
        self._count(field, costs.pairs(sent, received, self.mesh.member, field.shape[2:].numel()))


def _seen(routed_BE: Tensor) -> Tensor:
    """Return how many rows any expert sees, (1,)."""
    return routed_BE.any(1).sum(0, keepdim=True)
