"""Worker processes that make shards side by side, and end with their parent."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from mixdist.data.prepare.writer import Made, ShardWriter, Task
from mixdist.data.shards.processes import end_with_parent, submit

_here: dict[str, Any] = {}
"""What a worker process was given when it started."""


def make_all(writer: ShardWriter, tasks: Iterable[Task], workers: int) -> Generator[Made, None, None]:
    """Make shards in any order.

    Args:
        writer: makes one.
        tasks: a shard each.
        workers: processes; with 0 or 1 this process does it.

    Raises:
        ValueError: a file of the source cannot be read, or a worker process was killed.
        OSError: a shard cannot be written.
    """
    if workers <= 1:
        yield from map(writer.make, tasks)
        return
    context = get_context("spawn")  # torch and Arrow have threads, which a fork would not take along
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(writer, stop))
    try:
        pending: set[Future[Made]] = set()
        for task in tasks:
            pending.add(submit(pool, _make, task))
            if len(pending) >= 2 * workers:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool:
        raise ValueError(
            f"one of {workers} worker processes was killed, perhaps for want of memory: give the same command again "
            "with fewer --workers: it goes on where it stopped"
        ) from None
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _start(writer: ShardWriter, stop: Any) -> None:
    _here.update(writer=writer, stop=stop)
    end_with_parent()


def _make(task: Task) -> Made:
    made: Made = _here["writer"].make(task, _here["stop"].is_set)
    return made
