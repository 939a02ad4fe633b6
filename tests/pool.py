"""A persistent pool of ranks: one forked process each, one gloo group, one thread; all are sent the same functions."""

from __future__ import annotations

import importlib
import multiprocessing
import pickle
import subprocess
import tempfile
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.forks import ROOT, Forked, environment
from tests.launch import HANG_S

GRACE_S = 10.0
"""How long the other ranks may still answer once one has failed; most of them wait for it in a collective."""


def call(target: str, *args: Any) -> Any:
    """Call "module:function"; functions that run on ranks are sent by name."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)(*args)


def serve_rank(rank: int, world_size: int, rendezvous: str, pipe: Connection) -> None:
    """Be one of the ranks of a pool."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    pipe.send((True, "ready"))
    while (work := pipe.recv()) is not None:
        try:
            answer = pickle.dumps((True, call(*work)))  # Connection.send would keep a descriptor open for each tensor
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)
    dist.destroy_process_group()


class Pool:
    """Ranks that wait for work.

    They start with the first call, and anew with the next call after one that failed: an error, a killed rank, a
    timeout or an interrupt in the middle of a call leaves ranks in a collective or answers that nobody has read.

    Args:
        world_size: the number of ranks; a single one runs in this process, without a process group.
        limit_s: how long ranks may take for a call, counted from the moment all are ready, and for getting ready.
    """

    def __init__(self, world_size: int, limit_s: float = HANG_S) -> None:
        self.world_size, self.limit_s = world_size, limit_s
        self.processes: list[Forked] = []
        self.pipes: list[Connection] = []
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, target: str, *args: Any) -> list[Any]:
        """Call "module:function" with the same arguments on every rank; return the results in rank order.

        Raises:
            AssertionError: if a rank raises, is killed or does not answer in time; the message has every rank's error.
        """
        if self.world_size == 1:
            torch.set_num_threads(1)
            return [call(target, *args)]
        try:
            if not all(process.poll() is None for process in self.processes):
                self.close(kill=True)
            if not self.processes:
                self._start()
            for pipe in self.pipes:
                pipe.send((target, *args))
            return self._answers(target)
        except BaseException:
            self.close(
                kill=True
            )  # also after an interrupt: answers that nobody reads would be taken for the next call's
            raise

    def _start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        key = multiprocessing.current_process().authkey.hex()
        for rank in range(self.world_size):
            mine, theirs = multiprocessing.Pipe()
            self.pipes.append(mine)
            words = [str(rank), str(self.world_size), str(Path(self.folder.name, "rendezvous")), key]
            with theirs:  # closed here, else the end of the process would not end the pipe
                self.processes.append(Forked("pool", words, [theirs.fileno()], ROOT, environment()))
        self._answers("init_process_group")

    def _answers(self, target: str) -> list[Any]:
        """Wait for every rank's answer; return them in rank order."""
        found: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        deadline = time.monotonic() + self.limit_s
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    is_result, answer = pipe.recv()
                except (EOFError, ConnectionError):
                    is_result, answer = False, f"ended with exit code {self.processes[rank].wait()}"
                if is_result:
                    found[rank] = answer
                else:
                    failures[rank] = answer
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if not failures:
            failures = dict.fromkeys(waiting.values(), f"did not answer {target} in {self.limit_s} s")
        if failures:
            raise AssertionError("\n".join(f"rank {r} of {self.world_size}: {failures[r]}" for r in sorted(failures)))
        return [found[rank] for rank in range(self.world_size)]

    def close(self, kill: bool = False) -> None:
        """End the ranks; the next call starts others."""
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            if kill:
                process.kill()
            elif process.poll() is None:
                pipe.send(None)
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            with suppress(subprocess.TimeoutExpired):
                process.wait(1)
            process.kill()
            process.wait()
            pipe.close()
        if self.folder is not None:
            self.folder.cleanup()
        self.processes, self.pipes, self.folder = [], [], None
