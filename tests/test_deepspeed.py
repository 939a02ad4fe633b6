"""DeepSpeed as an engine: native's run to float32's rounding, the same files, computed bytes, the same ends.

Ranks are forked from a process that has imported DeepSpeed: each by itself would take seconds for it.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mixdist.engines import DeepSpeed, Native
from mixdist.engines.engine import takes_stacks
from mixdist.noise import Moment
from mixdist.parallel import costs
from mixdist.parallel.launch import Launch
from mixdist.parallel.mesh import Mesh, Placement
from mixdist.parallel.wire import Wire
from mixdist.terms import Outcome, Parts
from tests.forks import environment, warm
from tests.launch import HANG_S, HARD, ROOT, Forks, Started, changed, descendants, here, refused, together, write_config
from tests.parity import (
    ENGINES,
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
from tests.test_lost import check_ended, free_port, lose_a_rank
from tests.test_parity import case_of, models
from tests.test_sharding import tensors

INSTALLED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(
    not INSTALLED, reason="deepspeed is not installed: pip install 'mixdist[deepspeed]'"
)

ROUNDING = 1e-6
"""Of 20 steps in float32, by the rule of tests/parity.py; most weights do not differ at all. The most was 1.3e-7 on one
processor and 7.3e-7 on another, whose kernels round otherwise; contract 1 has 1e-5."""
ANOTHER_ORDER = 1e-4
"""Where more than two ranks sum slices by themselves, in another order; Adam divides by gradients near 0: 6.3e-5."""


def ready(device: str = "cpu") -> None:
    """Import what each rank would."""
    os.environ["DS_ACCELERATOR"] = device
    warm("deepspeed.moe.layer", "deepspeed.runtime.zero.muon.original_muon")


@pytest.fixture(scope="module")
def pools() -> Iterator[Callable[[int], Pool]]:
    """Return a function that gives the pool of a world size: ranks that have DeepSpeed."""
    ready()
    made = {n: Pool(n) for n in (2, 4)}
    yield made.__getitem__
    for one in made.values():
        one.close()


def case(layout: tuple[int, int], **options: Any) -> Case:
    return case_of(layout, **{"dtype": "float32", "num_experts": 5, "steps": 6, **options})


# What the brief of this engine names, then every family; each with engines in turn.
CASES: dict[str, Case] = {
    "adam": case((2, 2), num_experts=4),
    "clipped sgd": case((4, 2), optimizer="clipped-sgd"),
    "adamw, cosine, accumulated": case((2, 1), optimizer="scheduled-adamw", accumulate=2),
    "more experts than ranks": case((2, 2), expert="unlike", balance="kl"),
    "replicas": case((4, 2)),
    "no experts apart": case((2, 1), memory="recompute"),
    "starved top-2": case((2, 2), gate="starved", routing="top2", batch_size=13),
    "one-way": case((2, 2), way="ahead", prefetch=True, expert="gaussian"),
    "uneven batches": case((4, 4), batch_size=3, optimizer="clipped-sgd"),
    "gate alone": case((4, 2), trains="gate", gate="conv"),
    "experts alone": case((2, 1), trains="experts"),
    "parts of experts": case((4, 2), trains="decoder", expert="gaussian"),
    "two stages": case((4, 2), family="two-stage"),
    "one decoder": case((2, 2), family="mvae", gate="gaussian-each", balance="dhsic", objective="mean"),
    "components that go off": case((4, 2), family="mvae", gate="gumbel-each-off", balance="dhsic", steps=8),
    "modalities": case((2, 2), family="mmvae", num_experts=3, gate="dreg-looser", expert="laplace"),
    "modalities in one": case((4, 2), family="poe", num_experts=3),
    "modalities and subsets": case((4, 2), family="mopoe", num_experts=3),
    "a gate that is a model": case((4, 2), gate="vade", objective="mixture", expert="regressor", balance="none"),
    "a model and no experts": case((2, 2), gate="dmvae", objective="gate", expert="silent", balance="none"),
}
STAGES = ("zero0", "zero1", "zero2", "zero1-offloaded", "zero2-offloaded", "zero2-buckets")
QUICK = {
    "adam": ("zero1",),
    "clipped sgd": ("zero2",),
    "adamw, cosine, accumulated": ("zero2-buckets",),
    "more experts than ranks": ("zero1",),
    "replicas": ("zero0", "zero1-offloaded"),
    "starved top-2": ("zero1",),
    "one-way": ("zero2-offloaded",),
    "experts alone": ("zero1",),
    "parts of experts": ("zero1",),
    "two stages": ("zero2",),
    "one decoder": ("zero1",),
    "components that go off": ("zero2",),
    "modalities": ("zero2",),
    "a model and no experts": ("zero2",),
}
WANTED: dict[Case, dict[str, Any]] = {}


def run(pools: Callable[[int], Pool], one: Case) -> dict[str, Any]:
    """Run a case, and leave out gradients: they are gone where another rank steps."""
    report = merge(pools(one.ranks).run("tests.parity:run", one))
    return report | {"speaks": {name: t for name, t in report["speaks"].items() if name.split()[0] != "gradient"}}


def check(pools: Callable[[int], Pool], one: Case, engine: str) -> None:
    """Check an engine against native on the same layout: ranks sum in the same order."""
    if one not in WANTED:
        WANTED[one] = run(pools, one)
    got, wanted = run(pools, replace(one, engine=engine)), WANTED[one]
    limit = ANOTHER_ORDER if engine == "zero2-buckets" and one.ranks > 2 else ROUNDING
    assert {name: v for name, v in differences(got, wanted).items() if not v <= limit} == {}
    assert got.get("decided") == wanted.get("decided")
    assert got["bytes"] == wanted["bytes"]


@needs_deepspeed
@pytest.mark.parametrize(("name", "engine"), [(name, engine) for name in QUICK for engine in QUICK[name]])
def test_it_is_native_s_run(pools: Callable[[int], Pool], name: str, engine: str) -> None:
    check(pools, CASES[name], engine)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("engine", STAGES)
def test_every_case_is_native_s_run_under_every_stage(pools: Callable[[int], Pool], engine: str) -> None:
    for one in CASES.values():
        check(pools, replace(one, steps=20), engine)
    for one, layout in product(models(), ((2, 2), (4, 2))):
        check(pools, replace(one, ranks=layout[0], ep_size=layout[1], dtype="float32"), engine)


WAYS = {
    "through zero 1 and 2": ["native", "zero1", "zero2", "sharded", "native"],
    "from zero 2": ["zero2", "native", "zero1-offloaded", "zero0", "native"],
}
LAYOUTS = [(2, 2), (4, 2), (2, 2), (4, 2), (1, 1)]


def journey(pools: Callable[[int], Pool], root: Path, engines: Sequence[str]) -> list[float]:
    """Train a few steps under each engine, on each layout, from one checkpoint to the next; return all losses."""
    losses: list[float] = []
    for layout, engine in zip(LAYOUTS, engines, strict=True):
        pool = pools(layout[0]) if layout[0] > 1 else Pool(1)
        losses += pool.run("tests.test_sharding:travel", case(layout, engine=engine), str(root), 3)[0]
    return losses


@needs_deepspeed
@pytest.mark.parametrize("way", ["through zero 1 and 2", pytest.param("from zero 2", marks=pytest.mark.slow)])
def test_a_run_changes_its_engine_at_a_checkpoint(pools: Callable[[int], Pool], tmp_path: Path, way: str) -> None:
    """Both ways, on other layouts; every checkpoint on the way, weights and states, is native's."""
    plain = journey(pools, tmp_path / "native", ["native"] * len(LAYOUTS))
    assert journey(pools, tmp_path / "way", WAYS[way]) == pytest.approx(plain, rel=1e-6)
    assert len(plain) == 3 * len(LAYOUTS)
    found, wanted = tensors(tmp_path / "way"), tensors(tmp_path / "native")
    assert len({name.split()[0] for name in wanted}) == len(LAYOUTS)
    assert found.keys() == wanted.keys()
    wrong = {k: (found[k] - b).abs().max().item() / (b.abs().max().item() or 1.0) for k, b in wanted.items()}
    assert {k: v for k, v in wrong.items() if not v <= 1e-5} == {}


