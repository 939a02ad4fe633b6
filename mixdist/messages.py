"""Messages to users: one line, printed by rank 0 alone where all ranks know it. Needs no torch."""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
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


def last_own_line(error: BaseException) -> str:
    """Return the last line of an error's way that lies outside of this package and of libraries, or nothing."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if not path.is_relative_to(PACKAGE) and "site-packages" not in path.parts and path.suffix == ".py":
            return f"{path.name} line {frame.lineno}"
    return ""


def describe_failure(error: BaseException) -> str:
    """Return an error of a user's own code in one line: its kind, its text, and where it was raised."""
    text, place = one_line(str(error)), last_own_line(error)
    return f"{type(error).__name__}{text and f': {text}'}{place and f'; {place}'}"


def fail(message: str, rank: int, alone: bool) -> int:
    """Print an error, on rank 0 if all ranks know it, else on the rank that found it alone; return the exit code."""
    if rank == 0 or alone:
        print(f"mixdist: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(LINGER_S)
    return USER_ERROR
