"""Optimiser states that have one owner each, or live in CPU memory, in competitions: the same run, the same files."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mixdist.engines import FSDP, DeepSpeed, Native, NotFinite, Solo
from mixdist.engines.solo import solo_of
from mixdist.parallel import costs
from mixdist.parallel.wire import Wire
from mixdist.training.checkpoint import CheckpointStore, read_state
from tests.contest import Contest, make_rounds, merge, records_of
from tests.launch import HARD, changed, refused, write_config
from tests.parity import ENGINES, mesh_of
from tests.pool import Pool
from tests.test_competition import case_of, check, differences

CASES = [
    case_of((1, 1), engine="sharded-offloaded", rounds=1, epochs=1),
    case_of((2, 1), engine="sharded", optimizer="clipped", starved="reseed", start="table", rounds=2, epochs=1),
    case_of((4, 2), engine="sharded-offloaded", placement="load", start="table", score="kept", num_experts=5, rounds=2),
    case_of((4, 1), engine="sharded", expert="unlike", micro_batch=4, delivery="wire", rounds=1, epochs=1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_same_competition_as_in_one_process(pool: Callable[[int], Pool], case: Contest) -> None:
    check(pool, case)


@pytest.mark.parametrize("layout", [(2, 1), (4, 2)], ids=str)
def test_two_replicas_sum_in_one_order(pool: Callable[[int], Pool], layout: tuple[int, int]) -> None:
    """Bit for bit the plain engine's: weights, states, tables and what records say."""
    case = case_of(layout, rounds=1, epochs=1, score="fresh")
    got, wanted = (
        merge(pool(case.ranks).run("tests.contest:run", replace(case, engine=engine)))
        for engine in ("sharded-offloaded", "native")
    )
    assert {name: value for name, value in differences(got, wanted).items() if value} == {}
    assert got["tables"] == wanted["tables"]
    told = ("loss", "expert_loss", "discriminator_loss", "objective", "counts", "wire_bytes")
    assert [[r.get(n) for n in told] for r in got["records"]] == [[r.get(n) for n in told] for r in wanted["records"]]


def numbers(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values() if t.dim())


def measure(case: Contest) -> tuple[int, int, list[int], list[int]]:
    """Compete for a round; return bytes of states here, as computed, and bytes sent in steps, counted and computed."""
    mesh = mesh_of(case.num_experts, case.ranks, case.ep_size)
    wire = Wire(mesh.device)
    made, members = make_rounds(case, mesh, wire), mesh.placement.num_replicas
    list(records_of(made))
    held, computed, sent, least = 0, 0, [], []
    for e, entrant in made.entrants.items():
        for turn, (kind, engine) in enumerate(entrant.engines.items()):
            bytes_T = [p.numel() * p.element_size() for p in engine.parameters]
            held += numbers(engine.state())
            computed += 2 * costs.owned_bytes(bytes_T, [0] * members, e + turn)[mesh.replica]
            wire.meter.reset()
            engine.zero_grad()
            engine.step(torch.zeros(1, dtype=torch.float64))
            sent.append(wire.meter.sync_bytes)
            least.append(costs.owned_step(bytes_T, members, mesh.replica, e + turn))
            assert (kind == "discriminator") == bool(turn)
    return held, computed, sent, least


@pytest.mark.parametrize(("layout", "share"), [((2, 1), 0.55), ((4, 2), 0.6), ((4, 1), 0.35)], ids=str)
def test_states_have_one_owner(pool: Callable[[int], Pool], layout: tuple[int, int], share: float) -> None:
    """Of 2 or 4 replicas none has much more than its part, and what the meter counts is what the formulas say."""
    case = case_of(layout, engine="sharded", rounds=1, epochs=1)
    ranks = pool(case.ranks).run("tests.test_competition_sharding:measure", case)
    assert all(held == computed and sent == least for held, computed, sent, least in ranks)
    (alone,) = pool(1).run("tests.test_competition_sharding:measure", replace(case, ranks=1, ep_size=1))
    assert sum(held for held, *_ in ranks) == alone[0]
    assert max(held for held, *_ in ranks) <= share * alone[0] / layout[1] * (1 + (layout[1] > 1) * 0.1)


def broken(case: Contest, bad_rank: int) -> list[str]:
    """Step two modules of which one has a gradient that is not finite on one rank."""
    mesh = mesh_of(case.num_experts, case.ranks, case.ep_size)
    make, told = solo_of(ENGINES[case.engine]), []
    for turn, name in enumerate(("good", "bad")):
        module = nn.Linear(2, 2).double()
        nn.init.ones_(module.weight)
        engine = make(name, module, mesh.replica_group, Wire(mesh.device), torch.optim.Adam, clip_norm=0.1, turn=turn)
        engine.zero_grad()
        module.weight.grad = torch.ones_like(module.weight)
        if name == "bad" and mesh.rank == bad_rank:
            module.weight.grad[1, 1] = torch.nan
        try:
            engine.step(torch.ones(1))
        except NotFinite as error:
            told.append(f"{error}"[:50])
            assert engine.module.weight.eq(1).all()
    return told


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_every_replica_hears_of_a_gradient_that_is_not_finite(pool: Callable[[int], Pool], bad_rank: int) -> None:
    told = pool(2).run("tests.test_competition_sharding:broken", case_of((2, 1), engine="sharded-offloaded"), bad_rank)
    assert told == [["the gradient of bad is not finite in its step 1: no"[:50]]] * 2


