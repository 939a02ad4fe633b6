"""Experts move from rank to rank, with all that is their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from safetensors.torch import load, save
from torch import Tensor

from mixdist.collectives import move
from mixdist.entrant import Entrant
from mixdist.mesh import Mesh
from mixdist.wire import Wire, gather_json


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
