"""The engine of one module that trains by itself: nothing is shared but with its own replicas."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from mixdist.engines.copies import Copies, Shards, bring, gradients
from mixdist.engines.engine import (
    Engine,
    EngineFactory,
    NotFinite,
    OptimizerFactory,
    ScheduleFactory,
    square,
    trainable,
)
from mixdist.engines.masters import Masters, check_steps_on_cpu
from mixdist.engines.state import Slot, fast_forward, kind, read_optimizer, write_optimizer
from mixdist.parallel.wire import Group, Wire


class Solo:
    """One module with an optimiser, a schedule and a clip norm of its own.

    Every rank of ``group`` holds a copy and adds its rows' part; gradients and losses are summed there in one
    reduction, the only collective of a step. With ``shard`` there are three: gradients go to their owners, the loss and
    the squared norm are summed, new values go to all.

    Args:
        name: of the module, in messages.
        module: what trains.
        group: the ranks with a copy; None for this one alone.
        wire: the counted collectives.
        optimizer: makes the optimiser.
        schedule: makes a learning-rate schedule, stepped after every epoch; or None.
        clip_norm: largest norm of this module's gradient; or None.
        turn: the rank of the group that owns the largest parameter with ``shard``, modulo its size: modules with other
            numbers begin elsewhere, so that owners are even over several.
        shard: each parameter's optimiser state is on one rank of the group alone, which steps it. Without a group
            there is nothing to share out.
        offload: optimiser states are in CPU memory, where the optimiser steps.

    Raises:
        ValueError: the module has nothing to train, or the optimiser cannot step in CPU memory.
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
        turn: int = 0,
        shard: bool = False,
        offload: bool = False,
    ) -> None:
        self.name, self.module, self.group, self.wire, self.clip_norm = name, module, group, wire, clip_norm
        self.parameters = trainable(module)
        if not self.parameters:
            number, kind = len(list(module.parameters())), type(module).__name__
            raise ValueError(
                f"{name} ({kind}) has {number} parameters, and none requires a gradient, but it is to train: leave "
                f"some free, and make buffers of what stays as it is"
            )
        self.sharded = shard and group is not None
        shards = partial(Shards, turn=turn)
        self.copies = (shards if self.sharded else Copies)(self.parameters, group, wire)
        self.masters = Masters(self.copies.owned if offload else (), offload)
        self._stepped = {tensor: tensor for tensor in self.copies.owned} | self.masters.copies
        # An optimiser wants something to step, also on a rank that owns nothing.
        self.optimizer = optimizer(list(self._stepped.values()) or [nn.Parameter(torch.empty(0))])
        if offload:
            check_steps_on_cpu(self.optimizer)
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
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        loss = loss.detach().reshape(1)
        told = self._owned_sums(loss) if self.sharded else self._sums(loss)
        loss_now, *finite = told.tolist()  # the one read of a step
        if not all(map(math.isfinite, (loss_now, *finite))):
            what = "gradient" if math.isfinite(loss_now) else "loss"
            raise NotFinite(
                f"the {what} of {self.name} is not finite in its step {self.steps + 1}: no parameter of it was "
                f"changed; lower the learning rate, set clip_norm, or look at its rows"
            )
        grads = gradients(self.copies.owned)
        if grads and self.clip_norm is not None and finite[-1] > self.clip_norm:
            torch._foreach_mul_(grads, self.clip_norm / finite[-1])
        self.masters.fetch()
        self.optimizer.step()
        self.masters.put()
        self.copies.start_spread()()
        self.steps += 1
        return float(loss_now)

    def _sums(self, loss: Tensor) -> Tensor:
        """Sum the gradient everywhere; return the loss, norms of parameters and, to clip, the norm of all."""
        grads = gradients(self.parameters)
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
        return told

    def _owned_sums(self, loss: Tensor) -> Tensor:
        """Sum each gradient at its owner, where alone it stays; return the loss and the norm of all, float64."""
        self.copies.start_reduce()()
        squared = square(gradients(self.copies.owned), loss.device)
        sums = self.wire.all_reduce(torch.cat([loss.double(), squared.reshape(1)]), self.group)
        # As precise as without owners: so the loss of two replicas is the same number.
        return torch.cat([sums[:1].to(self.parameters[0].dtype).double(), sums[1:].sqrt()])

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
        """Return what this rank has of the optimiser's state: "<parameter>.<key>" to tensor."""
        return read_optimizer(self.optimizer, self._slots())

    def whole_state(self) -> dict[str, Tensor]:
        """Return the optimiser's state, where it is sharded on the group's first rank alone; every replica calls it."""
        return bring(self.state(), self.group, self.wire) if self.sharded else self.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put back what ``state`` or ``whole_state`` returned, as far as this rank steps it."""
        write_optimizer(self.optimizer, self._slots(), state)

    def _slots(self) -> Iterator[Slot]:
        for name, parameter in self.module.named_parameters():
            if parameter in self._stepped:
                yield Slot(name, self._stepped[parameter])


SoloFactory = Callable[..., Solo]
"""Makes a ``Solo`` of its arguments, but for ``shard`` and ``offload``."""


def solo_of(factory: EngineFactory | None) -> SoloFactory:
    """Return what makes engines of modules that train by themselves, with the options of a factory of engines.

    Args:
        factory: a class of engines, or a ``functools.partial`` of one, as a config gives it; None for ``Native``.

    Raises:
        ValueError: that kind of engine cannot do it, or the factory is something else.

    Examples:
        >>> from functools import partial
        >>> from mixdist.engines import Native
        >>> from mixdist.engines.solo import solo_of
        >>> solo_of(partial(Native, shard="optimizer")).keywords
        {'shard': True}
    """
    if factory is None:
        return Solo
    made = [factory.func, *factory.args] if isinstance(factory, partial) else [factory]
    kinds = [one for one in made if isinstance(one, type) and issubclass(one, Engine)]
    if not kinds:
        raise ValueError(
            f"engine ({getattr(factory, '__name__', type(factory).__name__)}) must in a competition be a class of "
            f"mixdist.engines, or a functools.partial of one: take mixdist.engines.Native, or leave engine out"
        )
    try:
        return kinds[0].solo(**(factory.keywords if isinstance(factory, partial) else {}))
    except TypeError as error:
        raise ValueError(f"engine cannot be made ({error}): see mixdist.engines.Engine for what it takes") from error
