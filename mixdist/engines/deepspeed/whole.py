"""What each rank steps under ZeRO 0: all that it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from mixdist.engines.state import Slot, read_optimizer, write_optimizer
from mixdist.parallel import costs


class Whole:
    """Parameters, gradients and states as they are, on every rank that holds a copy.

    Args:
        engine: DeepSpeed's.
        parts: what all ranks hold, and what replicas hold; their number of members.
        bucket: numbers reduced at a time.
    """

    sharded = False

    def __init__(self, engine: Any, parts: Sequence[tuple[Sequence[nn.Parameter], int]], bucket: int) -> None:
        self.engine, self.bucket = engine, bucket
        self.parameters = [p for held, _ in parts for p in held]
        self.optimizer: Optimizer = engine.optimizer
        self.reduced_bytes = sum(costs.reduction(4 * sum(p.numel() for p in held), ranks) for held, ranks in parts)
        self.spread_bytes = 0

    def reduce(self) -> None:
        """Sum gradients over whoever holds a copy."""
        self.engine.allreduce_gradients(self.bucket)

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Return what this rank has of each parameter's summed gradient."""
        return {p: p.grad for p in self.parameters if p.grad is not None}

    def step(self) -> None:
        """Step parameters by their gradients."""
        self.optimizer.step()

    def drop(self) -> None:
        """Forget reduced gradients."""

    def close(self) -> None:
        """Let go of what is here: the library refers to itself, and would keep it until Python looks for such."""
        self.optimizer.state.clear()

    def state(self, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return what this rank has of the states of named parameters."""
        return read_optimizer(self.optimizer, [Slot(*item) for item in named.items()])

    def load(self, named: Mapping[str, nn.Parameter], state: dict[str, Tensor]) -> None:
        """Put states of named parameters in place."""
        write_optimizer(self.optimizer, [Slot(*item) for item in named.items()], state)
