"""What an engine is: what happens between the gradients of a mixture and its new parameters.

Shape letters: E all experts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mixdist.messages import SharedError
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import Wire
from mixdist.terms import Outcome, Owned, Parts

if TYPE_CHECKING:
    from mixdist.engines.solo import SoloFactory

OptimizerFactory = Callable[[Iterable[Tensor]], Optimizer]
ScheduleFactory = Callable[[Optimizer], LRScheduler]


class Totals(NamedTuple):
    """What one step was over the whole batch, the same on every rank.

    Args:
        outcome: every tensor summed over ranks.
        grad_norm: norm of the gradient before clipping, what is shared once and each expert once.
        meter: wire_bytes, wire_bytes_min and sync_bytes summed over ranks.
    """

    outcome: Outcome
    grad_norm: float
    meter: dict[str, int]


class NotFinite(SharedError):
    """A loss or a gradient is not a finite number; nothing was updated."""


class Engine(ABC):
    """Base of all engines; one is made for each phase of training, with the parameters that learn in it.

    An engine may rely on this: every rank makes it at the same time, with the same optimiser and schedule. A step is
    ``zero_grad``, then all backward passes of the mixture within ``accumulating``, then ``step``, on every rank of the
    world in this order. Within ``accumulating`` a parameter's gradient may be added to several times, and that of an
    expert without rows not at all; a missing gradient counts as zero, and its optimiser steps. The gradient of a shared
    module is this rank's part of a sum over all ranks; that of an expert is a part of a sum over its replicas: sums,
    never means. Parameters are ordinary tensors: nobody but the engine replaces or shards them, ``parts.stack`` holds
    those of a stack. ``gather`` is called on every rank before a save, ``ready`` before an evaluation and before
    experts run for a record.

    Args:
        parts: the mixture's modules on this rank.
        mesh: this rank's place.
        wire: the counted collectives.
        optimizer: makes an optimiser for parameters; one that works element by element.
        schedule: makes a learning-rate schedule, stepped after every step; or None.
        clip_norm: largest norm of the whole gradient; or None.

    Raises:
        ValueError: experts run as a stack, and ``stacks`` is false.
    """

    stacks: bool = True
    """Whether experts may run as one stack, whose parameters are slices of one tensor."""
    rehearses: bool = False
    """Whether a step refuses what no check of whole modules finds: its passes are tried once before a phase."""

    def __init__(
        self,
        parts: Parts,
        mesh: Mesh,
        wire: Wire,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory | None = None,
        clip_norm: float | None = None,
    ) -> None:
        if parts.stack and not self.stacks:
            raise ValueError(
                f"mixture.execution (stacked) cannot be used with the engine {type(self).__name__}, which needs each "
                f"expert's own parameters: set it to loop"
            )
        self.parts, self.mesh, self.wire, self.clip_norm = parts, mesh, wire, clip_norm
        listed = [(owned, trainable(owned.module)) for owned in parts.owned()]
        self.trained = [(owned, parameters) for owned, parameters in listed if parameters]
        self.num_experts = mesh.placement.num_experts

    @classmethod
    def solo(cls, **options: Any) -> SoloFactory:
        """Return what makes the engine of a module that trains by itself, as experts of a competition do.

        Args:
            **options: those of the constructor after the first six.

        Raises:
            ValueError: this kind of engine has none, or an option is wrong.
        """
        raise ValueError(
            f"engine ({cls.__name__}) trains all modules of a mixture in one step, and in a competition each expert "
            f"trains by itself: take mixdist.engines.Native, whose shard and offload work there, or leave engine out"
        )

    @classmethod
    def can_stack(cls, **options: Any) -> bool:
        """Return whether experts may run as one stack, given the constructor's options after the first six."""
        return cls.stacks

    @abstractmethod
    def zero_grad(self) -> None:
        """Clear every gradient."""

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Enclose all backward passes of a step."""
        yield

    @abstractmethod
    def step(self, outcome: Outcome, step: int) -> Totals:
        """Reduce gradients, check that all is finite, clip by the norm of all, and step the optimisers.

        Args:
            outcome: what the step left on this rank.
            step: its number, for messages.

        Raises:
            NotFinite: on every rank, before anything is changed.
        """

    @abstractmethod
    def learning_rate(self) -> float:
        """Return the learning rate of the next step; 0 where nothing trains."""

    @abstractmethod
    def kind(self) -> str:
        """Name the optimiser as far as its state depends on it: class, and flags such as amsgrad."""

    @abstractmethod
    def fast_forward(self, steps: int) -> None:
        """Bring the schedules to where they are after ``steps`` steps: they are pure functions of it."""

    def ready(self) -> None:  # noqa: B027
        """Bring weights together; every rank calls it before an evaluation between two steps, and before a record."""

    def gather(self) -> None:  # noqa: B027
        """Bring states that are sharded to the ranks that write them; every rank calls it before a save."""

    @abstractmethod
    def optimizer_state(self, owned: Owned) -> dict[str, Tensor]:
        """Return the optimiser's state of a module: "<parameter>.<key>" to tensor."""

    @abstractmethod
    def load_optimizer_state(self, owned: Owned, state: dict[str, Tensor]) -> None:
        """Put back what ``optimizer_state`` returned, after the module's weights were loaded."""

    def close(self) -> None:  # noqa: B027
        """End the engine of a phase that is over."""


