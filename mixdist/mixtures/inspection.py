"""Checks of what a user wrote, before each phase of training and each evaluation, on the first rows of it.

Every rank looks at the same few rows, so that the same fault is found on every layout; a run is not changed by it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixdist.data import RankBatch
from mixdist.data.contracts import check_rows
from mixdist.mixtures.dry_run import check_backward, check_measure
from mixdist.mixtures.held import marks
from mixdist.mixtures.mixture import Mixture, Outputs, Stage
from mixdist.mixtures.probe import COARSE
from mixdist.noise import Moment
from mixdist.parallel.agreement import Agreed, agreed, gather_bytes, gather_json
from mixdist.parallel.costs import row_bytes
from mixdist.parallel.route import pack, unpack
from mixdist.parallel.wire import Group
from mixdist.terms import Batch

NUM_ROWS = 8
"""Rows of a check, or two for each rank where that is more."""


def inspect(mixture: Mixture, batch: RankBatch, ids: Tensor, at: Moment, stage: Stage | None = None) -> None:
    """Check rows, modules and family; every rank calls it.

    Args:
        mixture: the mixture; its modules are in training, or in evaluation where there is no stage.
        batch: this rank's rows of the first global batch.
        ids: those that the rows must have.
        at: names the draws.
        stage: the phase of training; None for an evaluation.

    Raises:
        Agreed: something breaks its contract; the same message on every rank.
    """
    spec, world = mixture.context.spec, mixture.context.mesh.world
    agreed(lambda: check_rows(batch.rows, spec, ids), world)
    rows = first_rows(mixture, batch)
    check_same(agreed(lambda: mixture.inspect(rows, batch, at, stage) or {}, world), world)
    if type(mixture).__module__.partition(".")[0] == "mixdist":
        return  # its gradients are those of the parity tests
    if stage is None:
        agreed(lambda: check_measure(mixture, rows, at), world)
    else:
        check_backward(mixture, rows, at, stage)


def check_same(outputs: Outputs, world: Group) -> None:
    """Check that methods return the same on every rank that has them, up to rounding: they saw the same rows.

    Raises:
        Agreed: on some rank one does not.
    """
    if world is None:
        return
    first: dict[str, tuple[int, list[float]]] = {}
    for rank, told in enumerate(gather_json({who: marks(output) for who, output in outputs.items()}, world)):
        for who, own in told.items():
            holder, known = first.setdefault(who, (rank, own))
            if any(abs(one - other) > COARSE * abs(known[0]) for one, other in zip(own, known, strict=True)):
                raise Agreed(
                    f"{who} returns other numbers on rank {rank} than on rank {holder} for the same rows: it may read "
                    f"rows, noise and parameters alone, no file, clock or environment variable"
                )


def first_rows(mixture: Mixture, batch: RankBatch) -> Batch:
    """Return the first rows of a global batch, as stored, on every rank."""
    mesh, spec = mixture.context.mesh, mixture.context.spec
    most = max(NUM_ROWS, 2 * mesh.world_size)
    own = {name: batch.rows[name][:most] for name in ("id", *spec)}
    if mesh.world is None:
        return own
    parts = gather_bytes(pack(own, spec).cpu().numpy().tobytes(), mesh.world)
    everything = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
    packed = everything.reshape(-1, row_bytes(spec.values()))[:most]
    return {name: column.to(mesh.device) for name, column in unpack(packed, spec).items()}
