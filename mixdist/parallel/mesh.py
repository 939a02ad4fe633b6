"""The placement of experts on ranks and the process groups that follow from it; the only place that creates groups.

P is the number of ranks of an expert-parallel (EP) group. Rank r is member r % P of EP group (replica) r // P: an EP
group is a block of neighbouring ranks, so that it fits inside a node and replicas lie across nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from mixdist.parallel.heartbeat import Heartbeat
from mixdist.parallel.identity import own_sources, versions
from mixdist.parallel.launch import Launch
from mixdist.parallel.meeting import Meeting


@dataclass(frozen=True)
class Placement:
    """The placement of experts on ranks: pure arithmetic.

    Args:
        num_experts: K.
        world_size: W, the number of ranks.
        ep_size: P, the number of ranks of an EP group; together they hold each expert once.
    """

    num_experts: int
    world_size: int
    ep_size: int

    @staticmethod
    def plan(num_experts: int, world_size: int, ep_size: int | None = None) -> Placement:
        """Place K experts on W ranks.

        Without ``ep_size``: P = W if W <= K, P = K if K divides W.

        Raises:
            ValueError: nothing fits; the message lists what does.
        """
        if num_experts < 1:
            raise ValueError(f"num_experts ({num_experts}) must be at least 1")
        fitting = [p for p in range(1, min(num_experts, world_size) + 1) if world_size % p == 0]
        listed = " or ".join(filter(None, [", ".join(map(str, fitting[:-1])), str(fitting[-1])]))
        if ep_size is None:
            ep_size = min(num_experts, world_size)
            if world_size % ep_size:
                raise ValueError(
                    f"{num_experts} experts cannot be placed on {world_size} ranks one replica after another: "
                    f"set mesh.ep_size to {listed}, or start at most {num_experts} ranks or a multiple of {num_experts}"
                )
        elif ep_size not in fitting:
            raise ValueError(
                f"num_experts ({num_experts}) cannot be placed on {world_size} ranks with ep_size {ep_size}: ep_size "
                f"must divide the world size and not exceed num_experts; set mesh.ep_size to {listed}"
            )
        return Placement(num_experts, world_size, ep_size)

    @property
    def num_replicas(self) -> int:
        """Return how many copies of each expert exist."""
        return self.world_size // self.ep_size

    def replica_of(self, rank: int) -> int:
        """Return the EP group that ``rank`` belongs to."""
        return rank // self.ep_size

    def member_of(self, rank: int) -> int:
        """Return the position of ``rank`` inside its EP group."""
        return rank % self.ep_size

    def experts_of(self, member: int) -> range:
        """Return the global numbers of the experts of a ``member``: contiguous blocks, as even as possible."""
        first, last = (self.num_experts * m // self.ep_size for m in (member, member + 1))
        return range(first, last)

    def ep_ranks(self, replica: int) -> list[int]:
        """Return the world ranks of an EP group."""
        return list(range(replica * self.ep_size, (replica + 1) * self.ep_size))

    def replica_ranks(self, member: int) -> list[int]:
        """Return the world ranks that hold the same experts."""
        return list(range(member, self.world_size, self.ep_size))


def choose_device(name: str, launch: Launch) -> torch.device:
    """Return this process's device, set before any group is created; all processes of a host choose the same kind.

    Args:
        name: auto (CUDA where each process of the host has a device of its own), cpu or cuda.
        launch: the rank of this process.

    Raises:
        ValueError: CUDA was requested and there is none, or there are more processes than devices.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count < launch.local_size):
        return torch.device("cpu")
    if not count:
        raise ValueError("mesh.device (cuda) needs a CUDA device and none is here: set mesh.device to cpu or auto")
    if launch.local_size > count:
        raise ValueError(
            f"{launch.local_size} processes on this host have {count} CUDA devices: start at most {count}, or set "
            f"mesh.device to cpu"
        )
    device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    return device


