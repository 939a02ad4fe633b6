"""What an evaluation leaves behind: a JSON file of figures and how they were taken, and beside it a table of rows."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from mixdist.files import write_file
from mixdist.mixtures import Evaluation


def record(evaluation: Evaluation, protocol: dict[str, Any], path: Path) -> None:
    """Write ``path`` (.json) and, under the same stem, ``.npz`` with the columns of the rows.

    The JSON file is complete or absent, and where it is there the rows beside it are its own.

    Args:
        evaluation: figures, errors and columns.
        protocol: how they were taken, enough to take them again; the evaluation's own protocol is added.
        path: of the JSON file.
    """
    told = without_nan({"protocol": {**protocol, **evaluation.protocol}, **evaluation.describe()})
    path.unlink(missing_ok=True)
    write_file(path.with_suffix(".npz"), rows_of(evaluation))
    write_file(path, (json.dumps(told, indent=2, allow_nan=False) + "\n").encode())


def rows_of(evaluation: Evaluation) -> bytes:
    """Return the columns of the rows as an .npz file: numpy.load(path, allow_pickle=False) reads it."""
    file = io.BytesIO()
    np.savez_compressed(file, **evaluation.columns)  # type: ignore[arg-type]
    return file.getvalue()


def without_nan(value: Any) -> Any:
    """Return JSON with null where a number is not finite: an expert without rows has no mean."""
    if isinstance(value, dict):
        return {name: without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
