"""What a family wants drawn, as arrays; :mod:`mixdist.report.gallery` turns each into a PNG file of its name.

Shape letters: N rows shown, G points of a grid, E experts, C classes, A attributes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Panel(NamedTuple):
    """Images of one expert; values from 0 to 1, each array (n, channels, height, width).

    Args:
        expert: its number, which sets its colour.
        title: above the images.
        originals: rows of the data.
        reconstructions: of the same rows.
        samples: from its prior.
    """

    expert: int
    title: str
    originals: np.ndarray
    reconstructions: np.ndarray
    samples: np.ndarray


class Panels(NamedTuple):
    """A panel of images for each expert."""

    name: str
    panels: list[Panel]


class Mosaic(NamedTuple):
    """Images (n, channels, height, width) in a square, in no order of experts; values from 0 to 1."""

    name: str
    images: np.ndarray


class Rows(NamedTuple):
    """Rows of images (n, channels, height, width), each with a title; values from 0 to 1."""

    name: str
    images: list[np.ndarray]
    titles: list[str]


class Captioned(NamedTuple):
    """Rows of images (n, channels, height, width) with a title each, and a sentence under each image."""

    name: str
    images: list[np.ndarray]
    texts: list[list[str]]
    titles: list[str]


class Plane(NamedTuple):
    """Points in the plane, (N, 2), by the expert of each, and each expert's samples; ``word`` is what an expert is."""

    name: str
    points: np.ndarray
    expert_N: np.ndarray
    samples: list[np.ndarray]
    word: str = "expert"


class Curves(NamedTuple):
    """Rows of one number y for one number x, by the expert of each, and each expert's curve (E, G) over a grid."""

    name: str
    x_N: np.ndarray
    y_N: np.ndarray
    expert_N: np.ndarray
    grid_G: np.ndarray
    curve_EG: np.ndarray


class Contingency(NamedTuple):
    """Experts against classes, rows."""

    name: str
    counts_EC: np.ndarray
    class_names: list[str]


class Attributes(NamedTuple):
    """The part of each expert's rows, and of all, that has each attribute."""

    name: str
    rate_EA: np.ndarray
    rate_A: np.ndarray
    rows_E: np.ndarray
    names: list[str]


class Latents(NamedTuple):
    """Points in the plane, (n, 2), once for each way to colour them.

    Args:
        name: of the picture.
        points: where.
        groups: a title, the group of each point (n,), and the groups' names.
    """

    name: str
    points: np.ndarray
    groups: list[tuple[str, np.ndarray, list[str]]]


class Matrix(NamedTuple):
    """A number for each pair of components, and one beside each line; the diagonal is left out.

    Args:
        name: of the picture.
        value_EE: the numbers.
        names: of the components.
        at_right: the numbers beside, (E,).
        caption: below.
    """

    name: str
    value_EE: np.ndarray
    names: list[str]
    at_right: np.ndarray
    caption: str


class Cloud(NamedTuple):
    """Points in the plane (N, 2), the group of each (N,), and the groups' names, which may be left out."""

    title: str
    points: np.ndarray
    group_N: np.ndarray
    names: list[str]


class Clouds(NamedTuple):
    """Several clouds of points, each on axes of its own."""

    name: str
    clouds: list[Cloud]


Picture = Matrix | Clouds | Latents | Panels | Mosaic | Rows | Captioned | Plane | Curves | Contingency | Attributes