def measure(one: Case) -> tuple[int, list[tuple[int, int]], int]:
    """Do a step; return the bytes of what the optimiser has here, what it steps, and the bytes sent for that."""
    mesh = mesh_of(one.num_experts, one.ranks, one.ep_size)
    wire = Wire(mesh.device)
    mixture = make_mixture(one, mesh, wire)
    engine = make_engine(one, mixture, mesh, wire)
    wire.meter.reset()
    rows = Loader(data(), one.batch_size, 11, 0, mesh.rank, mesh.world_size).batch(0, 0)
    outcome = mixture.backward(rows, make_objective(one), Moment(11))
    before = wire.meter.sync_bytes
    engine.step(outcome, 0)
    assert isinstance(engine, DeepSpeed)
    states = [t for state in engine.steps.optimizer.state.values() for t in state.values()]
    masters = (
        [p for group in engine.steps.optimizer.param_groups for p in group["params"]] if one.engine != "zero0" else []
    )
    numbers = [
        sum(p.numel() for owned, ps in engine.trained if (owned.expert is None) == shared for p in ps)
        for shared in (True, False)
    ]
    held = list(zip(numbers, (one.ranks, mesh.placement.num_replicas), strict=True))
    sent = wire.meter.sync_bytes - before
    engine.close()
    return sum(t.numel() * t.element_size() for t in (*states, *masters)), held, sent


