"""bfloat16 weights whose optimiser steps float32 masters: the same run as under autocast, with less memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mixdist.engines import Native
from mixdist.engines.masters import bfloat16_weights
from mixdist.experts import VAE, Compute
from mixdist.gates import Softmax
from mixdist.mixtures import Context, Soft
from mixdist.nets import MLP
from mixdist.noise import Moment
from mixdist.parallel.launch import Launch
from mixdist.parallel.mesh import Mesh, Placement
from mixdist.parallel.wire import Wire
from mixdist.terms import Outcome, Parts
from mixdist.training.phases import Phase
from mixdist.training.trainer import Trainer
from tests.errors import error_of
from tests.launch import changed, here, refused, together, write_config
from tests.parity import (
    SEED,
    Case,
    Loader,
    differences,
    make_engine,
    make_mixture,
    make_objective,
    merge,
    mesh_of,
    rows_of,
)
from tests.pool import Pool
from tests.test_parity import case_of


def bf16(layout: tuple[int, int], engine: str, **changes: object) -> Case:
    return case_of(layout, engine=engine, memory="bf16", dtype="float32", steps=8, **changes)  # type: ignore[arg-type]


CASES = [
    bf16((1, 1), "bf16", expert="bernoulli", optimizer="scheduled-adamw"),
    bf16((1, 1), "bf16-offloaded", expert="unlike", accumulate=3),
    bf16((1, 1), "bf16", trains="decoder"),
    bf16((2, 1), "bf16", expert="gaussian", optimizer="clipped-sgd"),
    bf16((2, 1), "bf16-sharded", expert="unlike", optimizer="clipped-sgd"),
    bf16((2, 1), "bf16-sharded-offloaded", trains="experts"),
    bf16((2, 2), "bf16-sharded", way="ahead", routing="top2"),
    bf16((2, 1), "bf16-sharded", trains="gate"),
    bf16((4, 2), "bf16-sharded", num_experts=5, batch_size=3),
    bf16((4, 1), "bf16-sharded-offloaded", optimizer="scheduled-adamw", accumulate=3),
    bf16((4, 2), "bf16-sharded", family="mvae", gate="gaussian-each", balance="dhsic", objective="mean"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_same_run_as_with_float32_weights(pool: Callable[[int], Pool], case: Case) -> None:
    """To the bit: autocast rounds the same weights in each pass, and sums are float32 in the same order."""
    plain = case.engine.removeprefix("bf16").removeprefix("-") or "native"
    got, wanted = (merge(pool(case.ranks).run("tests.parity:run", one)) for one in (case, replace(case, engine=plain)))
    assert {k: v for k, v in differences(got, wanted).items() if v} == {}


def rounded(case: Case) -> tuple[int, int, list[int], tuple[int, int]]:
    """Do two steps; return bytes of weights in a step, bytes of reductions, what differs from bfloat16 after it.

    Besides: how many numbers are bfloat16 in a step, and how many masters are here.
    """
    mesh = mesh_of(case.num_experts, case.ranks, case.ep_size)
    wire = Wire(mesh.device)
    mixture = make_mixture(case, mesh, wire)
    engine = make_engine(case, mixture, mesh, wire)
    loader = Loader(rows_of(case), case.batch_size, SEED, 0, mesh.rank, mesh.world_size)
    parameters = [p for expert in mixture.parts.experts.values() for p in expert.parameters()]
    for step in range(2):
        engine.zero_grad()
        held = sum(p.numel() * p.element_size() for p in parameters)
        num_rounded = sum(p.numel() for p in parameters if p.dtype == torch.bfloat16)
        wire.meter.reset()
        outcome = mixture.backward(loader.batch(0, step), make_objective(case), Moment(SEED, 0, step))
        assert {p.grad.dtype for p in parameters if p.grad is not None} == {torch.float32}
        totals = engine.step(outcome, step)
    engine.ready()
    assert {p.dtype for p in parameters} == {torch.float32}
    assert [p.dtype for p in parameters] == [p.grad_dtype for p in parameters]
    assert isinstance(engine, Native)
    masters = list(engine.masters.copies.values())
    assert all(copy.grad is None for copy in masters), "a gradient is held once"
    kept = [int((p != p.bfloat16()).sum()) for p in parameters]
    return held, totals.meter["sync_bytes"], kept, (num_rounded, sum(copy.numel() for copy in masters))


def test_weights_and_what_is_sent_of_them_are_half(pool: Callable[[int], Pool]) -> None:
    """All but the decoder's scale are of linear layers."""
    case = bf16((2, 1), "sharded", expert="gaussian")
    plain, half = (
        pool(2).run("tests.test_masters:rounded", replace(case, engine=engine))
        for engine in ("sharded", "bf16-sharded")
    )
    (held, sent, *_), (held_2, sent_2, kept, (num_rounded, _)) = plain[0], half[0]
    masters = [num for *_, (_, num) in half]
    assert sum(masters) == num_rounded, "each has one owner"
    assert max(masters) <= 0.55 * num_rounded
    assert held_2 < 0.52 * held
    assert 0 < sent - sent_2 < 0.26 * sent, "values are sent in half, gradients in whole"
    assert sum(kept) > 0, "between steps the masters' values are there"


