"""Experts move from rank to rank, with all that is their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from mixdist.assignment import load_balanced
from mixdist.collectives import move
from mixdist.entrant import Entrant
from mixdist.mesh import Mesh
from mixdist.wire import Wire, gather_json

MOVES_A_SECOND = 1e8
"""Bytes of experts taken to move in a second: what a placement must save to be worth it."""


def better_homes(
    entrants: Mapping[int, Entrant], homes: Sequence[Sequence[int]], load_E: NDArray[np.float64], mesh: Mesh
) -> list[list[int]]:
    """Give each member's experts for a round: by load, the longest first, if moving takes less time than it saves.

    Args:
        entrants: this rank's experts.
        homes: each member's experts until now.
        load_E: seconds that each expert takes in the round, the same on every rank.
        mesh: this rank's place.
    """
    balanced = load_balanced(load_E, len(homes))
    now, then = (max(sum(load_E[e] for e in experts) for experts in each) for each in (homes, balanced))
    stays = {e for old, new in zip(homes, balanced, strict=True) for e in set(old) & set(new)}
    leaving = sum(entrant.num_bytes for e, entrant in entrants.items() if e not in stays)
    moved = sum(gather_json(leaving, mesh.ep_group))  # replicas have the same to move, so all decide alike
    return balanced if now - then > moved / MOVES_A_SECOND else [list(experts) for experts in homes]


def move_entrants(
    entrants: Mapping[int, Entrant],
    homes: Sequence[Sequence[int]],
    mesh: Mesh,
    wire: Wire,
    make: Callable[[int], Entrant],
    round: int,
) -> dict[int, Entrant]:
    """Bring every expert to its new home; every rank calls it.

    Args:
        entrants: this rank's experts.
        homes: the experts of each member of the EP group from now on.
        mesh: this rank's place; a replica moves within its EP group.
        wire: counts the bytes, as sync.
        make: makes an entrant by number, to be given what arrives.
        round: of the discriminators that move along.

    Returns:
        this rank's experts from now on, ascending.
    """
    me, members = mesh.member, range(len(homes))
    leaving = [sorted(set(entrants) & set(homes[p])) if p != me else [] for p in members]
    packed = [_pack({e: entrants[e] for e in experts}) for experts in leaving]
    sizes = gather_json([len(part) for part in packed], mesh.ep_group)
    own = torch.zeros(0, dtype=torch.uint8, device=mesh.device)
    parts: list[Tensor | None] = [None if p == me else part.to(mesh.device) for p, part in enumerate(packed)]
    arrived = move(parts, own, me, [(sizes[p][me] if p != me else 0,) for p in members], wire.all_gather, mesh.ep_group)
    here = {e: entrant for e, entrant in entrants.items() if e in homes[me]}
    for part in arrived:
        found = load(part.cpu().numpy().tobytes()) if len(part) else {}
        for e in {int(name.partition("/")[0]) for name in found}:
            here[e] = make(e)
            here[e].take({n.removeprefix(f"{e}/"): t for n, t in found.items() if n.startswith(f"{e}/")}, round)
    return dict(sorted(here.items()))


def _pack(entrants: Mapping[int, Entrant]) -> Tensor:
    if not entrants:
        return torch.zeros(0, dtype=torch.uint8)
    tensors = {f"{e}/{name}": t for e, entrant in entrants.items() for name, t in entrant.tensors().items()}
    return torch.frombuffer(bytearray(save(tensors)), dtype=torch.uint8)
