"""``mixdist evaluate``: the same figures on any layout, written with how they were taken, or refused in one line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

import mixdist
from mixdist.data import Digits
from mixdist.training.manifest import MANIFEST
from tests import sources
from tests.launch import Ended, changed, here, refused, together, write_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train once; tests work on copies."""
    folder = tmp_path_factory.mktemp("trained")
    config = changed(checkpoint={"every": 1}, train__epochs=3, expert__init_args__likelihood="gaussian")
    ended = here("train", "--config", write_config(folder / "c.yaml", config), "--out", str(folder / "run"))
    assert (ended.code, ended.err) == (0, "")
    return folder / "run"


@pytest.fixture
def run(trained: Path, folder: Path) -> Path:
    return Path(shutil.copytree(trained, folder / "run"))


def same(got: Any, wanted: Any, where: str = "") -> None:
    """Hold two JSON values against each other, numbers by 1e-5."""
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys(), where
        for name in wanted:
            same(got[name], wanted[name], f"{where}.{name}")
    elif isinstance(wanted, list):
        assert len(got) == len(wanted), where
        for i, inner in enumerate(wanted):
            same(got[i], inner, f"{where}[{i}]")
    elif isinstance(wanted, float):
        assert got == pytest.approx(wanted, rel=1e-5, abs=1e-6), where
    else:
        assert got == wanted, where


def evaluated(run: Path, *words: str, name: str = "evaluation.json") -> tuple[Ended, dict[str, Any]]:
    ended = here("evaluate", str(run), *words)
    assert (ended.code, ended.err) == (0, ""), ended
    return ended, json.loads((run / name).read_text())


def test_one_process_and_two_ranks_agree_and_say_how(run: Path, folder: Path) -> None:
    ended, one = evaluated(run, "--num_samples", "30")
    (run / "evaluation.json").unlink()
    two_ranks = together("evaluate", "--num_samples", "30", "run", ranks=2, folder=folder)
    assert two_ranks.code == 0, two_ranks
    same(json.loads((run / "evaluation.json").read_text()), one)
    assert not list(run.glob("*.partial"))

    protocol = one["protocol"]
    names = ("mixdist", "checkpoint", "step", "split", "rows", "seed", "num_samples")
    wanted = [mixdist.__version__, "step-000000009", 9, "test", 359, 0, 30]
    assert [protocol[name] for name in names] == wanted
    expert = protocol["mixture"]["init_args"]["expert"]["init_args"]
    assert (expert["likelihood"], expert["scale"]) == ("gaussian", "learned")
    assert protocol["data"] == Digits().load()[1].fingerprint
    figures = one["figures"]
    assert figures["elbo"] <= figures["log_likelihood"]
    assert {"accuracy", "purity", "nmi", "ari", "rmse_row", "rmse_value", "routing_entropy"} <= figures.keys()
    assert figures["rmse_row"] == pytest.approx(8 * figures["rmse_value"])
    assert [e["rows"] for e in one["experts"]] == [sum(counts) for counts in one["counts_EC"]]
    assert sum(e["rows"] for e in one["experts"]) == 359
    assert math.fsum(e["mean_responsibility"] for e in one["experts"]) == pytest.approx(1)
    header, _, *lines = ended.out.splitlines()
    wanted = ["expert", "rows", "mean", "loss", "elbo", "log-likelihood", "active", "units", "took", "y"]
    assert header.split() == wanted
    assert [line.split()[0] for line in lines[:4]] == ["0", "1", "2", "3"]
    assert f"log_likelihood {figures['log_likelihood']:.4f} +- {one['errors']['log_likelihood']:.2g}" in ended.out
    assert str(run / "evaluation.json") in ended.out


def test_another_split_has_a_file_of_its_own(run: Path) -> None:
    _, test = evaluated(run, "--num_samples", "1")
    kept = (run / "evaluation.json").read_bytes()
    _, train = evaluated(run, "--split", "train", "--num_samples", "1", name="evaluation-train.json")
    assert (run / "evaluation.json").read_bytes() == kept
    assert (train["protocol"]["split"], train["protocol"]["rows"]) == ("train", 1438)
    assert train["figures"] != test["figures"]
    assert test["experts"][0]["on_all_rows"]["importance_error"] is None  # one sample has no deviation


def test_the_first_rows_alone_are_evaluated_where_asked(run: Path) -> None:
    figures = []
    for num_rows in (1, 2):
        ended, told = evaluated(run, "--rows", str(num_rows), "--num_samples", "2")
        assert told["protocol"]["rows"] == sum(expert["rows"] for expert in told["experts"]) == num_rows
        assert f"\n{num_rows} test rows: " in ended.out
        figures.append(told["figures"]["log_likelihood"])
    assert figures[0] != figures[1]


