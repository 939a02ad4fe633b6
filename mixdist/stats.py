"""Log-densities and divergences in nats, elementwise (the caller sums over a row) unless the docstring says otherwise;
quantiles, which turn uniform numbers into samples; and the ramps of schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor


def normal_sum_log_prob(x: Tensor, mean: Tensor, log_scale: Tensor | float) -> Tensor:
    """Return sum_d log N(x_d; m_d, s^2) = -|x - m|^2 / (2 s^2) - D (log s + log(2 pi) / 2), nats; one scale for all d.

    It sums over features itself: squared differences and their sum take two passes over memory, D densities seven.

    Args:
        x: points (..., D), with the last axes of ``mean``.
        mean: m, (..., D).
        log_scale: log s; a tensor (..., 1) broadcasts with ``mean``.

    Examples:
        >>> normal_sum_log_prob(torch.zeros(3, 2), torch.zeros(3, 2), 0.0)  # -log(2 pi)
        tensor([-1.8379, -1.8379, -1.8379])
    """
    squares = F.mse_loss(mean, x.expand_as(mean), reduction="none").sum(-1)
    if isinstance(log_scale, Tensor):
        log_scale = log_scale.squeeze(-1)
    return -0.5 * _exp(-2.0 * log_scale) * squares - x.shape[-1] * (log_scale + 0.5 * math.log(2.0 * math.pi))


def normal_log_prob(x: Tensor, mean: Tensor, log_scale: Tensor | float) -> Tensor:
    """Return log N(x; m, s^2) = -(x - m)^2 / (2 s^2) - log s - log(2 pi) / 2, nats.

    Args:
        x: points.
        mean: m; broadcasts with ``x``.
        log_scale: log s; broadcasts with ``x``.

    Examples:
        >>> normal_log_prob(torch.tensor([0.0, 1.0]), torch.tensor(0.0), 0.0).exp()
        tensor([0.3989, 0.2420])
    """
    return -0.5 * ((x - mean) * _exp(-log_scale)).square() - log_scale - 0.5 * math.log(2.0 * math.pi)


def laplace_log_prob(x: Tensor, mean: Tensor, log_scale: Tensor | float) -> Tensor:
    """Return log Laplace(x; m, b) = -|x - m| / b - log b - log 2, nats.

    Args:
        x: points.
        mean: m; broadcasts with ``x``.
        log_scale: log b; broadcasts with ``x``.

    Examples:
        >>> laplace_log_prob(torch.tensor([0.0, 1.0]), torch.tensor(0.0), 0.0).exp()
        tensor([0.5000, 0.1839])
    """
    return -(x - mean).abs() * _exp(-log_scale) - log_scale - math.log(2.0)


def logistic_log_prob(x: Tensor, mean: Tensor, log_scale: Tensor | float, num_levels: int = 256) -> Tensor:
    """Return log P(x) = log[sigma((x + h - m) / s) - sigma((x - h - m) / s)], the discretised logistic, nats.

    x is one of ``num_levels`` levels evenly spaced on [0, 1] and h = 1 / (2 (num_levels - 1)) half a step; the first
    level takes all that is below it and the last all that is above, so the mass over the levels sums to 1 (Kingma et
    al. 2016; Salimans et al. 2017, eq. 2, with one component and without autoregression).

    With u and l the two arguments of sigma, sigma(u) - sigma(l) = sigma(u) sigma(-l) (1 - exp(l - u)), and u - l is
    2h / s whatever x and m: no difference of nearly equal numbers is taken, however small s or far m.

    It is a log-probability, not a density. A density that was trained on levels with uniform noise of a step added is
    a lower bound of it, with D log of the step added to the density's log (Theis et al. 2016, section 3.1).

    Args:
        x: levels, numbers k / (num_levels - 1).
        mean: m; broadcasts with ``x``.
        log_scale: log s; broadcasts with ``x``.
        num_levels: how many levels, at least 2.

    Examples:
        >>> levels = torch.arange(256) / 255
        >>> logistic_log_prob(levels, torch.tensor(0.3), -2.0).exp().sum()
        tensor(1.0000)
    """
    half = 0.5 / (num_levels - 1)
    inverse_scale = _exp(-log_scale)
    is_first, is_last = x < half, x > 1.0 - half
    log_below = F.logsigmoid((x + half - mean) * inverse_scale).masked_fill(is_last, 0.0)
    log_above = F.logsigmoid((mean - x + half) * inverse_scale).masked_fill(is_first, 0.0)
    is_between = (~(is_first | is_last)).to(x.dtype)
    return log_below + log_above + _log_bin(2 * half * inverse_scale) * is_between


def bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    """Return x log p + (1 - x) log(1 - p) = x l - log(1 + exp l) with p = sigmoid(l), nats.

    For x of 0 or 1 it is a log-probability. Between them it is the negative cross entropy, which is no density.

    Args:
        x: points in [0, 1].
        logits: l; broadcasts with ``x``.

    Examples:
        >>> bernoulli_log_prob(torch.tensor([0.0, 1.0]), torch.tensor(0.0)).exp()
        tensor([0.5000, 0.5000])
    """
    return x * logits + F.logsigmoid(-logits)


def normal_quantile(u: Tensor, mean: Tensor, log_scale: Tensor | float) -> Tensor:
    """Return m + s Phi^-1(u): distributed as N(m, s^2) where u is uniform on (0, 1).

    Args:
        u: numbers in (0, 1).
        mean: m; broadcasts with ``u``.
        log_scale: log s; broadcasts with ``u``.

    Examples:
        >>> normal_quantile(torch.tensor([0.5, 0.975]), torch.tensor(1.0), 0.0)
        tensor([1.0000, 2.9600])
    """
    return mean + _exp(log_scale) * torch.special.ndtri(u)


def laplace_quantile(u: Tensor, mean: Tensor, log_scale: Tensor | float) -> Tensor:
    """Return m + b log(2 u) below the median, m - b log(2 (1 - u)) above: Laplace(m, b) where u is uniform.

    Args:
        u: numbers in (0, 1).
        mean: m; broadcasts with ``u``.
        log_scale: log b; broadcasts with ``u``.

    Examples:
        >>> laplace_quantile(torch.tensor([0.25, 0.75]), torch.tensor(0.0), 0.0)
        tensor([-0.6931,  0.6931])
    """
    return mean + _exp(log_scale) * torch.where(u < 0.5, (2 * u).log(), -(2 - 2 * u).log())


def logistic_quantile(u: Tensor, mean: Tensor, log_scale: Tensor | float, num_levels: int = 256) -> Tensor:
    """Return the level nearest to m + s log(u / (1 - u)): distributed as :func:`logistic_log_prob` where u is uniform.

    Rounding gives a level all that is within half a step of it, clamping gives the ends all that is beyond them.

    Args:
        u: numbers in (0, 1).
        mean: m; broadcasts with ``u``.
        log_scale: log s; broadcasts with ``u``.
        num_levels: how many levels, at least 2.

    Returns:
        numbers k / (num_levels - 1).

    Examples:
        >>> logistic_quantile(torch.tensor([0.01, 0.5, 0.99]), torch.tensor(0.4), -3.0, num_levels=11)
        tensor([0.2000, 0.4000, 0.6000])
    """
    last = num_levels - 1
    x = mean + _exp(log_scale) * torch.logit(u)
    return (x * last).round().clamp(0, last) / last


def normal_kl(mean: Tensor, log_var: Tensor) -> Tensor:
    """Return KL(N(m, s^2) || N(0, 1)) = (m^2 + s^2 - 1 - log s^2) / 2, nats.

    Args:
        mean: m.
        log_var: log s^2; broadcasts with ``mean``.

    Examples:
        >>> normal_kl(torch.tensor([0.0, 1.0]), torch.tensor(0.0))
        tensor([0.0000, 0.5000])
    """
    return 0.5 * (mean.square() + torch.expm1(log_var) - log_var)


def laplace_kl(loc: Tensor, scale: Tensor) -> Tensor:
    """Return KL(Laplace(m, b) || Laplace(0, 1)) = |m| + b exp(-|m| / b) - 1 - log b, nats.

    Args:
        loc: m.
        scale: b; broadcasts with ``loc``.

    Examples:
        >>> laplace_kl(torch.tensor([0.0, 1.0]), torch.tensor(1.0))  # 0, 1 / e
        tensor([0.0000, 0.3679])
    """
    return loc.abs() + scale * torch.exp(-loc.abs() / scale) - 1.0 - scale.log()


def entropy(log_p: Tensor, dim: int) -> Tensor:
    """Return H(p) = -sum p log p over ``dim``, which is dropped, with 0 log 0 = 0; nats.

    Args:
        log_p: log-probabilities; the gradient is 0 where they are -inf.
        dim: the dimension that the probabilities sum to 1 over.

    Examples:
        >>> entropy(torch.tensor([0.5, 0.5, 0.0]).log(), dim=0)  # log 2
        tensor(0.6931)
    """
    absent = log_p == -math.inf
    # 0 * -inf is not a number, in the value as in the gradient: both factors are replaced.
    return -(log_p.exp().masked_fill(absent, 0.0) * log_p.masked_fill(absent, 0.0)).sum(dim)


class Step(int):
    """A step of a phase of training, from 0, that knows how often its module has gone through the training rows.

    Args:
        step: steps done in the phase.
        epochs: passes done, exact: 3/2 in the middle of the second.

    Examples:
        >>> from fractions import Fraction
        >>> from mixdist.stats import Step
        >>> step = Step(15, Fraction(15, 10))
        >>> step + 1, step.epochs
        (16, Fraction(3, 2))
    """

    epochs: Fraction

    def __new__(cls, step: int, epochs: Fraction) -> Step:
        made = super().__new__(cls, step)
        made.epochs = epochs
        return made


@dataclass(frozen=True)
class Warmup:
    """A rise of a weight from 0 to 1, once or in cycles (Fu et al. 2019, section 3.1); a function of the step alone.

    With t the part of ``steps`` or ``epochs`` that is over, M cycles and R the part of each in which the weight rises,

        weight = min(1, (t M mod 1) / R) for t < 1, and 1 from there on.

    Steps and epochs count from the start of a phase. In a competition each expert counts those on its own rows, so in
    steps the expert with most rows ends first, and in epochs all end together; an expert that was reseeded counts from
    its own beginning.

    Args:
        steps: training steps over which all cycles go; or
        epochs: passes over the training rows, such as 2.5.
        cycles: how often the weight rises; each cycle but the first begins with a fall to 0. Fu et al. take 4.
        rise: the part of a cycle in which the weight rises; in the rest it is 1. Fu et al. take 0.5.

    Raises:
        ValueError: steps and epochs both or neither, or a number that makes no sense.

    Examples:
        >>> from mixdist.stats import Warmup
        >>> [Warmup(steps=8, cycles=2, rise=0.5).weight(step) for step in range(10)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0]
    """

    steps: int | None = None
    epochs: float | None = None
    cycles: int = 1
    rise: float = 1.0

    def __post_init__(self) -> None:
        length = self.epochs if self.steps is None else self.steps
        if (self.steps is None) == (self.epochs is None) or not 0 < (length or 0) < math.inf:
            raise ValueError(
                f"a warm-up's steps ({self.steps}) and epochs ({self.epochs}) must be one number above 0: give one of "
                f"them, or 0 in place of all for none"
            )
        if self.cycles < 1:
            raise ValueError(f"a warm-up's cycles ({self.cycles}) must be 1 or more: give 1 for a single rise")
        if not 0 < self.rise <= 1:
            raise ValueError(f"a warm-up's rise ({self.rise}) must be above 0 and at most 1: give a part of a cycle")

    def weight(self, step: int) -> float:
        """Return the weight of a step; in exact arithmetic but for the last rounding.

        Raises:
            ValueError: the warm-up is in epochs, and the step knows none.
        """
        if self.epochs is None:
            done = Fraction(int(step), self.steps or 1)
        elif isinstance(step, Step):
            done = step.epochs / Fraction(str(self.epochs))
        else:
            raise ValueError(
                f"a warm-up of {self.epochs} epochs was given step {step}, which knows of none: give "
                f"mixdist.stats.Step(step, epochs)"
            )
        return 1.0 if done >= 1 else min(1.0, float(done * self.cycles % 1 / Fraction(str(self.rise))))


def ramp(step: int, steps: int | Warmup) -> float:
    """Return min(1, step / steps), the linear rise from 0 to 1 that schedules are made of; 1 where ``steps`` is 0.

    Args:
        step: of the phase, from 0.
        steps: a number, or a :class:`Warmup`, whose weight is returned.

    Examples:
        >>> from mixdist.stats import ramp
        >>> [ramp(step, 4) for step in (0, 1, 4, 100)], ramp(0, 0)
        ([0.0, 0.25, 1.0, 1.0], 1.0)
    """
    if isinstance(steps, Warmup):
        return steps.weight(step)
    return min(1.0, step / steps) if steps else 1.0


def annealed(step: int, steps: int | Warmup, first: float, last: float) -> float:
    """Return first^(1 - u) last^u with u = ramp(step, steps); ``first`` where ``steps`` is 0."""
    u = ramp(step, steps) if steps else 0.0  # on the host: every rank and every resumed run has the same number
    return float(first ** (1 - u) * last**u)


def temperatures(kind: str, first: float, final: float | None, steps: int | Warmup) -> tuple[float, float]:
    """Return the first and the last temperature of a schedule; ``ValueError`` where they make none."""
    for name, value in (("temperature", first), ("final_temperature", final)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{kind}'s {name} ({value}) must be above 0 and finite: give 1 for none")
    check_steps(f"{kind}'s anneal_steps", steps)
    if bool(steps) != (final is not None):
        raise ValueError(f"{kind}'s final_temperature ({final}) and anneal_steps ({steps}) go together: give both")
    return first, first if final is None else final


def check_steps(name: str, steps: int | Warmup) -> None:
    """Check the length of a ramp.

    Raises:
        ValueError: a number that is none of steps.
    """
    if not isinstance(steps, Warmup) and not 0 <= steps < math.inf:
        raise ValueError(f"{name} ({steps}) must be a number of training steps: give 0 for no schedule")


def _exp(value: Tensor | float) -> Tensor | float:
    return value.exp() if isinstance(value, Tensor) else math.exp(value)


def _log_bin(width: Tensor | float) -> Tensor | float:
    """Return log(1 - exp(-width)), the third factor of a bin's mass."""
    if isinstance(width, Tensor):
        return torch.log(-torch.expm1(-width))
    return math.log(-math.expm1(-width))
