"""The training loop: phases of epochs of steps, from any position."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mixdist.data import Loader, RankBatch, Samples
from mixdist.engines import Native, NotFinite, Totals
from mixdist.evaluation.health import dead
from mixdist.mixtures import Mixture
from mixdist.noise import Moment
from mixdist.parallel.agreement import gather_json
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import Wire
from mixdist.training.checkpoint import CheckpointStore, check_optimizer, check_run, load_module, read_state
from mixdist.training.loop import Recorder, peak_memory
from mixdist.training.phases import Phase, Position


class Trainer:
    """Runs the phases of a mixture; every rank has one.

    Args:
        mixture: what trains.
        dataset: training rows.
        phases: in order.
        seed: of the run.
        mesh: this rank's place.
        wire: the counted collectives.
        store: where checkpoints go; None for none.
        recorders: receive each logged step, on rank 0.
        log_every: steps between records.
        save_every: steps between checkpoints; None for one at the end of each epoch.
        described: what a checkpoint says of the run, to be the same on resume.
        prefetch: let the mixture send a step's rows during the step before.
        duplicate_pairs: names the pairs of experts that are duplicates on a batch; every rank calls it, once an epoch.
    """

    def __init__(
        self,
        mixture: Mixture,
        dataset: Samples,
        phases: Sequence[Phase],
        seed: int,
        mesh: Mesh,
        wire: Wire,
        store: CheckpointStore | None = None,
        recorders: Sequence[Recorder] = (),
        log_every: int = 10,
        save_every: int | None = None,
        described: dict[str, Any] | None = None,
        prefetch: bool = False,
        duplicate_pairs: Callable[[RankBatch], list[tuple[int, int]]] = lambda shard: [],
    ) -> None:
        self.mixture, self.dataset, self.phases, self.seed = mixture, dataset, list(phases), seed
        self.mesh, self.wire, self.store, self.recorders = mesh, wire, store, list(recorders)
        self.log_every, self.save_every, self.prefetch = log_every, save_every, prefetch
        self.described, self.duplicate_pairs = described or {}, duplicate_pairs
        self.owned = mixture.parts.owned()
        # What a module froze when it was made stays frozen.
        self.learnable = [[p for p in owned.module.parameters() if p.requires_grad] for owned in self.owned]
        self.position = Position()
        self.saved = -1
        self._set_clock()
        self.engine = self._enter(0)
        for number, phase in enumerate(self.phases):
            key = "train" if number + 1 == len(self.phases) else f"pretrain[{number}]"
            phase.try_schedule(key, phase.epochs * -(-len(dataset) // phase.batch_size), "steps")

    @property
    def phase(self) -> Phase:
        """The phase that the position is in."""
        return self.phases[self.position.phase]

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return sum(p.epochs * -(-len(self.dataset) // p.batch_size) for p in self.phases)

    def resume(self, path: Path) -> None:
        """Take weights, optimisers and position from a checkpoint, whatever layout wrote it.

        Raises:
            ValueError: it belongs to another run.
        """
        state = read_state(path)
        check_run(path, state, self.described)
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
        self.engine = self._enter(self.position.phase)
        check_optimizer(path, state, self.engine.kind())
        for owned in self.owned:
            load_module(path, owned, self.engine)
        self.engine.fast_forward(self.position.step)
        self.saved = self.position.total

    def fit(self) -> None:
        """Run from the position to the end of the last phase.

        Raises:
            NotFinite: a loss or gradient is not finite; names the expert.
        """
        self._set_clock()
        while not self._finished():
            loader = self._loader()
            self._step(loader)
            ended = self._advance(loader.num_batches)
            due = self.position.total % self.save_every == 0 if self.save_every else ended
            if due or self._finished():
                self.save()

    def save(self) -> None:
        """Write a checkpoint of the position."""
        if self.store is None or self.saved == self.position.total:
            return
        begin = time.perf_counter()
        state = {"position": asdict(self.position), "run": self.described, "optimizer": self.engine.kind()}
        self.store.save(self.position.total, state, self.owned, self.engine)
        self.saved = self.position.total
        self._since += time.perf_counter() - begin  # rows_per_s is of training alone

    def _finished(self) -> bool:
        return self.position.epoch >= self.phase.epochs

    def _advance(self, num_batches: int) -> bool:
        """Move to the next step; give True where an epoch ended."""
        p = self.position
        p = replace(p, batch=p.batch + 1, step=p.step + 1, total=p.total + 1)
        ended = p.batch == num_batches
        if ended:
            p = replace(p, epoch=p.epoch + 1, batch=0)
        if p.epoch == self.phase.epochs and p.phase + 1 < len(self.phases):
            self.position = replace(p, phase=p.phase + 1, epoch=0, step=0)
            self.engine = self._enter(self.position.phase)
        else:
            self.position = p
        return ended

    def _enter(self, number: int) -> Native:
        phase = self.phases[number]
        for owned, parameters in zip(self.owned, self.learnable, strict=True):
            kind = "gate" if owned.expert is None else "experts"
            for parameter in parameters:
                parameter.requires_grad_(phase.trains in ("both", kind))
        parts, wire = self.mixture.parts, self.wire
        self._cached: Loader | None = None
        self._upcoming: RankBatch | None = None
        engine = Native(parts, self.mesh, wire, phase.optimizer, phase.schedule, phase.clip_norm)
        if not engine.trained:
            raise ValueError(f"phase {number} trains {phase.trains}, which has no parameters: set trains to both")
        return engine

    def _loader(self) -> Loader:
        if self._cached is None:
            mesh, phase = self.mesh, self.phase
            self._cached = Loader(
                self.dataset,
                phase.batch_size,
                self.seed,
                self.position.phase,
                mesh.rank,
                mesh.world_size,
                epochs=phase.epochs,
                pin=mesh.device.type == "cuda",
            )
        return self._cached

    def _step(self, loader: Loader) -> None:
        at = self.position
        logged = (at.total + 1) % self.log_every == 0 or at.total in (0, self.total_steps - 1)
        self.wire.meter.reset(timed=logged)
        for owned in self.owned:
            getattr(owned.module, "anneal", lambda step: None)(at.step)
        self.phase.objective.anneal(at.step)
        shard = self._upcoming or loader.batch(at.epoch, at.batch).to(self.mesh.device)
        self._upcoming = self._next(loader) if self.prefetch else None
        self.engine.zero_grad()
        moment = Moment(self.seed, at.phase, at.step)
        outcome = self.mixture.backward(shard, self.phase.objective, moment, self.phase.accumulate, self._upcoming)
        rate = self.engine.learning_rate()
        try:
            totals = self.engine.step(outcome, at.total + 1)
        except NotFinite:
            self.mixture.settle()  # groups end in good order only with nothing in flight
            raise
        self._rows += shard.total
        if logged:
            self._record(totals, shard, rate)

    def _next(self, loader: Loader) -> RankBatch | None:
        """This rank's rows of the next step, or None at the end of the phase."""
        at = self.position
        epoch, batch = divmod(at.epoch * loader.num_batches + at.batch + 1, loader.num_batches)
        return loader.batch(epoch, batch).to(self.mesh.device) if epoch < self.phase.epochs else None

    def _record(self, totals: Totals, shard: RankBatch, rate: float) -> None:
        """Hand a record of the step just done to the recorders of rank 0."""
        meter, outcome, num_rows = self.wire.meter, totals.outcome, shard.total
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
            "rows_per_s": self._rows / max(time.perf_counter() - self._since, 1e-9),
            "load": (outcome.load_E / num_rows).tolist(),
            "dead_experts": [f"expert {e}" for e in dead((outcome.load_E / num_rows).numpy())],
            "seen": (outcome.seen_E / num_rows).tolist(),
            "lost_weight": outcome.lost.item() / num_rows,
            "expert_loss": (outcome.loss_E / outcome.seen_E.clamp(min=1)).tolist(),
            "responsibility_entropy": outcome.entropy.item() / num_rows,
            **totals.meter,
            "waiting_s": sum(waiting) / len(waiting),
            "transfer_s": sum(transfer) / len(transfer),
            "peak_memory_bytes": max(peak),
        }
        if self.position.batch < self.log_every:  # the epoch's first record: it runs the experts once more
            record["duplicate_experts"] = [f"experts {i} and {j}" for i, j in self.duplicate_pairs(shard)]
        for recorder in self.recorders if self.mesh.rank == 0 else ():
            recorder.write(record)
        self._set_clock()

    def _set_clock(self) -> None:
        self._rows, self._since = 0, time.perf_counter()
