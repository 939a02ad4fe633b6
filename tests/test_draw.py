"""Draws from p(x|z) have the distribution whose density or mass ``log_prob`` gives; they are functions of noise."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from scipy.stats import chisquare, kstest, laplace, norm
from torch import Tensor

from mixdist.experts import VAE, Expert, Regressor
from mixdist.nets import Conv
from mixdist.nets.likelihood import Likelihood
from mixdist.noise import Draw, Purpose
from mixdist.stats import laplace_quantile, logistic_log_prob, logistic_quantile, normal_quantile
from mixdist.terms import Field, Spec

SPEC: Spec = {
    "x": Field((4,), torch.float64),
    "image": Field((1, 5, 4), torch.uint8, scale=1 / 255),
    "grey": Field((1, 8, 8), torch.uint8, scale=1 / 16),
}
EXPERTS: list[Any] = [
    partial(VAE, likelihood="bernoulli"),
    partial(VAE, likelihood="continuous_bernoulli", field="image"),
    partial(VAE, likelihood="gaussian", mean="identity"),
    partial(VAE, likelihood="gaussian", mean="sigmoid", scale=0.3, field="image"),
    partial(VAE, likelihood="laplace", mean="identity", field="image"),
    partial(VAE, likelihood="logistic", field="grey"),
    partial(VAE, network=Conv([4]), likelihood="logistic", scale=0.05, field="image"),
    partial(VAE, network=Conv([4]), likelihood="bernoulli", field="grey"),
]
NUM_DRAWS = 20_000
OUTPUTS = (-1.3, 0.0, 0.4)


def _uniform(*shape: int, seed: int = 0) -> Tensor:
    return Draw(seed, Purpose.PRIOR).uniform(torch.arange(shape[0]), [0], shape[1:], torch.float64)[0]


def _normal(*shape: int, seed: int = 1) -> Tensor:
    return Draw(seed, Purpose.PRIOR).normal(torch.arange(shape[0]), [0], shape[1:], torch.float64)[0]


def _expert(make: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(SPEC, latent=3).double()


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("mean", ["sigmoid", "identity"])
@pytest.mark.parametrize("scale", [0.3, "learned"])
@pytest.mark.parametrize("name", ["gaussian", "laplace"])
def test_densities_by_kolmogorov_and_smirnov(name: Any, scale: Any, mean: Any, output: float) -> None:
    likelihood = Likelihood(name, scale, mean).double()
    with torch.no_grad():
        x = likelihood.draw(torch.full((NUM_DRAWS, 1), output).double(), _uniform(NUM_DRAWS, 1)).flatten()
        # The distribution function is the integral of the density, whatever that is.
        grid = torch.linspace(-30, 30, 200_001, dtype=torch.float64)[:, None]
        density = likelihood.log_prob(grid, torch.full_like(grid, output)).exp()
    below = torch.cumulative_trapezoid(density, grid.flatten())
    assert below[-1].item() == pytest.approx(1.0, abs=1e-6)
    places = torch.searchsorted(grid[1:].flatten(), x)
    assert kstest(below[places].numpy(), "uniform").pvalue > 1e-3


LOGISTIC = [("logistic", scale, num_levels) for scale in (0.03, "learned") for num_levels in (2, 17, 256)]


@pytest.mark.parametrize(("name", "scale", "num_levels"), [("bernoulli", 1.0, 2), *LOGISTIC])
@pytest.mark.parametrize("output", [*OUTPUTS, 4.0])
def test_levels_by_their_frequencies(name: Any, scale: Any, output: float, num_levels: int) -> None:
    likelihood = Likelihood(name, scale, "sigmoid", num_levels).double()
    outputs, last = torch.full((NUM_DRAWS, 1), output).double(), num_levels - 1
    with torch.no_grad():
        x = likelihood.draw(outputs, _uniform(NUM_DRAWS, 1)).flatten()
        log_p = likelihood.log_prob(torch.arange(num_levels).double()[:, None] / last, outputs[:num_levels])
    counts = (x * last).round().long().bincount(minlength=num_levels)
    assert torch.equal(x, (x * last).round() / last)
    # Rare levels are taken together, so that the statistic has its distribution.
    expected = log_p.exp() * NUM_DRAWS
    rare = expected < 10
    observed, wanted = (torch.cat([c[~rare].double(), c[rare].double().sum()[None]]) for c in (counts, expected))
    kept = wanted > 1e-3
    assert observed[~kept].sum() == 0
    wanted = wanted[kept] * observed.sum() / wanted[kept].sum()
    assert kept.sum() == 1 or chisquare(observed[kept].numpy(), wanted.numpy()).pvalue > 1e-3


def test_quantiles_against_scipy_far_into_the_tails() -> None:
    small = 10.0 ** -torch.arange(1.0, 13, dtype=torch.float64)
    u = torch.cat([small, 1 - small, torch.tensor([0.5])])
    mean, log_scale = torch.tensor([0.7, -1.2], dtype=torch.float64)
    for quantile, judge in ((normal_quantile, norm), (laplace_quantile, laplace)):
        x = quantile(u, mean, log_scale)
        expected = torch.from_numpy(judge.ppf(u.numpy(), 0.7, math.exp(-1.2)))
        torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(quantile(u, mean, -1.2), x, rtol=1e-12, atol=1e-12)


def test_a_level_of_the_logistic_begins_where_the_mass_below_it_ends() -> None:
    levels, mean = torch.arange(17).double() / 16, torch.tensor(0.4).double()
    below = logistic_log_prob(levels, mean, -2.0, 17).exp().cumsum(0)[:-1]
    assert torch.equal(logistic_quantile(below - 1e-9, mean, -2.0, 17), levels[:-1])
    assert torch.equal(logistic_quantile(below + 1e-9, mean, -2.0, 17), levels[1:])


@pytest.mark.parametrize("make", EXPERTS)
def test_an_autoencoder_draws_from_its_likelihood_at_eps(make: Any) -> None:
    expert = _expert(make)
    shape = SPEC[expert.field].shape
    eps, u = _normal(6, 3), _uniform(6, *shape)
    with torch.no_grad():
        x = expert.draw(eps, u)
        assert x.shape == (6, *shape)
        assert expert.can("draw")
        assert torch.equal(x.flatten(1), expert.likelihood.draw(expert.decoder(eps), u.flatten(1)))
        torch.testing.assert_close(expert.draw(eps[[4, 1]], u[[4, 1]]), x[[4, 1]], rtol=1e-12, atol=1e-12)
        assert expert.draw(eps[:0], u[:0]).shape == (0, *shape)
        assert expert.float().draw(eps.float(), u.float()).dtype == torch.float32
        if expert.likelihood.name in ("gaussian", "laplace"):  # the median is the mean
            expert.double()
            torch.testing.assert_close(expert.draw(eps, torch.full_like(u, 0.5)), expert.sample(eps))


@pytest.mark.parametrize("make", [m for m in EXPERTS if m.keywords["likelihood"] != "logistic"])
def test_draws_at_one_place_have_the_mean_that_sample_gives(make: Any) -> None:
    expert = _expert(make)
    eps = _normal(1, 3).expand(4000, 3)
    with torch.no_grad():
        x = expert.draw(eps, _uniform(4000, *SPEC[expert.field].shape)).flatten(1)
        mean = expert.sample(eps[:1]).flatten(1)
    assert ((x.mean(0) - mean).abs() < 5 * x.std(0) / math.sqrt(4000) + 1e-12).all()


def test_other_experts_do_not_draw() -> None:
    spec = {"x": SPEC["x"], "y": Field((1,), torch.float64)}
    assert not Regressor(spec).can("draw")
    with pytest.raises(NotImplementedError, match=r"^Expert does not draw$"):
        Expert().draw(torch.zeros(1, 1), torch.zeros(1, 1))
