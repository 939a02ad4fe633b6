"""Tensors that several ranks hold a copy of: where their gradients are summed, and which rank steps them.

Shape letters: T tensors, P members of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mixdist.parallel.agreement import gather_json
from mixdist.parallel.costs import balanced
from mixdist.parallel.wire import Group, Wire

NO_BYTES = torch.empty(0, dtype=torch.uint8)


class Copies:
    """Tensors that every rank of a group holds and steps alike; their gradients are summed everywhere.

    Args:
        tensors: that learn, the same on every rank of the group.
        group: None for this rank alone.
        wire: the counted collectives.
    """

    def __init__(self, tensors: Sequence[Tensor], group: Group, wire: Wire) -> None:
        self.tensors, self.group, self.wire = list(tensors), group, wire

    @property
    def owned(self) -> list[Tensor]:
        """The tensors that this rank steps."""
        return self.tensors

    @property
    def spread_bytes(self) -> int:
        """What ``start_spread`` will send."""
        return 0

    def start_reduce(self) -> Callable[[], None]:
        """Start to sum gradients over the group; what is returned puts the sums in their place."""
        grads = gradients(self.tensors)
        if self.group is None or not grads:
            return nothing
        pending = self.wire.start_all_reduce(torch.cat([g.reshape(-1) for g in grads]), self.group)
        return lambda: put(grads, pending.wait())

    def start_spread(self) -> Callable[[], None]:
        """Start to send what was stepped to who did not step it; what is returned puts it in its place."""
        return nothing


class Shards(Copies):
    """Tensors of which each is stepped by one member of the group, its owner, and sent to the others as it is.

    Each gradient is summed at its owner alone, in the order of ranks; on the other ranks it is None afterwards. Both
    ways together send what one reduction for everybody does.

    Args:
        tensors: that learn, the same on every rank of the group.
        group: None for this rank alone.
        wire: the counted collectives.
        load_P: bytes that each member owns already.
        turn: the member that comes first of those that own equally much.
    """

    def __init__(
        self, tensors: Sequence[Tensor], group: Group, wire: Wire, load_P: Sequence[int] = (), turn: int = 0
    ) -> None:
        super().__init__(tensors, group, wire)
        self.me, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        owners_T = balanced([t.numel() * t.element_size() for t in tensors], load_P or [0] * size, turn)
        pairs = list(zip(owners_T, tensors, strict=True))
        self.of_P = [[t for owner, t in pairs if owner == p] for p in range(size)]
        self.numel_P = [sum(t.numel() for t in part) for part in self.of_P]

    @property
    def owned(self) -> list[Tensor]:
        return self.of_P[self.me]

    @property
    def spread_bytes(self) -> int:
        return (len(self.of_P) - 1) * sum(t.numel() * t.element_size() for t in self.owned)

    def start_reduce(self) -> Callable[[], None]:
        if self.group is None or not self.tensors:
            return nothing
        rest = [t for p, part in enumerate(self.of_P) for t in part if p != self.me]
        flat = self._flat(gradients(rest))
        for tensor in rest:
            tensor.grad = None
        received_P = [0 if p == self.me else self.numel_P[self.me] for p in range(len(self.of_P))]
        pending = self.wire.scatter(flat, self._but_mine(self.numel_P), received_P, self.group)
        own = gradients(self.owned)

        def finish() -> None:
            parts = list(pending.wait().split(received_P))
            parts[self.me] = self._flat(own)
            total = parts[0]
            for part in parts[1:]:
                total += part
            put(own, total)

        return finish

    @torch.no_grad()
    def start_spread(self) -> Callable[[], None]:
        if self.group is None or not self.tensors:
            return nothing
        # Bytes, as weights may be bfloat16 beside others that are not.
        bytes_P = [sum(t.numel() * t.element_size() for t in part) for part in self.of_P]
        sent_P = self._but_mine([bytes_P[self.me]] * len(self.of_P))
        flat = torch.cat([NO_BYTES.to(self.tensors[0].device), *(as_bytes(t) for t in self.owned)])
        received_P = self._but_mine(bytes_P)
        pending = self.wire.all_gather(flat.repeat(len(self.of_P) - 1), sent_P, received_P, self.group)
        rest = [t for p, part in enumerate(self.of_P) for t in part if p != self.me]
        return lambda: put_bytes(rest, pending.wait())

    def _but_mine(self, numbers_P: Sequence[int]) -> list[int]:
        return [0 if p == self.me else n for p, n in enumerate(numbers_P)]

    def _flat(self, grads: Sequence[Tensor]) -> Tensor:
        """Return the numbers of gradients as one; a member may have none."""
        first = self.tensors[0]
        empty = torch.empty(0, dtype=gradient_dtype(first), device=first.device)
        return torch.cat([empty, *(g.reshape(-1) for g in grads)])


def bring(state: dict[str, Tensor], group: Group, wire: Wire) -> dict[str, Tensor]:
    """Bring named tensors together on the group's first member, in CPU memory; the others get none.

    Args:
        state: this rank's; no other rank has one of its names.
        group: the ranks, all of which call it; None for this rank alone, which has all as it is.
        wire: the counted collectives.
    """
    if group is None:
        return state
    state = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    kinds = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in state.items()]
    flat = torch.cat([NO_BYTES, *(as_bytes(t) for t in state.values())])
    kinds_P, bytes_P = zip(*gather_json([kinds, len(flat)], group), strict=True)
    me, rest = dist.get_rank(group), [0] * (len(bytes_P) - 1)
    sent_P, received_P = [len(flat) if me else 0, *rest], [0, *(rest if me else bytes_P[1:])]
    received = wire.scatter(flat if me else flat[:0], sent_P, received_P, group).wait()
    if me:
        return {}
    for kinds, part in zip(kinds_P[1:], received.split(received_P)[1:], strict=True):
        for name, dtype, shape in kinds:
            num_bytes = torch.Size(shape).numel() * getattr(torch, dtype).itemsize
            state[name] = part[:num_bytes].clone().view(getattr(torch, dtype)).reshape(shape)
            part = part[num_bytes:]
    return state


def gradients(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of tensors that have one."""
    return [t.grad for t in tensors if t.grad is not None]


def gradient_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of a tensor's gradient, which in torch before 2.10 is always its own."""
    return getattr(tensor, "grad_dtype", None) or tensor.dtype


@torch.no_grad()
def put(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Write numbers into tensors, one after another."""
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor's numbers, in their order."""
    return tensor.detach().reshape(-1).view(torch.uint8)


@torch.no_grad()
def put_bytes(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Write bytes into tensors, one after another."""
    for tensor, part in zip(tensors, flat.split([t.numel() * t.element_size() for t in tensors]), strict=True):
        aligned = part if part.storage_offset() % tensor.element_size() == 0 else part.clone()
        tensor.copy_(aligned.view(tensor.dtype).view_as(tensor))


def nothing() -> None:
    """Do nothing: all is in its place."""
