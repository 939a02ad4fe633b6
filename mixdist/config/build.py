"""From a config to objects; besides the commands, the only reader of configs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from mixdist.competition.discriminators import Discriminator
from mixdist.competition.entrant import EntrantContext
from mixdist.competition.mixture import HardMixture
from mixdist.competition.rules import Rules
from mixdist.competition.scores import Discriminators, Score
from mixdist.competition.table import Assignment
from mixdist.config.config import Config
from mixdist.data import Samples
from mixdist.experts import Expert, ExpertBank, time_executions
from mixdist.gates import Gate
from mixdist.mixtures import Soft
from mixdist.noise import Moment, Purpose, weights_seed
from mixdist.parallel.agreement import Agreed, agree, alike, gather_json
from mixdist.parallel.dispatch import Dispatch
from mixdist.parallel.launch import Launch
from mixdist.parallel.mesh import Mesh, Placement, choose_device
from mixdist.parallel.wire import Wire
from mixdist.terms import Field, Spec

DTYPES = {"float32": torch.float32, "float64": torch.float64}
STORED_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
STORED_REALS = (torch.float16, torch.float32, torch.float64)
SKIPS_TOLD = 20
T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """A config made real on this rank: its place, its data, its mixture."""

    mesh: Mesh
    wire: Wire
    train: Samples
    test: Samples
    mixture: Soft | HardMixture

    def close(self) -> None:
        """End what works for the data."""
        self.train.close()
        self.test.close()


def build_gate(config: Config, spec: Spec) -> Gate:
    """Make the gate with its initial weights, a function of the seed alone; on the CPU."""
    make = config.gate
    assert make is not None
    return _seeded(lambda: make(spec, config.num_experts), weights_seed(config.seed, Purpose.GATE)).to(
        DTYPES[config.dtype]
    )


def build_experts(config: Config, spec: Spec, ids: Iterable[int], round: int = 0) -> dict[int, Expert]:
    """Make experts by global number, each with the initial weights of its number (and round); on the CPU."""
    seeds = {e: weights_seed(config.seed, Purpose.WEIGHTS, e, round) for e in ids}
    return {e: _seeded(lambda: config.expert(spec), seed).to(DTYPES[config.dtype]) for e, seed in seeds.items()}


def build_judges(config: Config, spec: Spec, ids: Iterable[int], round: int = 0) -> dict[int, Discriminator]:
    """Make discriminators by the numbers of their experts, with the initial weights of a round; on the CPU."""
    assert config.competition is not None
    score, dtype = config.competition.score, DTYPES[config.dtype]
    if not isinstance(score, Discriminators):
        return {}
    seeds = {e: weights_seed(config.seed, Purpose.DISCRIMINATOR, e, round) for e in ids}
    return {e: _seeded(lambda: score.discriminator(spec), seed).to(dtype) for e, seed in seeds.items()}


def first_table(config: Config, train: Samples) -> Assignment | None:
    """Read the table that a competition starts from; None where its rules start otherwise.

    Raises:
        ValueError: it cannot be read, is damaged, or belongs to other data.
    """
    rules = config.competition
    if rules is None or rules.table is None:
        return None
    path = Path(rules.table)
    try:
        table, about = path.read_bytes(), json.loads(path.with_suffix(".json").read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"competition.table {path} cannot be read with its .json beside it ({error}): name a table such as "
            f"runs/RUN/assignments/round-0001.npy"
        ) from None
    return Assignment.read(str(path), table, about, train.fingerprint, len(train), config.num_experts)


def build_context(config: Config, session: Session) -> EntrantContext:
    """Return what the entrants of a competition share on this rank."""
    spec, mesh = session.train.spec, session.mesh
    assert config.competition is not None
    score = config.competition.score
    judging = score if isinstance(score, Discriminators) else None
    return EntrantContext(
        config.seed,
        spec,
        DTYPES[config.dtype],
        mesh,
        session.wire,
        config.compute,
        lambda e, round: build_experts(config, spec, [e], round)[e].to(mesh.device),
        (lambda e, round: build_judges(config, spec, [e], round)[e].to(mesh.device)) if judging else None,
        judging,
    )


def _seeded(make: Callable[[], T], seed: int) -> T:
    # Modules draw their weights from torch's global generator; it is put back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def build_mesh(config: Config) -> Mesh:
    """Find this rank's place and meet the others.

    Raises:
        ValueError: no layout fits, no device is there, or the ranks do not find each other.
    """
    # Where a gradient stays 0, Adam's mean of it sinks to subnormal numbers, with which some processors are slow.
    torch.set_flush_denormal(True)
    launch = Launch.read()
    placement = Placement.plan(config.num_experts, launch.world_size, config.mesh.ep_size)
    return Mesh(placement, launch, choose_device(config.mesh.device, launch), config.mesh.timeout_s)


def build(config: Config, mesh: Mesh) -> Session:
    """Load the data and make the mixture; every rank calls it.

    Raises:
        Agreed: something does not fit; the same message on every rank.
    """
    wire = Wire(mesh.device)
    made: tuple[Samples, Samples, Soft | HardMixture] | None = None
    error = None
    try:
        train, test = config.data.load()
        made = train, test, build_mixture(config, train.spec, mesh, wire)
    except (ValueError, OSError) as mistake:
        error = str(mistake)
    agree(error, mesh.world)
    assert made is not None
    train, test, mixture = made
    train, test = _readable("training", train, mesh), _readable("test", test, mesh)
    alike("the data", [train.fingerprint[:16], test.fingerprint[:16]], mesh.world)
    if config.execution == "auto" and isinstance(mixture, Soft):
        choose_execution(config, mixture, train)
    return Session(mesh, wire, train, test, mixture)


def _readable(kind: str, dataset: Samples, mesh: Mesh) -> Samples:
    """Leave out what cannot be read, where the data is to do so: every rank looks at its share, all take all lists."""
    told, error = [], None
    try:
        told = dataset.unreadable(mesh.rank, mesh.world_size)
    except (ValueError, OSError) as mistake:
        error = str(mistake)
    agree(error, mesh.world)
    skipped = [(int(sample), str(why)) for part in gather_json(told, mesh.world) for sample, why in part]
    if not skipped:
        return dataset
    if mesh.rank == 0:
        for _, why in skipped[:SKIPS_TOLD]:
            print(f"mixdist: skipped: {why}", file=sys.stderr)
        more = f", the first {SKIPS_TOLD} named above" if len(skipped) > SKIPS_TOLD else ""
        print(f"mixdist: {len(skipped)} of {len(dataset)} {kind} samples skipped{more}", file=sys.stderr, flush=True)
    try:
        return dataset.without([sample for sample, _ in skipped])
    except ValueError as mistake:
        raise Agreed(str(mistake)) from None


def build_mixture(config: Config, spec: Spec, mesh: Mesh, wire: Wire) -> Soft | HardMixture:
    """Make this rank's part of the mixture; where execution is auto it begins as a loop."""
    experts = {e: expert.to(mesh.device) for e, expert in build_experts(config, spec, mesh.experts).items()}
    check_fields("expert", next(iter(experts.values())), spec)
    bank = ExpertBank(experts, "loop" if config.execution == "auto" else config.execution, config.compute)
    dispatch, dtype = Dispatch(mesh, wire, spec), DTYPES[config.dtype]
    if config.competition is not None:
        check_score(config, config.competition.score, spec, bank.template)
        return HardMixture(bank, dispatch, spec, dtype, config.competition.score)
    gate = build_gate(config, spec).to(mesh.device)
    check_fields("gate", gate, spec)
    return Soft(gate, bank, dispatch, spec, dtype, config.routing, config.dispatch.one_way)


