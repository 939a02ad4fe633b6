"""Optimiser states that have one owner each, and that live in CPU memory: the same run, fewer bytes, the same files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mixdist.engines import Native, NotFinite
from mixdist.noise import Moment
from mixdist.parallel.agreement import gather_json
from mixdist.parallel.costs import balanced, owned_bytes
from mixdist.parallel.launch import Launch
from mixdist.parallel.mesh import Mesh, Placement
from mixdist.parallel.wire import Wire
from mixdist.terms import Outcome, Parts
from mixdist.training.checkpoint import CheckpointStore, read_state
from mixdist.training.phases import Phase
from mixdist.training.trainer import Trainer
from tests.covering import every_value
from tests.launch import changed, here, refused, together, write_config
from tests.parity import (
    ENGINES,
    SEED,
    Case,
    Loader,
    data,
    differences,
    make_engine,
    make_mixture,
    make_objective,
    merge,
    mesh_of,
)
from tests.pool import Pool
from tests.test_parity import COVERING, TWO_STAGES, case_of, models

ROUNDING = 1e-13
"""Of the cases here in float64, by the rule of tests/parity.py; over 20 steps 5e-15 was the most."""


CASES = [
    case_of((1, 1), engine="sharded-offloaded", optimizer="scheduled-adamw"),
    case_of((2, 2), engine="sharded"),
    case_of((2, 1), engine="sharded-offloaded"),
    case_of((2, 1), engine="sharded", trains="experts", optimizer="scheduled-adamw", expert="unlike"),
    case_of((2, 1), engine="sharded-offloaded", execution="stacked", optimizer="clipped-sgd", accumulate=3),
    case_of((2, 2), engine="offloaded", way="ahead", prefetch=True, optimizer="clipped-sgd", expert="gaussian"),
    case_of((2, 1), engine="sharded", gate="vade", objective="mixture", expert="regressor", balance="none"),
    case_of((3, 3), engine="sharded", num_experts=5),
    case_of((4, 4), engine="sharded-offloaded", num_experts=5, family="two-stage", batch_size=3),
    case_of((4, 2), engine="sharded", execution="stacked", optimizer="scheduled-adamw", num_experts=5, batch_size=13),
    case_of((4, 2), engine="sharded-offloaded", optimizer="clipped-sgd", trains="gate", gate="conv"),
    case_of((4, 2), engine="sharded", routing="top2", gate="starved", num_experts=5, batch_size=3),
    case_of((4, 2), engine="sharded", family="two-stage", num_experts=5, optimizer="clipped-sgd"),
    case_of((4, 1), engine="sharded-offloaded", optimizer="clipped-sgd"),
    case_of((4, 2), engine="sharded-offloaded", optimizer="clipped-sgd", trains="decoder", execution="stacked"),
    case_of((4, 2), engine="sharded", family="mvae", gate="gaussian-each", balance="dhsic", objective="mean"),
    case_of((4, 2), engine="sharded-offloaded", family="mvae", gate="gumbel-each-off", balance="dhsic", num_experts=5),
]


@pytest.mark.parametrize("steps", [6, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_same_run_as_the_plain_engine_s(pool: Callable[[int], Pool], case: Case, steps: int) -> None:
    case = replace(case, steps=steps)
    got, wanted = (
        merge(pool(case.ranks).run("tests.parity:run", one)) for one in (case, replace(case, engine="native"))
    )
    found = differences(got, wanted)
    assert {k: v for k, v in found.items() if not v <= ROUNDING} == {}
    if case.ranks <= 2 and case.optimizer != "clipped-sgd":  # a sum of two has one order; a norm is summed in another
        assert {k: v for k, v in found.items() if v and k.startswith(("weight", "gradient"))} == {}
    assert got.get("decided") == wanted.get("decided")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [*(case_of(**row) for row in every_value(COVERING)), *TWO_STAGES[::3], *models()], ids=str
)
def test_every_covering_case_is_the_same_run(pool: Callable[[int], Pool], case: Case) -> None:
    """Where Adam divides by a gradient near 0, rounding grows: 9.5e-13 was the most."""
    got, wanted = (
        merge(pool(case.ranks).run("tests.parity:run", one)) for one in (replace(case, engine="sharded"), case)
    )
    assert {k: v for k, v in differences(got, wanted).items() if not v <= 1e-10} == {}
    assert got.get("decided") == wanted.get("decided")


def measure(case: Case) -> tuple[int, int, list[str]]:
    """Do two steps; return the bytes of optimiser states here, those of reductions everywhere, and gradients here."""
    mesh = mesh_of(case.num_experts, case.ranks, case.ep_size)
    wire = Wire(mesh.device)
    mixture = make_mixture(case, mesh, wire)
    engine = make_engine(case, mixture, mesh, wire)
    assert isinstance(engine, Native)
    loader = Loader(data(), case.batch_size, SEED, 0, mesh.rank, mesh.world_size)
    for step in range(2):
        engine.zero_grad()
        wire.meter.reset()
        outcome = mixture.backward(loader.batch(0, step), make_objective(case), Moment(SEED, 0, step))
        totals = engine.step(outcome, step)
    states = [t for o in engine.optimizers.values() for state in o.state.values() for t in state.values() if t.ndim]
    held = sum(t.numel() * t.element_size() for t in states)
    if case.engine != "native":
        own_T, shared_T = ([t.numel() * t.element_size() for t in c.tensors] for c in (engine.own, engine.shared))
        own = owned_bytes(own_T, [0] * mesh.placement.num_replicas)[mesh.replica]
        shared = owned_bytes(shared_T, gather_json(own, mesh.world))[mesh.rank]
        assert held == 2 * (own + shared), "what Adam holds is what the formula says"
    kept = [
        f"{o.name} {n}" for o in mixture.parts.owned() for n, p in o.module.named_parameters() if p.grad is not None
    ]
    return held, totals.meter["sync_bytes"], kept


@pytest.mark.parametrize("execution", ["loop", "stacked"])
@pytest.mark.parametrize(("layout", "share"), [((2, 2), 1.0), ((2, 1), 0.55), ((4, 2), 0.55), ((4, 1), 0.35)], ids=str)
def test_states_have_one_owner(
    pool: Callable[[int], Pool], layout: tuple[int, int], share: float, execution: str
) -> None:
    """The layout (ranks, ep_size) leaves each expert ranks / ep_size replicas."""
    case = case_of(layout, execution=execution)
    plain, sharded = (
        pool(case.ranks).run("tests.test_sharding:measure", replace(case, engine=engine))
        for engine in ("native", "sharded-offloaded")
    )
    assert max(bytes_ for bytes_, _, _ in sharded) <= share * max(bytes_ for bytes_, _, _ in plain)
    ((one, _, names),) = pool(1).run("tests.test_sharding:measure", replace(case, ranks=1, ep_size=1))
    assert sum(bytes_ for bytes_, _, _ in sharded) == one
    # Gradients are where they are stepped, once each; sending them there and values back is one reduction's traffic.
    assert sorted(name for _, _, kept in sharded for name in kept) == sorted(names)
    assert abs(sharded[0][1] - plain[0][1]) <= 4 * case.ranks  # a count rounded down on each rank


def test_owners_are_balanced_by_bytes() -> None:
    assert balanced([1, 1, 1, 1], [0, 0]) == [0, 1, 0, 1]
    assert balanced([30, 5, 40, 10], [0, 0]) == [1, 0, 0, 1]
    assert balanced([5, 5, 5], [100, 0, 7]) == [1, 1, 2]
    assert balanced([], [0, 0]) == []


def broken_row(case: Case, bad_rank: int) -> tuple[str, bool]:
    """Train a step in which one rank's gate breaks; return what is said, and whether anything moved."""
    mesh = mesh_of(case.num_experts, case.ranks, case.ep_size)
    wire = Wire(mesh.device)
    mixture = make_mixture(case, mesh, wire)
    engine = make_engine(case, mixture, mesh, wire)
    parameters = [p for owned in mixture.parts.owned() for p in owned.module.parameters()]
    before = [p.detach().clone() for p in parameters]
    outcome = mixture.backward(
        Loader(data(), 16, SEED, 0, mesh.rank, mesh.world_size).batch(0, 0), make_objective(case), Moment(SEED)
    )
    broken = parameters[0] if bad_rank == 0 else parameters[-1]
    if mesh.rank == bad_rank:
        assert broken.grad is not None
        broken.grad.flatten()[0] = torch.nan
    try:
        engine.step(outcome, 5)
    except NotFinite as error:
        return str(error), not all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    return "nothing was seen", True


