"""Gaussian clusters in a latent space, as pure functions.

Shape letters: B rows, K clusters, L latent.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

STARTS, ITERATIONS = 5, 200
"""Of a fit: starts, of which the best is taken, and steps of EM in each at most."""

ClusterName = Literal["kmeans", "mixture"]


class Clusters(NamedTuple):
    """A mixture of Gaussians with diagonal covariances.

    Args:
        log_pi_K: log weights.
        mean_KL: means.
        log_var_KL: log variances.
    """

    log_pi_K: Tensor
    mean_KL: Tensor
    log_var_KL: Tensor


def log_joint(z_BL: Tensor, clusters: Clusters) -> Tensor:
    """Return log pi_k + log N(z; m_k, s_k^2), (..., K) nats, for z (..., L).

    Examples:
        >>> import torch
        >>> from mixdist.gates.gaussians import Clusters, log_joint
        >>> log_joint(torch.zeros(1, 2), Clusters(torch.zeros(1), torch.zeros(1, 2), torch.zeros(1, 2)))  # -log(2 pi)
        tensor([[-1.8379]])
    """
    log_pi_K, mean_KL, log_var_KL = clusters
    distance = ((z_BL.unsqueeze(-2) - mean_KL).square() * torch.exp(-log_var_KL)).sum(-1)
    return log_pi_K - 0.5 * (distance + log_var_KL.sum(-1) + mean_KL.shape[-1] * math.log(2.0 * math.pi))


def cluster_kl(mean_BL: Tensor, log_var_BL: Tensor, prior_mean_KL: Tensor, prior_log_var_KL: Tensor) -> Tensor:
    """Return KL(N(mu, v) || N(m_k, s_k^2)), (B, K) nats; with priors (B, 1, L), one for each row.

    Examples:
        >>> import torch
        >>> from mixdist.gates.gaussians import cluster_kl
        >>> cluster_kl(torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([[1.]])
    """
    mean, log_var = mean_BL.unsqueeze(-2), log_var_BL.unsqueeze(-2)
    ratio = ((mean - prior_mean_KL).square() + log_var.exp()) * torch.exp(-prior_log_var_KL)
    return 0.5 * (prior_log_var_KL - log_var + ratio - 1.0).sum(-1)


def fit_clusters(points_NL: Tensor, num_clusters: int, seed: int, kind: ClusterName) -> Clusters:
    """Fit clusters by :func:`fit_diagonal` (mixture) or :func:`fit_centres` (kmeans), with the arguments of these."""
    return (fit_diagonal if kind == "mixture" else fit_centres)(points_NL, num_clusters, seed)


def fit_diagonal(points_NL: Tensor, num_clusters: int, seed: int) -> Clusters:
    """Fit a mixture by EM from k-means++ starts, in float64 and one thread on the CPU; pure in points and seed.

    Args:
        points_NL: points.
        num_clusters: K.
        seed: of the starts.

    Raises:
        ValueError: points that are not finite, or that cannot be told apart; fewer points than clusters.
    """
    from sklearn.mixture import GaussianMixture
    from threadpoolctl import threadpool_limits

    points, middle = _points(points_NL, num_clusters)
    options = {"n_init": STARTS, "max_iter": ITERATIONS, "init_params": "k-means++", "random_state": seed % 2**32}
    with warnings.catch_warnings(), threadpool_limits(1):  # sums are split otherwise on other numbers of threads
        warnings.simplefilter("ignore")  # that it has not converged, or fewer different points than clusters
        floor = 1e-6 * float((points - middle).var())
        found = GaussianMixture(num_clusters, covariance_type="diag", reg_covar=floor, **options).fit(points - middle)
    shown = np.log(found.weights_), found.means_ + middle, np.log(found.covariances_)
    return Clusters(*map(torch.from_numpy, shown))


def fit_centres(points_NL: Tensor, num_clusters: int, seed: int) -> Clusters:
    """Fit centres by k-means from k-means++ starts, in float64 and one thread on the CPU; pure in points and seed.

    As a mixture they have equal weights and one variance for all, the mean squared distance of a point to its centre in
    a dimension: the most probable cluster of a point is that of the nearest centre. Arguments and errors are those of
    :func:`fit_diagonal`.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    points, middle = _points(points_NL, num_clusters)
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")
        found = KMeans(num_clusters, n_init=STARTS, random_state=seed % 2**32).fit(points - middle)
    variance = max(found.inertia_ / points.size, 1e-6 * float((points - middle).var()))
    mean_KL = torch.from_numpy(found.cluster_centers_ + middle)
    log_pi_K = mean_KL.new_full((num_clusters,), -math.log(num_clusters))
    return Clusters(log_pi_K, mean_KL, torch.full_like(mean_KL, math.log(variance)))


def _points(points_NL: Tensor, num_clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Return points in float64 and their mean, about which they are clustered: far from 0 variances would cancel."""
    points = points_NL.detach().double().cpu().numpy()
    if len(points) < num_clusters:
        raise ValueError(f"a start has {len(points)} rows for {num_clusters} clusters: give it a row for each at least")
    if not np.isfinite(points).all():
        raise ValueError(
            "a start needs finite numbers, and what is seen of the rows is not: look at the rows, or lower the "
            "learning rate of the phase before"
        )
    if not np.ptp(points, axis=0).any():
        raise ValueError(
            f"a start of {num_clusters} clusters finds all {len(points)} rows in one place: look at the rows, or set "
            f"start to none"
        )
    return points, points.mean(0)


def weighted_clusters(points_NL: Tensor, resp_NK: Tensor) -> Clusters:
    """Return the clusters of highest likelihood under given responsibilities, float64: one M step.

    A cluster without rows gets the mean and variance of all.
    """
    points, resp = points_NL.double(), resp_NK.double()
    middle = points.mean(0)
    centred, variance_L = points - middle, points.var(0, correction=0)
    # A thousandth of a row that lies as all rows do: nothing beside a cluster's own rows, all that an empty one has.
    prior = 1e-3
    total_K = resp.sum(0) + prior
    mean_KL = resp.T @ centred / total_K[:, None]
    square_KL = (resp.T @ centred.square() + prior * variance_L) / total_K[:, None]
    floor = (1e-6 * variance_L.mean()).clamp(min=1e-12)
    variance_KL = (square_KL - mean_KL.square()).clamp(min=floor)
    return Clusters((total_K / total_K.sum()).log(), mean_KL + middle, variance_KL.log())
