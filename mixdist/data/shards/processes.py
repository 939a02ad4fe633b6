"""Processes that work for this one and end with it."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from typing import Any


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


def _begin(begin: Callable[..., None] | None, args: tuple[Any, ...]) -> None:
    """Start a process: it ends with the one that started it, which alone hears of Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError, AttributeError):  # Linux alone has it; PR_SET_PDEATHSIG is 1
        ctypes.CDLL("libc.so.6").prctl(1, int(signal.SIGKILL))
    if begin is not None:
        begin(*args)
