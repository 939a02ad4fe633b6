"""Stages of a gate, and its start from the training rows: the same on every layout.

Shape letters: n rows of this rank, N rows of all, M numbers of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mixdist.data import Samples
from mixdist.gates import Gate
from mixdist.messages import one_line
from mixdist.mixtures.context import Context
from mixdist.mixtures.mixture import Stage
from mixdist.noise import Moment, Purpose, permutation, weights_seed
from mixdist.parallel.agreement import agreed
from mixdist.parallel.collectives import OverBatch
from mixdist.terms import Batch

CHUNK = 500
"""Rows that a rank reads at once. Chunks are the same on every layout, so each row's numbers are, to the last bit."""


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
    positions = torch.arange(size)
    if size > limit:
        positions = permutation(at.seed, at.phase, 0, size, purpose=Purpose.START)[:limit].sort().values
    seen_NM = _gather(context, over_batch, gate, dataset, positions)
    seed = weights_seed(at.seed, Purpose.START, 1, at.phase)
    agreed(lambda: _started(gate, seen_NM, seed) if mesh.rank == 0 else None, mesh.world)
    # Closed forms may round otherwise on another processor.
    over_batch.copy_first([*gate.parameters(), *gate.buffers()])
    for _ in range(gate.em_steps):
        own = agreed(lambda: _over(context, gate, dataset, torch.arange(size), gate.statistics), mesh.world)
        gate.maximise(over_batch.sum(torch.stack(own).sum(0)))
    over_batch.copy_first([*gate.parameters(), *gate.buffers()])


def _started(gate: Gate, seen_NM: Tensor, seed: int) -> None:
    try:
        gate.start(seen_NM, seed)
    except ValueError as error:
        raise ValueError(f"mixture.gate ({type(gate).__name__}): {one_line(str(error))}") from error
    if any(not bool(one.isfinite().all()) for one in gate.parameters()):
        raise ValueError(
            f"mixture.gate ({type(gate).__name__}): its start is not finite: look at the rows, or set start to none"
        )


def _over(
    context: Context, gate: Gate, dataset: Samples, positions: Tensor, call: Callable[[Batch], Tensor]
) -> list[Tensor]:
    """Return what a method makes of no rows, and of each of this rank's chunks."""
    mesh = context.mesh
    chunks = [positions[:0], *positions.split(CHUNK)[mesh.rank :: mesh.world_size]]
    return [call(_take(context, gate, dataset, chunk)) for chunk in chunks]


def _take(context: Context, gate: Gate, dataset: Samples, positions: Tensor) -> Batch:
    stored = dataset.take(positions, fields=gate.fields)
    on_device = {name: column.to(context.mesh.device) for name, column in stored.items()}
    return context.values(on_device, gate.fields)


def _gather(context: Context, over_batch: OverBatch, gate: Gate, dataset: Samples, positions: Tensor) -> Tensor:
    """Return what a gate has seen of rows, (N, M), in their order, on every rank."""
    world = context.mesh.world_size
    # Agreed: a rank that cannot read its rows must not leave the others waiting for it.
    seen_nM = torch.cat(agreed(lambda: _over(context, gate, dataset, positions, gate.seen), context.mesh.world))
    places = [torch.cat([torch.arange(0), *torch.arange(len(positions)).split(CHUNK)[r::world]]) for r in range(world)]
    gathered = over_batch.gather(seen_nM, [len(part) for part in places])
    return gathered[torch.cat(places).argsort().to(gathered.device)]
