"""Messages to users: one line, printed by rank 0 alone where all ranks know it. Needs no torch."""

from __future__ import annotations

import sys
import time

USER_ERROR, INTERRUPTED = 2, 130
LINGER_S = 10.0
"""Seconds that other ranks wait before they exit with an error: a launcher ends all processes when one fails, and
rank 0 must print its message first."""


class SingleRankError(ValueError):
    """An error that this rank alone found; the others may wait for it in a collective."""


def one_line(text: str) -> str:
    """Return a message on one line."""
    return " ".join(text.split())


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 shard, 2 shards."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def format_error(error: Exception) -> str:
    """Return an error as one line."""
    return one_line(str(error)) + (": fix it and try again" if isinstance(error, OSError) else "")


def fail(message: str, rank: int, alone: bool) -> int:
    """Print an error, on rank 0 if all ranks know it, else on the rank that found it alone; return the exit code."""
    if rank == 0 or alone:
        print(f"mixdist: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(LINGER_S)
    return USER_ERROR
