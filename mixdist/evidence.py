"""How probable rows are under experts and under their mixture: importance sampling, keyed by row; and what experts
make of rows without noise.

Shape letters: B rows on this rank, R rows routed here, S importance samples, E all experts, e experts on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixdist.data import Dataset, Loader, Shard
from mixdist.experts import Expert
from mixdist.health import duplicates
from mixdist.mixtures import Moment, SoftMixture
from mixdist.noise import Purpose
from mixdist.route import Route
from mixdist.terms import Batch

SAMPLES_AT_ONCE = 20
"""Samples of a row that are drawn under one key: chunk c has step c. It is part of the key of every draw, so another
number is another estimate; S samples start with those of any smaller S."""

DECODES_AT_ONCE = {"cpu": 800, "cuda": 200_000}
"""(row, sample) pairs that an expert works on at once; no result depends on it. On a CPU they stay in its cache."""


class Evidence(NamedTuple):
    """What is known of rows under experts, nats, float64; rows first, then experts where there are several.

    Args:
        log_px: log p(x): an importance-sampled estimate, or exact (log p(y|x)) for experts without latent variables.
        elbo: the mean of the S log-weights; never above ``log_px`` (Jensen).
        error: standard error of ``log_px`` by the delta method; 0 where exact, NaN for S = 1.
    """

    log_px: Tensor
    elbo: Tensor
    error: Tensor


class Weights:
    """Sums over the importance weights of R rows, in logarithms, to which samples are added chunk by chunk.

    With w_s = p(x, z_s) / q(z_s|x): log p(x) is estimated by log(1/S sum_s w_s) (Burda et al. 2016, eq. 8), whose
    expectation rises with S towards log p(x). Its standard error, by the delta method, is sd(w) / (sqrt(S) mean(w))
    = sqrt((S Q - 1) / (S - 1)) with Q = sum w^2 / (sum w)^2 and sd's divisor S - 1. It is at most 1, which it nears
    where one weight outdoes all others: then it says no more than that S is too small.

    Args:
        num_rows: R.
        device: of the log-weights.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.num_samples = 0
        self.log_sum_R = torch.full((num_rows,), -math.inf, dtype=torch.float64, device=device)
        self.log_squares_R = self.log_sum_R.clone()
        self.sum_R = torch.zeros_like(self.log_sum_R)

    def add(self, log_w_RS: Tensor) -> None:
        """Add samples: log w (R, S), nats."""
        log_w_RS = log_w_RS.double()
        self.num_samples += log_w_RS.shape[1]
        self.log_sum_R = torch.logaddexp(self.log_sum_R, log_w_RS.logsumexp(1))
        self.log_squares_R = torch.logaddexp(self.log_squares_R, (2 * log_w_RS).logsumexp(1))
        self.sum_R += log_w_RS.sum(1)

    def evidence(self) -> Evidence:
        """Give log p(x), the ELBO and the standard error from all samples so far, each (R,)."""
        num = self.num_samples
        share_R = torch.exp(self.log_squares_R - 2 * self.log_sum_R)
        error_R = (
            ((num * share_R - 1).clamp(min=0) / (num - 1)).sqrt() if num > 1 else torch.full_like(share_R, math.nan)
        )
        return Evidence(self.log_sum_R - math.log(num), self.sum_R / num, error_R)


