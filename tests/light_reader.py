"""A process that reads shards without torch, as small worker processes do; it starts in a fraction of the time."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mixdist.data.shards.storage import Storage
    from tests.small_shards import Member

if "mixdist.data" not in sys.modules:  # the package's own __init__ imports sources, which import torch
    package = types.ModuleType("mixdist.data")
    package.__path__ = [str(Path(__file__).resolve().parents[1] / "mixdist" / "data")]
    sys.modules["mixdist.data"] = package


def read_all(remote: Storage, members: list[Member], seed: int | None, pause_s: float | None = None) -> list[int]:
    """Read members in order, or in one of the seed's; give those whose bytes were right, in order."""
    from mixdist.data.shards import fetch

    if pause_s is not None:
        fetch.FIRST_PAUSE_S = pause_s
    order = range(len(members)) if seed is None else np.random.default_rng(seed).permutation(len(members)).tolist()
    return sorted(i for i in order if remote.read(*members[i].place) == members[i].data)


def has_torch() -> bool:
    """Whether this process has torch once it has what reads shards."""
    import mixdist.data.shards.storage  # noqa: F401

    return "torch" in sys.modules
