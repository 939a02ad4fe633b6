"""What a run goes through: phases, and where in them it is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mixdist.arguments import check_argument, check_fields
from mixdist.data import Samples
from mixdist.engines import OptimizerFactory, ScheduleFactory
from mixdist.engines.average import averaged, check_decay
from mixdist.messages import one_line
from mixdist.mixtures import Context, Mixture, Objective, WeightedLoss
from mixdist.mixtures.held import as_text, held, marks
from mixdist.parallel.agreement import alike


def _adam() -> dict[str, object]:
    return {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}}


def _weighted_loss() -> dict[str, object]:
    return {"class_path": "mixdist.mixtures.WeightedLoss"}


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one objective and one set of optimisers.

    Args:
        epochs: passes over the training rows.
        batch_size: rows of the global batch, over all ranks.
        accumulate: micro-batches in which experts run a batch; the gradient is the same for any number.
        trains: what learns: both, the gate alone or the experts alone.
        stage: of a gate that learns in stages, as those of :class:`mixdist.gates.VaDE`.
        objective: class of mixdist.mixtures.objectives, or your own.
        optimizer: any torch optimiser that works element by element.
        schedule: any torch learning-rate schedule that needs no metric; stepped after every step, in a competition
            after every epoch, so that all experts are in step.
        clip_norm: largest norm of the whole gradient.
        ema: decay of an exponential moving average of the trained weights, such as 0.999; unset, none is kept. Training
            does not depend on it; ``mixdist evaluate --ema`` and ``mixdist.load(run, ema=True)`` take it.
    """

    epochs: int = 10
    batch_size: int = 100
    accumulate: int = 1
    trains: Literal["both", "gate", "experts"] = "both"
    stage: str = "joint"
    objective: Objective = field(default_factory=_weighted_loss)  # type: ignore[assignment]
    optimizer: Callable[[Iterable[Tensor]], Optimizer] = field(default_factory=_adam)  # type: ignore[assignment]
    schedule: Callable[[Optimizer], LRScheduler] | None = None
    clip_norm: float | None = None
    ema: float | None = None

    @property
    def stepping(self) -> OptimizerFactory:
        """What makes the phase's optimisers, which keep the average of what they step, where there is one."""
        return self.optimizer if self.ema is None else partial(averaged, self.optimizer, self.ema)

    def try_schedule(self, key: str, times: int, unit: str) -> None:
        """Run the schedule to its end on one number: one that is too short fails before anything is trained.

        Args:
            key: of the phase in a config.
            times: how often the schedule will step.
            unit: what it steps by.

        Raises:
            ValueError: it cannot step so often.
        """
        if self.schedule is None:
            return
        schedule = self.schedule(self.optimizer([torch.nn.Parameter(torch.zeros(1))]))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # no step of the optimiser lies between
                for _ in range(times):
                    schedule.step()
        except ValueError as error:
            raise ValueError(
                f"{key}.schedule cannot run for the {times} {unit} of its phase ({error}): change its init_args"
            ) from None


def with_defaults(phases: Sequence[Phase]) -> list[Phase]:
    """Return phases with their defaults made: a parser makes them of what a config says, phases of Python have not.

    Raises:
        ValueError: there is no phase, or something else.
    """
    if not isinstance(phases, Sequence) or not phases:
        given = "none" if isinstance(phases, Sequence) else f"a {type(phases).__name__}"
        raise ValueError(f"phases ({given}) must be a list of one Phase or more, the last of which is the main one")
    for key, phase in zip(phase_keys(phases), phases, strict=True):
        check_argument(key, phase, Phase)
    made: dict[str, tuple[Any, Any]] = {
        "objective": (_weighted_loss(), WeightedLoss()),
        "optimizer": (_adam(), partial(torch.optim.Adam, lr=1e-3)),
    }
    return [
        replace(phase, **{name: own for name, (told, own) in made.items() if getattr(phase, name) == told})
        for phase in phases
    ]


def check_phase(key: str, phase: Phase) -> None:
    """Check a phase that was made in Python as a config's is.

    Raises:
        ValueError: a number that makes no sense, an argument of another type, an optimiser that cannot be used.
    """
    check_is_objective(f"{key}.objective", phase.objective)
    check_fields(phase, f"{key}.")
    for name in POSITIVE:
        value = getattr(phase, name)
        if value is not None and not value > 0:
            raise ValueError(f"{key}.{name} ({value}) must be above 0: give 1 or more")
    if phase.ema is not None:
        check_decay(phase.ema, f"{key}.ema")
    try_out(key, phase.optimizer, phase.schedule)


POSITIVE = ("epochs", "batch_size", "accumulate", "clip_norm")
"""The numbers of a phase that are above 0."""


def try_out(key: str, make: OptimizerFactory, schedule: ScheduleFactory | None = None) -> None:
    """Step an optimiser and a schedule once on one number: better now than after the phases before it.

    Args:
        key: of what has them in a config.
        make: makes the optimiser.
        schedule: makes the schedule.

    Raises:
        ValueError: one of them cannot be used.
    """
    number = torch.nn.Parameter(torch.zeros(1))
    number.grad = torch.zeros(1)
    part, remedy = "optimizer", "choose one that works element by element, such as torch.optim.Adam"
    try:
        optimizer = make([number])
        with suppress(AssertionError):  # capturable optimisers want CUDA
            optimizer.step()
        part, remedy = "schedule", "choose one that needs no metric, such as torch.optim.lr_scheduler.StepLR"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch would have it made before the step
            if schedule is not None:
                schedule(optimizer).step()
        rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
        if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
            raise ValueError(f"learning rate {rates[0]}")
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, AttributeError) as error:
        told = one_line(str(error))
        raise ValueError(f"{key}.{part} cannot be used ({told}): change its init_args, or {remedy}") from None


