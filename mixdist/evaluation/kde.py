"""A Gaussian kernel density on samples of a model (Parzen window): a likelihood for models that have none.

Shape letters: S samples, H held-out rows, N rows, D numbers in a row, G bandwidths, B rows at once.

Scikit-learn's KernelDensity is not used: it is wrong where kernels are narrow (its issues 7492 and 25799; 1.9.1 against
scipy's logsumexp over all pairs: off by up to 71 nats for 10 numbers in a row, 5,800 for 784), and slower: 10,000
samples and one thread take it 2.5 s for 10,000 rows of 2 numbers and 10 s for 1,000 rows of 784; here 0.8 s and 0.5 s.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

GRID = 10.0 ** np.linspace(-3.0, 0.0, 13)
"""Bandwidths tried first, in units of the data's spread."""

DECADE = 10.0 ** np.linspace(0.25, 1.0, 4)
WIDENINGS = 2
"""How often the grid grows by a decade where its first or last bandwidth is the best."""

FINER, REFINEMENTS = 9, 2
"""Bandwidths between the neighbours of the best, and how often they are taken: the last are 2% apart."""

PAIRS_AT_ONCE = 1 << 22
"""Pairs of row and sample held in memory at once; no result depends on it beyond rounding."""


class Parzen(NamedTuple):
    """A kernel density and how its bandwidth was chosen.

    Args:
        log_density_N: of each row, nats.
        bandwidth: h, the standard deviation of the kernel, in units of the rows.
        at_edge: whether the best bandwidth was the first or last even of the widened grid. The number is then not
            to be trusted: there are too few samples, or held-out rows are copies of samples.
        tried_G: all bandwidths tried, ascending.
        held_out_G: the mean log density of the held-out rows under each, nats.
    """

    log_density_N: np.ndarray
    bandwidth: float
    at_edge: bool
    tried_G: np.ndarray
    held_out_G: np.ndarray


def parzen(samples_SD: np.ndarray, held_out_HD: np.ndarray, rows_ND: np.ndarray) -> Parzen:
    """Estimate the log density of rows from a model's samples: log p(x) = log 1/S sum_s N(x; x_s, h^2 I).

    h maximises the mean log density of the held-out rows: over ``GRID`` times the spread of samples and held-out rows,
    widened where the best lies at its edge, then twice over a finer grid around the best. The expectation of the
    estimate over rows of a density is never above minus that density's entropy (Gibbs), whatever the samples. With few
    samples, or many numbers in a row, it is far below: compare only figures of as many samples.

    Args:
        samples_SD: drawn from the model; any real dtype, as the other two.
        held_out_HD: rows of data that choose the bandwidth; none of those reported.
        rows_ND: rows of data whose density is reported.

    Raises:
        ValueError: for arrays that are empty, not finite, or of different width; for held-out rows that are those
            reported; for samples and held-out rows that are all one point.
    """
    samples, held_out, rows = _checked(samples_SD, held_out_HD, rows_ND)
    centre = samples.mean(axis=0)
    # Distances come from scalar products, which lose digits far from 0.
    samples, held_out, rows = samples - centre, held_out - centre, rows - centre
    spread = math.sqrt(np.concatenate([samples, held_out]).var(axis=0).mean())
    if spread == 0.0:
        raise ValueError("samples_SD and held_out_HD are all one point: no bandwidth fits; check the model's samples.")
    tried: dict[float, float] = {}
    _try(tried, samples, held_out, GRID * spread)
    for _ in range(WIDENINGS):
        low, high = min(tried), max(tried)
        if (best := _best(tried)) not in (low, high):
            break
        _try(tried, samples, held_out, high * DECADE if best == high else low / DECADE)
    at_edge = _best(tried) in (min(tried), max(tried))
    for _ in range(REFINEMENTS):
        _try(tried, samples, held_out, _around(tried))
    bandwidth, tried_G = _best(tried), np.array(sorted(tried))
    log_density_N = log_density(samples, rows, np.array([bandwidth]))[0]
    return Parzen(log_density_N, bandwidth, at_edge, tried_G, np.array([tried[h] for h in tried_G.tolist()]))


def log_density(samples_SD: np.ndarray, rows_ND: np.ndarray, bandwidth_G: np.ndarray) -> np.ndarray:
    """Return log 1/S sum_s N(x_n; x_s, h^2 I) for each bandwidth and row, float64 (G, N), nats.

    Squared distances are |x|^2 - 2 x x_s + |x_s|^2, computed once for all bandwidths; sums are taken under the largest
    term.
    """
    (num_samples, size), num_rows = samples_SD.shape, len(rows_ND)
    log_p_GN = np.empty((len(bandwidth_G), num_rows))
    square_S = np.square(samples_SD).sum(axis=1)
    at_once = max(1, PAIRS_AT_ONCE // num_samples)
    for first in range(0, num_rows, at_once):
        rows_BD = rows_ND[first : first + at_once]
        square_BS = rows_BD @ samples_SD.T
        square_BS *= -2.0
        square_BS += square_S
        square_BS += np.square(rows_BD).sum(axis=1, keepdims=True)
        nearest_B1 = square_BS.min(axis=1, keepdims=True)
        square_BS -= nearest_B1
        kernel_BS = np.empty_like(square_BS)
        for log_p_N, h in zip(log_p_GN, bandwidth_G.tolist(), strict=True):
            np.multiply(square_BS, -0.5 / h**2, out=kernel_BS)
            np.exp(kernel_BS, out=kernel_BS)
            log_norm = math.log(num_samples) + size * math.log(h * math.sqrt(2 * math.pi))
            log_p_B = np.log(kernel_BS.sum(axis=1)) - np.maximum(nearest_B1[:, 0], 0.0) / (2 * h**2) - log_norm
            log_p_N[first : first + at_once] = log_p_B
    return log_p_GN


def _try(tried: dict[float, float], samples_SD: np.ndarray, held_out_HD: np.ndarray, bandwidth_G: np.ndarray) -> None:
    """Add bandwidths and the mean log density of the held-out rows under each."""
    means_G = log_density(samples_SD, held_out_HD, bandwidth_G).mean(axis=1)
    tried |= dict(zip(bandwidth_G.tolist(), means_G.tolist(), strict=True))


def _best(tried: dict[float, float]) -> float:
    return max(tried, key=tried.__getitem__)


def _around(tried: dict[float, float]) -> np.ndarray:
    """Bandwidths between the neighbours of the best one, evenly spaced in their logarithms."""
    grid = sorted(tried)
    place = grid.index(_best(tried))
    low, high = grid[max(place - 1, 0)], grid[min(place + 1, len(grid) - 1)]
    return np.geomspace(low, high, FINER + 2)[1:-1]


def _checked(*arrays: np.ndarray) -> list[np.ndarray]:
    names = ("samples_SD", "held_out_HD", "rows_ND")
    for name, array in zip(names, arrays, strict=True):
        if array.ndim != 2 or 0 in array.shape or array.shape[1] != arrays[0].shape[1]:
            raise ValueError(
                f"{name} {array.shape} must be (rows, {arrays[0].shape[-1] if arrays[0].ndim else 1}) with 1 row or "
                "more: flatten each row, and take samples and rows of the same data."
            )
        if not np.isfinite(array).all():
            raise ValueError(f"{name} {array.shape} must hold finite numbers: drop the rows that do not.")
    if np.array_equal(arrays[1], arrays[2]):
        raise ValueError(
            f"held_out_HD and rows_ND ({len(arrays[2])} rows) must be different rows: a bandwidth chosen on what is "
            "reported flatters it; split the data."
        )
    return [array.astype(np.float64) for array in arrays]
