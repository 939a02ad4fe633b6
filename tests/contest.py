"""One competition in miniature, on any layout: what tests of hard assignment compare.

`run` is called on every rank with a `Contest`; `merge` joins what the ranks report. With replicas, which round
otherwise than one process does, `run` keeps every step of every engine, and `follow` runs one process along them: it
takes each of its own steps from the very weights that the replicas had there.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from mixdist.competition import (
    Assignment,
    Competition,
    Discriminators,
    Elbo,
    Fixed,
    LabelOracle,
    Likelihood,
    Random,
    Rounds,
    Score,
)
from mixdist.competition.reassign import Verdict
from mixdist.engines import Solo
from mixdist.experts import Compute
from mixdist.mixtures import Context, MakeExpert
from mixdist.nets import MLP, Conv
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import Wire
from mixdist.training.phases import Phase
from tests.parity import ENGINES, SEED, Case, data, make_expert, mesh_of

COUNTS = {4: (28, 14, 3, 0), 5: (20, 13, 9, 3, 0)}
"""Samples of each expert in the table that a contest may start from: one has few, one has none."""


@dataclass(frozen=True)
class Contest:
    """What is compared. Layout, delivery, placement, pieces and engine must not matter; all else names a problem."""

    ranks: int = 1
    ep_size: int = 1
    delivery: str = "read"
    placement: str = "fixed"
    piece_bytes: int = 1 << 28
    num_experts: int = 4
    start: str = "all"
    starved: str = "none"
    score: str = "fresh"
    given: str = "score"
    expert: str = "bernoulli"
    optimizer: str = "adam"
    batch_size: int = 10
    block: int = 16
    micro_batch: int | None = None
    rounds: int = 3
    epochs: int = 2
    engine: str = "native"

    def reference(self) -> Contest:
        """The same problem in one process, by the plainest way."""
        plain: dict[str, Any] = {"delivery": "read", "placement": "fixed", "piece_bytes": 1 << 28, "engine": "native"}
        return replace(self, ranks=1, ep_size=1, **plain)

    def __str__(self) -> str:
        return "-".join(str(v) for v in vars(self).values())


def make_score(case: Contest) -> Score:
    def adam(params: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, 1e-2)

    network = Conv([3, 4]) if case.expert == "conv" else MLP([9])
    kinds: dict[str, Callable[[], Score]] = {
        "fresh": lambda: Discriminators(network, epochs=2, batch_size=13, optimizer=adam),
        "kept": lambda: Discriminators(network, batches=3, fresh=False, batch_size=20, optimizer=adam, observe=False),
        "elbo": Elbo,
        "normalised": lambda: Elbo(normalized=True),
        "likelihood": lambda: Likelihood(num_samples=25),
        "oracle": lambda: LabelOracle("label"),
        "random": Random,
        "fixed": Fixed,
    }
    return kinds[case.score]()


def make_phase(case: Contest, epochs: int) -> Phase:
    if case.optimizer == "adam":
        return Phase(epochs, case.batch_size, optimizer=lambda p: torch.optim.Adam(p, 1e-2))
    return Phase(
        epochs,
        case.batch_size,
        optimizer=lambda p: torch.optim.SGD(p, 0.02, momentum=0.9),
        schedule=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 30),
        clip_norm=0.5,
    )


@functools.cache
def skewed(num_experts: int) -> Assignment:
    """A table in which the last expert has nothing."""
    expert_N = np.repeat(np.arange(num_experts), COUNTS[num_experts])
    mixed_N = expert_N[np.argsort(np.arange(len(expert_N)) * 7 % len(expert_N))]
    return Assignment.of(mixed_N, num_experts, data().fingerprint)


def make_experts(case: Contest) -> MakeExpert | list[MakeExpert]:
    """One for all; or, for "unlike", experts with other likelihoods."""
    kinds = ("bernoulli", "laplace", "gaussian", "bernoulli", "laplace")[: case.num_experts]

    def maker(kind: str) -> MakeExpert:
        return lambda spec: make_expert(Case(expert=kind), spec)

    return [maker(kind) for kind in kinds] if case.expert == "unlike" else maker(case.expert)


def given_by(case: Contest) -> dict[str, Any]:
    """Rules by which samples are given: as the score has it, the text's, with shares taken anew, drawn."""
    if case.given == "drawn" and case.score != "fixed":  # which keeps its table
        return {"by_shares": True, "e_steps": 2, "temperature": 3.0, "anneal_rounds": case.rounds}
    rules: dict[str, dict[str, Any]] = {"score": {}, "text": {"by_shares": False}}
    return rules.get(case.given, {"by_shares": True, "e_steps": 5})


