"""Runs side by side: a figure of each with its standard error, and paired differences to the first.

Shape letters: N rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixdist.files import read_arrays
from mixdist.messages import one_line

HEADLINES = ("log_likelihood", "conditional_log_likelihood", "log_joint", "accuracy", "prediction_rmse", "rmse_value")
"""The figure that is compared where none is named: the first of these that all have, else their first in common."""

NORMAL_95 = 1.959963984540054
"""Half the width of a 95% interval, in standard errors."""

SAME = ("split", "data", "rows")
"""What the protocols of runs must share for any figure."""

OF_LIKELIHOODS = (
    "likelihood",
    "likelihood_of",
    "drawn_as",
    "gate_likelihood",
    "levels",
    "add_for_stored_units",
    "num_samples",
    "kde",
)
"""What they must share for likelihoods, bounds and losses: what they are of, in which units, from how many samples. One
that is exact has no number of samples, and may be compared with one that has."""

OF_OTHERS = {
    ("loss",): ("loss_is",),
    ("accuracy", "purity", "nmi", "ari"): ("label",),
    ("rmse_row", "rmse_value"): ("reconstructs", "reconstructs_scale"),
    ("prediction_rmse", "prediction_error"): ("predicts", "predicts_scale"),
    ("prediction_accuracy", "unexplained_variance"): ("predicts",),
}
"""What they must share for other figures, where both protocols have it: the label, or the field and its units."""

UNSAMPLED = ("exact_log_likelihood", "kde_log_likelihood")
"""Likelihoods that take no importance samples."""


class Judged(NamedTuple):
    """What an evaluation left of a run.

    Args:
        run: its directory, as given.
        protocol: how figures were taken.
        figures: name to number.
        errors: their standard errors.
        columns: numbers of each row by name, with "id".
    """

    run: str
    protocol: dict[str, Any]
    figures: dict[str, float]
    errors: dict[str, float | None]
    columns: dict[str, np.ndarray]


class Line(NamedTuple):
    """A run in a comparison; None where a number is not known.

    Args:
        run: its directory.
        value: of the figure.
        error: its standard error.
        difference: to the first run.
        difference_error: standard error of that, paired by rows.
        interval: of the difference, 95%.
        z: the difference in standard errors.
    """

    run: str
    value: float
    error: float | None
    difference: float | None = None
    difference_error: float | None = None
    interval: tuple[float, float] | None = None
    z: float | None = None


def stem_of(split: str, ema: bool = False) -> str:
    """Return the name, without its ending, of what an evaluation of a split, or of averages, is written to."""
    return "-".join(["evaluation", *([split] if split != "test" else []), *(["ema"] if ema else [])])


def read_evaluation(run: Path, split: str = "test") -> Judged:
    """Read what ``mixdist evaluate`` or ``mixdist baseline`` left of a run.

    Raises:
        ValueError: there is no such run, it was not evaluated, or a file is damaged.
    """
    figures, columns = run / f"{stem_of(split)}.json", run / f"{stem_of(split)}.npz"
    command = f"run mixdist evaluate {run}" + ("" if split == "test" else f" --split {split}")
    if not run.is_dir():
        raise ValueError(f"{run} is no run: name a directory that mixdist train or mixdist baseline made")
    for path in (figures, columns):
        if not path.is_file():
            raise ValueError(f"{run} was not evaluated on {split} rows ({path.name} is missing): {command}")
    try:
        told = json.loads(figures.read_bytes())
        if not isinstance(told, dict) or not all(isinstance(told.get(key), dict) for key in Judged._fields[1:4]):
            raise ValueError(f"{figures.name} lacks {', '.join(Judged._fields[1:4])}")
        found = Judged(str(run), told["protocol"], told["figures"], told["errors"], read_arrays(columns))
        _check(found)
    except (ValueError, OSError) as error:
        raise ValueError(f"{figures} and {columns.name} cannot be used ({one_line(str(error))}): {command}") from None
    return found


def _check(judged: Judged) -> None:
    """Check that figures and columns are of one evaluation."""
    missing = [key for key in SAME if key not in judged.protocol]
    if missing:
        raise ValueError(f"the protocol lacks {', '.join(missing)}")
    for name, value in [*judged.figures.items(), *judged.errors.items()]:
        if not (value is None or (type(value) in (int, float) and math.isfinite(value))):
            raise ValueError(f"{name} is {value!r}, which is no number")
    ids_N = judged.columns.get("id", np.zeros(0))
    if ids_N.dtype != np.int64 or ids_N.ndim != 1 or len(np.unique(ids_N)) != len(ids_N):
        raise ValueError("the ids of the rows are not whole numbers, each once")
    if len(ids_N) != judged.protocol["rows"]:
        raise ValueError(f"{len(ids_N)} rows in one, {judged.protocol['rows']} in the other")
    for name, column_N in judged.columns.items():
        if column_N.shape != ids_N.shape or column_N.dtype.kind not in "iufb":
            raise ValueError(f"the column {name} is not one number for each id")
        mean = judged.figures.get(name)
        if mean is not None and abs(np.nanmean(column_N) - mean) > 1e-9 * max(1.0, abs(mean)):
            raise ValueError(f"{name} is {mean} in one and {np.nanmean(column_N)} in the other")


def choose_figure(runs: Sequence[Judged], wanted: str | None = None) -> str:
    """Return the figure to compare.

    Raises:
        ValueError: a run does not have it, or they have none in common.
    """
    common = [name for name in runs[0].figures if all(run.figures.get(name) is not None for run in runs)]
    if wanted is None:
        if not common:
            told = "; ".join(f"{run.run}: {', '.join(run.figures)}" for run in runs)
            raise ValueError(f"the runs have no figure in common ({told}): name others")
        return next((name for name in HEADLINES if name in common), common[0])
    if wanted not in common:
        lacks = next(run.run for run in runs if run.figures.get(wanted) is None)
        listed = f"choose {', '.join(common)}" if common else "they have none in common"
        raise ValueError(f"--figure ({wanted}) is not among the figures of {lacks}: {listed}")
    return wanted


def check_comparable(runs: Sequence[Judged], figure: str) -> None:
    """Check that a figure of runs means the same.

    Raises:
        ValueError: their data or protocols differ; names the first thing that does.
    """
    first = runs[0]
    for run in runs[1:]:
        key = differing(first.protocol, run.protocol, figure)
        if key is not None:
            mine, theirs = (_short(one.protocol.get(key)) for one in (first, run))
            raise ValueError(
                f"{figure} of {run.run} cannot be compared with that of {first.run}: {key} is {theirs} there and "
                f"{mine} here: {_remedy(key)}"
            )
        if set(first.columns["id"].tolist()) != set(run.columns["id"].tolist()):
            raise ValueError(f"{run.run} was evaluated on other rows than {first.run}: evaluate both on the same")


def differing(one: Mapping[str, Any], other: Mapping[str, Any], figure: str) -> str | None:
    """Return the first key of two protocols that keeps a figure from being compared; None if there is none."""
    sampled = "likelihood" in figure or figure.startswith(("log_", "bits_")) or figure == "looser"
    likelihoods = sampled or "elbo" in figure or "loss" in figure
    others = [
        key for names, keys in OF_OTHERS.items() if figure in names for key in keys if key in one and key in other
    ]
    others += ["probes"] if figure.startswith("probe_") else []
    for key in [*SAME, *(OF_LIKELIHOODS if likelihoods else ()), *others]:
        mine, theirs = one.get(key), other.get(key)
        if key == "num_samples" and (not sampled or figure in UNSAMPLED):
            continue
        if key == "kde":
            if not figure.startswith(key):
                continue
            mine, theirs = ((told or {}).get("samples") for told in (mine, theirs))
        if mine != theirs and not (key == "num_samples" and None in (mine, theirs)):
            return key
    return None


UNLIKE = {
    "dtype": "what lies below float32's rounding says nothing",
    "mixdist": "a figure may be taken otherwise in another version",
}
"""What protocols may differ in, but not in silence: exact densities of baselines are float64, runs usually float32."""


def notes(runs: Sequence[Judged]) -> list[str]:
    """Return a line for each thing that does not keep runs from being compared, but has a part in their differences.

    Examples:
        >>> from mixdist.evaluation.compare import Judged, notes
        >>> dtypes = {"a": "float32", "b": "float64"}
        >>> notes([Judged(name, {"dtype": dtype}, {}, {}, {}) for name, dtype in dtypes.items()])
        ["note: dtype is float32 in a and float64 in b: what lies below float32's rounding says nothing"]
    """
    found = []
    for key, why in UNLIKE.items():
        values: dict[str, list[str]] = {}
        for run in runs:
            values.setdefault(str(run.protocol.get(key, "unknown")), []).append(run.run)
        if len(values) > 1:
            told = " and ".join(f"{value} in {', '.join(names)}" for value, names in values.items())
            found.append(f"note: {key} is {told}: {why}")
    return found


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 and text.isalnum() else text


def _remedy(key: str) -> str:
    return {
        "num_samples": "evaluate both with the same --num_samples",
        "rows": "evaluate both with the same --rows",
        "likelihood": "compare another figure with --figure, or baselines with --likelihood as the run has it",
        "loss_is": "compare another figure with --figure, such as log_joint",
        "label": "name runs that have it alike, or compare another figure with --figure",
        "predicts": "name runs that predict the same, or compare another figure with --figure",
        "reconstructs": "name runs that reconstruct the same, or compare another figure with --figure",
    }.get(key.removesuffix("_scale"), "name runs of the same data and split")


def compare(runs: Sequence[Judged], figure: str | None = None) -> tuple[str, list[Line]]:
    """Compare runs: each one's figure, and its difference to the first run's.

    Differences are paired: with d_n the difference of the two columns at row n, their mean has the standard error
    sd(d) / sqrt(N), sd with divisor N - 1. Rows where one of the two has no number are left out of both.

    Returns:
        the figure's name, and a line for each run.

    Raises:
        ValueError: runs that cannot be compared.
    """
    if len(runs) < 2:
        raise ValueError(f"compare needs two runs or more, and {len(runs)} is given: name another")
    name = choose_figure(runs, figure)
    check_comparable(runs, name)
    first = runs[0]
    lines = [Line(first.run, first.figures[name], first.errors.get(name))]
    lines += [_line(first, run, name) for run in runs[1:]]
    return name, lines


def _line(first: Judged, run: Judged, name: str) -> Line:
    value = run.figures[name]
    line = Line(run.run, value, run.errors.get(name), value - first.figures[name])
    if name not in first.columns or name not in run.columns:
        return line
    mean, error = paired(*(_by_id(one, name) for one in (run, first)))
    if not math.isfinite(error):
        return line._replace(difference=mean)
    interval = (mean - NORMAL_95 * error, mean + NORMAL_95 * error)
    return line._replace(difference=mean, difference_error=error, interval=interval, z=mean / error if error else None)


def _by_id(judged: Judged, name: str) -> np.ndarray:
    column: np.ndarray = judged.columns[name][np.argsort(judged.columns["id"])].astype(np.float64)
    return column


def paired(one_N: np.ndarray, other_N: np.ndarray) -> tuple[float, float]:
    """Return the mean of one - other over rows, and its standard error sd(d) / sqrt(N); NaN for fewer than two rows.

    Examples:
        >>> import numpy as np
        >>> from mixdist.evaluation.compare import paired
        >>> paired(np.array([1.0, 2.0, 3.0]), np.array([1.0, 1.0, 1.0]))
        (1.0, 0.5773502691896258)
    """
    d = one_N - other_N
    d = d[~np.isnan(d)]
    if not len(d):
        return math.nan, math.nan
    error = float(d.std(ddof=1) / math.sqrt(len(d))) if len(d) > 1 else math.nan
    return float(d.mean()), error