def travel(case: Contest, root: str, times: int) -> None:
    """Go on from the newest checkpoint, if there is one; save after each of some epochs and scorings."""
    mesh = mesh_of(case.num_experts, case.ranks, case.ep_size)
    made, store = make_rounds(case, mesh, Wire(mesh.device)), CheckpointStore(Path(root), mesh, keep=99)
    if saved := store.found():
        made.load(saved[0], read_state(saved[0]))
    made.begin()
    for _ in range(times):
        made.advance()
        store.save(made.total, made.save())


def stored(root: Path) -> dict[str, Tensor]:
    """Give all tensors of all checkpoints, weights and states."""
    return {
        f"{path.parent.name} {path.stem} {k}": v.double()
        for path in root.glob("step-*/*.safetensors")
        for k, v in load_file(path).items()
    }


WAYS = {
    "there and back": ["native", "sharded", "native", "sharded-offloaded"],
    "from the first": ["sharded-offloaded", "native", "sharded", "offloaded"],
}
STAGES = [((2, 1), 2), ((4, 2), 1), ((1, 1), 2), ((2, 1), 2)]


def test_a_competition_changes_its_engine_at_a_checkpoint(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    """Both ways and on other layouts, in pretraining and inside rounds; every checkpoint is the plain engine's."""
    ways = {"plain": ["native"] * len(STAGES), **WAYS}
    case = Contest(optimizer="clipped", score="kept", start="split", rounds=2, batch_size=20)
    for name, engines in ways.items():
        for ((ranks, ep_size), times), engine in zip(STAGES, engines, strict=True):
            one = replace(case, ranks=ranks, ep_size=ep_size, engine=engine)
            pool(ranks).run("tests.test_competition_sharding:travel", one, str(tmp_path / name), times)
    wanted = stored(tmp_path / "plain")
    assert {name.split()[0] for name in wanted} == {f"step-{n:09d}" for n in range(1, 8)}
    assert any("discriminator" in name and ".exp_avg" in name for name in wanted)
    for name in WAYS:
        found = stored(tmp_path / name)
        assert found.keys() == wanted.keys()
        wrong = {k: (found[k] - b).abs().max().item() / (b.abs().max().item() or 1.0) for k, b in wanted.items()}
        assert {k: v for k, v in wrong.items() if not v <= 1e-10} == {}


def test_checkpoints_are_the_same_files(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    """Byte for byte where sums are in one order."""
    for engine in ("native", "sharded-offloaded"):
        case = case_of((2, 1), engine=engine, start="split", rounds=1, epochs=1)
        pool(2).run("tests.test_competition_sharding:travel", case, str(tmp_path / engine), 3)
    plain, sharded = (sorted((tmp_path / engine).glob("*/*")) for engine in ("native", "sharded-offloaded"))
    assert [path.name for path in plain] == [path.name for path in sharded]
    assert any(path.name.startswith("discriminator") for path in plain)
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(plain, sharded, strict=True))


class Own(Native):
    """An engine of one's own, whose steps are its own."""


@pytest.mark.parametrize("kind", [FSDP, DeepSpeed, Own])
def test_engines_that_train_all_at_once_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=rf"^engine \({kind.__name__}\) .* take mixdist\.engines\.Native, .*leave"):
        solo_of(functools.partial(lambda kind, **options: kind, kind, offload="none"))


def test_options_are_checked_without_a_config() -> None:
    assert solo_of(None) is Solo
    with pytest.raises(ValueError, match=r"engine\.shard \(all\) must be none or optimizer"):
        solo_of(functools.partial(Native, shard="all"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"engine cannot be made \(.*shards.*\)"):
        solo_of(functools.partial(Native, shards="none"))  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"engine \(<lambda>\) must in a competition be a class"):
        solo_of(lambda *given: Native(*given))


def test_what_cannot_step_in_cpu_memory_fails_before_anything_is_trained(tmp_path: Path) -> None:
    """Discriminators are made after pretraining and the first epochs."""
    engine = {"class_path": "mixdist.engines.Native", "init_args": {"offload": "optimizer"}}
    captured = {"class_path": "torch.optim.Adam", "init_args": {"capturable": True}}
    config = write_config(tmp_path / "c.yaml", changed(HARD, engine=engine, score__init_args__optimizer=captured))
    refused("train", "--config", config, "--out", str(tmp_path / "run"), names="engine.offload capturable")
