"""What a family of mixtures is. Training, evaluation, pictures, checkpoints and commands know this protocol alone.

A family is a subclass of :class:`Mixture`. Its constructor takes arguments from a config, ``setup`` makes its modules
on a rank, ``backward`` turns rows into gradients, and the rest says what its results are. Only ``setup``, ``parts`` and
``backward`` must be written; what a family leaves out, it does not have.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from torch import Tensor

from mixdist.data import RankBatch, Samples
from mixdist.mixtures.context import Context
from mixdist.mixtures.expert_start import ExpertStart
from mixdist.mixtures.objectives import Objective
from mixdist.mixtures.pictures import Picture
from mixdist.mixtures.study import Evaluation, Request, Study
from mixdist.noise import Moment
from mixdist.parallel.dispatch import Dispatch
from mixdist.terms import Batch, Outcome, Owned, Parts

Outputs = dict[str, Tensor]
"""What methods return on the rows of a check, by key, class and method: the same on every rank that has them."""


class Stage(Protocol):
    """What a family sees of a phase of training."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def accumulate(self) -> int: ...
    @property
    def trains(self) -> str: ...
    @property
    def stage(self) -> str: ...
    @property
    def objective(self) -> Objective: ...


class Mixture(ABC):
    """Base of all families.

    Attributes:
        num_experts: known before ``setup``, since experts are placed by it.
        context: what ``setup`` was given.
        dispatch: moves rows to experts and fields back.
        prefetch: whether ``backward`` is to be given the next step's rows.
        probes: classifiers that an evaluation fits to what ``embed`` returns, of ``mixdist.evaluation.probes``.
        judged: whether an evaluation has classifiers judge what it generates.
        program: makes what advances training, where that is not steps on global batches; called like
            :class:`mixdist.training.trainer.Trainer`.
    """

    num_experts: int
    context: Context
    dispatch: Dispatch
    prefetch: bool = False
    expert_start: ExpertStart | None = None
    probes: ClassVar[Sequence[Literal["logistic", "mlp", "svm", "knn"]]] = ()
    judged: ClassVar[bool] = False
    program: ClassVar[Callable[..., Any] | None] = None

    # Modules

    @abstractmethod
    def setup(self, context: Context) -> None:
        """Make this rank's modules. Subclasses call it first; it must not communicate.

        Raises:
            ValueError: the data does not have what the family needs.
        """
        self.context = context
        self.dispatch = Dispatch(context.mesh, context.wire, context.spec)

    @property
    @abstractmethod
    def parts(self) -> Parts:
        """Its modules on this rank that train together."""

    def owned(self) -> list[Owned]:
        """Return all modules that a checkpoint holds for this rank."""
        return self.parts.owned()

    def state(self) -> dict[str, Any]:
        """Return, as JSON, what a checkpoint holds beside the modules."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take what ``state`` returned, before the modules are loaded.

        Raises:
            ValueError: there is no mixture yet in that checkpoint.
        """

    def describe(self, stages: Sequence[Stage]) -> dict[str, Any]:
        """Return, as JSON, what must be the same for a checkpoint to be resumed; ``stages`` are the run's phases."""
        return {"num_experts": self.num_experts, **(self.expert_start.describe() if self.expert_start else {})}

    # Training

    def check(self, stages: Mapping[str, Stage]) -> None:  # noqa: B027
        """Check the phases of a run, by their keys.

        Raises:
            ValueError: this family cannot train so.
        """

    def check_stages(self, stages: Mapping[str, Stage], num_rows: int) -> None:
        """Check the phases of a run, by their keys, against the modules and the number of training rows.

        Raises:
            ValueError: a stage that the family's modules do not have, or too few rows for one.
        """
        for key, stage in stages.items():
            if stage.stage != "joint":
                raise ValueError(f"{key}.stage ({stage.stage}) is not for {type(self).__name__}: leave it out")

    def enter(self, stage: Stage) -> None:  # noqa: B027
        """Prepare the modules for a phase: freeze what does not learn in it, after all that may learn was freed."""

    def start(self, dataset: Samples, stage: Stage, at: Moment) -> None:  # noqa: B027
        """Set parameters before the first step of the run's first phase with a stage; every rank calls it.

        A function of weights, data and seed alone, the same on every layout: a run that resumes there calls it again.
        """

    def start_experts(self, dataset: Samples) -> None:
        """Set the experts' first weights from training rows, before a new run's engines are made; every rank calls it.

        A function of data and seed alone, the same on every layout.

        Raises:
            Agreed: they cannot start so.
        """
        if self.expert_start is not None:
            self.expert_start.start(self.context, self.dispatch.over_batch, self.parts.experts, dataset)
            self.expert_start.start_shared(self.context, self.parts.shared)

    def optimizers(self) -> dict[str, Callable[[Iterable[Tensor]], Any]]:
        """Return what makes the family's own optimisers, by the key that has an ``optimizer``; tried at the start."""
        return {}

    def gradients(self, stages: Sequence[Stage]) -> list[float]:
        """Return how often a training row enters the gradient of an expert, in each phase, all experts together.

        It is what training spends: :mod:`mixdist.baselines.single` gives one expert as much.
        """
        idle = [stage.trains == "gate" or not getattr(stage.objective, "reads_losses", True) for stage in stages]
        each = zip(stages, idle, strict=True)
        return [0.0 if alone else float(self.num_experts * stage.epochs) for stage, alone in each]

    def schedule_steps(self, stages: Sequence[Stage], num_rows: int) -> list[int]:
        """Return how many steps a learning-rate schedule takes in each phase, on so many training rows."""
        return [stage.epochs * -(-num_rows // stage.batch_size) for stage in stages]

    def check_data(self, splits: Mapping[str, Samples]) -> None:  # noqa: B027
        """Check the rows of a run before anything is trained, by what a split's rows are called; every rank calls it.

        Raises:
            Agreed: some do not suit the family.
        """

    def tune(self, dataset: Samples, stage: Stage) -> None:  # noqa: B027
        """Choose what is faster here, before training; every rank calls it."""

    def choices(self) -> dict[str, tuple[Any, str]]:
        """Return the arguments that ``tune`` chose, by name: the value, and why."""
        return {}

    @abstractmethod
    def backward(
        self, batch: RankBatch, objective: Objective, at: Moment, num_parts: int = 1, upcoming: RankBatch | None = None
    ) -> Outcome:
        """Add this rank's part of the gradient of the global loss to every parameter's ``grad``.

        It may differentiate several times; an engine sees all of that between the two ends of its ``accumulating``.

        Args:
            batch: this rank's rows of the global batch, and how many rows every rank has.
            objective: what to minimise.
            at: names the random draws.
            num_parts: micro-batches; the gradient is the same for any number.
            upcoming: the next step's rows, which may be sent already; the next call is then for this very batch. Only
                given where ``prefetch`` is true.
        """

    def inspect(self, rows: Batch, batch: RankBatch, at: Moment, stage: Stage | None = None) -> Outputs | None:
        """Check what a user wrote for the family, before the first step of a phase or before an evaluation.

        It must change nothing and not communicate; :mod:`mixdist.mixtures.contracts` has the checks of gates, experts
        and objectives. ``backward`` and ``measure`` of a family of one's own are checked without it.

        Args:
            rows: a few stored rows, the same on every rank.
            batch: this rank's rows of the first batch.
            at: names the draws.
            stage: the phase; None before an evaluation, with the modules in evaluation.

        Returns:
            outputs that must be the same on every rank.

        Raises:
            ValueError: something breaks its contract.
        """
        return None

    def settle(self) -> None:  # noqa: B027
        """Drain a prefetched send whose step will not run."""

    def record(self, outcome: Outcome, num_rows: int) -> dict[str, Any]:
        """Return what a step's record holds of the family, from the outcome summed over ranks."""
        return {name: (total / num_rows).tolist() for name, total in outcome.sums.items()}

    def diagnose(self, batch: RankBatch) -> dict[str, Any]:
        """Return what the first record of an epoch holds besides; every rank calls it."""
        return {}

    # Results

    @property
    def has_figures(self) -> bool:
        """Whether the family has a ``measure`` or a ``study`` of its own."""
        kind = type(self)
        return kind.measure is not Mixture.measure or kind.study is not Mixture.study

    def measure(self, batch: RankBatch, at: Moment) -> dict[str, Tensor]:
        """Return by name a number for each of this rank's held-out rows, (B,), or one sum over them.

        The means over all rows are the figures; those of numbers for each row have a standard error.
        """
        raise ValueError(f"{type(self).__name__} has no figures: write its measure method")

    def embed(self, batch: RankBatch) -> dict[str, Tensor]:
        """Return by name latents of this rank's rows, (B, L), NaN in a row that has none; every rank calls it.

        Classifiers of them say how much of the label they show (``probes``). The names are the same on every rank.
        """
        return {}

    def study(self, dataset: Samples, request: Request) -> Study:
        """Return what gathers the figures on a data set: by default the means of ``measure``."""
        return Study(self.measure, dataset, request)

    def protocol(self, num_samples: int) -> dict[str, Any]:
        """Return, as JSON, how the figures were taken."""
        return {}

    def pictures(self, dataset: Samples, evaluation: Evaluation, seed: int) -> list[Picture]:
        """Return the pictures of a trained mixture, the main one first; every rank calls it, rank 0 draws them."""
        return []

    def model(self, class_names: Sequence[str]) -> Any:
        """Return what ``mixdist.load`` gives users, of a mixture in one process with its weights loaded.

        It has a method ``rows_of_samples(num_samples, seed)``, which ``mixdist sample`` draws.
        """
        raise ValueError(f"{type(self).__name__} has no model to load: write its model method")

    @property
    def drawn_field(self) -> str | None:
        """The field whose samples ``draw`` draws; None for a family that does not sample."""
        return None

    @property
    def drawn_of(self) -> str:
        """What ``draw`` counts samples of: expert, or what stands in its place."""
        return "expert"

    def draw(self, num_samples: int, evaluation: Evaluation, at: Moment) -> tuple[list[int], np.ndarray]:
        """Draw from the whole mixture, for a kernel density on its samples; every rank calls it and gets all.

        Returns:
            how many of each expert, where that means something, and the samples (S, *shape of the field).
        """
        raise ValueError(f"{type(self).__name__} does not draw samples: leave --kde out")