@torch.no_grad()
def importance(expert: Expert, rows: Batch, number: int, at: Moment, num_samples: int, dtype: torch.dtype) -> Evidence:
    """Estimate log p(x) of rows under one expert from S posterior samples.

    eps is a function of (seed, phase, sample id, expert, sample) alone: neither the batch that a row is in nor the
    rank that computes it matters, but for rounding. Memory is bounded whatever R and S are.

    Args:
        expert: has ``log_weights`` and a ``noise_shape``.
        rows: R rows of real numbers with "id".
        number: the expert's global number.
        at: names seed and phase of the draws; its step is not used.
        num_samples: S.
        dtype: of real numbers.

    Returns:
        fields (R,).
    """
    assert expert.noise_shape is not None
    num_rows, device = rows["id"].shape[0], rows["id"].device
    block = max(1, DECODES_AT_ONCE.get(device.type, DECODES_AT_ONCE["cuda"]) // min(num_samples, SAMPLES_AT_ONCE))
    parts = []
    for start in range(0, max(num_rows, 1), block):
        part = {name: column[start : start + block] for name, column in rows.items()}
        weights = Weights(len(part["id"]), device)
        for first in range(0, num_samples, SAMPLES_AT_ONCE):
            size = min(SAMPLES_AT_ONCE, num_samples - first)
            draw = Moment(at.seed, at.phase, first // SAMPLES_AT_ONCE).draw(Purpose.IMPORTANCE)
            eps = draw.normal(part["id"], [number], (size, *expert.noise_shape), dtype)[0]
            weights.add(expert.log_weights(part, eps))
        parts.append(weights.evidence())
    return Evidence(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


@torch.no_grad()
def evidence(mixture: SoftMixture, shard: Shard, route: Route, at: Moment, num_samples: int) -> Evidence | None:
    """Say how probable this rank's rows are under every expert; every rank of an EP group calls it.

    Args:
        mixture: its experts either have importance weights, or give log p(y|x) exactly.
        shard: this rank's rows.
        route: of those rows, sent to the experts.
        at: names the draws.
        num_samples: S.

    Returns:
        fields (B, E), or None where the experts say no probability, only a loss or a bound.
    """
    template = mixture.bank.template
    if template.can("log_weights"):
        rows = mixture.values(route.rows(), template.fields)
        own = [importance(one, rows, e, at, num_samples, mixture.dtype) for e, one in mixture.bank.owned().items()]
        fields_Re3 = torch.stack([torch.stack(one, dim=-1) for one in own], dim=1)
    else:
        terms = mixture.expert_terms(route, at)
        if terms.log_px_R is None or terms.kl_R is not None:
            return None
        exact_Re = terms.log_px_R.double()
        fields_Re3 = torch.stack([exact_Re, exact_Re, torch.zeros_like(exact_Re)], dim=-1)
    fields_BE3 = mixture.dispatch.combine(fields_Re3, route)
    assert len(fields_BE3) == shard.size
    return Evidence(*fields_BE3.unbind(-1))


def mixture_log_likelihood(log_px_BE: Tensor, log_weights: Tensor) -> Tensor:
    """log sum_k pi_k p_k(x) for each row, (B,) nats, with the weights normalised to sum to 1.

    Two kinds of weights have a meaning:

    - *shares*, pi_k the same for all rows: a proper density of x, to be held against other models' likelihoods;
    - *gate*, pi_k = q(k|x): for experts of x this is **no density** of x, since the weights have seen x (an oracle's
      even the label) and sum_k q(k|x) p_k(x) does not integrate to 1; it tells how well the gate picks. For supervised
      experts, whose p_k(y|x) is given x, it is the mixture's proper p(y|x), as long as the gate does not read y.

    For each row and any k: log pi_k + log p_k(x) <= result <= max_k log p_k(x).

    Args:
        log_px_BE: log p_k(x), nats.
        log_weights: log pi_k, (E,) or (B, E); -inf stands for 0.
    """
    log_pi = log_weights.double()
    log_pi = log_pi - log_pi.logsumexp(-1, keepdim=True)
    return (log_px_BE.double() + log_pi).logsumexp(-1)


@torch.no_grad()
def shares(mixture: SoftMixture, dataset: Dataset, batch_size: int, at: Moment) -> Tensor:
    """Give the mean responsibility of each expert over a data set, (E,) float64; every rank calls it."""
    mesh = mixture.dispatch.mesh
    loader = Loader(dataset, batch_size, at.seed, 0, mesh.rank, mesh.world_size, ordered=True)
    sum_E = torch.zeros(mesh.placement.num_experts, dtype=torch.float64, device=mesh.device)
    for index in range(loader.num_batches):
        shard = loader.batch(0, index).to(mesh.device)
        sum_E += mixture.gating(shard.rows, at).log_resp_BE.double().exp().sum(0)
    return mixture.dispatch.over_batch.sum(sum_E) / len(dataset)


@torch.no_grad()
def quiet(mixture: SoftMixture, route: Route) -> tuple[Tensor, Tensor | None]:
    """Run the experts without noise; every rank of an EP group calls it.

    Returns:
        losses with noise 0, and the squared error of reconstructions, summed over a row, or None; each (B, E) float64.
    """
    template = mixture.bank.template
    rows, shape = mixture.values(route.rows(), template.fields), template.noise_shape

    def silence(ids: Tensor, experts: Sequence[int]) -> Tensor:
        assert shape is not None
        return torch.zeros(len(experts), len(ids), *shape, dtype=mixture.dtype, device=ids.device)

    fields = [mixture.bank(rows, None if shape is None else silence).loss_R.double()]
    name = reconstructed(mixture)
    if name is not None:
        errors = [(one.reconstruct(rows) - rows[name]).flatten(1) for one in mixture.bank.owned().values()]
        fields.append(torch.stack([error.double().square().sum(1) for error in errors], dim=1))
    combined = mixture.dispatch.combine(torch.stack(fields, dim=-1), route)
    return combined[..., 0], combined[..., 1] if len(fields) > 1 else None


@torch.no_grad()
def twins(mixture: SoftMixture, shard: Shard) -> list[tuple[int, int]]:
    """Name pairs of experts that are duplicates on a batch, as ``health.duplicates`` has it; every rank calls it.

    Args:
        mixture: its experts see every row, whatever the routing.
        shard: this rank's rows, and how many every rank has.
    """
    route = mixture.dispatch.send(shard.rows, mixture.bank.template.fields, shard.counts)
    losses_BE = quiet(mixture, route)[0]
    by_expert = losses_BE.T.contiguous()
    distance_EE = torch.cdist(by_expert, by_expert, compute_mode="donot_use_mm_for_euclid_dist")
    num_experts = losses_BE.shape[1]
    sums = torch.cat([distance_EE.square().flatten(), losses_BE.sum(0), losses_BE.square().sum(0)])
    sums = mixture.dispatch.over_batch.sum(sums) / shard.total
    squares, mean_E, square_E = sums.split([num_experts**2, num_experts, num_experts])
    spread = (square_E - mean_E.square()).mean().clamp(min=0).sqrt().item()
    return duplicates(squares.view(num_experts, num_experts).sqrt().cpu().numpy(), spread)


def reconstructed(mixture: SoftMixture) -> str | None:
    """Name the field that the experts reconstruct, or None."""
    template = mixture.bank.template
    field = str(getattr(template, "field", "x"))
    return field if template.can("reconstruct") and field in template.fields else None
