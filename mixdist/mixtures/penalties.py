"""Penalties on the latents of the whole batch, in a mixture with one decoder.

Shape letters: N rows of the global batch, E components, L latent. Each is a pure function of the batch's draws z and of
the means and log variances of q(z|x), which every rank is given in full.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


class Penalty:
    """Base of penalties: subclass it and return one number, nats.

    Args:
        weight: beta of the objective.

    Raises:
        ValueError: a weight below 0.

    Examples:
        >>> import torch
        >>> from mixdist.mixtures import Penalty
        >>> class Far(Penalty):
        ...     def __call__(self, z_NEL, mean_NEL, log_var_NEL):
        ...         return mean_NEL.square().mean()
        >>> Far(2.0)(*[torch.ones(4, 2, 3)] * 3)
        tensor(1.)
    """

    def __init__(self, weight: float = 1.0) -> None:
        if not 0 <= weight < math.inf:
            raise ValueError(f"{type(self).__name__}'s weight ({weight}) must be a number from 0: give 0 for none")
        self.weight = weight

    def __call__(self, z_NEL: Tensor, mean_NEL: Tensor, log_var_NEL: Tensor) -> Tensor:
        """Return the penalty of a batch, without its weight."""
        raise NotImplementedError(f"{type(self).__name__} has no __call__")


class DHSIC(Penalty):
    """The d-variable Hilbert-Schmidt independence criterion of the components' latents, by its V-statistic.

    Seed document 002, equation 15, after Pfister et al. 2018, definition 2.6: with Gaussian kernels k_i(z, z') =
    exp(-g_i |z - z'|^2),

        1/N^2 sum_nm prod_i k_i(n, m) + prod_i 1/N^2 sum_nm k_i(n, m) - 2/N sum_n prod_i 1/N sum_m k_i(n, m).

    Args:
        weight: beta; the text has 1.
        bandwidth: g_i = 1 / (2 s^2), with s the median distance of two different rows (detached), or, as the authors'
            code has it, s = 2 Gamma((L + 1) / 2) / Gamma(L / 2), the mean distance of standard normal draws.
        root: the square root of the criterion, as the authors' code has it.

    Examples:
        >>> import torch
        >>> from mixdist.mixtures import DHSIC
        >>> z = torch.arange(4.0).reshape(4, 1, 1).expand(4, 2, 1)  # the same twice
        >>> bool(DHSIC()(z, z, z) > 0.01)
        True
    """

    def __init__(
        self, weight: float = 1.0, bandwidth: Literal["median", "normal"] = "median", root: bool = False
    ) -> None:
        super().__init__(weight)
        self.bandwidth, self.root = bandwidth, root

    def __call__(self, z_NEL: Tensor, mean_NEL: Tensor, log_var_NEL: Tensor) -> Tensor:
        kernel_ENN = self._kernels(z_NEL.transpose(0, 1).contiguous())
        joint = kernel_ENN.prod(0).mean()
        row_EN = kernel_ENN.mean(-1)
        found = joint + row_EN.mean(-1).prod() - 2.0 * row_EN.prod(0).mean()
        if not self.root:
            return found
        return found.clamp(min=1e-12).sqrt()  # the slope of a root has no end at 0

    def _kernels(self, z_ENL: Tensor) -> Tensor:
        squared_ENN = (z_ENL[:, :, None] - z_ENL[:, None]).square().sum(-1)
        if self.bandwidth == "normal":
            size = z_ENL.shape[-1]
            scale = 2.0 * math.exp(math.lgamma((size + 1) / 2) - math.lgamma(size / 2))
            return torch.exp(-squared_ENN / (2.0 * scale**2))
        return median_kernel(squared_ENN)


class MMD(Penalty):
    """The maximum mean discrepancy of z and N(0, I), unbiased, mean over components (Tolstikhin et al. 2018).

    The kernel is the sum of inverse multiquadratics c / (c + |z - z'|^2) with c = 2 L s, s in 0.1, 0.2, 0.5, 1, 2, 5,
    10. In place of draws of the prior stand points of a Sobol sequence, the same in every step.

    Args:
        weight: beta.

    Examples:
        >>> import torch
        >>> from mixdist.mixtures import MMD
        >>> bool(MMD()(*[torch.full((4, 1, 2), 5.0)] * 3) > 1)
        True
    """

    SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

    def __call__(self, z_NEL: Tensor, mean_NEL: Tensor, log_var_NEL: Tensor) -> Tensor:
        z_ENL = z_NEL.transpose(0, 1)
        num, size = z_ENL.shape[1:]
        prior_NL = _prior_points(num, size, z_ENL.dtype, z_ENL.device)
        own_ENN, cross_ENN = self._kernel(z_ENL, z_ENL), self._kernel(z_ENL, prior_NL.expand_as(z_ENL))
        prior_NN = self._kernel(prior_NL, prior_NL)
        pairs = max(num * (num - 1), 1)
        within_E = (own_ENN.sum((1, 2)) - own_ENN.diagonal(dim1=1, dim2=2).sum(-1)) / pairs
        prior = (prior_NN.sum() - prior_NN.diagonal().sum()) / pairs
        return (within_E + prior - 2.0 * cross_ENN.mean((1, 2))).mean()

    def _kernel(self, x: Tensor, y: Tensor) -> Tensor:
        squared = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
        scales = [2.0 * x.shape[-1] * scale for scale in self.SCALES]
        return torch.stack([c / (c + squared) for c in scales]).sum(0)


class W2(Penalty):
    """The squared Wasserstein-2 distance of N(m, S), the moments of z over the batch, to N(0, I), mean over components.

    |m|^2 + tr(S + I - 2 S^(1/2)) (Zhang et al. 2019, Wasserstein-Wasserstein auto-encoders).

    Args:
        weight: beta.

    Examples:
        >>> import torch
        >>> from mixdist.mixtures import W2
        >>> W2()(*[torch.full((4, 1, 2), 5.0)] * 3).round()  # a point at (5, 5)
        tensor(52.)
    """

    def __call__(self, z_NEL: Tensor, mean_NEL: Tensor, log_var_NEL: Tensor) -> Tensor:
        z_ENL = z_NEL.transpose(0, 1).double()
        middle_EL = z_ENL.mean(1)
        centred = z_ENL - middle_EL[:, None]
        covariance_ELL = centred.mT @ centred / z_ENL.shape[1]
        size = covariance_ELL.shape[-1]
        identity = torch.eye(size, dtype=covariance_ELL.dtype, device=z_ENL.device)
        roots_EL = torch.linalg.eigvalsh(covariance_ELL + 1e-9 * identity).clamp(min=1e-12).sqrt()
        trace_E = covariance_ELL.diagonal(dim1=1, dim2=2).sum(-1) + size - 2.0 * roots_EL.sum(-1)
        return (middle_EL.square().sum(-1) + trace_E).mean().to(z_NEL.dtype)


class MutualPosterior(Penalty):
    """Mutual posterior divergence of all pairs of rows: -eta mean log sigmoid(D / eta) + gamma std D (Ma et al. 2019).

    D is the KL divergence between the posteriors of two different rows, nats.

    Args:
        weight: beta.
        eta: scale of the diversity term, nats.
        gamma: weight of the smoothness term.

    Examples:
        >>> import torch
        >>> from mixdist.mixtures import MutualPosterior
        >>> MutualPosterior(gamma=0.0)(*[torch.zeros(4, 1, 2)] * 3)  # all alike: log 2
        tensor(0.6931)
    """

    def __init__(self, weight: float = 1.0, eta: float = 1.0, gamma: float = 1.0) -> None:
        super().__init__(weight)
        if not 0 < eta < math.inf:
            raise ValueError(f"MutualPosterior's eta ({eta}) must be above 0: give a number of nats")
        self.eta, self.gamma = eta, gamma

    def __call__(self, z_NEL: Tensor, mean_NEL: Tensor, log_var_NEL: Tensor) -> Tensor:
        mean_ENL, log_var_ENL = mean_NEL.transpose(0, 1), log_var_NEL.transpose(0, 1)
        num = mean_ENL.shape[1]
        if num < 2:
            return z_NEL.sum() * 0.0
        first, second = (one[:, :, None] for one in (mean_ENL, log_var_ENL))
        other_mean, other_log_var = mean_ENL[:, None], log_var_ENL[:, None]
        ratio = ((first - other_mean).square() + second.exp()) * torch.exp(-other_log_var)
        divergence_ENN = 0.5 * (other_log_var - second + ratio - 1.0).sum(-1)
        # Without the diagonal: what is left of the rows, one after another, begins after it and ends before the next.
        pairs_EP = divergence_ENN.flatten(1)[:, 1:].unflatten(1, (num - 1, num + 1))[:, :, :-1].flatten(1)
        diverse = -self.eta * F.logsigmoid(pairs_EP / self.eta).mean()
        return diverse + self.gamma * (pairs_EP.var(-1, correction=0) + 1e-12).sqrt().mean()


def median_kernel(squared_ENN: Tensor) -> Tensor:
    """Return exp(-d^2 / (2 m)) of squared distances d^2 of rows, m the median of those of two different rows."""
    num = squared_ENN.shape[-1]
    if num < 2:
        return torch.ones_like(squared_ENN)
    first, second = torch.triu_indices(num, num, 1, device=squared_ENN.device)
    median_E = squared_ENN.detach()[:, first, second].median(-1).values.clamp(min=1e-12)
    return torch.exp(-squared_ENN / (2.0 * median_E[:, None, None]))


def sobol_normal(num: int, size: int) -> Tensor:
    """Return evenly spread standard normal points, (num, size) float64: the same for every call."""
    points = torch.quasirandom.SobolEngine(min(size, 21201), scramble=False).draw(num + 1, dtype=torch.float64)[1:]
    return torch.special.ndtri(points.clamp(1e-9, 1.0 - 1e-9))


@lru_cache(maxsize=8)
def _prior_points(num: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``sobol_normal`` on a device, made and sent there once."""
    return sobol_normal(num, size).to(device, dtype)
