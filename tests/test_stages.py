"""A gate learns in stages and starts from its latents: the same on every layout, and after a kill in any stage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mixdist.report.metrics import read_metrics
from tests.launch import changed, here, mlp, refused, together, write_config
from tests.test_deepspeed import needs_deepspeed, ready

STEPS_EACH, STAGES = 3, ("autoencoder", "classify", "joint")
TIMES = ("rows_per_s", "waiting_s", "transfer_s", "peak_memory_bytes", "wire_bytes", "wire_bytes_min", "sync_bytes")

GATE_LOSS = {"class_path": "mixdist.mixtures.GateLoss"}
INFORMATION = {
    "class_path": "mixdist.mixtures.Information",
    "init_args": {"balance": {"class_path": "mixdist.mixtures.KLBalance"}},
}


def phase(stage: str, **more: Any) -> dict[str, Any]:
    objective = INFORMATION if stage == "classify" else GATE_LOSS
    optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}
    return {"stage": stage, "epochs": 1, "batch_size": 500, "objective": objective, "optimizer": optimizer, **more}


def config_of(folder: Path, gate: str, alone: bool, **options: Any) -> str:
    """Write a run of four phases: each stage of the gate, then gate and experts."""
    options = {"latent": 2, "network": mlp(16), "start_rows": 700, **options}
    options["start"] = "classes" if gate == "DMVAE" else "mixture"
    changes: dict[str, Any] = {
        "gate": {"class_path": f"mixdist.gates.{gate}", "init_args": options},
        "dtype": "float64",
        "pretrain": [phase(stage, trains="gate") for stage in STAGES],
        "checkpoint": {"every": 1, "keep": 100},
    }
    if alone:
        changes |= {"expert": {"class_path": "mixdist.experts.Silent"}, "train__objective": GATE_LOSS}
    return write_config(folder / "config.yaml", changed(**changes))


def tensors(run: Path) -> dict[str, Tensor]:
    last = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    return {f"{path.stem}.{k}": v for path in last.glob("*.safetensors") for k, v in load_file(path).items()}


def assert_same(run: Path, whole: Path, tolerance: float) -> None:
    """Hold two runs against each other: max|a - b| <= tolerance max|b|, of each tensor and of all losses."""
    mine, theirs = ([r["loss"] for r in read_metrics(one)] for one in (run, whole))
    assert len(mine) == len(theirs) == STEPS_EACH * (len(STAGES) + 1)
    pairs = {"losses": (torch.tensor(mine), torch.tensor(theirs))}
    a, b = tensors(run), tensors(whole)
    assert a.keys() == b.keys()
    for name, (x, y) in (pairs | {name: (a[name], b[name]) for name in b}).items():
        assert (x - y).abs().max() <= tolerance * y.abs().max(), name


KILLS = ((2, 2), (4, 1), (6, 2), (8, 1))
"""After which step, and the ranks that go on: inside of stages, at the start of the joint one, and after it."""


@pytest.mark.parametrize(
    ("gate", "alone", "kills"),
    [
        pytest.param("DMVAE", False, KILLS, marks=pytest.mark.slow),
        pytest.param("VaDE", True, KILLS, marks=pytest.mark.slow),
    ],
    ids=["DMVAE over experts", "VaDE alone"],
)
def test_a_run_of_stages_is_the_same_on_any_layout_and_goes_on_in_each(
    gate: str, alone: bool, kills: Sequence[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config, whole = config_of(tmp_path, gate, alone), tmp_path / "whole"
    ended = here("train", "--config", config, "--out", "whole")
    assert ended.code == 0, ended.err
    # Two layouts from the start.
    ended = together("train", "--config", config, "--out", "four", "--mesh.ep_size", "2", ranks=4, folder=tmp_path)
    assert ended.code == 0, ended.err
    assert_same(tmp_path / "four", whole, 1e-10)
    for stop, ranks in kills:
        run = Path(shutil.copytree(whole, tmp_path / f"again-{stop}"))
        for path in run.glob("checkpoints/step-*"):
            if int(path.name.removeprefix("step-")) > stop:
                shutil.rmtree(path)
        words = ["train", "--resume", run.name]
        ended = together(*words, ranks=ranks, folder=tmp_path) if ranks > 1 else here(*words)
        assert ended.code == 0, ended.err
        assert_same(run, whole, 1e-10 if ranks > 1 else 0.0)


NATIVE, FSDP, ZERO = (f"mixdist.engines.{name}" for name in ("Native", "FSDP", "DeepSpeed"))
CHAIN: Sequence[tuple[int, int, str, dict[str, Any]]] = (
    (2, 2, NATIVE, {}),
    (4, 2, ZERO, {"zero": 1}),
    (2, 2, ZERO, {"zero": 2}),
    (4, 2, NATIVE, {"shard": "optimizer"}),
    (2, 1, FSDP, {"unit_bytes": 100}),
    (1, 1, NATIVE, {}),
)
"""Ranks, ep_size and engine of every two steps: engines change inside of stages, between them, and at the start."""


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("gate", "alone"), [("VaDE", True), ("VaDE", False), ("DMVAE", False)])
def test_engines_change_inside_and_between_stages(
    gate: str, alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held against the same chain of native engines, in float32: losses to 1e-6, weights and states to 1e-5."""
    monkeypatch.chdir(tmp_path)
    ready()
    config = config_of(tmp_path, gate, alone)
    for name in ("plain", "chain"):
        run = tmp_path / name
        for place, (ranks, ep_size, kind, options) in enumerate(CHAIN):
            engine = {"class_path": NATIVE} if name == "plain" else {"class_path": kind, "init_args": options}
            begun = ["--resume", name] if place else ["--config", config, "--out", name, "--dtype", "float32"]
            words = ["--engine", json.dumps(engine), "--mesh.ep_size", str(ep_size), "--mixture.execution", "loop"]
            for path in run.glob("checkpoints/step-*"):
                if int(path.name.removeprefix("step-")) > 2 * place:
                    shutil.rmtree(path)
            words = ["train", *begun, *words]
            ended = together(*words, ranks=ranks, folder=tmp_path) if ranks > 1 else here(*words)
            assert (ended.code, ended.err) == (0, ""), (name, kind)
    mine, theirs = ([r["loss"] for r in read_metrics(tmp_path / one)] for one in ("chain", "plain"))
    assert mine == pytest.approx(theirs, rel=1e-6)
    assert len(mine) == 2 * len(CHAIN)
    a, b = tensors(tmp_path / "chain"), tensors(tmp_path / "plain")
    assert a.keys() == b.keys()
    wrong = {k: ((a[k] - y).abs().max() / (y.abs().max() or 1.0)).item() for k, y in b.items()}
    assert {k: v for k, v in wrong.items() if not v <= 1e-5} == {}


