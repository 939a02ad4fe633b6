"""A competition that is killed goes on where its last checkpoint stands, inside a round too, on any layout."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mixdist.competition.rounds import TABLE
from mixdist.report.metrics import read_metrics
from tests.launch import begin, here, mlp, together, write_config

# Two epochs of pretraining, the first scoring, then rounds of two epochs and a scoring.
LAST = 2 + 1 + 3 * 3
INSIDE = 7  # after the first epoch of the second round
NATIVE = ["--engine", "mixdist.engines.Native", "--engine.shard", "optimizer", "--engine.offload", "optimizer"]
SHARDED = ["--mesh.ep_size", "1", *NATIVE]
WHOLE = ["--mesh.ep_size", "null", "--engine.shard", "none", "--engine.offload", "none"]
OF_A_RUN = ("homes", "peak_memory_bytes", "wire_bytes", "wire_bytes_min", "sync_bytes")

OWN = '''
"""A VAE that stops once a checkpoint is there, until it is killed."""
import os
import time
from pathlib import Path
from mixdist.experts import VAE


class Stalling(VAE):
    def anneal(self, step: int) -> None:
        super().anneal(step)
        if "STALL_AFTER" in os.environ and Path(os.environ["STALL_AFTER"]).exists():
            time.sleep(600)
'''

CONFIG: dict[str, Any] = {
    "data": {
        "class_path": "mixdist.data.Blobs",
        "init_args": {"num_classes": 3, "rows": 240, "test_rows": 40, "spread": 0.2},
    },
    "mixture": {
        "class_path": "mixdist.competition.Competition",
        "init_args": {
            "expert": {
                "class_path": "stalling.Stalling",
                "init_args": {
                    "network": mlp(6),
                    "latent": 2,
                    "likelihood": "gaussian",
                    "mean": "identity",
                    "kl_warmup": {"epochs": 5.5, "cycles": 2, "rise": 0.6},
                },
            },
            "num_experts": 4,
            "rounds": 3,
            "starved": "freeze",
            "starved_below": 0.3,
            "temperature": 2.0,
            "anneal_rounds": 3,
            "by_shares": True,
            "e_steps": 3,
            "block": 90,
            "score": {
                "class_path": "mixdist.competition.Discriminators",
                "init_args": {"batch_size": 40, "network": mlp(8)},
            },
        },
    },
    "dtype": "float64",
    "pretrain": [{"epochs": 2, "batch_size": 60}],
    "train": {
        "epochs": 2,
        "batch_size": 30,
        "clip_norm": 1.0,
        "ema": 0.9,
        "schedule": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 5, "gamma": 0.9}},
    },
    "checkpoint": {"every": 1, "keep": 100},
}


def config_of(folder: Path, **rules: Any) -> str:
    (folder / "stalling.py").write_text(OWN)
    config = copy.deepcopy(CONFIG)
    config["mixture"]["init_args"] |= rules
    return write_config(folder / "config.yaml", config)


def records(run: Path, without: tuple[str, ...] = OF_A_RUN) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in without and not k.endswith("_s")} for r in read_metrics(run)]


def tables(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "assignments").iterdir())}


def checkpoint(run: Path, total: int = LAST) -> dict[str, Tensor]:
    """Give all tensors of a checkpoint, weights and optimisers of experts and discriminators."""
    folder = run / "checkpoints" / f"step-{total:09d}"
    return {f"{path.stem}.{k}": v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def state(run: Path, total: int = LAST) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "checkpoints" / f"step-{total:09d}" / "state.json").read_text())
    return found


def assert_same(run: Path, other: Path) -> None:
    """Hold two runs of one layout against each other: everything bit for bit."""
    assert records(run) == records(other)
    assert tables(run) == tables(other)
    assert state(run) == state(other)
    mine, theirs = checkpoint(run), checkpoint(other)
    assert mine.keys() == theirs.keys()
    assert len([name for name in mine if name.startswith("discriminator")]) > 8
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def assert_close(run: Path, other: Path) -> None:
    """Hold runs of two layouts against each other: tables equal, weights and figures by max|a - b| <= 1e-10 max|b|."""
    assert tables(run) == tables(other)
    for mine, theirs in zip(records(run), records(other), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            if name in ("loss", "expert_loss", "discriminator_loss") or name.startswith("objective"):
                a, b = (np.array(v, dtype=float) for v in (mine[name], value))
                np.testing.assert_allclose(a, b, rtol=1e-10, err_msg=name)
            else:
                assert mine[name] == value, name
    mine, theirs = checkpoint(run), checkpoint(other)
    assert mine.keys() == theirs.keys()
    for name, b in theirs.items():
        assert (mine[name] - b).abs().max() <= 1e-10 * b.abs().max(), name


def until(run: Path, total: int, name: str) -> Path:
    """Copy a run and take away all checkpoints after one, as if it had been killed before the next."""
    again = Path(shutil.copytree(run, run.with_name(name)))
    for path in again.glob("checkpoints/step-*"):
        if int(path.name.removeprefix("step-")) > total:
            shutil.rmtree(path)
    return again


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rounds")


@pytest.fixture(autouse=True)
def within(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run of one process that nothing interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ended = here("train", "--config", config_of(folder), "--out", "whole")
    assert (ended.code, ended.err) == (0, "")
    return folder / "whole"


def kill(folder: Path, name: str, *more: str) -> Path:
    """Begin a run of two ranks and kill it inside a round."""
    latest = folder / name / "checkpoints" / "latest"
    stall = str(latest.with_name(f"step-{INSIDE:09d}"))
    words = ["train", "--config", config_of(folder), "--out", name, *more]
    with begin(*words, ranks=2, folder=folder, STALL_AFTER=stall) as run:
        run.until(lambda: latest.exists() and latest.read_text() == f"step-{INSIDE:09d}\n")
        run.kill()
    assert [r["step"] for r in read_metrics(folder / name)] == [1, 2, 3, 6]
    position = state(folder / name, INSIDE)["position"]
    assert position == {"phase": 1, "round": 2, "epoch": 1, "total": INSIDE, "stopped": False}
    return folder / name


@pytest.fixture(scope="module")
def killed(folder: Path) -> Path:
    return kill(folder, "killed")


def test_one_process_takes_over_inside_a_round(killed: Path, whole: Path) -> None:
    run = Path(shutil.copytree(killed, killed.with_name("again-1")))
    ended = here("train", "--resume", run.name)
    assert (ended.code, ended.err) == (0, "")
    assert_close(run, whole)
    assert "test rows" in ended.out
    assert [line.split()[:2] for line in ended.out.splitlines()[:2]] == [["round", "2:"], ["round", "3:"]]


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        pytest.param(3, ["--mixture.delivery", "wire", "--mixture.placement", "fixed"], marks=pytest.mark.slow),
        pytest.param(2, [], marks=pytest.mark.slow),
        pytest.param(4, ["--mesh.ep_size", "2"], marks=pytest.mark.slow),
        pytest.param(3, SHARDED, marks=pytest.mark.slow, id="sharded"),
    ],
)
def test_other_layouts_take_over_inside_a_round(
    ranks: int, words: list[str], killed: Path, whole: Path, folder: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(killed, tmp_path / "again"))
    ended = together("train", "--resume", str(run), *words, ranks=ranks, folder=folder)
    assert ended.code == 0, ended.err
    assert_close(run, whole)


@pytest.mark.slow
def test_states_with_owners_are_killed_and_whole_ones_take_over(whole: Path, folder: Path) -> None:
    run = kill(folder, "owned", *SHARDED)
    assert here("train", "--resume", run.name, *WHOLE).code == 0
    assert_close(run, whole)


@pytest.mark.parametrize(
    "total", [1, 2, 3, 4, 5, 6, 8], ids=["pretraining", "pretrained", "split", "within", "trained", "round", "later"]
)
def test_a_run_goes_on_bit_for_bit(total: int, whole: Path) -> None:
    run = until(whole, total, f"from-{total}")
    ended = here("train", "--resume", run.name)
    assert (ended.code, ended.err) == (0, "")
    assert_same(run, whole)


@pytest.mark.slow
def test_kept_discriminators_go_on_bit_for_bit(folder: Path) -> None:
    config = copy.deepcopy(CONFIG)
    config["mixture"]["init_args"]["score"]["init_args"] |= {"fresh": False, "batches": 3}
    assert here("train", "--config", write_config(folder / "kept.yaml", config), "--out", "kept").code == 0
    run = until(folder / "kept", 7, "kept-again")
    assert here("train", "--resume", run.name).code == 0
    assert_same(run, folder / "kept")


@pytest.mark.slow
def test_reseeded_experts_go_on_bit_for_bit(folder: Path) -> None:
    config = config_of(folder, starved="reseed", starved_below=0.9, start="split")
    assert here("train", "--config", config, "--out", "reseed").code == 0
    starved_experts = [r["starved"] for r in read_metrics(folder / "reseed") if "round" in r]
    assert starved_experts[0]
    for total in (5, 6):  # at the round's end, and inside the next
        run = until(folder / "reseed", total, f"reseed-{total}")
        assert here("train", "--resume", run.name).code == 0
        assert records(run) == records(folder / "reseed")
        assert tables(run) == tables(folder / "reseed")
        mine, theirs = checkpoint(run, LAST - 1), checkpoint(folder / "reseed", LAST - 1)
        assert theirs
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_damaged_table_is_passed_over(whole: Path) -> None:
    run = until(whole, 8, "damaged")
    table = run / "checkpoints" / "step-000000008" / TABLE
    content = bytearray(table.read_bytes())
    content[-1] ^= 1  # another expert for the last sample
    table.write_bytes(content)
    ended = here("train", "--resume", run.name)
    assert ended.code == 0
    told = f"mixdist: checkpoint step-000000008 is damaged ({TABLE} differs from its checksum); going back to step-"
    assert ended.err == told + "000000007\n"
    assert_same(run, whole)


def test_rounds_may_be_added(whole: Path, folder: Path) -> None:
    config = config_of(folder)
    assert here("train", "--config", config, "--out", "short", "--mixture.rounds", "1").code == 0
    assert len(records(folder / "short")) == 4
    assert here("train", "--resume", "short", "--mixture.rounds", "3").code == 0
    assert_same(folder / "short", whole)
    assert here("train", "--resume", "short").code == 0  # at its end already: evaluates and ends
    assert_same(folder / "short", whole)


def test_fewer_rounds_than_done_are_refused(whole: Path) -> None:
    run = until(whole, LAST, "fewer")
    ended = here("train", "--resume", run.name, "--mixture.rounds", "2")
    assert (ended.code, ended.out) == (2, "")
    assert "is in phase 1, round 4, but the config has 1 phases of pretraining and 2 rounds" in ended.err
    assert_same(run, whole)


@pytest.mark.parametrize("rule", ["starved_below", "block"])
def test_other_rules_are_refused(rule: str, whole: Path) -> None:
    run = until(whole, 5, f"other-{rule}")
    ended = here("train", "--resume", run.name, f"--mixture.{rule}", "1")
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert f"was made with {rule} " in ended.err
