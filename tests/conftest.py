"""Fixtures: pools of ranks that live as long as the session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Read by worker processes and torch when they start: ranks have one thread each, as under torchrun.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.pool import Pool


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, where a user's own classes are looked for."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """Return a function that gives the pool of a world size."""
    pools = {n: Pool(n) for n in range(1, 5)}
    yield pools.__getitem__
    for one in pools.values():
        one.close()