EngineFactory = Callable[[Parts, Mesh, Wire, OptimizerFactory, ScheduleFactory | None, float | None], Engine]


def takes_stacks(factory: EngineFactory | None) -> bool:
    """Return whether engines that a factory makes can run a stack, as far as its class is known."""
    made, options = [factory], {}
    if isinstance(factory, partial):
        made, options = [factory.func, *factory.args], factory.keywords
    return all(one.can_stack(**options) for one in made if isinstance(one, type) and issubclass(one, Engine))


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module that learn."""
    return [p for p in module.parameters() if p.requires_grad]


def square(grads: list[Tensor], device: torch.device) -> Tensor:
    """Return the squared norm of gradients together, float64, on their device."""
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(grads)).double().square().sum()


def start_totals(
    mesh: Mesh, wire: Wire, outcome: Outcome, squares: Tensor, coming: int = 0
) -> Callable[[Tensor | None], tuple[Totals, Tensor]]:
    """Start to sum over ranks, in one reduction, everything that they must know of a step.

    Args:
        mesh: this rank's place.
        wire: the counted collectives.
        outcome: what the step left on this rank.
        squares: this rank's part of the squared gradients, (E,), or (E + 1,) with that of what is shared.
        coming: bytes that the rest of the step will send.

    Returns:
        what waits for it, given the squared gradient of what is shared if that was no part of the sum: the totals, and
        squared norms, (E + 1,).
    """
    counts = {name: getattr(wire.meter, name) for name in ("wire_bytes", "wire_bytes_min", "sync_bytes")}
    counts["sync_bytes"] += coming
    sent = torch.tensor(list(counts.values()), dtype=torch.float64, device=mesh.device)
    groups = (outcome.parts, outcome.sums, outcome.faults)
    fields = [squares, sent, outcome.loss, *(value for group in groups for value in group.values())]
    pending = wire.start_all_reduce(torch.cat([f.reshape(-1).double() for f in fields]), mesh.world)

    def finish(shared: Tensor | None) -> tuple[Totals, Tensor]:
        summed, sizes = pending.wait(), [f.numel() for f in fields]
        told = summed if shared is None else torch.cat([summed, shared.reshape(1)])
        *known, last = told.cpu().split([*sizes, len(told) - sum(sizes)])  # the one read of a step
        squares, bytes_, loss, *rest = (s.view(f.shape) for s, f in zip(known, fields, strict=True))
        values = iter(rest)
        parts, sums, faults = ({name: next(values) for name in group} for group in groups)
        meters = {name: int(b) for name, b in zip(counts, bytes_.tolist(), strict=True)}
        squares = torch.cat([squares, last])
        return Totals(Outcome(loss, parts, sums, faults), squares.sum().sqrt().item(), meters), squares

    return finish


def check_finite(outcome: Outcome, squares: Tensor, shared: list[str], step: int) -> None:
    """Check a step's outcome and squared gradients, summed over ranks.

    Raises:
        NotFinite: names the first expert or module whose loss or gradient is not finite.
    """
    remedy = "no parameter was changed; lower the learning rate, set clip_norm, or look at the rows of this step"
    seen = outcome.sums.get("seen")
    for name, counts in outcome.faults.items():
        for i, bad in enumerate(counts.reshape(-1).tolist()):
            if bad:
                of_all = "" if seen is None or not counts.ndim else f" of {seen[i]:.0f}"
                raise NotFinite(f"step {step}: {name.format(i)} is not finite for {bad:.0f}{of_all} rows: {remedy}")
    names = [*(f"expert {e}" for e in range(len(squares) - 1)), " and ".join(shared)]
    for name, squared in zip(names, squares.tolist(), strict=True):
        if not math.isfinite(squared):
            raise NotFinite(f"step {step}: the gradient of {name} is not finite: {remedy}")
    if not outcome.loss.isfinite():
        raise NotFinite(f"step {step}: the loss ({outcome.loss.item()}) is not finite: {remedy}")
