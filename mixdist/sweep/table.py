"""The tables of a sweep: figures over seeds, paired differences, what it took; as JSON, Markdown and text."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mixdist.evaluation.compare import differing
from mixdist.report.metrics import table
from mixdist.sweep.cells import Record

ROUNDING = 1e-9
"""A standard error below this part of a value is that of rounding."""

Rows = Mapping[str, Mapping[int, Record]]
"""The records of each row of a table, by its name and by seed."""


class Table(NamedTuple):
    """A table to be shown: a title, headers, and a line of cells for each row."""

    title: str
    headers: Sequence[str]
    lines: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return it as Markdown."""
        lines = [self.headers, ["---"] * len(self.headers), *self.lines]
        shown = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"**{self.title}**\n\n{shown}"

    def text(self) -> str:
        """Return it for a terminal."""
        return f"{self.title}\n{table(self.headers, self.lines)}"


@dataclass(frozen=True)
class Spread:
    """A figure over seeds.

    Args:
        values: by seed.
    """

    values: Mapping[int, float]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.values.values())

    @property
    def standard_error(self) -> float | None:
        """The sample standard deviation over sqrt(number of seeds); None for one seed."""
        if len(self.values) < 2:
            return None
        return statistics.stdev(self.values.values()) / math.sqrt(len(self.values))

    def describe(self) -> dict[str, Any]:
        """Return it as JSON."""
        numbers = list(self.values.values())
        return {
            "values": {str(seed): value for seed, value in self.values.items()},
            "median": statistics.median(numbers),
            "min": min(numbers),
            "max": max(numbers),
            "mean": self.mean,
            "standard_error": self.standard_error,
        }


def spread(records: Mapping[int, Record], split: str, figure: str) -> Spread | None:
    """Return a figure of a row; None where no seed has it."""
    found = {s: r["figures"][split][figure] for s, r in records.items() if figure in r["figures"].get(split, {})}
    return Spread(dict(sorted(found.items()))) if found else None


def difference(own: Mapping[int, Record], other: Mapping[int, Record], split: str, figure: str) -> Spread | str | None:
    """Return how much a row's figure is above another's, seed by seed.

    None where no seed has both; what differs where they are of other rows, or mean something else.
    """
    mine, theirs = (spread(row, split, figure) for row in (own, other))
    both = [seed for seed in mine.values if seed in theirs.values] if mine and theirs else []
    if not both or mine is None or theirs is None:
        return None
    for seed in both:
        key = differing(own[seed]["protocol"][split], other[seed]["protocol"][split], figure)
        if key is not None:
            return key
    return Spread({seed: mine.values[seed] - theirs.values[seed] for seed in both})


def _rows(record: Record, split: str) -> tuple[Any, Any]:
    """Return what names the rows that a record's figures are of."""
    about = record["protocol"].get(split, {})
    return about.get("data"), about.get("rows")


def against(rows: Rows, name: str, split: str, asked: str | None) -> str | None:
    """Return the row that a row is compared with: the one asked for, else the first with the same rows of data."""
    for other in [asked] if asked else rows:
        for seed, record in rows[name].items():
            if seed in rows[other] and _rows(record, split) == _rows(rows[other][seed], split):
                return None if other == name else other
    return None


def shared_figures(rows: Rows, split: str) -> list[str]:
    """Return the figures that at least two rows have, or the only row, in the order in which they come."""
    names: list[str] = []
    for records in rows.values():
        own = dict.fromkeys(name for record in records.values() for name in record["figures"].get(split, {}))
        names += own
    enough = min(2, sum(1 for records in rows.values() if records))
    return [name for name in dict.fromkeys(names) if names.count(name) >= enough]


