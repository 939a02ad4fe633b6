"""What pictures of a mixture with one decoder show, against the loaded model, and how dependent components are."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mixdist
from mixdist.data import Digits
from mixdist.experts import Component
from mixdist.mixtures import DHSIC, MVAE, Evaluation, Masks
from mixdist.mixtures.dependence import dependence
from mixdist.mixtures.mvae_pictures import NUM_SHOWN, mvae_pictures, plane_of
from mixdist.mixtures.mvae_shown import MVAEModel
from mixdist.mixtures.pictures import Clouds, Matrix, Rows
from mixdist.nets import MLP
from mixdist.noise import Purpose, permutation
from mixdist.report.components import clouds_picture, masks_picture, matrix_picture
from mixdist.report.style import colour_of
from tests.launch import here, mlp, together
from tests.test_figures import ready
from tests.test_mvae import config_of, masks, normal
from tests.test_pictures import having, pixels

# Dependence


def test_dependence_is_dhsic_of_pairs_and_of_shuffled_rows() -> None:
    z, measure = normal(40, 3, 2), DHSIC()
    z[:, 1] = 0.7 * z[:, 0] + 0.3 * z[:, 1]
    found = dependence(z, seed=5)
    assert found.whole == pytest.approx(measure(z, z, z).item(), rel=1e-9)
    order = [permutation(5, 0, n, 40, purpose=Purpose.CHANCE) for n in range(20)]
    for i in range(3):
        for j in range(3):
            pair = torch.stack([z[:, i], z[:, j]], dim=1)
            assert found.pair_EE[i, j].item() == pytest.approx(measure(pair, pair, pair).item(), rel=1e-9)
            shuffled = [torch.stack([z[:, i], z[o, j]], dim=1) for o in order]
            floor = np.mean([measure(one, one, one).item() for one in shuffled])
            assert found.floor_EE[i, j].item() == pytest.approx(floor, rel=1e-9)
    assert found.pair_EE[0, 1] > 3 * found.floor_EE[0, 1] > 0
    pairs = [found.pair_EE[i, j].item() for i in range(3) for j in range(3) if i != j]
    assert found.pairs[0] == pytest.approx(np.mean(pairs))


# What is shown

SPLITS = Digits().load()


@functools.cache
def mixture(label: str | None = None, off: bool = False) -> MVAE:
    make = functools.partial(Masks, rates="each", off_above=0.5) if off else None
    component = functools.partial(Component, latent=3, features=6, network=MLP([7], "tanh"), label=label)
    made = ready(MVAE(component, 3, MLP([8], "tanh"), masks=make), SPLITS.train.spec)
    assert isinstance(made, MVAE)
    if off:
        made.masks.above_E[1] = 500
    return made


def shown(**options: Any) -> dict[str, Any]:
    found = mvae_pictures(mixture(**options), SPLITS.test, Evaluation(SPLITS.test, {}), seed=3)
    return {picture.name.removesuffix(".png"): picture for picture in found}


def same(image: np.ndarray, wanted: torch.Tensor) -> None:
    np.testing.assert_allclose(image, wanted.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("label", "off"), [(None, False), ("y", False), (None, True)])
def test_rows_of_images_are_what_the_model_gives(label: str | None, off: bool) -> None:
    pictures, model = shown(label=label, off=off), MVAEModel(mixture(label=label, off=off))
    rows = SPLITS.test.take(torch.arange(NUM_SHOWN))
    on = [0, 2] if off else [0, 1, 2]
    parts, crossed, between = (pictures[name] for name in ("components", "cross", "interpolation"))
    same(parts.images[1], model.reconstruct(rows))
    for place, e in enumerate(on):
        same(parts.images[2 + place], model.reconstruct(rows, expert=e))
        same(crossed.images[1 + place], model.cross(rows, e, on[(place + 1) % len(on)]))
        assert (parts.titles[2 + place], len(parts.titles)) == (f"component {e}: alone", 2 + len(on))
    ends = ({name: column[n::2][:3] for name, column in rows.items()} for n in (0, 1))
    straight = model.interpolate(*ends, steps=NUM_SHOWN)
    for p in range(3):
        same(between.images[p][1:-1], straight[:, p])
        same(between.images[p][[0, -1]], rows["x"][[2 * p, 2 * p + 1]] / 16)
    assert len(between.images) == 6


def test_walks_move_one_number_and_draws_are_alike() -> None:
    pictures, model = shown(label="y"), MVAEModel(mixture(label="y"))
    made = mixture(label="y")
    label = torch.full((NUM_SHOWN,), int(SPLITS.test.rows["y"][0]))
    walks, alike = pictures["traversals"], pictures["alike"]
    assert isinstance(walks, Rows)
    for image, title in zip(walks.images, walks.titles, strict=True):
        words = title.split()
        z = torch.zeros(NUM_SHOWN, 3, dtype=torch.float64)
        z[:, int(words[3])] = torch.linspace(-3, 3, NUM_SHOWN, dtype=torch.float64)
        same(image, made.decoder.decode(model.components[int(words[1][:-1])].decode(z, {"y": label})).detach())
        assert title.endswith(f"class {label[0]}")
    assert len(walks.images) == 6
    assert len(alike.images) == 3
    assert not np.allclose(alike.images[0], alike.images[1])


def test_clouds_are_latents_by_class_and_one_class_by_component() -> None:
    (clouds,) = (picture for picture in shown().values() if isinstance(picture, Clouds))
    x = SPLITS.test.take(torch.arange(len(clouds.clouds[0].points)))
    z = MVAEModel(mixture()).latents(x).numpy()
    for e, cloud in enumerate(clouds.clouds[:3]):
        np.testing.assert_allclose(cloud.points, plane_of(z[:, e].astype(np.float32)), atol=1e-5)
        assert cloud.group_N.tolist() == x["y"].tolist()
    most = np.bincount(x["y"].numpy()).argmax()
    assert np.bincount(clouds.clouds[3].group_N).tolist() == [int((x["y"] == most).sum())] * 3


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_plane_keeps_distances_where_it_can(size: int) -> None:
    points = normal(30, size).numpy() * np.array([3.0, 2.0, 0.0, 0.0, 0.0])[:size]
    plane = plane_of(points)
    for one, other in ((0, 1), (4, 9)):
        wanted = np.linalg.norm(points[one] - points[other])
        assert np.linalg.norm(plane[one] - plane[other]) == pytest.approx(wanted)


def test_a_run_of_labelled_components_on_two_ranks_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = {"latent": 2, "features": 8, "network": mlp(8), "label": "y"}
    component = {"class_path": "mixdist.experts.Component", "init_args": made}
    config = config_of(tmp_path, component=component, masks=masks(rates="each"))
    ended = together("train", "--config", config, "--out", "run", "--pictures", "true", ranks=2, folder=tmp_path)
    assert ended.code == 0, ended.err
    names = (
        "components",
        "cross",
        "interpolation",
        "traversals",
        "alike",
        "latents",
        "dependence",
        "masks",
        "training",
    )
    assert {path.stem for path in Path("run/images").iterdir()} == set(names)
    model = mixdist.load("run")
    assert here("sample", "run").code == 0
    one, other = (model.sample(3, label=c) for c in (1, 2))
    assert not torch.allclose(one, other)
    for wrong in (None, 10, True):
        with pytest.raises(ValueError, match=r"^label \(" + str(wrong)):
            model.sample(3, label=wrong)
    ended = here("evaluate", "run", "--probes", "none")
    assert ended.code == 0, ended.err
    assert "dhsic_floor" in ended.out


# How it is drawn


def test_a_matrix_is_darker_where_it_is_larger(tmp_path: Path) -> None:
    value = np.array([[9.0, 0.1, 0.2], [0.1, 9.0, 0.4], [0.2, 0.4, 9.0]])
    matrix_picture(tmp_path / "m.png", value, ["component 0", "component 1", "component 5"], np.full(3, 0.01), "what")
    assert len(having(pixels(tmp_path / "m.png"), "08306b")) > 1000  # the largest, off the diagonal
    matrix_picture(tmp_path / "pale.png", value, ["component 0", "1", "2"], np.full(3, 0.3), "what")
    assert not len(having(pixels(tmp_path / "pale.png"), "08306b"))  # near to its floor
    matrix_picture(tmp_path / "other.png", value + 90 * np.eye(3), ["component 0", "1", "2"], np.full(3, 0.01), "what")
    assert len(having(pixels(tmp_path / "other.png"), "08306b")) > 1000


def test_clouds_and_masks_have_the_colours_of_components(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(60, 2))
    clouds = [("one", points, np.arange(60) % 4, ["a", "b", "c", "d"]), ("other", points, np.arange(60) % 3, [])] * 2
    clouds_picture(tmp_path / "clouds.png", clouds)
    records = [
        {"step": n, "loss": 1.0, "drop_rate": [0.1, 0.02 * n, 0.3], "selected_components": 2.5, "components_on": 3}
        for n in range(1, 9)
    ]
    masks_picture(tmp_path / "masks.png", [*records, {"step": 9, "valid_loss": 1.0}])
    for name, colours in (("clouds", 4), ("masks", 3)):
        picture = pixels(tmp_path / f"{name}.png")
        assert all(len(having(picture, colour_of(e))) > 5 for e in range(colours))
    masks_picture(tmp_path / "shared.png", [{"step": 1, "drop_rate": [0.1] * 3}])
    assert not len(having(pixels(tmp_path / "shared.png"), colour_of(1)))


def test_a_picture_of_dependence_has_what_was_measured() -> None:
    told = {
        "rows": 9,
        "components": [0, 2],
        "pairs": [[1.0, 0.25], [0.25, 1.0]],
        "shuffled": [[0.5, 0.125], [0.125, 0]],
    }
    found = mvae_pictures(mixture(), SPLITS.test, Evaluation(SPLITS.test, {}, protocol={"dhsic": told}), 0)[-1]
    assert isinstance(found, Matrix)
    assert (found.names, found.at_right.tolist()) == (["component 0", "component 2"], [0.125, 0.125])
