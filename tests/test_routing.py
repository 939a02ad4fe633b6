"""Decisions against numpy, whose argmax promises the first of equal maxima."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mixdist.routing import responsible


@pytest.mark.parametrize("num_experts", [1, 2, 7, 64])
def test_ties_go_to_the_lowest_expert(num_experts: int) -> None:
    # Whole numbers from 0 to 2 in many rows: nearly every row has ties, as have the constant rows at the end.
    generator = torch.Generator().manual_seed(num_experts)
    scores = torch.randint(0, 3, (500, num_experts), generator=generator).double()
    scores = torch.cat([scores, torch.zeros(3, num_experts).double()])
    chosen = responsible(scores.log_softmax(1))
    assert chosen.dtype == torch.int64
    np.testing.assert_array_equal(chosen.numpy(), scores.numpy().argmax(axis=1))


def test_impossible_experts_are_never_chosen() -> None:
    log_resp = torch.full((3, 3), -math.inf, dtype=torch.float64).fill_diagonal_(0.0)
    assert responsible(log_resp).tolist() == [0, 1, 2]
    assert responsible(torch.tensor([[-math.inf, math.log(0.5), math.log(0.5)]])).tolist() == [1]


def test_the_choice_ignores_an_offset_and_the_other_rows() -> None:
    log_resp = torch.randn(50, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(1)
    chosen = responsible(log_resp)
    assert responsible(log_resp.flip(0)).equal(chosen.flip(0))
    assert responsible(log_resp[17:18]).equal(chosen[17:18])
    assert responsible(log_resp + 8.0).equal(chosen)


def test_no_rows() -> None:
    assert responsible(torch.zeros(0, 3)).shape == (0,)