def describe(rows: Rows, split: str, asked: str | None) -> dict[str, Any]:
    """Return, as JSON, all figures of a split: by figure, by row, over seeds, with differences to another row."""
    told: dict[str, Any] = {}
    names = dict.fromkeys(n for records in rows.values() for r in records.values() for n in r["figures"].get(split, {}))
    for figure in names:
        told[figure] = {}
        for name, records in rows.items():
            own = spread(records, split, figure)
            if own is None:
                continue
            told[figure][name] = own.describe()
            other = against(rows, name, split, asked)
            apart = difference(records, rows[other], split, figure) if other else None
            if isinstance(apart, Spread):
                told[figure][name]["difference"] = {"against": other, **apart.describe()}
            elif apart:
                told[figure][name]["difference"] = {"against": other, "differs": apart}
    return told


def figure_table(rows: Rows, split: str, figure: str, asked: str | None) -> Table:
    """Return the table of a figure."""
    first, lines = asked or next(iter(rows)), []
    for name, records in rows.items():
        own, other = spread(records, split, figure), against(rows, name, split, asked)
        if own is None:
            lines.append([name, "0", *["-"] * 4])
            continue
        numbers = own.describe()
        d = decimals([numbers["median"], numbers["mean"]], own.standard_error)
        median, low, high = (f"{numbers[which]:.{d}f}" for which in ("median", "min", "max"))
        apart = difference(records, rows[other], split, figure) if other else None
        shown = with_error(apart) if isinstance(apart, Spread) else f"another {apart}" if apart else "-"
        shown += f" ({other})" if apart and other != first else ""
        lines.append([name, str(len(own.values)), median, f"{low} to {high}", with_error(own), shown])
    headers = ["", "seeds", "median", "range", "mean ± s.e.", f"difference to {first} ± s.e."]
    return Table(f"{figure}, {split} rows", headers, lines)


def with_error(of: Spread) -> str:
    """Return a mean and its standard error over seeds, as ``-1.234 ± 0.012``."""
    error = of.standard_error
    d = decimals([of.mean], error)
    return f"{of.mean:.{d}f}" + ("" if error is None else f" ± {error:.{d}f}")


def decimals(values: Sequence[float], error: float | None) -> int:
    """Return how many decimals to show: two digits of the error, at least four digits of the largest value."""
    largest = max(map(abs, values))
    digits = min(3 - math.floor(math.log10(largest)), 4) if largest > 0 else 3
    if error is not None and error > ROUNDING * largest:
        digits = max(digits, min(1 - math.floor(math.log10(error)), 6))
    return max(digits, 0)


def cost_table(rows: Rows, gradients: Mapping[str, float]) -> Table:
    """Return what the rows took.

    Args:
        rows: their seconds are medians over the seeds for which they are known.
        gradients: by row, how often a training row is in the gradient of an expert.
    """
    lines = []
    for name, records in rows.items():
        found = list(records.values())
        counts: dict[str, int] = next((r["parameters"] for r in found if r["parameters"]), {})
        train = [r["seconds"]["train"] for r in found if r["seconds"]["train"] is not None]
        evaluate = [sum(r["seconds"]["evaluate"].values()) for r in found if r["seconds"]["evaluate"]]
        numbers = [f"{counts[kind]:,}" if kind in counts else "-" for kind in ("experts", "others")]
        numbers.append(f"{gradients[name]:g}" if name in gradients else "-")
        lines.append([name, *numbers, *(f"{statistics.median(s):.1f}" if s else "-" for s in (train, evaluate))])
    headers = [
        "",
        "parameters of experts",
        "of others",
        "gradients a training row",
        "s of training",
        "s of evaluation",
    ]
    return Table("What it took, medians over seeds", headers, lines)


def put(text: str, name: str, inner: str) -> str:
    """Put Markdown between the marks ``<!-- NAME -->`` and ``<!-- end of NAME -->`` of a page.

    Raises:
        ValueError: a mark is missing.
    """
    between = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end of {re.escape(name)} -->)", re.DOTALL)
    if not between.search(text):
        raise ValueError(f"the marks <!-- {name} --> and <!-- end of {name} --> are missing: add them")
    return between.sub(lambda found: f"{found[1]}{inner}\n{found[2]}", text)
