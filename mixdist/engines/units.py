"""Experts whose parameters are cut over their replicas: torch's ``fully_shard``, FSDP2.

It is stage 3 of ZeRO (Rajbhandari et al. 2020, section 5.3) within the replicas of one expert: values, gradients and
optimiser states of a parameter are cut by its rows, and a unit's values are brought together while it runs.

Shape letters: P members of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixdist.engines.apart import take_apart
from mixdist.engines.copies import Copies, Shards, bring
from mixdist.engines.sharding import cuttable, shard, units
from mixdist.parallel.costs import part_rows
from mixdist.parallel.wire import Wire
from mixdist.terms import Owned


@dataclass(frozen=True)
class Cut:
    """A parameter that is cut by its rows.

    Args:
        whole: as the module has it between phases; its memory is free while the module is cut.
        sizes_P: how many rows each member has.
        piece: this member's rows, which are stepped here; a part of ``whole``, or of what FSDP2 holds.
    """

    whole: nn.Parameter
    sizes_P: list[int]
    piece: nn.Parameter


class Units(Copies):
    """Experts that are cut over their replicas while they train, and whole before, between and after.

    ``cut`` and ``join`` go from one to the other; whole modules are as they were, without a hook, so that whatever
    happens between steps (checks, evaluations, saves) is a matter of this rank alone. Gradients come summed to the
    members that have the rows; a parameter without rows or numbers stays whole, with one owner as in :class:`Shards`.

    Args:
        experts: that learn, the same on every rank of the group.
        group: the replicas.
        wire: the counted collectives.
        unit_bytes: an element of an ``nn.Sequential`` with as many bytes of parameters is brought together by itself.

    Raises:
        ValueError: what ``fully_shard`` cannot do.
    """

    def __init__(self, experts: Sequence[Owned], group: dist.ProcessGroup, wire: Wire, unit_bytes: int) -> None:
        check(experts)
        self.experts, self.unit_bytes, self.is_cut = list(experts), unit_bytes, False
        self.me, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.cuts = {o.name: self._cuts(o.module) for o in experts}
        named = {o.name: dict(o.module.named_parameters()) for o in experts}
        self.held = {
            name: {n: cuts[n].piece if n in cuts else p for n, p in named[name].items() if p.requires_grad}
            for name, cuts in self.cuts.items()
        }
        # By name and not by numbers: a piece may have none where a parameter has fewer rows than there are members.
        held = [(n in self.cuts[name], p) for name, ps in self.held.items() for n, p in ps.items()]
        pieces, few = ([p for is_cut, p in held if is_cut is wanted] for wanted in (True, False))
        self.few = Shards(few, group, wire)
        super().__init__([*pieces, *self.few.owned], group, wire)
        self._undo: list[Callable[[], None]] = []
        self._sharded: dict[nn.Parameter, Any] = {}

    @property
    def spread_bytes(self) -> int:
        return self.few.spread_bytes

    def start_reduce(self) -> Callable[[], None]:
        """Take the sums that the backward passes left; start to sum what is not cut."""
        return self.few.start_reduce()

    def start_spread(self) -> Callable[[], None]:
        return self.few.start_spread()

    def zero_grad(self) -> None:
        """Forget the gradients of pieces."""
        for piece, sharded in self._sharded.items():
            piece.grad = sharded.grad = None

    def take(self) -> None:
        """Give each piece the gradient that backward passes left, already summed over the replicas."""
        for piece, sharded in self._sharded.items():
            if sharded.grad is not None:
                piece.grad = sharded.grad.to_local()

    def cut(self) -> None:
        """Free all but this member's rows, and let units come together as they run; every member calls it."""
        if self.is_cut:
            return
        from torch.distributed.device_mesh import DeviceMesh

        assert self.group is not None
        mesh = DeviceMesh.from_group(self.group, self.wire.device.type)
        for owned in self.experts:
            cuts, module = self.cuts[owned.name], owned.module
            alone = {p for unit in units(module, self.unit_bytes) for p in unit.parameters()}
            self._undo.append(shard(module, self.unit_bytes, mesh, self.group, self.wire))
            sharded = dict(module.named_parameters())
            for name, cut in cuts.items():
                cut.piece.data = sharded[name].to_local().detach()  # type: ignore[attr-defined]
                self._sharded[cut.piece] = sharded[name]
                cut.whole.untyped_storage().resize_(0)
                said = self._apart(f"parameter {name} of {owned.name}", cut.whole in alone)
                self._undo += [take_apart(sharded[name], said), take_apart(cut.whole, said)]
        self.is_cut = True

    @torch.no_grad()
    def join(self) -> None:
        """Make the modules whole, as they were before; every member calls it."""
        if not self.is_cut:
            return
        for undo in self._undo:
            undo()
        for cuts in self.cuts.values():
            for cut in cuts.values():
                whole = cut.whole
                whole.untyped_storage().resize_(whole.numel() * whole.element_size())
                parts = whole.split(cut.sizes_P)
                parts[self.me].copy_(cut.piece)
                self._fill(parts)
                cut.piece.data = parts[self.me]
        self._undo, self._sharded, self.is_cut = [], {}, False

    def bring(self, owned: Owned, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring a module's states together on the first member, in CPU memory; every member calls it.

        Args:
            owned: the expert.
            state: "<parameter>.<key>" to what this member has of it.
        """
        named = {f"{name}@{self.me}": tensor for name, tensor in state.items()}
        found, whole = bring(named, self.group, self.wire), {}
        for name in dict.fromkeys(key.rpartition("@")[0] for key in found):
            parts = [part for p in range(self.size) if (part := found.get(f"{name}@{p}")) is not None]
            cut = self.cuts[owned.name].get(name.rpartition(".")[0])
            whole[name] = torch.cat(parts) if cut is not None and parts[0].dim() else parts[0]
        return whole

    def part(self, owned: Owned, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this member's part of a module's states, given whole ones."""
        part = {}
        for name, value in state.items():
            cut = self.cuts[owned.name].get(name.rpartition(".")[0])
            part[name] = value.split(cut.sizes_P)[self.me] if cut is not None and value.dim() else value
        return part

    def _apart(self, what: str, alone: bool) -> str:
        """Return what is said where a parameter's values are read and are not together."""
        where = "an expert's together while it, or a public method of it or its parts, is called with tensors"
        remedy = "read it there, as an attribute of its module"
        if alone:
            where = "those of a large element of an nn.Sequential together while that is called"
            remedy = f"call that, or raise engine.unit_bytes ({self.unit_bytes})"
        return (
            f"{what} is read where its values are not together: the engine FSDP brings {where}; {remedy}, or take "
            f"mixdist.engines.Native with shard: optimizer"
        )

    def _fill(self, parts: Sequence[Tensor]) -> None:
        """Send this member's part to the others, and write theirs."""
        mine = parts[self.me]
        others = [part for p, part in enumerate(parts) if p != self.me]
        sent_P = [0 if p == self.me else mine.numel() for p in range(self.size)]
        received_P = [0 if p == self.me else part.numel() for p, part in enumerate(parts)]
        flat = mine.reshape(-1).repeat(self.size - 1)
        arrived = self.wire.all_gather(flat, sent_P, received_P, self.group).wait()
        for part, numbers in zip(others, arrived.split([part.numel() for part in others]), strict=True):
            part.copy_(numbers.view_as(part))

    def _cuts(self, module: nn.Module) -> dict[str, Cut]:
        cuts = {}
        for name, whole in module.named_parameters():
            if cuttable(whole):
                sizes_P = [part_rows(len(whole), self.size, p) for p in range(self.size)]
                rows = whole.detach().split(sizes_P)[self.me]
                cuts[name] = Cut(whole, sizes_P, nn.Parameter(rows, requires_grad=whole.requires_grad))
        return cuts


def check(experts: Sequence[Owned]) -> None:
    """Check that ``fully_shard`` can cut experts.

    Raises:
        ValueError: it cannot, or this torch has no collectives of one's own for it.
    """
    from torch.distributed.fsdp import FSDPModule

    needed = ("set_custom_all_gather", "set_custom_reduce_scatter", "set_force_sum_reduction_for_comms")
    lacking = [name for name in needed if not hasattr(FSDPModule, name)]
    if lacking:
        raise ValueError(
            f"the engine FSDP needs {lacking[0]} of torch's FSDPModule, and torch {torch.__version__} has none: "
            f"install torch 2.13, or take mixdist.engines.Native"
        )
    for owned in experts:
        for name, parameter in owned.module.named_parameters():
            if not parameter.is_contiguous():
                raise ValueError(
                    f"the engine FSDP cuts parameters that are contiguous, and {name} of {owned.name} is not: set "
                    f"mixture.compute.channels_last to false"
                )
