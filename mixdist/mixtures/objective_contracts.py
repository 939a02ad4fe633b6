"""What an objective and its balance term must be.

Shape letters: n rows of the check, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mixdist.messages import describe_failure
from mixdist.mixtures.covered import is_packaged
from mixdist.mixtures.guards import guarded
from mixdist.mixtures.learning import check_none_learn
from mixdist.mixtures.objectives import Balance, Objective
from mixdist.mixtures.probe import COARSE, Columns, Fault, Probe, check_column, reached

METHODS = ("expert_rows", "gate_rows", "rows")


def check_objective(
    key: str,
    objective: Objective,
    log_resp_BE: Tensor,
    losses_BE: Tensor,
    trains: str,
    gate_learns: bool,
    takes_none: bool,
    top_k: int | None = None,
) -> Tensor:
    """Check an objective, and its balance term.

    Args:
        key: of the objective in the config.
        objective: the objective.
        log_resp_BE: of a few rows.
        losses_BE: of all experts for them.
        trains: what is to learn: both, gate or experts.
        gate_learns: whether the gate has parameters that learn by these rows alone.
        takes_none: whether a rank may have no rows.
        top_k: how many experts see a row; None where all do.

    Returns:
        the loss of each row where losses do not depend on the experts, (n,).

    Raises:
        Fault: it breaks its contract.
    """
    kind = type(objective).__name__
    check_none_learn(key, objective, "a gate or an expert")
    leaves = [log_resp_BE.detach().clone().requires_grad_(), losses_BE.detach().clone().requires_grad_()]
    rows_B = _check_methods(key, objective, leaves, takes_none, top_k)
    balance = [] if objective.balance is None else [_check_balance(key, objective.balance, leaves[0])]
    learns = reached([one for one in (rows_B, *balance) if one.requires_grad])
    if not objective.reads_losses and id(leaves[1]) in learns:
        raise Fault(f"{key}: {kind}.reads_losses is false, but its rows depend on losses_BE: set it to true")
    if strange := [leaf for place, leaf in learns.items() if place not in map(id, leaves)]:
        raise Fault(
            f"{key}: {kind}.rows returns rows that depend on a tensor {tuple(strange[0].shape)} which requires a "
            f"gradient, and no optimiser has it: what is to learn belongs to a gate or an expert"
        )
    if trains != "gate" and id(leaves[1]) not in learns:
        raise Fault(
            f"{key}: {kind}.rows returns rows that do not depend on losses_BE, so that no expert learns, and the phase "
            f"trains {trains}: compute them from losses_BE without detach or item, or set trains to gate"
        )
    if gate_learns and id(leaves[0]) not in learns and kind == "GateLoss":
        raise Fault(
            f"{key} (GateLoss) is the gate's own loss alone, and the gate has none in this stage: set it to "
            f"mixdist.mixtures.Information, or the phase's stage to one with a loss, as joint; Softmax has none at all"
        )
    if gate_learns and id(leaves[0]) not in learns:
        raise Fault(
            f"{key}: {kind}.rows returns rows that do not depend on log_resp_BE, so that the gate does not learn, and "
            f"the phase trains {trains}: compute them from log_resp_BE without detach or item, or set trains to experts"
        )
    with torch.no_grad():
        steps_B = torch.arange(len(losses_BE), dtype=losses_BE.dtype, device=losses_BE.device)
        return objective.rows(leaves[0].detach(), steps_B[:, None] + steps_B.new_ones(losses_BE.shape).cumsum(1))


def _check_methods(key: str, objective: Objective, leaves: list[Tensor], takes_none: bool, top_k: int | None) -> Tensor:
    """Check the methods that a class writes itself; return its rows, with their graph."""
    kind, parted = type(objective).__name__, objective.linear or top_k is not None
    written = {name for name in METHODS if getattr(type(objective), name) is not getattr(Objective, name)}
    for method in sorted(written if "rows" in written and not parted else written | {"expert_rows"}):
        who, call = f"{key}: {kind}.{method}", getattr(objective, method)
        given = leaves[:1] if method == "gate_rows" else leaves
        part_B = Probe(who, call, (), _read_rows(), leaves[0].dtype, takes_none, is_packaged(objective))(*given)
        _check_finite(who, part_B, leaves)
        if method == "expert_rows" and objective.linear:
            _check_linear(key, kind, part_B, leaves)
        if method == "expert_rows" and top_k is not None:
            _check_unseen(who, call, leaves, top_k)
    rows_B = objective.rows(*leaves)  # the sum of the two, or checked itself
    if "rows" in written and parted:
        why = "linear is true" if objective.linear else "with top-k routing"
        _check_parts(f"{key}: {kind}.rows", why, rows_B, objective, leaves)
    return rows_B


def _read_rows() -> Callable[[Any, int], Columns]:
    remedy = "return the loss of each row; the sum over rows is taken later, over all ranks"
    return lambda result, num_rows: {"rows": check_column("rows", result, (num_rows,), remedy)}


def _check_finite(who: str, rows_B: Tensor, leaves: Sequence[Tensor]) -> None:
    """Check that rows are finite where the losses are."""
    bad_B = ~rows_B.isfinite() & leaves[-1].isfinite().all(1)
    if not bool(bad_B.any()):
        return
    n = int(bad_B.nonzero()[0, 0])
    log_resp, losses = ([round(number, 4) for number in leaf[n].tolist()] for leaf in (leaves[0], leaves[-1]))
    raise Fault(
        f"{who} returns {rows_B[n].item()} for a row with log_resp {log_resp} and losses {losses}: bound what it "
        f"computes, as by clamp(min=...) before a log or a division"
    )


def _check_unseen(who: str, call: Callable[..., Tensor], leaves: Sequence[Tensor], top_k: int) -> None:
    """Check that a row's loss is finite where it is unseen by some experts, whose log weights are -inf, losses 0."""
    log_resp_BE, losses_BE = (leaf.detach() for leaf in leaves)
    seen_BE = torch.zeros_like(log_resp_BE, dtype=torch.bool).scatter_(1, log_resp_BE.topk(top_k, 1).indices, True)
    with torch.no_grad():
        masked = log_resp_BE.masked_fill(~seen_BE, -torch.inf), losses_BE.masked_fill(~seen_BE, 0.0)
        _check_finite(who, call(*masked), masked)


