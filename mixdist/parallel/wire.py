"""Collectives, counted and timed where they are called.

Two kinds of traffic: ``wire`` is what dispatch moves (rows, losses, weights), ``sync`` is reductions of replicated
tensors (gradients of the gate and of replicas, sums over the batch). Bytes are those that leave this rank; a reduction
of n bytes over W ranks counts 2 (W - 1) / W n, the traffic of a ring all-reduce.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mixdist.parallel.costs import reduction

Group = dist.ProcessGroup | None
# torch 2.13 renames both, and warns of the former names.
_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass
class Meter:
    """Bytes and times of this rank's collectives since the last reset.

    Args:
        wire_bytes: bytes that dispatch sent to other ranks, counted at the collectives.
        wire_bytes_min: the minimum for the same rows and experts, computed from the routing alone.
        sync_bytes: bytes of reductions of replicated tensors.
        collective_times: for each collective, in order, the seconds until the last rank of its group arrived, and the
            seconds inside it after all had arrived; measured only if ``timed``.
    """

    wire_bytes: int = 0
    wire_bytes_min: int = 0
    sync_bytes: int = 0
    collective_times: list[tuple[float, float]] = field(default_factory=list)
    timed: bool = False

    @property
    def waiting_s(self) -> float:
        """Return the seconds of waiting for ranks to arrive."""
        return sum(waiting for waiting, _ in self.collective_times)

    @property
    def transfer_s(self) -> float:
        """Return the seconds inside collectives after all ranks had arrived."""
        return sum(transfer for _, transfer in self.collective_times)

    def reset(self, timed: bool = False) -> None:
        """Start a new count; ``timed`` puts a barrier before each collective to separate waiting from transfer."""
        self.wire_bytes = self.wire_bytes_min = self.sync_bytes = 0
        self.collective_times = []
        self.timed = timed


class LostRank(RuntimeError):
    """A collective did not complete: some rank has died, hangs, or called another collective."""


@contextmanager
def together() -> Iterator[None]:
    """Turn the error of a failed collective into ``LostRank``.

    Raises:
        LostRank: the backend raised an error.
    """
    try:
        yield
    except RuntimeError as error:
        raise LostRank(str(error)) from error


class Wire:
    """Counted collectives of one rank.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.meter = Meter()

    def all_to_all(self, flat: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Pending:
        """Send ``sent[p]`` numbers of ``flat`` to member p, receive ``received[p]``; return a handle to the result."""
        self.meter.wire_bytes += sum(sent) * flat.element_size()
        return self._all_to_all(flat, sent, received, group)

    def all_gather(self, flat: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Pending:
        """Do ``all_to_all``, counted as sync: the same values go to every member."""
        self.meter.sync_bytes += sum(sent) * flat.element_size()
        return self._all_to_all(flat, sent, received, group)

    def scatter(self, flat: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Pending:
        """Do ``all_to_all``, counted as sync: parts of what is replicated go to who sums or keeps them."""
        self.meter.sync_bytes += sum(sent) * flat.element_size()
        return self._all_to_all(flat, sent, received, group)

    def _all_to_all(self, flat: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Pending:
        assert group is not None
        assert flat.is_contiguous()
        output = flat.new_empty(sum(received))

        def start() -> Any:
            return dist.all_to_all_single(output, flat, list(received), list(sent), group=group, async_op=True)

        return self._run(start, output, flat, group)

    def all_gather_into(self, output: Tensor, flat: Tensor, group: Group) -> Pending:
        """Start to bring every member's ``flat``, all of one size, into ``output`` in the order of members."""
        assert group is not None
        self.meter.sync_bytes += (dist.get_world_size(group) - 1) * flat.numel() * flat.element_size()
        return self._run(lambda: _gather_single(output, flat, group=group, async_op=True), output, flat, group)

    def reduce_scatter(self, output: Tensor, flat: Tensor, group: Group) -> Pending:
        """Start to sum the members' ``flat``, and to bring the part of a member's number into its ``output``."""
        assert group is not None
        self.meter.sync_bytes += (flat.numel() - output.numel()) * flat.element_size()
        return self._run(lambda: _reduce_single(output, flat, group=group, async_op=True), output, flat, group)

    def all_reduce(self, tensor: Tensor, group: Group) -> Tensor:
        """Sum ``tensor`` in place over the group; does nothing for a group of None (one process)."""
        return self.start_all_reduce(tensor, group).wait()

    def start_all_reduce(self, tensor: Tensor, group: Group) -> Pending:
        """Start an ``all_reduce``; return a handle to the sum."""
        if group is None:
            return Pending(tensor, tensor, None)
        assert tensor.is_contiguous()
        self.meter.sync_bytes += reduction(tensor.numel() * tensor.element_size(), dist.get_world_size(group))
        return self._run(lambda: dist.all_reduce(tensor, group=group, async_op=True), tensor, tensor, group)

    def _run(self, start: Callable[[], Any], output: Tensor, held: Tensor, group: Group) -> Pending:
        with together():
            if not self.meter.timed:
                return Pending(output, held, start())
            begin = self._now()
            dist.all_reduce(torch.zeros(1, device=self.device), group=group)
            arrived = self._now()
            pending = Pending(output, held, start())
        pending.wait()
        self.meter.collective_times.append((arrived - begin, self._now() - arrived))
        return pending

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Pending:
    """A running collective. It keeps the send buffer, which must not change until ``wait`` returns."""

    def __init__(self, output: Tensor, held: Tensor, work: Any) -> None:
        self.output = output
        self.held: Tensor | None = held
        self.work = work

    def wait(self) -> Tensor:
        """Return the result once it has arrived."""
        if self.work is not None:
            with together():
                self.work.wait()
            self.work = self.held = None
        return self.output
