"""Communication outside a step: gathered values, and errors that every rank raises."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from mixdist.messages import SharedError, format_error, one_line
from mixdist.parallel.identity import difference
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import Group, LostRank, together

T = TypeVar("T")


class Agreed(SharedError):
    """An error of one rank or of several that all have agreed to raise."""


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


def alike(named: Mapping[str, Any], group: Group, remark: str = "") -> None:
    """Check this rank's values, JSON by name, against rank 0's.

    Args:
        named: the values.
        group: the ranks, all of which call it.
        remark: shown with a value that differs; may differ itself.

    Raises:
        Agreed: a rank has another value than rank 0; names the first.
    """
    everyone = gather_json([dict(named), remark], group)
    for rank, (values, said) in enumerate(everyone):
        told = difference(everyone[0][0], values, rank, (everyone[0][1], said))
        if told is not None:
            raise Agreed(told)


def agreed(act: Callable[[], T], group: Group) -> T:
    """Return what ``act`` returns on this rank, or fail on every rank if it fails on one.

    Raises:
        Agreed: ``act`` raised on some rank. One that raised anything but a ValueError or an OSError raises that itself.
    """
    try:
        made, error = _attempt(act)
    except LostRank:
        raise
    except Exception as bug:
        with suppress(Agreed):
            agree(f"{type(bug).__name__}: {one_line(str(bug))}", group)
        raise
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