def _check_linear(key: str, kind: str, rows_B: Tensor, leaves: Sequence[Tensor]) -> None:
    """Check that a row's loss is sum_e r_e l_e, as ``linear`` promises."""
    log_resp_BE, losses_BE = leaves
    wanted_B = (log_resp_BE.exp() * losses_BE).sum(1).detach()
    grad = _gradients(rows_B, [losses_BE])[0]
    close = torch.allclose(grad, log_resp_BE.exp(), rtol=COARSE, atol=COARSE)
    if not close or not torch.allclose(rows_B, wanted_B, rtol=COARSE, atol=COARSE):
        raise Fault(
            f"{key}: {kind}.linear is true, but expert_rows is not sum_e exp(log_resp) * loss: set linear to false"
        )


def _check_parts(who: str, why: str, rows_B: Tensor, objective: Objective, leaves: Sequence[Tensor]) -> None:
    """Check that ``rows`` is the sum of its parts, by which a run trains."""
    parts_B = objective.expert_rows(*leaves) + objective.gate_rows(leaves[0])
    pairs = [(rows_B, parts_B), *zip(_gradients(rows_B, leaves), _gradients(parts_B, leaves), strict=True)]
    if all(torch.allclose(one, other, rtol=COARSE, atol=COARSE) for one, other in pairs):
        return
    raise Fault(
        f"{who} is not expert_rows + gate_rows, by which a run trains where {why}: write expert_rows in its place"
        f"{', and set linear to false' if objective.linear else ''}"
    )


def _gradients(rows_B: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of the sum of rows, zeros where there are none."""
    if not rows_B.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(rows_B.sum(), list(leaves), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if one is None else one for one, leaf in zip(found, leaves, strict=True)]


def _check_balance(key: str, term: Balance, log_resp_BE: Tensor) -> Tensor:
    """Return the balance term for a few rows, once it is one finite number, a function of what it is given alone."""
    who, num_rows = f"{key}.balance: {type(term).__name__}.__call__", len(log_resp_BE)
    check_none_learn(f"{key}.balance", term, "a gate or an expert")
    resp_sum_E = log_resp_BE.double().exp().sum(0)

    def call(given_E: Tensor) -> Tensor:
        try:
            return check_column("its term", term(given_E, num_rows), (), "return one number for the whole batch")
        except Exception as error:
            failed = f"fails on {tuple(resp_sum_E.shape)} ({describe_failure(error)}): fix it"
            raise Fault(f"{who} {error if isinstance(error, ValueError) else failed}") from error

    given_E = resp_sum_E.detach().clone()
    with guarded() as touched:
        first = call(given_E).detach()
    if touched.told:
        raise Fault(f"{who} {touched.told}: compute its term from resp_sum_E and num_rows alone")
    if not torch.equal(given_E, resp_sum_E.detach()):
        raise Fault(f"{who} changes what it is given: work on a copy, as r = r * 2 in place of r *= 2")
    value = call(resp_sum_E)
    _check_term(who, value, first, resp_sum_E)
    return value


def _check_term(who: str, value: Tensor, first: Tensor, resp_sum_E: Tensor) -> None:
    if value.device != resp_sum_E.device:
        raise Fault(f"{who} returns its term on {value.device}, but rows are on {resp_sum_E.device}: move it there")
    if not bool(value.isfinite()):
        sums = [round(number, 4) for number in resp_sum_E.tolist()]
        raise Fault(f"{who} returns {value.item()} for {sums}: bound what it computes, as by clamp(min=...)")
    if not torch.allclose(value.detach(), first, rtol=COARSE, atol=0.0):
        raise Fault(f"{who} returns another term when it is called again with the same numbers: keep no state")
    if bool(value.detach()) and not (value.requires_grad and resp_sum_E.grad_fn in _nodes(value)):
        raise Fault(
            f"{who} returns a term without a graph to resp_sum_E, so that the gate does not learn by it: compute it "
            f"from resp_sum_E without detach, item, no_grad or rounding"
        )


def _nodes(value: Tensor) -> set[Any]:
    """Return the nodes of a tensor's graph."""
    found, fresh = set(), [value.grad_fn]
    while fresh:
        node = fresh.pop()
        if node is not None and node not in found:
            found.add(node)
            fresh += [inner for inner, _ in node.next_functions]
    return found