class Still(nn.Module):
    """An expert whose gradient is so small that bfloat16 could not tell its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)
        nn.init.ones_(self.net.weight)
        self.norm = nn.LayerNorm(2)


def test_small_steps_add_up() -> None:
    """A hundred of 1e-4 take 1 to 0.99, where bfloat16 by itself would stay: there its numbers are 2^-8 apart."""
    mesh, expert = Mesh(Placement.plan(1, 1), Launch(), torch.device("cpu")), Still()
    parts = Parts({"gate": nn.Linear(2, 1)}, {0: expert}, bf16=True)
    engine = Native(parts, mesh, Wire(mesh.device), lambda p: torch.optim.SGD(p, 1e-4), bf16_weights=True)
    for step in range(100):
        engine.zero_grad()
        assert (expert.net.weight.dtype, expert.norm.weight.dtype) == (torch.bfloat16, torch.float32)
        for parameter in expert.parameters():
            parameter.grad = torch.ones_like(parameter, dtype=torch.float32)
        engine.step(Outcome(torch.zeros(()), {}, {}, {}), step)
    engine.ready()
    assert expert.net.weight.detach().flatten().tolist() == pytest.approx([0.99] * 4, abs=1e-5)


def test_what_others_write_between_steps_is_stepped_from() -> None:
    mesh, expert = Mesh(Placement.plan(1, 1), Launch(), torch.device("cpu")), Still()
    parts = Parts({}, {0: expert}, bf16=True)
    engine = Native(parts, mesh, Wire(mesh.device), lambda p: torch.optim.SGD(p, 0.0), bf16_weights=True)
    for value in (1.23456789, 7.654321):
        engine.ready()
        nn.init.constant_(expert.net.weight, value)
        engine.zero_grad()
        assert expert.net.weight.unique().tolist() == [torch.tensor(value).bfloat16().item()]
        engine.step(Outcome(torch.zeros(()), {}, {}, {}), 0)
        engine.ready()
        assert expert.net.weight.unique().tolist() == [torch.tensor(value).item()]


def test_what_is_written_within_steps_is_told_and_not_lost() -> None:
    mesh, expert = Mesh(Placement.plan(1, 1), Launch(), torch.device("cpu")), Still()
    parts = Parts({}, {0: expert}, bf16=True)
    engine = Native(parts, mesh, Wire(mesh.device), lambda p: torch.optim.SGD(p, 0.1), bf16_weights=True)
    for step in range(3):
        engine.zero_grad()
        engine.step(Outcome(torch.zeros(()), {}, {}, {}), step)
    with torch.no_grad():
        expert.net.bias.clamp_(min=0.0)
    error_of(engine.zero_grad, "engine.bf16_weights", "net.bias of expert 0", "anneal")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's, of the older kind of weight_norm
def test_a_weight_that_another_kind_of_module_reads_stays() -> None:
    """And one that a hook makes of others before each call: autocast does not round these."""
    linear = {name: nn.Linear(3, 3) for name in ("tied", "frozen", "own")}
    expert = nn.ModuleDict({"table": nn.Embedding(3, 3), **linear, "normed": nn.utils.weight_norm(nn.Linear(3, 3))})
    linear["tied"].weight = expert["table"].weight
    linear["frozen"].bias.requires_grad_(False)
    found = bfloat16_weights(Parts({}, {0: expert}, bf16=True))
    assert list(found.named) == ["own.weight of expert 0", "own.bias of expert 0"]
    assert list(map(id, found.named.values())) == list(map(id, linear["own"].parameters()))


class Attention(nn.Module):
    """Attention over halves of a vector: a layer that reads weights of its own and those of another one."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(num_in, 8), nn.Linear(8, num_out)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).unflatten(-1, (2, 4))
        return self.last(self.attention(h, h, h, need_weights=False)[0].flatten(-2))


