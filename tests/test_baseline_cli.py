"""``mixdist baseline``: what it leaves is a run to evaluate and compare, or it is refused in one line."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.launch import HARD, changed, here, refused, together, write_config

GAUSSIAN = {"expert__init_args__likelihood": "gaussian"}


@pytest.fixture
def config(folder: Path) -> str:
    return write_config(folder / "c.yaml", changed(valid=0.2, **GAUSSIAN))


def fitted(*words: str) -> dict[str, Any]:
    ended = here("baseline", *words, "--out", "run")
    assert (ended.code, ended.err) == (0, ""), ended
    return dict(json.loads(Path("run/evaluation.json").read_text()))


@pytest.mark.parametrize(
    ("words", "settings", "figures"),
    [
        (["ppca", "--components", "4,16"], {"components": 16}, {"log_likelihood", "rmse_row", "rmse_value"}),
        (["gmm", "--covariance", "diag", "--min_variance", "1e-3"], {"components": 4}, {"log_likelihood", "accuracy"}),
        (["kmeans", "--clusters", "10"], {"clusters": 10}, {"rmse_value", "accuracy", "purity", "nmi", "ari"}),
    ],
    ids=["ppca", "gmm", "kmeans"],
)
def test_a_baseline_is_left_like_a_run(
    config: str, words: list[str], settings: dict[str, Any], figures: set[str]
) -> None:
    told = fitted(*words, "--config", config, "--seed", "3")
    about, columns = told["protocol"]["baseline"], np.load("run/evaluation.npz", allow_pickle=False)
    assert figures <= told["figures"].keys() == told["errors"].keys()
    assert settings.items() <= about["settings"].items()
    num_valid = json.loads(Path("run/evaluation-valid.json").read_text())["protocol"]["rows"]
    assert (told["protocol"]["split"], told["protocol"]["rows"], about["train_rows"]) == ("test", 359, 1438 - num_valid)
    for name, value in told["figures"].items():
        assert columns[name].mean() == pytest.approx(value)
    assert yaml.safe_load(Path("run/config.yaml").read_text())["seed"] == 3
    before = Path("run/evaluation.json").read_bytes()
    valid = Path("run/evaluation-valid.json").read_bytes()
    assert here("evaluate", "run").code == here("evaluate", "run", "--split", "valid").code == 0
    assert (Path("run/evaluation.json").read_bytes(), Path("run/evaluation-valid.json").read_bytes()) == (before, valid)
    assert here("evaluate", "run", "--split", "train", "--rows", "100").code == 0
    assert json.loads(Path("run/evaluation-train.json").read_text())["protocol"]["rows"] == 100
    if about["tried"]:
        best = max(about["tried"], key=lambda one: one["valid_log_likelihood"])
        assert best["valid_log_likelihood"] == pytest.approx(json.loads(valid)["figures"]["log_likelihood"])
    refused("baseline", *words, "--config", config, "--out", "run", names="run")


def test_baselines_are_compared_with_runs(folder: Path) -> None:
    config = write_config(folder / "c.yaml", changed(**GAUSSIAN))
    assert here("train", "--config", config, "--out", "mixture").code == 0
    assert here("evaluate", "mixture", "--num_samples", "5").code == 0
    fitted("ppca", "--config", config)
    ended = here("compare", "mixture", "run")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("log_likelihood on 359 test rows")


def test_latents_of_a_run_are_clustered(folder: Path) -> None:
    config = write_config(folder / "c.yaml", changed(num_experts=1, **GAUSSIAN))
    assert here("train", "--config", config, "--out", "vae").code == 0
    told = fitted("gmm", "--on", "vae", "--components", "10")
    assert told["figures"].keys() == {"accuracy", "purity", "nmi", "ari"}
    assert told["protocol"]["likelihood"] is None
    refused("baseline", "kmeans", "--on", "vae", "--config", config, "--data.test_fraction", "0.3", names="vae data")
    refused("baseline", "kmeans", "--on", "vae", "--expert", "1", names="--expert 1 vae")
    refused("baseline", "kmeans", "--on", "nowhere", names="nowhere")


@pytest.mark.parametrize(("size", "budget", "epochs"), [("expert", "expert", 2), ("mixture", "mixture", 8)])
def test_one_expert_is_trained_alone(folder: Path, size: str, budget: str, epochs: int) -> None:
    config = write_config(folder / "c.yaml", changed(train__epochs=2, **GAUSSIAN))
    told = fitted("vae", "--config", config, "--size", size, "--budget", budget, "--num_samples", "3")
    about, own = told["protocol"]["baseline"], yaml.safe_load(Path("run/config.yaml").read_text())
    assert own["mixture"]["init_args"]["num_experts"] == 1
    assert own["train"]["epochs"] == epochs
    assert about["sample_gradients"] == epochs * 1438
    assert about["mixture_sample_gradients"] == 8 * 1438
    wanted = about["mixture_parameters"] / (4 if size == "expert" else 1)
    assert about["parameters"] == pytest.approx(wanted, rel=0.02)
    assert told["protocol"]["num_samples"] == 3
    assert "log_likelihood" in told["figures"]
    assert here("evaluate", "run", "--num_samples", "3").code == 0


def test_an_expert_of_a_competition_is_trained_alone(folder: Path) -> None:
    schedule = {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 0.01, "total_steps": 2}}
    config = write_config(folder / "c.yaml", changed(HARD, train__schedule=schedule, checkpoint={"every": 1}))
    fitted("vae", "--config", config, "--budget", "mixture", "--num_samples", "2")
    own = yaml.safe_load(Path("run/config.yaml").read_text())
    assert own["train"]["epochs"] == 2
    stretched = own["train"]["schedule"]["init_args"]
    assert (stretched["steps"], stretched["over"]) == (2, 2 * 4)


@pytest.mark.slow
def test_one_expert_is_the_same_on_two_ranks(folder: Path) -> None:
    config = write_config(folder / "c.yaml", changed(dtype="float64", **GAUSSIAN))
    one = fitted("vae", "--config", config, "--num_samples", "3")["figures"]
    words = ["baseline", "vae", "--config", config, "--num_samples", "3", "--out", "two"]
    assert together(*words, ranks=2, folder=folder).code == 0
    two = json.loads(Path("two/evaluation.json").read_text())["figures"]
    assert two == pytest.approx(one, rel=1e-9)


PARABOLAS = {"data": {"class_path": "mixdist.data.Parabolas"}, "expert": {"class_path": "mixdist.experts.Regressor"}}
BLOBS = {"class_path": "mixdist.data.Blobs", "init_args": {"rows": 20, "test_rows": 5, "num_features": 30}}


@pytest.mark.parametrize(
    ("words", "changes", "names"),
    [
        (["nonsense"], {}, "nonsense ppca gmm kmeans vae"),
        (["--seed", "1"], {}, "--seed ppca"),
        (["ppca", "--components", "20"], {"data": BLOBS}, "--components 20 rows"),
        (["ppca", "--components", "64"], {}, "--components 64 numbers"),
        (["ppca", "--components", "0"], {}, "--components 0"),
        (["ppca", "--components", "few"], {}, "--components few"),
        (["ppca", "--components", "2,4"], {}, "--components 2,4 valid"),
        (["ppca", "--field", "y"], {}, "y 10 classes"),
        (["ppca", "--field", "z"], {}, "'z' x"),
        (["ppca", "--rows", "0"], {}, "--rows 0"),
        (["ppca", "--on", "run"], {}, "--on"),
        (["ppca", "--likelihood", "mass"], {"data": BLOBS}, "mass float32"),
        (["ppca", "--rows", "2"], {"data": BLOBS}, "2 noise"),
        (["gmm", "--on", "nowhere"], {}, "--on nowhere"),
        (["gmm", "--expert", "0"], {}, "--expert 0 --on"),
        (["gmm", "--components", "21"], {"data": BLOBS}, "--components 21 20"),
        (["gmm", "--min_variance", "0"], {}, "--min_variance 0 singular"),
        (["gmm", "--min_variance", "-1"], {}, "--min_variance -1"),
        (["gmm", "--min_variance", "nan"], {}, "--min_variance nan"),
        (["gmm", "--max_iter", "0"], {}, "--max_iter 0"),
        (["gmm", "--covariance", "round"], {}, "round full"),
        (["kmeans", "--clusters", "0"], {}, "--clusters 0"),
        (["kmeans", "--clusters", "2000"], {}, "--clusters 2000 1438"),
        (["vae", "--size", "huge"], {}, "huge expert mixture"),
        (["vae", "--expert", "1"], {}, "--expert 1"),
        (["vae", "--num_samples", "0"], {}, "--num_samples 0"),
        (["vae", "--size", "mixture"], {"expert": {"class_path": "mixdist.experts.Centroid"}}, "Centroid widths"),
    ],
)
def test_what_makes_no_sense_is_refused(folder: Path, words: list[str], changes: dict[str, Any], names: str) -> None:
    config = write_config(folder / "c.yaml", changed(**changes))
    refused("baseline", *words, "--config", config, names=names)


def test_a_full_disk_is_told_and_leaves_nothing_that_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(folder / "c.yaml", changed(data=BLOBS))
    words, written = ("baseline", "ppca", "--config", config, "--components", "1", "--out", "run"), list[int]()

    def full(file: int) -> None:
        written.append(file)
        if len(written) == end_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mixdist.files.os.fsync", full)
    for end_at in range(1, 7):
        written.clear()
        ended = here(*words)
        if len(written) < end_at:
            break
        assert (ended.code, ended.err.count("\n")) == (2, 1)
        assert "No space left on device: 'run/" in ended.err
        assert not Path("run").exists()
    assert (ended.code, end_at) == (0, 6)
    end_at = 0
    before = Path("run/baseline.json").read_bytes()
    refused(*words, names="run holds a baseline already: remove it, or name another directory")
    assert Path("run/baseline.json").read_bytes() == before
    Path("run/config.yaml").unlink()  # as of a process that was killed
    assert here(*words).code == 0


def test_data_without_a_label_cannot_be_clustered(folder: Path) -> None:
    (folder / "unlabelled.py").write_text(
        "import torch\nfrom mixdist.data import Dataset, Source, Splits\nfrom mixdist.terms import Field\n\n\n"
        "class Unlabelled(Source):\n    def load(self):\n"
        "        x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))\n"
        "        ids, spec = torch.arange(30), {'x': Field((4,), torch.float32)}\n"
        "        parts = (slice(20), slice(20, 30))\n"
        "        return Splits(*(Dataset({'id': ids[part], 'x': x[part]}, spec) for part in parts))\n"
    )
    config = write_config(folder / "c.yaml", changed(data={"class_path": "unlabelled.Unlabelled"}, **GAUSSIAN))
    refused("baseline", "kmeans", "--config", config, names="label")
    assert "log_likelihood" in fitted("gmm", "--config", config, "--components", "2")["figures"]


def test_help_names_the_kinds_and_their_options() -> None:
    assert all(kind in here("baseline", "--help").out for kind in ("ppca", "gmm", "kmeans", "vae"))
    assert "--min_variance" in here("baseline", "gmm", "--help").out
