"""Principal components of rows, and the linear Gaussian model that they make: what baselines fit and VAEs start as.

Shape letters: N rows, D numbers of a row, M components.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FEW = 1000
"""Up to this side a symmetric matrix is decomposed by LAPACK, and above it where many eigenvectors are wanted."""

SINGULAR = 1e-12
"""Of the mean variance: noise below this part of it is taken for none."""


class Spectrum(NamedTuple):
    """The largest principal components of rows.

    Args:
        mean_D: of the rows.
        variance_M: eigenvalues of the covariance (divisor N), the largest first.
        directions_DM: its eigenvectors; of each, the number that is largest without its sign is positive.
        value_variance_D: the covariance's diagonal: the variance of each number.
        num_rows: N.
    """

    mean_D: np.ndarray
    variance_M: np.ndarray
    directions_DM: np.ndarray
    value_variance_D: np.ndarray
    num_rows: int

    @property
    def total(self) -> float:
        """The covariance's trace."""
        return float(self.value_variance_D.sum())

    @property
    def least_noise(self) -> float:
        """What is taken for no noise at all."""
        return SINGULAR * self.total / len(self.mean_D)

    def noise(self, num_components: int) -> float:
        """Return the mean of the D - M smallest eigenvalues, s^2 of PPCA (Tipping and Bishop 1999, eq. 8)."""
        left = self.total - float(self.variance_M[:num_components].sum())
        return left / (len(self.mean_D) - num_components)


class LinearGaussian(NamedTuple):
    """x = mu + W z + e with z ~ N(0, I), e ~ N(0, s^2 I) and W = U (L - s^2 I)^(1/2), U orthonormal and L diagonal.

    q(z|x) = N(A (x - mu), s^2 L^-1) is then exact, with A = (L - s^2 I)^(1/2) L^-1 U^T: its covariance is diagonal, so
    that a VAE with an affine encoder and decoder is this model, and its ELBO the density (Lucas et al. 2019).

    Args:
        mean_D: mu.
        directions_DM: U.
        variance_M: L, from s^2.
        noise: s^2, ().
        value_variance_D: of each number of the rows that it was fitted to.
    """

    mean_D: Tensor
    directions_DM: Tensor
    variance_M: Tensor
    noise: Tensor
    value_variance_D: Tensor

    @staticmethod
    def of(spectrum: Spectrum, num_components: int) -> LinearGaussian:
        """Return PPCA of M components by maximum likelihood, in float64."""
        kept = spectrum.directions_DM[:, :num_components], spectrum.variance_M[:num_components]
        found = spectrum.mean_D, *kept, np.asarray(spectrum.noise(num_components)), spectrum.value_variance_D
        return LinearGaussian(*(torch.from_numpy(np.ascontiguousarray(one, dtype=np.float64)) for one in found))

    @staticmethod
    def empty(size: int, num_components: int) -> LinearGaussian:
        """Return one to be filled, of D numbers and M components."""
        shapes = (size,), (size, num_components), (num_components,), (), (size,)
        return LinearGaussian(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def gain_M(self) -> Tensor:
        """Return the diagonal of (L - s^2 I)^(1/2)."""
        return (self.variance_M - self.noise).clamp(min=0.0).sqrt()

    def decoder(self) -> tuple[Tensor, Tensor]:
        """Return W^T, (M, D), and mu: x = z W^T + mu."""
        return (self.directions_DM * self.gain_M()).T, self.mean_D

    def encoder(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return A^T, (D, M), -A mu, (M,), and the log variances of q(z|x), (M,)."""
        weight_DM = self.directions_DM * (self.gain_M() / self.variance_M)
        return weight_DM, -self.mean_D @ weight_DM, (self.noise / self.variance_M).log()

    def value_noise(self) -> Tensor:
        """Return what W leaves of the variance of each number, C_dd - (W W^T)_dd, (D,).

        It is the mean over the rows of E[(x - mu - W z)_d^2] under q(z|x), so the noise by number that one step of EM
        goes to from here (factor analysis; Rubin and Thayer 1982): the ELBO of those rows does not fall by it. Its mean
        is s^2.
        """
        return (self.value_variance_D - (self.directions_DM * self.gain_M()).square().sum(1)).clamp(min=0.0)


def of_products(products_DD: np.ndarray, mean_D: np.ndarray, num_rows: int, num_components: int) -> Spectrum:
    """Return the components of N rows from X^T X of their centred numbers X."""
    variance_M, directions_DM = largest(products_DD, num_components)
    variance_M = np.maximum(variance_M / num_rows, 0.0)
    return Spectrum(mean_D, variance_M, _signed(directions_DM), np.diagonal(products_DD) / num_rows, num_rows)


def of_rows(centred_ND: np.ndarray, mean_D: np.ndarray, num_components: int) -> Spectrum:
    """Return the components of rows from their centred numbers.

    The matrix that is decomposed is X^T X (D, D) or, for fewer rows than numbers in a row, X X^T (N, N), whose
    eigenvectors v give those of the covariance as X^T v.
    """
    num_rows, size = centred_ND.shape
    if size <= num_rows:
        return of_products(centred_ND.T @ centred_ND, mean_D, num_rows, num_components)
    _, v_NM = largest(centred_ND @ centred_ND.T, num_components)
    directions_DM, _ = np.linalg.qr(centred_ND.T @ v_NM)
    variance_M = np.square(centred_ND @ directions_DM).mean(0)
    variance_D = np.einsum("nd,nd->d", centred_ND, centred_ND) / num_rows
    return Spectrum(mean_D, variance_M, _signed(directions_DM), variance_D, num_rows)


def _signed(directions_DM: np.ndarray) -> np.ndarray:
    """Return directions whose largest number has a sign that no library chooses."""
    signed_DM: np.ndarray = directions_DM * np.sign(
        np.take_along_axis(directions_DM, np.abs(directions_DM).argmax(0)[None], axis=0)
    )
    return signed_DM


def largest(matrix: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest eigenvalues of a symmetric matrix, the largest first, and their eigenvectors in columns.

    By LAPACK, or for few of many by Lanczos' method to machine precision.
    """
    from scipy.linalg import eigh
    from scipy.sparse.linalg import eigsh

    side = len(matrix)
    if side <= FEW or num > side // 8:
        values, vectors = eigh(matrix, subset_by_index=[side - num, side - 1])
    else:
        start = np.random.default_rng(0).standard_normal(side)
        values, vectors = eigsh(matrix, num, which="LA", v0=start, ncv=min(side, 2 * num + 20), tol=0.0)
        order = np.argsort(values)
        values, vectors = values[order], vectors[:, order]
    return values[::-1], vectors[:, ::-1]
