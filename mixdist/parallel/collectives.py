"""Differentiable collectives, and sums over the global batch.

Local losses sum to the global loss, so the backward pass of each collective is the transpose of its move.

Shape letters: B rows of this rank, W ranks in all, P ranks of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import Group, Pending, Wire

Shapes = Sequence[tuple[int, ...]]


class _AllToAll(torch.autograd.Function):
    """An all-to-all of flat numbers; its backward pass sends every gradient back to where the number came from."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, move: Callable[..., Pending], sent: list[int], received: list[int]) -> Tensor:
        ctx.move, ctx.sent, ctx.received = move, sent, received
        return move(flat, sent, received).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.move(grads[0].contiguous(), ctx.received, ctx.sent).wait(), None, None, None


class _AllReduce(torch.autograd.Function):
    """The sum over ranks; its backward pass sums every rank's gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, wire: Wire, group: Group) -> Tensor:
        ctx.wire, ctx.group = wire, group
        # Gloo sums memory without regard to strides, which must be the same on every rank.
        return wire.all_reduce(tensor.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.wire.all_reduce(grads[0].clone(memory_format=torch.contiguous_format), ctx.group), None, None


class OverBatch:
    """Statistics of the global batch; the identity in one process. Nothing else computes them.

    Args:
        mesh: this rank's position.
        wire: the collectives; traffic counts as sync.
    """

    def __init__(self, mesh: Mesh, wire: Wire) -> None:
        self.mesh, self.wire = mesh, wire

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of x over all ranks."""
        return x if self.mesh.world is None else _AllReduce.apply(x, self.wire, self.mesh.world)

    def start_sum(self, x: Tensor) -> Pending:
        """Start to sum x, which needs no gradient, over all ranks; return a handle to the sum."""
        return self.wire.start_all_reduce(x.detach().clone(memory_format=torch.contiguous_format), self.mesh.world)

    def gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the rows (B, ...) of all ranks, in rank order: (sum of counts, ...)."""
        if self.mesh.world is None:
            return x
        assert x.shape[0] == counts[self.mesh.rank]
        shapes = [(n, *x.shape[1:]) for n in counts]
        return torch.cat(move([x] * len(counts), self.mesh.rank, shapes, self.wire.all_gather, self.mesh.world))

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Give all ranks the values that tensors, real numbers of the same shapes on every rank, have on rank 0."""
        flat = torch.cat([one.detach().reshape(-1).double() for one in tensors])
        counts = [len(flat), *[0] * (self.mesh.world_size - 1)]
        first = self.gather(flat[: counts[self.mesh.rank]], counts)
        for one, part in zip(tensors, first.split([one.numel() for one in tensors]), strict=True):
            one.detach().copy_(part.view_as(one))

    def share(self, total: Tensor) -> Tensor:
        """Return this rank's part of a term that every rank computes in full."""
        return total / self.mesh.world_size


def move(
    parts: Sequence[Tensor], me: int, shapes: Shapes, collective: Callable[..., Pending], group: Group
) -> list[Tensor]:
    """Send parts[p] to member p, return what each member sent here, of shapes[p]; parts[me] stays here."""
    if group is None:
        return [parts[me]]

    def start(x: Tensor, a: list[int], b: list[int]) -> Pending:
        return collective(x, a, b, group)

    flat, sent, sizes = flatten(parts, me, shapes)
    return unflatten(_AllToAll.apply(flat, start, sent, sizes), parts[me], me, shapes, sizes)


def flatten(parts: Sequence[Tensor], me: int, shapes: Shapes) -> tuple[Tensor, list[int], list[int]]:
    """Concatenate the other members' parts; return them with the count of numbers sent to and received from each."""
    others = [part[:0] if p == me else part for p, part in enumerate(parts)]
    sizes = [0 if p == me else math.prod(shape) for p, shape in enumerate(shapes)]
    return torch.cat([part.reshape(-1) for part in others]), [part.numel() for part in others], sizes


def unflatten(flat: Tensor, own: Tensor, me: int, shapes: Shapes, sizes: list[int]) -> list[Tensor]:
    """Split received numbers into their parts; this rank's place holds ``own``."""
    cut = flat.split(sizes)
    return [own if p == me else part.reshape(shape) for p, (part, shape) in enumerate(zip(cut, shapes, strict=True))]
