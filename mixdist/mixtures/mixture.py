"""What every mixture is to the trainer: something that turns a shard of rows into gradients."""

from __future__ import annotations

from typing import Protocol

from mixdist.data import RankBatch
from mixdist.mixtures.objectives import Objective
from mixdist.noise import Moment
from mixdist.terms import Outcome, Parts


class Mixture(Protocol):
    """A short program over gate, experts and dispatch."""

    @property
    def parts(self) -> Parts:
        """Its modules on this rank."""

    def backward(
        self, shard: RankBatch, objective: Objective, at: Moment, num_parts: int = 1, upcoming: RankBatch | None = None
    ) -> Outcome:
        """Add this rank's part of the gradient of the global loss to every parameter's ``grad``.

        Args:
            shard: this rank's rows of the global batch, and how many rows every rank has.
            objective: what to minimise.
            at: names the random draws.
            num_parts: micro-batches; the gradient is the same for any number.
            upcoming: the next step's rows, which may be sent already; the next call is then for this very shard.
        """

    def settle(self) -> None:
        """Wait for what is under way for a step that will not come."""
