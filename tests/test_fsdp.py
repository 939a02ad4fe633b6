"""Experts that are cut over their replicas by ``fully_shard``: the same run, fewer bytes, the same files."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mixdist.data import Loader
from mixdist.engines import FSDP, Native, NotFinite
from mixdist.engines.sharding import units
from mixdist.mixtures.schedules import anneal
from mixdist.noise import Moment
from mixdist.parallel.agreement import Agreed
from mixdist.parallel.costs import cut_step, part_numbers, part_rows
from mixdist.parallel.launch import Launch
from mixdist.parallel.mesh import Mesh, Placement
from mixdist.parallel.wire import Wire
from mixdist.terms import Outcome, Parts
from tests.covering import every_value
from tests.launch import HARD, begin, changed, here, refused, together, torchrun, write_config
from tests.parity import (
    SEED,
    Case,
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
from tests.test_sharding import tensors

ROUNDING = 1e-12
"""Of the cases here in float64, by the rule of tests/parity.py; sums over replicas are in another order."""

few = functools.partial(case_of, steps=5)
CASES = [
    few((2, 1), engine="fsdp", optimizer="scheduled-adamw", gate="starved", routing="top2"),
    few((2, 1), engine="fsdp", objective="mixture", accumulate=3),
    few((4, 2), engine="fsdp", routing="top2", gate="starved", num_experts=5, batch_size=3),
    few((4, 2), engine="fsdp-offloaded", optimizer="clipped-sgd", expert="gaussian", batch_size=13, memory="again"),
    few((4, 1), engine="fsdp", optimizer="clipped-sgd", routing="top1", way="ahead", num_experts=3),
    few((4, 2), engine="fsdp-whole", family="mvae", gate="gaussian-each", balance="dhsic", objective="mean"),
    case_of((2, 1), engine="fsdp", family="mvae", gate="gumbel-each-off", balance="dhsic", num_experts=5, steps=8),
    few((2, 1), engine="fsdp", family="mmvae", num_experts=3, gate="dreg-looser", expert="normal", objective="private"),
    few((4, 1), engine="fsdp", optimizer="clipped-sgd", expert="gaussian", trains="decoder"),
    few((2, 2), engine="fsdp"),
]
SLOW = [
    case_of((2, 1), engine="fsdp", expert="conv", objective="mixture", accumulate=3),
    case_of((4, 1), engine="fsdp", optimizer="clipped-sgd", expert="conv", routing="top1", way="ahead", num_experts=3),
    case_of((2, 1), engine="fsdp", expert="gaussian", optimizer="clipped-sgd", accumulate=3, prefetch=True),
    case_of((4, 1), engine="fsdp", optimizer="scheduled-adamw", expert="unlike", num_experts=5),
    case_of((4, 2), engine="fsdp", expert="conv", optimizer="clipped-sgd", batch_size=3),
    case_of((4, 1), engine="fsdp", family="two-stage", num_experts=5, optimizer="clipped-sgd"),
    case_of(
        (4, 2), engine="fsdp", family="mvae", gate="gaussian-each", balance="dhsic", objective="mean", accumulate=2
    ),
]
MODALITIES: dict[str, Any] = {"expert": "normal", "balance": "absent", "objective": "private", "engine": "fsdp"}
SLOW += [
    case_of((2, 1), family="mmvae", num_experts=2, gate="dreg-looser", accumulate=3, **MODALITIES),
    case_of((4, 2), family="mopoe", num_experts=3, gate="stl-tighter", batch_size=3, **MODALITIES),
    case_of((4, 1), family="poe", num_experts=2, gate="iwae-looser", **MODALITIES),
]


def compare(pool: Callable[[int], Pool], case: Case, tolerance: float) -> None:
    got, wanted = (
        merge(pool(case.ranks).run("tests.parity:run", one)) for one in (case, replace(case, engine="native"))
    )
    assert {k: v for k, v in differences(got, wanted).items() if not v <= tolerance} == {}
    assert got.get("decided") == wanted.get("decided")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_same_run_as_the_plain_engine_s(pool: Callable[[int], Pool], case: Case) -> None:
    compare(pool, case, ROUNDING)


def replicated() -> list[Case]:
    """Return the covering cases with replicas that the engine takes."""
    cases = [*(case_of(**row) for row in every_value(COVERING)), *TWO_STAGES[::3], *models()]
    cases = [case for case in cases if case.ranks > case.ep_size]
    return [replace(c, execution="loop", memory="again" if c.memory == "recompute" else "whole") for c in cases]


@pytest.mark.slow
@pytest.mark.parametrize("case", [*SLOW, *(replace(case, engine="fsdp") for case in replicated())], ids=str)
def test_every_covering_case_with_replicas_is_the_same_run(pool: Callable[[int], Pool], case: Case) -> None:
    """Where Adam divides by a gradient near 0, rounding grows."""
    compare(pool, case, 1e-10)


def measure(case: Case) -> tuple[list[int], list[int], int]:
    """Do two steps; return what an expert holds here, its shapes' cost, and what it leaves behind.

    Bytes of values, gradients and states of the experts here, the same by the pure functions, and bytes that reductions
    send in a step but for those of what is shared.
    """
    mesh = mesh_of(case.num_experts, case.ranks, case.ep_size)
    wire = Wire(mesh.device)
    mixture = make_mixture(case, mesh, wire)
    wholes = [p for owned in mixture.parts.owned() if owned.expert is not None for p in owned.module.parameters()]
    shapes = [list(p.shape) for p in wholes]
    engine = make_engine(case, mixture, mesh, wire)
    loader = Loader(data(), case.batch_size, SEED, 0, mesh.rank, mesh.world_size)
    for step in range(2):
        wire.meter.reset()
        engine.zero_grad()
        outcome = mixture.backward(loader.batch(0, step), make_objective(case), Moment(SEED, 0, step))
        sent = wire.meter.sync_bytes
        engine.step(outcome, step)
    assert isinstance(engine, FSDP)
    assert sum(p.untyped_storage().nbytes() for p in wholes) == 0
    held = [0, 0, 0]
    for owned, pieces in engine.trained:
        if owned.expert is not None:
            states = engine.optimizers[owned.name].state
            held[0] += sum(p.numel() * p.element_size() for p in pieces)
            held[1] += sum(p.grad.numel() * p.element_size() for p in pieces if p.grad is not None)
            held[2] += sum(t.numel() * t.element_size() for p in pieces for t in states[p].values() if t.ndim)
    cost = 8 * part_numbers(shapes, case.ranks // case.ep_size, mesh.replica)
    assert sent == cut_step(shapes, case.ranks // case.ep_size, 8), "what the meter counts is what the formula says"
    return held, [cost, cost, 2 * cost], sum(torch.Size(s).numel() for s in shapes) * 8 * 4


@pytest.mark.parametrize(
    ("expert", "layout"),
    [
        ("bernoulli", (2, 1)),
        ("bernoulli", (4, 1)),
        ("conv", (4, 2)),
        pytest.param("bernoulli", (4, 2), marks=pytest.mark.slow),
        pytest.param("conv", (2, 1), marks=pytest.mark.slow),
        pytest.param("conv", (4, 1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_rank_holds_its_part_of_values_gradients_and_states(
    pool: Callable[[int], Pool], layout: tuple[int, int], expert: str
) -> None:
    case = case_of(layout, engine="fsdp", expert=expert, balance="none")
    replicas, all_held = case.ranks // case.ep_size, 0
    for held, cost, whole in pool(case.ranks).run("tests.test_fsdp:measure", case):
        assert held == cost
        assert sum(held) <= 1.6 / replicas * whole  # these are small: the last of four may have few rows
        all_held += sum(held)
    assert all_held == sum(whole for _, _, whole in pool(case.ranks).run("tests.test_fsdp:measure", case)) / replicas


def test_rows_are_cut_as_torch_cuts_them() -> None:
    for num_rows in range(1, 20):
        for members in range(1, 7):
            chunks = [len(chunk) for chunk in torch.zeros(num_rows).chunk(members)]
            mine = [part_rows(num_rows, members, p) for p in range(members)]
            assert mine == chunks + [0] * (members - len(chunks))
    assert part_numbers([[512, 784], [512], []], 2, 0) == 256 * 785


def test_units_are_large_elements_of_sequences() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    block = nn.Module()
    block.layers = nn.Sequential(nn.Linear(4, 4))
    tied = nn.Linear(3, 3)
    net = nn.Sequential(inner, block, nn.Tanh(), tied, tied)
    assert list(units(net, 1)) == [block, inner[0], inner[2]]
    assert list(units(net, 4 * 20)) == [block, inner[0]]
    assert list(units(net, 81)) == []


def lives(case: Case) -> list[str]:
    """Go from whole to cut and back, twice; return what is not as it was."""
    mesh = mesh_of(case.num_experts, case.ranks, case.ep_size)
    mixture = make_mixture(case, mesh, Wire(mesh.device))
    modules = [m for owned in mixture.parts.owned() for m in owned.module.modules()]
    before = [(type(m), {k: set(v) if isinstance(v, dict) else v for k, v in vars(m).items()}) for m in modules]
    parameters = [p for m in modules for p in m._parameters.values() if p is not None]
    values = [p.detach().clone() for p in parameters]
    for _ in range(2):
        engine = make_engine(case, mixture, mesh, Wire(mesh.device))
        for _ in range(2):
            engine.zero_grad()
            assert any(type(p).__name__ == "DTensor" or hasattr(p, "full_tensor") for p in modules[-1].parameters())
            engine.ready()
        engine.zero_grad()
        engine.close()
    after = [(type(m), {k: set(v) if isinstance(v, dict) else v for k, v in vars(m).items()}) for m in modules]
    again = [p for m in modules for p in m._parameters.values() if p is not None]
    found = [str(a[0]) for a, b in zip(after, before, strict=True) if a != b]
    found += ["parameter" for a, b in zip(again, parameters, strict=True) if a is not b]
    return found + ["value" for a, b in zip(again, values, strict=True) if not torch.equal(a, b)]


def test_whole_modules_are_as_they_were(pool: Callable[[int], Pool]) -> None:
    assert pool(2).run("tests.test_fsdp:lives", case_of((2, 1), engine="fsdp", expert="conv")) == [[], []]


class Twofold(nn.Module):
    """An expert that a family asks by other methods than ``forward``, some of which call each other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Sequential(nn.Linear(3, 5), nn.Tanh()), nn.Linear(5, 3)
        self.scale, self.shift = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(3))
        self.rowless, self.empty = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.zeros(3, 0))

    def encode(self, rows: dict[str, Tensor]) -> Tensor:
        return self.inner(rows["x"]) * self.scale

    def score(self, rows: dict[str, Tensor], z: Tensor) -> Tensor:
        shift = self.shift + self.rowless.sum() + self.empty.sum()
        return (self.outer(z + self.encode(rows)) + shift - rows["x"]).square().sum(1)

    def forward(self, rows: dict[str, Tensor], times: int) -> Tensor:
        return self.width(times) * self.score(rows, self.encode(rows)) + self.shift.sum()

    def width(self, times: int) -> int:
        return 3 * times


