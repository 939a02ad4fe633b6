"""How figures of a mixture on a data set are gathered: named sums over rows, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixdist.data import RankBatch, Samples
from mixdist.noise import Moment


class Request(NamedTuple):
    """What an evaluation asks for.

    Args:
        at: names the draws.
        batch_size: rows of the global batch.
        num_samples: importance samples for each row and expert; None for no likelihoods.
        shares_from: rows that the mixture's weights are taken from, the training rows; None for the data set itself.
    """

    at: Moment
    batch_size: int
    num_samples: int | None = None
    shares_from: Samples | None = None


@dataclass(frozen=True)
class Evaluation:
    """Figures of a mixture on a data set, the same on every rank.

    Args:
        dataset: the rows.
        figures: name to number.
        findings: a sentence for each thing that is amiss.
    """

    dataset: Samples
    figures: dict[str, float]
    findings: list[str] = field(default_factory=list)

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Return headers and lines of the table that ends a run; both may be empty."""
        return [], []

    def describe(self) -> dict[str, Any]:
        """Return all of it as JSON, but for numbers that are not finite."""
        return {"figures": self.figures, "findings": self.findings}


class Study:
    """Sums over this rank's rows, batch by batch; :func:`mixdist.evaluation.evaluate.evaluate` sums them over ranks.

    Args:
        measure: returns named sums over the rows of a batch.
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
            total = torch.as_tensor(value)
            if total.dim():
                raise ValueError(f"measure's {name} has shape {tuple(total.shape)}: return one sum over the rows")
            self.sum(name, total)

    def sum(self, name: str, value: Tensor) -> None:
        """Add to a named sum, in float64."""
        value = value.detach().double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def keep(self, batch: RankBatch, **columns: Tensor) -> None:
        """Keep a number for each row of a batch, (B,)."""
        for name, column in {"id": batch.rows["id"], **columns}.items():
            self.columns.setdefault(name, []).append(column.detach().cpu())

    def result(self, sums: dict[str, np.ndarray], columns: dict[str, np.ndarray]) -> Evaluation:
        """Return the evaluation, given the sums over all rows and the columns in the data set's order."""
        num_rows = len(self.dataset)
        figures = {name: float(total) / num_rows for name, total in sums.items()}
        return Evaluation(self.dataset, figures)

    def own_columns(self) -> dict[str, np.ndarray]:
        """Return this rank's columns; none where nothing was kept."""
        return {name: torch.cat(parts).numpy() for name, parts in self.columns.items() if parts}
