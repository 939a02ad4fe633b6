"""Lists trees of image files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mixdist.messages import one_line

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Entry(NamedTuple):
    """A file: its path from the folder that was listed, with '/', and its size in bytes."""

    path: str
    num_bytes: int


def subfolders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, without hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not _hidden(entry.name) and entry.is_dir())


def images(folder: Path, deep: bool = True) -> tuple[list[Entry], int]:
    """List the images in a folder, by their extensions; hidden files and folders are left out.

    Args:
        folder: where to look.
        deep: whether to look in its folders as well.

    Returns:
        The images in the order of their paths, and the number of other files.

    Raises:
        ValueError: a folder lies within itself by a link.
        OSError: a folder cannot be read.
    """
    found: list[Entry] = []
    others = _list(folder, "", deep, (os.path.realpath(folder),), found)
    found.sort()
    return found, others


def _list(folder: Path, prefix: str, deep: bool, above: tuple[str, ...], found: list[Entry]) -> int:
    others = 0
    with os.scandir(folder / prefix) as entries:
        for entry in entries:
            path = f"{prefix}{entry.name}"
            if _hidden(entry.name):
                continue
            if entry.is_dir():
                if not deep:
                    continue
                real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
                if real in above:
                    raise ValueError(f"{entry.path!r} is a link to a folder that it lies in: remove it")
                others += _list(folder, f"{path}/", deep, (*above, real), found)
            elif not entry.name.lower().endswith(EXTENSIONS):
                others += 1
            else:  # what only looks like an image, as a link to nothing does, is set aside when it is read
                found.append(Entry(path, entry.stat().st_size if entry.is_file() else 0))
    return others


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def digest(entries: Iterable[Entry], *more: bytes) -> str:
    """Return a hash of a listing: sha256 over paths and sizes in order, and over other content that it was made of."""
    sha256 = hashlib.sha256()
    for entry in entries:
        sha256.update(b"%s\0%d\n" % (os.fsencode(entry.path), entry.num_bytes))
    for one in more:
        sha256.update(b"\0%d\0" % len(one) + one)
    return sha256.hexdigest()


@contextmanager
def reading(path: Path, kind: str, *errors: type[Exception]) -> Iterator[None]:
    """Report errors of a file of a data set in one line.

    Args:
        path: of the file.
        kind: of file, for the message.
        errors: that are reported, beside those of the operating system.

    Raises:
        ValueError: the file cannot be read.
    """
    expected: tuple[type[Exception], ...] = (OSError, *errors)
    try:
        yield
    except MemoryError:  # says nothing about the file
        raise
    except expected as error:
        reason = getattr(error, "strerror", None) or one_line(str(error))[:200] or type(error).__name__
        raise ValueError(f"{str(path)!r} cannot be read as {kind} ({reason}): fetch the file again") from None


def read_text(path: Path) -> str:
    """Read a text file of a data set.

    Raises:
        ValueError: it cannot be read, or is no text.
    """
    with reading(path, "text", UnicodeDecodeError):
        return path.read_text(encoding="utf-8")
