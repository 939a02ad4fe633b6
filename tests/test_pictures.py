"""Pictures are whole PNG files that show what they were given."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mixdist.mixtures.pictures import Panel
from mixdist.report.grids import CELL, captioned_picture, experts_picture, mixture_picture, sample_picture, to_uint8
from mixdist.report.plots import (
    attributes_picture,
    contingency_picture,
    curves_picture,
    scatter_picture,
    training_picture,
)
from mixdist.report.rounds import rounds_picture
from mixdist.report.style import colour_of

RNG = np.random.default_rng(0)
ROWS, EXPERTS = RNG.normal(size=(60, 2)), np.arange(60) % 12
NONE = np.zeros(0, np.int64)
RATES = RNG.uniform(size=(12, 30))


def images(count: int, size: int = 8, colour: bool = False) -> np.ndarray:
    return RNG.integers(0, 256, (count, 3 if colour else 1, size, size)) / 255


def panel(expert: int, *counts: int, **how: Any) -> Panel:
    return Panel(expert, f"expert {expert}: digit {expert}, 38 rows", *(images(count, **how) for count in counts))


def rounds(*numbers: int, num_experts: int = 12) -> list[dict[str, Any]]:
    parts = {"changed": 0.1, "counts": [100 + expert for expert in range(num_experts)]}
    return [{"step": n, "round": n, "objective": 1 / n, "objective_trained": 0.9 / n, **parts} for n in numbers]


def steps(num_experts: int = 12) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 9.0 / step, "load": [step, *[1.0] * (num_experts - 1)]} for step in range(1, 9)]


def rates(rate_EA: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    names = [f"attribute {a}" for a in range(rate_EA.shape[1])]
    return rate_EA, rate_EA.mean(0), np.full(len(rate_EA), 50), names


def counts_of(path: Path, counts_EC: Any) -> None:
    contingency_picture(path, np.array(counts_EC), [f"class {label}" for label in range(len(counts_EC[0]))])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def codes(picture: np.ndarray) -> np.ndarray:
    """Return the colour of each pixel as one number."""
    red, green, blue = np.moveaxis(picture.astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


def having(picture: np.ndarray, colour: str) -> np.ndarray:
    """Every (y, x) of that colour."""
    return np.argwhere(codes(picture) == int(colour.removeprefix("#"), 16))


def place(picture: np.ndarray, image: np.ndarray) -> tuple[int, int]:
    """The only (y, x) where the enlarged image (C, H, W) stands in the picture, pixel for pixel."""
    image = to_uint8(image[None])[0]
    zoom = max(1, CELL // max(image.shape[:2]))
    large = image.reshape(*image.shape[:2], -1).repeat(zoom, 0).repeat(zoom, 1)
    height, width = large.shape[:2]
    rows, columns = picture.shape[0] - height + 1, picture.shape[1] - width + 1
    fits = np.ones((rows, columns), dtype=bool)
    for y, x in RNG.integers(0, (height, width), (6, 2)).tolist():  # most places fall out
        fits &= (picture[y : y + rows, x : x + columns] == large[y, x]).all(axis=-1)
    corners = np.argwhere(fits).tolist()
    found = [(y, x) for y, x in corners if (picture[y : y + height, x : x + width] == large).all()]
    assert len(found) == 1
    return found[0]


DRAWS: dict[str, Callable[[Path], None]] = {
    "experts": lambda path: experts_picture(path, [panel(e, 2, 2, 2) for e in range(12)]),
    "samples": lambda path: sample_picture(path, [images(2)] * 12, [f"expert {e}" for e in range(12)]),
    "rounds": lambda path: rounds_picture(path, rounds(1, 2, 3)),
    "training": lambda path: training_picture(path, [*steps(), {"step": 9, "valid_loss": 1.0}]),
    "attributes": lambda path: attributes_picture(path, *rates(RATES)),
    "curves": lambda path: curves_picture(path, *ROWS.T, EXPERTS, np.linspace(-2, 2), np.ones((12, 50))),
    "scatter": lambda path: scatter_picture(path, ROWS, EXPERTS, [ROWS[:n] for n in range(12)]),
    "labels": lambda path: counts_of(path, np.eye(12, dtype=np.int64)),
    "mixture": lambda path: mixture_picture(path, images(7)),
    "captions": lambda path: captioned_picture(
        path, [images(2, colour=True)] * 2, [["a bird", "red " * 99]] * 2, ["a", "b"]
    ),
}
LITTLE: dict[str, Callable[[Path], None]] = {
    "no images": lambda path: experts_picture(path, [panel(0, 0, 0, 0)]),
    "no samples": lambda path: sample_picture(path, [images(0)], ["expert 0"]),
    "one count": lambda path: counts_of(path, [[7]]),
    "no rows of an expert": lambda path: counts_of(path, [[0, 0, 0], [5, 0, 1234567]]),
    "many classes": lambda path: counts_of(path, RNG.integers(0, 9, (3, 100))),
    "one rate": lambda path: attributes_picture(path, *rates(RATES[:1, :1])),
    "no rates of an expert": lambda path: attributes_picture(path, *rates(np.array([[0.5], [np.nan]]))),
    "one row": lambda path: curves_picture(path, *ROWS[:1].T, EXPERTS[:1], np.arange(3.0), np.ones((1, 3))),
    "no rows": lambda path: curves_picture(path, *ROWS[:0].T, NONE, np.arange(3.0), np.ones((2, 3))),
    "one point": lambda path: scatter_picture(path, np.zeros((1, 2)), EXPERTS[:1], []),
    "no points": lambda path: scatter_picture(path, np.zeros((0, 2)), NONE, [np.ones((2, 2))]),
    "one loss": lambda path: training_picture(path, [{"step": 1, "loss": 3.0}]),
    "no load": lambda path: training_picture(path, [{"step": 1, "loss": 3.0, "load": [0.0, 0.0]}]),
    "one round": lambda path: rounds_picture(path, rounds(4, num_experts=1)),
    "no counts": lambda path: rounds_picture(path, [{"round": n, "counts": [0, 0]} for n in (1, 2)]),
    "no changes": lambda path: rounds_picture(path, [{"round": 1, "changed": 0.0}, {"round": 2, "objective": -1.0}]),
}


@pytest.mark.parametrize("name", [*DRAWS, *LITTLE])
def test_a_picture_shows_something(tmp_path: Path, name: str) -> None:
    path = tmp_path / "images" / "picture.png"
    (DRAWS | LITTLE)[name](path)
    assert len(np.unique(codes(pixels(path)))) > 3


@pytest.mark.parametrize("name", ["experts", "rounds"])  # without matplotlib, and with it
def test_a_full_disk_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / "images" / "picture.png"
    DRAWS[name](path)
    old = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        DRAWS[name](path)
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", [name for name in DRAWS if name not in ("labels", "mixture", "captions")])
def test_an_expert_has_its_colour_in_every_picture(tmp_path: Path, name: str) -> None:
    DRAWS[name](tmp_path / "picture.png")
    picture = pixels(tmp_path / "picture.png")
    assert all(len(having(picture, colour_of(expert))) > 5 for expert in range(12))


@pytest.mark.parametrize(("size", "colour"), [(8, False), (32, True), (100, False)])
def test_every_image_stands_once_in_its_row_and_block(tmp_path: Path, size: int, colour: bool) -> None:
    panels = [panel(0, 3, 3, 2, size=size, colour=colour), panel(1, 0, 2, 3, size=28)]
    experts_picture(tmp_path / "experts.png", panels)
    picture = pixels(tmp_path / "experts.png")
    at = np.full((2, 3, 3, 2), np.nan)
    for row, shown in enumerate(panels):
        for block, stack in enumerate([shown.originals, shown.reconstructions, shown.samples]):
            for number, image in enumerate(stack):
                at[row, block, number] = place(picture, image)
    assert (np.nanmax(at[0, ..., 0]), np.nanmax(at[1, ..., 0])) == (np.nanmin(at[0, ..., 0]), np.nanmin(at[1, ..., 0]))
    assert at[0, 1, 0, 0] < at[1, 1, 0, 0]
    for row in at[..., 1].reshape(2, -1):
        assert np.all(np.diff(row[~np.isnan(row)]) > 0)
    assert abs(at[0, 1, 0, 1] - at[1, 1, 0, 1]) < 50  # in one column; smaller images in the middle of their cells


def test_missing_images_leave_white_cells_and_an_empty_block_is_left_out(tmp_path: Path) -> None:
    few, many, full = tmp_path / "few.png", tmp_path / "many.png", panel(0, 8, 8, 8)
    experts_picture(many, [full, *(panel(e, 8, 8, 8) for e in range(1, 10))])
    experts_picture(few, [full, panel(1, 0, 0, 0), *(panel(e, 8, 8, 8) for e in range(2, 10))])
    height, width = pixels(many).shape[:2]
    assert pixels(few).shape == (height, width, 3)
    assert (height < 1000, 1500 < width < 2100) == (True, True)
    y, x = place(pixels(few), full.originals[0])
    cells = slice(y + CELL + 4, y + 2 * CELL), slice(x, None)
    assert (pixels(few)[cells] == 255).all()
    assert not (pixels(many)[cells] == 255).all()
    experts_picture(few, [panel(e, 8, 8, 0) for e in range(10)])
    assert pixels(few).shape[1] < width


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (7, 3), (50, 8), (20, None)])
def test_samples_stand_line_by_line(tmp_path: Path, count: int, columns: int | None) -> None:
    shown = images(count, 9, colour=count == 7)[..., :5]
    if columns is None:
        sample_picture(tmp_path / "picture.png", [shown, images(2)], ["expert 0", "expert 1: few"])
    else:
        mixture_picture(tmp_path / "picture.png", shown)
    found = [place(pixels(tmp_path / "picture.png"), image) for image in shown]
    assert len({x for _, x in found}) == (columns or 16)
    assert found == sorted(found)


def test_to_uint8_rounds_clips_moves_the_channels_and_refuses_the_rest() -> None:
    values = np.array([-1.0, 0.0, 0.49 / 255, 0.51 / 255, 0.5, 1.0, 7.0, np.inf]).reshape(2, 1, 2, 2)
    assert to_uint8(values).tolist() == [[[0, 0], [0, 1]], [[128, 255], [255, 255]]]
    stored = RNG.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    assert np.array_equal(to_uint8(stored.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)), stored)
    assert to_uint8(np.zeros((0, 1, 4, 5))).shape == (0, 4, 5)
    for bad in (np.zeros((2, 2, 4, 4)), np.zeros((2, 4, 4)), np.zeros((2, 4, 4, 3)), np.full((1, 1, 2, 2), np.nan)):
        with pytest.raises(ValueError, match=r"images \([^\n]*$"):
            to_uint8(bad)


def test_counts_that_differ_by_their_numbers_alone_are_told_apart(tmp_path: Path) -> None:
    drawn = []
    for factor in (1, 2, 1):
        counts_of(tmp_path / "labels.png", factor * np.array([[1, 2], [3, 4]]))
        drawn.append((tmp_path / "labels.png").read_bytes())
    assert drawn[0] == drawn[2] != drawn[1]  # the same shares, so the same colours


def test_the_attributes_that_differ_most_are_shown(tmp_path: Path) -> None:
    def bytes_of(*arguments: Any, **how: Any) -> bytes:
        attributes_picture(tmp_path / "attributes.png", *arguments, **how)
        return (tmp_path / "attributes.png").read_bytes()

    # A large difference of one row weighs less than a small one of many; what does not differ comes last.
    rate_EA, rate_A = np.array([[0.5, 0.5, 0.9], [0.5, 0.7, 0.5], [0.5, 0.3, 0.5]]), np.full(3, 0.5)
    rows_E, names = np.array([1, 50, 50]), ["same", "many", "one"]
    for order in ([1], [1, 2], [1, 2, 0]):
        all_of = bytes_of(rate_EA, rate_A, rows_E, names, num_shown=len(order))
        assert all_of == bytes_of(rate_EA[:, order], rate_A[order], rows_E, [names[a] for a in order])


def test_more_is_red_less_is_blue_and_no_rows_is_neither(tmp_path: Path) -> None:
    rate_EA = np.array([[0.9, 0.1], [0.1, 0.9], [np.nan, np.nan]])
    attributes_picture(tmp_path / "a.png", rate_EA, np.array([0.5, 0.5]), np.array([5, 5, 0]), ["zero", "one"])
    red, blue, grey = (having(pixels(tmp_path / "a.png"), colour) for colour in ("67001f", "053061", "eceff1"))
    assert np.abs(red.mean(axis=0) - blue.mean(axis=0)).max() < 3  # crosswise, both are about the same point
    assert grey[:, 1].mean() > red[:, 1].max()
    assert red[red[:, 0] < red[:, 0].mean()][:, 1].max() < red[:, 1].mean()
    assert min(map(len, (red, blue, grey))) > 1000


def test_rounds_that_rise_are_marked_and_read_by_their_number(tmp_path: Path) -> None:
    def drawn(records: list[dict[str, Any]]) -> np.ndarray:
        rounds_picture(tmp_path / "rounds.png", records)
        return pixels(tmp_path / "rounds.png")

    falling = rounds(1, 2, 3, 4, num_experts=2)
    rising = [record | {"objective": objective} for record, objective in zip(falling, (1, 0, 0.5, 0), strict=True)]
    # What was measured before a round's reassignment is not what the round ended with.
    half = [record | {"objective_trained": 9.0} for record in falling]
    marks = [len(having(drawn(records), "bd1f01")) for records in (falling, half, rising)]
    assert marks[:2] == [0, 0]
    assert marks[2] > 20
    others = [{"step": 0, "loss": 1.0}, *reversed(falling), {"step": 8, "round": 3}, {"round": None}]
    assert np.array_equal(drawn(others), drawn(falling))


def test_samples_far_from_the_rows_leave_the_axes_as_they_are(tmp_path: Path) -> None:
    near = ROWS[:20] / 2
    for name, samples in (("near", near), ("far", np.concatenate([near, np.full((1, 2), 1e6)]))):
        scatter_picture(tmp_path / name, ROWS, EXPERTS, [samples])
    # The title says that one is missing; everything below it is the same.
    changed = np.flatnonzero((pixels(tmp_path / "near") != pixels(tmp_path / "far")).any(axis=(1, 2)))
    assert 0 < len(changed) <= changed.max() < 0.15 * len(pixels(tmp_path / "near"))


def test_no_expert_hides_another(tmp_path: Path) -> None:
    # Points lie many deep; the two corners make the axes wide.
    rows = np.concatenate([[[-1.0, -1.0]], RNG.uniform(-0.1, 0.1, size=(19998, 2)), [[1.0, 1.0]]])
    scatter_picture(tmp_path / "cloud.png", rows, np.repeat([0, 1], 10000), [])
    picture = pixels(tmp_path / "cloud.png").astype(float)
    blue, yellow = (np.linalg.norm(picture - colour, axis=-1) for colour in ((0x3F, 0x90, 0xDA), (0xFF, 0xA9, 0x0E)))
    seen = np.minimum(blue, yellow) < 60
    assert (blue < yellow)[seen].mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("picture", "records"),
    [(rounds_picture, [{"step": 1}]), (rounds_picture, [{"round": 1}]), (training_picture, [{"step": 1}])],
)
def test_records_with_nothing_to_draw_are_refused_and_leave_no_file(
    tmp_path: Path, picture: Callable[..., None], records: list[dict[str, Any]]
) -> None:
    with pytest.raises(ValueError, match=r"^records \(1\) have no [^\n]*$"):
        picture(tmp_path / "picture.png", records)
    assert list(tmp_path.iterdir()) == []
