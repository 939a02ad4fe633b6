"""Training by steps on global batches: phases of epochs of steps, from any position."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from mixdist.data import Loader, RankBatch, Samples
from mixdist.engines import Engine, EngineFactory, Native, NotFinite, Totals
from mixdist.messages import within
from mixdist.mixtures import Mixture
from mixdist.mixtures.inspection import inspect
from mixdist.mixtures.probe import check_json, shown
from mixdist.mixtures.schedules import anneal, anneal_module
from mixdist.noise import TRIAL_PHASE, Moment
from mixdist.parallel.agreement import agreed, gather_json
from mixdist.stats import Step
from mixdist.training.checkpoint import Saved, load_module
from mixdist.training.loop import Advance, peak_memory
from mixdist.training.phases import Phase, Position, check_given, phase_keys
from mixdist.training.resume import check_progress


class Trainer:
    """Runs the phases of a mixture, a step at a time; every rank has one.

    Args:
        mixture: what trains.
        dataset: training rows.
        phases: in order.
        engine: makes the engine of each phase; None for mixdist.engines.Native.
        log_every: steps between records.
        fresh: the run begins; otherwise it goes on from a checkpoint.
    """

    def __init__(
        self,
        mixture: Mixture,
        dataset: Samples,
        phases: Sequence[Phase],
        engine: EngineFactory | None = None,
        log_every: int = 10,
        fresh: bool = True,
    ) -> None:
        self.mixture, self.dataset, self.phases = mixture, dataset, check_given(mixture, dataset, phases)
        self.make_engine, self.log_every = engine or Native, log_every
        self.mesh, self.wire, self.seed = mixture.context.mesh, mixture.context.wire, mixture.context.seed
        self.owned = mixture.parts.owned()
        # What a module froze when it was made stays frozen.
        self.learnable = [[p for p in owned.module.parameters() if p.requires_grad] for owned in self.owned]
        self.position, self._inspected = Position(), -1
        self._rows, self._seconds = 0, 0.0
        keys = phase_keys(self.phases)
        mixture.check_stages(dict(zip(keys, self.phases, strict=True)), len(dataset))
        for key, phase in zip(keys, self.phases, strict=True):
            self._free(key, phase)
        self.engine = self._enter(0)
        for key, phase in zip(keys, self.phases, strict=True):
            phase.try_schedule(key, phase.epochs * self._batches(phase), "steps")

    @property
    def phase(self) -> Phase:
        """The phase that the position is in."""
        return self.phases[self.position.phase]

    @property
    def total(self) -> int:
        """Steps done in the run."""
        return self.position.total

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return sum(phase.epochs * self._batches(phase) for phase in self.phases)

    @property
    def finished(self) -> bool:
        """Whether the last phase has ended."""
        return self.position.epoch >= self.phase.epochs

    def _named(self) -> AbstractContextManager[None]:
        """Name the phase in errors, by its key in the config; a run of one phase has nothing to name."""
        keys = phase_keys(self.phases)
        return within(keys[self.position.phase] if len(keys) > 1 else "")

    def _batches(self, phase: Phase) -> int:
        return -(-len(self.dataset) // phase.batch_size)

    def begin(self) -> None:
        """Check what the user wrote on the first rows from the position, and begin to count rows and seconds anew.

        Raises:
            Agreed: something breaks its contract.
        """
        with self._named():
            self._inspect()
            self._json("state", self.mixture.state())
        self._rows, self._seconds = 0, 0.0

    def advance(self) -> Advance:
        """Do a step.

        Raises:
            NotFinite: a loss or gradient is not finite; names the expert.
        """
        with self._named():
            self._inspect()
            begin = time.perf_counter()  # rows_per_s is of training alone, not of saves between steps
            at = self.position
            logged = (at.total + 1) % self.log_every == 0 or at.total in (0, self.total_steps - 1)
            totals, batch, rate = self._step(logged)
        record = self._record(totals, batch, rate, self._seconds + time.perf_counter() - begin) if logged else None
        self._seconds = 0.0 if logged else self._seconds + time.perf_counter() - begin
        main, ended = at.phase + 1 == len(self.phases), self._move_on()
        return Advance(ended, record, selectable=ended and main)

    def ready(self) -> None:
        """Bring weights that are sharded together."""
        self.engine.ready()

    def end(self) -> None:
        """End the engine."""
        self.engine.close()

    def save(self) -> Saved:
        """Return what a checkpoint holds."""
        self.engine.gather()
        state = {
            "position": asdict(self.position),
            "optimizer": self.engine.kind(),
            "mixture": self._json("state", self.mixture.state()),
            "order": self._order(),
        }
        return Saved(state, self.mixture.owned(), self.engine)

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Take weights, optimisers and position from a checkpoint, whatever layout wrote it.

        Raises:
            ValueError: it does not fit the config.
        """
        self.position = Position(**state["position"])
        if self.position.phase >= len(self.phases):
            raise ValueError(
                f"checkpoint {path} is in phase {self.position.phase}, but the config has {len(self.phases)}"
            )
        if self.position.epoch > self.phase.epochs:
            raise ValueError(
                f"checkpoint {path} is at epoch {self.position.epoch}, but train.epochs is {self.phase.epochs}: "
                f"give {self.position.epoch} or more"
            )
        self.engine.close()
        self.engine, self._inspected = self._enter(self.position.phase), -1
        check_progress(path, state, self.engine.kind(), self._order())
        self.mixture.load_state(state["mixture"])
        for owned in self.mixture.owned():
            load_module(path, owned, self.engine)
        self.engine.fast_forward(self.position.step)

    def _order(self) -> str | None:
        """Return the digest of the order of the epoch that the position is inside of; None between epochs."""
        return self.loader.order_digest(self.position.epoch) if self.position.batch else None

    def _move_on(self) -> bool:
        """Move to the next step; return True where an epoch ended."""
        p = self.position
        p = replace(p, batch=p.batch + 1, step=p.step + 1, total=p.total + 1)
        ended = p.batch == self.loader.num_batches
        if ended:
            p = replace(p, epoch=p.epoch + 1, batch=0)
        if p.epoch == self.phase.epochs and p.phase + 1 < len(self.phases):
            self.position = replace(p, phase=p.phase + 1, epoch=0, step=0)
            self.engine.close()
            self.engine = self._enter(self.position.phase)
        else:
            self.position = p
        return ended

    def _enter(self, number: int) -> Engine:
        phase = self.phases[number]
        self._free(phase_keys(self.phases)[number], phase)
        place, pin = (self.mesh.rank, self.mesh.world_size), self.mesh.device.type == "cuda"
        self.loader = Loader(self.dataset, phase.batch_size, self.seed, number, *place, epochs=phase.epochs, pin=pin)
        self._upcoming: RankBatch | None = None
        parts = self.mixture.parts
        try:
            return self.make_engine(parts, self.mesh, self.wire, phase.stepping, phase.schedule, phase.clip_norm)
        except TypeError as error:  # an abstract class, or another constructor
            raise ValueError(
                f"engine cannot be made ({error}): see mixdist.engines.Engine for what it takes"
            ) from error

    def _free(self, key: str, phase: Phase) -> None:
        """Let what a phase trains learn, and nothing else."""
        for owned, parameters in zip(self.owned, self.learnable, strict=True):
            kind = "gate" if owned.expert is None else "experts"
            for parameter in parameters:
                parameter.requires_grad_(phase.trains in ("both", kind))
        self.mixture.enter(phase)
        if not any(p.requires_grad for parameters in self.learnable for p in parameters):
            raise ValueError(f"{key}.trains ({phase.trains}) has no parameters that learn: set it to both or another")

    def _inspect(self) -> None:
        """Check what the user wrote, once a phase; its first batch is kept for its first step.

        The first phase of a stage is started before.
        """
        at = self.position
        if self.finished or self._inspected == at.phase:
            return
        self._inspected = at.phase
        if at.step == 0 and self.phase.stage not in [phase.stage for phase in self.phases[: at.phase]]:
            self.mixture.start(self.dataset, self.phase, Moment(self.seed, at.phase))
        agreed(self._anneal, self.mesh.world)
        self._upcoming = self._upcoming or self._batch(at.epoch, at.batch)
        ids = self.loader.ids(at.epoch, at.batch)
        inspect(self.mixture, self._upcoming, ids, Moment(self.seed, TRIAL_PHASE), self.phase)
        if self.engine.rehearses:
            self._rehearse(self._upcoming)

    def _rehearse(self, batch: RankBatch) -> None:
        """Do the passes of a step and forget them, so that what they refuse is told before anything is written."""
        self.engine.zero_grad()
        self._anneal()
        with self.engine.accumulating():
            self.mixture.backward(batch, self.phase.objective, Moment(self.seed, TRIAL_PHASE), self.phase.accumulate)
        self.engine.zero_grad()
        self.engine.ready()

    def _anneal(self) -> None:
        """Set all schedules for the step of the position."""
        done = self.position.step
        step = Step(done, Fraction(done, self.loader.num_batches))
        for owned in self.owned:
            anneal_module(owned, step)
        anneal("objective", self.phase.objective, step)

    def _batch(self, epoch: int, index: int) -> RankBatch:
        return self.loader.batch(epoch, index).to(self.mesh.device)

    def _step(self, logged: bool) -> tuple[Totals, RankBatch, float]:
        """Do the step of the position; return its totals, its rows and its learning rate."""
        at = self.position
        self.wire.meter.reset(timed=logged)
        self._anneal()
        batch = self._upcoming or self._batch(at.epoch, at.batch)
        self._upcoming = self._next() if self.mixture.prefetch else None
        self.engine.zero_grad()
        moment, phase = Moment(self.seed, at.phase, at.step), self.phase
        with self.engine.accumulating():
            outcome = self.mixture.backward(batch, phase.objective, moment, phase.accumulate, self._upcoming)
        rate = self.engine.learning_rate()
        try:
            totals: Any = self.engine.step(outcome, at.total + 1)
        except NotFinite:
            self.mixture.settle()  # groups end in good order only with nothing in flight
            raise
        if not isinstance(totals, Totals):
            kind = type(self.engine).__name__
            raise ValueError(
                f"engine: {kind}.step returns {shown(totals)}, expected mixdist.engines.Totals: return that"
            )
        self._rows += batch.total
        return totals, batch, rate

    def _next(self) -> RankBatch | None:
        """Return this rank's rows of the next step, or None at the end of the phase."""
        at, loader = self.position, self.loader
        epoch, batch = divmod(at.epoch * loader.num_batches + at.batch + 1, loader.num_batches)
        return self._batch(epoch, batch) if epoch < self.phase.epochs else None

    def _json(self, method: str, value: Any) -> dict[str, Any]:
        return check_json(f"mixture: {type(self.mixture).__name__}.{method}", value)

    def _record(self, totals: Totals, batch: RankBatch, rate: float, seconds: float) -> dict[str, Any]:
        """Return the record of the step just done, the same on every rank."""
        meter, outcome = self.wire.meter, totals.outcome
        own = [meter.waiting_s, meter.transfer_s, peak_memory(self.mesh.device)]
        waiting, transfer, peak = zip(*gather_json(own, self.mesh.world), strict=True)
        record = {
            "step": self.position.total + 1,
            "phase": self.position.phase,
            "epoch": self.position.epoch,
            "loss": outcome.loss.item(),
            **{f"loss_{name}": part.item() for name, part in outcome.parts.items()},
            "grad_norm": totals.grad_norm,
            "learning_rate": rate,
            "rows_per_s": self._rows / max(seconds, 1e-9),
            **self._json("record", self.mixture.record(outcome, batch.total)),
            **totals.meter,
            "waiting_s": sum(waiting) / len(waiting),
            "transfer_s": sum(transfer) / len(transfer),
            "peak_memory_bytes": max(peak),
        }
        if self.position.batch < self.log_every and self.phase.objective.reads_losses:
            # The epoch's first record: it runs the experts once more, and calls them as an evaluation does.
            self.engine.ready()
            record |= self._json("diagnose", self.mixture.diagnose(batch))
        self._rows = 0
        return record