def make_mixture(case: Contest, mesh: Mesh, wire: Wire) -> Competition:
    mixture = Competition(
        make_experts(case),
        case.num_experts,
        Compute(micro_batch=case.micro_batch),
        rounds=case.rounds,
        start=case.start,
        table="given" if case.start == "table" else None,
        score=make_score(case),
        starved=case.starved,
        starved_below=0.5,
        delivery=case.delivery,
        placement=case.placement,
        block=case.block,
        **given_by(case),
    )
    mixture.setup(Context(SEED, torch.float64, data().spec, mesh, wire))
    return mixture


def make_rounds(case: Contest, mesh: Mesh, wire: Wire) -> Rounds:
    """Some epochs of pretraining, then rounds of as many."""
    phases = [make_phase(case, case.epochs), make_phase(case, case.epochs)]
    rounds = Rounds(make_mixture(case, mesh, wire), data(), phases, ENGINES[case.engine], fresh=False)
    if case.start == "table":
        rounds.table = skewed(case.num_experts)
    return rounds


def records_of(rounds: Rounds) -> Iterator[dict[str, Any]]:
    """Run to the end; yield each record."""
    rounds.begin()
    while not rounds.finished:
        record = rounds.advance().record
        if record is not None:
            yield record
    rounds.end()


class Step(NamedTuple):
    """What a step of an engine began with, summed over replicas: its loss and its gradients, clipped, as one array.

    Thousands of tensors would each take a file descriptor on their way from a rank. A gradient that is not here, but
    with its owner, is NaN.
    """

    loss: float
    grads: np.ndarray


Steps = dict[str, list[tuple[int, Step]]]
"""Of each engine by its name, in order, each with the number of epochs and scorings done before it."""


@contextmanager
def watched(look: Callable[[Solo], None], tell: Callable[[Solo, float], float]) -> Iterator[None]:
    """Show every step's gradients to ``look`` before they are used; ``tell`` gets and returns the step's loss."""
    plain = Solo.step

    def step(self: Solo, loss: Tensor) -> float:
        def before(*_: Any) -> None:
            look(self)

        hook = self.optimizer.register_step_pre_hook(before)
        try:
            return tell(self, plain(self, loss))
        finally:
            hook.remove()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Solo, "step", step)
        yield


@contextmanager
def kept(steps: Steps, when: Callable[[], int]) -> Iterator[None]:
    """Keep every step."""
    grads: list[np.ndarray] = []

    def look(engine: Solo) -> None:
        found = [torch.full_like(p, math.nan) if p.grad is None else p.grad for p in engine.parameters]
        grads.append(torch.cat([grad.reshape(-1) for grad in found]).numpy())

    def tell(engine: Solo, loss: float) -> float:
        steps[engine.name].append((when(), Step(loss, grads.pop())))
        return loss

    with watched(look, tell):
        yield


@contextmanager
def following(steps: Steps, differences: dict[str, float]) -> Iterator[None]:
    """Go on from another run's gradients, and note by how much those made here differ.

    Of a loss |a - b| / |b|; of a step's gradients max|a - b| / max|b| over all of them, since one that is near 0 by
    cancellation, as that of a scale at its best, has the rounding of the others.
    """
    left = {name: [step for _, step in reversed(of)] for name, of in steps.items()}

    def note(name: str, difference: float, size: float) -> None:
        differences[name] = max(differences.get(name, 0.0), difference / (size or 1.0))

    def look(engine: Solo) -> None:
        found = [p.grad for p in engine.parameters if p.grad is not None]
        theirs = torch.from_numpy(left[engine.name][-1].grads)
        mine = torch.cat([grad.reshape(-1) for grad in found])
        note(f"{engine.name} gradient", (mine - theirs).abs().max().item(), theirs.abs().max().item())
        for grad, part in zip(found, theirs.split([grad.numel() for grad in found]), strict=True):
            grad.copy_(part.view_as(grad))

    def tell(engine: Solo, loss: float) -> float:
        theirs = left[engine.name].pop().loss
        note(f"{engine.name} loss", abs(loss - theirs), abs(theirs))
        return theirs

    with watched(look, tell):
        yield
    assert not any(left.values()), "the other run took more steps"


