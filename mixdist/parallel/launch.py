"""This process: its rank, ending it together with its launcher, malloc settings. Needs no torch."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """The rank of this process and the number of ranks, on all hosts and on this one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @staticmethod
    def read(env: Mapping[str, str] = os.environ) -> Launch:
        """Read the variables of torchrun and the deepspeed launcher, else those of srun; else return one process."""
        if "RANK" in env and "WORLD_SIZE" in env:
            rank, world_size, local = env["RANK"], env["WORLD_SIZE"], env.get("LOCAL_RANK", env["RANK"])
            local_size = env.get("LOCAL_WORLD_SIZE", "1")
        elif int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # unset in a batch script outside srun
            rank, world_size, local = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"], env["SLURM_LOCALID"]
            local_size = env.get("SLURM_NTASKS_PER_NODE", "1")
        else:
            return Launch()
        return Launch(int(rank), int(world_size), int(local), max(int(local_size), int(local) + 1))


def keep_large_blocks() -> None:
    """Make glibc keep what a step frees: by default it returns large blocks, and each step pays for new pages.

    mallopt's M_MMAP_THRESHOLD is -3 and M_TRIM_THRESHOLD -1. A step of configs/mnist_moe.yaml took 1.4 to 1.5 times as
    long without this, with the same peak memory.
    """
    with suppress(OSError, AttributeError):  # another libc has no such call
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 32 << 20)
        libc.mallopt(-1, 1 << 30)


def follow_launcher() -> None:
    """End this process when the torchrun that started it ends; torchrun gives each process a session of its own.

    Does nothing without torchrun, where a parent may end first.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def end_with_parent() -> None:
    """Send this process SIGTERM when the one that started it ends, in any way.

    prctl's PR_SET_PDEATHSIG is 1.
    """
    with suppress(OSError, AttributeError):  # only Linux has it
        ctypes.CDLL("libc.so.6").prctl(1, int(signal.SIGTERM))
