"""The reference engine: reduce gradients, clip by ownership, step.

Shape letters: E all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mixdist.engines.copies import Copies, Shards, bring, gradient_dtype, gradients
from mixdist.engines.engine import (
    Engine,
    OptimizerFactory,
    ScheduleFactory,
    Totals,
    check_finite,
    square,
    start_totals,
)
from mixdist.engines.masters import Masters, bfloat16_weights, check_steps_on_cpu
from mixdist.engines.solo import Solo, SoloFactory
from mixdist.engines.state import Slot, check_elementwise, fast_forward, kind, read_optimizer, write_optimizer
from mixdist.parallel.agreement import gather_json
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import Wire
from mixdist.terms import Outcome, Owned, Parts

EMPTY = torch.empty(0)


class Native(Engine):
    """Gradients summed over whoever holds a copy, one optimiser for each module, in one process or many.

    Experts that run as one stack share an optimiser over the stack, which one that works element by element cannot
    tell from theirs; its state is cut into theirs where it is saved.

    A missing gradient counts as zero, so that the optimiser of an expert without rows steps like any other. The first
    six arguments are those of :class:`Engine`.

    Args:
        shard: optimizer: each parameter's optimiser state is on one rank alone, its owner, of those that hold a copy:
            all for what is shared, an expert's replicas for its own. The gradient is summed there, the new value sent
            to the others. Checkpoints are the same files.
        offload: optimizer: optimiser states are in CPU memory, where the optimiser steps.
        bf16_weights: weights of experts' linear and convolutional layers are bfloat16 while steps are taken. The
            optimiser steps float32 masters, which are where its states are; gradients are float32. Experts run under
            bfloat16 autocast, and it is the same run.

    Raises:
        ValueError: shard or offload is something else, the optimiser cannot step in CPU memory, or not a stack, or
            experts cannot have bfloat16 weights.
    """

    def __init__(
        self,
        parts: Parts,
        mesh: Mesh,
        wire: Wire,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory | None = None,
        clip_norm: float | None = None,
        shard: Literal["none", "optimizer"] = "none",
        offload: Literal["none", "optimizer"] = "none",
        bf16_weights: bool = False,
    ) -> None:
        super().__init__(parts, mesh, wire, optimizer, schedule, clip_norm)
        check_options(shard=shard, offload=offload)
        self.weights = bfloat16_weights(parts) if bf16_weights else None
        if parts.stack and any(owned.expert is not None for owned, _ in self.trained):
            check_elementwise(optimizer, "a stack of experts", "set mixture.execution to loop")
        self.shard = shard == "optimizer"
        self.shared, self.own = self._copies()
        owned = [*self.shared.owned, *self.own.owned]
        rounded = set(self.weights.named.values() if self.weights else ())
        copied = owned if offload == "optimizer" else [tensor for tensor in owned if tensor in rounded]
        self.masters = Masters(copied, offload == "optimizer")
        self._stepped = {tensor: tensor for tensor in owned} | self.masters.copies
        self.optimizers = {
            # An optimiser wants something to step; all ranks ask theirs for its rate and kind.
            module.name: optimizer([self._stepped[t] for t in tensors if t in self._stepped] or [nn.Parameter(EMPTY)])
            for module, tensors in self._tensors()
        }
        if offload == "optimizer":
            check_steps_on_cpu(*self.optimizers.values())
        self.schedules = [schedule(o) for o in self.optimizers.values()] if schedule else []
        self._slices = [
            (stacked, slices)
            for name, stacked in parts.stack.items()
            if (slices := [m.get_parameter(name) for m in parts.experts.values()])[0].requires_grad
        ]
        self._gathered: dict[str, dict[str, Tensor]] = {}
        self._clear()

    @classmethod
    def solo(cls, **options: Any) -> SoloFactory:
        """Return what makes the engine of a module that trains by itself: its states have owners, or are offloaded."""
        if cls is not Native:  # what else a subclass does would be passed over
            return super().solo(**options)
        if options.pop("bf16_weights", False):
            raise ValueError(
                "engine.bf16_weights (true) is for experts that train together, and in a competition each trains by "
                "itself: leave it out"
            )
        check_options(**options)
        return partial(Solo, **{name: value == "optimizer" for name, value in options.items()})

    @classmethod
    def can_stack(cls, **options: Any) -> bool:
        return cls.stacks and not options.get("bf16_weights", False)

    def zero_grad(self) -> None:
        """Clear every gradient: the next backward pass puts its own there, without a pass over memory to add them."""
        if self.weights and self.weights.rounded:
            self.weights.check()
        elif self.weights:
            self.masters.fetch_values()
            self.weights.round()
        self._clear()

    def _clear(self) -> None:
        self._gathered = {}
        for _, parameters in self.trained:
            for parameter in parameters:
                parameter.grad = None
        for stacked in self.parts.stack.values():
            stacked.grad = None

    def step(self, outcome: Outcome, step: int) -> Totals:
        self.collect()
        reduced = self.shared.start_reduce()
        self.own.start_reduce()()
        totals, squares = self._totals(outcome, reduced)
        check_finite(totals.outcome, squares, [o.name for o, _ in self.trained if o.expert is None], step)
        if self.clip_norm is not None and totals.grad_norm > self.clip_norm:
            torch._foreach_mul_([g for _, ps in self.trained for g in gradients(ps)], self.clip_norm / totals.grad_norm)
        self.masters.fetch()
        for optimizer in self.optimizers.values():
            optimizer.step()
        self._put()
        for schedule in self.schedules:
            schedule.step()
        return totals

    def fast_forward(self, steps: int) -> None:
        for schedule in self.schedules:
            fast_forward(schedule, steps)

    def kind(self) -> str:
        return next((kind(optimizer) for optimizer in self.optimizers.values()), "none")

    def learning_rate(self) -> float:
        return next((float(o.param_groups[0]["lr"]) for o in self.optimizers.values()), 0.0)

    def _put(self) -> None:
        """Put what was stepped in its place, on every rank that holds a copy."""
        self.masters.put()
        for arrive in [copies.start_spread() for copies in (self.shared, self.own)]:
            arrive()
        if self.weights:
            self.weights.mark()

    def ready(self) -> None:
        if self.weights and self.weights.rounded:
            self.weights.widen()
            self._put()

    def gather(self) -> None:
        self.ready()
        for owned, _ in self.trained if self.shard else ():
            self._gathered[owned.name] = self._bring(owned, self._own_state(owned))

    def _bring(self, owned: Owned, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Bring a module's state together on the rank that writes it."""
        return bring(state, (self.shared if owned.expert is None else self.own).group, self.wire)

    def optimizer_state(self, owned: Owned) -> dict[str, Tensor]:
        """Return the optimiser's state of a module; where it is sharded, as it was when ``gather`` was called."""
        sharded = self.shard and self._optimizer(owned) is not None
        return self._gathered[owned.name] if sharded else self._own_state(owned)

    def load_optimizer_state(self, owned: Owned, state: dict[str, Tensor]) -> None:
        optimizer = self._optimizer(owned)
        if optimizer is not None:
            write_optimizer(optimizer, self._slots(owned), state)

    def close(self) -> None:
        self.ready()
        self._gathered = {}

    def _copies(self) -> tuple[Copies, Copies]:
        """Return what optimisers step of what is shared and of this rank's experts, with who holds copies."""
        shared, own = (
            [t for owned, tensors in self._tensors() if (owned.expert is None) == common for t in tensors]
            for common in (True, False)
        )
        mesh, wire = self.mesh, self.wire
        if not self.shard:
            return Copies(shared, mesh.world, wire), Copies(own, mesh.replica_group, wire)
        shards = self._owners(own)
        # Ranks with small experts, or none to step, take more of what is shared.
        load_P = gather_json(sum(t.numel() * t.element_size() for t in shards.owned), mesh.world)
        return Shards(shared, mesh.world, wire, load_P), shards

    def _owners(self, own: list[Tensor]) -> Copies:
        """Return who steps what of this rank's experts, each once over the replicas."""
        return Shards(own, self.mesh.replica_group, self.wire)

    def _own_state(self, owned: Owned) -> dict[str, Tensor]:
        """Return what this rank has of a module's optimiser state."""
        optimizer = self._optimizer(owned)
        return {} if optimizer is None else read_optimizer(optimizer, self._slots(owned))

    def _tensors(self) -> Iterator[tuple[Owned, list[Tensor]]]:
        """Yield what each optimiser steps: the parameters of a module, or for a stack's first expert those of all."""
        stacked = False
        for owned, parameters in self.trained:
            if owned.expert is None or not self.parts.stack:
                yield owned, list(parameters)
            elif not stacked:
                stacked = True
                yield owned, [self.parts.stack[n] for n, p in owned.module.named_parameters() if p.requires_grad]

    def _optimizer(self, owned: Owned) -> Optimizer | None:
        if owned.expert is not None and self.parts.stack:
            owned = next(other for other in self.parts.owned() if other.expert is not None)
        return self.optimizers.get(owned.name)

    def _slots(self, owned: Owned) -> Iterator[Slot]:
        """Find the tensors here that an optimiser knows a module's parameters by, and their places in them."""
        place = list(self.parts.experts).index(owned.expert) if owned.expert is not None and self.parts.stack else None
        for name, parameter in owned.module.named_parameters():
            tensor = parameter if place is None else self.parts.stack[name]
            if tensor in self._stepped:
                yield Slot(name, self._stepped[tensor], place)

    def collect(self) -> None:
        """Put zeros where no gradient came because no row did, so that every module steps."""
        for stacked, slices in self._slices:
            if stacked.grad is None:
                stacked.grad = torch.zeros_like(stacked)
            for parameter, grad in zip(slices, stacked.grad.unbind(), strict=True):
                parameter.grad = grad
        for _, parameters in self.trained:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter, dtype=gradient_dtype(parameter))

    def _totals(self, outcome: Outcome, reduced: Callable[[], None]) -> tuple[Totals, Tensor]:
        """Return what a step was over all ranks, and squared norms, (E + 1,).

        Args:
            outcome: what it left on this rank.
            reduced: waits for the gradients of what is shared.
        """
        shared = [p for owned, ps in self.trained if owned.expert is None for p in ps]
        if not self.shard:
            # Both reductions over all ranks are under way together; the shared norm is taken where sums arrive.
            finish = start_totals(self.mesh, self.wire, outcome, self._squares())
            reduced()
            return finish(square(gradients(shared), self.mesh.device))
        for stacked, slices in self._slices:
            if stacked.grad is None:  # it went to its owner
                for parameter in slices:
                    parameter.grad = None
        reduced()
        squares = torch.cat([self._squares(), square(gradients(shared), self.mesh.device).reshape(1)])
        coming = self.shared.spread_bytes + self.own.spread_bytes
        return start_totals(self.mesh, self.wire, outcome, squares, coming)(None)

    def _squares(self) -> Tensor:
        """Return the squared norm of each expert as far as this rank counts it, (E,)."""
        squares_E = torch.zeros(self.num_experts, dtype=torch.float64, device=self.mesh.device)
        for owned, parameters in self.trained:
            # What is owned is here alone.
            if owned.expert is not None and (self.shard or self.mesh.speaks_for(owned.expert)):
                squares_E[owned.expert] = square(gradients(parameters), self.mesh.device)
        return squares_E


def check_options(shard: str = "none", offload: str = "none") -> None:
    """Check what is sharded and offloaded.

    Raises:
        ValueError: it is something else than none or optimizer.
    """
    for name, value in (("shard", shard), ("offload", offload)):
        if value not in ("none", "optimizer"):
            raise ValueError(f"engine.{name} ({value}) must be none or optimizer")
