"""How figures of a mixture on a data set are gathered: sums over rows and columns of rows, and what becomes of them.

Shape letters: B rows on this rank, N all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixdist.data import RankBatch, Samples
from mixdist.noise import Moment

KEYS = ("id", "label", "expert")
"""Columns that say what a row is; every other column holds a figure's numbers."""


class Request(NamedTuple):
    """What an evaluation asks for.

    Args:
        at: names the draws.
        batch_size: rows of the global batch.
        num_samples: importance samples for each row and expert; None for no likelihoods.
        shares_from: rows that the mixture's weights are taken from, the training rows; None for the data set itself.
        judges_from: rows that classifiers of what is generated are trained on; None for ``shares_from``.
    """

    at: Moment
    batch_size: int
    num_samples: int | None = None
    shares_from: Samples | None = None
    judges_from: Samples | None = None


@dataclass(frozen=True)
class Evaluation:
    """Figures of a mixture on a data set, the same on every rank.

    Args:
        dataset: the rows.
        figures: name to number.
        findings: a sentence for each thing that is amiss.
        errors: the standard errors of figures; see :func:`standard_error`.
        columns: a number for each row, (N,), in the data set's order: ``id``, ``label`` and ``expert`` where they are
            known, and under a figure's name float64 numbers whose mean is the figure (NaN in rows that it leaves out).
        protocol: as JSON, what the rows have shown of how the figures are to be read.
    """

    dataset: Samples
    figures: dict[str, float]
    findings: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)

    def plus(self, name: str, column_N: np.ndarray, rows: np.ndarray | slice = slice(None)) -> Evaluation:
        """Return the evaluation with one more figure, the mean of a column over some rows, which is NaN elsewhere."""
        shown_N = np.full(len(column_N), np.nan)
        shown_N[rows] = column_N[rows]
        return replace(
            self,
            figures=self.figures | {name: float(column_N[rows].mean())},
            errors=self.errors | {name: standard_error(column_N[rows])},
            columns=self.columns | {name: shown_N},
        )

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Return headers and lines of the table that ends a run; both may be empty."""
        return [], []

    def describe(self) -> dict[str, Any]:
        """Return all but the columns as JSON, except that numbers may not be finite."""
        return {"figures": self.figures, "errors": self.errors, "findings": self.findings}


def standard_error(column_N: np.ndarray) -> float:
    """Return sd / sqrt(N), the standard error of a column's mean, with sd's divisor N - 1.

    NaN for fewer than two numbers, and where one is not finite.

    Examples:
        >>> import numpy as np
        >>> from mixdist.mixtures.study import standard_error
        >>> standard_error(np.array([1.0, 3.0, 1.0, 3.0]))  # 2 / sqrt(3) / 2
        0.5773502691896257
    """
    if len(column_N) < 2 or not np.isfinite(column_N).all():
        return math.nan
    return float(column_N.std(ddof=1) / math.sqrt(len(column_N)))


def linearised(figure: float, influence_N: np.ndarray) -> np.ndarray:
    """Return a column whose mean is a figure that is a smooth function of means over rows.

    The column is figure + influence(n) - mean(influence), with influence(n) the derivative of the figure by the weight
    of row n, times N. Its standard error is the figure's by the delta method (the infinitesimal jackknife: Efron and
    Tibshirani 1993, section 21.3), and differences of two such columns have that of the figures' difference.
    """
    column: np.ndarray = figure + influence_N - influence_N.mean()
    return column


class Study:
    """Sums over this rank's rows and numbers of each, batch by batch, to be joined over ranks by
    :func:`mixdist.evaluation.evaluate.evaluate`.

    Args:
        measure: returns, by name, sums over the rows of a batch, or a number for each of them (B,).
        dataset: the rows.
        request: what is asked for.
    """

    def __init__(
        self, measure: Callable[[RankBatch, Moment], dict[str, Tensor]], dataset: Samples, request: Request
    ) -> None:
        self.measure, self.dataset, self.request = measure, dataset, request
        self.sums: dict[str, Tensor] = {}
        self.columns: dict[str, list[Tensor]] = {"id": []}

    def start(self) -> None:
        """Prepare; every rank calls it once, before the first batch."""

    def add(self, batch: RankBatch) -> None:
        """Count a batch of this rank's rows; every rank calls it."""
        for name, value in self.measure(batch, self.request.at).items():
            given = torch.as_tensor(value)
            if name in KEYS or (given.dim() and given.shape != (batch.size,)):
                raise ValueError(
                    f"measure's {name} has shape {tuple(given.shape)}: return one sum over the {batch.size} rows, or "
                    f"a number for each, under a name other than {', '.join(KEYS)}"
                )
            if given.dim():
                self.keep(**{name: given.double()})
            else:
                self.sum(name, given)

    def sum(self, name: str, value: Tensor) -> None:
        """Add to a named sum, in float64."""
        value = value.detach().double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def keep(self, **columns: Tensor) -> None:
        """Keep a number for each row of a batch, (B,)."""
        for name, column in columns.items():
            self.columns.setdefault(name, []).append(column.detach().cpu())

    def result(self, sums: dict[str, np.ndarray], columns: dict[str, np.ndarray]) -> Evaluation:
        """Return the evaluation, given the sums over all rows and the columns in the data set's order."""
        num_rows = len(self.dataset)
        figures = {name: float(total) / num_rows for name, total in sums.items()}
        found = Evaluation(self.dataset, figures, columns={name: columns[name] for name in KEYS if name in columns})
        for name, column in columns.items():
            found = found if name in KEYS else found.plus(name, column)
        return found

    def own_columns(self) -> dict[str, np.ndarray]:
        """Return this rank's columns."""
        return {name: torch.cat(parts).numpy() for name, parts in self.columns.items()}
