"""The experts of one rank in a competition: where they live, how they go wrong together, what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mixdist.competition.entrant import Entrant
from mixdist.competition.mixture import HardMixture
from mixdist.competition.placement import better_homes, move_entrants
from mixdist.engines import NotFinite
from mixdist.parallel.agreement import Agreed, gather_json
from mixdist.terms import Owned
from mixdist.training.checkpoint import load_module
from mixdist.training.manifest import file_name, read_manifest
from mixdist.training.phases import Phase


class Entrants(dict[int, Entrant]):
    """Entrants by their experts' numbers, ascending.

    Args:
        mixture: has the experts.
        phase: how they train.

    Attributes:
        homes: each member's experts.
    """

    def __init__(self, mixture: HardMixture, phase: Phase) -> None:
        super().__init__({e: Entrant(e, mixture, phase, expert) for e, expert in mixture.bank.owned().items()})
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

    def attempt(self, act: Callable[[], None]) -> None:
        """Train something; what goes wrong is kept until all ranks can agree on it."""
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
            raise Agreed(f"{where}: {found[0]}")

    def balance(self, load_E: NDArray[np.float64], phase: Phase, round: int) -> None:
        """Move experts to where they are trained soonest, if that takes less time than it saves.

        Args:
            load_E: seconds that each expert will train.
            phase: how they train.
            round: of the discriminators that move along.
        """
        self.move(better_homes(self, self.homes, load_E, self.mesh), phase, round)

    def move(self, homes: list[list[int]], phase: Phase, round: int) -> None:
        """Move experts between ranks, with optimiser state and discriminator; every rank calls it."""
        if homes == self.homes:
            return
        make = partial(Entrant, mixture=self.mixture, phase=phase)
        here = move_entrants(self, homes, self.mesh, self.wire, make, round)
        self.clear()
        self.update(here)
        self.homes = homes

    # What a checkpoint holds

    def owned(self) -> list[Owned]:
        """Return all modules as checkpoints have them."""
        return [one for entrant in self.values() for one in entrant.owned()]

    def state(self) -> dict[int, Any]:
        """Return, as JSON, what all ranks' entrants are beside their modules; every rank calls it."""
        own = {
            e: {"steps": entrant.steps, "loss": entrant.loss, "loss_rows": entrant.loss_rows}
            for e, entrant in self.items()
        }
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

    def optimizer_state(self, owned: Owned) -> dict[str, Tensor]:
        """Return the optimiser's state of a module of some entrant."""
        assert owned.expert is not None
        return self[owned.expert].engine_of(owned).state()

    def load_optimizer_state(self, owned: Owned, state: dict[str, Tensor]) -> None:
        """Put back what ``optimizer_state`` returned."""
        assert owned.expert is not None
        self[owned.expert].engine_of(owned).load_state(state)