def test_the_start_is_made_once_before_the_first_joint_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the autoencoder leaves alone is as drawn until then; the second joint phase goes on from the first."""
    monkeypatch.chdir(tmp_path)
    assert here("train", "--config", config_of(tmp_path, "VaDE", alone=True), "--out", "run").code == 0
    gates = [load_file(Path(f"run/checkpoints/step-{n:09d}/gate.safetensors")) for n in (3, 6, 7, 9, 10)]
    means = [gate["model.mean_KL"] for gate in gates]
    gains = [gate["model.log_var_gain_L"].abs().max() for gate in gates]
    assert gains[0] == gains[1] == 1  # posteriors are as drawn, and the prior has only learnt to classify
    assert gains[2] < 0.1  # begun from 0 one step ago
    assert (means[4] - means[3]).abs().max() <= 0.011 < (means[2] - means[1]).abs().max()  # a step of Adam, and a start


def test_em_fits_the_rows_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all training rows, whatever the layout: the likelihood of scikit-learn's own fit, or a better one."""
    from sklearn.mixture import GaussianMixture

    from mixdist.data import Blobs

    monkeypatch.chdir(tmp_path)
    blobs = {"num_classes": 3, "rows": 1200, "test_rows": 300, "spread": 0.2}
    gate = {"class_path": "mixdist.gates.GMM", "init_args": {"covariance": "full", "start": "em", "start_rows": 200}}
    changes = {
        "data": {"class_path": "mixdist.data.Blobs", "init_args": blobs},
        "gate": gate,
        "num_experts": 3,
        "dtype": "float64",
        "expert": {"class_path": "mixdist.experts.Silent"},
        "train__objective": GATE_LOSS,
        "train__optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e-12}},
    }
    config = write_config(tmp_path / "config.yaml", changed(**changes))
    assert here("train", "--config", config, "--out", "one").code == 0
    assert together("train", "--config", config, "--out", "two", ranks=2, folder=tmp_path).code == 0
    x = Blobs(**blobs).load()[0].rows["x"].double().numpy()
    likelihood = GaussianMixture(3, n_init=5, random_state=0).fit(x).score(x)
    losses = [[r["loss_gate"] for r in read_metrics(Path(run))] for run in ("one", "two")]
    mean = sum(loss * rows for loss, rows in zip(losses[0], (500, 500, 200), strict=True)) / 1200
    assert mean <= -likelihood + 1e-3
    mine, theirs = tensors(Path("two")), tensors(Path("one"))
    assert all((mine[name] - b).abs().max() <= 1e-10 * b.abs().max() for name, b in theirs.items())


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--train.stage", "clasify"], "train.stage clasify VaDE autoencoder classify joint"),
        (["--mixture.gate", "mixdist.gates.Softmax"], "pretrain[0].stage autoencoder Softmax joint"),
        (["--data.test_fraction", "0.999"], "VaDE start 4"),
        (["--train.objective", "mixdist.mixtures.WeightedLoss"], "WeightedLoss Silent GateLoss"),
        (["--train.trains", "experts"], "train.trains experts"),
        (["--mixture.expert", "mixdist.experts.VAE", "--train.trains", "both"], "train.trains both GateLoss gate"),
        (["--pretrain", "[]", "--train.stage", "classify"], "GateLoss Information stage joint"),
        (["--pretrain", "[]", "--mixture.gate", "mixdist.gates.Softmax"], "GateLoss Information Softmax"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    words: list[str], names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path, "VaDE", alone=True)
    refused("train", "--config", config, *words, names=names)


