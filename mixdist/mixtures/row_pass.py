"""A pass over rows that ranks share: what a module makes of each row, the same bits on every layout.

Shape letters: n rows of this rank, N rows of all, M numbers of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mixdist.data import Samples
from mixdist.mixtures.context import Context
from mixdist.noise import Purpose, permutation
from mixdist.parallel.agreement import agreed
from mixdist.parallel.collectives import OverBatch
from mixdist.terms import Batch

CHUNK = 500
"""Rows that a rank reads at once. Chunks are the same on every layout, so each row's numbers are, to the last bit."""


def chosen(seed: int, phase: int, size: int, limit: int) -> Tensor:
    """Return the positions that a start is made from: all, or ``limit`` of more, chosen by the seed, ascending."""
    if size <= limit:
        return torch.arange(size)
    return permutation(seed, phase, 0, size, purpose=Purpose.START)[:limit].sort().values


def over_chunks(
    context: Context, dataset: Samples, fields: Sequence[str], positions: Tensor, call: Callable[[Batch], Tensor]
) -> list[Tensor]:
    """Return what a function makes of no rows, and of each of this rank's chunks of rows of real numbers."""
    mesh = context.mesh
    chunks = [positions[:0], *positions.split(CHUNK)[mesh.rank :: mesh.world_size]]
    made = []
    for chunk in chunks:
        stored = dataset.take(chunk, fields=tuple(fields))
        on_device = {name: column.to(mesh.device) for name, column in stored.items()}
        made.append(call(context.values(on_device, fields)))
    return made


def gathered(
    context: Context,
    over_batch: OverBatch,
    dataset: Samples,
    fields: Sequence[str],
    positions: Tensor,
    call: Callable[[Batch], Tensor],
) -> Tensor:
    """Return what a function makes of rows, (N, ...), in their order, on every rank; every rank calls it.

    Raises:
        Agreed: a rank cannot read its rows, which must not leave the others waiting for it.
    """
    world = context.mesh.world_size

    def own() -> list[Tensor]:
        with one_thread():
            return over_chunks(context, dataset, fields, positions, call)

    made_n = torch.cat(agreed(own, context.mesh.world))
    places = [torch.cat([torch.arange(0), *torch.arange(len(positions)).split(CHUNK)[r::world]]) for r in range(world)]
    made_N = over_batch.gather(made_n, [len(part) for part in places])
    return made_N[torch.cat(places).argsort().to(made_N.device)]


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch in one thread: ranks have fewer than one process, and sums would be split otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
