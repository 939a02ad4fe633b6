"""Decisions against numpy, whose argmax promises the first of equal maxima."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mixdist.mixtures.routing import TopK, admitted, demand, lay_out, responsible


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


def by_hand(log_resp: torch.Tensor, k: int, capacity: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Give rows to experts one by one: all first choices in order, then all second ones; what is full refuses."""
    num_rows, num_experts = log_resp.shape
    routed, lost = torch.zeros(num_rows, num_experts, dtype=torch.bool), torch.zeros(num_rows, dtype=torch.float64)
    left = [num_rows if capacity is None else capacity] * num_experts
    wishes = [sorted(range(num_experts), key=lambda e, n=n: (-log_resp[n, e].item(), e))[:k] for n in range(num_rows)]
    for choice in range(k):
        for n in range(num_rows):
            e = wishes[n][choice]
            if log_resp[n, e] == -math.inf:
                continue
            if left[e]:
                left[e] -= 1
                routed[n, e] = True
            else:
                lost[n] += log_resp[n, e].exp()
    return routed, lost


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("factor", [None, 0.3, 1.0, 1.7])
@pytest.mark.parametrize("counts", [(40,), (13, 14, 13), (0, 39, 0, 1)])
def test_capacity_is_first_come_over_the_global_batch(k: int, factor: float | None, counts: tuple[int, ...]) -> None:
    # Coarse scores, so that ties are everywhere; some experts are impossible for some rows.
    generator = torch.Generator().manual_seed(k)
    scores = torch.randint(0, 3, (40, 5), generator=generator).double()
    scores[torch.rand(40, 5, generator=generator) < 0.3] = -math.inf
    log_resp = torch.cat([scores, torch.zeros(40, 1)], 1).log_softmax(1)
    routing = TopK(k, factor)
    capacity = routing.capacity(40, 6)
    assert capacity == (None if factor is None else math.ceil(factor * k * 40 / 6))
    parts = log_resp.split(list(counts))
    wanted = torch.stack([demand(routing.choices(part), 6) for part in parts])
    plans = [
        lay_out(part, routing.choices(part), admitted(routing.choices(part), wanted, rank, capacity))
        for rank, part in enumerate(parts)
    ]
    routed, lost = by_hand(log_resp, k, capacity)
    assert torch.cat([p.routed_BE for p in plans]).equal(routed)
    torch.testing.assert_close(torch.cat([p.lost_B for p in plans]), lost)
    if capacity is not None:
        assert routed.sum(0).max() <= capacity


def test_weights_of_the_chosen_sum_to_one_and_the_others_have_none() -> None:
    log_resp = torch.randn(30, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(1)
    routed = torch.rand(30, 6, generator=torch.Generator().manual_seed(2)) < 0.4
    routed[0] = False
    weights = TopK(2).log_weights(log_resp, routed).exp()
    assert weights[~routed].eq(0).all()
    torch.testing.assert_close(weights.sum(1), routed.any(1).double())
    ratio = (weights / log_resp.exp())[routed.any(1)]
    torch.testing.assert_close(ratio.amax(1)[:, None].expand_as(ratio)[routed[routed.any(1)]], ratio[ratio > 0])
    kept = TopK(2, renormalise=False).log_weights(log_resp, routed)
    assert kept[routed].equal(log_resp[routed])
    assert kept[~routed].eq(-math.inf).all()


def test_the_gradient_of_the_weights_is_finite_where_no_expert_is_left() -> None:
    log_resp = torch.zeros(2, 3, dtype=torch.float64).log_softmax(1).requires_grad_()
    routed = torch.tensor([[False, False, False], [True, False, True]])
    TopK(2).log_weights(log_resp, routed).exp().mul(torch.arange(3)).sum().backward()
    assert log_resp.grad is not None
    assert log_resp.grad.isfinite().all()
    assert log_resp.grad[0].eq(0).all()
    assert log_resp.grad[1].abs().max() > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k": 0}, r"TopK's k \(0\) must be at least 1"),
        ({"capacity_factor": 0.0}, r"TopK's capacity_factor \(0.0\) must be a positive number"),
        ({"capacity_factor": math.inf}, r"TopK's capacity_factor \(inf\)"),
        ({"capacity_factor": math.nan}, r"TopK's capacity_factor \(nan\)"),
    ],
)
def test_what_top_k_refuses(options: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        TopK(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_chosen", [1, 2, 3, 5, 9])
def test_an_expert_that_a_row_did_not_choose_gets_a_gradient_of_exactly_zero(
    num_chosen: int, dtype: torch.dtype
) -> None:
    """Through a gate's own log-softmax over all experts, whatever the sizes; the others get that of a softmax."""
    generator = torch.Generator().manual_seed(num_chosen)
    logits = (3 * torch.randn(200, 12, generator=generator)).to(dtype).requires_grad_()
    losses = (torch.randn(200, 12, generator=generator) * 10.0 ** torch.arange(-30, 30, 5)).to(dtype)
    losses[:5] = 0.0
    routed = torch.rand(200, 12, generator=generator).argsort(1) < num_chosen
    routed[5:9] = False
    log_weights = TopK(num_chosen).log_weights(logits.log_softmax(1), routed)
    (log_weights.exp() * losses).sum().backward()
    assert logits.grad is not None
    assert logits.grad[~routed].eq(0).all()
    assert logits.grad.flip(1).sum(1).eq(0).all()  # in any order
    if num_chosen == 1:
        assert logits.grad.eq(0).all()
        return
    judge = logits.detach().double().requires_grad_()
    weights = judge.masked_fill(~routed, -math.inf)[routed.any(1)].softmax(1)
    (weights * losses[routed.any(1)].double()).sum().backward()
    assert judge.grad is not None
    largest = judge.grad.abs().amax(1, keepdim=True)
    error = (logits.grad.double() - judge.grad).abs() / (largest + (losses * routed).double().abs().amax(1, True))
    assert error.nan_to_num(0.0).max() <= 2.0 ** (6 if dtype == torch.float64 else 5) * torch.finfo(dtype).eps


def test_a_gradient_that_is_not_finite_is_not_hidden() -> None:
    for bad in (math.nan, math.inf):
        log_resp = torch.zeros(2, 3, dtype=torch.float64).log_softmax(1).requires_grad_()
        routed = torch.tensor([[True, True, False], [True, False, True]])
        losses = torch.tensor([[1.0, bad, 0.0], [1.0, 0.0, 2.0]], dtype=torch.float64)
        (TopK(2).log_weights(log_resp, routed).exp() * losses).sum().backward()
        assert log_resp.grad is not None
        assert not log_resp.grad[0].isfinite().all()
        assert log_resp.grad[1].isfinite().all()
