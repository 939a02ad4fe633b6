"""How rows reach their owners: both ways bring the same rows, and no byte too many."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from mixdist.competition.delivery import OwnReader, WireReader, prefetched
from mixdist.data.loader import share
from mixdist.parallel.wire import Wire
from tests.parity import NUM_ROWS, data, mesh_of
from tests.pool import Pool

FIELDS = (("x",), ("label", "x"), ("y",))
WIDTHS = (16, 17, 8)


def wanted_of(case: int, rank: int) -> torch.Tensor:
    """Give random positions, ascending: all, none, few, and others for each rank."""
    generator = np.random.default_rng([case, rank])
    part = (0.0, 0.1, 0.5, 1.0)[(case + rank) % 4] if case % 5 else float(rank == 1)
    return torch.from_numpy(np.flatnonzero(generator.random(NUM_ROWS) < part))


def fetch(ranks: int, case: int) -> tuple[bool, int, int]:
    """Fetch by both readers on this rank: whether rows are equal and right; bytes sent, and the least."""
    mesh = mesh_of(4, ranks, ranks)
    wire, fields = Wire(mesh.device), FIELDS[case % 3]
    read = OwnReader(data(), mesh).start(lambda rank: wanted_of(case, rank), fields)()
    assert wire.meter.wire_bytes == 0
    sent = WireReader(data(), mesh, wire).start(lambda rank: wanted_of(case, rank), fields)()
    right = data().take(wanted_of(case, mesh.rank))
    same = read.keys() == sent.keys() == {"id", *fields}
    same &= all(torch.equal(read[n], right[n]) and torch.equal(sent[n], right[n]) for n in ("id", *fields))
    same &= all(read[n].dtype == sent[n].dtype for n in ("id", *fields))
    return same, wire.meter.wire_bytes, wire.meter.wire_bytes_min


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_both_ways_bring_the_same_rows(pool: Callable[[int], Pool], ranks: int) -> None:
    held = [share(NUM_ROWS, rank, ranks) for rank in range(ranks)]
    for case in range(15):
        told: list[Any] = pool(ranks).run("tests.test_reader:fetch", ranks, case)
        assert all(same for same, _, _ in told)
        for rank, (_, sent, least) in enumerate(told):
            others = [wanted_of(case, other).tolist() for other in range(ranks) if other != rank]
            rows = sum(place in held[rank] for places in others for place in places)
            assert sent == least == rows * (WIDTHS[case % 3] + 8)


def test_what_is_in_turn_is_begun_before_the_one_before_is_given_away() -> None:
    told: list[str] = []

    def begin(n: int) -> Callable[[], int]:
        told.append(f"begin {n}")
        return lambda: told.append(f"end {n}") or n

    for n in prefetched(partial(begin, n) for n in range(3)):
        told.append(f"use {n}")
    assert told == ["begin 0", "begin 1", "end 0", "use 0", "begin 2", "end 1", "use 1", "end 2", "use 2"]
    assert list(prefetched([])) == []
