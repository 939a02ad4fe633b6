"""A Gaussian kernel density on samples of a model (Parzen window): a likelihood for models that have none.

Shape letters: S samples, H held-out rows, N rows, D numbers in a row, G bandwidths, B rows at once.

Scikit-learn's KernelDensity is not used: it is wrong where kernels are narrow (its issues 7492 and 25799; 1.9.1 against
scipy's logsumexp over all pairs: off by up to 71 nats for 10 numbers in a row, 5,800 for 784), and slower.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

GRID = 10.0 ** np.linspace(-5.0, 2.0, 15)
"""Bandwidths tried first, in units of the data's spread."""

FINER, REFINEMENTS = 11, 2
"""Bandwidths between the neighbours of the best, and how often they are taken: the last are 3% apart."""

PAIRS_AT_ONCE = 1 << 18
"""Pairs of row and sample held in memory at once; no result depends on it beyond rounding."""


class Parzen(NamedTuple):
    """A kernel density and how its bandwidth was chosen.

    Args:
        log_density_N: of each row, nats.
        bandwidth: h, the standard deviation of the kernel, in units of the rows.
        at_edge: whether the best of ``GRID`` was its first or last. The number is then not to be trusted: there are too
            few samples, or held-out rows are copies of samples.
    """

    log_density_N: np.ndarray
    bandwidth: float
    at_edge: bool


def parzen(samples_SD: np.ndarray, held_out_HD: np.ndarray, rows_ND: np.ndarray) -> Parzen:
    """Estimate the log density of rows from a model's samples: log p(x) = log 1/S sum_s N(x; x_s, h^2 I).

    h maximises the mean log density of the held-out rows: over ``GRID`` times the spread of samples and held-out rows,
    then twice over a finer grid around the best. The expectation of the estimate over rows of a density is never above
    minus that density's entropy (Gibbs), whatever the samples. With few samples, or many numbers in a row, it is far
    below: compare only figures of as many samples.

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
    grid_G, at_edge = GRID * spread, False
    for turn in range(1 + REFINEMENTS):
        best = int(log_density(samples, held_out, grid_G).mean(axis=1).argmax())
        bandwidth, last = float(grid_G[best]), len(grid_G) - 1
        at_edge = best in (0, last) if turn == 0 else at_edge
        grid_G = np.geomspace(grid_G[max(best - 1, 0)], grid_G[min(best + 1, last)], FINER + 2)[1:-1]
    return Parzen(log_density(samples, rows, np.array([bandwidth]))[0], bandwidth, at_edge)


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
        square_BS = square_S - 2.0 * (rows_BD @ samples_SD.T) + np.square(rows_BD).sum(axis=1, keepdims=True)
        nearest_B = square_BS.min(axis=1)
        square_BS -= nearest_B[:, None]
        for log_p_N, h in zip(log_p_GN, bandwidth_G.tolist(), strict=True):
            log_norm = math.log(num_samples) + size * math.log(h * math.sqrt(2 * math.pi))
            log_sum_B = np.log(np.exp(square_BS * (-0.5 / h**2)).sum(axis=1))
            log_p_N[first : first + at_once] = log_sum_B - np.maximum(nearest_B, 0.0) / (2 * h**2) - log_norm
    return log_p_GN


def _checked(*arrays: np.ndarray) -> list[np.ndarray]:
    names = ("samples_SD", "held_out_HD", "rows_ND")
    for name, array in zip(names, arrays, strict=True):
        if array.ndim != 2 or 0 in array.shape or array.shape[1] != arrays[0].shape[1]:
            raise ValueError(
                f"{name} {array.shape} must have 1 row or more, each as wide as those of samples_SD {arrays[0].shape}: "
                "flatten each row, and take samples and rows of the same data."
            )
        if not np.isfinite(array).all():
            raise ValueError(f"{name} {array.shape} must hold finite numbers: drop the rows that do not.")
    if np.array_equal(arrays[1], arrays[2]):
        raise ValueError(
            f"held_out_HD and rows_ND ({len(arrays[2])} rows) must be different rows: a bandwidth chosen on what is "
            "reported flatters it; split the data."
        )
    return [array.astype(np.float64) for array in arrays]
