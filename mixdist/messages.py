"""What is told to a user: one line, by rank 0 alone where all ranks know it. Needs no torch."""

from __future__ import annotations

import sys
import time

USER_ERROR, INTERRUPTED = 2, 130
LINGER_S = 10.0
"""Seconds that other ranks wait before they leave with an error, so that rank 0's message is out before a launcher,
which ends all processes when one fails, ends rank 0."""


class SingleRankError(ValueError):
    """A mistake that this rank met by itself; the others may wait for it in a collective."""


def one_line(text: str) -> str:
    """Put a message on one line."""
    return " ".join(text.split())


def counted(number: int, noun: str) -> str:
    """Put a number before a noun: 1 shard, 2 shards."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def format_error(error: Exception) -> str:
    """Put an error into one line."""
    return one_line(str(error)) + (": fix it and try again" if isinstance(error, OSError) else "")


def fail(message: str, rank: int, alone: bool) -> int:
    """Tell what all ranks know once, from rank 0, and what one knows alone from that rank."""
    if rank == 0 or alone:
        print(f"mixdist: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(LINGER_S)
    return USER_ERROR
