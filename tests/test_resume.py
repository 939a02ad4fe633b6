"""A run that is killed goes on where its last checkpoint stands, on any layout, as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from mixdist.report.metrics import read_metrics
from tests.launch import begin, changed, here, mlp, together, write_config

NUM_STEPS, SAVED, LOGGED = 39, 10, 12  # of a run: one epoch; when it was killed: the newest checkpoint, the last step
WARMUP = {"epochs": 0.7, "cycles": 3, "rise": 0.5}  # the run is killed inside of it
TIMES = ("rows_per_s", "waiting_s", "transfer_s", "peak_memory_bytes")
WIRE = ("wire_bytes", "wire_bytes_min", "sync_bytes")

OWN = '''
"""A VAE that stops in the middle of a run, until it is killed."""
import os
import time
from mixdist.experts import VAE


class Stalling(VAE):
    def anneal(self, step: int) -> None:
        super().anneal(step)
        if step == int(os.environ.get("STALL_AT", "-1")):
            time.sleep(600)
'''


def config_of(folder: Path, **changes: Any) -> str:
    """Write the config, float64, and the expert it names."""
    (folder / "stalling.py").write_text(OWN)
    expert = {"class_path": "stalling.Stalling", "init_args": {"network": mlp(8), "latent": 2, "kl_warmup": WARMUP}}
    config = changed(
        **{
            "dtype": "float64",
            "expert": expert,
            "train__batch_size": 37,
            "checkpoint": {"every": 5},
            "train__ema": 0.9,
            **changes,
        }
    )
    return write_config(folder / "config.yaml", config)


def records(run: Path, without: tuple[str, ...] = TIMES) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in without} for record in read_metrics(run)]


def losses(run: Path) -> Tensor:
    return torch.tensor([record["loss"] for record in read_metrics(run)], dtype=torch.float64)


def weights(run: Path) -> dict[str, Tensor]:
    """Give all tensors of the last checkpoint, weights and optimiser."""
    last = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    assert last.name == f"step-{NUM_STEPS:09d}"
    return {f"{path.stem}.{k}": v for path in last.glob("*.safetensors") for k, v in load_file(path).items()}


def assert_close(run: Path, reference: Path) -> None:
    """Hold two runs against contract: max|a - b| <= 1e-10 max|b|, for the losses and for each tensor."""
    assert [r["step"] for r in read_metrics(run)] == list(range(1, NUM_STEPS + 1))
    mine, theirs = ({"losses": losses(r), **weights(r)} for r in (run, reference))
    assert mine.keys() == theirs.keys()
    for name, b in theirs.items():
        assert (mine[name] - b).abs().max() <= 1e-10 * b.abs().max(), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run of two ranks that nothing interrupts."""
    ended = together("train", "--config", config_of(folder), "--out", "whole", ranks=2, folder=folder)
    assert ended.code == 0, ended.err
    return folder / "whole"


@pytest.fixture(scope="module")
def killed(folder: Path) -> Path:
    """A run of two ranks that was killed between two checkpoints, after it had logged steps that are lost."""
    metrics = folder / "killed" / "metrics.jsonl"
    words = ["train", "--config", config_of(folder), "--out", "killed"]
    with begin(*words, ranks=2, folder=folder, STALL_AT=str(LOGGED)) as run:
        run.until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= LOGGED)
        run.kill()
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == LOGGED
    assert (folder / "killed/checkpoints/latest").read_text() == f"step-{SAVED:09d}\n"
    return folder / "killed"


def copy_of(killed: Path, name: str) -> Path:
    return Path(shutil.copytree(killed, killed.with_name(name)))


def test_the_same_layout_goes_on_bit_for_bit(killed: Path, whole: Path, folder: Path) -> None:
    run = copy_of(killed, "again-2")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')  # torn by the kill
    ended = together("train", "--resume", run.name, ranks=2, folder=folder)
    assert ended.code == 0, ended.err
    assert records(run) == records(whole)
    mine, theirs = weights(run), weights(whole)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert ended.out.splitlines()[:-1]  # the table at the end, equal too
    assert "test rows" in ended.out


