"""The pictures of a run: which ones it has, and that they show the same on any layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mixdist
from mixdist.data import Bananas, Dataset, Digits
from mixdist.mixtures import ExpertEvaluation
from mixdist.mixtures.pictures import Mosaic, Panels, Plane
from mixdist.mixtures.shown import NUM_POINTS, NUM_SAMPLES, NUM_WHOLE
from tests.launch import SMALL, changed, here, together, write_config
from tests.test_density import HARD, untrained


def pictures(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "images").iterdir())}


def test_a_hard_run_on_images_shows_rounds_labels_and_the_mixture_on_any_layout(folder: Path) -> None:
    expert = SMALL["mixture"]["init_args"]["expert"]
    config = changed(HARD, data=SMALL["data"], log_every=1, expert=expert, num_experts=4, pictures=True)
    assert here("train", "--config", write_config(folder / "c.yaml", config), "--out", "run").code == 0
    one = pictures(folder / "run")
    assert list(one) == ["experts.png", "labels.png", "mixture.png", "rounds.png", "training.png"]
    for name in one:
        (folder / "run" / "images" / name).unlink()
    ended = together("train", "--resume", "run", ranks=2, folder=folder)  # nothing is left to train
    assert ended.code == 0, ended
    two = pictures(folder / "run")
    assert list(two) == list(one)
    assert two["mixture.png"] == one["mixture.png"]
    assert two["labels.png"] == one["labels.png"]


def test_a_soft_run_has_no_rounds(folder: Path) -> None:
    assert here("train", "--config", write_config(folder / "c.yaml", changed(pictures=True)), "--out", "run").code == 0
    assert list(pictures(folder / "run")) == ["experts.png", "labels.png", "mixture.png", "training.png"]


def test_a_run_is_not_drawn_where_it_should_not_be(folder: Path) -> None:
    ended = here("train", "--config", write_config(folder / "c.yaml", changed(pictures=False)), "--out", "run")
    assert (ended.code, "picture" in ended.out) == (0, False), ended
    assert not (folder / "run" / "images").exists()


def test_a_run_in_the_plane_shows_its_rounds_and_no_images(folder: Path) -> None:
    assert (
        here("train", "--config", write_config(folder / "c.yaml", changed(HARD, pictures=True)), "--out", "run").code
        == 0
    )
    assert list(pictures(folder / "run")) == ["experts.png", "labels.png", "rounds.png", "training.png"]


FACES = '''
import torch
from mixdist.data import Dataset, Source, Splits
from mixdist.gates import Gate
from mixdist.terms import Field, Gating


class ByColour(Gate):
    """Expert 1 for red, 0 for blue."""

    fields = ("x",)

    def __init__(self, spec, num_experts):
        super().__init__()

    def forward(self, rows, eps):
        red = 9 * (rows["x"][:, 0] - rows["x"][:, 2]).mean((1, 2))
        return Gating(torch.log_softmax(torch.stack([-red, red], dim=1), dim=1))


class Faces(Source):
    """Images in red or blue with the attributes Red and, in half of both, Large."""

    def load(self):
        return Splits(self.part(0, 40), self.part(40, 20))

    def part(self, first, rows):
        ids = torch.arange(first, first + rows)
        marks = torch.stack([ids % 2, ids // 2 % 2], dim=1).to(torch.uint8)
        x = torch.zeros(rows, 3, 64, 64, dtype=torch.uint8)
        x[marks[:, 0] == 1, 0], x[marks[:, 0] == 0, 2] = 220, 220
        x[marks[:, 1] == 1, 1, 16:48, 16:48] = 128
        spec = {"x": Field((3, 64, 64), torch.uint8, scale=1 / 255), "marks": Field((2,), torch.uint8)}
        rows, names = {"id": ids, "x": x, "marks": marks}, ("Red", "Is_Large")
        return Dataset(rows, spec, attribute="marks", attribute_names=names)
'''


def test_a_run_on_colour_images_with_attributes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "my_faces.py").write_text(FACES)
    monkeypatch.syspath_prepend(folder)
    network = {"class_path": "mixdist.nets.Conv", "init_args": {"channels": [4, 4, 4, 4, 4]}}
    expert = {"latent": 4, "network": network, "likelihood": "logistic"}
    data, gate = {"class_path": "my_faces.Faces"}, {"class_path": "my_faces.ByColour"}
    vae = {"class_path": "mixdist.experts.VAE", "init_args": expert}
    config = changed(data=data, num_experts=2, gate=gate, expert=vae, train__batch_size=10, pictures=True)
    ended = here("train", "--config", write_config(folder / "c.yaml", config), "--out", "run")
    assert (ended.code, ended.err) == (0, ""), ended
    header, _, *lines = ended.out.splitlines()
    assert header.endswith("attribute (of all rows)")
    assert [line.split()[-3:] for line in lines[:2]] == [["Red", "0%", "(50%)"], ["Red", "100%", "(50%)"]]
    assert list(pictures(folder / "run")) == ["attributes.png", "experts.png", "mixture.png", "training.png"]

    # The originals stand in the picture in their colours, and what experts make of them is of no other size.
    rows = Image.open(folder / "run/images/experts.png").convert("RGB")
    colours = {colour: count for count, colour in rows.getcolors(1 << 20)}
    assert colours[220, 0, 0] > 64 * 32
    assert colours[0, 0, 220] > 64 * 32
    assert colours[220, 128, 0] > 32 * 32
    model = mixdist.load("run")
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 64, 64), dtype=np.uint8))
    assert model.reconstruct(x).shape == model.sample(5, 1).shape == (5, 3, 64, 64)
    torch.testing.assert_close(model.reconstruct(x), model.reconstruct(x / 255))
    assert here("sample", "run", "--num_samples", "17").code == 0
    with Image.open(folder / "run/images/samples.png") as drawn:
        assert drawn.size[1] > 4 * 64

    assert here("evaluate", "run", "--num_samples", "2").code == 0
    told = json.loads((folder / "run/evaluation.json").read_text())
    assert (told["attribute_names"], told["attribute_A"]) == (["Red", "Is_Large"], [0.5, 0.5])
    assert told["attribute_EA"] == [[0.0, 0.5], [1.0, 0.5]]


def evaluation(dataset: Dataset, share: list[float]) -> ExpertEvaluation:
    expert_N = np.zeros(len(dataset), dtype=np.int64)
    rows_E = np.bincount(expert_N, minlength=len(share))
    return ExpertEvaluation(dataset, {}, rows_E=rows_E, expert_N=expert_N, share_E=np.array(share))


def test_points_are_drawn_with_their_noise(folder: Path) -> None:
    mixture, dataset = untrained(write_config(folder / "c.yaml", HARD)), Bananas(rows=30, test_rows=10).load()[1]
    (plane,) = mixture.pictures(dataset, evaluation(dataset, [1 / 3] * 3), seed=0)
    assert isinstance(plane, Plane)
    assert [drawn.shape for drawn in plane.samples] == [(NUM_POINTS, 2)] * 3
    # Untrained, the likelihood has standard deviation 1 about means that hardly differ.
    for drawn in plane.samples:
        assert drawn.std(axis=0) == pytest.approx([1, 1], abs=0.5)


def test_images_of_the_mixture_come_from_experts_by_their_weight(folder: Path) -> None:
    mixture, dataset = untrained(write_config(folder / "c.yaml", changed())), Digits().load()[1]
    share = [0.5, 0.25, 0.25, 0.0]
    experts, mosaic = mixture.pictures(dataset, evaluation(dataset, share), seed=0)
    assert isinstance(experts, Panels)
    assert isinstance(mosaic, Mosaic)
    whole = mosaic.images
    assert len(whole) == NUM_WHOLE
    assert [panel.samples.shape for panel in experts.panels] == [(NUM_SAMPLES, *whole.shape[1:])] * 4
    for e, one in enumerate(mixture.bank.owned().values()):
        first = experts.panels[e].samples
        stand = [int((whole == image).all(axis=tuple(range(1, whole.ndim))).sum()) for image in first]
        assert stand == [1 if share[e] else 0] * NUM_SAMPLES
        assert one.training
    assert torch.isfinite(torch.from_numpy(whole)).all()
