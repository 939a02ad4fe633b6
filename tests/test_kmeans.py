"""k-means as a competition of centroids (seed document 004, section 6): scikit-learn's Lloyd, centre for centre."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sklearn.cluster import KMeans

from mixdist.data import Digits
from mixdist.report.metrics import read_metrics
from tests.launch import ROOT, here, together, write_config
from tests.test_density import untrained

OWN = '''
"""A centroid that starts near a digit, drawn as initial weights are."""
import torch
from mixdist.data import Digits
from mixdist.experts import Centroid

X = Digits().load()[0].rows["x"].flatten(1) / 16


class Near(Centroid):
    def __init__(self, spec):
        super().__init__(spec)
        with torch.no_grad():
            # Not at it: digits are whole numbers, and some would be as far from one centre as from another.
            self.mean.copy_(X[torch.randint(len(X), (1,))] + 0.01 * torch.randn(1, 64))
'''
ROUNDS = 10
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}}
CONFIG: dict[str, Any] = {
    "data": {"class_path": "mixdist.data.Digits"},
    "mixture": {
        "class_path": "mixdist.competition.Competition",
        "init_args": {
            "expert": {"class_path": "near_digits.Near"},
            "num_experts": 10,
            "rounds": ROUNDS,
            "start": "all",
            "block": 500,
            "score": {"class_path": "mixdist.competition.Elbo"},
            "by_shares": False,
        },
    },
    "dtype": "float64",
    "seed": 1,
    "train": {"epochs": 1, "batch_size": 1438, "optimizer": SGD},
    "checkpoint": {"keep": 100},
}


def centres(run: Path, total: int) -> np.ndarray:
    files = sorted((run / "checkpoints" / f"step-{total:09d}").glob("expert-*.safetensors"))
    return torch.cat([load_file(file)["model.mean"] for file in files]).numpy()


def points() -> np.ndarray:
    digits = Digits().load()[0]
    return digits.spec["x"].values(digits.rows["x"], torch.float64).flatten(1).numpy()


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_rounds_are_the_iterations_of_lloyd(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "near_digits.py").write_text(OWN)
    words = ["train", "--config", write_config(tmp_path / "c.yaml", CONFIG), "--out", "run"]
    ended = here(*words) if ranks == 1 else together(*words, ranks=ranks, folder=tmp_path)
    assert ended.code == 0, ended.err
    x, made = points(), untrained("c.yaml").bank.owned()
    first = torch.cat([expert.get_parameter("mean").detach() for expert in made.values()]).numpy()
    records = [record for record in read_metrics(tmp_path / "run") if "round" in record]
    assert all(min(record["counts"]) > 0 for record in records), "a cluster is empty: choose another seed"
    for num_rounds in range(1, ROUNDS + 1):
        judge = KMeans(10, init=first, n_init=1, algorithm="lloyd", tol=0, max_iter=num_rounds).fit(x)
        assert judge.n_iter_ == num_rounds  # it had not converged, so each round is a test
        mine = centres(tmp_path / "run", 1 + 2 * num_rounds)
        np.testing.assert_allclose(mine, judge.cluster_centers_, rtol=0, atol=1e-11)
        # Its labels belong to its last centres, as a round's table belongs to the experts of the round.
        table = np.load(tmp_path / "run" / "assignments" / f"round-{num_rounds:04d}.npy", allow_pickle=False)
        assert (table == judge.labels_).all()
        # F = inertia / (2 N) + D log(2 pi) / 2.
        objective = judge.inertia_ / (2 * len(x)) + 32 * np.log(2 * np.pi)
        assert records[num_rounds]["objective"] == pytest.approx(objective, rel=1e-12)
    assert not any(record["objective_rose"] for record in records)  # Lloyd's iterations never make it worse


def test_the_config_clusters_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converged, and no worse than the median of scikit-learn's random starts by more than 2%."""
    monkeypatch.chdir(tmp_path)
    path = ROOT / "configs" / "kmeans_digits.yaml"
    ended = here("train", "--config", str(path), "--out", "run")
    assert (ended.code, ended.err) == (0, "")
    last = read_metrics(tmp_path / "run")[-1]
    assert last["changed"] == 0
    assert last["round"] < yaml.safe_load(path.read_text())["mixture"]["init_args"]["rounds"]
    x = points()
    inertia = (last["objective"] - 32 * np.log(2 * np.pi)) * 2 * len(x)
    others = [KMeans(10, init="random", n_init=1, random_state=seed).fit(x).inertia_ for seed in range(9)]
    assert inertia <= 1.02 * np.median(others)
    assert (tmp_path / "run" / "images" / "experts.png").exists()
