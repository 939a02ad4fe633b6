"""Communication outside a step: gathered values, and errors that every rank raises."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from mixdist.messages import format_error
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import Group, together

T = TypeVar("T")


class Agreed(ValueError):
    """An error that every rank raises with the same message; one of them prints it."""


def gather_bytes(data: bytes, group: Group) -> list[bytes]:
    """Return every rank's bytes, in rank order, on every rank; the control plane's one collective, never pickled."""
    if group is None:
        return [data]
    size = dist.get_world_size(group)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    with together():
        dist.all_gather(lengths, torch.tensor([len(data)]), group=group)
    longest = max(int(n) for n in lengths)
    if not longest:
        return [b""] * size
    mine = torch.frombuffer(bytearray(data.ljust(longest, b"\0")), dtype=torch.uint8)
    everyone = [torch.zeros_like(mine) for _ in range(size)]
    with together():
        dist.all_gather(everyone, mine, group=group)
    return [t[: int(n)].numpy().tobytes() for t, n in zip(everyone, lengths, strict=True)]


def gather_json(value: Any, group: Group) -> list[Any]:
    """Return every rank's JSON value, in rank order, on every rank."""
    return [json.loads(data) for data in gather_bytes(json.dumps(value).encode(), group)]


def agree(error: str | None, group: Group) -> None:
    """Raise on every rank if one has an error, so that none waits for it.

    Raises:
        Agreed: some rank has an error: the same message on every rank, naming the rank if not all have it.
    """
    errors = gather_json(error, group)
    bad = [(rank, e) for rank, e in enumerate(errors) if e]
    if bad:
        rank, first = bad[0]
        raise Agreed(first if len(bad) == len(errors) else f"rank {rank}: {first}")


def alike(name: str, value: Any, group: Group) -> None:
    """Check this rank's value against every other's.

    Raises:
        Agreed: a rank has another value than rank 0.
    """
    values = gather_json(value, group)
    other = next((rank for rank, theirs in enumerate(values) if theirs != values[0]), None)
    if other is not None:
        raise Agreed(f"{name} of rank {other} ({values[other]}) differs from rank 0's ({values[0]}): give all the same")


def agreed(act: Callable[[], T], group: Group) -> T:
    """Return what ``act`` returns on this rank, or fail on every rank if it fails on one.

    Raises:
        Agreed: ``act`` raised a ValueError or an OSError on some rank.
    """
    made, error = _attempt(act)
    agree(error, group)
    return cast(T, made)


def on_rank_0(act: Callable[[], T], mesh: Mesh) -> T:
    """Return on every rank what ``act``, called on rank 0 alone, returns there as JSON.

    Raises:
        Agreed: ``act`` raised a ValueError or an OSError; the same message on every rank.
    """
    made, error = gather_json(_attempt(act) if mesh.rank == 0 else None, mesh.world)[0]
    if error is not None:
        raise Agreed(error)
    return cast(T, made)


def _attempt(act: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return what ``act`` returns, or its error as one line."""
    try:
        return act(), None
    except (ValueError, OSError) as mistake:
        return None, format_error(mistake)