@needs_deepspeed
@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2"])
@pytest.mark.parametrize("layout", [(2, 2), (4, 2)], ids=str)
def test_bytes_are_those_computed(pools: Callable[[int], Pool], layout: tuple[int, int], engine: str) -> None:
    one = case(layout, engine=engine)
    for bytes_, held, sent in pools(layout[0]).run("tests.test_deepspeed:measure", one):
        computed = costs.zero_bytes(held, int(engine[-1]), states=2)
        assert abs(bytes_ - computed) <= 0.02 * computed
        reduced = sum(costs.reduction(4 * numbers, ranks) for numbers, ranks in held)
        assert reduced <= sent <= reduced + 2000  # with the totals


def test_cost_functions() -> None:
    assert costs.zero_bytes([(100, 4), (10, 2)], 0, 2) == 880
    assert costs.zero_bytes([(100, 4), (10, 2)], 1, 2) == 12 * (26 + 6)
    assert costs.reduction(100, 1) == 0
    assert costs.reduction(100, 4) == 150


@needs_deepspeed
@pytest.mark.parametrize(
    ("engine", "bad_rank", "name"), [("zero0", 3, "expert 4"), ("zero1", 0, "gate"), ("zero2-offloaded", 3, "expert 4")]
)
def test_every_rank_hears_of_a_gradient_that_is_not_finite(
    pools: Callable[[int], Pool], engine: str, bad_rank: int, name: str
) -> None:
    for said, moved in pools(4).run("tests.test_sharding:broken_row", case((4, 2), engine=engine), bad_rank):
        assert said.startswith(f"step 5: the gradient of {name} is not finite")
        assert not moved


def stepped(engine: str) -> tuple[list[torch.Tensor], list[str]]:
    """Step after a step that failed and after values written in between; return values, states, and what is left."""
    torch.manual_seed(0)
    made, mesh = Parts({"gate": nn.Linear(3, 2)}, {0: nn.Linear(2, 2)}), mesh_of(1, 2, 1)
    made.experts[0].scale = nn.Parameter(torch.ones(()))
    parameters = [p for owned in made.owned() for p in owned.module.parameters()]
    one = ENGINES[engine](made, mesh, Wire(mesh.device), torch.optim.Adagrad, None, None)
    for step in range(4):
        one.zero_grad()
        with one.accumulating():
            for _ in range(2):
                made.experts[0](made.shared["gate"](torch.ones(1, 3)) * made.experts[0].scale).sum().backward()
        if step == 1:
            made.shared["gate"].bias.grad[0] = torch.nan  # type: ignore[union-attr, index]
            with pytest.raises(ValueError, match=r"step 1: the gradient of gate is not finite"):
                one.step(Outcome(torch.zeros(()), {}), step)
            continue
        one.step(Outcome(torch.zeros(()), {}), step)
        nn.init.constant_(made.experts[0].weight, step)  # type: ignore[arg-type]
    one.gather()
    states = [one.optimizer_state(owned) if mesh.rank == 0 else {} for owned in made.owned()]
    one.close()
    values = [*(p.detach().clone() for p in parameters), *(state[name] for state in states for name in sorted(state))]
    return values, sorted({name for p in parameters for name in vars(p)})


