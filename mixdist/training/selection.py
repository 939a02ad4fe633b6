"""Selection by validation rows: which checkpoint of a run is the best, and whether training ends early."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from mixdist.data import Samples
from mixdist.evaluation.evaluate import evaluate
from mixdist.mixtures import Mixture
from mixdist.parallel.agreement import Agreed, on_rank_0
from mixdist.training.checkpoint import CheckpointStore, directory_name, read_state

Mode = Literal["min", "max"]
Which = Literal["best", "newest"]
"""A checkpoint of a run: the best by what ``select`` monitors, where it monitors something; or the newest."""

SMALL = ("loss", "nll", "mse", "rmse", "error", "bits")
"""What the names of figures that are to be small begin with or end in; see ``implied_mode``."""
LARGE = ("elbo", "likelihood", "accuracy", "purity", "nmi", "ari")
"""What those of figures that are to be large begin with or end in."""
CONSTANT = "exact_log_likelihood"
"""A figure of the data, that no model changes."""
BETTER = {"min": "if small", "max": "if large", None: ""}
ROUNDING = 1e-9
"""An improvement must be more than this part of the best value, so that no layout's last digits decide."""


@dataclass(frozen=True)
class Select:
    """What chooses the best checkpoint and ends training early: a figure on validation rows.

    It is taken at the end of epochs of the main phase, in a competition of rounds.

    Args:
        monitor: name of the figure, as the line at the end of a run has it, such as loss; unset, none is taken, and the
            newest checkpoint counts.
        mode: whether it is to be small (min) or large (max); unset, as its name implies.
        patience: training ends after so many evaluations without an improvement; unset, it does not end early.
        min_delta: least change that is an improvement.
        every: epochs or rounds from one evaluation to the next.
        num_samples: importance samples for each row and expert; unset, no likelihoods are estimated.
    """

    monitor: str | None = None
    mode: Mode | None = None
    patience: int | None = None
    min_delta: float = 0.0
    every: int = 1
    num_samples: int | None = None

    def check(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: one makes no sense, or is given although nothing is monitored.
        """
        for name in ("patience", "every", "num_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"select.{name} ({value}) must be above 0: give 1 or more")
        if not 0 <= self.min_delta < math.inf:
            raise ValueError(f"select.min_delta ({self.min_delta}) must be 0 or more: give a finite number")
        for name, value in asdict(self).items():
            if self.monitor is None and value != getattr(Select, name):
                raise ValueError(
                    f"select.{name} ({value}) means nothing without a figure to watch: set select.monitor, such as loss"
                )
        if self.monitor is not None:
            check_choice(self.monitor, self.mode, "select.monitor", "select.mode")


def implied_mode(figure: str) -> Mode | None:
    """Return whether a figure is to be small or large, by its name; None where the name does not say."""
    words = figure.split("_")
    for mode, known in (("min", SMALL), ("max", LARGE)):
        if {words[0], words[-1]} & set(known):
            return mode  # type: ignore[return-value]
    return None


def check_choice(figure: str, mode: Mode | None, by: str, way: str) -> None:
    """Check that a figure can choose, and that it is not to be the worst.

    Args:
        figure: that chooses.
        mode: whether it is to be small or large, as the user has it.
        by: what the user named the figure with.
        way: what the user gave the mode with.

    Raises:
        ValueError: it is a constant of the data, or its name says otherwise.
    """
    if figure == CONSTANT:
        raise ValueError(f"{by} ({figure}) is a constant of the data, the same for every model: name log_likelihood")
    implied = implied_mode(figure)
    if None not in (mode, implied) and mode != implied:
        raise ValueError(
            f"{way} ({mode}) would choose the worst {figure}, by its name better {BETTER[implied]}: leave it out"
        )


@dataclass(frozen=True)
class Found:
    """What evaluations have found so far.

    Args:
        value: of the monitored figure at its best; None before it was a finite number.
        step: of the checkpoint that has it.
        waited: evaluations since then without an improvement.
        seen: epochs or rounds that have ended.
    """

    value: float | None = None
    step: int | None = None
    waited: int = 0
    seen: int = 0

    def after(self, value: float, step: int, mode: Mode, min_delta: float = 0.0) -> Found:
        """Return what is found after an evaluation at a step."""
        gain = 0.0 if self.value is None else (value - self.value) * (1 if mode == "max" else -1)
        least = 0.0 if self.value is None else max(min_delta, ROUNDING * abs(self.value))
        if math.isfinite(value) and (self.value is None or gain > least):
            return replace(self, value=value, step=step, waited=0)
        return replace(self, waited=self.waited + 1)


class Selection:
    """Watches a figure of a mixture on validation rows; every rank has one.

    Args:
        select: what is watched.
        mixture: what trains.
        dataset: validation rows.
        train: training rows, which the mixture's weights as a density are taken from.
        batch_size: rows of the global batch in evaluation.
        seed: of the run.
    """

    def __init__(
        self, select: Select, mixture: Mixture, dataset: Samples, train: Samples, batch_size: int, seed: int
    ) -> None:
        assert select.monitor is not None
        self.select, self.monitor, self.mixture, self.dataset = select, select.monitor, mixture, dataset
        self.train, self.batch_size, self.seed = train, batch_size, seed
        self.found = Found()
        mode = select.mode or implied_mode(select.monitor)
        if mode is None:
            raise ValueError(
                f"select.monitor ({select.monitor}) does not say by its name whether it is to be small or large: set "
                f"select.mode to min or max"
            )
        self.mode: Mode = mode

    @property
    def stopped(self) -> bool:
        """Whether training is to end."""
        return self.select.patience is not None and self.found.waited >= self.select.patience

    def try_out(self) -> None:
        """Evaluate a few rows to see that there is such a figure; every rank calls it.

        Raises:
            Agreed: there is none; the same message on every rank.
        """
        few = self.dataset.first(8 * self.mixture.context.mesh.world_size)
        self._value(self._figures(few, None))

    def end_epoch(self) -> bool:
        """Count an epoch or round that ended; return whether it is time to evaluate."""
        self.found = replace(self.found, seen=self.found.seen + 1)
        return self.found.seen % self.select.every == 0

    def evaluate(self, step: int) -> dict[str, Any]:
        """Take the figures after a step of the run, and return the record of them; every rank calls it.

        Raises:
            Agreed: there is no such figure.
        """
        figures = self._figures(self.dataset, self.train)
        self.found = self.found.after(self._value(figures), step, self.mode, self.select.min_delta)
        shown = {f"valid_{name}": value if math.isfinite(value) else None for name, value in figures.items()}
        return {"step": step, **shown, "best_step": self.found.step}

    def _figures(self, dataset: Samples, train: Samples | None) -> dict[str, float]:
        """Return the figures on rows, those of rank 0 on every rank, so that all decide alike."""
        taken = evaluate(self.mixture, dataset, self.batch_size, self.seed, self.select.num_samples, train)
        return on_rank_0(lambda: dict(taken.figures), self.mixture.context.mesh)

    def _value(self, figures: dict[str, float]) -> float:
        if self.monitor not in figures:
            more = "" if self.select.num_samples else " (with select.num_samples also likelihoods)"
            raise Agreed(
                f"select.monitor ({self.monitor}) is no figure of this mixture, which has {', '.join(figures)}{more}: "
                f"name one of them"
            )
        return figures[self.monitor]

    # What a checkpoint holds

    def state(self) -> dict[str, Any]:
        """Return, as JSON, what was found and how."""
        return {**self._how(), **asdict(self.found)}

    def load(self, path: Path, state: dict[str, Any] | None) -> None:
        """Go on from what ``state`` returned; from nothing where the run monitored nothing until now.

        Raises:
            ValueError: another figure was monitored, or the same in another way.
        """
        if state is None:
            return
        for name, value in self._how().items():
            if state[name] != value:
                raise ValueError(
                    f"checkpoint {path} was made with {name} {state[name]}, the config has {value}: resume with the "
                    f"run's own, or start a new run"
                )
        self.found = Found(**{name: state[name] for name in asdict(self.found)})

    def _how(self) -> dict[str, Any]:
        """Return, by key of the config, what the value found depends on."""
        return {
            "select.monitor": self.monitor,
            "select.mode": self.mode,
            "select.num_samples": self.select.num_samples,
            "validation rows": self.dataset.fingerprint,
        }


def choose_checkpoint(store: CheckpointStore, which: Which = "best") -> tuple[Path, list[str]]:
    """Return a good checkpoint and a sentence for each damaged one passed over; every rank calls it.

    Raises:
        Agreed: there is none, none is good, or one lacks an expert or has one too many (named).
        ValueError: ``which`` is neither.
    """
    if which not in get_args(Which):
        raise ValueError(f"weights ({which}) must be {' or '.join(get_args(Which))}")
    newest, passed_over = store.choose()
    step = (read_state(newest).get("selection") or {}).get("step")
    if which == "newest" or step is None or directory_name(step) == newest.name:
        return newest, passed_over
    best = store.root / directory_name(step)
    damage = store.damage(best)
    if damage is None:
        return best, passed_over
    return newest, [*passed_over, f"the best checkpoint, {best.name}, is damaged ({damage})"]
