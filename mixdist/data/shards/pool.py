"""Decoding processes of a rank. They hold no state: which of them reads a sample changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixdist.data.shards.processes import executor, submit
from mixdist.data.shards.reader import Bad, Reading, Wanted

Read = tuple[NDArray[Any], list[Bad]]
_MOST, _LEAST = 64, 4
BROKEN = "a decoding process was ended from outside, mostly for want of memory: lower data.init_args.workers"
_reading: Reading | None = None


class Pool:
    """Reads samples, in processes of its own or in this one.

    Args:
        reading: how.
        workers: processes; 0 reads here, when samples are waited for.
    """

    def __init__(self, reading: Reading, workers: int) -> None:
        self.reading, self.workers = reading, workers
        self._executor: ProcessPoolExecutor | None = None

    def start(self, wanted: list[Wanted]) -> Callable[[], Read]:
        """Begin to read samples; what is given waits for them: (n, *shape), and which are bad.

        Raises:
            OSError: here or in the call that waits: a process was ended from outside, or storage cannot be reached.
        """
        if not self.workers or not wanted:
            return lambda: self.reading.several(wanted)
        size = min(_MOST, max(_LEAST, -(-len(wanted) // (2 * self.workers))))
        parts = [wanted[first : first + size] for first in range(0, len(wanted), size)]
        processes = self._processes()
        try:
            futures = [submit(processes, _several, part) for part in parts]
        except BrokenProcessPool:
            raise OSError(BROKEN) from None
        return lambda: _joined(futures, size)

    def close(self) -> None:
        """End the processes, whatever they were asked for."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def _processes(self) -> ProcessPoolExecutor:
        if self._executor is None:
            self._executor = executor(self.workers, __name__, _begin, self.reading)
        return self._executor


def _joined(futures: list[Future[Read]], size: int) -> Read:
    try:
        parts = [future.result() for future in futures]
    except BrokenProcessPool:
        raise OSError(BROKEN) from None
    bad = [Bad(n * size + one.place, one.reason) for n, (_, some) in enumerate(parts) for one in some]
    return np.concatenate([arrays for arrays, _ in parts]), bad


def _begin(reading: Reading) -> None:
    global _reading
    _reading = reading


def _several(wanted: list[Wanted]) -> Read:
    assert _reading is not None
    return _reading.several(wanted)
