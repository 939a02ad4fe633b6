"""Plots of a mixture with one decoder: how dependent its components are, their latents, and what its masks do.

Shape letters: E components, N rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixdist.report.plots import draw_points, write_caption, write_cells
from mixdist.report.style import INK, PALE, add_legend, colour_of, marker_of, new_figure, new_sheet, save, styled


def matrix_picture(path: Path, value_EE: np.ndarray, names: Sequence[str], at_right: np.ndarray, caption: str) -> None:
    """Write a number for each pair of components: in the cells, and as colour how far it is above those at the right.

    Args:
        path: of the PNG file.
        value_EE: the numbers, not negative but for rounding; those on the diagonal are left out.
        names: of the components.
        at_right: a number for each line, beside it.
        caption: below.
    """
    num = len(names)
    assert value_EE.shape == (num, num), (value_EE.shape, names)
    own = np.eye(num, dtype=bool)
    shown_EE = np.where(own, 0.0, value_EE)
    least, inch = float(at_right.mean()), min(0.8, 36 / num)
    most = max(float(shown_EE.max()), 4.0 * least, np.finfo(np.float64).tiny)  # so that noise stays pale
    figure, axes = new_sheet(num * inch, num * inch)
    axes.imshow(shown_EE, cmap="Blues", vmin=least, vmax=most, aspect="auto")
    cells = [
        ("", PALE) if same else (f"{value:.2g}", "white" if value - least > 0.58 * (most - least) else INK)
        for value, same in zip(shown_EE.flat, own.flat, strict=True)
    ]
    size = min(9.0, inch * 14)
    write_cells(axes, cells, names, [f"{value:.2g}" for value in at_right], size, inch)
    axes.set_xticks(range(num), [name.removeprefix("component ") for name in names])
    write_caption(axes, num * inch, caption)
    save(figure, path)


def clouds_picture(
    path: Path, clouds: Sequence[tuple[str, np.ndarray, np.ndarray, Sequence[str]]], columns: int = 3
) -> None:
    """Write several clouds of points in the plane, each on axes of its own.

    Args:
        path: of the PNG file.
        clouds: of each a title, points (N, 2), the group of each point (N,), and the groups' names.
        columns: axes in a line.
    """
    from matplotlib.figure import Figure

    across = min(columns, len(clouds))
    down = -(-len(clouds) // across)
    figure = Figure(figsize=(4.4 * across + 0.8, 3.8 * down), dpi=150, layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    told: list[str] = []
    for axes, (title, points_N2, group_N, names) in zip(panels, clouds, strict=False):
        draw_points(styled(axes, "", "", title), points_N2, group_N)
        for number, name in enumerate(names):
            axes.scatter([], [], s=9, c=colour_of(number), marker=marker_of(number), linewidths=0, label=name)
        if list(names) != told:  # once for neighbours that share it
            add_legend(axes)
        told = list(names)
    for axes in panels[len(clouds) :]:
        axes.set_axis_off()
    save(figure, path)


def masks_picture(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write the drop rate of each component, and how many components masks select, by step.

    Args:
        path: of the PNG file.
        records: as ``read_metrics`` gives them; those with "drop_rate" (a number for each component) are drawn, with
            their "selected_components" and "components_on", where they have them.
    """
    shown = [record for record in records if record.get("drop_rate")]
    steps, rate_TE = [record["step"] for record in shown], np.array([record["drop_rate"] for record in shown])
    figure, (top, below) = new_figure(8.0, 5.6, rows=2)
    styled(top, "", "drop rate")
    mark = "o" if len(steps) == 1 else ""
    if (rate_TE == rate_TE[:, :1]).all():
        top.plot(steps, rate_TE[:, 0], color=INK, linewidth=1.4, marker=mark, label="all components")
    else:
        for e, rate_T in enumerate(rate_TE.T):
            top.plot(steps, rate_T, color=colour_of(e), linewidth=1.4, marker=mark, label=f"component {e}")
    add_legend(top)
    styled(below, "step", "components")
    for name, look in (("selected_components", "-"), ("components_on", "--")):
        known = [(record["step"], record[name]) for record in shown if record.get(name) is not None]
        if known:
            label = name.replace("_components", "").replace("components_", "")
            below.plot(*zip(*known, strict=True), look, color=INK, linewidth=1.4, marker=mark, label=label)
    below.set_ylim(0, rate_TE.shape[1] + 0.3)
    add_legend(below)
    save(figure, path)
