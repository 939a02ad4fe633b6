"""Stages of a gate, and its start from the training rows: the same on every layout.

Shape letters: N rows, M numbers of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from mixdist.data import Samples
from mixdist.gates import Gate
from mixdist.messages import one_line
from mixdist.mixtures.context import Context
from mixdist.mixtures.mixture import Stage
from mixdist.mixtures.probe import Fault, shown
from mixdist.mixtures.row_pass import chosen, gathered, over_chunks
from mixdist.noise import Moment, Purpose, weights_seed
from mixdist.parallel.agreement import agreed
from mixdist.parallel.collectives import OverBatch
from mixdist.terms import Batch


def check_stages(gate: Gate, stages: Mapping[str, Stage], num_rows: int, mute: str | None, experts_learn: bool) -> None:
    """Check phases, by their keys, against the stages of a gate.

    Args:
        gate: the gate.
        stages: the phases.
        num_rows: training rows.
        mute: the class of experts that have no loss, if some have none.
        experts_learn: whether experts have parameters.

    Raises:
        ValueError: the gate has no such stage, or too few rows to start; an objective reads losses that are not there.
    """
    gate.check_rows(num_rows)
    if gate.em_steps and not any(gate.starts_at(stage.stage) for stage in stages.values()):
        raise ValueError(
            f"mixture.gate: {type(gate).__name__}.em_steps ({gate.em_steps}) come after a start, and its starts_at is "
            f"true of no phase: write it, or leave em_steps out"
        )
    for key, stage in stages.items():
        if stage.stage not in gate.stages:
            known, kind = ", ".join(gate.stages), type(gate).__name__
            raise ValueError(f"{key}.stage ({stage.stage}) is none of {kind}'s: choose of {known}")
        if gate.starts_at(stage.stage):
            gate.check_start(num_rows)
        objective = type(stage.objective).__name__
        if stage.trains != "gate" and not stage.objective.reads_losses and experts_learn:
            raise ValueError(
                f"{key}.trains ({stage.trains}) cannot be with {key}.objective ({objective}), which reads no losses, "
                f"so that no expert learns: set it to gate"
            )
        if mute and stage.objective.reads_losses:
            raise ValueError(
                f"{key}.objective ({objective}) reads the losses of experts, and mixture.expert "
                f"({mute}) has none: set it to mixdist.mixtures.GateLoss, or take another expert"
            )


@torch.no_grad()
def start_gate(context: Context, over_batch: OverBatch, gate: Gate, dataset: Samples, at: Moment) -> None:
    """Start a gate: :meth:`mixdist.gates.Gate.start` on rank 0, and EM over all rows; every rank calls it.

    Args:
        context: this rank's place.
        over_batch: collectives.
        gate: has a start.
        dataset: training rows.
        at: names seed and phase.

    Raises:
        Agreed: the start cannot be made.
    """
    mesh, size, limit = context.mesh, len(dataset), getattr(gate, "start_rows", len(dataset))
    positions = chosen(at.seed, at.phase, size, limit)
    seen_NM = gathered(context, over_batch, dataset, gate.fields, positions, partial(_seen, gate))
    seed = weights_seed(at.seed, Purpose.START, 1, at.phase)
    agreed(lambda: _set(gate, lambda: gate.start(seen_NM, seed)) if mesh.rank == 0 else None, mesh.world)
    # Closed forms may round otherwise on another processor.
    over_batch.copy_first([*gate.parameters(), *gate.buffers()])
    for _ in range(gate.em_steps):
        pass_over = partial(over_chunks, context, dataset, gate.fields, torch.arange(size), gate.statistics)
        own = agreed(pass_over, mesh.world)
        total = over_batch.sum(torch.stack(own).sum(0))
        agreed(partial(_set, gate, partial(gate.maximise, total)), mesh.world)
    over_batch.copy_first([*gate.parameters(), *gate.buffers()])


def _seen(gate: Gate, rows: Batch) -> Tensor:
    """Return what a gate sees of rows, once it has one row for each."""
    found = gate.seen(rows)
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(rows["id"]):
        raise Fault(
            f"mixture.gate: {type(gate).__name__}.seen returns {shown(found)}, expected a tensor (n, M): return the "
            f"numbers of each of n rows"
        )
    return found


def _set(gate: Gate, set_parameters: Callable[[], None]) -> None:
    """Set a gate's parameters, and check them."""
    try:
        set_parameters()
    except ValueError as error:
        raise ValueError(f"mixture.gate ({type(gate).__name__}): {one_line(str(error))}") from error
    if any(not bool(one.isfinite().all()) for one in gate.parameters()):
        raise ValueError(
            f"mixture.gate ({type(gate).__name__}): its start is not finite: look at the rows, or set start to none"
        )
