"""Figures and axes as all plots have them. matplotlib is imported where a figure is made: rank 0 alone needs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixdist.files import aside_of
from mixdist.report.style import FAINT, INK, PALE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, constrained: bool = True) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained" if constrained else None)


def styled(axes: Axes, x_label: str, y_label: str, title: str = "") -> Axes:
    """Return axes the look that all plots share."""
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
    """Put the experts at the right of the axes, in columns of 20."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = -(-len(labels) // 20)
        place: dict[str, Any] = {
            "loc": "upper left",
            "bbox_to_anchor": (1.01, 1.0),
            "borderaxespad": 0.0,
            "ncols": columns,
        }
        legend = axes.legend(**place, frameon=False, fontsize=9, labelcolor=INK, markerscale=2.0)
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_alpha(1.0)


def save(figure: Figure, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with aside_of(path) as aside:
        # Without the software's version in it the same data gives the same bytes.
        FigureCanvasAgg(figure).print_figure(
            aside, format="png", bbox_inches="tight", pad_inches=0.2, metadata={"Software": None}
        )
