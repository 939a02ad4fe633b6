"""The order of samples in an epoch: a function of keys alone, independent of ranks and workers.

Shape letters: N samples.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mixdist.noise import Purpose, hashes, permutation

OrderName = Literal["blocks", "full"]


@dataclass(frozen=True)
class Epoch:
    """The key of an epoch's order and of its rows' augmentation.

    Args:
        seed: of the run.
        phase: number of the phase.
        number: number of the epoch within the phase.
        expert: the expert whose epoch it is, if each expert has its own.

    Examples:
        >>> import torch
        >>> from mixdist.data.order import Epoch, shuffled
        >>> order = shuffled(torch.arange(5), Epoch(seed=0, number=3))
        >>> torch.equal(order, shuffled(torch.arange(5), Epoch(seed=0, number=3))), sorted(order.tolist())
        (True, [0, 1, 2, 3, 4])
    """

    seed: int
    phase: int = 0
    number: int = 0
    expert: int = 0


def digest(ids_N: Tensor) -> str:
    """Return the sha256 of ids in an order, by which a run that is resumed inside an epoch knows it again."""
    return hashlib.sha256(ids_N.contiguous().numpy().data).hexdigest()


def shuffled(positions_N: Tensor, epoch: Epoch) -> Tensor:
    """Return positions in full random order: a sort by keyed hashes of their ranks among them."""
    e = epoch
    return positions_N[permutation(e.seed, e.phase, e.number, len(positions_N), e.expert)]


def shuffled_blocks(positions_N: Tensor, epoch: Epoch, block: int, window: int, batch_size: int) -> Tensor:
    """Return positions in an order that keeps neighbours in storage near each other in time.

    Positions are cut into blocks of ``block`` neighbours. Blocks are shuffled; each ``window`` of them that follow each
    other are mixed sample by sample; and each batch of the result is put in the order of blocks again, so that the
    contiguous part of it that a rank reads touches few of them. What is in a batch is therefore drawn from ``window``
    blocks at once, and every batch holds other samples than the one of another epoch.

    Args:
        positions_N: any positions, each once.
        epoch: the key of the order.
        block: number of neighbours in a block.
        window: number of blocks that are mixed.
        batch_size: of the global batch.
    """
    e = epoch
    if not len(positions_N):
        return positions_N
    block_N = positions_N // block
    order = permutation(e.seed, e.phase, e.number, int(block_N.max()) + 1, e.expert, Purpose.BLOCKS)
    place_of = torch.empty_like(order)
    place_of[order] = torch.arange(len(order))
    place_N = place_of[block_N]
    hash_N = hashes(e.seed, e.phase, e.number, positions_N, e.expert)
    mixed = torch.argsort(hash_N, stable=True)
    mixed = mixed[torch.argsort(place_N[mixed] // window, stable=True)]
    # Within a batch by block, those of a block as they were mixed.
    batch_N = torch.arange(len(mixed)) // batch_size
    arranged = torch.argsort(batch_N * len(order) + place_N[mixed], stable=True)
    return positions_N[mixed[arranged]]
