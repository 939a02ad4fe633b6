"""The kernel density is the one of its formula, and its bandwidth is the best on held-out rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

import mixdist.evaluation.kde
from mixdist.data import Bananas
from mixdist.evaluation.kde import log_density, parzen

RNG = np.random.default_rng(0)


def _by_pairs(samples: np.ndarray, rows: np.ndarray, h: float) -> np.ndarray:
    log_norm = math.log(len(samples)) + samples.shape[1] * (math.log(h) + math.log(2 * math.pi) / 2)
    return logsumexp(-cdist(rows, samples, "sqeuclidean") / (2 * h * h), axis=1) - log_norm


@pytest.mark.parametrize("size", [1, 2, 784])
def test_the_density_is_that_of_all_pairs(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    samples, rows = RNG.normal(size=(300, size)), RNG.normal(size=(70, size)) * 2
    bandwidths = np.array([1e-3, 0.05, 0.4, 3.0])
    expected = np.stack([_by_pairs(samples, rows, h) for h in bandwidths])
    for pairs in (1, 7 * 300, 1 << 18):
        monkeypatch.setattr(mixdist.evaluation.kde, "PAIRS_AT_ONCE", pairs)
        np.testing.assert_allclose(log_density(samples, rows, bandwidths), expected, rtol=1e-10, atol=1e-8)


def test_the_density_integrates_to_one() -> None:
    samples, axis = RNG.normal(size=(40, 2)), np.arange(-6, 6, 0.05)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    assert np.exp(log_density(samples, grid, np.array([0.3]))).sum() * 0.05**2 == pytest.approx(1.0, abs=1e-6)


def test_it_is_near_the_truth_and_never_better() -> None:
    train, test, _ = Bananas(3, rows=3000, test_rows=1500).load()
    rows, reported = (d.spec["x"].values(d.rows["x"], torch.float64).numpy() for d in (train, test))
    assert test.log_density_N is not None
    estimate = parzen(rows[:2000], rows[2000:], reported)
    differences = estimate.log_density_N - test.log_density_N.numpy()
    assert not estimate.at_edge
    assert -1.5 < differences.mean() < 3 * differences.std() / math.sqrt(len(differences))


@pytest.mark.parametrize("size", [1, 3, 60])
def test_the_bandwidth_is_the_best_on_held_out_rows(size: int) -> None:
    samples, held_out, rows = (RNG.normal(size=(n, size)) ** 3 for n in (400, 300, 10))
    estimate = parzen(samples, held_out, rows)
    np.testing.assert_allclose(estimate.log_density_N, _by_pairs(samples, rows, estimate.bandwidth), rtol=1e-11)
    rival = minimize_scalar(
        lambda log_h: -_by_pairs(samples, held_out, math.exp(log_h)).mean(),
        bounds=(math.log(estimate.bandwidth / 3), math.log(estimate.bandwidth * 3)),
        method="bounded",
    )
    assert -rival.fun <= _by_pairs(samples, held_out, estimate.bandwidth).mean() + 2e-3 * size


def test_moving_and_scaling_the_data_does_the_same_to_the_density() -> None:
    arrays = [RNG.normal(size=(n, 4)) for n in (300, 200, 50)]
    one, moved = parzen(*arrays), parzen(*(7.0 * array + 1000.0 for array in arrays))
    assert moved.bandwidth == pytest.approx(7.0 * one.bandwidth)
    np.testing.assert_allclose(moved.log_density_N, one.log_density_N - 4 * math.log(7.0), atol=1e-6)


def test_the_grid_reaches_from_narrow_to_wide_and_an_edge_is_flagged() -> None:
    # Two narrow peaks far apart; held-out rows at +-1 around samples at 0, for which h = 1 is best; copies.
    narrow = parzen(*(RNG.normal(size=(n, 1)) + 1e4 * (-1.0) ** np.arange(n)[:, None] for n in (2000, 500, 100)))
    assert 0.05 < narrow.bandwidth < 1.0
    wide = parzen(np.zeros((1000, 1)), np.array([[-1.0], [1.0]] * 5), np.zeros((1, 1)))
    assert wide.bandwidth == pytest.approx(1.0, rel=0.05)
    samples = RNG.normal(size=(200, 2))
    copied = parzen(samples, samples[:50], RNG.normal(size=(10, 2)))
    assert (narrow.at_edge, wide.at_edge, copied.at_edge) == (False, False, True)


def test_other_dtypes_are_taken_as_numbers() -> None:
    arrays = [RNG.integers(0, 256, (n, 5)).astype(np.uint8) for n in (100, 50, 20)]
    as_floats = parzen(*(array.astype(np.float64) for array in arrays))
    np.testing.assert_array_equal(parzen(*arrays).log_density_N, as_floats.log_density_N)


ROWS = np.arange(8.0).reshape(4, 2)


@pytest.mark.parametrize(
    ("name", "arrays"),
    [
        ("samples_SD", (np.zeros((0, 2)), ROWS, ROWS + 1)),
        ("samples_SD", (np.zeros(3), ROWS, ROWS + 1)),
        ("held_out_HD", (ROWS, ROWS[:, :1], ROWS)),
        ("rows_ND", (ROWS, ROWS, np.full((1, 2), np.nan))),
        ("held_out_HD and rows_ND", (ROWS, ROWS + 1, ROWS + 1)),
        ("samples_SD and held_out_HD", (np.ones((3, 2)), np.ones((2, 2)), ROWS)),
    ],
)
def test_bad_input_is_named_in_one_line(name: str, arrays: tuple[np.ndarray, ...]) -> None:
    with pytest.raises(ValueError, match=rf"^{name} [^\n]*$"):
        parzen(*arrays)
