"""Fixtures: pools of ranks that live as long as the session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

# Read by worker processes and torch when they start: ranks have one thread each, as under torchrun.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """Give a pool of a world size, started when first asked for."""
    pools: dict[int, Pool] = {}

    def get(world_size: int) -> Pool:
        if world_size not in pools:
            pools[world_size] = Pool(world_size)
        return pools[world_size]

    yield get
    for one in pools.values():
        one.close()
