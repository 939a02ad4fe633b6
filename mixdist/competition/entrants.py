"""The experts of one rank in a competition: placement, errors that all ranks raise, what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor, nn

from mixdist.competition.entrant import Entrant, under
from mixdist.competition.mixture import HardMixture
from mixdist.competition.placement import load_balanced
from mixdist.engines import NotFinite, Solo
from mixdist.engines.solo import SoloFactory
from mixdist.parallel.agreement import Agreed, gather_json
from mixdist.parallel.collectives import move
from mixdist.terms import Owned
from mixdist.training.checkpoint import load_module
from mixdist.training.manifest import file_name, read_manifest
from mixdist.training.phases import Phase

MOVES_A_SECOND = 1e8
"""Bytes of experts taken to move in a second: what a placement must save to be worth it."""


class Whole(NamedTuple):
    """The optimisers' states of modules by their names, for a save."""

    found: dict[str, dict[str, Tensor]]

    def optimizer_state(self, owned: Owned) -> dict[str, Tensor]:
        """Return the optimiser's state of a module."""
        return self.found[owned.name]


class Entrants(dict[int, Entrant]):
    """Entrants by their experts' numbers, ascending.

    Args:
        mixture: has the experts.
        phase: how they train.
        make: makes their engines.

    Attributes:
        homes: each member's experts.
    """

    def __init__(self, mixture: HardMixture, phase: Phase, make: SoloFactory = Solo) -> None:
        experts = mixture.bank.owned()
        super().__init__({e: Entrant(e, mixture, phase, expert, make=make) for e, expert in experts.items()})
        self.make = make
        self.mixture, self.mesh, self.wire = mixture, mixture.context.mesh, mixture.context.wire
        self.homes = self.first_homes()
        self.bad: str | None = None

    def first_homes(self) -> list[list[int]]:
        """Return each member's experts by their numbers, before any has moved."""
        return [list(self.mesh.placement.experts_of(p)) for p in range(self.mesh.placement.ep_size)]

    def enter(self, phase: Phase) -> None:
        """Begin a phase."""
        for entrant in self.values():
            entrant.enter(phase)

    def made_anew(self, e: int, phase: Phase, round: int) -> Entrant:
        """Return an entrant with the weights that an expert is given for a round."""
        return Entrant(e, self.mixture, phase, round=round, make=self.make)

    def attempt(self, act: Callable[[], None]) -> None:
        """Train something; keep an error until all ranks can agree on it."""
        try:
            if self.bad is None:
                act()
        except NotFinite as error:
            self.bad = str(error)

    def agree(self, where: str) -> None:
        """Fail on every rank where an expert of some rank went wrong.

        Raises:
            Agreed: names the place and the expert.
        """
        found = [bad for bad in gather_json(self.bad, self.mesh.world) if bad]
        if found:
            raise Agreed(f"in {where}: {found[0]}")

    def balance(self, load_E: NDArray[np.float64], phase: Phase, round: int) -> None:
        """Place experts by load, the longest first, if moving them takes less time than it saves.

        Args:
            load_E: seconds that each expert will train, the same on every rank.
            phase: how they train.
            round: of the discriminators that move along.
        """
        balanced = load_balanced(load_E, len(self.homes))
        now, then = (max(sum(load_E[e] for e in experts) for experts in homes) for homes in (self.homes, balanced))
        stays = {e for old, new in zip(self.homes, balanced, strict=True) for e in set(old) & set(new)}
        leaving = sum(t.nbytes for e, entrant in self.items() if e not in stays for t in entrant.tensors().values())
        leaving_W, placement = gather_json(leaving, self.mesh.world), self.mesh.placement
        # Replicas differ in the states that they own: all wait for the one with most, so that they decide alike.
        moved = max(sum(leaving_W[r] for r in placement.ep_ranks(i)) for i in range(placement.num_replicas))
        if now - then > moved / MOVES_A_SECOND:
            self.move(balanced, phase, round)

    def move(self, homes: list[list[int]], phase: Phase, round: int) -> None:
        """Move experts between ranks, with optimiser state and discriminator; every rank calls it.

        A replica moves within its EP group.

        Args:
            homes: the experts of each member of the EP group from now on.
            phase: how they train.
            round: of the discriminators that move along.
        """
        if homes == self.homes:
            return
        me, group, device = self.mesh.member, self.mesh.ep_group, self.mesh.device
        leaving = [sorted(set(self) & set(experts)) if p != me else [] for p, experts in enumerate(homes)]
        parts = [self._pack(experts).to(device) for experts in leaving]
        shapes = [(sizes[me],) for sizes in gather_json([len(part) for part in parts], group)]
        arrived = move(parts, me, shapes, self.wire.all_gather, group)
        here = {e: entrant for e, entrant in self.items() if e in homes[me]}
        for part in arrived:
            found = load(part.cpu().numpy().tobytes()) if len(part) else {}
            for e in {int(name.partition("/")[0]) for name in found}:
                here[e] = Entrant(e, self.mixture, phase, make=self.make)
                here[e].take(under(f"{e}/", found), round)
        self.clear()
        self.update(sorted(here.items()))
        self.homes = homes

    def _pack(self, experts: list[int]) -> Tensor:
        """Return the bytes of some experts, with all that goes with them."""
        if not experts:
            return torch.zeros(0, dtype=torch.uint8)
        tensors = {f"{e}/{name}": t for e in experts for name, t in self[e].tensors().items()}
        return torch.frombuffer(bytearray(save(tensors)), dtype=torch.uint8)

    # What a checkpoint holds

    def owned(self) -> list[Owned]:
        """Return all modules as checkpoints have them."""
        return [one for entrant in self.values() for one in entrant.owned()]

    def state(self) -> dict[int, Any]:
        """Return, as JSON, what all ranks' entrants are beside their modules; every rank calls it."""
        own = {e: {"steps": one.steps, "loss": one.loss, "loss_rows": one.loss_rows} for e, one in self.items()}
        return {e: one for rank in gather_json(own, self.mesh.world) for e, one in rank.items()}

    def load(self, path: Path, state: dict[str, Any], round: int) -> None:
        """Take modules, optimisers and what ``state`` returned from a checkpoint."""
        files = read_manifest(path)["files"]
        for e, entrant in self.items():
            if file_name(f"discriminator {e}", e) in files:
                entrant.meet(round)
            for owned in entrant.owned():
                load_module(path, owned, self)
            entrant.go_to(state[str(e)]["steps"])
            entrant.loss, entrant.loss_rows = state[str(e)]["loss"], state[str(e)]["loss_rows"]

    def kind(self) -> str:
        """Name the optimiser as far as its state depends on it."""
        return next((entrant.engine.kind() for entrant in self.values()), "none")

    def states(self) -> Whole:
        """Return the states of all optimisers, those that have owners on the ranks that write; every rank calls it."""
        return Whole({owned.name: self._engine(owned).whole_state() for owned in self.owned()})

    def load_optimizer_state(self, owned: Owned, state: dict[str, Tensor]) -> None:
        """Put back what a save held of the optimiser's state of a module of some entrant."""
        self._engine(owned).load_state(state)

    def _engine(self, owned: Owned) -> Solo:
        assert owned.expert is not None
        return self[owned.expert].engines[owned.name.split()[0]]


def try_engines(make: SoloFactory, mixture: HardMixture, phases: Sequence[Phase]) -> None:
    """Make an engine with each optimiser of a run: one that cannot be made fails before anything is trained.

    Args:
        make: makes engines.
        mixture: may have an optimiser for discriminators.
        phases: have those of experts.

    Raises:
        ValueError: an engine cannot be made.
    """
    context = mixture.context
    number = nn.ParameterList([torch.zeros(1, device=context.mesh.device)])
    for optimizer in [*(phase.optimizer for phase in phases), *mixture.optimizers().values()]:
        make("engine", number, None, context.wire, optimizer)
