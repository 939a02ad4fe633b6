"""Messages to users: one line, printed by rank 0 alone where all ranks know it. Needs no torch."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE, _PYTHON = Path(__file__).resolve().parent, Path(traceback.__file__).parent
USER_ERROR, INTERRUPTED = 2, 130


class SingleRankError(ValueError):
    """An error that this rank alone found; the others may wait for it in a collective."""


class SharedError(ValueError):
    """An error that every rank raises with the same message; rank 0 prints it."""


def one_line(text: str) -> str:
    """Return a message on one line, without the stack of C++ frames that torch appends to its own."""
    return " ".join(text.partition("\nException raised from ")[0].split())


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 shard, 2 shards."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def format_error(error: Exception) -> str:
    """Return an error as one line; with the place where a user's own code has raised it."""
    text = one_line(str(error)) + (": fix it and try again" if isinstance(error, OSError) else "")
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames or not _is_own(frames[-1][0].f_code.co_filename):
        return text
    code = frames[-1][0].f_code
    return f"{text} ({code.co_qualname}; {Path(code.co_filename).name} line {frames[-1][1]})"


@contextmanager
def within(part: str) -> Iterator[None]:
    """Name the part of a run in front of an error for users that is raised inside; an empty part is not named."""
    try:
        yield
    except ValueError as error:
        if part:
            error.args = (f"in {part}: {error}",)
        raise


def last_own_line(error: BaseException) -> str:
    """Return the last line of an error's way that lies outside of this package and of libraries, or nothing."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if _is_own(frame.filename):
            return f"{Path(frame.filename).name} line {frame.lineno}"
    return ""


def _is_own(file: str) -> bool:
    """Return whether a file is a user's: none of this package, of libraries or of Python's own."""
    path = Path(file)
    inside = path.is_relative_to(PACKAGE) or path.is_relative_to(_PYTHON) or "site-packages" in path.parts
    return path.suffix == ".py" and not inside


def own_failure(error: BaseException) -> str:
    """Return in one line which function of a user's own code fails, and why; nothing where none is on its way."""
    if isinstance(error, NotImplementedError) and str(error):  # of a base class of this package, which says what lacks
        return f"{one_line(str(error))}: write it"
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        if _is_own(frame.f_code.co_filename):
            return f"{frame.f_code.co_qualname} fails ({describe_failure(error)}): fix it"
    return ""


def failing_class(error: BaseException) -> str:
    """Return the name of a user's class in whose ``__init__`` an error was raised, or which was called wrongly."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        code = frame.f_code
        if code.co_name == "__init__" and _is_own(code.co_filename):
            return type(frame.f_locals.get(code.co_varnames[0])).__name__
    called = re.match(r"(\w+)\.__init__\(\) ", str(error)) if isinstance(error, TypeError) else None
    return called[1] if called else ""


def describe_failure(error: BaseException) -> str:
    """Return an error of a user's own code in one line: its kind, its text, and where it was raised."""
    text, place = one_line(str(error)), last_own_line(error)
    return f"{type(error).__name__}{text and f': {text}'}{place and f'; {place}'}"


def report(message: str) -> None:
    """Print an error."""
    print(f"mixdist: {message}", file=sys.stderr, flush=True)
