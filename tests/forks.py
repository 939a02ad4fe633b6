"""Processes forked from one that has imported torch: a start of its own takes each of them seconds.

The one that forks is ``python -m tests.ranks``; it starts with the first call, once for each process that runs tests.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Forker:
    """The process that forks others, asked over a socket."""

    def __init__(self) -> None:
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.ranks", str(theirs.fileno())],
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        atexit.register(self.close)

    def ask(self, descriptors: Sequence[int] = (), **what: Any) -> int:
        """Ask for something; return the answer."""
        socket.send_fds(self.channel, [json.dumps(what).encode()], list(descriptors))
        answer = self.channel.recv(1 << 16)
        assert answer, "the process that forks others has ended"
        return int(answer)

    def close(self) -> None:
        """End it, and with it whatever it has forked."""
        self.channel.close()
        self.process.wait()


_forkers: list[Forker] = []


def warm(*modules: str) -> None:
    """Import modules in the process that forks: what it forks from now on has them."""
    for name in modules:
        _forker().ask(warm=name)


def _forker() -> Forker:
    if not _forkers or _forkers[-1].process.poll() is not None:
        _forkers.append(Forker())
    return _forkers[-1]


class Forked:
    """A process that another one has forked, to be waited for and killed as subprocess.Popen's are.

    Args:
        kind: what it runs, as named in ``tests/ranks.py``.
        words: what that is given.
        descriptors: become its standard input, output and error, as many as there are.
        cwd: its working directory.
        env: its whole environment.
    """

    def __init__(
        self, kind: str, words: Sequence[str], descriptors: Sequence[int], cwd: Path, env: Mapping[str, str]
    ) -> None:
        self._forker = _forker()
        self.pid = self._forker.ask(descriptors, kind=kind, words=list(words), cwd=str(cwd), env=dict(env))
        self._end = os.pidfd_open(self.pid)  # readable when it has ended
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; return its exit code, or minus the signal that killed it."""
        if self.returncode is None:
            ended = select.poll()  # select.select refuses descriptors above 1023
            ended.register(self._end, select.POLLIN)
            if not ended.poll(None if timeout is None else 1000 * timeout):
                assert timeout is not None
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            os.close(self._end)
            self.returncode = self._forker.ask(wait=self.pid)
        return self.returncode

    def poll(self) -> int | None:
        """Return what :meth:`wait` does, or None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """Kill it, if it has not been waited for."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)


def environment(**env: str) -> dict[str, str]:
    """Return the environment of a process of tests: this one's, one thread, and other values."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
