"""How a competition went, round by round.

Shape letters: T rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mixdist.report.style import INK, PALE, PALETTE, add_legend, draw_stack, new_figure, save, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RISE = PALETTE[2]

Record = Mapping[str, Any]


def rounds_picture(path: Path, records: Sequence[Record]) -> None:
    """Write the objective, the share of rows that changed expert, and each expert's rows over the rounds.

    A round trains, which moves the objective from the last round's to ``objective_trained``, and reassigns, which moves
    it to ``objective``; both half-steps are drawn, and each round that ended above the one before is marked.

    Args:
        path: of the PNG file.
        records: as ``read_metrics`` gives them; those with "round" (int) are drawn: "objective" and
            "objective_trained", "changed" (from 0 to 1) and "counts" (rows of each expert), where they have them;
            of several records of a round each name's last counts.

    Raises:
        ValueError: where no record has a round, or those with one have nothing to draw.
    """
    from matplotlib.ticker import MaxNLocator

    by_round: dict[int, dict[str, Any]] = {}
    for record in records:
        if record.get("round") is not None:
            by_round.setdefault(record["round"], {}).update({k: v for k, v in record.items() if v is not None})
    rounds = [by_round[number] for number in sorted(by_round)]
    draws = {"objective": _draw_objective, "changed": _draw_changed, "counts": _draw_counts}
    shown = [name for name in draws if any(record.get(name) is not None for record in rounds)]
    if not shown:
        raise ValueError(
            f"records ({len(records)}) have no round with an objective, changed or counts: expected one or more; train "
            "for a round first."
        )
    figure, panels = new_figure(8.0, 0.8 + 2.4 * len(shown), rows=len(shown))
    for axes, name in zip(panels, shown, strict=True):
        draws[name](
            styled(axes, "round" if name == shown[-1] else "", ""), [r for r in rounds if r.get(name) is not None]
        )
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panels[-1].set_xlim(rounds[0]["round"] - 0.6, rounds[-1]["round"] + 0.6)
    save(figure, path)


def _draw_objective(axes: Axes, rounds: Sequence[Record]) -> None:
    number_T = np.array([record["round"] for record in rounds])
    after_T = np.array([record["objective"] for record in rounds], dtype=np.float64)
    trained = [(r["round"] - 0.5, r["objective_trained"]) for r in rounds if r.get("objective_trained") is not None]
    size = float(np.clip(120 / len(rounds), 1.5, 4.0))
    if trained:
        half_steps = sorted([*trained, *zip(number_T.tolist(), after_T.tolist(), strict=True)])
        axes.plot(*zip(*half_steps, strict=True), color=PALE, linewidth=1.0)
        at, trained_T = zip(*trained, strict=True)
        axes.plot(at, trained_T, color=PALETTE[0], linestyle="", marker="o", markersize=size, label="after training")
    axes.plot(number_T, after_T, color=INK, linewidth=1.2, marker="o", markersize=size, label="after reassignment")
    rose = number_T[1:][np.diff(after_T) > 0]
    if len(rose):
        label = f"rose ({len(rose)} of {len(after_T) - 1})"
        # At the upper edge, where nothing else is: the objective falls.
        height, edge = np.full(len(rose), 0.96), axes.get_xaxis_transform()
        axes.plot(rose, height, color=RISE, linestyle="", marker="^", markersize=4, label=label, transform=edge)
    axes.set_ylabel("objective")
    add_legend(axes)


def _draw_changed(axes: Axes, rounds: Sequence[Record]) -> None:
    changed = [record["changed"] for record in rounds]
    number_T = [record["round"] for record in rounds]
    axes.plot(number_T, changed, color=INK, linewidth=1.2, marker="o", markersize=3, clip_on=False)
    # Zero has its place below the smallest share that is not zero.
    least = min((share for share in changed if share > 0), default=0.1)
    axes.set_yscale("symlog", linthresh=min(least, 0.1), linscale=0.5)
    axes.set_ylim(0, 1.2)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.6g}%")
    axes.set_ylabel("rows that changed expert")


def _draw_counts(axes: Axes, rounds: Sequence[Record]) -> None:
    # A round is one wide: a single one shows too.
    edges = [*(record["round"] - 0.5 for record in rounds), rounds[-1]["round"] + 0.5]
    draw_stack(axes, edges, [record["counts"] for record in [*rounds, rounds[-1]]], step="post")
    axes.yaxis.set_major_formatter(lambda rows, _: f"{rows:,.10g}")
    axes.set_ylabel("rows of each expert")