@pytest.mark.parametrize(("bad_rank", "name"), [(0, "gate"), (2, "expert 1"), (3, "expert 3")])
def test_every_rank_hears_of_a_gradient_that_is_not_finite(
    pool: Callable[[int], Pool], bad_rank: int, name: str
) -> None:
    for said, moved in pool(4).run("tests.test_sharding:broken_row", case_of((4, 2), engine="sharded"), bad_rank):
        assert said.startswith(f"step 5: the gradient of {name} is not finite")
        assert not moved


@pytest.mark.parametrize("shard", ["none", "optimizer"])
def test_values_written_between_steps_are_stepped_from(shard: Any) -> None:
    """Initialisers write to parameters when the engine is there already."""
    ended = []
    for offload in ("none", "optimizer"):
        torch.manual_seed(0)
        made = Parts({"gate": nn.Linear(3, 2)}, {0: nn.Linear(2, 2)})
        mesh = Mesh(Placement.plan(1, 1), Launch(), torch.device("cpu"))
        engine = Native(made, mesh, Wire(mesh.device), torch.optim.Adam, shard=shard, offload=offload)  # type: ignore[arg-type]
        for step in range(3):
            engine.zero_grad()
            made.shared["gate"](torch.ones(1, 3)).sum().backward()
            engine.step(Outcome(torch.zeros(()), {}), step)
            nn.init.constant_(made.experts[0].weight, step)  # type: ignore[arg-type]
        ended.append([p.detach().clone() for owned in made.owned() for p in owned.module.parameters()])
        stepped = [p for o in engine.optimizers.values() for group in o.param_groups for p in group["params"]]
        assert all(p.device.type == "cpu" for p in stepped)
        assert (stepped[0] is made.shared["gate"].weight) == (offload == "none")
    assert all(torch.equal(a, b) for a, b in zip(*ended, strict=True))


