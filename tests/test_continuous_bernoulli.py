"""The continuous Bernoulli distribution, against quadrature and torch's own, at any logit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixdist.nets.continuous_bernoulli import (
    NEAR,
    continuous_bernoulli_log_prob,
    continuous_bernoulli_mean,
    continuous_bernoulli_quantile,
)
from mixdist.nets.likelihood import Likelihood

LOGITS = torch.tensor([-40.0, -3.0, -NEAR, -NEAR + 1e-9, -1e-4, 0.0, 1e-9, 0.1, NEAR, 2.0, 40.0], dtype=torch.float64)


def moments(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return integral and mean of the density by Gauss-Legendre quadrature, each on 20 parts of (0, 1)."""
    from numpy.polynomial.legendre import leggauss

    node, weight = (torch.from_numpy(one) for one in leggauss(30))
    start = torch.arange(20, dtype=torch.float64)[:, None] / 20
    x, weight = (start + (node + 1) / 40).flatten(), (weight / 40).repeat(20)
    density = continuous_bernoulli_log_prob(x, logits[:, None]).exp()
    return density @ weight, density @ (weight * x)


def test_it_integrates_to_one_and_has_its_mean() -> None:
    total, mean = moments(LOGITS)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-13, atol=0)
    torch.testing.assert_close(continuous_bernoulli_mean(LOGITS), mean, rtol=1e-12, atol=0)


def test_it_is_torch_s_where_torch_s_clips_nothing() -> None:
    logits, x = torch.linspace(-12, 12, 101, dtype=torch.float64), torch.linspace(0, 1, 101, dtype=torch.float64)
    judge = torch.distributions.ContinuousBernoulli(logits=logits, lims=(0.499999, 0.500001))
    torch.testing.assert_close(continuous_bernoulli_log_prob(x, logits), judge.log_prob(x), rtol=1e-8, atol=1e-8)
    u = torch.linspace(0.01, 0.99, 101, dtype=torch.float64)
    torch.testing.assert_close(continuous_bernoulli_quantile(u, logits), judge.icdf(u), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_its_slope_in_the_logit_is_what_is_above_the_mean(dtype: torch.dtype) -> None:
    """Of an exponential family: d log p / dl = x - E[x]; also where the logit is huge or 0."""
    logits = torch.cat([LOGITS, torch.tensor([-1e5, 1e5])]).to(dtype).requires_grad_()
    x = torch.full_like(logits, 0.3)
    (slope,) = torch.autograd.grad(continuous_bernoulli_log_prob(x, logits).sum(), logits)
    rounding = 1e-13 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(slope, x - continuous_bernoulli_mean(logits.detach()), rtol=0, atol=rounding)


def test_rows_and_draws_of_the_likelihood() -> None:
    likelihood = Likelihood("continuous_bernoulli", "learned", "sigmoid").double()
    assert (likelihood.is_a, likelihood.levels, likelihood.limits) == ("density", None, (0.0, 1.0))
    assert not list(likelihood.parameters())
    u = torch.linspace(1e-6, 1 - 1e-6, 999, dtype=torch.float64)[:, None]
    for logit in LOGITS:
        output = logit.expand(len(u), 1)
        x = likelihood.draw(output, u)
        assert x.min() >= 0
        assert x.max() <= 1
        # u is the integral of the density up to x.
        steps = torch.linspace(0, 1, 400, dtype=torch.float64)
        grid = x * steps
        below = torch.trapezoid(continuous_bernoulli_log_prob(grid, output).exp(), grid)
        torch.testing.assert_close(below, u[:, 0], rtol=1e-3, atol=1e-9)
    with pytest.raises(ValueError, match=r"first_scale.*continuous_bernoulli"):
        Likelihood("continuous_bernoulli", "learned", "sigmoid", first=0.1)
