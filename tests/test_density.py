"""Samples of a mixture are shared out by weight and belong to no layout; their density is told with its protocol."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixdist.config.build import build, build_mesh
from mixdist.config.parsing import read_config
from mixdist.mixtures import Ensemble
from mixdist.mixtures.samples import apportioned, samples_of
from mixdist.noise import Moment
from tests.launch import SMALL, changed, here, mlp, together, write_config

OPTIMIZER = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.005}}
HARD: dict[str, Any] = {
    "data": {"class_path": "mixdist.data.Bananas", "init_args": {"modes": 3, "rows": 900, "test_rows": 300}},
    "mixture": {
        "class_path": "mixdist.competition.Competition",
        "init_args": {
            "expert": {
                "class_path": "mixdist.experts.VAE",
                "init_args": {"network": mlp(32), "latent": 2, "likelihood": "gaussian", "mean": "identity"},
            },
            "num_experts": 3,
            "rounds": 2,
            "score": {"class_path": "mixdist.competition.Elbo"},
        },
    },
    "pretrain": [{"epochs": 2, "batch_size": 50, "optimizer": OPTIMIZER}],
    "train": {"epochs": 3, "batch_size": 50, "optimizer": OPTIMIZER},
}


def untrained(config: str) -> Ensemble:
    """Build the mixture of a config in one process."""
    made = read_config(Path(config))
    mixture = build(made, build_mesh(made)).mixture
    assert isinstance(mixture, Ensemble)
    return mixture


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a hard mixture once; tests work on copies."""
    folder = tmp_path_factory.mktemp("trained")
    ended = here("train", "--config", write_config(folder / "c.yaml", HARD), "--out", str(folder / "run"))
    assert (ended.code, ended.err) == (0, ""), ended
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(trained, tmp_path / "run"))


def evaluated(*words: str, name: str = "evaluation.json") -> dict[str, Any]:
    ended = here("evaluate", "run", *words)
    assert (ended.code, ended.err) == (0, ""), ended
    found: dict[str, Any] = json.loads((Path("run") / name).read_text())
    return found


RNG = np.random.default_rng(0)
COUNTS = [RNG.integers(0, 100, size=size) * RNG.integers(0, 2, size=size) for size in range(2, 40)]


@pytest.mark.parametrize("num_samples", [0, 1, 7, 500])
@pytest.mark.parametrize("counts", [counts for counts in COUNTS if counts.any()], ids=len)
def test_samples_are_shared_out_by_weight(counts: np.ndarray, num_samples: int) -> None:
    share_E = counts / counts.sum()
    given_E = apportioned(share_E, num_samples)
    assert given_E.sum() == num_samples
    assert (np.abs(given_E - num_samples * share_E) < 1 + 1e-6).all()
    assert (given_E[share_E == 0] == 0).all()


@pytest.mark.parametrize(
    ("share", "num_samples", "wanted"),
    [
        ([0.5, 0.3, 0.2], 10, [5, 3, 2]),
        ([1 / 3, 1 / 3, 1 / 3], 10, [4, 3, 3]),
        ([1 / 3, 1 / 3, 1 / 3], 3, [1, 1, 1]),
        ([0.1, 0.2, 0.7], 2, [0, 1, 1]),
    ],
)
def test_the_largest_remainders_win_and_ties_go_to_the_lowest(
    share: list[float], num_samples: int, wanted: list[int]
) -> None:
    assert apportioned(np.array(share), num_samples).tolist() == wanted


def test_a_sample_depends_on_its_number_and_expert_alone(tmp_path: Path) -> None:
    mixture = untrained(write_config(tmp_path / "c.yaml", HARD))
    few, many = (samples_of(mixture, np.array(counts), Moment(3), True) for counts in ([2, 0, 5], [1203, 4, 5]))
    assert [len(few[e]) for e in range(3)] == [2, 0, 5]
    np.testing.assert_allclose(many[0][:2], few[0], rtol=1e-6)
    np.testing.assert_array_equal(many[2], few[2])
    assert len(np.unique(many[0], axis=0)) == 1203
    assert not np.isin(many[0][:4], many[1]).any()
    means = samples_of(mixture, np.array([2, 0, 5]), Moment(3), False)
    assert np.abs(means[0] - few[0]).max() > 0.1


def test_two_ranks_and_one_process_give_the_same(run: Path, tmp_path: Path) -> None:
    one = evaluated("--num_samples", "5", "--kde", "501")
    (run / "evaluation.json").unlink()
    ended = together("evaluate", "run", "--num_samples", "5", "--kde", "501", ranks=2, folder=tmp_path)
    assert ended.code == 0, ended
    two = json.loads((run / "evaluation.json").read_text())
    assert two["figures"] == pytest.approx(one["figures"], rel=1e-5)
    assert two["protocol"]["kde"]["samples_of_experts"] == one["protocol"]["kde"]["samples_of_experts"]
    assert two["protocol"]["kde"]["bandwidth"] == pytest.approx(one["protocol"]["kde"]["bandwidth"], rel=1e-4)


