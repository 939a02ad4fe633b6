"""Objectives and balance terms against numpy, bounds, limits and numerical gradients."""

from __future__ import annotations

import copy
import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from mixdist.mixtures.objectives import (
    Balance,
    Information,
    KLBalance,
    Objective,
    SoftMinLoss,
    VarianceBalance,
    WeightedLoss,
)
from mixdist.stats import Step, Warmup

OBJECTIVES = [WeightedLoss(), SoftMinLoss(), SoftMinLoss(temperature=3.0)]
BALANCES = [VarianceBalance(0.3), KLBalance(0.7)]
by_name = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
balance_by_name = pytest.mark.parametrize("balance", BALANCES, ids=lambda b: type(b).__name__)


def _inputs(rows: int = 9, experts: int = 5, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + experts)
    log_resp, losses = (spread * torch.randn(2, rows, experts, generator=generator, dtype=torch.float64)).unbind()
    return log_resp.log_softmax(1).requires_grad_(), losses.requires_grad_()


def _close(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=1e-12, atol=1e-13)


def _with_bonus(objective: Objective, bonus: float) -> Objective:
    objective = copy.copy(objective)
    objective.entropy_bonus = objective.entropy_weight = bonus
    return objective


def _one_hot(labels: list[int], experts: int) -> Tensor:
    return torch.eye(experts, dtype=torch.float64)[labels].log().requires_grad_()


def test_weighted_loss_against_numpy() -> None:
    log_resp, losses = _inputs()
    expected = np.einsum("be,be->b", np.exp(log_resp.detach().numpy()), losses.detach().numpy())
    _close(WeightedLoss().rows(log_resp, losses).detach(), expected)


def test_mixture_likelihood_against_scipy() -> None:
    log_resp, losses = _inputs()
    resp = np.exp(log_resp.detach().numpy())
    expected = -scipy.special.logsumexp(-losses.detach().numpy(), b=resp, axis=1)
    _close(SoftMinLoss().rows(log_resp, losses).detach(), expected)


def test_far_losses_do_not_overflow() -> None:
    log_resp, losses = _inputs()
    rows = SoftMinLoss().rows(log_resp, losses)
    for far in (-1e4, 1e4):
        _close(SoftMinLoss().rows(log_resp, losses + far), rows + far)


@by_name
def test_gradients(objective: Objective) -> None:
    assert torch.autograd.gradcheck(objective.rows, _inputs(rows=4, experts=3, spread=1.0))


def test_a_temperature_shares_rows_among_experts() -> None:
    log_resp, losses = _inputs(rows=1000)
    for temperature in (0.5, 1.0, 4.0):
        tempered = SoftMinLoss(temperature=temperature)
        rows = tempered.rows(log_resp, losses)
        _close(rows, temperature * SoftMinLoss().rows(log_resp, losses / temperature))
        (gradient,) = torch.autograd.grad(rows.sum(), losses, retain_graph=True)
        joint = np.exp(log_resp.detach().numpy() - losses.detach().numpy() / temperature)
        _close(gradient, joint / joint.sum(1, keepdims=True))
    of = [SoftMinLoss(temperature=t).rows(log_resp, losses) for t in (1.0, 10.0, 1e7)]
    assert (of[0] < of[1]).all()
    torch.testing.assert_close(of[2], WeightedLoss().rows(log_resp, losses), rtol=1e-5, atol=1e-5)


def test_a_temperature_goes_from_soft_to_hard() -> None:
    """T_u = 8^(1 - u) 0.1^u; the loss falls with it, from near the weighted loss to near the least."""
    log_resp, losses = _inputs(rows=100)
    objective = SoftMinLoss(temperature=1e6, final_temperature=1e-3, anneal_steps=Warmup(epochs=2.5))
    found = []
    for number in range(7):
        objective.anneal(Step(10 * number, Fraction(number, 2)))
        assert objective.temperature == pytest.approx(1e6 ** (1 - min(1, number / 5)) * 1e-3 ** min(1, number / 5))
        found.append(objective.rows(log_resp, losses).detach())
    assert all((later < before).all() for before, later in itertools.pairwise(found[:6]))
    torch.testing.assert_close(found[0], WeightedLoss().rows(log_resp, losses).detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[6], losses.detach().min(1).values, rtol=1e-2, atol=1e-2)
    for wrong in ({"final_temperature": 0.5}, {"anneal_steps": 3}, {"final_temperature": -1.0, "anneal_steps": 3}):
        with pytest.raises(ValueError, match="SoftMinLoss's final_temperature"):
            SoftMinLoss(**wrong)  # type: ignore[arg-type]


