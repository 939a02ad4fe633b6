"""Bounds of log p(x) over several proposals, and their gradients: pure functions.

Shape letters: B rows, N proposals of a row, J densities of a mixture that they are compared with, S samples,
L latent.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mixdist.experts.location_scale import LocationScale


def looser(log_w_BNS: Tensor, valid_BN: Tensor) -> Tensor:
    """Return mean_n log mean_s w_ns over the valid n, (B,) nats: the objective of seed document 003.

    Examples:
        >>> import torch
        >>> from mixdist.mixtures.bounds import looser, tighter
        >>> log_w, both = torch.tensor([[[1.0, 1.0], [3.0, 3.0]]]), torch.ones(1, 2, dtype=torch.bool)
        >>> looser(log_w, both), tighter(log_w, both)  # 2, log of (e + e^3) / 2
        (tensor([2.]), tensor([2.4338]))
    """
    each_BN = torch.logsumexp(log_w_BNS, -1) - math.log(log_w_BNS.shape[-1])
    return torch.where(valid_BN, each_BN, 0.0).sum(-1) / valid_BN.sum(-1).clamp(min=1)


def tighter(log_w_BNS: Tensor, valid_BN: Tensor) -> Tensor:
    """Return log mean_ns w_ns over the valid n, (B,) nats: at least ``looser``, and at most log p(x) in the mean."""
    log_w_BNS = log_w_BNS.masked_fill(~valid_BN[..., None], -math.inf)
    count_B = valid_BN.sum(-1).clamp(min=1) * log_w_BNS.shape[-1]
    return torch.logsumexp(log_w_BNS.flatten(1), -1) - count_B.to(log_w_BNS.dtype).log()


def log_densities(kind: LocationScale, z_BNSL: Tensor, loc_BJL: Tensor, scale_BJL: Tensor) -> Tensor:
    """Return log q_j(z_ns), (B, J, N, S) nats."""
    return kind.log_prob(z_BNSL[:, None], loc_BJL[:, :, None, None], scale_BJL[:, :, None, None]).sum(-1)


def log_mixture(log_q_BJNS: Tensor, valid_BJ: Tensor) -> Tensor:
    """Return log of the mean of the valid densities, (B, N, S) nats."""
    count_B = valid_BJ.sum(-1).clamp(min=1).to(log_q_BJNS.dtype)
    masked = log_q_BJNS.masked_fill(~valid_BJ[..., None, None], -math.inf)
    return torch.logsumexp(masked, 1) - count_B.log()[:, None, None]


class Weights:
    """The normalised weights w~ of a row's samples, known once the backward pass has come by.

    The gradient that arrives for log p(x_d|z_ns) is -factor w~_ns: what is needed to weigh the gradient of z_ns crosses
    no wire of its own.
    """

    value_BNS: Tensor

    def read_from(self, score_BNS: Tensor, factor_B: Tensor) -> None:
        """Read them off the gradient of scores, -factor w~, when it arrives."""

        def read(grad: Tensor) -> None:
            self.value_BNS = -grad / factor_B[:, None, None]

        score_BNS.register_hook(read)


class DoublyReparametrised(torch.autograd.Function):
    """z_ns ~ q_n as it is, with the doubly reparametrised gradient for a mixture 1/J sum_j q_j in the denominator.

    IWAE's gradient has the term -sum w~_ns r_j(z_ns) d log q_j(z_ns), r_j the responsibility of j for z_ns; it holds
    most of the variance. Written as a path through z = loc_j + scale_j e (Tucker et al. 2019, equation 7, where z is
    q_j's own; Bauer and Mnih 2021, equation 8, where z is another's), with g the gradient of log w at z, it is

        -sum w~ r_j [(1 - w~) g + d/dz log r_n] dz/d(loc_j, scale_j).

    Where posteriors do not overlap, a gradient of w~^2 g is left, which alone is biased where they do. This class has
    the first term in the brackets, for the part of g that arrives here; :func:`responsibility_slope` has the second.
    """

    @staticmethod
    def forward(
        ctx: Any, z_BNSL: Tensor, loc_BJL: Tensor, scale_BJL: Tensor, resp_BJNS: Tensor, weights: Weights
    ) -> Tensor:
        ctx.save_for_backward(z_BNSL, loc_BJL, scale_BJL, resp_BJNS)
        ctx.weights = weights
        return z_BNSL.view_as(z_BNSL)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, loc, scale, resp = ctx.saved_tensors
        return grads[0], *through(resp * (1 - ctx.weights.value_BNS)[:, None], grads[0], z, loc, scale), None, None


def through(factor_BJNS: Tensor, grad_BNSL: Tensor, z: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return -sum_ns factor grad dz/d(loc_j, scale_j) at z = loc_j + scale_j e: two gradients (B, J, L)."""
    of_loc = -torch.einsum("bjns,bnsl->bjl", factor_BJNS, grad_BNSL)
    of_product = -torch.einsum("bjns,bnsl->bjl", factor_BJNS, grad_BNSL * z)
    return of_loc, (of_product - loc * of_loc) / scale


def responsibility_slope(kind: LocationScale, z: Tensor, loc: Tensor, scale: Tensor, resp_BJNS: Tensor) -> Tensor:
    """Return d/dz log r_n(z_ns), (B, N, S, L), where the N proposals are the J densities."""
    slope_BJNSL = kind.slope(z[:, None], loc[:, :, None, None], scale[:, :, None, None])
    own = slope_BJNSL.diagonal(dim1=1, dim2=2).movedim(-1, 1)
    return own - torch.einsum("bjns,bjnsl->bnsl", resp_BJNS, slope_BJNSL)
