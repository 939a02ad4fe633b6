"""The engine of one module that trains by itself: nothing is shared but with its own replicas."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mixdist.engines.engine import NotFinite, OptimizerFactory, ScheduleFactory, trainable
from mixdist.engines.state import Slot, fast_forward, kind, read_optimizer, write_optimizer
from mixdist.parallel.wire import Group, Wire


class Solo:
    """One module with an optimiser, a schedule and a clip norm of its own.

    Every rank of ``group`` holds a copy and adds its rows' part; gradients and losses are summed there in one
    reduction, the only collective of a step.

    Args:
        name: of the module, in messages.
        module: what trains.
        group: the ranks with a copy; None for this one alone.
        wire: the counted collectives.
        optimizer: makes the optimiser.
        schedule: makes a learning-rate schedule, stepped after every epoch; or None.
        clip_norm: largest norm of this module's gradient; or None.

    Raises:
        ValueError: the module has nothing to train.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        group: Group,
        wire: Wire,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory | None = None,
        clip_norm: float | None = None,
    ) -> None:
        self.name, self.module, self.group, self.wire, self.clip_norm = name, module, group, wire, clip_norm
        self.parameters = trainable(module)
        if not self.parameters:
            number, kind = len(list(module.parameters())), type(module).__name__
            raise ValueError(
                f"{name} ({kind}) has {number} parameters, and none requires a gradient, but it is to train: leave "
                f"some free, and make buffers of what stays as it is"
            )
        self.optimizer = optimizer(self.parameters)
        self.schedule = schedule(self.optimizer) if schedule else None
        self.steps = self.epochs = 0

    def zero_grad(self) -> None:
        """Clear the gradient."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, loss: Tensor) -> float:
        """Reduce, check, clip and step; return the loss of the whole batch.

        Args:
            loss: this rank's part of the batch's loss, without a gradient.

        Raises:
            NotFinite: the loss or the gradient is not finite; no parameter was changed. Every replica raises it.
        """
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        loss = loss.detach().reshape(1)
        if self.group is not None:
            flat = torch.cat([loss.to(grads[0].dtype), *(g.reshape(-1) for g in grads)])
            self.wire.all_reduce(flat, self.group)
            loss, *parts = flat.split([1, *(g.numel() for g in grads)])
            grads = [part.view_as(g) for part, g in zip(parts, grads, strict=True)]
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad
        told = torch.stack([loss[0], *torch._foreach_norm(grads)])
        if self.clip_norm is not None:
            told = torch.cat([told.double(), told[1:].double().norm().reshape(1)])
        loss_now, *finite = told.tolist()  # the one read of a step
        if not all(map(math.isfinite, (loss_now, *finite))):
            what = "gradient" if math.isfinite(loss_now) else "loss"
            raise NotFinite(
                f"the {what} of {self.name} is not finite in its step {self.steps + 1}: no parameter of it was "
                f"changed; lower the learning rate, set clip_norm, or look at its rows"
            )
        if self.clip_norm is not None and finite[-1] > self.clip_norm:
            torch._foreach_mul_(grads, self.clip_norm / finite[-1])
        self.optimizer.step()
        self.steps += 1
        return float(loss_now)

    def end_epoch(self) -> None:
        """Step the schedule: by epochs, so that modules with few and many samples are in step."""
        if self.schedule is not None:
            fast_forward(self.schedule, 1)  # also where a module without samples took no step, of which torch warns
        self.epochs += 1

    def go_to(self, steps: int, epochs: int = 0) -> None:
        """Set how many steps and epochs were done before, in a run that is resumed or on another rank."""
        if self.schedule is not None:
            fast_forward(self.schedule, epochs - self.epochs)
        self.steps, self.epochs = steps, epochs

    def kind(self) -> str:
        """Name the optimiser as far as its state depends on it."""
        return kind(self.optimizer)

    def state(self) -> dict[str, Tensor]:
        """Return the optimiser's state: "<parameter>.<key>" to tensor."""
        return read_optimizer(self.optimizer, self._slots())

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put back what ``state`` returned."""
        write_optimizer(self.optimizer, self._slots(), state)

    def _slots(self) -> Iterator[Slot]:
        for name, parameter in self.module.named_parameters():
            yield Slot(name, parameter)