def test_mixture_likelihood_lies_between_the_least_and_the_weighted_loss() -> None:
    log_resp, losses = _inputs(rows=1000)
    mixture, weighted = (objective.rows(log_resp, losses) for objective in (SoftMinLoss(), WeightedLoss()))
    assert (mixture < weighted).all()  # Jensen; strictly, since losses and responsibilities differ
    assert (mixture > losses.min(1).values).all()
    assert (weighted < losses.max(1).values).all()


@by_name
def test_a_row_depends_on_no_other(objective: Objective) -> None:
    log_resp, losses = _inputs()
    rows = objective.rows(log_resp, losses).detach()
    _close(torch.cat([objective.rows(log_resp[b : b + 1], losses[b : b + 1]) for b in range(9)]).detach(), rows)
    assert objective.rows(log_resp[:0], losses[:0]).shape == (0,)


@by_name
@pytest.mark.parametrize("bonus", [0.0, -1.0])
def test_an_oracle_gives_the_chosen_loss_and_finite_gradients(objective: Objective, bonus: float) -> None:
    labels = [2, 0, 0, 4]
    log_resp, losses = _one_hot(labels, 5), _inputs(rows=4)[1]
    rows = _with_bonus(objective, bonus).rows(log_resp, losses)  # the entropy of an oracle is 0
    _close(rows.detach(), losses.detach()[range(4), labels])
    gate_gradient, gradient = torch.autograd.grad(rows.sum(), (log_resp, losses))
    _close(gradient, log_resp.detach().exp())
    assert gate_gradient.isfinite().all()
    assert gate_gradient[log_resp == -math.inf].eq(0).all()


@balance_by_name
def test_an_oracle_gives_the_balance_finite_gradients(balance: Balance) -> None:
    log_resp = _one_hot([2, 0, 0, 4], 5)  # experts 1 and 3 have no responsibility at all
    value = balance(log_resp.exp().sum(0), 4)
    (gradient,) = torch.autograd.grad(value, log_resp)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert gradient[log_resp == -math.inf].eq(0).all()


def test_variance_balance_is_the_population_variance_of_the_sums() -> None:
    resp_sum = _inputs()[0].detach().exp().sum(0)
    _close(VarianceBalance(0.3)(resp_sum, 9), 0.3 * np.var(resp_sum.numpy()))
    _close(VarianceBalance()(resp_sum, 9), 0.1 * np.var(resp_sum.numpy()))
    _close(VarianceBalance(0.3)(2 * resp_sum, 18), 4 * 0.3 * np.var(resp_sum.numpy()))


def test_kl_balance_is_the_divergence_of_the_mean_from_uniform() -> None:
    resp_sum = _inputs()[0].detach().exp().sum(0)
    expected = 0.7 * scipy.stats.entropy(resp_sum.numpy() / 9, np.full(5, 1 / 5))
    _close(KLBalance(0.7)(resp_sum, 9), expected)
    _close(KLBalance(0.7)(2 * resp_sum, 18), expected)


def test_one_expert_with_everything_is_the_largest_balance() -> None:
    everything = torch.tensor([0.0, 8.0, 0.0, 0.0], dtype=torch.float64)
    assert KLBalance(0.5)(everything, 8).item() == pytest.approx(0.5 * math.log(4), rel=1e-14)
    assert VarianceBalance(0.5)(everything, 8).item() == pytest.approx(0.5 * 8**2 * 3 / 16, rel=1e-14)
    generator = torch.Generator().manual_seed(0)
    for resp_sum in 8 * torch.rand(100, 4, generator=generator, dtype=torch.float64).softmax(1):
        for balance in BALANCES:
            assert 0 < balance(resp_sum, 8) < balance(everything, 8)


@balance_by_name
def test_balance_is_zero_and_flat_at_uniform(balance: Balance) -> None:
    resp_sum = torch.full((6,), 2.5, dtype=torch.float64, requires_grad=True)
    value = balance(resp_sum, 15)
    assert value.item() == pytest.approx(0.0, abs=1e-15)
    (gradient,) = torch.autograd.grad(value, resp_sum)
    # Flat along the simplex: moving responsibility from one expert to another changes nothing.
    _close(gradient - gradient.mean(), torch.zeros(6, dtype=torch.float64))
    assert balance(torch.tensor([15.0], dtype=torch.float64), 15).item() == 0.0


@balance_by_name
def test_balance_gradients(balance: Balance) -> None:
    resp_sum = _inputs()[0].detach().exp().sum(0).requires_grad_()
    assert torch.autograd.gradcheck(lambda value: balance(value, 9), (resp_sum,))


