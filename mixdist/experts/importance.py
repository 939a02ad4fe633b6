"""The likelihood of rows under one expert by importance sampling, with draws keyed by row.

Shape letters: R rows, S importance samples.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mixdist.noise import Moment, Purpose
from mixdist.terms import Batch

SAMPLES_AT_ONCE = 20
"""Samples of a row that are drawn under one key: chunk c has step c. It is part of the key of every draw, so another
number gives another estimate; S samples begin with those of any smaller S."""

DECODES_AT_ONCE = {"cpu": 800, "cuda": 200_000}
"""(row, sample) pairs that an expert decodes at once; no result depends on it. On a CPU they fit its cache."""


class Evidence(NamedTuple):
    """Log-likelihoods of rows under experts, nats, float64; rows first, then experts where there are several.

    Args:
        log_px: log p(x), importance-sampled: in expectation a lower bound that rises with S (Burda et al. 2016, th. 1).
        error: standard error of ``log_px`` over the draws, by the delta method; NaN for S = 1.
    """

    log_px: Tensor
    error: Tensor


class Weights:
    """Sums over the importance weights of R rows, in logarithms, to which samples are added chunk by chunk.

    With w_s = p(x, z_s) / q(z_s|x): log p(x) is estimated by log(1/S sum_s w_s) (Burda et al. 2016, eq. 8), whose
    expectation rises with S towards log p(x). Its standard error, by the delta method, is sd(w) / (sqrt(S) mean(w))
    = sqrt((S Q - 1) / (S - 1)) with Q = sum w^2 / (sum w)^2 and sd's divisor S - 1. It is at most 1; close to 1, where
    one weight exceeds the sum of all others, it means only that S is too small.

    Args:
        num_rows: R.
        device: of the log-weights.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.num_samples = 0
        self.log_sum_R = torch.full((num_rows,), -math.inf, dtype=torch.float64, device=device)
        self.log_squares_R = self.log_sum_R.clone()

    def add(self, log_w_RS: Tensor) -> None:
        """Add samples: log w (R, S), nats."""
        log_w_RS = log_w_RS.double()
        self.num_samples += log_w_RS.shape[1]
        self.log_sum_R = torch.logaddexp(self.log_sum_R, log_w_RS.logsumexp(1))
        self.log_squares_R = torch.logaddexp(self.log_squares_R, (2 * log_w_RS).logsumexp(1))

    def evidence(self) -> Evidence:
        """Return log p(x) and its standard error from all samples so far, each (R,)."""
        num = self.num_samples
        share_R = torch.exp(self.log_squares_R - 2 * self.log_sum_R)
        error_R = (
            ((num * share_R - 1).clamp(min=0) / (num - 1)).sqrt() if num > 1 else torch.full_like(share_R, math.nan)
        )
        return Evidence(self.log_sum_R - math.log(num), error_R)


class Weighs(Protocol):
    """What has importance weights: an expert, or a gate that is a model."""

    def log_weights(self, rows: Batch, eps: Tensor, /) -> Tensor: ...


@torch.no_grad()
def importance(
    expert: Weighs,
    rows: Batch,
    number: int,
    at: Moment,
    num_samples: int,
    dtype: torch.dtype,
    shape: tuple[int, ...] | None,
) -> Evidence:
    """Estimate log p(x) of rows under one expert from S posterior samples.

    eps is a function of (seed, phase, sample id, expert, sample) alone, so up to rounding the result depends neither on
    the batch that a row is in nor on the rank that computes it. Memory is bounded whatever R and S are.

    Args:
        expert: has ``log_weights``.
        rows: R rows of real numbers with "id".
        number: the expert's global number.
        at: names seed and phase of the draws; its step is not used.
        num_samples: S.
        dtype: of real numbers.
        shape: of a sample's noise: an expert's ``latent_shape``.

    Returns:
        fields (R,).
    """
    assert shape is not None
    num_rows, device = rows["id"].shape[0], rows["id"].device
    block = max(1, DECODES_AT_ONCE.get(device.type, DECODES_AT_ONCE["cuda"]) // min(num_samples, SAMPLES_AT_ONCE))
    parts = []
    for start in range(0, max(num_rows, 1), block):
        part = {name: column[start : start + block] for name, column in rows.items()}
        weights = Weights(len(part["id"]), device)
        for first in range(0, num_samples, SAMPLES_AT_ONCE):
            size = min(SAMPLES_AT_ONCE, num_samples - first)
            draw = Moment(at.seed, at.phase, first // SAMPLES_AT_ONCE).draw(Purpose.IMPORTANCE)
            eps = draw.normal(part["id"], [number], (size, *shape), dtype)[0]
            weights.add(expert.log_weights(part, eps))
        parts.append(weights.evidence())
    return Evidence(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
