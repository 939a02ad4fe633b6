"""Routing: which experts see a row, and with what weight. Pure functions of responsibilities.

Shape letters: B rows on this rank, E experts, K choices of a row, W ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixdist.arguments import check_fields


class RoutingPlan(NamedTuple):
    """The experts that see each of this rank's rows.

    Args:
        routed_BE: True where the expert sees the row.
        lost_B: for each row, the responsibility of the choices that capacity refused.
    """

    routed_BE: Tensor
    lost_B: Tensor


@dataclass(frozen=True)
class TopK:
    """Each row is seen by its k most responsible experts only (Shazeer et al. 2017, section 2.1).

    Ties go to the lowest expert number. With a capacity, an expert takes at most ceil(capacity_factor k N / E) of the
    N rows of the global batch: all first choices before all second ones, and among equals by position in the global
    batch, so that the decision is the same on any layout. Refused responsibility is counted as lost. A row that every
    expert refused trains no expert.

    The weights of the experts that see a row are its responsibilities, ``renormalise``d over those experts or as they
    are. Renormalised ones suit the weighted loss with k from 2 (with k = 1 the weight is 1 and its loss teaches the
    gate nothing; only balance does). As they are, they suit :class:`mixdist.mixtures.SoftMinLoss`: leaving out terms of
    its sum gives a bound. Evaluation renormalises them always: there they are weights of figures and predictions.

    Args:
        k: experts that see a row.
        capacity_factor: of an even load; None for dropless.
        renormalise: whether a row's weights sum to 1.

    Raises:
        ValueError: k below 1, or a capacity factor that is not positive.

    Examples:
        >>> import torch
        >>> from mixdist.mixtures import TopK
        >>> log_resp = torch.tensor([[0.2, 0.7, 0.1], [0.4, 0.2, 0.4]]).log()
        >>> top = TopK(k=2)
        >>> top.choices(log_resp)  # ties go to the lowest number
        tensor([[1, 0],
                [0, 2]])
        >>> top.log_weights(log_resp, torch.tensor([[True, True, False], [True, False, True]])).exp()
        tensor([[0.2222, 0.7778, 0.0000],
                [0.5000, 0.0000, 0.5000]])
        >>> TopK(k=1, capacity_factor=1.0).capacity(num_rows=100, num_experts=3)
        34
    """

    k: int = 2
    capacity_factor: float | None = None
    renormalise: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "TopK's ")
        if self.k < 1:
            raise ValueError(f"TopK's k ({self.k}) must be at least 1: give the number of experts that see a row")
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise ValueError(
                f"TopK's capacity_factor ({self.capacity_factor}) must be a positive number: 1 is an even load, null "
                f"refuses nothing"
            )

    def choices(self, log_resp_BE: Tensor) -> Tensor:
        """Return the experts of each row (B, K), the most responsible first; E stands for none.

        An expert without any responsibility for a row is never chosen.
        """
        # A stable descending sort keeps equals in ascending order of expert; topk promises nothing.
        values, experts = log_resp_BE.detach().sort(dim=1, descending=True, stable=True)
        none = log_resp_BE.shape[1]
        return experts[:, : self.k].masked_fill(values[:, : self.k] == -math.inf, none)

    def capacity(self, num_rows: int, num_experts: int) -> int | None:
        """Return how many rows of a global batch an expert takes at most; None for all."""
        if self.capacity_factor is None:
            return None
        return math.ceil(self.capacity_factor * self.k * num_rows / num_experts)

    def log_weights(self, log_resp_BE: Tensor, routed_BE: Tensor) -> Tensor:
        """Return the log weights (B, E) of the experts that see each row, -inf for the others; the gradient flows.

        Renormalised weights are a softmax over the chosen experts' logits alone: that of any other expert gets a
        gradient of exactly 0, also through a gate that takes the log-softmax over all.
        """
        if not self.renormalise:
            return log_resp_BE.masked_fill(~routed_BE, -math.inf)
        log_weights_BE: Tensor = _OverChosen.apply(log_resp_BE, routed_BE)
        return log_weights_BE

    def untrained_log_weights(self, log_resp_BE: Tensor) -> Tensor:
        """Return the log weights (B, E) of figures and predictions: whatever training does, they sum to 1."""
        choices_BK = self.choices(log_resp_BE)
        plan = lay_out(log_resp_BE, choices_BK, choices_BK < log_resp_BE.shape[1])
        return replace(self, renormalise=True).log_weights(log_resp_BE, plan.routed_BE)


class _OverChosen(torch.autograd.Function):
    """log r_e - log sum_f r_f over the chosen experts f of each row; -inf for experts that are not chosen."""

    @staticmethod
    def forward(ctx: Any, log_resp_BE: Tensor, routed_BE: Tensor) -> Tensor:
        kept_BE = log_resp_BE.masked_fill(~routed_BE, -math.inf)
        total_B1 = kept_BE.masked_fill(~routed_BE.any(1, keepdim=True), 0.0).logsumexp(1, keepdim=True)
        log_weights_BE = kept_BE - total_B1
        ctx.save_for_backward(log_weights_BE)
        return log_weights_BE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (log_weights_BE,) = ctx.saved_tensors
        grad_BE = grads[0].masked_fill(log_weights_BE == -math.inf, 0.0)
        return zero_sum(grad_BE - log_weights_BE.exp() * grad_BE.sum(1, keepdim=True)), None


def zero_sum(grad_BE: Tensor) -> Tensor:
    """Return a gradient whose rows sum to 0 but for rounding as one whose rows sum to exactly 0, in any order.

    The gradient of a log-softmax takes p_e times a row's sum from each logit. What rounding leaves of that sum would be
    all that an expert gets which the row did not choose, and Adam, which divides a gradient by its size, makes steps of
    it that no two layouts agree on. Each of a row's n numbers is rounded to a multiple of a power of 2 so large that
    their sums are exact, and the largest takes up what remains: a change in its last log2 n bits.
    """
    most_B1, largest_B1 = grad_BE.abs().max(1, keepdim=True)
    others_B1 = ((grad_BE != 0).sum(1, keepdim=True).to(grad_BE.dtype) - 1).clamp(min=0.5)
    # x / mantissa is the power of 2 next above x, exactly.
    powers_B1 = [x / torch.frexp(x).mantissa for x in (most_B1, others_B1)]
    unit_B1 = powers_B1[0] * powers_B1[1] * torch.finfo(grad_BE.dtype).eps
    whole_BE = (grad_BE / unit_B1).round()
    whole_BE = whole_BE.scatter_add(1, largest_B1, -whole_BE.sum(1, keepdim=True))
    return (whole_BE * unit_B1).masked_fill((most_B1 == 0) | (unit_B1 == 0), 0.0)


def demand(choices_BK: Tensor, num_experts: int) -> Tensor:
    """Return how many rows choose each expert as their first, second, ... choice: (K, E) int64."""
    return _one_hot(choices_BK, num_experts).sum(0)


def admitted(choices_BK: Tensor, demand_WKE: Tensor, rank: int, capacity: int | None) -> Tensor:
    """Return which choices of this rank's rows the capacity admits: (B, K) bool.

    Args:
        choices_BK: experts of this rank's rows.
        demand_WKE: every rank's demand, ranks in the order of the global batch.
        rank: this rank.
        capacity: rows that an expert takes; None for all.
    """
    num_experts = demand_WKE.shape[2]
    asked_BK = choices_BK < num_experts
    if capacity is None:
        return asked_BK
    demand_KE = demand_WKE.sum(0)
    earlier_KE = demand_KE.cumsum(0) - demand_KE + demand_WKE[:rank].sum(0)
    asked_BKE = _one_hot(choices_BK, num_experts)
    place_BKE = asked_BKE.cumsum(0) - asked_BKE + earlier_KE
    return asked_BK & (asked_BKE * (place_BKE < capacity)).sum(2).bool()


def lay_out(log_resp_BE: Tensor, choices_BK: Tensor, admitted_BK: Tensor) -> RoutingPlan:
    """Return the admitted choices as a mask over experts, with the lost responsibility."""
    num_experts = log_resp_BE.shape[1]
    routed_BE = (_one_hot(choices_BK, num_experts) * admitted_BK[..., None]).sum(1).bool()
    chosen_BE = _one_hot(choices_BK, num_experts).sum(1).bool()
    refused_BE = log_resp_BE.detach().exp().masked_fill(~chosen_BE | routed_BE, 0.0)
    return RoutingPlan(routed_BE, refused_BE.sum(1))


def _one_hot(choices_BK: Tensor, num_experts: int) -> Tensor:
    """Return the choices one-hot, (B, K, E) int64; no expert is a row of zeros."""
    return torch.nn.functional.one_hot(choices_BK, num_experts + 1)[..., :num_experts]


def responsible(log_resp_BE: Tensor) -> Tensor:
    """Return each row's most responsible expert (B,); ties go to the lowest number.

    torch's argmax does not specify which of several equal maxima it returns, so it is not used.

    Raises:
        ValueError: a responsibility is not a number.
    """
    if log_resp_BE.isnan().any():
        bad = int(log_resp_BE.isnan().any(1).sum())
        raise ValueError(f"the gate's output is not a number for {bad} rows: look for bad rows, or train again")
    num_experts = log_resp_BE.shape[1]
    is_best = log_resp_BE == log_resp_BE.max(dim=1, keepdim=True).values
    ids = torch.arange(num_experts, device=log_resp_BE.device)
    return torch.where(is_best, ids, num_experts).min(dim=1).values