@needs_deepspeed
def test_steps_that_fail_values_that_are_written_and_states_made_at_once(pools: Callable[[int], Pool]) -> None:
    """With a parameter without dimensions; nothing is left on parameters."""
    (wanted, _), _ = pools(2).run("tests.test_deepspeed:stepped", "native")
    assert len(wanted) == 5 + 2 * 5
    for engine in STAGES:
        (found, left), _ = pools(2).run("tests.test_deepspeed:stepped", engine)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), engine
        assert left == []


# From a config


ENGINE = {"class_path": "mixdist.engines.DeepSpeed", "init_args": {"zero": 1}}


def config_of(folder: Path, **init_args: Any) -> str:
    """Write the config of a run under DeepSpeed."""
    engine = {**ENGINE, "init_args": {"zero": 1, **init_args}}
    pretrain = [{"epochs": 1, "batch_size": 1000, "trains": "gate"}]  # two phases: two engines
    return write_config(folder / "deepspeed.yaml", changed(engine=engine, pretrain=pretrain))


@needs_deepspeed
def test_a_config_names_it_and_so_does_a_resume(folder: Path) -> None:
    """Two ranks step with ZeRO 1, one process goes on with ZeRO 2; nothing else is printed."""
    ready()
    ended = together("train", "--config", config_of(folder), "--out", "run", ranks=2, folder=folder)
    assert (ended.code, ended.err) == (0, ""), ended
    assert ended.out.startswith("expert  rows")
    assert "eepspeed" not in ended.out
    assert "execution: loop" in Path("run/config.yaml").read_text()
    back = {**ENGINE, "init_args": {"zero": 2, "offload": "optimizer"}}
    words = ["train", "--resume", "run", "--engine", json.dumps(back), "--train.epochs", "2"]
    with Forks(["mixdist", *words], folder, {}) as started:
        ended = started.end()
    assert (ended.code, ended.err) == (0, ""), ended
    saved = load_file("run/checkpoints/step-000000008/gate.safetensors")
    assert {float(t) for name, t in saved.items() if name.endswith(".step")} == {6}


@pytest.mark.parametrize(
    ("engine", "changes", "names"),
    [
        ({"zero": 3}, {}, "engine.zero 3 0, 1 or 2 mixdist.engines.FSDP"),
        ({"zero": 2}, {"dtype": "float64"}, "dtype float64 float32 mixdist.engines.Native"),
        ({}, {"execution": "stacked"}, "mixture.execution stacked DeepSpeed loop"),
        ({"allgather_bucket_size": 5}, {}, "engine allgather_bucket_size"),
        (
            {"zero": 2},
            {"train__optimizer": {"class_path": "torch.optim.Adafactor"}},
            "train.optimizer (Adafactor) engine.zero (2)",
        ),
    ],
    ids=["zero", "dtype", "execution", "unknown", "optimiser of shapes"],
)
def test_what_it_cannot_do_is_one_line(
    folder: Path, engine: dict[str, Any], changes: dict[str, Any], names: str
) -> None:
    config = changed(engine={**ENGINE, "init_args": engine}, **changes)
    refused("train", "--config", write_config(folder / "c.yaml", config), "--out", "run", names=names)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"zero": 0, "offload": "optimizer"}, r"engine.offload \(optimizer\) needs engine.zero 1 or 2"),
        ({"offload": "cpu"}, r"engine.offload \(cpu\) must be none or optimizer"),
        ({"pin_memory": True}, r"engine.pin_memory \(true\) needs engine.offload"),
        ({"reduce_bucket_size": 0}, r"engine.reduce_bucket_size \(0\)"),
        ({"offload": "optimizer", "capturable": True}, r"engine.offload .* capturable"),
        ({"dtype": torch.bfloat16}, r"dtype \(bfloat16\) of expert 0 .*compute\.bf16"),
    ],
    ids=str,
)
def test_options_are_checked_without_a_config(options: dict[str, Any], told: str) -> None:
    mesh = Mesh(Placement.plan(1, 1), Launch(), torch.device("cpu"))
    made = Parts({"gate": nn.Linear(3, 2)}, {0: nn.Linear(2, 2, dtype=options.pop("dtype", None))})
    adam = functools.partial(torch.optim.Adam, capturable=options.pop("capturable", False))
    with pytest.raises(ValueError, match=told):
        DeepSpeed(made, mesh, Wire(mesh.device), adam, **options)


