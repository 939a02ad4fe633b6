"""The minimum bytes, counted once more by listing every number that has another member's address."""

from __future__ import annotations

import pytest
import torch

from mixdist.parallel import costs
from mixdist.parallel.mesh import Placement
from mixdist.terms import Field

FIELDS = {"x": Field((1, 4, 4), torch.uint8, 1 / 255), "y": Field((2,), torch.float32)}
LAYOUTS = [([3, 0, 5, 2], 5, 4), ([4, 4], 3, 2), ([7], 4, 1), ([1, 2, 3], 3, 3)]
"""Rows of each member, experts, members."""


def owners(num_experts: int, members: int) -> list[int]:
    placement = Placement(num_experts, members, members)
    return [p for p in range(members) for _ in placement.experts_of(p)]


@pytest.mark.parametrize(("counts", "num_experts", "members"), LAYOUTS)
def test_each_formula_is_a_count_of_what_leaves_a_member(counts: list[int], num_experts: int, members: int) -> None:
    home = owners(num_experts, members)
    experts_P = [home.count(p) for p in range(members)]
    pairs = [(q, e) for q, rows in enumerate(counts) for _ in range(rows) for e in home]  # (row's member, expert's)
    for me in range(members):
        outward = sum(q == me != e for q, e in pairs)
        homeward = sum(e == me != q for q, e in pairs)
        assert costs.combine(counts, experts_P, me, 3) == (3 * homeward, 3 * outward)
        assert costs.spread(counts, experts_P, me, 3) == (3 * outward, 3 * homeward)
        shown = sum(counts) * experts_P[me] * (members - 1), sum(counts) * (num_experts - experts_P[me])
        assert costs.exchange(counts, experts_P, me) == shown
        others = sum(counts) - counts[me]
        assert costs.combine_sum(counts, me, 7) == (7 * others, 7 * counts[me] * (members - 1))
        assert costs.pairs(counts, counts, me, 2) == (2 * others, 2 * others)


def test_rows_carry_their_fields_and_an_id_and_only_to_others() -> None:
    assert costs.row_bytes(FIELDS.values()) == 16 + 8 + 8
    assert costs.row_bytes([]) == 8
    assert costs.rows([3, 4, 5], [10, 20, 30], 1) == 3 * 10 + 5 * 30
    assert costs.soft_step([6, 6], [2, 2], [24, 24], 0, 8) == 6 * 24 + 8 * (6 * 2 + 6 * 2)


def test_a_gradient_is_counted_where_there_is_one() -> None:
    numbers = costs.Numbers(5, 7)
    assert numbers.num_bytes(8, differentiated=False) == 40
    assert numbers.num_bytes(8, differentiated=True) == 96
