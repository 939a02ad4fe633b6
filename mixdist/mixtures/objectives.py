"""Objectives of soft mixtures: pure functions of responsibilities and the experts' losses.

Shape letters: B rows on this rank, E experts. N is the number of rows of the global batch. Every objective is

    L = 1/N sum_n rows(n) + balance(sum_n r_n, N)

so local row losses sum to the global loss, and the one statistic of the batch, the summed responsibilities, is passed
in already summed over all ranks. Schedules are set by ``anneal``, a pure function of the phase's step, so a resumed
run continues exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixdist.arguments import check_arguments
from mixdist.stats import Warmup, annealed, check_steps, entropy, ramp, temperatures


class Balance:
    """Base of balance terms, which keep the gate from giving all rows to one expert.

    Examples:
        >>> import torch
        >>> from mixdist.mixtures import Balance
        >>> class Largest(Balance):
        ...     def __call__(self, resp_sum_E, num_rows):
        ...         return resp_sum_E.max() / num_rows
        >>> Largest()(torch.tensor([60.0, 40.0]), num_rows=100)
        tensor(0.6000)
    """

    def __call__(self, resp_sum_E: Tensor, num_rows: int) -> Tensor:
        """Return the term from the responsibilities summed over the global batch (E,) and its number of rows."""
        raise NotImplementedError(f"{type(self).__name__} has no __call__")

    def anneal(self, step: int) -> None:
        """Set the weight for training step ``step`` of the phase (from 0)."""


class _Weighted(Balance):
    """A balance term with a weight that rises linearly from 0 over ``warmup_steps``; constant if they are 0."""

    def __init__(self, weight: float, warmup_steps: int | Warmup) -> None:
        kind = type(self).__name__
        check_arguments(_Weighted.__init__, locals(), f"{kind}'s ")
        if not 0 <= weight < math.inf:
            raise ValueError(f"{kind}'s weight ({weight}) must be 0 or more: a negative one would reward collapse")
        check_steps(f"{kind}'s warmup_steps", warmup_steps)
        self.weight, self.warmup_steps, self.weight_now = weight, warmup_steps, weight

    def anneal(self, step: int) -> None:
        self.weight_now = self.weight * ramp(step, self.warmup_steps)


class VarianceBalance(_Weighted):
    """weight * Var_e(sum_n r_ne), the population variance over experts: the form of seed document 000's authors.

    It grows with the square of the batch size, as theirs does (weight 0.1 at batch 100).

    Args:
        weight: of the term.
        warmup_steps: training steps of a phase over which the weight rises linearly from 0, or a
            :class:`mixdist.stats.Warmup`, as ``{epochs: 2}``.

    Raises:
        ValueError: a negative weight or number of steps.

    Examples:
        >>> import torch
        >>> from mixdist.mixtures import VarianceBalance
        >>> VarianceBalance(weight=0.1)(torch.tensor([60.0, 40.0]), num_rows=100)
        tensor(10.)
    """

    def __init__(self, weight: float = 0.1, warmup_steps: int | Warmup = 0) -> None:
        super().__init__(weight, warmup_steps)

    def __call__(self, resp_sum_E: Tensor, num_rows: int) -> Tensor:
        return self.weight_now * resp_sum_E.var(correction=0)


class KLBalance(_Weighted):
    """weight * KL(mean_n r_n || uniform) = weight * sum_e m_e log(m_e E), nats; the same at any batch size.

    Args:
        weight: of the term.
        warmup_steps: training steps of a phase over which the weight rises linearly from 0, or a
            :class:`mixdist.stats.Warmup`, as ``{epochs: 2}``.

    Raises:
        ValueError: a negative weight or number of steps.

    Examples:
        >>> import torch
        >>> from mixdist.mixtures import KLBalance
        >>> balance = KLBalance(weight=1.0)
        >>> balance(torch.tensor([50.0, 50.0]), num_rows=100)
        tensor(0.)
        >>> balance(torch.tensor([100.0, 0.0]), num_rows=100)  # log 2
        tensor(0.6931)
    """

    def __init__(self, weight: float = 1.0, warmup_steps: int | Warmup = 0) -> None:
        super().__init__(weight, warmup_steps)

    def __call__(self, resp_sum_E: Tensor, num_rows: int) -> Tensor:
        mean_E = resp_sum_E / num_rows
        # The clamp keeps the gradient finite for an expert without any responsibility; m log m is 0 there anyway.
        ratio_E = (mean_E * mean_E.numel()).clamp(min=torch.finfo(mean_E.dtype).tiny)
        return self.weight_now * (mean_E * ratio_E.log()).sum()


class Objective:
    """Base of the objectives of soft mixtures: rows(n) = expert_rows(n) - w H(r_n), H the entropy of a row, nats.

    Subclasses define ``expert_rows``. A positive w rewards responsibilities that are spread out, so that all experts
    learn before the gate decides; a negative one rewards clear decisions, and together with a balance term maximises
    the mutual information of row and expert (Bridle et al. 1992; Krause et al. 2010, eq. 3).

    Args:
        balance: the term over the batch, or None.
        entropy_bonus: w at the start of a phase; a negative one is a penalty.
        entropy_steps: training steps of a phase over which w goes linearly to 0; 0 keeps it constant.

    Attributes:
        linear: whether a row's loss is linear in the experts' losses, with the responsibilities as its coefficients.
        reads_losses: whether ``expert_rows`` reads the experts' losses; if not, rows are not sent and no expert runs.

    Raises:
        ValueError: a bonus that is not finite, or a negative number of steps.

    Examples:
        >>> import torch
        >>> from mixdist.mixtures import Objective
        >>> class Least(Objective):
        ...     def expert_rows(self, log_resp_BE, losses_BE):
        ...         return losses_BE.min(1).values
        >>> Least(entropy_bonus=1.0).rows(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[2.0, 10.0]]))  # 2 - log 2
        tensor([1.3069])
    """

    linear: bool = False
    reads_losses: bool = True
    entropy_weight: float = 0.0

    def __init__(self, balance: Balance | None = None, entropy_bonus: float = 0.0, entropy_steps: int = 0) -> None:
        kind = type(self).__name__
        check_arguments(Objective.__init__, locals(), f"{kind}'s ")
        if not math.isfinite(entropy_bonus):
            raise ValueError(f"{kind}'s entropy_bonus ({entropy_bonus}) must be a finite number: give 0 for none")
        check_steps(f"{kind}'s entropy_steps", entropy_steps)
        self.balance, self.entropy_bonus, self.entropy_steps = balance, entropy_bonus, entropy_steps
        self.entropy_weight = entropy_bonus

    def anneal(self, step: int) -> None:
        """Set the weights for training step ``step`` of the phase (from 0)."""
        left = 1.0 - ramp(step, self.entropy_steps) if self.entropy_steps else 1.0
        self.entropy_weight = self.entropy_bonus * left
        if self.balance is not None:
            self.balance.anneal(step)

    def rows(self, log_resp_BE: Tensor, losses_BE: Tensor) -> Tensor:
        """Return each row's loss (B,) from the log responsibilities and the experts' losses, nats."""
        return self.expert_rows(log_resp_BE, losses_BE) + self.gate_rows(log_resp_BE)

    def gate_rows(self, log_resp_BE: Tensor) -> Tensor:
        """Return the part of each row's loss (B,) that depends on the responsibilities alone: -w H(r_n), nats."""
        if not self.entropy_weight:
            return torch.zeros_like(log_resp_BE[:, 0])
        return -self.entropy_weight * entropy(log_resp_BE, dim=-1)

    def expert_rows(self, log_resp_BE: Tensor, losses_BE: Tensor) -> Tensor:
        """Return the part of each row's loss (B,) from the experts' losses, nats; their weights are exp(log_resp)."""
        raise NotImplementedError(f"{type(self).__name__} has no expert_rows")


