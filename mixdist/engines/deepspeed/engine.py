"""The engine that DeepSpeed stands behind: its reductions, its sharded optimisers; our norm, clipping and checkpoints.

Shape letters: E all experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixdist.engines.deepspeed.library import load, start
from mixdist.engines.deepspeed.partitions import Partitions
from mixdist.engines.deepspeed.whole import Whole
from mixdist.engines.engine import (
    Engine,
    NotFinite,
    OptimizerFactory,
    ScheduleFactory,
    Totals,
    check_finite,
    square,
    start_totals,
)
from mixdist.engines.masters import check_steps_on_cpu
from mixdist.engines.state import check_elementwise, fast_forward, kind
from mixdist.parallel.agreement import agreed, gather_json
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import Wire, together
from mixdist.terms import Outcome, Owned, Parts

NATIVE = "mixdist.engines.Native"


class DeepSpeed(Engine):
    """DeepSpeed's ZeRO 0, 1 and 2 over the placement of the mesh, in float32.

    What is shared is cut over all ranks, an expert over its replicas: an expert without replicas is not cut, and has
    a copy in float32 besides. All else is as with :class:`Native`: dispatch, noise, sums (never means), the clip norm,
    checks of what is not finite, and the files of checkpoints, at which a run may change its engine. DeepSpeed's own
    clipping, checkpoints and schedules are not used.

    Gradients are reduced once a step, after all backward passes, since a mixture may add to one several times: until
    then each rank has whole gradients under ZeRO 2, too. The first six arguments are those of :class:`Engine`; the
    last four bear DeepSpeed's own names.

    Args:
        zero: 0: nothing is cut; 1: states of the optimiser are, 2: and reduced gradients.
        offload: optimizer: optimiser states and master weights are in CPU memory, where the optimiser steps.
        reduce_bucket_size: numbers that are reduced at a time, through a buffer of as many, or of all if these are
            fewer.
        overlap_comm: a bucket is reduced while the next one is filled; needs a second buffer.
        round_robin_gradients: deal parameters out to ranks in turn, where they lie in order else.
        use_multi_rank_bucket_allreduce: reduce a bucket for everybody at once; false: for each rank by itself.
        pin_memory: with offload, in memory that a CUDA device copies from at the full speed of the bus.

    Raises:
        Agreed: DeepSpeed is not installed, or cannot do what is wanted.

    Examples:
        >>> from mixdist.engines import DeepSpeed
        >>> DeepSpeed.stacks  # experts run one after another: their parameters are slices of DeepSpeed's own tensors
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
        zero: int = 1,
        offload: Literal["none", "optimizer"] = "none",
        reduce_bucket_size: int = 500_000_000,
        overlap_comm: bool = False,
        round_robin_gradients: bool = False,
        use_multi_rank_bucket_allreduce: bool = True,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(parts, mesh, wire, optimizer, schedule, clip_norm)
        self.zero, self.offload = zero, offload == "optimizer"

        def ready() -> Any:
            self._check(offload, reduce_bucket_size, pin_memory)
            if zero:
                check_elementwise(optimizer, f"engine.zero ({zero})", "set engine.zero to 0")
            if self.offload:
                check_steps_on_cpu(optimizer([nn.Parameter(torch.zeros(1))]))
            return load(mesh)

        library = agreed(ready, mesh.world)  # what follows calls collectives
        shared = [p for owned, ps in self.trained if owned.expert is None for p in ps]
        own = [p for owned, ps in self.trained if owned.expert is not None for p in ps]
        if not shared and not own:  # an optimiser wants something to step
            own = [nn.Parameter(torch.zeros(1, device=mesh.device))]
        self._all = [*shared, *own]
        most = max(gather_json(sum(p.numel() for p in self._all), mesh.world))
        bucket = min(reduce_bucket_size, most)  # the same everywhere, so that reductions are
        config = {
            "zero_optimization": {
                "stage": zero,
                "reduce_bucket_size": bucket,
                "overlap_comm": overlap_comm,
                "round_robin_gradients": round_robin_gradients,
                "use_multi_rank_bucket_allreduce": use_multi_rank_bucket_allreduce,
                **({"offload_optimizer": {"device": "cpu", "pin_memory": pin_memory}} if self.offload else {}),
            }
        }
        self._marks = [(p, dict(vars(p))) for p in self._all]
        held = [(shared, mesh.world_size), (own, mesh.placement.num_replicas)]
        # Under ZeRO the optimiser is made of the parts that it steps, once these are laid out.
        first = torch.optim.SGD(self._all) if zero else optimizer(self._all)
        with together():
            self._engine = start(library, mesh, first, shared, own, config)
        self.steps = Partitions(self._engine, optimizer, held) if zero else Whole(self._engine, held, bucket)
        self.schedule = schedule(self.steps.optimizer) if schedule else None
        self._gathered: dict[str, dict[str, Tensor]] = {}
        self.zero_grad()

    def _check(self, offload: str, bucket: int, pin_memory: bool) -> None:
        """Check what is wanted.

        Raises:
            ValueError: DeepSpeed cannot do it.
        """
        if self.zero not in (0, 1, 2):
            raise ValueError(
                f"engine.zero ({self.zero}) must be 0, 1 or 2: ZeRO 3 takes no experts but DeepSpeed's own; for "
                f"values that are cut, set engine to mixdist.engines.FSDP"
            )
        if offload not in ("none", "optimizer"):
            raise ValueError(f"engine.offload ({offload}) must be none or optimizer")
        if self.offload and not self.zero:
            raise ValueError(
                f"engine.offload (optimizer) needs engine.zero 1 or 2, and it is 0: set one of them, or take {NATIVE}, "
                f"which offloads whole states, too"
            )
        if pin_memory and not (self.offload and self.mesh.device.type == "cuda"):
            raise ValueError("engine.pin_memory (true) needs engine.offload (optimizer) and CUDA: set it to false")
        if bucket < 1:
            raise ValueError(f"engine.reduce_bucket_size ({bucket}) must be above 0: give the numbers of a bucket")
        for owned, parameters in self.trained:
            for dtype in {p.dtype for p in parameters} - {torch.float32}:
                name = str(dtype).removeprefix("torch.")
                raise ValueError(
                    f"dtype ({name}) of {owned.name} cannot be trained by DeepSpeed, whose master weights are float32: "
                    f"set dtype to float32 (compute.bf16 computes in bfloat16 all the same), or engine to {NATIVE}"
                )

    def zero_grad(self) -> None:
        """Clear every gradient."""
        self._gathered = {}
        for parameter in self._all:
            parameter.grad = None

    def step(self, outcome: Outcome, step: int) -> Totals:
        for parameter in self._all:
            if parameter.grad is None:  # as of an expert without rows
                parameter.grad = torch.zeros_like(parameter)
        with together():
            self.steps.reduce()
        self.wire.meter.sync_bytes += self.steps.reduced_bytes
        gradients = self.steps.gradients()
        totals, squares = start_totals(
            self.mesh, self.wire, outcome, self._squares(gradients), self.steps.spread_bytes
        )(None)
        try:
            check_finite(totals.outcome, squares, [o.name for o, _ in self.trained if o.expert is None], step)
        except NotFinite:
            self.steps.drop()
            raise
        if self.clip_norm is not None and totals.grad_norm > self.clip_norm:
            torch._foreach_mul_(list(gradients.values()), self.clip_norm / totals.grad_norm)
        del gradients
        with together():
            self.steps.step()
        if self.schedule is not None:
            self.schedule.step()
        return totals

    def _squares(self, gradients: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """Return the squared norm of each expert, and of what is shared, as far as this rank counts it, (E + 1,)."""
        squares = torch.zeros(self.num_experts + 1, dtype=torch.float64, device=self.mesh.device)
        for owned, parameters in self.trained:
            if self.steps.sharded or self.mesh.speaks_for(owned.expert):
                place = self.num_experts if owned.expert is None else owned.expert
                squares[place] += square([gradients[p] for p in parameters if p in gradients], squares.device)
        return squares

    def learning_rate(self) -> float:
        return float(self.steps.optimizer.param_groups[0]["lr"])

    def kind(self) -> str:
        return kind(self.steps.optimizer)

    def fast_forward(self, steps: int) -> None:
        if self.schedule is not None:
            fast_forward(self.schedule, steps)

    def gather(self) -> None:
        if isinstance(self.steps, Partitions):
            for owned, _ in self.trained:
                group = self.mesh.world if owned.expert is None else self.mesh.replica_group
                self._gathered[owned.name] = self.steps.gather(_named(owned), group, self.wire)

    def optimizer_state(self, owned: Owned) -> dict[str, Tensor]:
        """Return the optimiser's state of a module; where it is cut, as it was when ``gather`` was called."""
        if isinstance(self.steps, Whole):
            return self.steps.state(_named(owned))
        return self._gathered.get(owned.name, {})

    def load_optimizer_state(self, owned: Owned, state: dict[str, Tensor]) -> None:
        self.steps.load(_named(owned), state)

    def close(self) -> None:
        self._gathered = {}
        self._engine.destroy()
        self.steps.close()
        for parameter, before in self._marks:  # what DeepSpeed hangs on parameters holds all of it
            vars(parameter).clear()
            vars(parameter).update(before)


def _named(owned: Owned) -> dict[str, nn.Parameter]:
    """Return the parameters of a module that learn, by name."""
    return {name: p for name, p in owned.module.named_parameters() if p.requires_grad}
