"""The continuous Bernoulli distribution on [0, 1] by its logit l, near l = 0 as well.

p(x) = C p^x (1 - p)^(1 - x) with p = sigmoid(l), a density on [0, 1] (Loaiza-Ganem and Cunningham 2019, equations 4
and 6). In l it is exp(l x) / int_0^1 exp(l t) dt, an exponential family: E[x] is the slope of the log of the integral.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEAR = 0.3
"""Below this |l| series are used, whose next term is below 2e-14: differences would cancel digits."""


def continuous_bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    """Return log p(x) = l x - log((exp(l) - 1) / l), nats.

    Args:
        x: points in [0, 1].
        logits: l; broadcasts with ``x``.

    Examples:
        >>> continuous_bernoulli_log_prob(torch.tensor([0.0, 1.0]), torch.tensor(0.0)).exp()
        tensor([1., 1.])
    """
    near, size = _split(logits)
    far = 0.5 * size + torch.log(-torch.expm1(-size)) - size.log()  # log of 2 sinh(|l| / 2) / |l|
    square = torch.where(near, logits, 0.0).square()
    series = square * (1 / 24 - square * (1 / 2880 - square * (1 / 181440 - square / 9676800)))
    return logits * (x - 0.5) - torch.where(near, series, far)


def continuous_bernoulli_mean(logits: Tensor) -> Tensor:
    """Return E[x] = 1 / (1 - exp(-l)) - 1 / l, 1/2 at l = 0.

    Examples:
        >>> continuous_bernoulli_mean(torch.tensor([-100.0, 0.0, 100.0]))
        tensor([0.0100, 0.5000, 0.9900])
    """
    near, size = _split(logits)
    above = -1 / torch.expm1(-size) - 1 / size
    small = torch.where(near, logits, 0.0)
    square = small.square()
    series = 0.5 + small * (1 / 12 - square * (1 / 720 - square * (1 / 30240 - square / 1209600)))
    return torch.where(near, series, torch.where(logits > 0, above, 1 - above))


def continuous_bernoulli_quantile(u: Tensor, logits: Tensor) -> Tensor:
    """Return the x with P(X <= x) = u, which is log(1 + u (exp(l) - 1)) / l.

    Args:
        u: numbers in (0, 1).
        logits: l; broadcasts with ``u``.

    Examples:
        >>> continuous_bernoulli_quantile(torch.tensor([0.25, 0.5]), torch.tensor(0.0))
        tensor([0.2500, 0.5000])
    """
    size, above = logits.abs().clamp(min=1e-12), logits > 0
    found = torch.log1p(torch.where(above, 1 - u, u) * torch.expm1(-size)) / -size  # x of l is 1 - x of -l
    return torch.where(above, 1 - found, found)


def _split(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return where l is near 0, and |l|, which is 1 there: what is not taken has a gradient that is finite."""
    near = logits.abs() < NEAR
    return near, torch.where(near, 1.0, logits.abs())