def travel(case: Case, root: str, steps: int) -> list[float]:
    """Go on from the newest checkpoint, if there is one, for some steps, and save; return their losses."""
    mesh = mesh_of(case.num_experts, case.ranks, case.ep_size)
    mixture = make_mixture(case, mesh, Wire(mesh.device))
    adam = functools.partial(torch.optim.Adam, lr=0.01, amsgrad=True)
    schedule = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=30)
    phase = Phase(9, 16, objective=make_objective(case), optimizer=adam, schedule=schedule, ema=0.6)
    trainer = Trainer(mixture, data(), [phase], ENGINES[case.engine], log_every=1)
    store = CheckpointStore(Path(root), mesh, keep=9)
    if saved := store.found():
        trainer.load(saved[0], read_state(saved[0]))
    records = [trainer.advance().record for _ in range(steps)]
    store.save(trainer.total, trainer.save())
    trainer.end()
    return [record["loss"] for record in records if record]


def tensors(root: Path) -> dict[str, Tensor]:
    """Give all tensors of all checkpoints, weights and states."""
    return {
        f"{path.parent.name} {path.stem} {k}": v.double()
        for path in root.glob("step-*/*.safetensors")
        for k, v in load_file(path).items()
    }


WAYS: dict[str, Sequence[str]] = {
    "there and back": ["native", "sharded", "native", "sharded-offloaded", "native"],
    "from the first": ["sharded-offloaded", "native", "sharded", "offloaded", "sharded"],
}
STAGES = [((2, 2), "loop"), ((4, 2), "stacked"), ((1, 1), "loop"), ((2, 1), "loop"), ((4, 1), "stacked")]