def phase_keys(phases: Sequence[Phase]) -> list[str]:
    """Return the keys that phases have in a config."""
    return [*(f"pretrain[{number}]" for number in range(len(phases) - 1)), "train"]


def check_is_objective(key: str, objective: Any) -> None:
    """Check that a phase has an objective.

    Raises:
        ValueError: it is something else.
    """
    kind = type(objective).__name__
    if isinstance(objective, type):
        raise ValueError(f"{key} is the class {objective.__name__}: give an object, as {objective.__name__}()")
    if not isinstance(objective, Objective):
        raise ValueError(f"{key} ({kind}) is no Objective: give one, as mixdist.mixtures.WeightedLoss()")
    if not hasattr(objective, "balance"):
        raise ValueError(f"{key}: {kind} has no balance: call super().__init__() in its __init__")


def _as_text(value: Any) -> str:
    """Return a value, or the marks of a tensor, as text."""
    if isinstance(value, (Tensor, np.ndarray)):
        return " ".join(f"{mark:.6g}" for mark in marks(torch.as_tensor(value)))
    return as_text(value)


def check_given(mixture: Mixture, dataset: Samples, phases: Sequence[Phase]) -> list[Phase]:
    """Check what a program is made of in Python, and that every rank was given the same: no config was compared.

    Returns:
        the phases, with their defaults made.

    Raises:
        ValueError: something of another type, or a number that makes no sense.
        Agreed: a rank was given another.
    """
    check_argument("mixture", mixture, Mixture)
    if not isinstance(dataset, Samples):
        raise ValueError(
            f"dataset (a {type(dataset).__name__}) must be samples: give a mixdist.data.Dataset, or the train "
            f"of what a source loads"
        )
    if not hasattr(mixture, "context"):
        raise ValueError(f"{type(mixture).__name__} has no modules yet: call its setup(context) first")
    made = with_defaults(phases)
    for key, phase in zip(phase_keys(made), made, strict=True):
        check_phase(key, phase)
    _check_alike(mixture.context, len(dataset), made)
    return made


def _check_alike(context: Context, num_rows: int, phases: Sequence[Phase]) -> None:
    named: dict[str, Any] = {"seed": context.seed, "dtype": str(context.dtype), "number of training rows": num_rows}
    for key, phase in zip(phase_keys(phases), phases, strict=True):
        for name in ("epochs", "batch_size", "accumulate", "trains", "stage", "clip_norm", "ema"):
            named[f"{key}.{name}"] = getattr(phase, name)
        for name, one in (("objective", phase.objective), ("objective.balance", phase.objective.balance)):
            named[f"{key}.{name}"] = type(one).__qualname__
            named |= {f"{key}.{name}.{path}": _as_text(value) for path, value in held(one)}
    alike(named, context.mesh.world)


class Stretched(LRScheduler):
    """Another schedule, in more or fewer steps: after step s of ``over``, it is where it was after s ``steps`` / over.

    Args:
        optimizer: whose learning rate it sets.
        schedule: class of torch.optim.lr_scheduler that needs no metric.
        steps: of that schedule; it never takes more.
        over: steps in which it now takes them.

    Raises:
        ValueError: a number of steps below 1.

    Examples:
        >>> import torch
        >>> from torch.optim.lr_scheduler import LinearLR
        >>> from mixdist.training.phases import Stretched
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> schedule = Stretched(optimizer, lambda o: LinearLR(o, 1.0, 0.5, total_iters=2), steps=2, over=4)
        >>> rates = []
        >>> for _ in range(4):
        ...     optimizer.step()
        ...     schedule.step()
        ...     rates.append(optimizer.param_groups[0]["lr"])
        >>> rates
        [1.0, 0.75, 0.75, 0.5]
    """

    def __init__(
        self, optimizer: Optimizer, schedule: Callable[[Optimizer], LRScheduler], steps: int, over: int
    ) -> None:
        if min(steps, over) < 1:
            raise ValueError(f"Stretched's steps ({steps}) and over ({over}) must be at least 1: give numbers of steps")
        # Not the base class's: it would set the rate itself.
        self.optimizer, self.schedule, self.last_epoch = optimizer, schedule(optimizer), 0
        self.steps, self.over = steps, over

    def step(self, epoch: int | None = None) -> None:
        done = min(self.last_epoch * self.steps // self.over, self.steps)
        self.last_epoch += 1
        for _ in range(min(self.last_epoch * self.steps // self.over, self.steps) - done):
            self.schedule.step()


@dataclass(frozen=True)
class Position:
    """Where a run is: the next thing to do is batch ``batch`` of epoch ``epoch`` of phase ``phase``.

    Args:
        phase: number of the phase.
        epoch: within the phase.
        batch: within the epoch.
        step: steps done in the phase.
        total: steps done in the run.
    """

    phase: int = 0
    epoch: int = 0
    batch: int = 0
    step: int = 0
    total: int = 0