class WeightedLoss(Objective):
    """sum_e r_ne l_ne - w H(r_n): the loss of seed document 000, where w = 0; linear in the experts' losses.

    Examples:
        >>> import torch
        >>> from mixdist.mixtures import WeightedLoss
        >>> log_resp, losses = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[2.0, 10.0]])
        >>> WeightedLoss().rows(log_resp, losses)
        tensor([4.])
    """

    linear = True

    def expert_rows(self, log_resp_BE: Tensor, losses_BE: Tensor) -> Tensor:
        return (log_resp_BE.exp() * losses_BE).sum(-1)


class SoftMinLoss(Objective):
    """-T log sum_e r_ne exp(-l_ne / T) - w H(r_n), nats: a soft minimum of the experts' losses, weighted by the gate.

    With T = 1 and w = 0 it is the loss of Jacobs et al. 1991 (eq. 1.3) and of seed document 001, section 4: where the
    experts' losses are -log p_e(y|x) and the gate reads x alone, it is -log p(y|x), a negative log-likelihood. With
    losses of x and a gate that reads x it is none, nor a bound of one: sum_e r_e(x) p_e(x) is no density of x, and
    exceeds that of the mixture by a factor of up to the number of experts.

    A larger T lets experts share rows: expert e learns from row n with weight r_ne exp(-l_ne / T) / sum_f r_nf
    exp(-l_nf / T), the tempered posterior of deterministic annealing (Ueda and Nakano 1998), and L goes to the weighted
    loss as T grows. Losses of images differ by hundreds of nats between experts, so that with T = 1 a row usually
    trains a single expert. T may be annealed within a phase, from soft to hard: it goes geometrically from
    ``temperature`` to ``final_temperature``. L rises with T, and is at most the weighted loss; as T goes to 0 it goes
    to the least of the losses.

    Args:
        balance: as in :class:`Objective`.
        entropy_bonus: as in :class:`Objective`.
        entropy_steps: as in :class:`Objective`.
        temperature: T, nats.
        final_temperature: T after ``anneal_steps``; unset, it stays.
        anneal_steps: training steps of a phase over which T gets there, or a :class:`mixdist.stats.Warmup`, as
            ``{epochs: 5}``.

    Raises:
        ValueError: a temperature that is not finite and above 0; a final one without steps, or steps without one.

    Examples:
        >>> import torch
        >>> from mixdist.mixtures import SoftMinLoss
        >>> log_resp, losses = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[2.0, 10.0]])
        >>> SoftMinLoss().rows(log_resp, losses)  # -log(0.75 exp(-2) + 0.25 exp(-10))
        tensor([2.2876])
        >>> SoftMinLoss(temperature=1000.0).rows(log_resp, losses)  # near the weighted loss, 4
        tensor([3.9940])
    """

    def __init__(
        self,
        balance: Balance | None = None,
        entropy_bonus: float = 0.0,
        entropy_steps: int = 0,
        temperature: float = 1.0,
        final_temperature: float | None = None,
        anneal_steps: int | Warmup = 0,
    ) -> None:
        super().__init__(balance, entropy_bonus, entropy_steps)
        check_arguments(SoftMinLoss.__init__, locals(), "SoftMinLoss's ")
        self.temperatures = temperatures("SoftMinLoss", temperature, final_temperature, anneal_steps)
        self.temperature, self.anneal_steps = temperature, anneal_steps

    def anneal(self, step: int) -> None:
        super().anneal(step)
        self.temperature = annealed(step, self.anneal_steps, *self.temperatures)

    def expert_rows(self, log_resp_BE: Tensor, losses_BE: Tensor) -> Tensor:
        return -self.temperature * torch.logsumexp(log_resp_BE - losses_BE / self.temperature, dim=-1)


