"""Checks of the gate and the experts of an ensemble, each on the same few rows.

Shape letters: n rows of the check, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mixdist.experts import Compute, Expert, ExpertBank, Noise
from mixdist.gates import Gate
from mixdist.messages import one_line
from mixdist.mixtures.abilities import check_abilities, check_gate_abilities
from mixdist.mixtures.contracts import Rows, check_decoder, check_expert, check_gate, check_range
from mixdist.mixtures.covered import is_covered_in_a_stack
from mixdist.mixtures.mixture import Outputs, Stage
from mixdist.mixtures.probe import COARSE, Fault
from mixdist.noise import Draw, Moment, Purpose
from mixdist.terms import Batch, Gating

if TYPE_CHECKING:
    from mixdist.mixtures.ensemble import Ensemble


IN_TRAINING = ("reconstruct",)
"""Optional methods of experts that training calls, to find duplicates among them."""


def inspect_gate(mixture: Ensemble, gate: Gate, rows: Batch, batch: Batch, at: Moment, stage: Stage | None) -> Gating:
    """Check a gate on stored rows, and the values of a batch; return what it says of the rows.

    Raises:
        Fault: it breaks its contract.
    """
    eps, values = None, mixture.values(rows, gate.fields)
    if gate.noise_shape is not None:
        eps = at.draw(Purpose.GATE).normal(rows["id"], [0], gate.noise_shape, mixture.dtype)[0]
    trains = stage is not None and stage.trains in ("both", "gate")
    key = "mixture.gate"
    gating, used = check_gate(key, gate, _rows(mixture, values), eps, mixture.num_experts, trains)
    if stage is None:
        model, draw = gate.model, at.draw(Purpose.GATE)
        given = _rows(mixture, mixture.values(rows, model.fields))
        shapes = partial(_of_gate, draw, rows["id"], mixture.dtype)
        check_gate_abilities(key, model, given, mixture.spec, shapes, mixture.num_experts)
    _check_ranges(f"{key}: {type(gate).__name__}.forward", used, mixture, batch)
    return gating


def _of_gate(draw: Draw, ids: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return a gate's noise, (n, *shape)."""
    return draw.normal(ids, [0], shape, dtype)[0]


def _check_ranges(who: str, used: list[Any], mixture: Ensemble, batch: Batch) -> None:
    """Check the values of a batch against what likelihoods of their fields can model."""
    for likelihood, field in used:
        check_range(who, likelihood, field, mixture.spec[field].values(batch[field], mixture.dtype))


def inspect_experts(
    mixture: Ensemble,
    experts: Mapping[int, Expert],
    rows: Batch,
    batch: Batch,
    at: Moment,
    stage: Stage | None,
) -> tuple[Tensor, Outputs]:
    """Check experts on stored rows, of those that one class makes the first.

    Args:
        mixture: has the experts.
        experts: by number.
        rows: the same on every rank.
        batch: this rank's rows, whose values must lie where likelihoods can model them.
        at: names the draws.
        stage: the phase; None before an evaluation.

    Returns:
        the losses of the first, (n,), and what replicas of the same expert must return too.

    Raises:
        Fault: one breaks its contract.
    """
    found: Outputs = {}
    trains = stage is not None and stage.trains in ("both", "experts")
    for e, expert in list(experts.items())[: 1 if mixture.alike else None]:
        key, noise = mixture.key_of(e), mixture.noise(at)
        some = _rows(mixture, mixture.values(rows, expert.fields))
        eps = None if expert.noise_shape is None else noise(rows["id"], [e], expert.noise_shape)[0]
        losses, used = check_expert(key, expert, some, eps, trains, mixture.reads_features)
        _check_ranges(f"{key}: {type(expert).__name__}.forward", used, mixture, batch)
        drawn = partial(_drawn, noise, rows["id"], e)
        if stage is None:
            check_abilities(key, expert, some, mixture.spec, drawn)
        elif stage.objective.reads_losses:
            check_abilities(key, expert, some, mixture.spec, drawn, IN_TRAINING)
        found[f"{key}: {type(expert).__name__}.forward (losses of expert {e})"] = losses
    return next(iter(found.values())), found


def inspect_decoder(
    mixture: Ensemble,
    decoder: nn.Module,
    log_prob: Callable[..., Any],
    shape: int,
    rows: Batch,
    batch: Batch,
    at: Moment,
) -> None:
    """Check the decoder that experts share, on normal numbers in place of their features, (n, shape).

    Raises:
        Fault: it breaks its contract.
    """
    who, values = "mixture.decoder", mixture.values(rows, mixture.bank.fields)
    given = mixture.noise(at)(rows["id"], [0], (shape,))[0]
    _check_ranges(who, check_decoder(who, decoder, log_prob, _rows(mixture, values), given), mixture, batch)


def _drawn(noise: Noise, ids: Tensor, e: int, shape: tuple[int, ...]) -> Tensor:
    """Return an expert's noise, (n, *shape)."""
    return noise(ids, [e], shape)[0]


def inspect_both(mixture: Ensemble, rows: Batch, at: Moment, stage: Stage) -> None:
    """Check experts that are to be timed one by one and as a stack.

    Raises:
        Fault: one breaks its contract, or a stack of them gives something else.
    """
    experts = mixture.bank.owned()
    losses, _ = inspect_experts(mixture, experts, rows, rows, at, stage)
    if not is_covered_in_a_stack(next(iter(experts.values()))):
        inspect_stack(mixture, ExpertBank(copy.deepcopy(experts), "stacked"), rows, at, losses)


def inspect_stack(mixture: Ensemble, bank: ExpertBank, rows: Batch, at: Moment, losses: Tensor) -> None:
    """Check that experts which run as one stack give what they give alone, ``losses`` of the first.

    Raises:
        Fault: they do not.
    """
    if bank.execution != "stacked" or is_covered_in_a_stack(next(iter(bank.owned().values()))):
        return
    bank = copy.copy(bank)
    bank.compute = Compute()  # without autocast, as the losses are that it is held against
    kind = type(next(iter(bank.owned().values()))).__name__
    with torch.no_grad():
        try:
            stacked = bank(mixture.values(rows, bank.fields), mixture.noise(at)).loss_R
        except Exception as error:
            raise Fault(
                f"mixture.expert: {kind}.forward fails on parameters with a leading expert axis "
                f"({one_line(str(error))}): set stackable of its class, or of its network's, to False"
            ) from error
    shape = (len(losses), len(bank.ids))
    scale = float(losses.abs().max()) * COARSE
    if stacked is None or stacked.shape != shape or not torch.allclose(stacked[:, 0], losses, rtol=0.0, atol=scale):
        raise Fault(
            f"mixture.expert: {kind}.forward gives other losses in a stack than alone: set stackable of its "
            f"class, or of its network's, to False"
        )


def _rows(mixture: Ensemble, values: Batch) -> Rows:
    """Return rows of numbers for a check; under several ranks, or if rows choose experts, there may be none."""
    return Rows(values, mixture.dtype, may_be_none(mixture))


def may_be_none(mixture: Ensemble) -> bool:
    """Return whether a gate, an expert or an objective may be given no rows."""
    return mixture.context.mesh.world_size > 1 or mixture.part_of_rows < 1


def losses_of_all(losses: Tensor, num_experts: int) -> Tensor:
    """Return losses of all experts (n, E) as they may be, from those of one, (n,): other experts live elsewhere."""
    return losses[:, None] + 0.1 * torch.arange(num_experts, dtype=losses.dtype, device=losses.device)
