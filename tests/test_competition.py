"""Hard assignment is the same run on any layout, to the last bit where no expert has replicas (contract 1)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.contest import Contest, merge, run, tensors
from tests.pool import Pool
from tests.test_parity import covering

TOLERANCE = 1e-10
DECIDED = ("step", "phase", "round", "epoch", "counts", "changed", "objective_rose", "starved", "starved_rule")

# Every pair of these is covered by some case that runs by default.
OPTIONS: dict[str, Sequence[Any]] = {
    "layout": ((2, 2), (3, 3), (4, 4), (4, 2), (2, 1)),
    "score": ("fresh", "kept", "elbo", "normalised", "likelihood", "oracle", "random", "fixed"),
    "num_experts": (4, 5),
    "start": ("all", "split", "table"),
    "starved": ("none", "freeze", "reseed"),
    "delivery": ("read", "wire"),
    "placement": ("fixed", "load"),
    "expert": ("bernoulli", "gaussian", "conv"),
    "optimizer": ("adam", "clipped"),
    "batch_size": (10, 3, 100),
    "block": (16, 7, 100),
    "micro_batch": (None, 4),
}


def case_of(layout: tuple[int, int], **options: Any) -> Contest:
    return Contest(ranks=layout[0], ep_size=layout[1], **options)


@functools.cache
def reference(case: Contest) -> dict[str, Any]:
    return merge([run(case)])


def differences(got: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """Give max|a - b| / max|b| of each tensor, max|a - b| where b is 0; equal infinities do not differ."""
    a, b = tensors(got), tensors(wanted)
    assert a.keys() == b.keys(), f"not in both: {sorted(a.keys() ^ b.keys())}"
    result = {}
    for name in b:
        assert a[name].shape == b[name].shape, name
        assert not b[name].isnan().any(), name
        if not b[name].numel():
            continue
        largest = b[name].abs().max().item()
        difference = (a[name] - b[name]).abs().max().item() if b[name].isfinite().all() else float("nan")
        result[name] = difference / (largest or 1.0)
    return result


def check(pool: Callable[[int], Pool], case: Contest) -> dict[str, float]:
    """Hold a case against one process, and its bytes against the least."""
    got, wanted = merge(pool(case.ranks).run("tests.contest:run", case)), reference(case.reference())
    assert got["tables"] == wanted["tables"]
    for mine, theirs in zip(got["records"], wanted["records"], strict=True):
        assert [mine.get(k) for k in DECIDED] == [theirs.get(k) for k in DECIDED]
        assert mine["wire_bytes"] == mine["wire_bytes_least"]
    found = differences(got, wanted)
    figures = {name: value for name, value in found.items() if name.startswith("record")}
    exact = case.ranks == case.ep_size
    for name, value in found.items():
        limit = 0.0 if exact and name not in figures else TOLERANCE
        assert value <= limit, (name, value)
    return found


COVERING = [case_of(**row) for row in covering(OPTIONS)]


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_every_layout_is_the_same_competition(pool: Callable[[int], Pool], case: Contest) -> None:
    check(pool, case)
