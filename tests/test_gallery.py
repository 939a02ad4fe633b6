"""The pictures of a run: which ones it has, and that they show the same on any layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mixdist.data import Bananas, Digits
from mixdist.evaluate import Evaluation
from mixdist.gallery import NUM_POINTS, NUM_SAMPLES, NUM_WHOLE, samples
from tests.launch import changed, here, torchrun, write_config
from tests.test_density import HARD, session_of


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pictures(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "images").iterdir())}


def test_a_hard_run_on_images_shows_rounds_labels_and_the_mixture_on_any_layout(folder: Path) -> None:
    hard = {"rounds": 2, "score": {"class_path": "mixdist.scores.Elbo"}}
    keep = {name: HARD[name] for name in ("pretrain", "train")}
    config = {**changed(), **keep, "competition": hard}
    del config["gate"]
    assert here("train", "--config", write_config(folder / "c.yaml", config), "--out", "run").code == 0
    one = pictures(folder / "run")
    assert list(one) == ["experts.png", "labels.png", "mixture.png", "rounds.png", "training.png"]
    for name in one:
        (folder / "run" / "images" / name).unlink()
    ended = torchrun("train", "--resume", "run", ranks=2, folder=folder)  # nothing is left to train
    assert ended.code == 0, ended
    two = pictures(folder / "run")
    assert list(two) == list(one)
    assert two["mixture.png"] == one["mixture.png"]
    assert two["labels.png"] == one["labels.png"]


def test_a_soft_run_has_no_rounds(folder: Path) -> None:
    assert here("train", "--config", write_config(folder / "c.yaml", changed()), "--out", "run").code == 0
    assert list(pictures(folder / "run")) == ["experts.png", "labels.png", "mixture.png", "training.png"]


def test_a_run_in_the_plane_shows_its_rounds_and_no_images(folder: Path) -> None:
    assert here("train", "--config", write_config(folder / "c.yaml", HARD), "--out", "run").code == 0
    assert list(pictures(folder / "run")) == ["experts.png", "labels.png", "rounds.png", "training.png"]


def evaluation(share: list[float]) -> Evaluation:
    none = np.zeros(0)
    return Evaluation({}, none, none, None, none, np.array(share), {}, {}, [])


def test_points_are_drawn_with_their_noise(folder: Path) -> None:
    mixture = session_of(write_config(folder / "c.yaml", HARD)).mixture
    drawn, whole = samples(mixture, Bananas(rows=30, test_rows=10).load()[1], evaluation([1 / 3] * 3), seed=0)
    assert whole is None
    assert [drawn[f"{e}/samples"].shape for e in range(3)] == [(NUM_POINTS, 2)] * 3
    # Untrained, the likelihood has standard deviation 1 about means that hardly differ.
    for e in range(3):
        assert drawn[f"{e}/samples"].std(axis=0) == pytest.approx([1, 1], abs=0.5)


def test_images_of_the_mixture_come_from_experts_by_their_weight(folder: Path) -> None:
    mixture = session_of(write_config(folder / "c.yaml", changed())).mixture
    share = [0.5, 0.25, 0.25, 0.0]
    drawn, whole = samples(mixture, Digits().load()[1], evaluation(share), seed=0)
    assert whole is not None
    assert len(whole) == NUM_WHOLE
    assert [drawn[f"{e}/samples"].shape for e in range(4)] == [(NUM_SAMPLES, *whole.shape[1:])] * 4
    for e, one in enumerate(mixture.bank.owned().values()):
        first = drawn[f"{e}/samples"]
        stand = [int((whole == image).all(axis=tuple(range(1, whole.ndim))).sum()) for image in first]
        assert stand == [1 if share[e] else 0] * NUM_SAMPLES
        assert one.training
    assert torch.isfinite(torch.from_numpy(whole)).all()
