"""Log-densities and divergences against torch.distributions, quadrature, numerical gradients and limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Laplace, Normal, kl_divergence

from mixdist.stats import (
    Step,
    Warmup,
    bernoulli_log_prob,
    entropy,
    laplace_log_prob,
    logistic_log_prob,
    normal_kl,
    normal_sum_log_prob,
    ramp,
)

Density = Callable[..., Tensor]


def _random(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", ["normal", "laplace"])
def test_densities_are_torch_s_and_have_their_gradients(kind: str) -> None:
    x, mean, log_scale = _random(5, 7), _random(7, seed=1).expand(5, 7), _random(5, 1, seed=2)
    density: Density = normal_sum_log_prob if kind == "normal" else laplace_log_prob
    for scale in (log_scale, math.log(0.5)):
        judge = (Normal if kind == "normal" else Laplace)(
            mean, torch.as_tensor(scale, dtype=torch.float64).exp()
        ).log_prob(x)
        _close(density(x, mean, scale), judge.sum(-1) if kind == "normal" else judge)
    inputs = _random(3, 4), _random(2, 3, 4, seed=1, grad=True), _random(2, 1, 1, seed=2, grad=True)  # a stack of two
    assert torch.autograd.gradcheck(density, inputs)


def test_bernoulli_is_torch_s_and_between_zero_and_one_cross_entropy() -> None:
    logits = torch.linspace(-50, 50, 101, dtype=torch.float64)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    total = bernoulli_log_prob(one, logits).exp() + bernoulli_log_prob(zero, logits).exp()
    _close(total, torch.ones_like(total))
    x = (_random(101) > 0).double()
    _close(bernoulli_log_prob(x, logits), Bernoulli(logits=logits).log_prob(x))
    x, p = _random(4, 5).sigmoid(), _random(3, 4, 5, seed=1).sigmoid()
    _close(bernoulli_log_prob(x, p.logit()), x * p.log() + (1 - x) * (1 - p).log())


def test_bernoulli_gradients_and_limits() -> None:
    logits = torch.tensor([-3.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda value: bernoulli_log_prob(x, value), (logits,))
    far = torch.tensor([-1e4, 1e4, -1e4, 1e4], dtype=torch.float64, requires_grad=True)
    value = bernoulli_log_prob(torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64), far)
    assert value.tolist() == [0.0, 0.0, -1e4, -1e4]
    (gradient,) = torch.autograd.grad(value.sum(), far)
    assert gradient.tolist() == [0.0, 0.0, 1.0, -1.0]


def test_normal_kl_is_torch_s() -> None:  # which is the integral
    mean, log_var = _random(6, 3), _random(6, 3, seed=1)
    expected = kl_divergence(Normal(mean, (0.5 * log_var).exp()), Normal(0.0, 1.0))
    _close(normal_kl(mean, log_var), expected)
    assert torch.autograd.gradcheck(normal_kl, (_random(2, 3, grad=True), _random(2, 3, seed=1, grad=True)))


def test_normal_kl_is_exact_near_the_prior() -> None:
    # KL = v^2 / 4 + v^3 / 12 + ... for a log variance v and mean 0: no cancellation down to its own rounding.
    tiny, zero = torch.tensor(1e-6, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    assert normal_kl(zero, zero).item() == 0.0
    assert abs(normal_kl(zero, tiny).item() / 2.5e-13 - 1) < 1e-3
    mean = torch.tensor(1e-9, dtype=torch.float64)
    assert normal_kl(mean, zero).item() == pytest.approx(0.5e-18, rel=1e-12)


def test_entropy() -> None:
    log_p = _random(5, 4).log_softmax(1)
    _close(entropy(log_p, 1), Categorical(logits=log_p).entropy())
    _close(entropy(log_p.T, 0), entropy(log_p, 1))
    uniform = torch.full((8,), -math.log(8), dtype=torch.float64)
    assert entropy(uniform, 0).item() == pytest.approx(math.log(8), rel=1e-14)
    assert torch.autograd.gradcheck(lambda value: entropy(value, 1), (log_p.detach().requires_grad_(),))


def test_entropy_where_a_probability_is_zero() -> None:
    log_p = torch.tensor([[0.0, -math.inf, -math.inf], [-1e5, 0.0, -math.inf]], requires_grad=True)
    value = entropy(log_p, 1)
    assert value.tolist() == [0.0, 0.0]
    (gradient,) = torch.autograd.grad(value.sum(), log_p)
    assert gradient.isfinite().all()
    assert gradient[log_p == -math.inf].eq(0).all()
    logits = torch.tensor([0.3, -math.inf, 1.0], requires_grad=True)
    entropy(logits.log_softmax(0), 0).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert entropy(torch.tensor([math.nan, 0.0]), 0).isnan()


LEVELS = torch.arange(256).double() / 255


@pytest.mark.parametrize("log_scale", [-12.0, -6.0, -3.0, 0.0, 4.0])
@pytest.mark.parametrize("mean", [-3.0, 0.0, 0.3, 0.5 / 255, 1.0, 40.0])
def test_the_discretised_logistic_sums_to_one(mean: float, log_scale: float) -> None:
    log_p = logistic_log_prob(LEVELS, torch.tensor(mean).double(), log_scale)
    assert log_p.logsumexp(0).item() == pytest.approx(0.0, abs=1e-9)
    _close(logistic_log_prob(LEVELS, torch.tensor(mean).double(), torch.tensor(log_scale).double()), log_p)
    sixteen = logistic_log_prob(torch.arange(17).double() / 16, torch.tensor(mean).double(), log_scale, 17)
    assert sixteen.logsumexp(0).item() == pytest.approx(0.0, abs=1e-9)


def test_the_discretised_logistic_is_the_difference_of_its_distribution_function() -> None:
    # Where nothing cancels the plain formula is the judge; the bins at the ends are open.
    mean, log_scale = 0.5 + 0.1 * _random(7, 1), -2 + 0.3 * _random(7, 1, seed=1)
    edges = torch.cat([torch.tensor([-math.inf]).double(), (LEVELS[1:] + LEVELS[:-1]) / 2, torch.tensor([math.inf])])
    below = ((edges - mean) / log_scale.exp()).sigmoid()
    torch.testing.assert_close(logistic_log_prob(LEVELS, mean, log_scale).exp(), below.diff(dim=1), rtol=1e-9, atol=0)


def test_the_discretised_logistic_in_float32_far_from_its_mean() -> None:
    x, scales = LEVELS.float(), [-20.0, -10.0, -5.0]
    for mean in (-100.0, 0.2, 0.503, 1.0, 100.0):
        for log_scale in scales:
            inputs = torch.tensor(mean, requires_grad=True), torch.tensor(log_scale, requires_grad=True)
            log_p = logistic_log_prob(x, *inputs)
            exact = logistic_log_prob(LEVELS, inputs[0].double(), inputs[1].double())
            assert log_p.isfinite().all()
            assert (log_p <= 0).all()
            torch.testing.assert_close(log_p.double(), exact, rtol=1e-4, atol=1e-3)
            assert all(g.isfinite() for g in torch.autograd.grad(log_p.sum(), inputs))


def test_gradients_of_the_discretised_logistic() -> None:
    x = LEVELS[torch.tensor([[0, 1, 128, 255], [255, 254, 7, 0]])]
    inputs = _random(2, 4, seed=1, grad=True), (-1 + _random(2, 1, seed=2)).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda mean, log_scale: logistic_log_prob(x, mean, log_scale), inputs)


def test_the_discretised_logistic_nears_its_density_times_a_bin() -> None:
    x, mean, scale = LEVELS[1:-1], torch.tensor(0.4).double(), 0.8
    logistic = -(x - mean) / scale - math.log(scale) - 2 * torch.log1p((-(x - mean) / scale).exp())
    torch.testing.assert_close(logistic_log_prob(x, mean, math.log(scale)), logistic - math.log(255), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cycles", [1, 4])
@pytest.mark.parametrize("rise", [0.5, 1.0])
def test_a_warm_up_is_that_of_fu_et_al(cycles: int, rise: float) -> None:
    total, warmup = 40, Warmup(steps=40, cycles=cycles, rise=rise)
    for step in range(total):
        tau = (step % (total // cycles)) / (total // cycles)  # equation 6, steps counted from 0
        assert warmup.weight(step) == pytest.approx(min(1.0, tau / rise), abs=1e-15)
    assert {warmup.weight(step) for step in (total, total + 7, 10**9)} == {1.0}


def test_a_warm_up_in_epochs_is_that_in_their_steps() -> None:
    for num_batches in (7, 39, 1000):
        in_steps = Warmup(steps=3 * num_batches, cycles=3, rise=0.4)
        in_epochs = Warmup(epochs=3.0, cycles=3, rise=0.4)
        for step in (0, 1, 2, num_batches, num_batches + 1, 2 * num_batches - 1, 3 * num_batches):
            assert in_epochs.weight(Step(step, Fraction(step, num_batches))) == in_steps.weight(step)
    # Where a float would be off: a third of 0.3 epochs ends a cycle, and the weight there is 0, not 1.
    assert Warmup(epochs=0.3, cycles=3).weight(Step(1, Fraction(1, 10))) == 0.0
    assert Warmup(steps=600).weight(17) == ramp(17, 600) == ramp(17, Warmup(steps=600))


@pytest.mark.parametrize(
    "options",
    [{}, {"steps": 3, "epochs": 1.0}, {"steps": 0}, {"epochs": -1.0}, {"epochs": math.nan}, {"steps": 3, "cycles": 0}]
    + [{"steps": 3, "rise": rise} for rise in (0.0, 1.5)],
)
def test_warm_ups_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a warm-up's"):
        Warmup(**options)  # type: ignore[arg-type]


def test_a_warm_up_in_epochs_wants_a_step_that_knows_them() -> None:
    with pytest.raises(ValueError, match=r"of 2 epochs was given step 7.*Step"):
        Warmup(epochs=2).weight(7)