def test_the_bar_and_the_bounds_of_a_hard_mixture(run: Path) -> None:
    found = evaluated("--num_samples", "20", "--kde", "1000")
    figures, protocol = found["figures"], found["protocol"]
    # No density has a higher mean log-likelihood than the truth, but for the sampling of 300 rows.
    assert figures["log_likelihood"] < figures["exact_log_likelihood"] + 0.1
    assert figures["elbo"] <= figures["log_likelihood"]
    assert figures["kde_log_likelihood"] < figures["exact_log_likelihood"] + 0.1
    # Both estimate the density of one mixture; the kernels blur it.
    assert figures["kde_log_likelihood"] == pytest.approx(figures["log_likelihood"], abs=1.0)
    assert figures["routing_entropy"] == 0
    assert "the last round's table" in protocol["weights"]
    assert (protocol["likelihood"], protocol["likelihood_of"]) == ("density", "x")
    assert protocol["mixture"]["class_path"] == "mixdist.competition.Competition"
    assert protocol["mixture"]["init_args"]["score"]["class_path"] == "mixdist.competition.Elbo"
    weights = [expert["weight"] for expert in found["experts"]]
    assert math.fsum(weights) == pytest.approx(1)
    (table,) = sorted((run / "assignments").glob("round-0002.json"))
    assert weights == pytest.approx([count / 900 for count in json.loads(table.read_text())["counts"]])
    assert sum(protocol["kde"]["samples_of_experts"]) == 1000
    assert protocol["kde"]["samples_of_experts"] == apportioned(np.array(weights), 1000).tolist()


def test_original_units_are_a_constant_away(run: Path) -> None:
    found = evaluated("--num_samples", "1")
    original = found["figures"]["exact_log_likelihood"] + found["protocol"]["add_for_stored_units"]
    # log 3 + log(2 pi e sqrt(100 * 1)): the modes hardly overlap; 300 rows leave 1 / sqrt(300) of sampling.
    assert original == pytest.approx(-(math.log(3) + math.log(2 * math.pi * math.e * 10)), abs=0.2)
    assert found["protocol"]["kde"] is None
    assert "kde_log_likelihood" not in found["figures"]


def test_no_row_both_chooses_the_bandwidth_and_is_reported(run: Path) -> None:
    kde = evaluated("--split", "train", "--num_samples", "1", "--kde", "100", name="evaluation-train.json")
    described = kde["protocol"]["kde"]
    assert described["rows"] == 900 - 90
    assert described["bandwidth_chosen_on"].startswith("90 training rows")


@pytest.mark.parametrize(("words", "told"), [(["--kde", "-1"], "--kde (-1) must be 0 or more")])
def test_a_number_of_samples_that_cannot_be(words: list[str], told: str, run: Path) -> None:
    ended = here("evaluate", "run", *words)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert told in ended.err


def test_experts_that_do_not_draw_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expert = {"class_path": "mixdist.experts.Regressor"}
    config = changed(data={"class_path": "mixdist.data.Parabolas"}, num_experts=2, expert=expert)
    assert here("train", "--config", write_config(tmp_path / "c.yaml", config), "--out", "run").code == 0
    ended = here("evaluate", "run", "--kde", "10")
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert all(word in ended.err for word in ("--kde (10)", "Regressor", "Softmax", "VaDE", "leave --kde out"))


def test_one_row_has_a_kernel_density_too(run: Path) -> None:
    one = evaluated("--rows", "1", "--num_samples", "1", "--kde", "50")
    assert one["protocol"]["kde"]["rows"] == 1
    assert math.isfinite(one["figures"]["kde_log_likelihood"])


GATE_LOSS, SILENT = "mixdist.mixtures.GateLoss", "mixdist.experts.Silent"


def test_a_gate_alone_has_a_kernel_density(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of samples of its clusters; near its own exact density, where there are many samples; alike on two ranks."""
    monkeypatch.chdir(tmp_path)
    blobs = {"num_classes": 3, "rows": 600, "test_rows": 200, "spread": 0.2}
    gate = {"class_path": "mixdist.gates.GMM", "init_args": {"start": "em", "start_rows": 300}}
    changes = {
        "data": {"class_path": "mixdist.data.Blobs", "init_args": blobs},
        "gate": gate,
        "num_experts": 3,
        "expert": {"class_path": SILENT},
        "train__objective": {"class_path": GATE_LOSS},
    }
    assert here("train", "--config", write_config(tmp_path / "c.yaml", changed(**changes)), "--out", "run").code == 0
    one = evaluated("--kde", "3000")
    figures, kde = one["figures"], one["protocol"]["kde"]
    assert figures["kde_log_likelihood"] == pytest.approx(figures["gate_log_likelihood"], abs=0.15)
    assert sum(kde["samples_of_clusters"]) == 3000
    assert min(kde["samples_of_clusters"]) > 500
    ended = together("evaluate", "run", "--kde", "3000", ranks=2, folder=tmp_path)
    assert ended.code == 0, ended.err
    two = json.loads(Path("run/evaluation.json").read_text())
    assert two["figures"]["kde_log_likelihood"] == pytest.approx(figures["kde_log_likelihood"], rel=1e-4)


def test_a_soft_mixture_has_a_kernel_density(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert here("train", "--config", write_config(tmp_path / "c.yaml", SMALL), "--out", "run").code == 0
    found = evaluated("--num_samples", "1", "--kde", "200")
    assert math.isfinite(found["figures"]["kde_log_likelihood"])
    assert "mean responsibilities" in found["protocol"]["weights"]
    weights = np.array([expert["weight"] for expert in found["experts"]])
    assert found["protocol"]["kde"]["samples_of_experts"] == apportioned(weights, 200).tolist()
