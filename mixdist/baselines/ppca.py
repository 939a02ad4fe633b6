"""Probabilistic principal component analysis: a Gaussian with M directions and one noise for all others.

Shape letters: N rows, B rows of a batch, D numbers of a row, M components.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np

from mixdist.baselines.model import Baseline, Candidate, Choice, Grid, choose
from mixdist.baselines.rows import Rows, require_memory
from mixdist.nets.principal import Spectrum, of_products, of_rows


@dataclass(frozen=True)
class PPCA(Baseline):
    """x = mu + W z + e with z ~ N(0, I) of M dimensions, e ~ N(0, s^2 I), by maximum likelihood (Tipping and Bishop
    1999): s^2 is the mean of the D - M smallest eigenvalues l_i of the covariance (eq. 8) and W = U (L - s^2 I)^(1/2)
    (eq. 7), so with y = U^T (x - mu)

        log p(x) = -1/2 (D log 2 pi + sum_i log l_i + (D - M) log s^2 + sum_i y_i^2 / l_i + |x - mu - U y|^2 / s^2).

    Args:
        mean_D: mu.
        directions_DM: U.
        variance_M: l_1 to l_M.
        noise: s^2.
        shift: added to each log density.
    """

    mean_D: np.ndarray
    directions_DM: np.ndarray
    variance_M: np.ndarray
    noise: float
    shift: float = 0.0

    @staticmethod
    def of(spectrum: Spectrum, num_components: int, level: float | None = None) -> PPCA:
        """Return the model of M components.

        With ``level`` h it is that of values that are each spread evenly over a level of width h: every eigenvalue
        grows by h^2 / 12, and the expectation over u of log p(x + h (u - 1/2)) + D log h, a lower bound on the log mass
        of the levels (Theis et al. 2016, section 3.1), is log p(x) - h^2 / 24 tr(C^-1) + D log h: nothing is drawn.

        Args:
            spectrum: of the training rows.
            num_components: M, below D and N.
            level: h, or None for a density of values.

        Raises:
            ValueError: nothing is left for the noise.
        """
        size, added = len(spectrum.mean_D), 0.0 if level is None else level**2 / 12
        variance_M = spectrum.variance_M[:num_components]
        noise = spectrum.noise(num_components)
        if noise + added <= spectrum.least_noise:
            raise ValueError(
                f"--components ({num_components}) leaves no noise: the {spectrum.num_rows} training rows lie in a "
                f"space of {num_components} dimensions or fewer: "
                + ("give fewer components, or more rows" if num_components > 1 else "take data that varies more")
            )
        variance_M, noise, shift = variance_M + added, noise + added, 0.0
        if level is not None:
            inverse_trace = float((1 / variance_M).sum()) + (size - num_components) / noise
            shift = size * math.log(level) - level**2 / 24 * inverse_trace
        return PPCA(spectrum.mean_D, spectrum.directions_DM[:, :num_components], variance_M, noise, shift)

    @property
    def num_parameters(self) -> int:
        size, num = self.directions_DM.shape
        return size + size * num - num * (num - 1) // 2 + 1

    def log_density(self, x_BD: np.ndarray) -> np.ndarray:
        y_BM, rest_BD = self._split(x_BD)
        size, num = len(self.mean_D), len(self.variance_M)
        log_det = float(np.log(self.variance_M).sum()) + (size - num) * math.log(self.noise)
        square_B = (np.square(y_BM) / self.variance_M).sum(1) + np.square(rest_BD).sum(1) / self.noise
        log_p_B: np.ndarray = self.shift - 0.5 * (size * math.log(2 * math.pi) + log_det + square_B)
        return log_p_B

    def reconstruct(self, x_BD: np.ndarray) -> np.ndarray:
        """Return mu + W E[z|x], where W E[z|x] = U (1 - s^2 / L) y."""
        y_BM, _ = self._split(x_BD)
        found_BD: np.ndarray = self.mean_D + (y_BM * (1 - self.noise / self.variance_M)) @ self.directions_DM.T
        return found_BD

    def _split(self, x_BD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return y and what lies outside the directions, x - mu - U y."""
        centred_BD = x_BD - self.mean_D
        y_BM = centred_BD @ self.directions_DM
        return y_BM, centred_BD - y_BM @ self.directions_DM.T


def fit_ppca(train: Rows, valid: Rows | None, grid: Grid, level: float | None = None) -> Choice:
    """Fit PPCA for each number of components, all from one decomposition, and choose on the validation rows.

    Raises:
        ValueError: more components than rows or than numbers in a row; rows that do not fit into memory.
    """
    found = spectrum(train, max(grid["components"]))
    fit = lambda num: Candidate(PPCA.of(found, num, level), {"components": num})  # noqa: E731
    return choose((partial(fit, num) for num in grid["components"]), valid)


def spectrum(rows: Rows, num_components: int) -> Spectrum:
    """Return the largest principal components of rows, exactly, from two passes over them.

    All rows are held in memory only where they are fewer than the numbers in one.
    """
    mean_D = sum(x_BD.sum(0) for _, x_BD in rows.batches()) / len(rows)
    assert isinstance(mean_D, np.ndarray)
    num_rows, size = len(rows), len(mean_D)
    for limit, what in ((num_rows, "training rows"), (size, "numbers in a row")):
        if num_components >= limit:
            raise ValueError(
                f"--components ({num_components}) must be below the number of {what} ({limit}): give fewer"
                + (" or more rows" if what == "training rows" else "")
            )
    if size <= num_rows:
        require_memory(3 * 8 * size**2, f"ppca of rows of {size} numbers")
        matrix = np.zeros((size, size))
        for _, x_BD in rows.batches():
            centred_BD = x_BD - mean_D
            matrix += centred_BD.T @ centred_BD
        return of_products(matrix, mean_D, num_rows, num_components)
    centred_ND = rows.matrix(2.0 + 2.0 * num_rows / size, "ppca")
    centred_ND -= mean_D
    return of_rows(centred_ND, mean_D, num_components)
