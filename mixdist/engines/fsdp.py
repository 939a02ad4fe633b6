"""The engine of experts that do not fit a rank: cut over their replicas by torch's ``fully_shard``, FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor

from mixdist.engines.copies import Copies
from mixdist.engines.engine import OptimizerFactory, ScheduleFactory
from mixdist.engines.native import Native
from mixdist.engines.state import Slot, check_elementwise
from mixdist.engines.units import Units
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import Wire
from mixdist.terms import Owned, Parts


class FSDP(Native):
    """Values, gradients and optimiser states of experts cut over their replicas; what is shared as under ``shard``.

    An expert's values come together while it runs, a unit at a time, and gradients go summed to who has their rows
    (:class:`mixdist.engines.units.Units`). The gate and other shared modules are whole on every rank, with one owner of
    each optimiser state, and so are experts that have no replicas or do not learn. The first six arguments are those of
    :class:`Engine`.

    Experts are whole while they are made, loaded, checked, evaluated and saved: a rank's experts must fit it by their
    values, once; gradients, states and what a step needs of them must fit it in parts alone.

    Args:
        offload: optimizer: optimiser states are in CPU memory, where the optimiser steps.
        unit_bytes: an element of an ``nn.Sequential`` with as many bytes of parameters comes together by itself; what
            is left of an expert, at once.

    Raises:
        ValueError: offload is something else, the optimiser cannot step in CPU memory, or the experts cannot be cut.

    Examples:
        >>> from mixdist.engines import FSDP
        >>> FSDP.stacks
        False
    """

    stacks = False

    def __init__(
        self,
        parts: Parts,
        mesh: Mesh,
        wire: Wire,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory | None = None,
        clip_norm: float | None = None,
        offload: Literal["none", "optimizer"] = "none",
        unit_bytes: int = 1 << 20,
    ) -> None:
        if unit_bytes < 1:
            raise ValueError(f"engine.unit_bytes ({unit_bytes}) must be at least 1: give bytes of parameters")
        if mesh.replica_group is not None:
            check_elementwise(optimizer, "the engine FSDP", "take mixdist.engines.Native with mixture.execution loop")
        self.unit_bytes, self.units = unit_bytes, None
        super().__init__(parts, mesh, wire, optimizer, schedule, clip_norm, "optimizer", offload)
        self.rehearses = self.units is not None

    units: Units | None

    def zero_grad(self) -> None:
        """Cut the experts, if they are whole, and clear every gradient."""
        if self.units is not None:
            self.units.cut()
            self.units.zero_grad()
        super().zero_grad()

    def collect(self) -> None:
        if self.units is not None:
            self.units.take()
        super().collect()

    def ready(self) -> None:
        if self.units is not None:
            self.units.join()

    def gather(self) -> None:
        self.ready()
        super().gather()

    def close(self) -> None:
        self.ready()
        super().close()

    def load_optimizer_state(self, owned: Owned, state: dict[str, Tensor]) -> None:
        if self.units is not None and owned.name in self.units.cuts:
            state = self.units.part(owned, state)
        super().load_optimizer_state(owned, state)

    def _owners(self, own: list[Tensor]) -> Copies:
        experts = [owned for owned, _ in self.trained if owned.expert is not None]
        group = self.mesh.replica_group
        if group is None or not experts or self.parts.stack:
            return super()._owners(own)
        if self.parts.micro_batch is not None:
            raise ValueError(
                f"mixture.compute.micro_batch ({self.parts.micro_batch}) has an expert's replicas run it unequally "
                f"often, and the engine FSDP needs them to run it equally often: set it to null, and cut batches by "
                f"train.accumulate"
            )
        self.units = Units(experts, group, self.wire, self.unit_bytes)
        held = {name: list(named.values()) for name, named in self.units.held.items()}
        self.trained = [(owned, held.get(owned.name, parameters)) for owned, parameters in self.trained]
        return self.units

    def _bring(self, owned: Owned, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.units is not None and owned.name in self.units.cuts:
            return self.units.bring(owned, state)
        return super()._bring(owned, state)

    def _slots(self, owned: Owned) -> Iterator[Slot]:
        if self.units is None or owned.name not in self.units.cuts:
            yield from super()._slots(owned)
        else:
            for name, tensor in self.units.held[owned.name].items():
                if tensor in self._stepped:
                    yield Slot(name, self._stepped[tensor])
