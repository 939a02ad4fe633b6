"""What every mixture is to the trainer: something that turns a shard of rows into gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from mixdist.data import Shard
from mixdist.noise import Moment
from mixdist.objectives import Objective
from mixdist.terms import Outcome


class Owned(NamedTuple):
    """A module with its name in checkpoints and messages, and the expert it is, if it is one."""

    name: str
    module: nn.Module
    expert: int | None = None


@dataclass(frozen=True)
class Parts:
    """The modules of a mixture on this rank.

    Args:
        shared: replicated on every rank: the gate, a shared decoder; by name.
        experts: this rank's experts by global number.
        stack: where experts run as one stack, the tensors that their parameters are slices of, by the parameter's
            name; the leading axis is that of ``experts``.
    """

    shared: dict[str, nn.Module]
    experts: dict[int, nn.Module] = field(default_factory=dict)
    stack: dict[str, Tensor] = field(default_factory=dict)

    def owned(self) -> list[Owned]:
        """All of them, shared ones first, experts in ascending order."""
        experts = [Owned(f"expert {e}", module, e) for e, module in self.experts.items()]
        return [Owned(name, module) for name, module in self.shared.items()] + experts


class Mixture(Protocol):
    """A short program over gate, experts and dispatch."""

    @property
    def parts(self) -> Parts:
        """Its modules on this rank."""

    def backward(
        self, shard: Shard, objective: Objective, at: Moment, num_parts: int = 1, upcoming: Shard | None = None
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
