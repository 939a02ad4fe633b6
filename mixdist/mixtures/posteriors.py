"""What experts' posteriors tell of the rows: the KL of each latent dimension, and which of them are active.

Shape letters: B rows on this rank, R rows routed here, E all experts, e experts on this rank, L latent dimensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mixdist.data import RankBatch
from mixdist.gates import Gate
from mixdist.parallel.route import Route

if TYPE_CHECKING:
    from mixdist.mixtures.ensemble import Ensemble

ACTIVE = 0.01
"""A latent dimension is active if the variance over rows of its posterior mean is above this (Burda et al. 2016)."""


@torch.no_grad()
def posterior_sums(mixture: Ensemble, route: Route, expert_B: Tensor) -> tuple[Tensor, Tensor]:
    """Run the experts' posteriors on a batch; every rank of an EP group calls it.

    Args:
        mixture: the experts with a posterior are known to every rank.
        route: of the rows, sent to the experts.
        expert_B: each row's most responsible expert.

    Returns:
        sums over rows, (E, 2, 4, L), zero but for the experts here: for each expert over the rows that it is the most
        responsible for, then over all, of 1, KL_l, E_q[z_l] and E_q[z_l]^2; and the KL of each row's most responsible
        expert, (B,) nats, NaN where that has none.
    """
    num_latent = max(facts.num_latent for facts in mixture.facts)
    rows, bank = mixture.values(route.rows(), mixture.bank.fields), mixture.bank
    one_hot_BE = torch.nn.functional.one_hot(expert_B, mixture.num_experts).double()
    own_Re = mixture.dispatch.start_spread(one_hot_BE, route)()
    sums = one_hot_BE.new_zeros(mixture.num_experts, 2, 4, num_latent)
    kl_Re = torch.full_like(own_Re, torch.nan)
    for i, (e, expert) in enumerate(bank.owned().items()):
        size = mixture.facts[e].num_latent
        if not size:
            continue
        mean_RL, kl_RL = (field.double() for field in expert.posterior(rows))
        if not mean_RL.shape == kl_RL.shape == (route.num_rows, size):
            shapes = f"{tuple(mean_RL.shape)} and {tuple(kl_RL.shape)}"
            raise ValueError(
                f"{type(expert).__name__}'s posterior returns {shapes}: return mean and KL of {route.num_rows} rows "
                f"and the {size} numbers of latent_shape"
            )
        kl_Re[:, i] = kl_RL.sum(1)
        terms_R4L = torch.stack([torch.ones_like(kl_RL), kl_RL, mean_RL, mean_RL.square()], dim=1)
        sums[e, 0, :, :size] = torch.einsum("r,rkl->kl", own_Re[:, i], terms_R4L)
        sums[e, 1, :, :size] = terms_R4L.sum(0)
    return sums, mixture.dispatch.combine(kl_Re, route).gather(1, expert_B[:, None])[:, 0]


@torch.no_grad()
def embedded(mixture: Ensemble, batch: RankBatch) -> dict[str, Tensor]:
    """Return what ``Mixture.embed`` does: means of q(z|x) of each expert, by its number, and of a gate, as ``gate``.

    Of experts with a posterior, and of a gate that is a model with latents.
    """
    found, gate, sizes = {}, getattr(mixture, "gate", None), [facts.num_latent for facts in mixture.facts]
    if any(sizes):
        route, owned = mixture.send(batch), mixture.bank.owned()
        rows = mixture.values(route.rows(), mixture.bank.fields)
        mean_ReL = rows["id"].new_zeros(route.num_rows, len(owned), max(sizes), dtype=mixture.dtype)
        for i, (e, expert) in enumerate(owned.items()):
            if sizes[e]:
                mean_ReL[:, i, : sizes[e]] = expert.posterior(rows)[0]
        mean_BEL = mixture.dispatch.combine(mean_ReL, route)
        found = {str(e): mean_BEL[:, e, :size] for e, size in enumerate(sizes) if size}
    if isinstance(gate, Gate) and gate.model.latent is not None:
        found["gate"] = gate.embed(mixture.values(batch.rows, gate.fields))
    return found


def latents(sums_4L: np.ndarray) -> dict[str, Any]:
    """Return, as JSON, what the sums over some rows tell of an expert's latent dimensions; empty without rows.

    ``kl_by_dimension``: mean KL(q(z_l|x) || p(z_l)), nats; ``variance_of_means``: Var_x E_q[z_l]; ``active_units``: how
    many of these are above ``ACTIVE`` (Burda et al. 2016, section 5.3).
    """
    count_L, kl_L, mean_L, square_L = sums_4L[:, sums_4L[0] > 0]
    if not len(count_L):
        return {}
    variance_L = np.maximum(square_L / count_L - np.square(mean_L / count_L), 0.0)
    return {
        "active_units": int((variance_L > ACTIVE).sum()),
        "kl_by_dimension": (kl_L / count_L).tolist(),
        "variance_of_means": variance_L.tolist(),
    }
