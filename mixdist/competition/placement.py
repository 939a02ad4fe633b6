"""Experts move from rank to rank, with all that is their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from mixdist.competition.entrant import Entrant
from mixdist.parallel.agreement import gather_json
from mixdist.parallel.collectives import move
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import Wire

MOVES_A_SECOND = 1e8
"""Bytes of experts taken to move in a second: what a placement must save to be worth it."""


def better_homes(
    entrants: Mapping[int, Entrant], homes: Sequence[Sequence[int]], load_E: NDArray[np.float64], mesh: Mesh
) -> list[list[int]]:
    """Return each member's experts for a round: by load, the longest first, if moving takes less time than it saves.

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
    parts = [part.to(mesh.device) for part in packed]
    arrived = move(parts, me, [(sizes[p][me],) for p in members], wire.all_gather, mesh.ep_group)
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


def load_balanced(load_E: NDArray[np.floating[Any]], num_members: int) -> list[list[int]]:
    """Place experts on the members of a group by load, longest first, each where least is so far (Graham 1969).

    Equal loads go by number, equal members to the one with fewer experts, then to the lowest; so that a member
    without an expert is only left where there are fewer experts than members.

    Args:
        load_E: what each expert costs, in any unit.
        num_members: P.

    Returns:
        each member's experts, ascending.
    """
    placed: list[list[int]] = [[] for _ in range(num_members)]
    load_P = [0.0] * num_members
    for e in sorted(range(len(load_E)), key=lambda e: (-load_E[e], e)):
        member = min(range(num_members), key=lambda p: (load_P[p], len(placed[p]), p))
        placed[member].append(e)
        load_P[member] += float(load_E[e])
    return [sorted(experts) for experts in placed]
