"""Processes that work for this one and end with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import connection
from typing import Any, TypeVar

T = TypeVar("T")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def executor(workers: int, preload: str, begin: Callable[..., None] | None = None, *args: Any) -> ProcessPoolExecutor:
    """Make a pool of processes, started as they are needed.

    They come from a fork server, since this process may have threads that a fork would not take along: the server
    imports ``preload`` once, and its children share that memory.

    Args:
        workers: how many.
        preload: name of the module whose functions they run.
        begin: is called first in each, with ``args``.
        args: picklable.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(begin, args))


def submit(pool: ProcessPoolExecutor, function: Callable[..., T], *args: Any) -> Future[T]:
    """Hand work to a pool. Ctrl-C is this process's affair: those that start here inherit that it is blocked.

    Raises:
        BrokenProcessPool: one of the processes was ended from outside.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(function, *args)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Let this process end when the one it works for is gone: nobody would take what it makes, and it would wait."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _begin(begin: Callable[..., None] | None, args: tuple[Any, ...]) -> None:
    # Not the death signal of the kernel: that of the fork server would come, which lives as long as its children.
    end_with_parent()
    if begin is not None:
        begin(*args)
