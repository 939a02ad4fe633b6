"""This process: its rank, ending it together with its launcher, malloc settings. Needs no torch."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Launch:
    """The rank of this process and the number of ranks, on all hosts and on this one."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @staticmethod
    def read(env: Mapping[str, str] = os.environ) -> Launch:
        """Read the variables of torchrun and the deepspeed launcher, else those of srun; else return one process.

        Raises:
            ValueError: a variable is no number, the rank is none of the ranks, or it is not said of how many.
        """
        if "RANK" in env and "WORLD_SIZE" not in env:
            raise ValueError(
                f"RANK ({env['RANK']}) is set and WORLD_SIZE is not: set it to the number of ranks, or unset RANK"
            )
        if "RANK" in env:
            local_size = "LOCAL_SIZE" if "LOCAL_WORLD_SIZE" not in env else "LOCAL_WORLD_SIZE"
            names = "RANK", "WORLD_SIZE", "LOCAL_RANK", local_size
        elif _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1:  # unset in a batch script outside srun
            names = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"
        else:
            return Launch()
        rank, world_size = (_number(env, name) for name in names[:2])
        if not 0 <= rank < world_size:
            raise ValueError(
                f"{names[0]} ({rank}) must be from 0 to {names[1]} - 1, and {names[1]} is {world_size}: give each "
                f"process a number of its own"
            )
        local = _number(env, names[2], rank)
        return Launch(rank, world_size, local, max(_number(env, names[3], 1), local + 1))


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Return a variable of the environment as a number, not negative."""
    text = env.get(name, "" if default is None else str(default))
    if not text.strip().isdecimal():
        raise ValueError(f"{name} ({text}) must be a whole number, 0 or more: set it on every rank")
    return int(text)


def has_launcher(env: Mapping[str, str] = os.environ) -> bool:
    """Return whether a launcher started the ranks, which shows their messages together and ends all when one fails.

    Where they were started by hand, each has a terminal of its own.
    """
    by_srun = env.get("SLURM_STEP_NUM_TASKS", "1") not in ("", "1")
    return by_srun or bool({"TORCHELASTIC_RUN_ID", "CROSS_RANK", "OMPI_COMM_WORLD_SIZE"} & env.keys())


def keep_large_blocks() -> None:
    """Make glibc keep what a step frees: by default it returns large blocks, and each step pays for new pages.

    mallopt's M_MMAP_THRESHOLD is -3 and M_TRIM_THRESHOLD -1. A step of configs/mnist_moe.yaml took 1.4 to 1.5 times as
    long without this, with the same peak memory.
    """
    with suppress(OSError, AttributeError):  # another libc has no such call
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 32 << 20)
        libc.mallopt(-1, 1 << 30)


def quiet_torch() -> None:
    """Leave out torch's C++ warnings where there are several ranks, unless the user has chosen a level.

    A rank whose store has ended would print 20 frames of C++ beside its own line.
    """
    if "RANK" in os.environ or "SLURM_PROCID" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def follow_launcher() -> None:
    """End this process when the torchrun or the deepspeed launcher that started it ends.

    torchrun gives each process a session of its own. Does nothing without them, where a parent may end first.
    """
    if {"TORCHELASTIC_RUN_ID", "CROSS_RANK"} & os.environ.keys():
        end_with_parent()
    if "CROSS_RANK" in os.environ:
        _end_with_runner()


def end_with_parent() -> None:
    """Send this process SIGTERM when the one that started it ends, in any way.

    prctl's PR_SET_PDEATHSIG is 1.
    """
    with suppress(OSError, AttributeError):  # only Linux has it
        ctypes.CDLL("libc.so.6").prctl(1, int(signal.SIGTERM))


def _end_with_runner() -> None:
    """Send this process SIGTERM when the ``deepspeed`` command ends, which starts the launcher that starts ranks.

    One that gets SIGTERM ends alone: its launcher and the ranks would go on, and hold the run.
    """
    with suppress(OSError, AttributeError, IndexError, ValueError):  # as on other systems than Linux
        runner = int(Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[1])
        if b"deepspeed" not in Path(f"/proc/{runner}/cmdline").read_bytes():
            return  # on another host a shell starts the launcher
        end, ended = os.pidfd_open(runner), select.poll()
        ended.register(end, select.POLLIN)

        def wait() -> None:
            ended.poll()
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=wait, daemon=True, name="mixdist-runner").start()