def follow(case: Contest, steps: Steps) -> tuple[dict[str, Any], dict[str, float]]:
    """Run a case in one process along the steps of another run; return its report, and how far its own steps were."""
    differences: dict[str, float] = {}
    with following(steps, differences):
        report = run(case.reference())
    return report, differences


def run(case: Contest) -> dict[str, Any]:
    """Pretrain and compete on this rank; report what every scoring decided, all records, and all that experts are."""
    mesh = mesh_of(case.num_experts, case.ranks, case.ep_size)
    made, steps = make_rounds(case, mesh, Wire(mesh.device)), defaultdict[str, list[tuple[int, Step]]](list)
    if mesh.placement.num_replicas == 1:
        return report_of(case, mesh, made)
    with kept(steps, lambda: made.total):
        report = report_of(case, mesh, made)
    return report | {"steps": dict(steps), "replica": mesh.replica}


def report_of(case: Contest, mesh: Mesh, made: Rounds) -> dict[str, Any]:
    verdicts, tables, records = list[Verdict](), list[list[int]](), list[dict[str, Any]]()
    made.scoring.needs_best = True
    verdict = made.scoring.verdict

    def judge(*words: Any) -> Verdict:
        verdicts.append(verdict(*words))
        return verdicts[-1]

    made.scoring.verdict = judge  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mixdist.competition.entrants.MOVES_A_SECOND", math.inf)
        patch.setattr("mixdist.competition.delivery.PIECE_BYTES", case.piece_bytes)
        for record in records_of(made):
            records.append(record)
            if "round" in record:
                assert made.table is not None
                tables.append(made.table.expert_N.tolist())
    assert list(made.entrants) == list(mesh.experts) == made.mixture.bank.ids
    return {
        "tables": tables,
        "records": records,
        "scores": {f"round {i} scores": torch.as_tensor(v.best_N) for i, v in enumerate(verdicts)},
        "log_z": {f"round {i} log Z": v.log_z_E for i, v in enumerate(verdicts)},
        "experts": {f"{e} {n}": t for e, entrant in made.entrants.items() for n, t in entrant.tensors().items()},
        "losses": {e: [entrant.loss, entrant.discriminator_loss_mean] for e, entrant in made.entrants.items()},
    }


def joined(of_replicas: list[list[tuple[int, Step]]]) -> list[tuple[int, Step]]:
    """Put together, step by step, the gradients that replicas own."""
    in_order = [sorted(steps, key=lambda step: step[0]) for steps in of_replicas]
    found = []
    for (when, step), *others in zip(*in_order, strict=True):
        grads = step.grads
        for _, other in others:
            grads = np.where(np.isnan(grads), other.grads, grads)
        found.append((when, step._replace(grads=grads)))
    return found


def merge(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Join what ranks report: every expert once, every copy held against it, bit for bit."""
    merged = reports[0] | {"experts": {}}
    taken: dict[str, dict[int, list[tuple[int, Step]]]] = defaultdict(lambda: defaultdict(list))
    for report in reports:
        for name, steps in report.get("steps", {}).items():  # an expert may have moved from one to another
            taken[name][report["replica"]] += steps
    merged["steps"] = {name: joined(list(of_replicas.values())) for name, of_replicas in taken.items()}
    for rank, report in enumerate(reports):
        for name, tensor in report["experts"].items():
            other = merged["experts"].setdefault(name, tensor)
            assert torch.equal(tensor, other), f"rank {rank}'s copy of {name} differs"
        assert report["tables"] == merged["tables"], f"rank {rank} has other tables"
        for kind in ("scores", "log_z"):
            assert all(torch.equal(report[kind][n], t) for n, t in merged[kind].items()), f"rank {rank}: {kind}"
    return merged


def tensors(report: dict[str, Any]) -> dict[str, Tensor]:
    """Everything of a report that is compared by the rule.

    Each figure of all records is one tensor: near a switch of sign an objective is a small difference of large numbers.
    """
    figures = {}
    for name in ("loss", "objective", "objective_trained"):
        told = [record[name] for record in report["records"] if record.get(name) is not None]
        figures[f"record {name}"] = torch.tensor(told, dtype=torch.float64)
    return {**report["scores"], **report["log_z"], **report["experts"], **figures}
