"""Worker processes: the one pool that decodes, indexes, verifies and prepares. Needs no torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import connection
from typing import Any, Generic, TypeVar

T = TypeVar("T")
S = TypeVar("S")

MOST_WORKERS = 16
_here: dict[str, Any] = {}
"""In a worker process: the function that it calls, and the event that asks it to stop."""


def default_workers() -> int:
    """Return one process for each core that this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


def stopping() -> bool:
    """Return whether this worker process is asked to give up its work; always False elsewhere."""
    return "stop" in _here and bool(_here["stop"].is_set())


class Workers(Generic[T, S]):
    """Calls a function in processes of its own.

    Processes start as they are needed and end with this one, however that ends. They hold no state but the function:
    which of them takes an item changes nothing. They come from a fork server, since this process may have threads that
    a fork would not take along: the server imports the function's module once, and its children share that memory.

    Args:
        function: of a module, a partial of one, or a method of an object that pickles; each process is sent it once.
        num: processes.
        remedy: what a user can do where a process is killed.
    """

    def __init__(self, function: Callable[[T], S], num: int, remedy: str) -> None:
        self.function, self.num, self.remedy = function, num, remedy
        self._context = multiprocessing.get_context("forkserver")
        self._stop: Any = None
        self._executor: ProcessPoolExecutor | None = None

    def start(self, item: T) -> Callable[[], S]:
        """Start a call; return a callable that blocks until its result is there.

        Raises:
            ValueError: here or in that callable: a process was killed.
        """
        # Ctrl-C is handled by this process alone: worker processes inherit that it is blocked.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return partial(self._result, self._processes().submit(_call, item))
        except BrokenProcessPool:
            raise self._killed() from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def map(self, items: Iterable[T]) -> Generator[S, None, None]:
        """Yield a result for each item, in order, while those that follow are made; then end the processes.

        With 0 or 1 processes this one does it.

        Raises:
            ValueError: a process was killed. What the function raises comes from the first item that makes it.
        """
        if self.num <= 1:
            yield from map(self.function, items)
            return
        ahead: deque[Callable[[], S]] = deque()
        try:
            for item in items:
                ahead.append(self.start(item))
                if len(ahead) > 2 * self.num:
                    yield ahead.popleft()()
            while ahead:
                yield ahead.popleft()()
        finally:
            self.close()

    def close(self) -> None:
        """End the processes: tasks not yet started are dropped, and running ones can check :func:`stopping`."""
        if self._executor is not None:
            self._stop.set()
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def _processes(self) -> ProcessPoolExecutor:
        if self._executor is None:
            self._context.set_forkserver_preload([getattr(self.function, "func", self.function).__module__])
            self._stop = self._context.Event()
            given = self.function, self._stop
            self._executor = ProcessPoolExecutor(self.num, mp_context=self._context, initializer=_begin, initargs=given)
        return self._executor

    def _result(self, future: Future[S]) -> S:
        try:
            return future.result()
        except BrokenProcessPool:
            raise self._killed() from None

    def _killed(self) -> ValueError:
        many = f"one of {self.num} worker processes" if self.num > 1 else "the worker process"
        return ValueError(f"{many} was killed, most likely because memory ran out: {self.remedy}")


def _begin(function: Callable[[Any], Any], stop: Any) -> None:
    _here.update(function=function, stop=stop)
    # Not by the kernel's death signal: that would come from the fork server, which lives as long as its children.
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _call(item: Any) -> Any:
    return _here["function"](item)