def test_a_run_changes_its_engine_at_a_checkpoint(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    """Both ways, on other layouts and executions; every checkpoint on the way is the plain engine's."""
    ways = {"plain": ["native"] * len(STAGES), **WAYS}
    for name, engines in ways.items():
        for (layout, execution), engine in zip(STAGES, engines, strict=True):
            case = case_of(layout, execution=execution, engine=engine, num_experts=5)
            pool(case.ranks).run("tests.test_sharding:travel", case, str(tmp_path / name), 4)
    wanted = tensors(tmp_path / "plain")
    assert len({name.split()[0] for name in wanted}) == len(STAGES)
    for name in WAYS:
        found = tensors(tmp_path / name)
        assert found.keys() == wanted.keys()
        wrong = {k: (found[k] - b).abs().max().item() / (b.abs().max().item() or 1.0) for k, b in wanted.items()}
        assert {k: v for k, v in wrong.items() if not v <= 1e-10} == {}


def test_checkpoints_are_the_same_files(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    """Byte for byte where sums are in one order."""
    for engine in ("native", "sharded-offloaded"):
        case = case_of((2, 1), engine=engine)
        pool(2).run("tests.test_sharding:travel", case, str(tmp_path / engine), 3)
    plain, sharded = (sorted((tmp_path / engine).glob("*/*")) for engine in ("native", "sharded-offloaded"))
    assert [path.name for path in plain] == [path.name for path in sharded]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(plain, sharded, strict=True))


ENGINE = {"class_path": "mixdist.engines.Native", "init_args": {"shard": "optimizer", "offload": "optimizer"}}


def test_a_config_names_it_and_a_resume_leaves_it(folder: Path) -> None:
    """Two ranks shard, one process goes on without; the same run as one that did neither."""
    plain = write_config(folder / "plain.yaml", changed(dtype="float64", train__epochs=2))
    config = write_config(folder / "sharded.yaml", changed(dtype="float64", engine=ENGINE, mesh={"ep_size": 1}))
    ended = together("train", "--config", config, "--out", "run", ranks=2, folder=folder)
    assert ended.code == 0, ended.err
    words = ["--train.epochs", "2", "--engine.shard", "none", "--engine.offload", "none", "--mesh.ep_size", "null"]
    ended = here("train", "--resume", "run", *words)
    assert ended.code == 0, ended.err
    assert here("train", "--config", plain, "--out", "whole").code == 0
    for path in Path("whole/checkpoints/step-000000006").glob("*.safetensors"):
        mine, theirs = load_file(Path("run/checkpoints/step-000000006") / path.name), load_file(path)
        assert mine.keys() == theirs.keys()
        for name, b in theirs.items():
            assert (mine[name] - b).abs().max() <= 1e-10 * b.abs().max(), name


@pytest.mark.parametrize(("option", "value"), [("shard", "gradients"), ("offload", "parameters"), ("shards", "none")])
def test_bad_options_are_one_line(folder: Path, option: str, value: str) -> None:
    engine = {"class_path": "mixdist.engines.Native", "init_args": {option: value}}
    config = write_config(folder / "c.yaml", changed(engine=engine))
    said = refused("train", "--config", config, "--out", "run", names=f"engine {option}")
    assert option == "shards" or ("none" in said and "optimizer" in said)


def test_options_are_checked_without_a_config() -> None:
    mesh = Mesh(Placement.plan(1, 1), Launch(), torch.device("cpu"))
    made = Parts({"gate": nn.Linear(3, 2)}, {0: nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"engine\.shard \(all\) must be none or optimizer"):
        Native(made, mesh, Wire(mesh.device), torch.optim.Adam, shard="all")  # type: ignore[arg-type]
    captured = functools.partial(torch.optim.Adam, capturable=True)
    with pytest.raises(ValueError, match=r"engine\.offload .* capturable"):
        Native(made, mesh, Wire(mesh.device), captured, offload="optimizer")