class GateLoss(Objective):
    """-w H(r_n) alone, 0 where w is 0: the gate learns by its own loss without the experts, and they do not learn.

    For gates that are models, such as :class:`mixdist.gates.VaDE`, as pretraining or for a run without experts
    (:class:`mixdist.experts.Silent`).

    Examples:
        >>> import torch
        >>> from mixdist.mixtures import GateLoss
        >>> GateLoss().rows(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[2.0, 10.0]]))
        tensor([0.])
    """

    reads_losses = False

    def expert_rows(self, log_resp_BE: Tensor, losses_BE: Tensor) -> Tensor:
        return torch.zeros_like(log_resp_BE[..., 0])


class Information(GateLoss):
    """-w H(r_n) alone: the gate learns without the experts, and they do not learn.

    With w = -1 and ``KLBalance`` this is -I(row; expert) up to a constant, the mutual information that a discriminative
    clusterer maximises (Krause et al. 2010, eq. 3, as in IMSAT, Hu et al. 2017, eq. 6, whose mu is the balance's
    weight): a phase of pretraining for gates, mostly :class:`mixdist.gates.Consistent`.

    Examples:
        >>> import torch
        >>> from mixdist.mixtures import Information
        >>> log_resp = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).log()
        >>> Information().rows(log_resp, torch.zeros(2, 2))  # a clear decision costs nothing, an even one log 2
        tensor([0.6931, 0.0000])
    """

    def __init__(self, balance: Balance | None = None, entropy_bonus: float = -1.0, entropy_steps: int = 0) -> None:
        super().__init__(balance, entropy_bonus, entropy_steps)
