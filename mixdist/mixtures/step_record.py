"""What a step of a soft mixture leaves: sums over rows, and the record that is made of them.

Shape letters: B rows on this rank, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixdist.mixtures.health import dead
from mixdist.mixtures.routing import RoutingPlan, TopK
from mixdist.terms import Outcome


def outcome_of(
    named: dict[str, Tensor],
    log_resp_BE: Tensor,
    losses_BE: Tensor | None = None,
    routing: TopK | None = None,
    plan: RoutingPlan | None = None,
) -> Outcome:
    """Return the step's outcome; its sums over rows are, those of losses only where experts ran,

    - ``load``: responsibilities of each expert; ``entropy`` of a row's responsibilities, nats;
    - ``expert_loss``: each expert's losses over the rows it saw, nats; ``seen``: those rows;
    - ``weight``: what the weights of the experts that saw a row sum to; ``weighted_loss``: of their losses;
    - ``lost_weight``: responsibility that capacity refused; ``refused_rows``: rows that it refused altogether.
    """
    parts = {name: value.double() for name, value in named.items()}
    loss, resp_BE = torch.stack(list(parts.values())).sum(), log_resp_BE.double().exp()
    sums = {"load": resp_BE.sum(0), "entropy": torch.special.entr(resp_BE).sum()}
    faults = {"the gate's output": log_resp_BE.isnan().any(1).double().sum()}
    if losses_BE is None:
        return Outcome(loss, parts, sums, faults)
    losses_BE = losses_BE.double()
    routed_BE, weight_BE, zero = torch.ones_like(resp_BE, dtype=torch.bool), resp_BE, resp_BE.new_zeros(())
    if routing is not None and plan is not None:
        routed_BE, weight_BE = plan.routed_BE, routing.log_weights(log_resp_BE, plan.routed_BE).double().exp()
    sums |= {
        "expert_loss": losses_BE.sum(0),
        "seen": routed_BE.double().sum(0),
        "weight": weight_BE.sum(),
        "weighted_loss": (weight_BE * losses_BE).sum(),
        "lost_weight": zero if plan is None else plan.lost_B.double().sum(),
        "refused_rows": zero if plan is None else (~routed_BE.any(1)).double().sum(),
    }
    faults = {"the loss of expert {}": (~losses_BE.isfinite()).double().sum(0)} | faults
    return Outcome(loss, parts, sums, faults)


def record_of(outcome: Outcome, num_rows: int) -> dict[str, Any]:
    """Return what a step's record holds: loads, losses and rows of experts, and the decisions of the gate."""
    sums = outcome.sums
    load = sums["load"] / num_rows
    record = {
        "load": load.tolist(),
        "dead_experts": [f"expert {e}" for e in dead(load.numpy())],
        "responsibility_entropy": sums["entropy"].item() / num_rows,
    }
    if "seen" not in sums:  # no expert ran
        return record
    return record | {
        "seen": (sums["seen"] / num_rows).tolist(),
        "lost_weight": sums["lost_weight"].item() / num_rows,
        "refused_rows": int(sums["refused_rows"].item()),
        "weighted_loss": (sums["weighted_loss"] / sums["weight"]).item(),
        "expert_loss": (sums["expert_loss"] / sums["seen"].clamp(min=1)).tolist(),
    }
