"""How probable rows are under experts and under their mixture: importance sampling, keyed by row; and what experts
make of rows without noise.

Shape letters: B rows on this rank, R rows routed here, S importance samples, E all experts, e experts on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixdist.data import RankBatch
from mixdist.experts.importance import SAMPLES_AT_ONCE, Evidence, importance
from mixdist.gates import Gate
from mixdist.mixtures.health import duplicates
from mixdist.noise import EVALUATION_PHASE, Moment, Purpose
from mixdist.parallel.route import Route
from mixdist.terms import Field

if TYPE_CHECKING:
    from mixdist.mixtures.ensemble import Ensemble

SAMPLED = (
    "z from each expert's q(z|x); log p(x) = log-mean-exp of log p(x, z) - log q(z|x); eps keyed by "
    f"(seed, purpose {Purpose.IMPORTANCE:d}, phase {EVALUATION_PHASE}, step c, sample id, expert), "
    f"{SAMPLES_AT_ONCE} samples a step"
)
EXACT = "nothing: the experts have no importance weights; where they give a log p, it is exact"


@torch.no_grad()
def evidence(mixture: Ensemble, batch: RankBatch, route: Route, at: Moment, num_samples: int) -> Evidence:
    """Estimate log p of this rank's rows under every expert; every rank of an EP group calls it.

    Args:
        mixture: some of its experts have importance weights.
        batch: this rank's rows.
        route: of those rows, sent to the experts.
        at: names the draws.
        num_samples: S.

    Returns:
        fields (B, E), NaN for experts without importance weights.
    """
    rows, own = mixture.values(route.rows(), mixture.bank.fields), []
    for e, expert in mixture.bank.owned().items():
        if expert.can("log_weights") and expert.latent_shape is not None:
            own.append(
                torch.stack(importance(expert, rows, e, at, num_samples, mixture.dtype, expert.latent_shape), dim=-1)
            )
        else:
            own.append(torch.full((route.num_rows, 2), math.nan, dtype=torch.float64, device=rows["id"].device))
    fields_BE2 = mixture.dispatch.combine(torch.stack(own, dim=1), route)
    assert len(fields_BE2) == batch.size
    return Evidence(*fields_BE2.unbind(-1))


def gate_weighs(mixture: Ensemble) -> bool:
    """Return whether the mixture has a gate that gives log p of rows."""
    gate = getattr(mixture, "gate", None)
    return isinstance(gate, Gate) and gate.model.can("log_weights")


@torch.no_grad()
def gate_evidence(mixture: Ensemble, batch: RankBatch, at: Moment, num_samples: int) -> Evidence:
    """Return log p of this rank's rows under the gate's own model, fields (B,): exact where it has no latents.

    Its draws are those of an expert after the last.
    """
    gate = mixture.gate_in_process().model
    rows = mixture.values(batch.rows, gate.fields)
    if gate.latent is None:
        log_px = gate.log_weights(rows, None)[:, 0].double()
        return Evidence(log_px, torch.zeros_like(log_px))
    return importance(gate, rows, mixture.num_experts, at, num_samples, mixture.dtype, (gate.latent,))


def mixture_log_likelihood(log_px_BE: Tensor, log_weights: Tensor) -> Tensor:
    """Return log sum_e w_e p_e for each row, (B,) nats, with the weights normalised to sum to 1.

    It is the log of a mixture's p(x) where the weights are the same for every row, and of its p(y|x) where the experts
    give p_e(y|x) and the weights depend on x alone. Weights that have seen what p_e is a density of give no density:
    sum_e w_e(x) p_e(x) does not integrate to 1. For each row and any e: log w_e + log p_e <= result <= max_e log p_e.

    Args:
        log_px_BE: log p_e, nats.
        log_weights: log w_e, (E,) or (B, E); -inf stands for 0.
    """
    log_w = log_weights.double()
    log_w = log_w - log_w.logsumexp(-1, keepdim=True)
    return (log_px_BE.double() + log_w).logsumexp(-1)


def mixture_elbo(elbo_BE: Tensor, log_resp_BE: Tensor, log_share_E: Tensor) -> Tensor:
    """Return sum_e r_e (ELBO_e + log alpha_e - log r_e) for each row, (B,) nats.

    The ELBO of the mixture whose latent variables are e and z, with q(e, z|x) = r_e(x) q_e(z|x): in expectation a
    lower bound of log sum_e alpha_e p_e(x) whatever the responsibilities read, tight where q is the posterior. The gap
    is KL(q(e, z|x) || p(e, z|x)). -inf where a row is given to an expert without a share.

    Args:
        elbo_BE: each expert's ELBO, nats.
        log_resp_BE: log r_e, which sum to 1 in exp for each row.
        log_share_E: log alpha_e.
    """
    return weighted(log_resp_BE, elbo_BE.double() + log_share_E.double() - log_resp_BE.double())


def weighted(log_resp_BE: Tensor, field_BE: Tensor) -> Tensor:
    """Return sum_e r_e f_e for each row, (B,) float64; experts with r_e = 0 are left out, whatever their f_e."""
    resp_BE = log_resp_BE.double().exp()
    return (resp_BE * field_BE.double().masked_fill(resp_BE == 0, 0.0)).sum(-1)


@torch.no_grad()
def noise_free_losses(mixture: Ensemble, route: Route) -> tuple[Tensor, Tensor | None]:
    """Run the experts without noise; every rank of an EP group calls it.

    Returns:
        losses with noise 0, and the squared error of reconstructions, summed over a row, or None; each (B, E) float64.
    """
    rows = mixture.values(route.rows(), mixture.bank.fields)

    def silence(ids: Tensor, experts: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(len(experts), len(ids), *shape, dtype=mixture.dtype, device=ids.device)

    fields = [mixture.bank(rows, silence).loss_R.double()]
    name = mixture.common("reconstructs")
    if name is not None:
        errors = [(one.reconstruct(rows) - rows[name]).flatten(1) for one in mixture.bank.owned().values()]
        fields.append(torch.stack([error.double().square().sum(1) for error in errors], dim=1))
    combined = mixture.dispatch.combine(torch.stack(fields, dim=-1), route)
    return combined[..., 0], combined[..., 1] if len(fields) > 1 else None


@torch.no_grad()
def duplicate_pairs(mixture: Ensemble, batch: RankBatch) -> list[tuple[int, int]]:
    """Name pairs of experts that are duplicates on a batch, as ``health.duplicates`` has it; every rank calls it.

    Args:
        mixture: its experts see every row, whatever the routing.
        batch: this rank's rows, and how many every rank has.
    """
    sums = difference_sums(noise_free_losses(mixture, mixture.send(batch))[0])
    return duplicates(mixture.dispatch.over_batch.sum(sums).cpu().numpy() / batch.total)


def difference_sums(losses_BE: Tensor) -> Tensor:
    """Return sums over rows for ``health.duplicates``, (E + 2, E): (l_ni - l_nj)^2, then l_ne, then l_ne^2."""
    by_expert = losses_BE.T.contiguous()
    distance_EE = torch.cdist(by_expert, by_expert, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.cat([distance_EE.square(), torch.stack([losses_BE.sum(0), losses_BE.square().sum(0)])])


def stored_units(field: Field) -> float:
    """Return D log |s|, nats: log p(stored) = log p(values) + D log |s|, for values = stored * s + offset.

    For densities only: a mass has no units.
    """
    return field.num_values * math.log(abs(field.scale))


def bits_per_dim(field: Field, likelihood: str | None, levels: int | None = None) -> tuple[float, float] | None:
    """Return a and b of a row's bits per dimension, a log p(x) + b, D the numbers in a row; None where it has none.

    Of a mass of more than two levels, -log P / (D log 2). Of a density p of dequantised values (k + u) / n it is
    -log p / (D log 2) + log2 n: in expectation over u at least that of the mass, the integral of p over a level (Theis
    et al. 2016, section 3.1).

    Args:
        field: that p is of.
        likelihood: density or mass.
        levels: of a mass.
    """
    per_bit = -1.0 / (field.num_values * math.log(2.0))
    if likelihood == "density" and field.dequantised:
        return per_bit, per_bit * stored_units(field)
    return (per_bit, 0.0) if likelihood == "mass" and (levels or 0) > 2 else None
