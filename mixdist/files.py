"""Writing files that are complete or absent under their final name, and locks."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np


def write_file(path: Path, data: bytes) -> None:
    """Write and sync a file under a temporary name, then rename it: the final name is complete or absent."""
    try:
        with aside_of(path) as aside, open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.filename is None and error.errno is not None:  # as of a full disk
            error.filename = str(path)
        raise


def read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Read all arrays of an .npz file of numbers.

    Raises:
        ValueError: it is none, or damaged.
    """
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, zlib and numpy each have errors of their own for damage
        raise ValueError(f"{path.name} is no .npz file or is damaged ({type(error).__name__})") from None


@contextmanager
def aside_of(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it replaces ``path`` on success and is removed on an error."""
    aside = path.with_name(path.name + ".partial")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def hold(path: Path) -> IO[str]:
    """Lock a folder by the file ``path`` in it, until what is returned is closed or this process ends.

    Raises:
        ValueError: another process holds it.
    """
    file = path.open("a+")
    file.seek(0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        by = file.read().strip()
        file.close()
        raise ValueError(f"{path.parent} is being written by another process ({by}): wait for it, or end it") from None
    file.truncate(0)
    file.write(f"{os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    os.fsync(file.fileno())  # other hosts look for it
    return file