def by_methods(kind: str) -> list[Tensor]:
    """Do three steps on rows of this rank; return the values and whether a rank without tensors may ask by itself."""
    mesh = mesh_of(1, 2, 1)
    torch.manual_seed(3)
    expert = Twofold().double()
    makes = {"fsdp": functools.partial(FSDP, unit_bytes=1), "native": Native}
    engine = makes[kind](Parts({}, {0: expert}), mesh, Wire(mesh.device), functools.partial(torch.optim.Adam, lr=0.1))
    rows = {"x": torch.linspace(0, 1, 6, dtype=torch.float64).view(2, 3) + mesh.rank}
    for step in range(3):
        engine.zero_grad()
        z = expert.encode(rows)
        (expert.score(rows, z).sum() + expert.score({"x": rows["x"] - 1}, z).sum()).backward()
        expert(rows, 2).sum().backward()
        with torch.no_grad():
            expert.score(rows, z)
        if mesh.rank:
            assert expert.width(2) == 6  # nothing is brought together
        engine.step(Outcome(torch.zeros(()), {}), step)
    engine.ready()
    return [p.detach() for p in expert.parameters()]


def test_methods_beside_forward_bring_values_together(pool: Callable[[int], Pool]) -> None:
    cut, plain = (pool(2).run("tests.test_fsdp:by_methods", kind) for kind in ("fsdp", "native"))
    for a, b in zip([p for rank in cut for p in rank], [p for rank in plain for p in rank], strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def from_outside(how: str, unit_bytes: int) -> str:
    """Run a part of an expert, or read a parameter, by itself; return what is said."""
    mesh = mesh_of(1, 2, 1)
    expert, x = Twofold(), torch.ones(2, 3)
    kept = expert.inner[0].bias
    engine = FSDP(Parts({}, {0: expert}), mesh, Wire(mesh.device), torch.optim.Adam, unit_bytes=unit_bytes)
    engine.zero_grad()
    try:
        with engine.accumulating():
            if how == "part":
                (expert.outer(expert.inner(x)).sum() + expert.score({"x": x}, torch.ones(2, 5)).sum()).backward()
            elif how == "elsewhere":
                (expert.shift + x).sum().backward()
            elif how == "alone":  # of a DTensor: that of the rows which are here
                expert.shift.detach().square().sum().item()
            elif how == "kept":  # its memory is free
                assert (kept.shape, kept.numel(), kept.dtype) == ((5,), 5, torch.float32)
                assert "inner.0.bias of expert 0" in repr(kept)
                kept.sum()
            else:
                kept.data.add_(1.0)
        engine.step(Outcome(torch.zeros(()), {}), 0)
    except Agreed as error:
        return str(error)
    finally:
        engine.close()
        assert type(kept) is nn.Parameter
        assert kept is expert.inner[0].bias
        kept.sum()
    return ""


@pytest.mark.parametrize("unit_bytes", [1, 1000])
def test_parts_run_by_themselves_and_parameters_read_elsewhere_are_refused(
    pool: Callable[[int], Pool], unit_bytes: int
) -> None:
    assert pool(2).run("tests.test_fsdp:from_outside", "part", unit_bytes) == ["", ""]
    for how in ("elsewhere", "alone", "kept", "written"):
        name = "shift" if how in ("elsewhere", "alone") else "inner.0.bias"
        for said in pool(2).run("tests.test_fsdp:from_outside", how, unit_bytes):
            assert said.startswith(f"parameter {name} of expert 0 is read where its values are not together: ")
            assert ("raise engine.unit_bytes (1)" in said) == (name != "shift" and unit_bytes == 1)
            assert "shard: optimizer" in said
            assert "\n" not in said


APART = """
from mixdist.experts import VAE


class Apart(VAE):
    def forward(self, rows, eps):
        terms = super().forward(rows, eps)
        return terms._replace(loss_R=terms.loss_R + 1e-9 * self.encoder.layers[0].weight.square().sum())
"""


@pytest.mark.slow
def test_what_ranks_without_rank_0_refuse_is_told_once(folder: Path) -> None:
    """By one of them: rank 0 has another expert, and waits for them in the middle of a step."""
    (folder / "apart.py").write_text(APART)
    experts = [{"class_path": name, "init_args": {"latent": 2}} for name in ("mixdist.experts.VAE", "apart.Apart")]
    engine = {"class_path": "mixdist.engines.FSDP", "init_args": {"unit_bytes": 1}}
    config = changed(engine=engine, mesh={"ep_size": 2}, expert=experts, num_experts=2)
    ended = torchrun("train", "--config", write_config(folder / "c.yaml", config), ranks=4, folder=folder)
    assert ended.code == 1  # torchrun's own
    (told,) = re.findall(r"mixdist: (.*)", ended.err)
    assert re.match(r"rank [13]: parameter encoder\.layers\.0\.weight of expert 1 is read where", told)
    assert not (folder / "runs").exists()


def test_what_a_schedule_reads_is_told_as_it_is() -> None:
    class Reads:
        def anneal(self, step: int) -> None:
            raise Agreed("parameter scale is read")

    with pytest.raises(Agreed, match=r"^parameter scale is read$"):
        anneal("mixture.expert", Reads(), 0)


def broken(case: Case, bad_rank: int) -> tuple[str, bool]:
    """Do a step in which one row on one rank is no number; return what is said, and whether anything moved."""
    mesh = mesh_of(case.num_experts, case.ranks, case.ep_size)
    wire = Wire(mesh.device)
    mixture = make_mixture(case, mesh, wire)
    engine = make_engine(case, mixture, mesh, wire)
    before = [p.detach().clone() for owned in mixture.parts.owned() for p in owned.module.parameters()]
    engine.zero_grad()
    batch = Loader(data(), 16, SEED, 0, mesh.rank, mesh.world_size).batch(0, 0)
    outcome = mixture.backward(batch, make_objective(case), Moment(SEED))
    if mesh.rank == bad_rank:
        assert isinstance(engine, FSDP)
        assert engine.units is not None
        grad = next(p for p in mixture.parts.experts[1].parameters()).grad
        grad.to_local().flatten()[0] = torch.nan  # type: ignore[union-attr, operator]
    said = "nothing was seen"
    try:
        engine.step(outcome, 5)
    except NotFinite as error:
        said = str(error)
    engine.ready()
    after = [p for owned in mixture.parts.owned() for p in owned.module.parameters()]
    return said, not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_every_rank_hears_of_a_gradient_that_is_not_finite(pool: Callable[[int], Pool]) -> None:
    for said, moved in pool(2).run("tests.test_fsdp:broken", case_of((2, 1), engine="fsdp"), 1):
        assert said.startswith("step 5: the gradient of expert 1 is not finite")
        assert not moved


STAGES = [((2, 2), "native"), ((4, 2), "fsdp"), ((2, 1), "sharded"), ((4, 1), "fsdp-offloaded"), ((1, 1), "native")]


def test_a_run_changes_its_engine_at_a_checkpoint(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    """On other layouts; every checkpoint on the way is the plain engine's."""
    for (layout, engine), plain in [(stage, plain) for plain in (True, False) for stage in STAGES]:
        case = case_of(layout, engine="native" if plain else engine, num_experts=5)
        pool(case.ranks).run("tests.test_sharding:travel", case, str(tmp_path / str(plain)), 3)
    wanted, found = tensors(tmp_path / "True"), tensors(tmp_path / "False")
    assert len({name.split()[0] for name in wanted}) == len(STAGES)
    assert found.keys() == wanted.keys()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}
    wrong = {k: (found[k] - b).abs().max().item() / (b.abs().max().item() or 1.0) for k, b in wanted.items()}
    assert {k: v for k, v in wrong.items() if not v <= 1e-10} == {}


ENGINE = {"class_path": "mixdist.engines.FSDP", "init_args": {"unit_bytes": 100}}


def last(run: Path) -> dict[str, Tensor]:
    newest = run / "checkpoints" / (run / "checkpoints/latest").read_text().strip()
    return {f"{path.stem} {k}": v for path in newest.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.slow
def test_a_run_is_killed_goes_on_and_leaves_the_engine(folder: Path) -> None:
    """Two ranks cut their experts, select by an evaluation after each epoch, and are killed; then two and one go on."""
    options: dict[str, Any] = {"dtype": "float64", "valid": 0.1, "select": {"monitor": "loss"}, "execution": "loop"}
    plain = write_config(folder / "plain.yaml", changed(**options, mesh={"ep_size": 1}))
    config = write_config(folder / "fsdp.yaml", changed(**options, engine=ENGINE, mesh={"ep_size": 1}))
    with begin("train", "--config", config, "--out", "run", "--train.epochs", "400", ranks=2, folder=folder) as run:
        run.until(lambda: len(list((folder / "run/checkpoints").glob("step-*[0-9]"))) >= 2)
        run.kill()
    done = int((folder / "run/checkpoints/latest").read_text().removeprefix("step-")) // 3
    epochs = ["--train.epochs", str(done + 1)]
    ended = together("train", "--resume", "run", *epochs, ranks=2, folder=folder)
    assert ended.code == 0, ended.err
    epochs = ["--train.epochs", str(done + 2)]
    ended = here("train", "--resume", "run", *epochs, "--engine", "mixdist.engines.Native", "--mesh.ep_size", "null")
    assert ended.code == 0, ended.err
    ended = here("train", "--config", plain, "--out", "whole", *epochs)
    assert ended.code == 0, ended.err
    mine, theirs = last(Path("run")), last(Path("whole"))
    assert mine.keys() == theirs.keys()
    for name, b in theirs.items():
        assert (mine[name] - b).abs().max() <= 1e-10 * b.abs().max(), name


def test_a_competition_refuses_it_in_one_line(folder: Path) -> None:
    config = write_config(folder / "c.yaml", changed(HARD, engine=ENGINE))
    refused(
        "train", "--config", config, "--out", "run", names="engine (FSDP) competition mixdist.engines.Native leave out"
    )


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"compute": {"micro_batch": 8}}, "micro_batch (8) FSDP train.accumulate"),
        ({"compute": {"channels_last": True}, "expert__init_args__network": None}, "channels_last FSDP expert"),
        ({"execution": "stacked"}, "execution (stacked) FSDP loop"),
        ({"engine": {"class_path": "mixdist.engines.FSDP", "init_args": {"unit_bytes": 0}}}, "engine.unit_bytes (0)"),
        (
            {"train__optimizer": {"class_path": "torch.optim.Adafactor"}},
            "train.optimizer (Adafactor) FSDP mixdist.engines.Native",
        ),
    ],
    ids=["pieces", "channels last", "stacked", "no bytes", "optimiser of shapes"],
)
def test_what_it_cannot_do_is_one_line(folder: Path, changes: dict[str, Any], names: str) -> None:
    conv = {"class_path": "mixdist.nets.Conv", "init_args": {"channels": [4, 5]}}
    if "expert__init_args__network" in changes:
        changes = {**changes, "expert__init_args__network": conv}
    made = changed(**{"engine": ENGINE, "execution": "loop", "mesh": {"ep_size": 1}, **changes})
    ended = together("train", "--config", write_config(folder / "c.yaml", made), "--out", "run", ranks=2, folder=folder)
    assert ended.code != 0
    assert ended.err.count("mixdist: ") == 1, ended.err
    assert [word for word in names.split() if word not in ended.err] == [], ended.err
    assert not (folder / "run").exists()


