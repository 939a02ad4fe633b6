"""Shards taken side by side by worker processes; what is found comes in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from mixdist.data.shards.processes import cores, executor, submit

T = TypeVar("T")
S = TypeVar("S")

_SMALL = 256 << 20
_MOST = 16


def default_workers(num_shards: int, num_bytes: int) -> int:
    """Return one process a core, at most 16, and none where this one is done before they would have started."""
    workers = min(cores(), num_shards, _MOST)
    return 0 if workers < 2 or num_bytes < _SMALL else workers


def in_order(take: Callable[[T], S], items: Sequence[T], workers: int) -> Generator[S, None, None]:
    """Return ``take(item)`` for each item, in order.

    Args:
        take: a function of a module, or a partial of one, since processes are told its name.
        items: what it is given.
        workers: processes; with 0 or 1 this one does it.

    Raises:
        ValueError: a process was ended from outside; or what ``take`` raises, of the first item that does.
    """
    if workers <= 1:
        yield from map(take, items)
        return
    pool = executor(workers, getattr(take, "func", take).__module__)
    waiting: deque[Future[S]] = deque()
    try:
        for item in items:
            waiting.append(submit(pool, take, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ValueError(
            f"one of {workers} worker processes was ended from outside, mostly for want of memory: start again with "
            "fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
