"""Gaussian mixtures and k-means, by scikit-learn in float64.

Shape letters: N rows, B rows of a batch, D numbers of a row, K components or clusters.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

import numpy as np

from mixdist.baselines.model import Baseline, Candidate, Choice, Grid, choose
from mixdist.baselines.rows import Rows, require_memory

Covariance = Literal["full", "diag", "tied", "spherical"]


@dataclass(frozen=True)
class GaussianMixture(Baseline):
    """log p(x) = log sum_k pi_k N(x; mu_k, C_k), with C_k^-1 = F_k F_k^T, by expectation and maximisation.

    Args:
        weight_K: pi.
        mean_KD: mu.
        factor: F, (K, D, D), or (1, D, D) where all have one; of diagonal covariances their diagonals, (K, D), or
            (K, 1) where each is one number.
        shift: added to each log density: D log h for the mass of levels of width h.
    """

    weight_K: np.ndarray
    mean_KD: np.ndarray
    factor: np.ndarray
    shift: float = 0.0

    @staticmethod
    def of(fitted: Any, shift: float = 0.0) -> GaussianMixture:
        """Return scikit-learn's model."""
        kind, factor = fitted.covariance_type, fitted.precisions_cholesky_
        factor = factor[None] if kind == "tied" else factor[:, None] if kind == "spherical" else factor
        return GaussianMixture(fitted.weights_, fitted.means_, factor, shift)

    @property
    def num_parameters(self) -> int:
        num, size = self.mean_KD.shape
        triangles = len(self.factor) * size * (size + 1) // 2
        return num * (size + 1) - 1 + (triangles if self.factor.ndim == 3 else self.factor.size)

    def log_density(self, x_BD: np.ndarray) -> np.ndarray:
        from scipy.special import logsumexp

        log_p_B: np.ndarray = logsumexp(self._log_joint(x_BD), axis=1) + self.shift
        return log_p_B

    def assign(self, x_BD: np.ndarray) -> np.ndarray:
        cluster_B: np.ndarray = self._log_joint(x_BD).argmax(1)
        return cluster_B

    def _log_joint(self, x_BD: np.ndarray) -> np.ndarray:
        """Return log pi_k + log N(x; mu_k, C_k), (B, K)."""
        num, size = self.mean_KD.shape
        full = self.factor.ndim == 3
        scale = np.diagonal(self.factor, axis1=1, axis2=2) if full else self.factor
        log_det = np.log(np.broadcast_to(scale, (num, size))).sum(1)
        columns = []
        for k in range(num):
            centred_BD, factor = x_BD - self.mean_KD[k], self.factor[k if len(self.factor) > 1 else 0]
            y_BD = centred_BD @ factor if full else centred_BD * factor
            columns.append(log_det[k] - 0.5 * np.square(y_BD).sum(1))
        with np.errstate(divide="ignore"):  # a component may have lost all its weight
            log_weight_K = np.log(self.weight_K)
        log_p_BK: np.ndarray = np.stack(columns, axis=1) + (log_weight_K - 0.5 * size * math.log(2 * math.pi))
        return log_p_BK


@dataclass(frozen=True)
class KMeans(Baseline):
    """Each row belongs to the nearest of K centres, which reconstructs it.

    Args:
        centre_KD: the centres.
    """

    centre_KD: np.ndarray

    @property
    def num_parameters(self) -> int:
        return int(self.centre_KD.size)

    def assign(self, x_BD: np.ndarray) -> np.ndarray:
        square_BK = np.square(self.centre_KD).sum(1) - 2 * x_BD @ self.centre_KD.T
        cluster_B: np.ndarray = square_BK.argmin(1)
        return cluster_B

    def reconstruct(self, x_BD: np.ndarray) -> np.ndarray:
        xhat_BD: np.ndarray = self.centre_KD[self.assign(x_BD)]
        return xhat_BD


