"""A persistent pool of ranks: one process each, one gloo group, one thread; functions are sent to all of them."""

from __future__ import annotations

import importlib
import multiprocessing
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WATCHDOG_S = 120.0


def call(target: str, *args: Any) -> Any:
    """Call "module:function"; functions that run on ranks are named, so that nothing needs to travel but words."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)(*args)


def _serve(rank: int, world_size: int, rendezvous: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    while (work := pipe.recv()) is not None:
        try:
            pipe.send((True, call(*work)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Pool:
    """Ranks that wait for work. A rank that does not answer within the watchdog's time ends the pool by name.

    Args:
        world_size: ranks; one runs in this process, without any group.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        if world_size == 1:
            torch.set_num_threads(1)
            return
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        rendezvous = str(Path(self.folder.name) / "rendezvous")
        ends = [context.Pipe() for _ in range(world_size)]
        self.pipes = [mine for mine, _ in ends]
        self.processes = [
            context.Process(target=_serve, args=(rank, world_size, rendezvous, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(ends)
        ]
        for process in self.processes:
            process.start()

    def run(self, target: str, *args: Any) -> list[Any]:
        """Call "module:function" with the same arguments on every rank; give the results in rank order."""
        if self.world_size == 1:
            return [call(target, *args)]
        for pipe in self.pipes:
            pipe.send((target, *args))
        deadline = time.monotonic() + WATCHDOG_S
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                self.close(kill=True)
                raise TimeoutError(f"rank {rank} of {self.world_size} did not answer {target} in {WATCHDOG_S} s")
            answers.append(pipe.recv())
        failures = [f"rank {rank}:\n{answer}" for rank, (ok, answer) in enumerate(answers) if not ok]
        if failures:
            raise AssertionError("\n".join(failures))
        return [answer for _, answer in answers]

    def close(self, kill: bool = False) -> None:
        """End the ranks."""
        if self.world_size == 1:
            return
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            if kill:
                process.kill()
            elif process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(timeout=1)
            process.kill()
        self.folder.cleanup()
