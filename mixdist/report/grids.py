"""Grids of images, enlarged pixel by pixel.

Images are (n, C, H, W) with values from 0 to 1. Shape letters: n images, H height, W width, C channels.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixdist.mixtures.pictures import Panel
from mixdist.report.style import FAINT, INK, colour_of, new_sheet, save

# In pixels: what small images are enlarged to at most, and the white between images, rows, blocks and at the border.
CELL, GAP, ROW_GAP, BLOCK_GAP, MARGIN, BAR = 64, 4, 10, 32, 28, 6
# Room for the two lines of a title, and for a letter of a heading.
MIN_HEIGHT, LETTER = 48, 13
LINE_IMAGES = 16
# Of sentences under images: the least width of a column, the lines and their height, the width of a letter, in pixels.
TEXT_WIDTH, TEXT_LINES, TEXT_LINE, TEXT_LETTER, TEXT_SIZE = 128, 6, 13, 8, 6.0
DPI = 128  # a power of two: whole pixels stay whole in inches
TITLE: dict[str, Any] = {"color": INK, "fontsize": 11, "fontweight": "bold"}

Text = tuple[float, float, str, dict[str, Any]]
"""x and y in pixels of the image, what is written there, and how."""


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Return images (n, C, H, W) with values from 0 to 1 as uint8 (n, H, W) or, for C = 3, (n, H, W, 3).

    Raises:
        ValueError: for another shape, C other than 1 or 3, or a value that is not a number.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images {images.shape} cannot be shown: expected (n, C, H, W) with C 1 or 3; use mixdist.load."
        )
    if np.isnan(images).any():
        raise ValueError(f"images {images.shape} cannot be shown: expected values from 0 to 1, found NaN; mask them.")
    pixels = np.rint(np.clip(images, 0.0, 1.0) * 255.0).astype(np.uint8)
    return pixels[:, 0] if pixels.shape[1] == 1 else pixels.transpose(0, 2, 3, 1)


def experts_picture(path: Path, panels: Sequence[Panel]) -> None:
    """Write the main picture: a row for each expert, with a block of columns for each of its three kinds of images.

    A block without any image is left out, with its heading. What follows the colon of a title is written below it.
    """
    names = ("originals", "reconstructions", "samples")
    kept = [name for name in names if any(len(getattr(panel, name)) for panel in panels)] or names[:1]
    rows = [[getattr(panel, name) for name in kept] for panel in panels]
    _write_rows(path, rows, [panel.title for panel in panels], kept, [panel.expert for panel in panels])


def sample_picture(path: Path, images: Sequence[np.ndarray], titles: Sequence[str]) -> None:
    """Write a grid of each expert's images (n, C, H, W), any n, 16 to a line."""
    _write_rows(path, [[block] for block in images], titles, [""], range(len(images)))


