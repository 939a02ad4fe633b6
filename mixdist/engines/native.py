"""The reference engine: reduce gradients, clip by ownership, step.

Shape letters: E all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from mixdist.engines.engine import (
    Engine,
    OptimizerFactory,
    ScheduleFactory,
    Totals,
    check_finite,
    square,
    start_totals,
)
from mixdist.engines.state import Slot, fast_forward, kind, read_optimizer, write_optimizer
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import Group, Wire
from mixdist.terms import Outcome, Owned, Parts


class Native(Engine):
    """Gradients summed over whoever holds a copy, one optimiser for each module, in one process or many.

    Experts that run as one stack share an optimiser over the stack, which one that works element by element cannot
    tell from theirs; its state is cut into theirs where it is saved.

    A missing gradient counts as zero, so that the optimiser of an expert without rows steps like any other. Arguments
    are those of :class:`Engine`.
    """

    def __init__(
        self,
        parts: Parts,
        mesh: Mesh,
        wire: Wire,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory | None = None,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(parts, mesh, wire, optimizer, schedule, clip_norm)
        self.optimizers = {owned.name: optimizer(tensors) for owned, tensors in self._tensors()}
        self.schedules = [schedule(o) for o in self.optimizers.values()] if schedule else []
        self._slices = [
            (stacked, slices)
            for name, stacked in parts.stack.items()
            if (slices := [m.get_parameter(name) for m in parts.experts.values()])[0].requires_grad
        ]
        self.zero_grad()

    def zero_grad(self) -> None:
        """Clear every gradient: the next backward pass puts its own there, without a pass over memory to add them."""
        for _, parameters in self.trained:
            for parameter in parameters:
                parameter.grad = None
        for stacked in self.parts.stack.values():
            stacked.grad = None

    def step(self, outcome: Outcome, step: int) -> Totals:
        gradients = self.collect()
        shared = [g for owned, grads in gradients if owned.expert is None for g in grads]
        finish = self._start_reduce(shared, self.mesh.world)
        own = [g for owned, grads in gradients if owned.expert is not None for g in grads]
        self._start_reduce(own, self.mesh.replica_group)()
        # Both reductions over all ranks are under way together; what is shared has its norm taken where it arrives.
        finish_totals = start_totals(self.mesh, self.wire, outcome, self._squares(gradients))
        finish()
        totals, squares = finish_totals(square(shared))
        check_finite(totals.outcome, squares, [o.name for o, _ in self.trained if o.expert is None], step)
        if self.clip_norm is not None and totals.grad_norm > self.clip_norm:
            torch._foreach_mul_([g for _, grads in gradients for g in grads], self.clip_norm / totals.grad_norm)
        for optimizer in self.optimizers.values():
            optimizer.step()
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

    def optimizer_state(self, owned: Owned) -> dict[str, Tensor]:
        optimizer = self._optimizer(owned)
        return {} if optimizer is None else read_optimizer(optimizer, self._slots(owned))

    def load_optimizer_state(self, owned: Owned, state: dict[str, Tensor]) -> None:
        optimizer = self._optimizer(owned)
        if optimizer is not None:
            write_optimizer(optimizer, self._slots(owned), state)

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
        """Find the tensors that an optimiser knows a module's parameters by, and their places in them."""
        place = list(self.parts.experts).index(owned.expert) if owned.expert is not None and self.parts.stack else None
        for name, parameter in owned.module.named_parameters():
            yield Slot(name, parameter if place is None else self.parts.stack[name], place)

    def collect(self) -> list[tuple[Owned, list[Tensor]]]:
        """Return the gradients of every module that trains: zeros where no row came, so that it steps all the same."""
        for stacked, slices in self._slices:
            if stacked.grad is None:
                stacked.grad = torch.zeros_like(stacked)
            for parameter, grad in zip(slices, stacked.grad.unbind(), strict=True):
                parameter.grad = grad
        for _, parameters in self.trained:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return [(owned, [p.grad for p in parameters if p.grad is not None]) for owned, parameters in self.trained]

    def _start_reduce(self, grads: list[Tensor], group: Group) -> Callable[[], None]:
        """Start to sum gradients over a group; what is returned puts the sums in their place."""
        if group is None or not grads:
            return lambda: None
        pending = self.wire.start_all_reduce(torch.cat([g.reshape(-1) for g in grads]), group)

        def finish() -> None:
            for grad, reduced in zip(grads, pending.wait().split([g.numel() for g in grads]), strict=True):
                grad.copy_(reduced.view_as(grad))

        return finish

    def _squares(self, gradients: list[tuple[Owned, list[Tensor]]]) -> Tensor:
        """Return the squared norm of each expert that this rank speaks for, (E,)."""
        squares_E = torch.zeros(self.num_experts, dtype=torch.float64, device=self.mesh.device)
        for owned, grads in gradients:
            if owned.expert is not None and self.mesh.speaks_for(owned.expert):
                squares_E[owned.expert] = square(grads)
        return squares_E