READS = """
from mixdist.experts import VAE


class Keeps(VAE):
    def __init__(self, spec, latent: int = 2) -> None:
        super().__init__(spec, latent)
        self.kept = [next(self.encoder.parameters())]

    def forward(self, rows, eps):
        terms = super().forward(rows, eps)
        return terms._replace(loss_R=terms.loss_R + 0 * self.kept[0].sum())


class Anneals(VAE):
    def __init__(self, spec, latent: int = 2) -> None:
        super().__init__(spec, latent)

    def anneal(self, step) -> None:
        super().anneal(step)
        next(self.encoder.parameters()).sum()
"""


@pytest.mark.parametrize("kind", ["Keeps", pytest.param("Anneals", marks=pytest.mark.slow)])
def test_what_a_step_refuses_leaves_nothing_behind(folder: Path, kind: str) -> None:
    (folder / "reads.py").write_text(READS)
    expert = {"class_path": f"reads.{kind}"}
    made = changed(engine=ENGINE, execution="loop", mesh={"ep_size": 1}, expert=expert)
    ended = together("train", "--config", write_config(folder / "c.yaml", made), "--out", "run", ranks=2, folder=folder)
    assert ended.code != 0
    assert ended.err.startswith("mixdist: parameter encoder."), ended.err
    assert ended.err.count("\n") == 1
    assert "is read where its values are not together" in ended.err
    assert not (folder / "run").exists()


def test_without_replicas_nothing_is_cut() -> None:
    mesh = Mesh(Placement.plan(1, 1), Launch(), torch.device("cpu"))
    engine = FSDP(Parts({"gate": nn.Linear(3, 2)}, {0: nn.Linear(2, 2)}), mesh, Wire(mesh.device), torch.optim.Adam)
    assert engine.units is None
