"""Dirichlet weights in log space, keyed by row, with implicit gradients.

Shape letters: B rows on this rank, E components.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

TRIES = 8
"""Proposals of a draw. One is accepted with probability above 0.95, so all are refused less than once in 10^10."""

NUM_UNIFORM = 2 * TRIES + 1
"""Uniform numbers that a draw needs."""


class _LogGamma(torch.autograd.Function):
    """log g for g ~ Gamma(a, 1), by Marsaglia and Tsang 2000 on a + 1, then log g = log g' + log(u) / a.

    The gradient is the implicit one (Figurnov et al. 2018): d log g / da = (d g' / da) / g' - log(u) / a^2. Taken in
    log space it stays exact for small a, where g itself is 0 in floating point.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, uniform: Tensor) -> Tensor:
        shape, log_u = a.double() + 1.0, uniform[..., -1].double().log()
        d = shape - 1.0 / 3.0
        normal = torch.special.ndtri(uniform[..., :TRIES].double())
        v = (1.0 + normal / (9.0 * d[..., None]).sqrt()).clamp(min=1e-300) ** 3
        bound = 0.5 * normal.square() + d[..., None] * (1.0 - v + v.log())
        accepted = (uniform[..., TRIES : 2 * TRIES].double().log() < bound) & (v > 1e-200)
        accepted[..., -1] = True
        first = accepted.to(torch.uint8).argmax(-1, keepdim=True)
        gamma = d * v.gather(-1, first)[..., 0]
        ctx.save_for_backward(shape, gamma, log_u)
        ctx.dtype = a.dtype
        return (gamma.log() + log_u / a.double()).to(a.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        shape, gamma, log_u = ctx.saved_tensors
        slope = torch._standard_gamma_grad(shape, gamma) / gamma - log_u / (shape - 1.0).square()
        return (grads[0].double() * slope).to(ctx.dtype), None


def log_weights(a_BE: Tensor, uniform_BEU: Tensor) -> Tensor:
    """Return log w with w ~ Dir(a), (B, E): the log softmax of log gammas.

    Args:
        a_BE: the parameters, above 0.
        uniform_BEU: independent uniform numbers on (0, 1), ``NUM_UNIFORM`` for each.

    Examples:
        >>> import torch
        >>> from mixdist.mixtures.dirichlet import NUM_UNIFORM, log_weights
        >>> log_weights(torch.ones(2, 3), torch.full((2, 3, NUM_UNIFORM), 0.5)).exp()
        tensor([[0.3333, 0.3333, 0.3333],
                [0.3333, 0.3333, 0.3333]])
    """
    log_gamma_BE: Tensor = _LogGamma.apply(a_BE, uniform_BEU)
    return torch.log_softmax(log_gamma_BE, dim=-1)


@lru_cache
def _prior(prior: float, num: int, dtype: torch.dtype) -> tuple[float, float]:
    """Return b and K log Gamma(b) - log Gamma(K b) as that type has them: numbers, which no device need be sent."""
    b = torch.tensor(prior, dtype=dtype)
    return b.item(), (num * torch.lgamma(b) - torch.lgamma(num * b)).item()


def dirichlet_kl(a_BE: Tensor, prior: float) -> Tensor:
    """Return KL(Dir(a) || Dir(b, ..., b)), (B,) nats (seed document 002, equation 28).

    Examples:
        >>> import torch
        >>> from mixdist.mixtures.dirichlet import dirichlet_kl
        >>> dirichlet_kl(torch.ones(1, 3), 1.0)
        tensor([0.])
    """
    total_B, num = a_BE.sum(-1), a_BE.shape[-1]
    b, constant = _prior(prior, num, a_BE.dtype)
    slope = ((a_BE - b) * (torch.digamma(a_BE) - torch.digamma(total_B)[..., None])).sum(-1)
    return torch.lgamma(total_B) - torch.lgamma(a_BE).sum(-1) + constant + slope
