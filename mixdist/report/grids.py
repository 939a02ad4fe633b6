"""Grids of images, enlarged pixel by pixel.

Shape letters: n images, H height, W width, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mixdist.files import aside_of
from mixdist.report.style import FAINT, INK, colour_of

# Of an image grid, in pixels: what small images are enlarged to at most, and what is left white between things.
CELL, GAP, ROW_GAP, BLOCK_GAP, MARGIN, BAR = 64, 4, 10, 32, 28, 6
LINE_IMAGES = 16
PANEL_IMAGES = 8


@dataclass(frozen=True)
class Panel:
    """What one expert shows: uint8 images (n, H, W) or (n, H, W, 3), n from 0 to 8 and different for each, if need be.

    Args:
        expert: its global number, which gives its colour.
        title: as "expert 3: digit 7, 38 rows"; what follows the colon is set beneath.
        originals: rows of data the expert is in charge of.
        reconstructions: its reconstructions of them, in the same order.
        samples: drawn from it.
    """

    expert: int
    title: str
    originals: np.ndarray
    reconstructions: np.ndarray
    samples: np.ndarray


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Turn images (n, C, H, W) with values from 0 to 1 into uint8 (n, H, W) or, for C = 3, (n, H, W, 3).

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


def experts_picture(
    path: Path, panels: Sequence[Panel], names: Sequence[str] = ("originals", "reconstructions", "samples")
) -> None:
    """Write the main picture: a row for each expert, with a block of columns for each of its three kinds of images.

    Args:
        path: of the PNG file.
        panels: in the order of the rows.
        names: headings of the three blocks; a block without any image is left out, with its heading.

    Raises:
        ValueError: for no panels, more than 8 images in a block, or arrays that are no uint8 images.
    """
    blocks = [[panel.originals, panel.reconstructions, panel.samples] for panel in panels]
    for panel, row in zip(panels, blocks, strict=True):
        most = max(map(len, row))
        if most > PANEL_IMAGES:
            raise ValueError(
                f"expert {panel.expert} has {most} images in a block: expected 0 to {PANEL_IMAGES}; cut them."
            )
    assert len(names) == 3, names
    kept = [i for i in range(3) if any(len(row[i]) for row in blocks)]
    _write_grid(
        path,
        [[row[i] for i in kept] for row in blocks],
        [panel.title for panel in panels],
        [names[i] for i in kept],
        [panel.expert for panel in panels],
    )


def sample_picture(path: Path, images: Sequence[np.ndarray], titles: Sequence[str]) -> None:
    """Write a grid of each expert's images, uint8 (n, H, W) or (n, H, W, 3) with any n, 16 to a line.

    Raises:
        ValueError: for no experts, titles of another number, or arrays that are no uint8 images.
    """
    if len(titles) != len(images):
        raise ValueError(
            f"titles ({len(titles)}) and images ({len(images)}) differ in number: give one for each expert."
        )
    _write_grid(path, [[block] for block in images], titles, [""], range(len(images)))


def mixture_picture(path: Path, images: np.ndarray) -> None:
    """Write images that belong to no expert, as samples of a mixture, in a grid as square as their number allows.

    Args:
        path: of the PNG file.
        images: uint8 (n, H, W) or (n, H, W, 3), n from 1; line by line in this order.

    Raises:
        ValueError: for no images, or arrays that are no uint8 images.
    """
    _check_images([[images]], ["the mixture"])
    if not len(images):
        raise ValueError("a picture of 0 images cannot be drawn: expected 1 or more; draw some samples.")
    columns = math.isqrt(len(images) - 1) + 1
    zoom = _zoom(*images.shape[1:3])
    height, width = images.shape[1] * zoom, images.shape[2] * zoom
    lines = -(-len(images) // columns)
    size = (columns * (width + GAP) - GAP + 2 * MARGIN, lines * (height + GAP) - GAP + 2 * MARGIN)
    canvas = Image.new("RGB", size, "white")
    _paste(canvas, images, MARGIN, MARGIN, (height, width), columns)
    with aside_of(path) as aside:
        canvas.save(aside, format="PNG")


@dataclass(frozen=True)
class _Layout:
    """Where the parts of an image grid stand, in pixels: cells are (height, width), the size is (width, height)."""

    cell: tuple[int, int]
    lefts: list[int]
    tops: list[int]
    heights: list[int]
    size: tuple[int, int]


def _write_grid(
    path: Path,
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str],
    headings: Sequence[str],
    experts: Sequence[int],
) -> None:
    """Draw blocks of images, ``rows[row][block]``, with row titles at the left and headings above."""
    _check_images(rows, titles)
    bold, plain = _font(20, bold=True), _font(17)
    labels = [(first.strip(), second.strip()) for first, _, second in (title.partition(":") for title in titles)]
    text_width = max(max(bold.getlength(first), plain.getlength(second)) for first, second in labels)
    at = _layout(rows, headings, MARGIN + BAR + 12 + round(text_width))
    canvas = Image.new("RGB", at.size, "white")
    draw = ImageDraw.Draw(canvas)
    for left, heading in zip(at.lefts, headings, strict=True):
        draw.text((left, MARGIN + 14), heading, fill=INK, font=bold, anchor="ls")
    for row, (first, second), expert, top, height in zip(rows, labels, experts, at.tops, at.heights, strict=True):
        draw.rectangle((MARGIN, top, MARGIN + BAR - 1, top + height - 1), fill=colour_of(expert))
        middle = top + height // 2
        draw.text((MARGIN + BAR + 12, middle - (12 if second else 0)), first, fill=INK, font=bold, anchor="lm")
        draw.text((MARGIN + BAR + 12, middle + 13), second, fill=FAINT, font=plain, anchor="lm")
        for left, block in zip(at.lefts, row, strict=True):
            _paste(canvas, block, left, top, at.cell)
    with aside_of(path) as aside:
        canvas.save(aside, format="PNG")


def _layout(rows: Sequence[Sequence[np.ndarray]], headings: Sequence[str], titles_end: int) -> _Layout:
    shapes = [block.shape[1:3] for row in rows for block in row if len(block)]
    cell_height = max((height * _zoom(height, width) for height, width in shapes), default=CELL)
    cell_width = max((width * _zoom(height, width) for height, width in shapes), default=CELL)
    columns = [min(LINE_IMAGES, max(len(row[i]) for row in rows)) for i in range(len(headings))]
    lines = [max([1, *(-(-len(block) // LINE_IMAGES) for block in row)]) for row in rows]
    font = _font(20, bold=True)
    widths = [
        max(count * (cell_width + GAP) - GAP, round(font.getlength(heading)))
        for count, heading in zip(columns, headings, strict=True)
    ]
    heights = [max(count * (cell_height + GAP) - GAP, 48) for count in lines]
    lefts = list(accumulate((width + BLOCK_GAP for width in widths), initial=titles_end + BLOCK_GAP))
    first_top = MARGIN + (30 if any(headings) else 0)
    tops = list(accumulate((height + ROW_GAP for height in heights), initial=first_top))
    size = (lefts[-1] - BLOCK_GAP + MARGIN, tops[-1] - ROW_GAP + MARGIN)
    return _Layout((cell_height, cell_width), lefts[:-1], tops[:-1], heights, size)


def _paste(
    canvas: Image.Image, block: np.ndarray, left: int, top: int, cell: tuple[int, int], columns: int = LINE_IMAGES
) -> None:
    """Paste the images of a block line by line, each enlarged by a whole number and in the middle of its cell."""
    for number, image in enumerate(block):
        line, column = divmod(number, columns)
        zoom = _zoom(*image.shape[:2])
        large = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
        x = left + column * (cell[1] + GAP) + (cell[1] - large.shape[1]) // 2
        y = top + line * (cell[0] + GAP) + (cell[0] - large.shape[0]) // 2
        canvas.paste(Image.fromarray(large).convert("RGB"), (x, y))


def _zoom(height: int, width: int) -> int:
    return max(1, CELL // max(height, width))


def _check_images(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str]) -> None:
    if not rows:
        raise ValueError("a picture of 0 experts cannot be drawn: expected 1 or more; pass a panel for each expert.")
    for title, row in zip(titles, rows, strict=True):
        for block in row:
            if block.dtype != np.uint8 or not (block.ndim == 3 or (block.ndim == 4 and block.shape[3] == 3)):
                raise ValueError(
                    f"images of {title!r} are {block.dtype} {block.shape}: expected uint8 (n, height, width) or "
                    "(n, height, width, 3); convert them with to_uint8."
                )


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib  # heavy, and needed where a picture is drawn alone

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
