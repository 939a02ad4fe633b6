"""Plots of a run.

Shape letters: N rows, E experts, C classes, A attributes, G grid points.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mixdist.report.style import (
    FAINT,
    INK,
    PALE,
    PALETTE,
    add_legend,
    colour_of,
    draw_stack,
    marker_of,
    new_figure,
    new_sheet,
    save,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def contingency_picture(path: Path, counts_EC: np.ndarray, class_names: Sequence[str]) -> None:
    """Write experts against labels: the counts in the cells, and as colour their share of the expert's rows.

    At the right are all rows of each expert.

    Args:
        path: of the PNG file.
        counts_EC: rows of each expert (down) and label (across).
        class_names: of the labels.
    """
    num_experts, num_classes = counts_EC.shape
    assert num_classes == len(class_names), (counts_EC.shape, class_names)
    total_E = counts_EC.sum(axis=1)
    share_EC = counts_EC / np.maximum(total_E[:, None], 1)
    inch = min(0.62, 36 / max(num_experts, num_classes))
    figure, axes = new_sheet(num_classes * inch, num_experts * inch)
    axes.imshow(share_EC, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    slanted = max(map(len, class_names)) > 5
    axes.set_xticks(range(num_classes), class_names, rotation=40 if slanted else 0, ha="left" if slanted else "center")
    size = min(10.0, inch * 90 / max(5, *(len(f"{count:,.10g}") for count in counts_EC.flat)))
    cells = [
        (f"{count:,.10g}", "white" if share > 0.58 else INK if count else PALE)
        for count, share in zip(counts_EC.flat, share_EC.flat, strict=True)
    ]
    names = [f"expert {expert}" for expert in range(num_experts)]
    write_cells(axes, cells, names, [f"{total:,.10g}" for total in total_E], size, inch)
    caption = "rows of each expert by label, and all of them; darker is a larger share of its rows"
    write_caption(axes, num_classes * inch, caption)
    save(figure, path)


def attributes_picture(
    path: Path,
    rate_EA: np.ndarray,
    rate_A: np.ndarray,
    rows_E: np.ndarray,
    names: Sequence[str],
    num_shown: int = 20,
) -> None:
    """Write attributes (down) against experts (across): how much more or less frequent each is among an expert's rows.

    A cell has the difference from the rate of all rows, in percentage points; that rate stands at the right. Shown are
    the attributes that differ most between experts, in the order of sum_e rows_e (rate_ea - rate_a)^2: an expert with
    few rows says little.

    Args:
        path: of the PNG file.
        rate_EA: the part of each expert's rows that has each attribute; NaN for an expert without rows.
        rate_A: the part of all rows that has it.
        rows_E: rows of each expert.
        names: of the attributes.
        num_shown: the most attributes that are shown.
    """
    num_experts = len(rows_E)
    assert rate_EA.shape == (num_experts, len(names)), (rate_EA.shape, num_experts, len(names))
    more_EA = 100 * (rate_EA - rate_A)
    order_A = np.argsort(-(np.nan_to_num(more_EA) ** 2 * rows_E[:, None]).sum(0), kind="stable")[:num_shown]
    more_AE = more_EA[:, order_A].T
    inch = min(0.62, 36 / num_experts)
    figure, axes = new_sheet(num_experts * inch, len(order_A) * 0.3)
    # From 10, so that noise stays pale, to 50, so that an expert with a handful of rows does not pale the others.
    most = min(50.0, max(10.0, float(np.nanmax(np.abs(more_AE), initial=0.0))))
    axes.imshow(more_AE, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    axes.set_facecolor("#eceff1")  # of an expert without rows
    cells = [
        ("-", FAINT) if np.isnan(more) else (f"{round(more):+d}" if round(more) else "0", "white" if dark else INK)
        for more, dark in zip(more_AE.flat, np.abs(more_AE.flat) > 0.65 * most, strict=True)
    ]
    at_right = [f"{rate:.0%}" for rate in rate_A[order_A]]
    write_cells(axes, cells, [names[a] for a in order_A], at_right, min(9.0, inch * 22), inch)
    axes.text(num_experts - 0.35, -0.66, "all rows", va="center_baseline", color=FAINT, fontsize=9)
    caption = "percentage points above (red) or below (blue) the rate of all rows, by expert with its rows"
    write_caption(axes, num_experts * inch, caption)
    _head_experts(axes, rows_E, inch)
    save(figure, path)


def write_cells(
    axes: Axes,
    cells: Sequence[tuple[str, str]],
    names: Sequence[str],
    at_right: Sequence[str],
    size: float,
    inch: float,
) -> None:
    """Write a text with its colour into each cell of an image, name the lines, and part the cells by white lines."""
    down, across = len(names), len(cells) // len(names)
    for number, (text, colour) in enumerate(cells):
        place = number % across, number // across
        axes.text(*place, text, ha="center", va="center_baseline", color=colour, fontsize=size)
    for line, text in enumerate(at_right):
        axes.text(across - 0.35, line, text, va="center_baseline", color=FAINT, fontsize=size)
    axes.set_yticks(range(down), names, va="center_baseline")
    axes.xaxis.tick_top()
    axes.tick_params(length=0, colors=INK, labelsize=min(10.0, inch * 22))
    axes.hlines(np.arange(1, down) - 0.5, -0.5, across - 0.5, color="white", linewidth=inch * 3)
    axes.vlines(np.arange(1, across) - 0.5, -0.5, down - 0.5, color="white", linewidth=inch * 4)


def write_caption(axes: Axes, width: float, caption: str) -> None:
    axes.set_xlabel(textwrap.fill(caption, max(30, round(13 * width))), color=FAINT, fontsize=9, labelpad=8)


def _head_experts(axes: Axes, rows_E: np.ndarray, inch: float) -> None:
    """Name experts above the columns, with their rows and their colours."""
    size = min(9, inch * 18)
    heads = [f"expert {e}\n{rows:,} rows" for e, rows in enumerate(rows_E.tolist())]
    axes.xaxis.tick_top()
    turned = len(heads) > 1 and inch < 0.9
    axes.set_xticks(range(len(heads)), heads, rotation=40 if turned else 0, ha="left" if turned else "center")
    axes.tick_params(axis="x", labelsize=size, pad=10)
    for e in range(len(heads)):
        axes.plot([e - 0.46, e + 0.46], [-0.66, -0.66], color=colour_of(e), linewidth=4, clip_on=False, scaley=False)


def curves_picture(
    path: Path, x_N: np.ndarray, y_N: np.ndarray, expert_N: np.ndarray, grid_G: np.ndarray, curves_EG: np.ndarray
) -> None:
    """Write rows coloured by their expert, and each expert's curve: solid where it is in charge, dashed elsewhere.

    An expert is in charge at a grid point where a quarter or more of the rows nearest to it are its own, so that two
    experts may share a place. The axes span the rows; a dashed curve may leave them.

    Args:
        path: of the PNG file.
        x_N: inputs.
        y_N: targets.
        expert_N: the expert in charge of each row.
        grid_G: inputs at which the curves are known, ascending.
        curves_EG: each expert's prediction there.
    """
    assert x_N.shape == y_N.shape == expert_N.shape, (x_N.shape, y_N.shape, expert_N.shape)
    figure, (axes,) = new_figure(8.0, 4.8)
    styled(axes, "x", "y")
    draw_points(axes, np.stack([x_N, y_N], axis=1), expert_N)
    charge_EG = _in_charge(x_N, expert_N, grid_G, len(curves_EG))
    for expert, (curve_G, charge_G) in enumerate(zip(curves_EG, charge_EG, strict=True)):
        axes.plot(grid_G, curve_G, color=colour_of(expert), linewidth=1.0, dashes=(4, 3), alpha=0.7)
        solid_G = np.where(charge_G, curve_G, np.nan)
        axes.plot(grid_G, solid_G, color=colour_of(expert), linewidth=2.6, label=f"expert {expert}")
    if len(y_N):
        margin = 0.08 * float(np.ptp(y_N)) or 1.0
        axes.set_ylim(float(y_N.min()) - margin, float(y_N.max()) + margin)
    add_legend(axes)
    save(figure, path)


def _in_charge(x_N: np.ndarray, expert_N: np.ndarray, grid_G: np.ndarray, num_experts: int) -> np.ndarray:
    """Return bool (E, G): which experts have a quarter or more of the up to 16 rows nearest to a grid point."""
    count = min(len(x_N), 16)
    if count == 0:
        return np.zeros((num_experts, len(grid_G)), dtype=bool)
    nearest = [np.argpartition(np.abs(x_N - x), count - 1)[:count] for x in grid_G]
    share = [np.bincount(expert_N[rows], minlength=num_experts) / count for rows in nearest]
    return np.stack(share, axis=1) >= 0.25


def scatter_picture(
    path: Path, x_N2: np.ndarray, expert_N: np.ndarray, samples_by_expert: Sequence[np.ndarray], word: str = "expert"
) -> None:
    """Write rows in the plane coloured by their expert and, beside them on the same axes, samples from each expert.

    The axes span the rows and a quarter of that beyond each side; samples farther out are counted in the title.

    Args:
        path: of the PNG file.
        x_N2: rows.
        expert_N: the expert in charge of each row.
        samples_by_expert: (n, 2) for each expert, any n; an empty list leaves the second half out.
        word: what an expert is called.
    """
    assert x_N2.shape == (len(expert_N), 2), (x_N2.shape, len(expert_N))
    figure, halves = new_figure(9.6 if samples_by_expert else 5.4, 4.8, columns=2 if samples_by_expert else 1)
    draw_points(styled(halves[0], "", "", f"rows by their {word}"), x_N2, expert_N)
    if samples_by_expert:
        owner_M = np.repeat(np.arange(len(samples_by_expert)), [len(samples) for samples in samples_by_expert])
        samples_M2 = np.concatenate(samples_by_expert)
        inside_M = _near(x_N2, samples_M2)
        outside = f", {np.sum(~inside_M):,} farther out" if not inside_M.all() else ""
        styled(halves[1], "", "", f"samples from each {word}{outside}")
        draw_points(halves[1], samples_M2[inside_M], owner_M[inside_M])
    for axes in halves:
        axes.set_aspect("equal")
    for e in range(max([len(samples_by_expert), *(expert_N + 1).tolist()])):
        halves[-1].scatter([], [], s=9, c=colour_of(e), marker=marker_of(e), linewidths=0, label=f"{word} {e}")
    add_legend(halves[-1])
    save(figure, path)


def latents_picture(path: Path, points_N2: np.ndarray, groups: Sequence[tuple[str, np.ndarray, Sequence[str]]]) -> None:
    """Write points in the plane, once for each way to colour them.

    Args:
        path: of the PNG file.
        points_N2: where.
        groups: a title, the group of each point, and the groups' names.
    """
    figure, halves = new_figure(0.6 + 5.4 * len(groups), 4.8, columns=len(groups))
    for axes, (title, group_N, names) in zip(halves, groups, strict=True):
        draw_points(styled(axes, "", "", title), points_N2, group_N)
        axes.set_aspect("equal")
        for number, name in enumerate(names):
            axes.scatter([], [], s=9, c=colour_of(number), marker=marker_of(number), linewidths=0, label=name)
        add_legend(axes)
    save(figure, path)


def _near(x_N2: np.ndarray, points_M2: np.ndarray) -> np.ndarray:
    """Return which points lie in the box around the rows, widened by a quarter on each side: bool (M,)."""
    if len(x_N2) == 0:
        return np.ones(len(points_M2), dtype=bool)
    low_2, high_2 = x_N2.min(axis=0), x_N2.max(axis=0)
    room = max(0.25 * float((high_2 - low_2).max()), 1e-9)
    inside: np.ndarray = ((points_M2 >= low_2 - room) & (points_M2 <= high_2 + room)).all(axis=1)
    return inside


def training_picture(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write the loss over steps, on training and on validation rows, and each expert's share of the load over steps.

    Args:
        path: of the PNG file.
        records: as ``read_metrics`` gives them; those with "loss" or "valid_loss" (nats a row) and those with "load" (a
            number for each expert) are drawn, the loads as shares.

    Raises:
        ValueError: where no record has a loss.
    """
    losses = [(record["step"], record["loss"]) for record in records if record.get("loss") is not None]
    valid = [(record["step"], record["valid_loss"]) for record in records if record.get("valid_loss") is not None]
    loads = [(record["step"], record["load"]) for record in records if record.get("load")]
    if not losses:
        raise ValueError(f"records ({len(records)}) have no loss: expected one or more; train for a step first.")
    figure, halves = new_figure(8.0, 5.6 if loads else 3.2, rows=2 if loads else 1)
    axes = styled(halves[0], "" if loads else "step", "loss, nats a row")
    axes.plot(*zip(*losses, strict=True), color=INK, linewidth=1.4, marker="o" if len(losses) == 1 else "")
    if valid:
        axes.lines[0].set_label("training")
        look: dict[str, Any] = {"color": PALETTE[0], "linewidth": 1.2, "marker": "o", "markersize": 3}
        axes.plot(*zip(*valid, strict=True), label="validation", **look)
        add_legend(axes)
    if loads:
        axes = styled(halves[1], "step", "share of the load")
        draw_stack(axes, [step for step, _ in loads], [np.divide(load, sum(load) or 1).tolist() for _, load in loads])
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.set_ylim(0, 1)
    save(figure, path)


def draw_points(axes: Axes, x_N2: np.ndarray, expert_N: np.ndarray) -> None:
    """Draw rows in the colours of their experts, those of one expert among the others, so that none hides the rest."""
    size = float(np.clip(240 / np.sqrt(max(1, len(x_N2))), 1.5, 24))
    turn_N = np.empty(len(x_N2))
    for expert in np.unique(expert_N).tolist():
        own = expert_N == expert
        turn_N[own] = (np.arange(own.sum()) + 0.5) / own.sum()
    order_N = np.argsort(turn_N, kind="stable")
    marker_N = np.array([marker_of(expert) for expert in expert_N.tolist()])
    for marker in dict.fromkeys(marker_N.tolist()):
        rows = order_N[marker_N[order_N] == marker]
        colours = [colour_of(expert) for expert in expert_N[rows].tolist()]
        axes.scatter(x_N2[rows, 0], x_N2[rows, 1], s=size, c=colours, marker=marker, alpha=0.6, linewidths=0)