def test_the_figures_are_the_run_s_own(run: Path) -> None:
    """The command finds the weights, the rows and the noise that the run ended with."""
    ended = here("train", "--resume", str(run))
    line = " ".join(ended.out.partition("test rows: ")[2].split())
    figures = evaluated(run, "--num_samples", "1")[1]["figures"]
    for name in figures.keys() - {"log_likelihood"}:  # it is the one that takes importance samples
        assert f" {name} {figures[name]:.4f}" in f" {line}", name


def test_data_may_move_but_not_change(folder: Path) -> None:
    (folder / "here").mkdir()
    sources.idx(folder / "here")
    data = {"class_path": "mixdist.data.Idx", "init_args": {"root": "here"}}
    config = changed(data=data, train__batch_size=4, mesh={"ep_size": 1})
    ended = here("train", "--config", write_config(folder / "c.yaml", config), "--out", "run")
    assert ended.code == 0, ended
    (folder / "here").rename(folder / "there")
    refused("evaluate", "run", names="here")
    words = ["run", "--data.root", "there", "--num_samples", "3"]
    assert evaluated(folder / "run", *words[1:])[1]["protocol"]["rows"] == 3
    (folder / "run" / "evaluation.json").unlink()
    own = json.loads((folder / "run/checkpoints/step-000000002/state.json").read_text())["run"]["data"]
    for path in (folder / "there").glob("train-images*"):
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
    line = refused("evaluate", *words)
    assert f"was made with data {own}, here is " in line
    assert len(line.rpartition("here is ")[2].partition(":")[0]) == len(own) == 64


def test_a_damaged_checkpoint_is_passed_over_and_told(run: Path) -> None:
    (run / "checkpoints/step-000000009/gate.safetensors").write_bytes(b"")
    ended = here("evaluate", "run", "--num_samples", "2")
    assert ended.code == 0
    assert ended.err.startswith("mixdist: checkpoint step-000000009 is damaged (gate.safetensors has 0 bytes")
    assert ended.err.endswith("; using step-000000008\n")
    assert json.loads((run / "evaluation.json").read_text())["protocol"]["step"] == 8
    for path in run.glob(f"checkpoints/*/{MANIFEST}"):
        path.write_text("{")
    (run / "evaluation.json").unlink()
    refused("evaluate", "run", names="step-000000009 damaged")


def test_a_mistake_is_told_once_by_rank_0(run: Path, folder: Path) -> None:
    ended = together("evaluate", "run", "--mixture.num_experts", "5", ranks=2, folder=folder)
    assert ended.code == 1  # torchrun's own
    assert ended.err.count("mixdist: ") == 1
    assert "was made with num_experts 4, here is 5" in ended.err
    assert not (run / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--mixture.expert.likelihood", "laplace"), "--mixture.expert.likelihood laplace gaussian run copy"),
        (("--mixture.routing", "mixdist.mixtures.TopK"), "--mixture.routing.k 2 None run"),
        (("--mixture.gate.temperature", "3"), "--mixture.gate.temperature 3.0 1.0 run"),
    ],
)
def test_another_mixture_leaves_the_figures_of_the_run(words: tuple[str, ...], names: str, run: Path) -> None:
    (run / "evaluation.json").write_text("kept")
    refused("evaluate", "run", *words, names=names)
    assert (run / "evaluation.json").read_text() == "kept"


def test_how_a_mixture_runs_is_free(run: Path) -> None:
    words = "--mixture.execution", "stacked", "--mixture.compute.micro_batch", "null", "--mixture.one_way", "true"
    assert evaluated(run, *words, "--test_batch_size", "50", "--num_samples", "1")[1]["figures"]["loss"]


def test_a_supervised_run_is_evaluated(folder: Path) -> None:
    expert = {"class_path": "mixdist.experts.Regressor", "init_args": {"likelihood": "gaussian"}}
    config = changed(data={"class_path": "mixdist.data.Parabolas"}, num_experts=2, expert=expert)
    ended = here("train", "--config", write_config(folder / "c.yaml", config), "--out", "run")
    assert ended.code == 0, ended
    found = evaluated(folder / "run")[1]
    assert found["protocol"]["num_samples"] is None
    assert "is exact" in found["protocol"]["sampled"]
    assert {"prediction_rmse", "conditional_log_likelihood"} <= found["figures"].keys()