def captioned_picture(
    path: Path, images: Sequence[np.ndarray], texts: Sequence[Sequence[str]], titles: Sequence[str]
) -> None:
    """Write rows of images (n, C, H, W), each with a title, and under each image its sentence."""
    shown = [_enlarged(block) for block in images]
    cell = np.max([block.shape[1:3] for block in shown], axis=0)
    width = max(int(cell[1]), TEXT_WIDTH) + GAP * 4
    height = int(cell[0]) + TEXT_LINES * TEXT_LINE + BLOCK_GAP
    canvas = np.full((len(shown) * height, max(map(len, shown)) * width, 3), 255, dtype=np.uint8)
    drawn: list[Text] = []
    for row, (block, told, title) in enumerate(zip(shown, texts, titles, strict=True)):
        drawn.append((-14, row * height + float(cell[0]) / 2, title, TITLE | {"ha": "right", "va": "center_baseline"}))
        for column, (image, sentence) in enumerate(zip(block, told, strict=True)):
            y, x = row * height, column * width
            canvas[y : y + image.shape[0], x : x + image.shape[1]] = image
            lines = textwrap.wrap(sentence, width // TEXT_LETTER, max_lines=TEXT_LINES, placeholder=" ...")
            below = {"va": "top", "color": INK, "fontsize": TEXT_SIZE}
            drawn.append((x, y + image.shape[0] + GAP, "\n".join(lines), below))
    _write(path, canvas, drawn)


def mixture_picture(path: Path, images: np.ndarray) -> None:
    """Write images (n, C, H, W) of no expert, line by line in a grid as square as n allows."""
    columns = math.isqrt(len(images) - 1) + 1
    enlarged = _enlarged(images)
    tile = _tiled(enlarged, enlarged.shape[1:3], -(-len(images) // columns), columns)
    _write(path, tile[:-ROW_GAP, BLOCK_GAP:])


def _write_rows(
    path: Path,
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str],
    headings: Sequence[str],
    experts: Sequence[int],
) -> None:
    """Write blocks of images, ``rows[row][block]``, with titles and bars of colour at the left and headings above."""
    rows = [[_enlarged(block) for block in row] for row in rows]
    cell = np.max([(MIN_HEIGHT, 1), *(block.shape[1:3] for row in rows for block in row)], axis=0).tolist()
    columns = [
        max(min(LINE_IMAGES, max(map(len, blocks))), -(-LETTER * len(heading) // (cell[1] + GAP)))
        for blocks, heading in zip(zip(*rows, strict=True), headings, strict=True)
    ]
    strips = []
    for row, expert in zip(rows, experts, strict=True):
        lines = -(-max([1, *map(len, row)]) // LINE_IMAGES)
        tiles = [_tiled(block, cell, lines, count) for block, count in zip(row, columns, strict=True)]
        strips.append(np.concatenate(tiles, axis=1))
        strips[-1][:-ROW_GAP, :BAR] = list(bytes.fromhex(colour_of(expert).removeprefix("#")))
    texts: list[Text] = []
    left, top = BLOCK_GAP, 0
    for heading, count in zip(headings, columns, strict=True):
        texts.append((left, -12, heading, TITLE))
        left += count * (cell[1] + GAP) - GAP + BLOCK_GAP
    for strip, title in zip(strips, titles, strict=True):
        first, second = (part.strip() for part in f"{title}:".split(":", 2)[:2])
        middle = top + (len(strip) - ROW_GAP) / 2
        texts.append((-14, middle - 1, first, TITLE | {"ha": "right", "va": "bottom" if second else "center_baseline"}))
        texts.append((-14, middle + 3, second, {"ha": "right", "va": "top", "color": FAINT, "fontsize": 9.5}))
        top += len(strip)
    _write(path, np.concatenate(strips)[:-ROW_GAP], texts)


def _enlarged(images: np.ndarray) -> np.ndarray:
    """Return images as uint8, enlarged by a whole number to at most ``CELL``, in colour: (n, height, width, 3)."""
    pixels = to_uint8(images)
    zoom = max(1, CELL // max(pixels.shape[1:3]))
    large = pixels.repeat(zoom, axis=1).repeat(zoom, axis=2)
    return large if large.ndim == 4 else large[..., None].repeat(3, axis=3)


def _tiled(images: np.ndarray, cell: Sequence[int], lines: int, columns: int) -> np.ndarray:
    """Return images line by line, each in the middle of its cell (height, width), white at the left and below."""
    step_y, step_x = cell[0] + GAP, cell[1] + GAP
    canvas = np.full((lines * step_y - GAP + ROW_GAP, BLOCK_GAP + columns * step_x - GAP, 3), 255, dtype=np.uint8)
    height, width = images.shape[1:3]
    for number, image in enumerate(images):
        y = number // columns * step_y + (cell[0] - height) // 2
        x = BLOCK_GAP + number % columns * step_x + (cell[1] - width) // 2
        canvas[y : y + height, x : x + width] = image
    return canvas


def _write(path: Path, canvas: np.ndarray, texts: Sequence[Text] = ()) -> None:
    """Write an image pixel by pixel, texts in or beside it, and a margin around all."""
    from matplotlib.transforms import Bbox

    figure, axes = new_sheet(canvas.shape[1] / DPI, canvas.shape[0] / DPI, DPI)
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    drawn = [axes.text(x, y, text, **how).get_window_extent() for x, y, text, how in texts if text]
    box = Bbox.union([figure.bbox, *drawn])
    # A border between whole pixels: otherwise the image would be resampled.
    save(figure, path, Bbox([(np.floor(box.min) - MARGIN) / DPI, (np.ceil(box.max) + MARGIN) / DPI]))
