"""The fields of rows as JSON, for checkpoints and shards."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mixdist.terms import STORED_INTEGERS, STORED_REALS, Field, Spec


def describe_spec(spec: Spec) -> dict[str, Any]:
    """Return a spec as JSON."""
    told = {name: {**vars(f), "shape": list(f.shape), "dtype": _type_name(f.dtype)} for name, f in spec.items()}
    for f in told.values():
        for name in ("words", "drawn"):  # most fields have neither
            f.update({name: list(value) if name == "words" else value} if (value := f.pop(name)) else {})
    return told


def read_spec(described: dict[str, Any]) -> dict[str, Field]:
    """Undo ``describe_spec``."""
    stored = {_type_name(d): d for d in (*STORED_INTEGERS, *STORED_REALS)}
    made = {n: {**f, "shape": tuple(f["shape"]), "dtype": stored[f["dtype"]]} for n, f in described.items()}
    return {n: Field(**{**f, "words": tuple(f.get("words", ()))}) for n, f in made.items()}


def dtype_of(spec: Spec) -> np.dtype[Any]:
    """Return the type of an array that holds a row of these fields, each by its name."""
    return np.dtype([(name, torch.empty(0, dtype=f.dtype).numpy().dtype, f.shape) for name, f in spec.items()])


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
