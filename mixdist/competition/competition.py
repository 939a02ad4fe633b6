"""Rounds of competition: experts train on their samples, all samples are scored, each goes to the best expert.

Shape letters: N samples, E all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixdist.competition.delivery import OwnReader, WireReader
from mixdist.competition.entrant import Entrant, EntrantContext
from mixdist.competition.history import History
from mixdist.competition.mixture import HardMixture
from mixdist.competition.pieces import Pieces
from mixdist.competition.placement import better_homes, move_entrants
from mixdist.competition.reassign import Scoring, Verdict
from mixdist.competition.rules import Rules
from mixdist.competition.table import Assignment, StarvedRule, reseeded, starved
from mixdist.data import Epoch, Samples
from mixdist.engines import NotFinite
from mixdist.parallel.agreement import Agreed, gather_json
from mixdist.terms import Owned
from mixdist.training.checkpoint import CheckpointStore, check_optimizer, check_run, load_module, read_state
from mixdist.training.manifest import file_name, read_manifest
from mixdist.training.phases import Phase

TABLE = "assignment.npy"


@dataclass(frozen=True)
class RoundPosition:
    """Where a competition is.

    Args:
        phase: number of the phase; the last one is the rounds.
        round: within them, from 1; 0 is the scoring of experts that pretrained on all samples.
        epoch: within the phase of pretraining, or within the round.
        total: epochs and scorings done in the run.
        stopped: the last round moved too few samples for another.
    """

    phase: int = 0
    round: int = 0
    epoch: int = 0
    total: int = 0
    stopped: bool = False


class Competition:
    """Runs phases of pretraining and rounds; every rank has one.

    Args:
        mixture: what competes.
        dataset: training samples.
        phases: of pretraining; the last one says how experts train in a round.
        rules: of the competition.
        ring: what this rank's entrants share.
        table: the first split where the rules start from a table.
        store: where checkpoints go; None for none.
        save_every: epochs and scorings between checkpoints; None for one after each phase and round.
        described: what a checkpoint says of the run, to be the same on resume.
    """

    def __init__(
        self,
        mixture: HardMixture,
        dataset: Samples,
        phases: Sequence[Phase],
        rules: Rules,
        ring: EntrantContext,
        table: Assignment | None = None,
        store: CheckpointStore | None = None,
        save_every: int | None = None,
        described: dict[str, Any] | None = None,
    ) -> None:
        self.mixture, self.dataset, self.phases, self.rules, self.ring = mixture, dataset, list(phases), rules, ring
        self.mesh, self.wire, self.store = ring.mesh, ring.wire, store
        self.save_every, self.described = save_every, described or {}
        self.history = History(self.mesh, self.wire)
        self.num_experts, self.data = ring.mesh.placement.num_experts, dataset.fingerprint
        if self.num_experts > len(dataset):
            raise ValueError(
                f"num_experts ({self.num_experts}) must be at most the number of training samples ({len(dataset)}) "
                f"for samples to be shared out: lower it"
            )
        for number, phase in enumerate(self.phases):
            epochs = phase.epochs if number + 1 < len(self.phases) else rules.rounds * phase.epochs
            phase.try_schedule("train" if number + 1 == len(self.phases) else f"pretrain[{number}]", epochs, "epochs")
        self.table = table
        if rules.start == "split":
            self.table = Assignment.uniform(len(dataset), self.num_experts, self.data, ring.seed)
        reads = rules.delivery == "read"
        self.reader = OwnReader(dataset, self.mesh) if reads else WireReader(dataset, self.mesh, self.wire)
        self.fields = mixture.fields
        self.pieces = Pieces(dataset, self.reader, self.mesh, self.fields)
        self.scoring = Scoring(
            ring, self.reader, rules.score, dataset, rules.block, self.fields, rules.starved == "reseed"
        )
        self.homes = [list(self.mesh.placement.experts_of(p)) for p in range(self.mesh.placement.ep_size)]
        self.position = RoundPosition(round=0 if rules.start == "all" else 1)
        self.entrants = {e: Entrant(e, ring, self.phase, expert) for e, expert in mixture.bank.owned().items()}
        self.log_z_E = mixture.log_z_E
        self.objective: float | None = None
        self.changed: float | None = None
        self.bad: str | None = None
        self.saved = -1

    @property
    def phase(self) -> Phase:
        """The phase that the position is in."""
        return self.phases[self.position.phase]

    @property
    def pretraining(self) -> bool:
        """Whether the rounds have not begun."""
        return self.position.phase + 1 < len(self.phases)

    @property
    def scored(self) -> bool:
        """Whether samples have been scored: there is a mixture from then on."""
        return self.position.round > (self.rules.start != "all")

    @property
    def total_steps(self) -> int:
        """Epochs and scorings of the whole run."""
        pretrain = sum(phase.epochs for phase in self.phases[:-1])
        return pretrain + (self.rules.start == "all") + self.rules.rounds * (self.phases[-1].epochs + 1)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return not self.pretraining and (self.position.stopped or self.position.round > self.rules.rounds)

    def fit(self) -> None:
        """Run from the position to the end, and bring every expert back to the home that its number has.

        Raises:
            Agreed: a loss, gradient or score is not finite; names the expert.
        """
        self.history.reset()
        while not self.finished:
            ended = self._epoch() if self.pretraining or self._trains() else self._round()
            if self.finished or (self.position.total % self.save_every == 0 if self.save_every else ended):
                self.save()
        self._rehome([list(self.mesh.placement.experts_of(p)) for p in range(len(self.homes))])
        assert self.table is not None
        judges = {e: entrant.judge for e, entrant in self.entrants.items() if entrant.judge is not None}
        self.mixture.receive({e: entrant.expert for e, entrant in self.entrants.items()}, judges)
        self.mixture.take_state({"log_z": self.log_z_E.tolist(), "share": self.table.share_E.tolist()})

    def _trains(self) -> bool:
        return self.position.round >= 1 and self.position.epoch < self.phase.epochs

    # Epochs

    def _epoch(self) -> bool:
        """Train every expert for an epoch; give True where a phase of pretraining ended."""
        at, pretraining = self.position, self.pretraining
        if not pretraining and at.epoch == 0:
            self._place()
        for piece in self.pieces.of(self._named(), self.homes, self._own, self.phase.batch_size):
            with self.history.timed("experts_s"):
                for e, entrant in self.entrants.items():
                    self._attempt(partial(entrant.train, piece.brought.rows, piece.places(e), at.phase))
        for entrant in self.entrants.values():
            self._attempt(entrant.end_epoch)
        ended = pretraining and at.epoch + 1 == self.phase.epochs
        at = replace(at, epoch=at.epoch + 1, total=at.total + 1)
        self.position = replace(at, phase=at.phase + 1, epoch=0) if ended else at
        if pretraining:
            self._agree()
            self._record({"phase": at.phase, "epoch": at.epoch - 1})
        if ended:
            for entrant in self.entrants.values():
                entrant.enter(self.phase)
        return ended

    def _attempt(self, act: Callable[[], None]) -> None:
        """Train something; what goes wrong is kept until all ranks can agree on it."""
        try:
            if self.bad is None:
                act()
        except NotFinite as error:
            self.bad = str(error)

    def _agree(self) -> None:
        """End on every rank where an expert of some rank went wrong."""
        at = self.position
        where = f"pretrain[{at.phase}]" if self.pretraining else f"round {at.round}"
        told = [bad for bad in gather_json(self.bad, self.mesh.world) if bad]
        if told:
            raise Agreed(f"{where}: {told[0]}")

    def _named(self) -> Epoch:
        """Name this epoch."""
        at = self.position
        number = at.epoch if self.pretraining else (at.round - 1) * self.phase.epochs + at.epoch
        return Epoch(self.ring.seed, at.phase, number)

    def _own(self, e: int) -> Tensor:
        """The positions that an expert trains on."""
        table = self.table
        if self.pretraining and self.rules.start == "all":
            return torch.arange(len(self.dataset))
        assert table is not None
        if not self.pretraining and self.rules.starved == "freeze" and e in self._starved(table):
            return torch.arange(0)
        return table.positions(e)

    def _starved(self, table: Assignment) -> list[int]:
        return starved(table.counts_E, self.rules.starved_below)

    # Rounds

    def _round(self) -> bool:
        """Score all samples and move them to their best experts."""
        at, rules, old = self.position, self.rules, self.table
        self._agree()
        with self.history.timed("discriminators_s"):
            if self.ring.judging is not None:
                self.scoring.challenge(self.entrants, at.round, self._attempt)
        self._agree()
        with self.history.timed("scoring_s"):
            verdict = self.scoring.verdict(self.entrants, self.homes, at.round, None if old is None else old.expert_N)
        self.log_z_E = verdict.log_z_E
        expert_N = verdict.expert_N
        if rules.score.keeps and old is not None:
            expert_N, verdict = old.expert_N.astype(np.int64), verdict._replace(objective=verdict.objective_before)
        table = Assignment.of(expert_N, self.num_experts, self.data, at.round)
        starved_experts = [] if rules.starved == "none" else self._starved(table)
        rule = rules.starved
        if rule == "reseed" and (at.round >= rules.rounds or rules.score.keeps):
            rule = "none"  # nobody would train on what it gives, or the split is for good
        begins = bool(starved_experts) and rule == "reseed"
        if begins:
            table = self._reseed(table, verdict, starved_experts)
        changed = None if old is None else table.changed(old)
        # An expert that begins anew may get the very samples that it had: it is to learn them before the end.
        stopped = at.round > 0 and not begins and changed is not None and changed < rules.stop_below
        self.table, self.changed = table, changed
        self.position = replace(at, round=at.round + 1, epoch=0, total=at.total + 1, stopped=stopped)
        self._report(table, verdict, changed, starved_experts, rule)
        return True

    def _reseed(self, table: Assignment, verdict: Verdict, starved_experts: list[int]) -> Assignment:
        """Return starved experts the samples that are modelled worst, and weights anew."""
        assert verdict.best_N is not None
        for e in set(starved_experts) & set(self.entrants):
            fresh = Entrant(e, self.ring, self.phase, round=self.position.round + 1)
            fresh.engine.go_to(0, self.entrants[e].engine.epochs)
            fresh.judge, fresh.judge_engine = self.entrants[e].judge, self.entrants[e].judge_engine
            self.entrants[e] = fresh
        expert_N = reseeded(table.expert_N.astype(np.int64), verdict.best_N, starved_experts, self.num_experts)
        return Assignment.of(expert_N, self.num_experts, self.data, table.round)

    def _report(
        self, table: Assignment, verdict: Verdict, changed: float | None, starved_experts: list[int], rule: StarvedRule
    ) -> None:
        before, last = verdict.objective_before, self.objective
        rose = last is not None and before is not None and before > last + 1e-12 * abs(last)
        self.objective = verdict.objective
        record = self._record(
            {
                "phase": self.position.phase,
                "round": table.round,
                "counts": table.counts_E.tolist(),
                "changed": changed,
                "objective": verdict.objective,
                "objective_trained": before,
                "objective_rose": rose,
                "starved": starved_experts,
                "starved_rule": rule,
                "homes": self.homes,
            }
        )
        self.history.round(table, record)

    def _record(self, fields: dict[str, Any]) -> dict[str, Any]:
        return self.history.record({"step": self.position.total, **fields}, self.entrants)

    # Placement

    def _place(self) -> None:
        """Move experts to where they are trained soonest, if that takes less time than it saves."""
        pace = self.history.seconds_a_row  # the same on every rank
        if self.rules.placement == "load" and len(self.homes) > 1 and self.table is not None and pace:
            load_E = self.phase.epochs * pace * np.maximum(self.table.counts_E, 1e-6)
            self._rehome(better_homes(self.entrants, self.homes, load_E, self.mesh))

    def _rehome(self, homes: list[list[int]]) -> None:
        if homes == self.homes:
            return
        with self.history.timed("moving_s"):
            make = partial(Entrant, ring=self.ring, phase=self.phase)
            round = max(self.position.round - 1, 0)
            self.entrants = move_entrants(self.entrants, homes, self.mesh, self.wire, make, round)
            self.homes = homes

    # What a run leaves behind

    def save(self) -> None:
        """Write a checkpoint of the position."""
        if self.store is None or self.saved == self.position.total:
            return
        self._agree()
        known = {
            e: {"steps": entrant.steps, "loss": entrant.loss, "loss_rows": entrant.loss_rows}
            for e, entrant in self.entrants.items()
        }
        told = {e: one for rank in gather_json(known, self.mesh.world) for e, one in rank.items()}
        state = {
            "position": asdict(self.position),
            "run": self.described,
            "optimizer": self._kind(),
            "entrants": told,
            "table": None if self.table is None else self.table.describe(),
            "log_z": self.log_z_E.tolist(),
            "share": self.table.share_E.tolist() if self.table is not None and self.scored else [],
            "objective": self.objective,
            "changed": self.changed,
        }
        files = {} if self.table is None else {TABLE: self.table.to_bytes()}
        owned = [one for entrant in self.entrants.values() for one in entrant.owned()]
        self.store.save(self.position.total, state, owned, self, files)
        self.saved = self.position.total

    def optimizer_state(self, owned: Owned) -> dict[str, Tensor]:
        """Return the optimiser's state of a module of some entrant."""
        assert owned.expert is not None
        return self.entrants[owned.expert].engine_of(owned).state()

    def load_optimizer_state(self, owned: Owned, state: dict[str, Tensor]) -> None:
        """Put back what ``optimizer_state`` gave."""
        assert owned.expert is not None
        self.entrants[owned.expert].engine_of(owned).load_state(state)

    def _kind(self) -> str:
        return next((entrant.engine.kind() for entrant in self.entrants.values()), "none")

    def resume(self, path: Path) -> None:
        """Take modules, optimisers, table and position from a checkpoint, whatever layout wrote it.

        Raises:
            ValueError: it belongs to another run.
        """
        state = read_state(path)
        check_run(path, state, self.described)
        self.position = RoundPosition(**state["position"])
        if self.position.phase >= len(self.phases) or self.position.round > self.rules.rounds + 1:
            raise ValueError(
                f"checkpoint {path} is in phase {self.position.phase}, round {self.position.round}, but the config has "
                f"{len(self.phases) - 1} phases of pretraining and {self.rules.rounds} rounds: give as many or more"
            )
        if state["table"] is not None:
            name, table, about = str(path / TABLE), (path / TABLE).read_bytes(), state["table"]
            self.table = Assignment.read(name, table, about, self.data, len(self.dataset), self.num_experts)
        self.log_z_E = torch.tensor(state["log_z"], dtype=torch.float64, device=self.mesh.device)
        self.objective = state["objective"]
        self.changed = state.get("changed")
        if self.changed is not None and self.changed >= self.rules.stop_below:
            self.position = replace(self.position, stopped=False)  # it stopped by a rule that is no longer there
        for entrant in self.entrants.values():
            entrant.enter(self.phase)
        check_optimizer(path, state, self._kind())
        judged = read_manifest(path)["files"]
        for e, entrant in self.entrants.items():
            if file_name(f"discriminator {e}", e) in judged:
                entrant.meet(max(self.position.round - 1, 0))
            for owned in entrant.owned():
                load_module(path, owned, self)
            entrant.go_to(state["entrants"][str(e)]["steps"])
            entrant.loss = state["entrants"][str(e)]["loss"]
            entrant.loss_rows = state["entrants"][str(e)]["loss_rows"]
        self.saved = self.position.total