def test_a_full_covariance_needs_more_rows_than_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gate = {"class_path": "mixdist.gates.GMM", "init_args": {"covariance": "full", "start": "em"}}
    silent = {"class_path": "mixdist.experts.Silent"}
    config = write_config(tmp_path / "config.yaml", changed(gate=gate, expert=silent, train__objective=GATE_LOSS))
    refused("train", "--config", config, "--valid", "1400", names="GMM covariance full 64")


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_em_without_variance_says_what_to_raise(
    covariance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number that is the same in all rows has none but min_variance."""
    monkeypatch.chdir(tmp_path)
    options = {"covariance": covariance, "start": "em", "min_variance": 1e-300}
    gate = {"class_path": "mixdist.gates.GMM", "init_args": options}
    silent = {"class_path": "mixdist.experts.Silent"}
    config = write_config(tmp_path / "config.yaml", changed(gate=gate, expert=silent, train__objective=GATE_LOSS))
    refused("train", "--config", config, names="GMM min_variance 1e-300")


def test_a_run_goes_on_with_its_own_start_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path, "VaDE", alone=True)
    assert here("train", "--config", config, "--out", "run").code == 0
    for words, names in ((["start", "none"], "starts mixture"), (["start_rows", "77"], "starts start_rows 77")):
        ended = here("train", "--resume", "run", f"--mixture.gate.{words[0]}", words[1])
        assert ended.code == 2
        assert all(name in ended.err for name in names.split()), ended.err


def test_a_competition_has_no_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.launch import HARD

    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path / "config.yaml", changed(HARD))
    refused("train", "--config", config, "--train.stage", "classify", names="train.stage classify Competition")