def fit_gmm(
    train: Rows,
    valid: Rows | None,
    grid: Grid,
    covariance: Covariance,
    seed: int,
    max_iter: int = 200,
    level: float | None = None,
) -> Choice:
    """Fit a Gaussian mixture for each number of components and each floor of the variance; choose on validation rows.

    Args:
        train: rows that are fitted.
        valid: rows that choose; None where there is one candidate.
        grid: ``components``, each K; and ``min_variance``, each a part of the values' mean variance, which is added to
            the diagonal of each covariance: it bounds the density of values that hardly vary.
        covariance: of a component: full, diag, spherical, or one full covariance for all (tied).
        seed: of the start.
        max_iter: iterations at most.
        level: width h of a level, for values that are spread over theirs; None for a density of values.

    Raises:
        ValueError: more components than rows; a covariance that is singular; rows that do not fit into memory.
    """
    components: list[int] = grid["components"]
    for num in components:
        if num > len(train):
            raise ValueError(
                f"--components ({num}) must be at most the number of training rows ({len(train)}): give fewer"
            )
    x_ND = train.matrix(3.0, "gmm")
    size, most = x_ND.shape[1], max(components)
    matrices = {"full": most, "tied": 1}.get(covariance, 0)
    require_memory(8 * (3 * matrices * size**2 + 3 * len(x_ND) * most), f"gmm of {most} components and {size} numbers")
    shift = 0.0 if level is None else size * math.log(level)

    def candidate(num: int, part: float) -> Candidate:
        fitted, findings = _fit(x_ND, num, covariance, part, seed, max_iter)
        settings = {"components": num, "covariance": covariance, "min_variance": part}
        return Candidate(GaussianMixture.of(fitted, shift), settings, findings)

    return choose((partial(candidate, *pair) for pair in product(components, grid["min_variance"])), valid)


def _fit(
    x_ND: np.ndarray, num: int, covariance: Covariance, part: float, seed: int, max_iter: int
) -> tuple[Any, list[str]]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture as Mixture

    if not np.ptp(x_ND, axis=0).any():
        raise ValueError(f"gmm needs values that vary, and all {len(x_ND)} training rows are the same: take other data")
    variance_D = x_ND.var(axis=0)
    floor = part * float(variance_D.mean())
    model = Mixture(num, covariance_type=covariance, reg_covar=floor, max_iter=max_iter, random_state=_state(seed))
    findings = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            model.fit(x_ND)
        except ValueError:  # the one thing that scikit-learn can object to in these rows
            fewer = ", or give fewer components" if num > 1 else ""
            raise ValueError(
                f"gmm of {num} components (--covariance {covariance}, --min_variance {part:g}) has a singular "
                f"covariance: raise --min_variance, as {max(1e-3, 10 * part):g}{fewer}"
            ) from None
    if not model.converged_:
        findings.append(f"gmm of {num} components had not converged after {max_iter} iterations: raise --max_iter")
    still = int((variance_D <= floor).sum())
    if still:
        findings.append(
            f"{still} of {x_ND.shape[1]} values vary by no more than --min_variance ({part:g} of their mean variance): "
            f"it decides their density"
        )
    return model, findings


def fit_kmeans(train: Rows, clusters: int, seed: int) -> Choice:
    """Fit k-means: the best of ten starts.

    Raises:
        ValueError: more clusters than rows; rows that do not fit into memory.
    """
    from sklearn.cluster import KMeans as Clusters
    from sklearn.exceptions import ConvergenceWarning

    if clusters > len(train):
        raise ValueError(
            f"--clusters ({clusters}) must be at most the number of training rows ({len(train)}): give fewer"
        )
    x_ND = train.matrix(2.5, "kmeans")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than clusters: some stay empty
        fitted = Clusters(clusters, n_init=10, random_state=_state(seed)).fit(x_ND)
    return Choice(Candidate(KMeans(fitted.cluster_centers_), {"clusters": clusters}))


def _state(seed: int) -> int:
    """Return a seed as scikit-learn takes it, 32 bits."""
    return seed % 2**32