def choose_execution(config: Config, mixture: Soft, train: Samples) -> None:
    """Time a loop and a stack, and go on with the one that is faster on rank 0; every rank calls it.

    Rows are as many as an expert sees in a micro-batch of the main phase (the first ones of the training set).
    """
    bank, mesh = mixture.bank, mixture.dispatch.mesh
    how = config.compute
    if not bank.template.stackable or config.num_experts == 1 or how.micro_batch or how.recompute or how.compile:
        return  # what a stack cannot do
    seen = config.train.batch_size / mesh.placement.num_replicas / config.train.accumulate
    seen *= config.routing.k / config.num_experts if config.routing else 1
    stored = train.take(torch.arange(min(len(train), max(1, round(seen)))))
    rows = mixture.values({n: column.to(mesh.device) for n, column in stored.items()}, bank.template.fields)
    bank.timed = time_executions(bank.owned(), rows, mixture.noise(Moment(config.seed)), config.compute)
    if gather_json(min(bank.timed, key=lambda way: bank.timed[way]), mesh.world)[0] == "stacked":
        bank.stack_up()


def check_score(config: Config, score: Score, spec: Spec, template: Expert) -> None:
    """Check a score against data and experts, and make a discriminator: better now than after pretraining.

    Raises:
        ValueError: it cannot score them; a discriminator cannot be made.
    """
    score.check(spec, config.num_experts, template)
    check_fields("competition.score", score, spec)
    build_judges(config, spec, [0])


def check_fields(key: str, module: Gate | Expert | Score, spec: Spec) -> None:
    """Check what a gate, expert or score reads against what the data has.

    Raises:
        ValueError: a field is missing.
    """
    for name in module.fields:
        if name not in spec:
            has = ", ".join(spec)
            raise ValueError(
                f"{key} ({type(module).__name__}) needs the field {name!r}, but the data has {has}: change one"
            )


def describe(config: Config, dataset: Samples) -> dict[str, Any]:
    """Say, in JSON, what must be the same for a checkpoint to be resumed; enough to load the model without its data."""
    phases, rules = [*config.pretrain, config.train], config.competition
    return {
        "seed": config.seed,
        "dtype": config.dtype,
        "num_experts": config.num_experts,
        "batch_sizes": [phase.batch_size for phase in phases],
        "pretrain_epochs": [phase.epochs for phase in config.pretrain],
        "data": dataset.fingerprint,
        "spec": describe_spec(dataset.spec),
        "label": dataset.label,
        "class_names": list(dataset.class_names),
        "competition": None if rules is None else {**_described(rules), "epochs": config.train.epochs},
    }


def _described(rules: Rules) -> dict[str, Any]:
    """Return what of a competition's rules a run goes on with."""
    kept = ("start", "starved", "starved_below", "block")
    return {"score": type(rules.score).__name__, **{name: getattr(rules, name) for name in kept}}


def describe_spec(spec: Spec) -> dict[str, Any]:
    """Return a spec as JSON."""
    return {name: {**vars(f), "shape": list(f.shape), "dtype": _type_name(f.dtype)} for name, f in spec.items()}


def read_spec(described: dict[str, Any]) -> dict[str, Field]:
    """Undo ``describe_spec``."""
    stored = {_type_name(d): d for d in (*STORED_INTEGERS, *STORED_REALS)}
    return {n: Field(**{**f, "shape": tuple(f["shape"]), "dtype": stored[f["dtype"]]}) for n, f in described.items()}


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