def test_one_process_takes_over_from_two(
    killed: Path, whole: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_of(killed, "again-1")
    monkeypatch.chdir(folder)
    ended = here("train", "--resume", run.name)
    assert (ended.code, ended.err) == (0, "")
    assert_close(run, whole)
    assert [r["wire_bytes"] for r in read_metrics(run)][SAVED:] == [0] * (NUM_STEPS - SAVED)


@pytest.mark.parametrize("ranks", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_other_layouts_take_over(ranks: int, killed: Path, whole: Path, folder: Path) -> None:
    run = copy_of(killed, f"again-{ranks}")
    ended = together("train", "--resume", run.name, ranks=ranks, folder=folder)
    assert ended.code == 0, ended.err
    assert_close(run, whole)


def assert_goes_on(config: str, stop: int, last: int) -> Path:
    """Train, and go on from a copy without the checkpoints after ``stop``: everything is the same, bit for bit."""
    assert here("train", "--config", config, "--out", "whole").code == 0
    whole = Path("whole")
    run = copy_of(whole, "again")
    for path in run.glob("checkpoints/step-*"):
        if int(path.name.removeprefix("step-")) > stop:
            shutil.rmtree(path)
    assert here("train", "--resume", "again").code == 0
    assert records(run) == records(whole)
    for name in ("gate", *(f"expert-{e:04d}" for e in range(4))):
        mine, theirs = (r / "checkpoints" / f"step-{last:09d}" / f"{name}.safetensors" for r in (run, whole))
        assert mine.read_bytes() == theirs.read_bytes()
    return run


@pytest.mark.parametrize(
    "stop",
    [2, 3, pytest.param(5, marks=pytest.mark.slow)],
    ids=["in the first phase", "between the phases", "in the second"],
)
def test_phases_go_on_bit_for_bit(stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    schedule = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 2, "gamma": 0.5}}
    phases = {
        "pretrain": [{"epochs": 1, "batch_size": 500, "trains": "experts", "schedule": schedule}],
        "train__batch_size": 300,
        "train__schedule": schedule,
        "train__clip_norm": 10.0,
        "checkpoint": {"every": 1, "keep": 100},
    }
    # Nothing depends on what the process did before: not on torch's generator, not on optimisers of another phase.
    assert_goes_on(config_of(tmp_path, **phases), stop, 8)


@pytest.mark.parametrize(
    "switches",
    [
        {"one_way": True, "prefetch": True, "compute": {"micro_batch": 16}, "train__accumulate": 2},
        {"routing": {"k": 2, "capacity_factor": 1.0}, "execution": "auto"},
    ],
    ids=["one way and prefetch", "top-k and auto"],
)
def test_switches_go_on_bit_for_bit(switches: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in flight between two steps belongs to neither; what auto took is kept."""
    monkeypatch.chdir(tmp_path)
    often = {"every": 1, "keep": 100}
    config = config_of(tmp_path, train__batch_size=300, train__epochs=2, checkpoint=often, **switches)
    run = assert_goes_on(config, 4, 10)
    found = read_metrics(run)
    assert all("dead_experts" in record for record in found)
    assert [r["step"] for r in found if r.get("duplicate_experts") == []] == [1, 6]  # the first of each epoch
    configs = [yaml.safe_load(Path(r, "config.yaml").read_text()) for r in ("again", "whole")]
    executions = [config["mixture"]["init_args"]["execution"] for config in configs]
    assert executions[0] == executions[1] in ("loop", "stacked")


def test_more_epochs_may_be_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path, train__batch_size=500)
    assert here("train", "--config", config, "--out", "long", "--train.epochs", "2").code == 0
    assert here("train", "--config", config, "--out", "short").code == 0
    assert here("train", "--resume", "short", "--train.epochs", "2").code == 0
    assert records(tmp_path / "short") == records(tmp_path / "long")
    # At its end already: it is evaluated and drawn.
    assert here("train", "--resume", "short", "--pictures", "true").code == 0
    assert records(tmp_path / "short") == records(tmp_path / "long")
    assert os.path.exists(tmp_path / "short" / "images" / "experts.png")
