"""The kernel density is the one of its formula, and its bandwidth is the best on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.spatial.distance import cdist
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

import mixdist.evaluation.kde
from mixdist.data import Bananas, Dataset
from mixdist.evaluation.kde import log_density, parzen

RNG = np.random.default_rng(0)


def _by_pairs(samples: np.ndarray, rows: np.ndarray, h: float) -> np.ndarray:
    log_norm = math.log(len(samples)) + samples.shape[1] * (math.log(h) + math.log(2 * math.pi) / 2)
    return logsumexp(-cdist(rows, samples, "sqeuclidean") / (2 * h * h), axis=1) - log_norm


def _values(dataset: Dataset, count: int) -> np.ndarray:
    return dataset.spec["x"].values(dataset.rows["x"][:count], torch.float64).numpy()


@pytest.mark.parametrize("size", [1, 2, 10, 784])
def test_the_density_is_that_of_all_pairs(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    samples, rows = RNG.normal(size=(300, size)), RNG.normal(size=(70, size)) * 2
    bandwidths = np.array([0.05, 0.4, 3.0])
    expected = np.stack([_by_pairs(samples, rows, h) for h in bandwidths])
    for pairs in (1, 7 * 300, 1 << 22):
        monkeypatch.setattr(mixdist.evaluation.kde, "PAIRS_AT_ONCE", pairs)
        np.testing.assert_allclose(log_density(samples, rows, bandwidths), expected, rtol=1e-10)


def test_the_density_integrates_to_one() -> None:
    samples, axis = RNG.normal(size=(40, 2)), np.arange(-6, 6, 0.05)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    assert np.exp(log_density(samples, grid, np.array([0.3]))).sum() * 0.05**2 == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("size", [1, 2])
def test_a_gaussian_is_recovered(size: int) -> None:
    truth = multivariate_normal(np.full(size, 5.0), np.diag([4.0, 0.25][:size]))
    samples, held_out, rows = (truth.rvs(n, random_state=RNG).reshape(n, size) for n in (8000, 2000, 2000))
    estimate = parzen(samples, held_out, rows)
    differences = estimate.log_density_N - truth.logpdf(rows)
    assert not estimate.at_edge
    assert abs(differences.mean()) < 0.05
    assert np.median(np.abs(differences)) < 0.1


@pytest.mark.parametrize("modes", [3, 5, 9])
def test_it_is_never_better_than_the_truth(modes: int) -> None:
    train, test = Bananas(modes, rows=3000, test_rows=1500).load()  # type: ignore[arg-type]
    rows = _values(train, 3000)
    assert test.log_density_N is not None
    estimate = parzen(rows[:2000], rows[2000:], _values(test, 1500))
    differences = estimate.log_density_N - test.log_density_N.numpy()
    assert differences.mean() < 3 * differences.std() / math.sqrt(len(differences))
    assert differences.mean() > -1.5  # but is about the same density


@pytest.mark.parametrize("size", [1, 3, 60])
def test_the_bandwidth_is_the_best_on_held_out_rows(size: int) -> None:
    samples, held_out, rows = (RNG.normal(size=(n, size)) ** 3 for n in (400, 300, 10))
    estimate = parzen(samples, held_out, rows)
    tried, means = estimate.tried_G, estimate.held_out_G
    assert np.all(np.diff(tried) > 0)
    assert estimate.bandwidth == pytest.approx(tried[means.argmax()], rel=1e-12)
    np.testing.assert_allclose(means, [_by_pairs(samples, held_out, h).mean() for h in tried], rtol=1e-9)
    np.testing.assert_allclose(estimate.log_density_N, _by_pairs(samples, rows, estimate.bandwidth), rtol=1e-9)
    rival = minimize_scalar(
        lambda log_h: -_by_pairs(samples, held_out, math.exp(log_h)).mean(),
        bounds=(math.log(estimate.bandwidth / 3), math.log(estimate.bandwidth * 3)),
        method="bounded",
    )
    assert -rival.fun <= means.max() + 1e-3 * max(1, size)


def test_moving_and_scaling_the_data_does_the_same_to_the_density() -> None:
    arrays = [RNG.normal(size=(n, 4)) for n in (300, 200, 50)]
    one, moved = parzen(*arrays), parzen(*(7.0 * array + 1000.0 for array in arrays))
    assert moved.bandwidth == pytest.approx(7.0 * one.bandwidth)
    np.testing.assert_allclose(moved.log_density_N, one.log_density_N - 4 * math.log(7.0), atol=1e-6)


def test_the_grid_widens_until_it_holds_the_best() -> None:
    # Two narrow peaks far apart; and held-out rows at +-1 around samples at 0, for which h = 1 is best.
    narrow = [RNG.normal(size=(n, 1)) + 1e4 * (-1.0) ** np.arange(n)[:, None] for n in (2000, 500, 100)]
    estimate = parzen(*narrow)
    assert not estimate.at_edge
    assert 0.05 < estimate.bandwidth < 1.0
    wide = parzen(np.zeros((1000, 1)), np.array([[-1.0], [1.0]] * 5), np.zeros((1, 1)))
    assert not wide.at_edge
    assert wide.bandwidth == pytest.approx(1.0, rel=0.05)


def test_a_bandwidth_at_the_edge_is_flagged() -> None:
    samples = RNG.normal(size=(200, 2))
    assert parzen(samples, samples[:50], RNG.normal(size=(10, 2))).at_edge


def test_other_dtypes_are_taken_as_numbers() -> None:
    arrays = [RNG.integers(0, 256, (n, 5)).astype(np.uint8) for n in (100, 50, 20)]
    np.testing.assert_array_equal(
        parzen(*arrays).log_density_N, parzen(*(array.astype(np.float64) for array in arrays)).log_density_N
    )


ONES, ROWS = np.ones((3, 2)), np.arange(8.0).reshape(4, 2)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: parzen(np.zeros((0, 2)), ROWS, ROWS + 1), r"samples_SD \(0, 2\)"),
        (lambda: parzen(np.zeros(3), ROWS, ROWS + 1), r"samples_SD \(3,\)"),
        (lambda: parzen(ROWS, ROWS[:, :1], ROWS), r"held_out_HD \(4, 1\) must be \(rows, 2\)"),
        (lambda: parzen(ROWS, ROWS, np.full((1, 2), np.nan)), r"rows_ND \(1, 2\) must hold finite numbers"),
        (lambda: parzen(ROWS, ROWS + 1, ROWS + 1), "must be different rows"),
        (lambda: parzen(ONES, ONES[:2], ROWS), "all one point"),
    ],
)
def test_bad_input_is_named_in_one_line(make: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        make()
    assert "\n" not in str(caught.value)
