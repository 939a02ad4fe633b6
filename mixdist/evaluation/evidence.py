"""How probable rows are under experts and under their mixture: importance sampling, keyed by row; and what experts
make of rows without noise.

Shape letters: B rows on this rank, R rows routed here, S importance samples, E all experts, e experts on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixdist.data import RankBatch
from mixdist.evaluation.health import duplicates
from mixdist.experts.importance import Evidence, importance
from mixdist.mixtures import Ensemble
from mixdist.noise import Moment
from mixdist.parallel.route import Route


@torch.no_grad()
def evidence(mixture: Ensemble, shard: RankBatch, route: Route, at: Moment, num_samples: int) -> Evidence | None:
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
def duplicate_pairs(mixture: Ensemble, shard: RankBatch) -> list[tuple[int, int]]:
    """Name pairs of experts that are duplicates on a batch, as ``health.duplicates`` has it; every rank calls it.

    Args:
        mixture: its experts see every row, whatever the routing.
        shard: this rank's rows, and how many every rank has.
    """
    route = mixture.send(shard)
    losses_BE = noise_free_losses(mixture, route)[0]
    by_expert = losses_BE.T.contiguous()
    distance_EE = torch.cdist(by_expert, by_expert, compute_mode="donot_use_mm_for_euclid_dist")
    num_experts = losses_BE.shape[1]
    sums = torch.cat([distance_EE.square().flatten(), losses_BE.sum(0), losses_BE.square().sum(0)])
    sums = mixture.dispatch.over_batch.sum(sums) / shard.total
    squares, mean_E, square_E = sums.split([num_experts**2, num_experts, num_experts])
    spread = (square_E - mean_E.square()).mean().clamp(min=0).sqrt().item()
    return duplicates(squares.view(num_experts, num_experts).sqrt().cpu().numpy(), spread)


def reconstructed(mixture: Ensemble) -> str | None:
    """Name the field that the experts reconstruct, or None."""
    template = mixture.bank.template
    field = str(getattr(template, "field", "x"))
    return field if template.can("reconstruct") and field in template.fields else None
