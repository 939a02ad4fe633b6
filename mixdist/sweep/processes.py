"""Commands of a sweep as processes of their own: their output, their threads and devices, and how they end."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import IO

import torch

from mixdist.messages import one_line

PATIENCE_S = ((signal.SIGINT, 20.0), (signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0))
"""How a process is asked to end, and how long each answer is waited for."""
POLL_S = 0.1


class Failed(ValueError):
    """A command that did not end well, in one line."""


class Stopped(Exception):
    """The sweep ends before this command."""


class Processes:
    """Runs commands of mixdist, each in a session of its own, so that Ctrl-C reaches this process alone.

    Args:
        jobs: commands at once.
        ranks: processes of a command that trains or evaluates a mixture: above 1, torchrun starts them.
    """

    def __init__(self, jobs: int, ranks: int) -> None:
        self.ranks = ranks
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.cores = max(1, cores // jobs)  # of each command
        self._places: SimpleQueue[str | None] = SimpleQueue()
        for place in range(jobs):
            self._places.put(_devices(place, ranks))
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock, self._stopped = threading.Lock(), threading.Event()

    def run(self, words: Sequence[str], log: IO[bytes], alone: bool = False) -> None:
        """Run a command to its end, its output in a log.

        Args:
            words: of the command.
            log: opened by :meth:`claim`.
            alone: one process, whatever ``ranks`` is.

        Raises:
            Failed: it ends with another code than 0.
            Stopped: :meth:`end` was called.
        """
        module = ["mixdist"]
        if self.ranks > 1 and not alone:
            module = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks), "-m", "mixdist"]
        devices = self._places.get()
        begin = log.seek(0, os.SEEK_END)
        try:
            child = self._start([*module, *words], self.cores // (1 if alone else self.ranks), log, devices)
            code = child.wait()
            self._running.discard(child)
        finally:
            self._places.put(devices)
        if self._stopped.is_set():
            raise Stopped
        if code:
            raise Failed(f"{words[0]}: {_said(Path(log.name), begin, code)}")

    def _start(self, words: Sequence[str], cores: int, log: IO[bytes], devices: str | None) -> subprocess.Popen[bytes]:
        asked = os.environ.get("OMP_NUM_THREADS", "")
        threads = str(max(1, min(cores, int(asked)) if asked.isdigit() else cores))
        env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
        env |= {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
        command = [sys.executable, "-m", "mixdist.sweep.child", str(os.getpid()), *words]
        with self._lock:
            if self._stopped.is_set():
                raise Stopped
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
            )
            self._running.add(child)
        return child

    def claim(self, path: Path, tell: Callable[[str], None]) -> IO[bytes]:
        """Open the log of a cell and lock it; wait while a command of an earlier sweep still writes to it.

        The commands inherit the lock with the log, so that it is held until the last of their processes has ended.

        Raises:
            Stopped: :meth:`end` was called.
        """
        log, told = path.open("ab"), False
        while True:
            with suppress(OSError):
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return log
            if not told:
                tell(f"{path.stem}: waiting for the end of what an earlier sweep started")
            told = True
            if self._stopped.wait(POLL_S):
                log.close()
                raise Stopped

    def end(self) -> None:
        """End what runs, in good order where it listens, and start nothing more."""
        with self._lock:
            self._stopped.set()
            running = list(self._running)
        for number, patience in PATIENCE_S:
            for child in running:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(child.pid, number)
            deadline = time.monotonic() + patience
            with suppress(KeyboardInterrupt):  # once more: no more patience
                while running and time.monotonic() < deadline:
                    time.sleep(POLL_S)
                    running = [child for child in running if child.poll() is None]
            if not running:
                return


def _devices(place: int, ranks: int) -> str | None:
    """Return the CUDA devices of a place for a command; None where there are not enough to choose from."""
    count = torch.cuda.device_count()
    if count <= ranks:
        return None
    listed = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    names = listed.split(",")[:count]
    return ",".join(names[(place * ranks + rank) % count] for rank in range(ranks))


def _said(log: Path, begin: int, code: int) -> str:
    """Return how a command ended: its own line if it has one, else the last line that it wrote."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}, such as where memory does not suffice"
    with log.open("rb") as file:
        file.seek(begin)
        lines = [one_line(line) for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    own = [line.removeprefix("mixdist: ") for line in lines if line.startswith("mixdist: ")]
    return (own or lines or [f"ended with code {code}"])[-1]
