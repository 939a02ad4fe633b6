"""The look of all pictures: colours, figures and axes, and PNG files that are whole or absent.

matplotlib is imported where a figure is made: it is slow to import, and only rank 0 draws. Shape letters: T positions,
E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mixdist.files import aside_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

# Petroff 2021 (arXiv:2107.02270): ten colours that stay apart under the common colour vision deficiencies.
PALETTE = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
# What tells apart experts that share a colour: the first ten have circles and no hatches.
MARKERS = "os^Dv"
HATCHES = ("", "////", "....", "xxxx")
INK, FAINT, PALE = "#22262b", "#6b737c", "#c3cad1"


def colour_of(expert: int) -> str:
    """Return the colour of an expert, the same in every picture."""
    return PALETTE[expert % len(PALETTE)]


def marker_of(expert: int) -> str:
    """Return the marker of an expert's points."""
    return MARKERS[expert // len(PALETTE) % len(MARKERS)]


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure of that size in inches and its axes, which share x and make room for their labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, list(figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False).flat)


def new_sheet(width: float, height: float, dpi: float = 150) -> tuple[Figure, Axes]:
    """Return a figure and axes without a frame that fill it; what is written beside them widens the saved picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.spines[:].set_visible(False)
    return figure, axes


def styled(axes: Axes, x_label: str, y_label: str, title: str = "") -> Axes:
    """Give axes the look that all plots share, and return them."""
    axes.set_xlabel(x_label, color=FAINT)
    axes.set_ylabel(y_label, color=FAINT)
    axes.set_title(title, color=INK, fontsize=11, fontweight="bold", loc="left")
    axes.tick_params(length=0, colors=FAINT, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.grid(color="#e8ebee", linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def add_legend(axes: Axes) -> None:
    """Put a legend at the right of the axes, in columns of 20, where anything is labelled."""
    if labels := axes.get_legend_handles_labels()[1]:
        place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0}
        axes.legend(**place, ncols=-(-len(labels) // 20), frameon=False, fontsize=9, labelcolor=INK, markerscale=2.0)


def draw_stack(axes: Axes, x_T: Sequence[float], parts_T: Sequence[Sequence[float]], **how: Any) -> None:
    """Draw experts' parts (T, E), at T positions, on top of one another; ``how`` goes to ``Axes.stackplot``.

    An expert that is missing at the end of a list has 0 there.
    """
    parts_ET = np.array(list(zip_longest(*parts_T, fillvalue=0.0)), dtype=np.float64)
    experts = range(len(parts_ET))
    how |= {"colors": [colour_of(e) for e in experts], "labels": [f"expert {e}" for e in experts]}
    hatches = [HATCHES[e // len(PALETTE) % len(HATCHES)] for e in experts]
    axes.stackplot(x_T, parts_ET, hatch=hatches, edgecolor="white", linewidth=0.6, **how)
    axes.set_ylim(0, parts_ET.sum(axis=0).max() or 1)
    axes.grid(visible=False)
    add_legend(axes)


def save(figure: Figure, path: Path, box: Bbox | None = None) -> None:
    """Write a figure as PNG, whole or not at all; ``box`` in inches, or all that is drawn and a margin."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path.parent.mkdir(parents=True, exist_ok=True)
    with aside_of(path) as aside:
        # Without the software's version in it the same data gives the same bytes.
        FigureCanvasAgg(figure).print_figure(
            aside, format="png", bbox_inches=box or "tight", pad_inches=0.2, metadata={"Software": None}
        )
