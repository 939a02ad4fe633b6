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
EXACT = "nothing: the experts have no importance weights; log p(y|x), where they give one, is exact"


@torch.no_grad()
def evidence(mixture: Ensemble, batch: RankBatch, route: Route, at: Moment, num_samples: int) -> Evidence | None:
    """Return how probable this rank's rows are under every expert; every rank of an EP group calls it.

    Args:
        mixture: its experts either have importance weights, or give log p(y|x) exactly.
        batch: this rank's rows.
        route: of those rows, sent to the experts.
        at: names the draws.
        num_samples: S.

    Returns:
        fields (B, E), NaN for an expert that gives no probability, only a loss or a bound; None where none gives one.
    """
    if mixture.common("weighs"):
        exact_Re = None
    else:
        terms = mixture.expert_terms(route, at)
        exact_Re = terms.log_px_R
        if exact_Re is not None and terms.kl_R is not None:
            exact_Re = exact_Re.masked_fill(~terms.kl_R.isnan(), math.nan)  # a bound is no probability
        if mixture.alike and (exact_Re is None or terms.kl_R is not None):
            return None
    rows, own = mixture.values(route.rows(), mixture.bank.fields), []
    for i, (e, expert) in enumerate(mixture.bank.owned().items()):
        if expert.can("log_weights"):
            own.append(torch.stack(importance(expert, rows, e, at, num_samples, mixture.dtype), dim=-1))
            continue
        log_px_R = torch.full((route.num_rows,), math.nan) if exact_Re is None else exact_Re[:, i].double()
        own.append(torch.stack([log_px_R, log_px_R, torch.zeros_like(log_px_R)], dim=-1))
    fields_BE3 = mixture.dispatch.combine(torch.stack(own, dim=1), route)
    assert len(fields_BE3) == batch.size
    return Evidence(*fields_BE3.unbind(-1))


def mixture_log_likelihood(log_px_BE: Tensor, log_weights: Tensor) -> Tensor:
    """log sum_k pi_k p_k(x) for each row, (B,) nats, with the weights normalised to sum to 1.

    Two kinds of weights have a meaning:

    - *shares*, pi_k the same for all rows: a proper density of x, to be checked against other models' likelihoods;
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


def stored_units(field: Field) -> float | None:
    """Return D log s, nats: log p(stored) = log p(values) + D log s, for values = stored * s + offset; or None.

    It holds for densities (gaussian, laplace, kernel, exact); a mass (logistic, Bernoulli) has no units.
    """
    return None if field.num_classes is not None else field.num_values * math.log(abs(field.scale))