class Mesh:
    """This rank's position and its process groups; a group that would have a single member is None.

    Args:
        placement: of experts on ranks.
        launch: the rank of this process.
        device: on which it computes.
        timeout_s: seconds after which a collective that some rank does not enter ends the process.
        card: what else must be the same on every rank, JSON by name.

    Raises:
        ValueError: the ranks do not meet, or were not started alike.
    """

    def __init__(
        self,
        placement: Placement,
        launch: Launch,
        device: torch.device,
        timeout_s: float = 600.0,
        card: Mapping[str, Any] | None = None,
    ) -> None:
        self.placement, self.device = placement, device
        self.rank, self.world_size = launch.rank, launch.world_size
        self.member = placement.member_of(self.rank)
        self.replica = placement.replica_of(self.rank)
        self.timeout = timedelta(seconds=timeout_s)
        self.heartbeat: Heartbeat | None = None
        self.world: dist.ProcessGroup | None = None
        self.ep_group: dist.ProcessGroup | None = None
        self.replica_group: dist.ProcessGroup | None = None
        if self.world_size == 1:
            return
        if dist.is_initialized():
            self._make_groups()
            return
        meeting = Meeting(launch, timeout_s)
        meeting.agree(self._card(card or {}), timeout_s)
        with meeting.watched():
            self._start(meeting.store)
            self._make_groups()

    def _card(self, card: Mapping[str, Any]) -> dict[str, Any]:
        """Return what must be the same on every rank, what a user can change first."""
        placed = {
            "num_experts": self.placement.num_experts,
            "mesh.ep_size": self.placement.ep_size,
            "mesh.timeout_s": self.timeout.total_seconds(),
            "the device": self.device.type,
        }
        return {"WORLD_SIZE": self.world_size, **versions(), **card, **placed, **own_sources()}

    def _start(self, store: dist.Store) -> None:
        """Make the group of all ranks."""
        self._init_group(store)
        self.heartbeat = Heartbeat(store, self.rank, self.world_size)

    def _init_group(self, store: dist.Store) -> None:
        cuda = self.device.type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            timeout=self.timeout,
            rank=self.rank,
            world_size=self.world_size,
            device_id=self.device if cuda else None,
        )

    def _make_groups(self) -> None:
        self.world = dist.group.WORLD
        self.ep_group = self._group([self.placement.ep_ranks(r) for r in range(self.placement.num_replicas)])
        self.replica_group = self._group([self.placement.replica_ranks(m) for m in range(self.placement.ep_size)])

    def missing(self) -> tuple[list[int], bool]:
        """Return, after a collective failed, which ranks are dead, and whether this rank should report it."""
        assert self.heartbeat is not None
        for group in (self.ep_group, self.replica_group, self.world):
            with suppress(RuntimeError):
                if group is not None:
                    group.abort()  # ranks that wait for this one fail at once
        return self.heartbeat.missing()

    def _group(self, partition: list[list[int]]) -> dist.ProcessGroup | None:
        # new_group requires that every rank creates every group, in the same order.
        if len(partition[0]) == 1:
            return None
        if len(partition) == 1:
            return self.world
        groups = [dist.new_group(ranks, timeout=self.timeout) for ranks in partition]
        return next(g for ranks, g in zip(partition, groups, strict=True) if self.rank in ranks)

    @cached_property
    def alone(self) -> dist.ProcessGroup:
        """A group of this rank by itself, for libraries that take no None; in one process it is the group of all."""
        if self.world is not None:
            group: dist.ProcessGroup = dist.new_group([self.rank], self.timeout, use_local_synchronization=True)
            return group
        self._init_group(dist.HashStore())
        assert dist.group.WORLD is not None
        return dist.group.WORLD

    @property
    def experts(self) -> range:
        """Return the global numbers of the experts on this rank."""
        return self.placement.experts_of(self.member)

    @property
    def leads(self) -> bool:
        """Return True on the ranks that write and count their experts: those of the first replica."""
        return self.replica == 0

    def speaks_for(self, expert: int | None) -> bool:
        """Return whether this rank writes and counts one of its experts, or (None) the shared modules: each once."""
        return self.rank == 0 if expert is None else self.leads

    def close(self) -> None:
        """Destroy the process groups."""
        if self.heartbeat is not None:
            self.heartbeat.stop()
        if (self.world is not None or "alone" in vars(self)) and dist.is_initialized():
            dist.destroy_process_group()
