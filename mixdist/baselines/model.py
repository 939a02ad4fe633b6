"""What a fitted baseline is, how one is chosen, and what it is worth on rows.

Shape letters: N rows, B rows of a batch, D numbers of a row, K clusters, C classes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from mixdist.baselines.rows import Rows
from mixdist.data.sources.splits import VALID, held_out
from mixdist.files import read_arrays
from mixdist.mixtures.clusters import clustering
from mixdist.mixtures.study import KEYS, Evaluation, linearised

FEW = 10
"""Training rows for each component, below which nothing is held out of them to choose settings."""

ABOUT, MODEL = "baseline.json", "model.npz"
"""What a baseline leaves in its directory: what it is, of every kind; and the fitted model, but of a trained expert."""


def read_about(run: Path) -> dict[str, Any]:
    """Read what a baseline is: its kind, its settings and what chose them.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        about = json.loads((run / ABOUT).read_bytes())
        needed = {"kind", "parameters"}
        if about["kind"] != "vae":
            needed |= {"field", "likelihood", "on", "expert", "seed", "data", "settings", "tried", "findings", "sha256"}
        if needed <= about.keys():
            return dict(about)
    except (ValueError, OSError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{run / ABOUT} is damaged: make the baseline again")


def repeatable(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a baseline is without what differs when it is fitted again: its seconds and its file's checksum."""
    return {name: value for name, value in about.items() if name not in ("seconds", "sha256")}


class Baseline(ABC):
    """Base of fitted models, dataclasses of arrays and numbers; what one cannot do returns None."""

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Return how many numbers were fitted."""

    def log_density(self, x_BD: np.ndarray) -> np.ndarray | None:
        """Return log p(x) of each row, (B,) nats."""
        return None

    def reconstruct(self, x_BD: np.ndarray) -> np.ndarray | None:
        """Return the model's reconstruction of each row, (B, D)."""
        return None

    def assign(self, x_BD: np.ndarray) -> np.ndarray | None:
        """Return the cluster of each row, (B,) int64."""
        return None

    def to_bytes(self) -> bytes:
        """Return the model as an .npz file."""
        with io.BytesIO() as stream:
            np.savez(stream, allow_pickle=False, **{name: np.asarray(value) for name, value in vars(self).items()})
            return stream.getvalue()

    @classmethod
    def read(cls, path: Path, sha256: str) -> Self:
        """Read what ``to_bytes`` returned, which had that checksum.

        Raises:
            ValueError: the file is damaged.
        """
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise ValueError(f"{path} is missing, damaged or of another baseline: make the baseline again")
        return cls(**{name: array if array.ndim else array.item() for name, array in read_arrays(path).items()})


class Candidate(NamedTuple):
    """A fitted model, its settings, and a sentence for each thing that is amiss."""

    model: Baseline
    settings: dict[str, Any]
    findings: Sequence[str] = ()


@dataclass(frozen=True)
class Choice:
    """What was fitted, and how it was chosen.

    Args:
        best: the candidate with the highest mean log density of the rows that choose.
        tried: the settings of all, with that mean, nats; empty where there was one.
        chosen_on: what these rows were.
    """

    best: Candidate
    tried: list[dict[str, Any]] = field(default_factory=list)
    chosen_on: str | None = None


Grid = dict[str, list[Any]]
"""Settings and the values to try, the most cautious first."""


def choose(fits: Iterable[Callable[[], Candidate]], valid: Rows | None) -> Choice:
    """Fit candidates, and return the best on validation rows, the first of equals; without such rows the first.

    Only the best so far is kept, so that there may be many large ones. One that cannot be fitted is left out.

    Raises:
        ValueError: none can be fitted; what the first says.
    """
    best: tuple[float, Candidate] | None = None
    tried: list[dict[str, Any]] = []
    mistakes: list[ValueError] = []
    for fit in fits:
        try:
            candidate = fit()
        except ValueError as mistake:
            mistakes.append(mistake)
            continue
        mean = math.nan if valid is None else mean_log_density(candidate.model, valid)
        tried.append({**candidate.settings, "valid_log_likelihood": mean})
        if best is None or mean > best[0]:
            best = mean, candidate
    if best is None:
        raise mistakes[0]
    return Choice(best[1], tried, "the validation rows") if len(tried) > 1 else Choice(best[1])


def choose_settings(
    fit: Callable[[Rows, Rows | None, Grid], Choice], train: Rows, valid: Rows | None, grid: Grid
) -> Choice:
    """Fit with the settings that are best on validation rows; without such rows on a tenth of the training rows.

    That tenth is chosen by id; what it has chosen is then fitted to all training rows. Of too few rows for that, the
    first of all settings are taken.
    """
    if valid is not None or all(len(values) == 1 for values in grid.values()):
        return fit(train, valid, grid)
    if len(train) < FEW * max(grid["components"]):
        return fit(train, None, {name: values[:1] for name, values in grid.items()})
    held_N = held_out("valid", train.dataset.ids, max(1, len(train) // 10), VALID)
    inner, held = (Rows(train.dataset.part(part_N.nonzero()[:, 0]), train.values) for part_N in (~held_N, held_N))
    first = fit(inner, held, grid)
    again = fit(train, None, {name: [first.best.settings[name]] for name in grid})
    return dataclasses.replace(again, tried=first.tried, chosen_on="a tenth of the training rows")


def mean_log_density(model: Baseline, rows: Rows) -> float:
    """Return the mean log density of rows, nats."""
    parts = [model.log_density(x_BD) for _, x_BD in rows.batches()]
    return float(np.concatenate([part for part in parts if part is not None]).mean())


def evaluate_baseline(model: Baseline, rows: Rows, num_values: int | None) -> Evaluation:
    """Return the figures of a model on rows, under the names and by the definitions that mixtures have.

    Args:
        model: fitted.
        rows: a data set, every row of which is read once.
        num_values: numbers in a row of the data set, where the model is one of these; None for a model of latents,
            whose density and error mean nothing beside theirs and are left out.
    """
    dataset, found = rows.dataset, defaultdict[str, list[np.ndarray]](list)
    for stored, x_BD in rows.batches():
        found["id"].append(stored["id"].numpy())
        if dataset.label is not None and stored[dataset.label].ndim == 1:
            found["label"].append(stored[dataset.label].long().numpy())
        log_p_B, cluster_B, xhat_BD = model.log_density(x_BD), model.assign(x_BD), model.reconstruct(x_BD)
        if cluster_B is not None:
            found["expert"].append(cluster_B)
        if log_p_B is not None and num_values:
            found["log_likelihood"].append(log_p_B)
        if xhat_BD is not None and num_values:
            found["squared"].append(np.square(x_BD - xhat_BD).sum(1))
    columns = {name: np.concatenate(parts) for name, parts in found.items()}
    keys = {name: column for name, column in columns.items() if name in KEYS}
    evaluation = Evaluation(dataset, {}, columns=keys)
    if "log_likelihood" in columns:
        evaluation = evaluation.plus("log_likelihood", columns["log_likelihood"])
        if dataset.log_density_N is not None:
            evaluation = evaluation.plus("exact_log_likelihood", dataset.log_density_N.numpy())
    if num_values and "squared" in columns:
        squared_N, per_row = columns["squared"], math.sqrt(columns["squared"].mean())
        column_N = linearised(per_row, squared_N / (2 * per_row) if per_row else squared_N)
        evaluation = evaluation.plus("rmse_row", column_N)
        evaluation = evaluation.plus("rmse_value", column_N / math.sqrt(num_values))
    if {"label", "expert"} <= columns.keys():
        for name, column_N in clustering(columns["expert"], columns["label"]).items():
            evaluation = evaluation.plus(name, column_N)
    return evaluation