@by_name
@pytest.mark.parametrize("bonus", [0.7, -0.4])
def test_the_entropy_is_a_term_of_its_own(objective: Objective, bonus: float) -> None:
    log_resp, losses = _inputs()
    with_bonus = _with_bonus(objective, bonus)
    expected = scipy.stats.entropy(log_resp.detach().exp().numpy(), axis=1)
    _close((objective.rows(log_resp, losses) - with_bonus.rows(log_resp, losses)).detach(), bonus * expected)
    _close(with_bonus.expert_rows(log_resp, losses), objective.rows(log_resp, losses))
    # It never reaches the experts.
    gradients = [torch.autograd.grad(o.rows(log_resp, losses).sum(), losses)[0] for o in (objective, with_bonus)]
    assert torch.equal(*gradients)
    assert torch.autograd.gradcheck(with_bonus.rows, _inputs(rows=4, experts=3, spread=1.0))


def test_the_entropy_bonus_goes_to_zero_and_depends_on_the_step_alone() -> None:
    objective = WeightedLoss(entropy_bonus=-2.0, entropy_steps=8)
    seen = []
    for step in (0, 2, 8, 900, 2):
        objective.anneal(step)
        seen.append(objective.entropy_weight)
    assert seen == [-2.0, -1.5, 0.0, 0.0, -1.5]
    constant = WeightedLoss(entropy_bonus=0.3)
    constant.anneal(10**6)
    assert constant.entropy_weight == 0.3


@pytest.mark.parametrize("kind", [VarianceBalance, KLBalance])
def test_the_balance_warms_up_with_its_objective(kind: type[VarianceBalance | KLBalance]) -> None:
    resp_sum = _inputs()[0].detach().exp().sum(0)
    full, warmed = kind(0.6)(resp_sum, 9), kind(0.6, warmup_steps=4)
    objective = WeightedLoss(warmed)
    for step, share in ((0, 0.0), (1, 0.25), (4, 1.0), (77, 1.0), (2, 0.5)):
        objective.anneal(step)
        _close(warmed(resp_sum, 9), share * full)
    at_once = kind(0.6)
    at_once.anneal(0)
    _close(at_once(resp_sum, 9), full)


def test_linear_says_what_the_gradient_by_the_losses_is() -> None:
    log_resp, losses = _inputs()
    for objective in (WeightedLoss(entropy_bonus=0.5), SoftMinLoss(entropy_bonus=0.5)):
        (gradient,) = torch.autograd.grad(objective.rows(log_resp, losses).sum(), losses)
        assert objective.linear == torch.allclose(gradient, log_resp.exp(), rtol=1e-12)
    assert not Objective.linear


def test_information_is_the_mutual_information_of_row_and_expert() -> None:
    log_resp, losses = _inputs()
    objective = Information(KLBalance(1.0))
    assert objective.balance is not None
    loss = objective.rows(log_resp, losses).mean() + objective.balance(log_resp.exp().sum(0), 9)
    joint = log_resp.detach().exp().numpy() / 9
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    information = scipy.stats.entropy(joint.ravel(), independent.ravel())
    _close(loss.detach(), math.log(5) - information)
    assert torch.autograd.grad(loss, losses, allow_unused=True)[0] is None


BONUSES: list[tuple[dict[str, Any], str]] = [
    ({"entropy_bonus": math.nan}, r"entropy_bonus \(nan\) must be a finite number: give 0 for none"),
    ({"entropy_bonus": -math.inf}, r"entropy_bonus \(-inf\) must be a finite number"),
    ({"entropy_steps": -3}, r"entropy_steps \(-3\) must be a number of training steps: give 0"),
]
REFUSED: list[tuple[type[Any], dict[str, Any], str]] = [
    *((kind, *bonus) for kind in (WeightedLoss, SoftMinLoss, Information) for bonus in BONUSES),
    *((SoftMinLoss, {"temperature": t}, "temperature .* must be above 0") for t in (0.0, -1.0, math.inf, math.nan)),
    *(
        (kind, {"weight": weight}, rf"weight \({weight}\) must be 0 or more")  # it would reward collapse
        for kind in (VarianceBalance, KLBalance)
        for weight in (-0.1, math.inf, math.nan)
    ),
    (KLBalance, {"warmup_steps": -1}, r"warmup_steps \(-1\) must be a number of training steps: give 0"),
]


@pytest.mark.parametrize(("kind", "given", "said"), REFUSED)
def test_what_is_refused_is_named_in_one_line(kind: type[Any], given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{kind.__name__}'s {said}") as caught:
        kind(**given)
    assert "\n" not in str(caught.value)
