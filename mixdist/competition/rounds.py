"""Rounds of competition: experts train on their samples, all samples are scored, each goes to the best expert.

Shape letters: N samples, E all experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixdist.competition.contracts import inspect_entrants
from mixdist.competition.delivery import OwnReader, WireReader, pieces_of_epoch
from mixdist.competition.entrants import Entrants, try_engines
from mixdist.competition.history import History, in_words, objectives, table_files
from mixdist.competition.mixture import HardMixture
from mixdist.competition.position import RoundPosition
from mixdist.competition.reassign import Scoring, Verdict
from mixdist.competition.table import Assignment, reseeded, starved
from mixdist.data import Epoch, Samples
from mixdist.engines import EngineFactory
from mixdist.engines.solo import solo_of
from mixdist.messages import within
from mixdist.noise import TRIAL_PHASE, Moment
from mixdist.training.checkpoint import Saved
from mixdist.training.loop import Advance
from mixdist.training.phases import Phase, check_given, phase_keys
from mixdist.training.resume import check_progress

TABLE = "assignment.npy"


class Rounds:
    """Runs phases of pretraining and rounds of a competition; every rank has one.

    Args:
        mixture: what competes, with the rules.
        dataset: training samples.
        phases: of pretraining; the last one says how experts train in a round.
        engine: whose ``solo`` makes an engine for each expert and discriminator; None for Native.
        log_every: not used: there is a record for each epoch of pretraining and each scoring.
        fresh: the run begins: a first table is taken where the rules start from one; otherwise a checkpoint has it.

    Raises:
        ValueError: fewer samples than experts, a schedule that is too short, a table that does not fit, an engine that
            cannot train experts by themselves.
    """

    def __init__(
        self,
        mixture: HardMixture,
        dataset: Samples,
        phases: Sequence[Phase],
        engine: EngineFactory | None = None,
        log_every: int = 10,
        fresh: bool = True,
    ) -> None:
        phases = check_given(mixture, dataset, phases)
        # First: ``facts`` is a collective where experts differ.
        read = [name for facts in mixture.facts for name in facts.fields]
        self.fields = tuple(dict.fromkeys([*read, *mixture.extra_fields]))
        self.mixture, self.dataset, self.phases, self.rules = mixture, dataset, phases, mixture.rules
        self.mesh, self.wire, self.seed = mixture.context.mesh, mixture.context.wire, mixture.context.seed
        self.history, rules = History(self.mesh, self.wire), self.rules
        self.num_experts, self.data = mixture.num_experts, dataset.fingerprint
        make = solo_of(engine)
        if self.num_experts > len(dataset):
            few = len(dataset)
            raise ValueError(f"mixture.num_experts ({self.num_experts}) must be at most {few}, the samples: lower it")
        keys = phase_keys(self.phases)
        mixture.check_stages(dict(zip(keys, self.phases, strict=True)), len(dataset))
        for key, phase in zip(keys, self.phases, strict=True):
            phase.try_schedule(key, phase.epochs * (rules.rounds if key == "train" else 1), "epochs")
        self.table: Assignment | None = None
        if rules.start == "split":
            self.table = Assignment.uniform(len(dataset), self.num_experts, self.data, self.seed)
        elif rules.table is not None and fresh:
            self.table = Assignment.load(Path(rules.table), self.data, len(dataset), self.num_experts)
        elif mixture.first_N is not None:
            self.table = Assignment.of(mixture.first_N, self.num_experts, self.data)
        wire = rules.delivery == "wire"
        self.reader = WireReader(dataset, self.mesh, self.wire) if wire else OwnReader(dataset, self.mesh)
        self.scoring = Scoring(mixture, self.reader, dataset, rules.block, self.fields, rules.starved == "reseed")
        self.position, self._inspected = RoundPosition(round=int(rules.start != "all")), (-1, -1)
        try_engines(make, mixture, self.phases)
        self.entrants = Entrants(mixture, self.phase, make)
        self.log_z_E = mixture.log_z_E
        self.objective: float | None = None
        self.changed: float | None = None

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

    @property
    def total(self) -> int:
        """Epochs and scorings done in the run."""
        return self.position.total

    def begin(self) -> None:
        """Check the first samples and what is to run on them, and begin to count seconds and bytes anew."""
        self._inspect()
        self.history.reset()

    def advance(self) -> Advance:
        """Train for an epoch, or score all samples.

        Raises:
            Agreed: a loss, gradient or score is not finite; names the expert.
        """
        self._inspect()
        return self._epoch() if self.pretraining or self._trains() else self._round()

    def _inspect(self) -> None:
        """Check them once a phase and round."""
        if not self.finished and self._inspected != (at := (self.position.phase, self.position.round)):
            with within(self._part):
                inspect_entrants(self.mixture, self.entrants, self.dataset, self.phase, Moment(self.seed, TRIAL_PHASE))
            self._inspected = at

    def ready(self) -> None:
        """Bring every expert back to the home that its number has, and give the mixture what was trained so far."""
        with self.history.timed("moving_s"):
            self.entrants.move(self.entrants.first_homes(), self.phase, self._round_before)
        discriminators = {e: one.discriminator for e, one in self.entrants.items() if one.discriminator is not None}
        self.mixture.receive({e: entrant.expert for e, entrant in self.entrants.items()}, discriminators)
        self.mixture.load_state(self._mixture_state() if self.scored else self.mixture.state())

    def end(self) -> None:
        """Give the mixture what was trained."""
        assert self.table is not None
        self.ready()

    @property
    def _round_before(self) -> int:
        """The round that made this one's discriminators."""
        return max(self.position.round - 1, 0)

    def _mixture_state(self) -> dict[str, Any]:
        share = self.table.share_E.tolist() if self.table is not None and self.scored else []
        return {"log_z": self.log_z_E.tolist(), "share": share}

    def _trains(self) -> bool:
        return self.position.round >= 1 and self.position.epoch < self.phase.epochs

    # Epochs

    def _epoch(self) -> Advance:
        """Train every expert for an epoch."""
        at, pretraining = self.position, self.pretraining
        if not pretraining and at.epoch == 0:
            self._place()
        homes, own = self.entrants.homes, cache(self._own)
        number = at.epoch if pretraining else (at.round - 1) * self.phase.epochs + at.epoch
        epoch, where = Epoch(self.seed, at.phase, number), (self.reader, self.mesh, self.dataset, self.fields)
        for brought, batches in pieces_of_epoch(*where, epoch, homes, own, self.phase.batch_size):
            with self.history.timed("experts_s"):
                for e, entrant in self.entrants.items():
                    task = partial(entrant.train, brought.rows, brought.places(batches(e)), at.phase, len(own(e)))
                    self.entrants.attempt(task)
        for entrant in self.entrants.values():
            self.entrants.attempt(entrant.end_epoch)
        ended = pretraining and at.epoch + 1 == self.phase.epochs
        at = replace(at, epoch=at.epoch + 1, total=at.total + 1)
        self.position = replace(at, phase=at.phase + 1, epoch=0) if ended else at
        record = None
        if pretraining:
            self._agree()
            record = self._record({"phase": at.phase, "epoch": at.epoch - 1})
        if ended:
            self.entrants.enter(self.phase)
        return Advance(ended, record)

    def _agree(self) -> None:
        """Fail on every rank where an expert of some rank went wrong."""
        self.entrants.agree(self._part)

    @property
    def _part(self) -> str:
        """What errors call the part of the run that the position is in."""
        return f"pretrain[{self.position.phase}]" if self.pretraining else f"round {self.position.round}"

    def _own(self, e: int) -> Tensor:
        """Return the positions that an expert trains on."""
        table = self.table
        if self.pretraining and self.rules.start == "all":
            return torch.arange(len(self.dataset))
        assert table is not None
        frozen = not self.pretraining and self.rules.starved == "freeze" and e in self._starved(table)
        return torch.arange(0) if frozen else table.positions(e)

    def _starved(self, table: Assignment) -> list[int]:
        return starved(table.counts_E, self.rules.starved_below)

    # Rounds

    def _round(self) -> Advance:
        """Score all samples and move them to their best experts."""
        at, rules, old = self.position, self.rules, self.table
        self._agree()
        with self.history.timed("discriminators_s"):
            if self.mixture.discriminating is not None:
                self.scoring.challenge(self.entrants, at.round, self.entrants.attempt)
        self._agree()
        with self.history.timed("scoring_s"):
            verdict = self.scoring.verdict(
                self.entrants, self.entrants.homes, at.round, None if old is None else old.expert_N
            )
        self.log_z_E = verdict.log_z_E
        if rules.score.keeps and old is not None:
            verdict = verdict._replace(expert_N=old.expert_N, objective=verdict.objective_before)
        table = Assignment.of(verdict.expert_N, self.num_experts, self.data, at.round)
        entropies = table.share_entropy, 0.0 if old is None else old.share_entropy
        rule = rules.starved
        starved_experts = [] if rule == "none" else self._starved(table)
        if rule == "reseed" and (at.round >= rules.rounds or rules.score.keeps):
            rule = "none"  # no expert would train on the new split, or the split never changes
        begins = bool(starved_experts) and rule == "reseed"
        if begins:
            table = self._reseed(table, verdict, starved_experts)
        changed = None if old is None else table.changed(old)
        # An expert that begins anew may get the very samples that it had: it is to learn them before the end.
        stopped = at.round > 0 and not begins and changed is not None and changed < rules.stop_below
        self.table, self.changed = table, changed
        self.position = replace(at, round=at.round + 1, epoch=0, total=at.total + 1, stopped=stopped)
        told, self.objective = objectives(verdict, entropies, rules.counts_shares, self.objective)
        told |= {"e_steps": verdict.e_steps, "temperature": rules.temperature_of(at.round)}
        record = self._report(table, told, changed, starved_experts, rule)
        return Advance(True, record, in_words(record), table_files(table), selectable=True)

    def _reseed(self, table: Assignment, verdict: Verdict, starved_experts: list[int]) -> Assignment:
        """Give starved experts new weights; return the table that gives them the samples modelled worst."""
        assert verdict.best_N is not None
        for e in set(starved_experts) & set(self.entrants):
            kept, fresh = self.entrants[e], self.entrants.made_anew(e, self.phase, self.position.round + 1)
            fresh.engine.go_to(0, kept.engine.epochs)
            fresh.discriminator, fresh.discriminator_engine = kept.discriminator, kept.discriminator_engine
            self.entrants[e] = fresh
        expert_N = reseeded(table.expert_N.astype(np.int64), verdict.best_N, starved_experts, self.num_experts)
        return Assignment.of(expert_N, self.num_experts, self.data, table.round)

    def _report(
        self, table: Assignment, told: dict[str, Any], changed: float | None, starved_experts: list[int], rule: str
    ) -> dict[str, Any]:
        """Return the record of a scoring."""
        return self._record(
            {
                "phase": self.position.phase,
                "round": table.round,
                "counts": table.counts_E.tolist(),
                "changed": changed,
                **told,
                "starved": starved_experts,
                "starved_rule": rule,
                "homes": self.entrants.homes,
            }
        )

    def _record(self, fields: dict[str, Any]) -> dict[str, Any]:
        return self.history.record({"step": self.position.total, **fields}, self.entrants)

    def _place(self) -> None:
        """Move experts to where they are trained soonest, if that takes less time than it saves."""
        pace = self.history.seconds_a_row  # the same on every rank
        if self.rules.placement == "load" and len(self.entrants.homes) > 1 and self.table is not None and pace:
            load_E = self.phase.epochs * pace * np.maximum(self.table.counts_E, 1e-6)
            with self.history.timed("moving_s"):
                self.entrants.balance(load_E, self.phase, self._round_before)

    # What a run leaves behind

    def save(self) -> Saved:
        """Return what a checkpoint holds."""
        self._agree()
        state = {
            "position": asdict(self.position),
            "optimizer": self.entrants.kind(),
            "entrants": self.entrants.state(),
            "table": None if self.table is None else self.table.describe(),
            "mixture": self._mixture_state(),
            "objective": self.objective,
            "changed": self.changed,
            "order": self.scoring.order_digest(self.position.round),
        }
        files = {} if self.table is None else {TABLE: self.table.to_bytes()}
        return Saved(state, self.entrants.owned(), self.entrants.states(), files)

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Take modules, optimisers, table and position from a checkpoint, whatever layout wrote it.

        Raises:
            ValueError: it does not fit the config.
        """
        self.position, self._inspected = RoundPosition(**state["position"]), (-1, -1)
        if self.position.phase >= len(self.phases) or self.position.round > self.rules.rounds + 1:
            raise ValueError(
                f"checkpoint {path} is in phase {self.position.phase}, round {self.position.round}, but the config has "
                f"{len(self.phases) - 1} phases of pretraining and {self.rules.rounds} rounds: give as many or more"
            )
        if state["table"] is not None:
            name, table, about = str(path / TABLE), (path / TABLE).read_bytes(), state["table"]
            self.table = Assignment.read(name, table, about, self.data, len(self.dataset), self.num_experts)
        self.log_z_E = torch.tensor(state["mixture"]["log_z"], dtype=torch.float64, device=self.mesh.device)
        self.objective, self.changed = state["objective"], state.get("changed")
        if self.changed is not None and self.changed >= self.rules.stop_below:
            self.position = replace(self.position, stopped=False)  # it stopped by a rule that is no longer there
        self.entrants.enter(self.phase)
        check_progress(path, state, self.entrants.kind(), self.scoring.order_digest(self.position.round))
        self.entrants.load(path, state["entrants"], self._round_before)
