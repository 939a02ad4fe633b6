"""Log-densities and divergences in nats: elementwise, for the caller to sum over the features of a row."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def normal_log_prob(x: Tensor, mean: Tensor, log_scale: Tensor | float) -> Tensor:
    """log N(x; m, s^2) = -(x - m)^2 / (2 s^2) - log s - log(2 pi) / 2, nats.

    Args:
        x: points.
        mean: m; broadcasts with ``x``.
        log_scale: log s, the log of the standard deviation; broadcasts with ``x``.
    """
    standard = (x - mean) * _exp(-log_scale)
    return -0.5 * standard.square() - log_scale - 0.5 * math.log(2.0 * math.pi)


def laplace_log_prob(x: Tensor, mean: Tensor, log_scale: Tensor | float) -> Tensor:
    """log Laplace(x; m, b) = -|x - m| / b - log b - log 2, nats.

    Args:
        x: points.
        mean: m; broadcasts with ``x``.
        log_scale: log b; broadcasts with ``x``.
    """
    return -(x - mean).abs() * _exp(-log_scale) - log_scale - math.log(2.0)


def bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    """x log p + (1 - x) log(1 - p) = x l - log(1 + exp l) with p = sigmoid(l), nats.

    For x of 0 or 1 it is a log-probability. Between them it is the negative cross entropy, which is no density.

    Args:
        x: points in [0, 1].
        logits: l; broadcasts with ``x``.
    """
    return x * logits + F.logsigmoid(-logits)


def normal_kl(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(m, s^2) || N(0, 1)) = (m^2 + s^2 - 1 - log s^2) / 2, nats.

    Args:
        mean: m.
        log_var: log s^2; broadcasts with ``mean``.
    """
    return 0.5 * (mean.square() + torch.expm1(log_var) - log_var)


def log_mean_exp(x: Tensor, dim: int) -> Tensor:
    """log(1/n sum exp x) over the n entries of ``dim``, which is dropped.

    Args:
        x: logarithms; -inf stands for 0.
        dim: the dimension to average over.
    """
    return torch.logsumexp(x, dim) - math.log(x.shape[dim])


def entropy(log_p: Tensor, dim: int) -> Tensor:
    """H(p) = -sum p log p over ``dim``, which is dropped, with 0 log 0 = 0; nats.

    Args:
        log_p: log-probabilities; the gradient is 0 where they are -inf.
        dim: the dimension that the probabilities sum to 1 over.
    """
    absent = log_p == -math.inf
    # 0 * -inf is not a number, in the value as in the gradient: both factors are replaced.
    return -(log_p.exp().masked_fill(absent, 0.0) * log_p.masked_fill(absent, 0.0)).sum(dim)


def _exp(value: Tensor | float) -> Tensor | float:
    return value.exp() if isinstance(value, Tensor) else math.exp(value)
