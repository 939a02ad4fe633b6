"""The figures of experts and of their mixture.

Shape letters: N all rows, E experts, C classes, A attributes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mixdist.data import Samples
from mixdist.mixtures.study import Evaluation


@dataclass(frozen=True, kw_only=True)
class ExpertEvaluation(Evaluation):
    """Figures of a mixture of experts on a data set, the same on every rank.

    Args:
        rows_E: rows for which each expert is the most responsible.
        counts_EC: experts against labels, rows; None without a label.
        expert_N: the most responsible expert of each row, in the data set's order.
        share_E: mean responsibility of each expert.
        on_own: for each expert the means over the rows for which it is the most responsible, NaN without rows: loss,
            elbo, log_likelihood, importance_error (its standard error over the draws of a row), squared_error of
            reconstructions; those that its experts have.
        on_all: the same means over all rows.
        latent_own: for each expert what :func:`mixdist.mixtures.posteriors.latents` returns of the rows for which it is
            the most responsible; empty where no expert has a posterior.
        latent_all: the same of all rows.
        weight_E: alpha, the mixture's weights as a density; None where its experts give none.
        attribute_EA: the part of the rows for which each expert is the most responsible that has each attribute; NaN
            without rows; None where the data set has no attributes.
        attribute_A: the part of all rows that has each attribute; None as above.
    """

    rows_E: np.ndarray
    counts_EC: np.ndarray | None = None
    expert_N: np.ndarray
    share_E: np.ndarray
    on_own: dict[str, np.ndarray] = field(default_factory=dict)
    on_all: dict[str, np.ndarray] = field(default_factory=dict)
    latent_own: list[dict[str, Any]] = field(default_factory=list)
    latent_all: list[dict[str, Any]] = field(default_factory=list)
    weight_E: np.ndarray | None = None
    attribute_EA: np.ndarray | None = None
    attribute_A: np.ndarray | None = None

    def first(self, expert: int, num_rows: int = 8) -> list[int]:
        """Return the places in the data set of the first rows for which an expert is the most responsible."""
        return np.flatnonzero(self.expert_N == expert)[:num_rows].tolist()

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Return headers and a line for each expert: number, rows, means over them, active units, and what it took.

        What it took is its most frequent class with the class's share of its rows, and the attribute whose rate differs
        most from that of all rows, with both rates.
        """
        names = {"loss": "mean loss", "elbo": "elbo", "log_likelihood": "log-likelihood"}
        shown = {name: header for name, header in names.items() if not np.isnan(self.on_own.get(name, np.nan)).all()}
        lines: list[list[Any]] = []
        for e, rows in enumerate(self.rows_E):
            line = [e, int(rows), *(_shown(self.on_own[name][e]) if rows else "-" for name in shown)]
            if self.latent_own:
                own = self.latent_own[e]
                line.append(f"{own['active_units']} of {len(own['kl_by_dimension'])}" if own else "-")
            if self.counts_EC is not None:
                most = int(self.counts_EC[e].argmax())
                name = class_names(self.dataset)[most]
                line.append(f"{name} ({self.counts_EC[e, most] / rows:.0%})" if rows else "-")
            if self.attribute_EA is not None:
                line.append(self.stands_out(e) or "-")
            lines.append(line)
        units = ["active units"] if self.latent_own else []
        took = [f"took {self.dataset.label}"] if self.dataset.label else []
        took += ["attribute (of all rows)"] if self.attribute_EA is not None else []
        return ["expert", "rows", *shown.values(), *units, *took], lines

    def stands_out(self, e: int) -> str:
        """Name the attribute whose rate among an expert's rows differs most from that of all rows, with both rates.

        Such as "Blond_Hair 61% (15%)"; empty without rows or attributes, or where no rate differs.
        """
        if self.attribute_EA is None or self.attribute_A is None or not self.rows_E[e]:
            return ""
        rate_A, all_A = self.attribute_EA[e], self.attribute_A
        most = int(np.abs(rate_A - all_A).argmax())
        if rate_A[most] == all_A[most]:
            return ""
        return f"{attribute_names(self.dataset)[most]} {rate_A[most]:.0%} ({all_A[most]:.0%})"

    def describe(self) -> dict[str, Any]:
        """Return all of it as JSON: figures, findings, a record for each expert, what is known of experts' rows."""
        experts = [
            {
                "expert": e,
                "rows": int(rows),
                "mean_responsibility": float(self.share_E[e]),
                "weight": None if self.weight_E is None else float(self.weight_E[e]),
                "on_own_rows": self._means(e, self.on_own, self.latent_own),
                "on_all_rows": self._means(e, self.on_all, self.latent_all),
            }
            for e, rows in enumerate(self.rows_E)
        ]
        arrays = {name: getattr(self, name) for name in ("counts_EC", "attribute_EA", "attribute_A")}
        return {
            **super().describe(),
            "experts": experts,
            "label": self.dataset.label,
            "class_names": list(self.dataset.class_names),
            "attribute": self.dataset.attribute,
            "attribute_names": attribute_names(self.dataset) if self.dataset.attribute else [],
            **{name: None if array is None else array.tolist() for name, array in arrays.items()},
        }

    @staticmethod
    def _means(e: int, means: dict[str, np.ndarray], latent: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: float(mean_E[e]) for name, mean_E in means.items()} | (latent[e] if latent else {})


def _shown(value: float) -> str:
    """Return a mean in a table; experts that differ may not all have it."""
    return "-" if math.isnan(value) else f"{value:.4g}"


def class_names(dataset: Samples) -> list[str]:
    """Name the classes of the label, by number where they have no names."""
    return list(dataset.class_names) or [str(c) for c in range(dataset.num_classes or 0)]


def attribute_names(dataset: Samples) -> list[str]:
    """Name the attributes, by number where they have no names."""
    assert dataset.attribute is not None
    return list(dataset.attribute_names) or [str(a) for a in range(dataset.spec[dataset.attribute].shape[0])]