def test_a_competition_refuses_it_in_one_line(folder: Path) -> None:
    config = write_config(folder / "c.yaml", changed(HARD, engine=ENGINE))
    refused(
        "train",
        "--config",
        config,
        "--out",
        "run",
        names="engine (DeepSpeed) competition mixdist.engines.Native leave out",
    )


@pytest.mark.parametrize("version", [None, (0, 19, 7)])
def test_without_it_one_line_names_the_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...] | None
) -> None:
    found: Any = None
    if version is not None:
        found = types.ModuleType("deepspeed")
        names = ("major", "minor", "patch")
        vars(found).update({f"__version_{name}__": number for name, number in zip(names, version, strict=True)})
        found.__version__ = ".".join(map(str, version))
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("deepspeed", "deepspeed.moe", "deepspeed.moe.layer"):
        monkeypatch.setitem(sys.modules, name, found)
    said = refused("train", "--config", config_of(folder), "--out", "run", names="deepspeed mixdist[deepspeed]")
    assert version is None or found.__version__ in said


def test_execution_is_not_chosen_where_no_stack_can_run() -> None:
    assert takes_stacks(None)
    assert takes_stacks(Native)
    assert takes_stacks(functools.partial(Native, shard="optimizer"))
    assert not takes_stacks(DeepSpeed)
    assert not takes_stacks(functools.partial(lambda kind, **options: kind, DeepSpeed, zero=2))


def test_it_is_imported_where_it_is_used() -> None:
    """Inside of functions: ``mixdist --help`` is quick."""
    for path in (ROOT / "mixdist" / "engines" / "deepspeed").glob("*.py"):
        outside = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not [node for node in outside if "deepspeed" in [name.name.partition(".")[0] for name in node.names]]


# Launchers and ends


@needs_deepspeed
@pytest.mark.slow
def test_the_launcher_of_deepspeed_starts_it(folder: Path) -> None:
    """As its users call it: it adds --local_rank, and says how many ranks a host has in LOCAL_SIZE."""
    config = config_of(folder)
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        "2",
        "--master_port",
        free_port(),
    ]
    env = environment(DS_ACCELERATOR="cpu")
    words = ["--module", "mixdist", "train", "--config", config, "--out", "run"]
    ended = subprocess.run([*command, *words], env=env, timeout=HANG_S, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert Path("run/checkpoints/step-000000005").is_dir()
    assert Path("run/config.yaml").read_text().count("mixdist.engines.DeepSpeed") == 1


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL], ids=str)
def test_ranks_end_with_the_command_that_started_their_launcher(folder: Path, sent: signal.Signals) -> None:
    """DeepSpeed's own launcher would go on."""
    config, metrics = config_of(folder), folder / "run" / "metrics.jsonl"
    words = [
        "deepspeed.launcher.runner",
        "--num_accelerators",
        "2",
        "--master_port",
        free_port(),
        "--module",
        "mixdist",
    ]
    words += ["train", "--config", config, "--out", "run", "--train.epochs", "5000"]
    with Started(words, folder, {"DS_ACCELERATOR": "cpu"}) as run:
        run.until(lambda: metrics.exists() and metrics.stat().st_size > 0)
        ranks = descendants(run.process.pid)
        assert len(ranks) >= 3
        os.kill(run.process.pid, sent)
        run.process.wait()
        check_ended(*ranks)


def test_what_the_launcher_adds_is_left_out() -> None:
    assert here("--local_rank=0", "--help") == here("--help")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP], ids=str)
def test_a_lost_rank_is_named_and_nobody_waits_for_it(tmp_path: Path, sent: signal.Signals) -> None:
    """As under native, within mesh.timeout_s."""
    ready()
    lose_a_rank(tmp_path, sent, 1, f"--engine={json.dumps(ENGINE)}")
