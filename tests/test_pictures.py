"""Pictures are whole PNG files that hold what they were given."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mixdist.report.grids import CELL, Panel, experts_picture, mixture_picture, sample_picture, to_uint8
from mixdist.report.plots import (
    attributes_picture,
    contingency_picture,
    curves_picture,
    scatter_picture,
    training_picture,
)
from mixdist.report.rounds import rounds_picture

RNG = np.random.default_rng(0)
NAMES = ["zero", "one", "two"]
Draw = Callable[[Path], None]


def images(count: int, height: int = 8, width: int = 8, colour: bool = False) -> np.ndarray:
    return RNG.integers(0, 256, (count, height, width, 3) if colour else (count, height, width), dtype=np.uint8)


def panel(expert: int, *counts: int, size: int = 8, colour: bool = False) -> Panel:
    title = f"expert {expert}: digit {expert}, 38 rows"
    return Panel(expert, title, *(images(count, size, size, colour) for count in counts))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def enlarged(image: np.ndarray) -> np.ndarray:
    zoom = max(1, CELL // max(image.shape[:2]))
    large = np.kron(image if image.ndim == 3 else image[:, :, None], np.ones((zoom, zoom, 1), np.uint8))
    return np.broadcast_to(large, (*large.shape[:2], 3))


def places(picture: np.ndarray, image: np.ndarray) -> list[tuple[int, int]]:
    """Every (y, x) where the enlarged image stands in the picture, pixel for pixel."""
    large = enlarged(image)
    height, width = large.shape[:2]
    fits = (picture == large[0, 0]).all(axis=-1)
    for y, x in ((0, width - 1), (height - 1, 0), (height - 1, width - 1), (height // 2, width // 2)):  # most fall out
        fits[: len(fits) - y, : fits.shape[1] - x] &= (picture[y:, x:] == large[y, x]).all(axis=-1)
    corners = np.argwhere(fits).tolist()
    return [(y, x) for y, x in corners if np.array_equal(picture[y : y + height, x : x + width], large)]


def sizes_of(path: Path) -> tuple[int, int]:
    height, width = pixels(path).shape[:2]
    return height, width


@pytest.mark.parametrize(("size", "colour"), [(8, False), (28, False), (32, True), (64, True), (100, False)])
def test_every_image_stands_once_in_its_row_and_block(tmp_path: Path, size: int, colour: bool) -> None:
    panels = [panel(0, 3, 3, 2, size=size, colour=colour), panel(1, 0, 2, 3, size=size, colour=colour)]
    experts_picture(tmp_path / "experts.png", panels)
    picture = pixels(tmp_path / "experts.png")
    at = {}
    for row, shown in enumerate(panels):
        for block, stack in enumerate([shown.originals, shown.reconstructions, shown.samples]):
            for number, image in enumerate(stack):
                (at[row, block, number],) = places(picture, image)
    assert {y for (row, _, _), (y, _) in at.items() if row == 0} == {at[0, 0, 0][0]}
    assert at[0, 0, 0][0] < at[1, 1, 0][0]
    assert at[0, 0, 0][1] < at[0, 0, 1][1] < at[0, 0, 2][1] < at[0, 1, 0][1] < at[0, 2, 0][1]
    assert at[0, 1, 0][1] == at[1, 1, 0][1]


def test_missing_images_leave_white_cells_and_an_empty_block_is_left_out(tmp_path: Path) -> None:
    few, many = tmp_path / "few.png", tmp_path / "many.png"
    full = panel(0, 4, 4, 4)
    experts_picture(many, [full, panel(1, 4, 4, 4)])
    experts_picture(few, [full, panel(1, 0, 0, 0)])
    assert sizes_of(few) == sizes_of(many)
    ((y, x),) = places(pixels(few), full.originals[0])
    below = pixels(few)[y + CELL + 4 :, x:]
    assert (below == 255).all()
    assert not (pixels(many)[y + CELL + 4 :, x:] == 255).all()
    experts_picture(few, [panel(0, 4, 4, 0), panel(1, 4, 4, 0)])
    assert sizes_of(few)[1] < sizes_of(many)[1]


def test_no_images_at_all_still_give_a_picture(tmp_path: Path) -> None:
    experts_picture(tmp_path / "none.png", [panel(0, 0, 0, 0)])
    sample_picture(tmp_path / "samples.png", [images(0)], ["expert 0"])
    assert min(sizes_of(tmp_path / "none.png") + sizes_of(tmp_path / "samples.png")) > 50


def test_experts_of_different_modalities_share_a_picture(tmp_path: Path) -> None:
    panels = [panel(0, 2, 2, 2, size=28), panel(11, 2, 2, 2, size=32, colour=True)]
    experts_picture(tmp_path / "two.png", panels, ("rows", "means", "draws"))
    for shown in panels:
        assert len(places(pixels(tmp_path / "two.png"), shown.samples[1])) == 1


def test_the_largest_picture_is_of_a_handy_size(tmp_path: Path) -> None:
    for size in (8, 28, 64):
        experts_picture(tmp_path / "large.png", [panel(e, 8, 8, 8, size=size) for e in range(10)])
        height, width = sizes_of(tmp_path / "large.png")
        assert height < 1000
        assert 1500 < width < 2100


def test_samples_go_on_in_a_new_line(tmp_path: Path) -> None:
    samples = [images(20, 9, 5), images(2, 9, 5)]
    sample_picture(tmp_path / "samples.png", samples, ["expert 0", "expert 1: few"])
    picture = pixels(tmp_path / "samples.png")
    ((top, left),) = places(picture, samples[0][0])
    ((next_top, next_left),) = places(picture, samples[0][16])
    ((other_top, _),) = places(picture, samples[1][0])
    assert next_left == left
    assert top < next_top < other_top
    assert len(places(picture, samples[0][19])) == 1


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (4, 2), (7, 3), (100, 10), (101, 11)])
def test_samples_of_the_mixture_stand_in_a_square(tmp_path: Path, count: int, columns: int) -> None:
    shown = images(count, 9, 5, colour=count == 7)
    mixture_picture(tmp_path / "mixture.png", shown)
    picture = pixels(tmp_path / "mixture.png")
    found = [places(picture, image) for image in shown]
    assert all(len(corners) == 1 for corners in found)
    tops, lefts = zip(*(corners[0] for corners in found), strict=True)
    assert len(set(lefts)) == columns
    assert [(tops[i], lefts[i]) for i in range(count)] == sorted((tops[i], lefts[i]) for i in range(count))


def marks(path: Path) -> int:
    """Points in the red that marks a round whose objective rose."""
    return int((pixels(path) == (0xBD, 0x1F, 0x01)).all(axis=-1).sum())


def test_rounds_that_rise_are_marked(tmp_path: Path) -> None:
    falling = rounds(1, 2, 3, 4, num_experts=2)
    rounds_picture(tmp_path / "falling.png", falling)
    assert marks(tmp_path / "falling.png") == 0
    rising = [record | {"objective": objective} for record, objective in zip(falling, (1, 0, 0.5, 0), strict=True)]
    rounds_picture(tmp_path / "once.png", rising)
    # What was measured before a round's reassignment is not what the round ended with.
    rounds_picture(tmp_path / "half.png", [record | {"objective_trained": 9.0} for record in falling])
    assert marks(tmp_path / "once.png") > 20
    assert marks(tmp_path / "half.png") == 0


def test_rounds_are_read_by_their_number(tmp_path: Path) -> None:
    records = rounds(1, 2, 3)
    rounds_picture(tmp_path / "a.png", records)
    rounds_picture(
        tmp_path / "b.png", [{"step": 0, "loss": 1.0}, *reversed(records), {"step": 8, "round": 3}, {"round": None}]
    )
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_samples_far_from_the_rows_leave_the_axes_as_they_are(tmp_path: Path) -> None:
    rows, samples = RNG.normal(size=(50, 2)), RNG.normal(size=(20, 2)) / 2
    far = np.concatenate([samples, np.full((1, 2), 1e6)])
    scatter_picture(tmp_path / "near.png", rows, np.zeros(50, np.int64), [samples])
    scatter_picture(tmp_path / "far.png", rows, np.zeros(50, np.int64), [far])
    near, other = pixels(tmp_path / "near.png"), pixels(tmp_path / "far.png")
    assert near.shape == other.shape
    # The title says that one is missing; everything below it is the same.
    changed = np.flatnonzero((near != other).any(axis=(1, 2)))
    assert len(changed) > 0
    assert changed.max() < 0.15 * len(near)


def test_no_expert_hides_another(tmp_path: Path) -> None:
    # Points lie many deep; the two corners make the axes wide.
    rows = np.concatenate([[[-1.0, -1.0]], RNG.uniform(-0.1, 0.1, size=(19998, 2)), [[1.0, 1.0]]])
    scatter_picture(tmp_path / "cloud.png", rows, np.repeat([0, 1], 10000), [])
    picture = pixels(tmp_path / "cloud.png").astype(float)
    blue, yellow = (np.linalg.norm(picture - colour, axis=-1) for colour in ((0x3F, 0x90, 0xDA), (0xFF, 0xA9, 0x0E)))
    seen = np.minimum(blue, yellow) < 60
    assert (blue < yellow)[seen].mean() == pytest.approx(0.5, abs=0.1)


def test_to_uint8_rounds_clips_and_moves_the_channels() -> None:
    values = np.array([-1.0, 0.0, 0.49 / 255, 0.51 / 255, 0.5, 1.0, 7.0, np.inf]).reshape(2, 1, 2, 2)
    assert to_uint8(values).tolist() == [[[0, 0], [0, 1]], [[128, 255], [255, 255]]]
    stored = images(3, 4, 5, colour=True)
    back = to_uint8(stored.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))
    assert back.dtype == np.uint8
    assert np.array_equal(back, stored)
    assert to_uint8(np.zeros((0, 1, 4, 5))).shape == (0, 4, 5)


@pytest.mark.parametrize("shape", [(2, 2, 4, 4), (2, 4, 4), (2, 4, 4, 3), (2, 0, 4, 4)])
def test_to_uint8_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="C 1 or 3"):
        to_uint8(np.zeros(shape))


def test_to_uint8_refuses_what_is_not_a_number() -> None:
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(np.full((1, 1, 2, 2), np.nan))


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (10, 10), (3, 25), (25, 2)])
def test_counts_of_every_shape_are_drawn(tmp_path: Path, shape: tuple[int, int]) -> None:
    counts = RNG.integers(1, 50, shape)
    names = [str(label) for label in range(shape[1])]
    contingency_picture(tmp_path / "a.png", counts, names)
    contingency_picture(tmp_path / "b.png", counts * 2, names)
    contingency_picture(tmp_path / "again.png", counts, names)
    # The shares, and so the colours, are the same in both: only the written counts can tell them apart.
    assert not np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "again.png").read_bytes()


def test_an_expert_without_rows_has_a_row_of_zeros(tmp_path: Path) -> None:
    contingency_picture(tmp_path / "counts.png", np.array([[0, 0, 0], [5, 0, 1234567]]), NAMES)
    assert min(sizes_of(tmp_path / "counts.png")) > 100


def rates(num_experts: int, num_attributes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    names = [f"attribute {a}" for a in range(num_attributes)]
    rows_E = RNG.integers(1, 90, num_experts)
    rate_EA = RNG.uniform(size=(num_experts, num_attributes))
    return rate_EA, rows_E @ rate_EA / rows_E.sum(), rows_E, names


@pytest.mark.parametrize("shape", [(1, 1), (4, 40), (25, 3)])
def test_rates_of_every_shape_are_drawn(tmp_path: Path, shape: tuple[int, int]) -> None:
    drawn = rates(*shape)
    attributes_picture(tmp_path / "a.png", *drawn)
    attributes_picture(tmp_path / "again.png", *drawn)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert min(sizes_of(tmp_path / "a.png")) > 80


def test_the_attributes_that_differ_most_are_shown(tmp_path: Path) -> None:
    rate_EA, rate_A, rows_E, names = rates(3, 30)
    rate_EA[:, 5:] = rate_A[5:]
    attributes_picture(tmp_path / "all.png", rate_EA, rate_A, rows_E, names, num_shown=5)
    attributes_picture(tmp_path / "five.png", rate_EA[:, :5], rate_A[:5], rows_E, names[:5])
    assert (tmp_path / "all.png").read_bytes() == (tmp_path / "five.png").read_bytes()
    # A large difference of one row weighs less than a small one of many.
    rate_EA, rate_A = np.array([[0.5, 0.9], [0.7, 0.5], [0.3, 0.5]]), np.array([0.5, 0.5])
    attributes_picture(tmp_path / "two.png", rate_EA, rate_A, np.array([1, 50, 50]), names[:2], num_shown=1)
    attributes_picture(tmp_path / "first.png", rate_EA[:, :1], rate_A[:1], np.array([1, 50, 50]), names[:1])
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "first.png").read_bytes()


def test_more_is_red_less_is_blue_and_no_rows_is_neither(tmp_path: Path) -> None:
    rate_EA = np.array([[0.9, 0.1], [0.1, 0.9], [np.nan, np.nan]])
    attributes_picture(tmp_path / "a.png", rate_EA, np.array([0.5, 0.5]), np.array([5, 5, 0]), NAMES[:2])
    picture = pixels(tmp_path / "a.png")
    at = [np.argwhere((picture == colour).all(axis=-1)) for colour in ((103, 0, 31), (5, 48, 97), (0xEC, 0xEF, 0xF1))]
    (red, blue), middle = ([part.mean(axis=0) for part in at[:2]], at[2].mean(axis=0))
    assert np.abs(red - blue).max() < 3  # crosswise, both are about the same point
    assert middle[1] > at[0][:, 1].max()
    upper = at[0][at[0][:, 0] < red[0]]
    assert upper[:, 1].max() < red[1]
    assert min(map(len, at)) > 1000


def draw_curves(path: Path, num_rows: int = 50, num_experts: int = 12) -> None:
    x_N = np.linspace(-1, 1, num_rows)
    grid_G = np.linspace(-2, 2, 40)
    experts = np.arange(num_rows) % num_experts
    curves_picture(path, x_N, x_N**2, experts, grid_G, np.stack([grid_G * e for e in range(num_experts)]))


def draw_scatter(path: Path, num_samples: int = 7) -> None:
    rows = RNG.normal(size=(30, 2))
    scatter_picture(path, rows, np.arange(30) % 3, [RNG.normal(size=(n, 2)) for n in (num_samples, 0, 2)])


def draw_training(path: Path) -> None:
    records = [{"step": step, "loss": 9.0 / step, "load": [step, 1.0, 0.0]} for step in range(1, 9)]
    training_picture(path, [*records, {"step": 9, "valid_loss": 1.0}])


def rounds(*numbers: int, num_experts: int = 12) -> list[dict[str, Any]]:
    counts = [100 * expert for expert in range(num_experts)]
    return [
        {"step": n, "round": n, "objective": 1 / n, "objective_trained": 0.9 / n, "changed": 0.1, "counts": counts}
        for n in numbers
    ]


DRAWS: dict[str, Draw] = {
    "experts": lambda path: experts_picture(path, [panel(0, 2, 2, 2)]),
    "samples": lambda path: sample_picture(path, [images(2)], ["expert 0"]),
    "mixture": lambda path: mixture_picture(path, images(7)),
    "rounds": lambda path: rounds_picture(path, rounds(1, 2, 3)),
    "contingency": lambda path: contingency_picture(path, np.eye(3, dtype=np.int64), NAMES),
    "attributes": lambda path: attributes_picture(path, *rates(3, 5)),
    "curves": draw_curves,
    "scatter": draw_scatter,
    "training": draw_training,
}


@pytest.mark.parametrize("name", DRAWS)
def test_each_picture_opens_and_is_not_blank(tmp_path: Path, name: str) -> None:
    path = tmp_path / "images" / f"{name}.png"
    DRAWS[name](path)
    assert len(np.unique(pixels(path).reshape(-1, 3), axis=0)) > 3
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", DRAWS)
def test_a_failing_write_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"the old one")

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        DRAWS[name](path)
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_pictures_of_little_data(tmp_path: Path) -> None:
    draw_curves(tmp_path / "one.png", num_rows=1, num_experts=1)
    curves_picture(
        tmp_path / "none.png", np.empty(0), np.empty(0), np.empty(0, np.int64), np.arange(3.0), np.ones((2, 3))
    )
    scatter_picture(tmp_path / "rows.png", np.zeros((1, 2)), np.zeros(1, np.int64), [])
    training_picture(tmp_path / "loss.png", [{"step": 1, "loss": 3.0}])
    training_picture(tmp_path / "load.png", [{"step": 1, "loss": 3.0, "load": [0.0, 0.0]}])
    rounds_picture(tmp_path / "round.png", rounds(4, num_experts=1))
    rounds_picture(tmp_path / "counts.png", [{"round": 1, "counts": [0, 0]}, {"round": 2, "counts": [0, 0]}])
    rounds_picture(tmp_path / "still.png", [{"round": 1, "changed": 0.0}, {"round": 2, "objective": -1.0}])
    scatter_picture(tmp_path / "no rows.png", np.zeros((0, 2)), np.zeros(0, np.int64), [np.ones((2, 2))])
    assert len(list(tmp_path.iterdir())) == 9


BAD: dict[str, tuple[str, Draw]] = {
    "no experts": ("0 experts", lambda path: experts_picture(path, [])),
    "too many images": ("has 9 images", lambda path: experts_picture(path, [panel(0, 9, 1, 1)])),
    "floats": ("float64", lambda path: sample_picture(path, [np.zeros((1, 8, 8))], ["expert 0"])),
    "four channels": ("expected uint8", lambda path: sample_picture(path, [np.zeros((1, 8, 8, 4), np.uint8)], ["e"])),
    "titles": ("differ in number", lambda path: sample_picture(path, [images(1)], ["a", "b"])),
    "class names": ("do not fit", lambda path: contingency_picture(path, np.zeros((2, 2)), NAMES)),
    "flat counts": ("do not fit", lambda path: contingency_picture(path, np.zeros(3), NAMES)),
    "rows": ("x_N", lambda path: curves_picture(path, *[np.zeros(2)] * 2, np.zeros(3), np.zeros(2), np.zeros((1, 2)))),
    "grid": ("grid_G", lambda path: curves_picture(path, *[np.zeros(2)] * 3, np.zeros(4), np.zeros((1, 2)))),
    "plane": ("x_N2", lambda path: scatter_picture(path, np.zeros((2, 3)), np.zeros(2, np.int64), [])),
    "samples": (
        "expert 1",
        lambda path: scatter_picture(path, np.zeros((1, 2)), np.zeros(1), [np.zeros((1, 2))] * 1 + [np.zeros(3)]),
    ),
    "no rates": (
        "one or more",
        lambda path: attributes_picture(path, np.zeros((0, 2)), np.zeros(2), np.zeros(0), ["a", "b"]),
    ),
    "rates": (
        "does not fit",
        lambda path: attributes_picture(path, np.zeros((2, 2)), np.zeros(2), np.ones(3), ["a", "b"]),
    ),
    "no images": ("0 images", lambda path: mixture_picture(path, np.zeros((0, 8, 8), np.uint8))),
    "real images": ("float64", lambda path: mixture_picture(path, np.zeros((1, 8, 8)))),
    "no rounds": ("no round", lambda path: rounds_picture(path, [{"step": 1, "loss": 1.0}])),
    "empty rounds": ("no round", lambda path: rounds_picture(path, [{"round": 1}])),
    "no loss": ("no loss", lambda path: training_picture(path, [{"step": 1}])),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_leaves_no_file(tmp_path: Path, name: str) -> None:
    message, draw = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        draw(tmp_path / "picture.png")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
