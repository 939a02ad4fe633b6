"""A family from outside the package, named in a YAML file, is a family like any other.

It is trained, killed, resumed on another layout, evaluated, drawn, sampled and loaded, on 1, 2 and 4 ranks.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import mixdist
from mixdist.data import Digits
from mixdist.report.metrics import read_metrics
from tests.launch import here, together, write_config

STEPS, KILLED_AT = 12, 5
CONFIG: dict[str, Any] = {
    "data": {"class_path": "mixdist.data.Digits"},
    "mixture": {"class_path": "tests.two_stage.TwoStage", "init_args": {"num_experts": 4, "width": 5}},
    "dtype": "float64",
    "train": {"epochs": 1, "batch_size": 120, "clip_norm": 5.0},
    "checkpoint": {"every": 1, "keep": 100},
    "log_every": 1,
    "pictures": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("family")


@pytest.fixture(autouse=True)
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run in one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert here("train", "--config", write_config(folder / "two.yaml", CONFIG), "--out", "whole").code == 0
    return folder / "whole"


def weights(run: Path, step: int = STEPS) -> dict[str, Tensor]:
    files = sorted((run / "checkpoints" / f"step-{step:09d}").glob("*.safetensors"))
    assert [file.stem for file in files] == ["decoder", *(f"expert-{e:04d}" for e in range(4))]
    return {f"{file.stem} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_close(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (mine[name] - tensor).abs().max() <= 1e-10 * tensor.abs().max(), name


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_it_trains_and_goes_on_where_it_was_killed_on_another_layout(ranks: int, whole: Path, folder: Path) -> None:
    run = folder / f"killed-{ranks}"
    shutil.copytree(whole, run)
    for step in range(KILLED_AT + 1, STEPS + 1):  # a run that was killed has nothing after its last checkpoint
        shutil.rmtree(run / "checkpoints" / f"step-{step:09d}")
    shutil.rmtree(run / "images")
    assert together("train", "--resume", run.name, ranks=ranks, folder=folder).code == 0
    assert_close(weights(run), weights(whole))
    assert [record["step"] for record in read_metrics(run)] == list(range(1, STEPS + 1))
    assert (run / "images" / "two_stages.png").is_file()
    assert (run / "images" / "training.png").is_file()


def test_its_record_has_its_own_sums(whole: Path) -> None:
    for record in read_metrics(whole):
        assert sum(record["weight"]) == pytest.approx(1, rel=1e-12)
        assert "load" not in record
    assert record["loss"] < read_metrics(whole)[0]["loss"]


def test_a_run_with_another_width_is_not_resumed(whole: Path) -> None:
    ended = here("train", "--resume", whole.name, "--mixture.width", "6")
    assert ended.code == 2
    assert "was made with width 5, the config has 6" in ended.err


def test_it_is_evaluated_on_any_layout(whole: Path) -> None:
    found, rows = [], []
    for ranks in (1, 2, 4):
        ended = together("evaluate", whole.name, ranks=ranks, folder=whole.parent)
        assert ended.code == 0, ended.err
        assert "359 test rows: squared_error" in ended.out
        found.append(json.loads((whole / "evaluation.json").read_text()))
        with np.load(whole / "evaluation.npz", allow_pickle=False) as columns:
            rows.append(dict(columns))
    assert found[0]["figures"].keys() == {"squared_error", "largest_weight"}
    assert found[0]["errors"].keys() == {"largest_weight"}  # a sum over rows has no error
    for own in rows:
        assert own.keys() == {"id", "label", "largest_weight"}
        np.testing.assert_array_equal(own["id"], Digits().load()[1].ids)
        np.testing.assert_allclose(own["largest_weight"], rows[0]["largest_weight"], rtol=1e-10)
    assert rows[0]["largest_weight"].mean() == pytest.approx(found[0]["figures"]["largest_weight"], rel=1e-12)
    assert found[0]["protocol"]["mixture"] == CONFIG["mixture"]
    for other in found[1:]:
        assert other["figures"] == pytest.approx(found[0]["figures"], rel=1e-10)


def test_what_it_does_not_have_is_refused_in_one_line(whole: Path) -> None:
    ended = here("evaluate", whole.name, "--kde", "100")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "--kde (100)" in ended.err


def test_it_is_drawn_sampled_and_loaded(whole: Path) -> None:
    with Image.open(whole / "images" / "two_stages.png") as picture:
        assert picture.width > 100
    assert here("sample", whole.name, "--num_samples", "5").code == 0
    assert (whole / "images" / "samples.png").is_file()
    model = mixdist.load(whole)
    rows = {name: column[:20] for name, column in Digits().load()[1].rows.items()}
    shown = model.reconstruct(rows)
    error = (shown - rows["x"].double() / 16).square().flatten(1).sum(1).mean()
    figures = json.loads((whole / "evaluation.json").read_text())["figures"]
    assert error.item() == pytest.approx(figures["squared_error"], rel=0.3)  # of 20 rows, and of all
    assert model.rows_of_samples(3)["the mixture"].shape == (3, 1, 8, 8)
    assert torch.equal(model.reconstruct(rows), shown)


OWN = '''
import torch
from mixdist.mixtures import Mixture
from tests.two_stage import TwoStage


class Silent(TwoStage):
    """A family without figures: it trains all the same."""

    measure = Mixture.measure


class Vector(TwoStage):
    def measure(self, batch, at):
        return {"error": torch.zeros(batch.size + 1)}


class Slashed(TwoStage):
    @property
    def parts(self):
        parts = super().parts
        return type(parts)({"my decoder": self.decoder}, parts.experts)


class Half(Mixture):
    """It has no backward."""

    num_experts = 2

    def setup(self, context):
        super().setup(context)

    @property
    def parts(self):
        return None
'''


@pytest.mark.parametrize(
    ("family", "code", "said"),
    [
        ("Silent", 0, "Silent has no figures"),
        ("Vector", 2, "error has shape"),
        ("Slashed", 2, "'my decoder' cannot name a file"),
        ("Half", 2, "(own.Half) cannot be made without backward"),
    ],
)
def test_a_family_that_lacks_something_is_told_of_it(
    family: str, code: int, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "own.py").write_text(OWN)
    monkeypatch.syspath_prepend(folder)
    config = {**CONFIG, "mixture": {"class_path": f"own.{family}"}}
    ended = here("train", "--config", write_config(folder / "own.yaml", config), "--out", f"own-{family}")
    assert ended.code == code, ended
    assert said in ended.out + ended.err
    assert ended.err.count("\n") == (code == 2)