class Attentive(MLP):
    stackable = False

    def encoder(self, shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        return Attention(math.prod(shape), num_outputs)


def test_records_are_those_of_float32_weights() -> None:
    """What is called outside of autocast between steps meets float32 weights, so layers of every kind may be mixed."""
    reports = []
    for engine in (Native, functools.partial(Native, bf16_weights=True)):
        mesh, data = mesh_of(3, 1, 1), rows_of(Case())
        mixture = Soft(
            functools.partial(Softmax, network=MLP([6])),
            functools.partial(VAE, latent=2, network=Attentive([6])),
            3,
            compute=Compute(bf16=True),
        )
        mixture.setup(Context(SEED, torch.float32, data.spec, mesh, Wire(mesh.device)))
        trainer = Trainer(mixture, data, [Phase(2, 16)], engine, log_every=1)
        trainer.begin()
        records = [trainer.advance().record or {} for _ in range(trainer.total_steps)]
        assert "duplicate_experts" in records[0]
        reports.append([{k: v for k, v in record.items() if k not in MEASURED} for record in records])
    assert reports[0] == reports[1]


MEASURED = ("rows_per_s", "peak_memory_bytes", "waiting_s", "transfer_s")


def test_gradients_of_torch_before_2_10_have_their_parameters_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "grad_dtype", property(absent), raising=False)
    mesh, expert = Mesh(Placement.plan(1, 1), Launch(), torch.device("cpu")), Still()
    Native(Parts({}, {0: expert}), mesh, Wire(mesh.device), torch.optim.SGD).collect()
    assert all(p.grad is not None for p in expert.parameters())


def absent(tensor: Tensor) -> None:
    raise AttributeError("grad_dtype")


def test_other_dtypes_are_told_without_a_config() -> None:
    parts = Parts({}, {3: nn.Linear(2, 2).double()}, bf16=True)
    error_of(lambda: bfloat16_weights(parts), "engine.bf16_weights", "weight of expert 3", "float64")


BF16 = {"class_path": "mixdist.engines.Native", "init_args": {"shard": "optimizer", "bf16_weights": True}}


def test_a_run_leaves_it_at_a_checkpoint(folder: Path) -> None:
    """Two ranks with it, one goes on without: the same files as a run that never had it; averages, too."""
    base = {
        "dtype": "float32",
        "compute": {"bf16": True},
        "train__epochs": 2,
        "train__ema": 0.9,
        "mesh": {"ep_size": 1},
    }
    plain = {"class_path": "mixdist.engines.Native", "init_args": {"shard": "optimizer"}}
    for name, engine in (("plain", plain), ("rounded", BF16)):
        config = write_config(folder / f"{name}.yaml", changed(**base, engine=engine))
        ended = together("train", "--config", config, "--out", name, ranks=2, folder=folder)
        assert ended.code == 0, ended.err
        words = ["--train.epochs", "3", "--engine", "mixdist.engines.Native", "--mesh.ep_size", "null"]
        ended = here("train", "--resume", name, *words)
        assert ended.code == 0, ended.err
    files = sorted(Path("plain/checkpoints").glob("step-*/*.safetensors"))
    assert len({path.parent.name for path in files}) > 1
    for path in files:
        mine, theirs = load_file(str(path).replace("plain", "rounded", 1)), load_file(path)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], b) for name, b in theirs.items())


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"dtype": "float32"}, "engine.bf16_weights true mixture.compute.bf16"),
        ({"dtype": "float64", "compute": {"bf16": True}}, "mixture.compute.bf16 float64 dtype"),
        ({"dtype": "float32", "compute": {"bf16": True}, "execution": "stacked"}, "mixture.execution stacked loop"),
    ],
)
def test_what_it_cannot_do_is_one_line(folder: Path, changes: dict[str, object], names: str) -> None:
    config = write_config(folder / "c.yaml", changed(**changes, engine=BF16))
    refused("train", "--config", config, "--out", "run", names=names)
