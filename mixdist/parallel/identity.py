"""What makes ranks the same: values by name, versions and sources, compared with rank 0's."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from mixdist.messages import one_line

_LONGEST = 100


def difference(
    first: Mapping[str, Any], other: Mapping[str, Any], rank: int, remarks: tuple[str, str] = ("", "")
) -> str | None:
    """Return in one line the first name whose value differs between rank 0 and another rank; None if none does.

    Args:
        first: rank 0's values.
        other: the other rank's.
        rank: the other rank.
        remarks: shown with rank 0's value and with the other's.
    """
    for name in dict.fromkeys([*first, *other]):
        pair = [values.get(name, "not set") for values in (first, other)]
        if pair[0] != pair[1] and json.dumps(pair[0]) != json.dumps(pair[1]):  # a NaN differs from itself
            mine, theirs = (_short(v) + (remark and f", {remark}") for v, remark in zip(pair, remarks, strict=True))
            return (
                f"{name} of rank {rank} ({theirs}) differs from rank 0's ({mine}): start all ranks with the same "
                f"config, options and files"
            )
    return None


def _short(value: Any) -> str:
    text = one_line(value if isinstance(value, str) else json.dumps(value))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def versions() -> dict[str, str]:
    """Return the versions that must be the same on every rank."""
    try:
        own = str(sys.modules["mixdist"].__version__)
    except ImportError:
        own = "not installed"
    return {
        "version of mixdist": own,
        "version of torch": str(torch.__version__),
        "version of Python": platform.python_version(),
    }


def source_of(path: Path) -> str:
    """Return a hash of a file's content."""
    try:
        return sha256(path.read_bytes()).hexdigest()[:12]
    except OSError:
        return "cannot be read"


def own_sources() -> dict[str, str]:
    """Return the hash of every file of mixdist: two checkouts of one version may differ."""
    root = Path(__file__).parents[1]
    return {f"source of {path.relative_to(root.parent)}": source_of(path) for path in sorted(root.rglob("*.py"))}
