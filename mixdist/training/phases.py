"""What a run goes through: phases, and where in them it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mixdist.mixtures import Objective


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
        objective: class of mixdist.mixtures.objectives, or your own.
        optimizer: any torch optimiser that works element by element.
        schedule: any torch learning-rate schedule that needs no metric; stepped after every step, in a competition
            after every epoch, so that all experts are in step.
        clip_norm: largest norm of the whole gradient.
    """

    epochs: int = 10
    batch_size: int = 100
    accumulate: int = 1
    trains: Literal["both", "gate", "experts"] = "both"
    objective: Objective = field(default_factory=_weighted_loss)  # type: ignore[assignment]
    optimizer: Callable[[Iterable[Tensor]], Optimizer] = field(default_factory=_adam)  # type: ignore[assignment]
    schedule: Callable[[Optimizer], LRScheduler] | None = None
    clip_norm: float | None = None

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
