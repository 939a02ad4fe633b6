"""The benchmarks run end to end, and what they say that no clock decides holds: losses, bytes, bytes held."""

from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mixdist.parallel.launch import Launch
from mixdist.parallel.mesh import Mesh, Placement
from tests.launch import HANG_S, ROOT
from tests.pool import Pool
from tests.tars import make_shards

BENCHMARKS = ROOT / "benchmarks"
SPREAD = {"median", "min", "max"}


def load(name: str) -> ModuleType:
    """Import a benchmark as its own folder does, whose files name each other."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    return importlib.import_module(name)


def measure(name: str, words: list[str], ranks: int) -> dict[str, Any]:
    """Run a benchmark on a rank of a pool: all but its meeting and parting."""
    benchmark = load(name)
    launch = Launch(dist.get_rank(), ranks)
    os.environ |= {"RANK": str(launch.rank), "WORLD_SIZE": str(ranks)}
    try:
        options = benchmark.read_options(words)
    finally:
        del os.environ["RANK"], os.environ["WORLD_SIZE"]
    mesh = Mesh(Placement.plan(options.experts, ranks), launch, torch.device("cpu"), 60.0)
    return json.loads(json.dumps(benchmark.measure(options, mesh)))


def test_a_step_holds_half_of_what_ddp_holds_and_sends_the_least(pool: Callable[[int], Pool]) -> None:
    switches = ["plain", "one_way+prefetch"]
    words = ["--size=small", "--turns=2", "--steps=1", "--warm-up=0", "--timed-steps=1", "--switches", *switches]
    told = pool(2).run(f"{__name__}:measure", "step", words, 2)[0]
    rivals = told["rivals"]
    ours = [f"expert-parallel {name}" for name in switches]
    assert list(rivals) == ["process", "ddp", "apart", *ours]
    assert told["held_over_ddp"] <= 0.55
    assert rivals["process"]["expert_bytes"] == rivals["ddp"]["expert_bytes"] == 2 * rivals[ours[0]]["expert_bytes"]
    assert rivals["apart"]["expert_bytes"] == rivals[ours[0]]["expert_bytes"]
    assert 0 <= rivals["apart"]["waiting"]["median"] < 1
    for name in ours:
        # 32 rows of 12,288 bytes with their ids; 32 losses one way and 32 numbers the other.
        assert rivals[name]["wire_bytes"] == rivals[name]["wire_bytes_min"] == 32 * (12288 + 8) + 2 * 32 * 4
        assert 0 < rivals[name]["waiting"]["median"] + rivals[name]["transfer"]["median"] < 1
        # Of one step, every collective's median is its own time.
        assert rivals[name]["usual"] == pytest.approx(rivals[name]["together"]["median"])
        assert set(told["rows_per_s_over"]["ddp"][name]) == SPREAD
    # Same weights, same rows: only their noise differs, and DDP's balance term.
    losses = [rival["first_loss"] for rival in rivals.values()]
    assert max(losses) - min(losses) < 0.01 * min(losses), losses
    assert all(len(rival["turns"]) == 2 and set(rival["seconds"]) == SPREAD for rival in rivals.values())


@pytest.mark.parametrize("skew", ["0", "1"])
def test_a_dispatch_sends_a_fraction_of_the_token_style(pool: Callable[[int], Pool], skew: str) -> None:
    words = ["--turns", "1", "--steps", "1", "--warm-up", "0", "--skew", skew]
    told = pool(2).run(f"{__name__}:measure", "dispatch", words, 2)[0]["routings"]
    assert list(told) == ["dense", "top-1", "top-2"]
    for routing, experts_of_a_row in (("dense", 4), ("top-1", 1), ("top-2", 2)):
        figures = told[routing]
        # Half the experts are remote; four moves of float32 rows.
        assert figures["bytes"]["token"] == 4 * 32 * experts_of_a_row / 2 * 12288 * 4
        assert 0 < figures["ratio"] <= 0.2
        assert figures["ratio_to_kinder"]["bfloat16_forward_alone"] == pytest.approx(4 * figures["ratio"])
        assert set(figures["seconds_ratio"]) == SPREAD
    assert told["dense"]["least_bytes_equal"]
    assert told["dense"]["token_dropped"] == 0
    assert skew == "0" or told["top-1"]["token_dropped"] > 0.1


QUICK = ["--size", "tiny", "--image", "16", "--batch", "16", "--turns", "1", "--steps", "1", "--warm-up", "0"]


def test_engines_hold_and_send_what_they_should(pool: Callable[[int], Pool]) -> None:
    words = [*QUICK, "--experts", "1", "--engines", "plain", "sharded", "fsdp"]
    told = pool(2).run(f"{__name__}:measure", "engines", words, 2)[0]
    assert set(told) == {"engines"}  # an expert that both ranks have: no way to others
    plain, sharded, fsdp = told["engines"].values()
    assert plain["to_plain"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert plain["held"]["parameters"] == plain["held"]["gradients"] == sharded["held"]["parameters"]
    assert fsdp["held"]["parameters"] < 0.85 * plain["held"]["parameters"]  # more than half is the gate's, and whole
    for one in (sharded, fsdp):
        assert one["held"]["gradients"] < 0.8 * plain["held"]["gradients"]
        assert one["held"]["states"] < 0.8 * plain["held"]["states"]
        assert one["first_loss"] == pytest.approx(plain["first_loss"], rel=1e-5)
    assert fsdp["sent"]["sync"] > plain["sent"]["sync"]


def test_experts_alone_share_states_out_and_send_as_much(pool: Callable[[int], Pool]) -> None:
    words = ["--hidden", "9", "--turns", "1", "--steps", "1", "--warm-up", "0"]
    ways = pool(2).run(f"{__name__}:measure", "alone", words, 2)[0]["9"]
    plain, sharded, _, both = ways.values()
    assert {one["last_loss"] for one in ways.values()} == {plain["last_loss"]}
    for one in (sharded, both):
        assert one["states"] < 0.6 * plain["states"]
        assert one["sent"] == pytest.approx(plain["sent"], rel=0.01)


def check_ways(told: dict[str, Any]) -> None:
    """Three moves of float32 rows of 768 numbers: 8 rows on each of two ranks, half of the experts remote."""
    for routing, copies in (("dense", 2), ("top-1", 1)):
        for name, one in told[routing].items():
            if name == "mixdist":
                assert one["dropped"] == 0
            else:
                assert one["bytes"] == 3 * 8 * copies / 2 * 768 * 4
                assert one["bytes_of_first_over"] <= 0.2


def test_rows_reach_experts_in_a_fifth_of_a_token_layer_s_bytes(pool: Callable[[int], Pool]) -> None:
    words = [*QUICK, "--experts", "2", "--engines", "--ways", "mixdist", "token"]
    check_ways(pool(2).run(f"{__name__}:measure", "engines", words, 2)[0]["ways"])


@pytest.mark.slow
def test_deepspeed_s_stages_and_layer(pool: Callable[[int], Pool]) -> None:
    pytest.importorskip("deepspeed")
    words = [*QUICK, "--experts", "2", "--engines", "plain", "zero 1"]
    told = pool(2).run(f"{__name__}:measure", "engines", words, 2)[0]
    check_ways(told["ways"])
    plain, zero = told["engines"].values()
    assert zero["first_loss"] == pytest.approx(plain["first_loss"], rel=1e-5)


def test_the_interval_of_a_median_is_that_of_order_statistics() -> None:
    """0.961 of 9 values between the second and the eighth, 0.959 of 20 between the sixth and the fifteenth."""
    interval = load("turns").interval
    assert interval(range(1, 10)) == {"median": 5, "low": 2, "high": 8}
    assert interval(range(1, 21)) == {"median": 10.5, "low": 6, "high": 15}
    assert interval([3, 1, 2]) == {"median": 2, "low": 1, "high": 3}


def test_a_round_by_mixdist_and_by_hand_learns_alike_and_sends_each_row_once(pool: Callable[[int], Pool]) -> None:
    words = ["--turns", "1", "--warm-up", "0", "--experts", "4", "--rows", "403", "--epochs", "2", "--batch", "20"]
    told = pool(2).run(f"{__name__}:measure", "hard", [*words, "--judge-batches", "2"], 2)[0]
    counts, rivals = told["counts"], told["rivals"]
    assert sum(counts) == 403
    assert counts == sorted(counts, reverse=True)
    assert counts[0] / counts[-1] == pytest.approx(10, rel=0.05)
    assert list(rivals) == ["hand", "read", "wire"]
    # Same weights, same splits: only noise and order differ.
    losses = [rival["first_loss"] for rival in rivals.values()]
    assert max(losses) - min(losses) < 0.01 * min(losses), losses
    assert rivals["read"]["sent_bytes"] == 0
    assert rivals["wire"]["sent_bytes"] > 0
    assert rivals["wire"]["sent_over_least"] == pytest.approx(792 / 784)  # ids of 8 bytes go with rows of 784
    for name in ("read", "wire"):
        assert sorted(e for experts in rivals[name]["homes"] for e in experts) == [0, 1, 2, 3]
        assert set(rivals[name]["over_hand"]) == set(rivals[name]["scoring_s"]) == SPREAD


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_that_cannot_share_the_experts_are_refused_once(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    hard = load("hard")
    with pytest.raises(SystemExit) as ended:
        load("turns").meet(2, hard.read_options(["--experts", "2"]))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("3 ranks cannot share 2 experts") if rank == "0" else not error


def sweep(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> list[dict[str, str]]:
    """Measure scaling in one process and on two ranks; return the rows of the CSV."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    scaling, tiny = load("scaling"), "--size tiny --image 16 --batch 16 --turns 1 --steps 1 --warm-up 0 --csv s.csv"
    scaling.main([*tiny.split(), *words])  # the reference of the efficiencies
    scaling.main([*tiny.split(), *words, "--sweep", "2"])
    with Path("s.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    done = [(r["mode"], r["ranks"], r["experts"]) for r in rows]
    assert done == [("weak", "1", "2"), ("strong", "1", "4"), ("weak", "2", "4"), ("strong", "2", "4")]
    return rows


@pytest.mark.slow
def test_scaling_sweeps_writes_rows_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sweep(tmp_path, monkeypatch, *["--plot", "s.png", "--out", "s.json", "--routing", "top2"])
    assert [r["batch"] for r in rows] == ["16", "16", "32", "16"]
    assert [float(r["efficiency"]) for r in rows[:2]] == [1.0, 1.0]
    strong = [float(r["seconds_median"]) for r in (rows[1], rows[3])]
    assert float(rows[3]["efficiency"]) == pytest.approx(strong[0] / (2 * strong[1]))
    assert all(float(r["alpha"]) >= 0 and float(r["beta"]) >= 0 for r in rows[2:])
    assert (tmp_path / "s.png").stat().st_size > 1000
    written = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert [row["efficiency"] for row in written] == [float(r["efficiency"]) for r in rows[2:]]


@pytest.mark.slow
def test_scaling_of_rounds_sends_each_row_to_its_owner_once_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--routing", "hard", "--delivery", "wire", "--rows", "64", "--epochs", "2", "--judge-batches", "1"]
    rows = sweep(tmp_path, monkeypatch, *words)
    assert {r["batch"] for r in rows} == {"16"}
    for mode, one, two, rows_read in (("weak", rows[0], rows[2], 128), ("strong", rows[1], rows[3], 64)):
        assert one["round"] == two["round"]
        assert float(one["wire_bytes"]) + float(one["sync_bytes"]) == 0
        away = float(two["wire_bytes"]) * 2 / 2 / (3 * 16 * 16 + 8)  # of both ranks, in an epoch, rows with their ids
        assert away == int(away)
        assert 0 < away < rows_read
        # Experts and discriminators do as much a rank in weak mode, half in strong mode; scores twice and half.
        for time, name, weak in (
            ("seconds_median", "efficiency", 1),
            ("discriminators_s", "discriminators_efficiency", 1),
            ("scoring_s", "scoring_efficiency", 2),
        ):
            work = weak if mode == "weak" else 0.5
            assert float(one[name]) == 1
            assert float(two[name]) == pytest.approx(work * float(one[time]) / float(two[time]))


def test_scaling_refuses_a_csv_of_other_columns_and_experts_without_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaling, old = load("scaling"), tmp_path / "old.csv"
    old.write_text("mode,ranks\nweak,1\n")
    for words, told in (
        (["--csv", str(old)], "has not the columns of this version"),
        (["--routing", "hard", "--rows", "3"], "--rows 3 must be at least 4"),
    ):
        with pytest.raises(SystemExit) as ended:
            scaling.read_options(words)
        assert ended.value.code == 2
        assert told in capsys.readouterr().err


def test_the_fit_finds_a_wire_that_follows_its_model() -> None:
    wire = load("wire_model")
    sizes = [(m, b) for m in (1, 2, 6) for b in (4, 4096, 10**6)]
    points = [{"messages": m, "bytes": b, "seconds": 5e-5 * m + 2e-9 * b} for m, b in sizes]
    found = wire.fit(points)
    assert found["alpha"] == pytest.approx(5e-5)
    assert found["beta"] == pytest.approx(2e-9)
    assert found["residual"] < 1e-9
    free = [{"messages": m, "bytes": b, "seconds": 5e-5 * m / (1 + b)} for m, b in sizes]
    assert wire.fit(free)["beta"] == 0  # never negative


def test_execution_says_what_auto_takes(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--turns", "1", "--steps", "2", "--experts", "2", "--rows", "10"]
    load("execution").main(words)
    told = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert told["auto"] in ("loop", "stacked")
    assert told["auto_over_better"] >= 1


def test_both_pipelines_read_all_samples_of_shards(tmp_path: Path) -> None:
    make_shards(tmp_path)
    words = [str(tmp_path), "--workers", "1", "--batch", "10", "--turns", "1", "--epochs", "2"]
    # In a process of its own: webdataset leaves files open, of which Python would warn here.
    command = [sys.executable, str(BENCHMARKS / "data.py"), *words]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=HANG_S, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert told["samples"] == 44
    assert set(told["rates"]) == {f"{what} {name}" for what in ("decoded", "raw") for name in ("mixdist", "webdataset")}
    assert min(rate["min"] for rate in told["rates"].values()) > 0
    assert len(told["held_bytes"]) == 2
    assert told["scan_imagenet_s"] == pytest.approx(1.281167 * told["scan_us"])


def test_gates_are_timed_and_learn(capsys: pytest.CaptureFixture[str]) -> None:
    load("gates").main(
        ["--hidden", "16", "--rows", "20", "--turns", "2", "--steps", "1", "--epochs", "2", "--points", "1000"]
    )
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["DMVAE_over_VaDE"].keys() == SPREAD
    assert list(told["bounds"]) == ["VaDE", "VaDE, started", "DMVAE", "DMVAE, started"]
    assert all(len(bounds) == 2 and bounds[1] > bounds[0] for bounds in told["bounds"].values())
