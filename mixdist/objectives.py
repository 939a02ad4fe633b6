"""What a soft mixture minimises: pure functions of responsibilities and the experts' losses.

Shape letters: B rows on this rank, E experts. N is the number of rows of the global batch. Every objective is

    L = 1/N sum_n rows(n) + balance(sum_n r_n, N)

so local row losses sum to the global loss, and the one statistic of the batch, the summed responsibilities, is handed
in already summed over all ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Balance:
    """A term that keeps the gate from giving all rows to one expert."""

    def __call__(self, resp_sum_E: Tensor, num_rows: int) -> Tensor:
        """Give the term from the responsibilities summed over the global batch (E,) and its number of rows."""
        raise NotImplementedError(f"{type(self).__name__} has no __call__")


def _check_weight(kind: str, weight: float) -> None:
    if not 0 <= weight < math.inf:
        raise ValueError(f"{kind}'s weight ({weight}) must be 0 or more: a negative one would reward collapse")


class VarianceBalance(Balance):
    """weight * Var_e(sum_n r_ne), the population variance over experts: the form of seed document 000's authors.

    It grows with the square of the batch size, as theirs does (weight 0.1 at batch 100).
    """

    def __init__(self, weight: float = 0.1) -> None:
        _check_weight("VarianceBalance", weight)
        self.weight = weight

    def __call__(self, resp_sum_E: Tensor, num_rows: int) -> Tensor:
        return self.weight * resp_sum_E.var(correction=0)


class KLBalance(Balance):
    """weight * KL(mean_n r_n || uniform) = weight * sum_e m_e log(m_e E), nats; the same at any batch size."""

    def __init__(self, weight: float = 1.0) -> None:
        _check_weight("KLBalance", weight)
        self.weight = weight

    def __call__(self, resp_sum_E: Tensor, num_rows: int) -> Tensor:
        mean_E = resp_sum_E / num_rows
        # The clamp keeps the gradient finite for an expert without any responsibility; m log m is 0 there anyway.
        ratio_E = (mean_E * mean_E.numel()).clamp(min=torch.finfo(mean_E.dtype).tiny)
        return self.weight * (mean_E * ratio_E.log()).sum()


class Objective:
    """Base of the objectives of soft mixtures.

    Args:
        balance: the term over the batch, or None.

    Attributes:
        linear: whether a row's loss is linear in the experts' losses, with the responsibilities as its coefficients.
    """

    linear: bool = False

    def __init__(self, balance: Balance | None = None) -> None:
        self.balance = balance

    def rows(self, log_resp_BE: Tensor, losses_BE: Tensor) -> Tensor:
        """Give each row's loss (B,) from the log responsibilities and the experts' losses, nats."""
        raise NotImplementedError(f"{type(self).__name__} has no rows")


class WeightedLoss(Objective):
    """sum_e r_ne l_ne: the loss of seed document 000; linear in the experts' losses."""

    linear = True

    def rows(self, log_resp_BE: Tensor, losses_BE: Tensor) -> Tensor:
        return (log_resp_BE.exp() * losses_BE).sum(-1)


class MixtureLikelihood(Objective):
    """-log sum_e r_ne exp(-l_ne), nats: the likelihood form of the mixture (seed document 001, section 4).

    It is a negative log-likelihood (or a bound on it) where the experts' losses are.
    """

    def rows(self, log_resp_BE: Tensor, losses_BE: Tensor) -> Tensor:
        return -torch.logsumexp(log_resp_BE - losses_BE, dim=-1)
