"""Writing files that are complete or absent under their final name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_file(path: Path, data: bytes) -> None:
    """Write and sync a file under a temporary name, then rename it: the final name is complete or absent."""
    with aside_of(path) as aside, open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def aside_of(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it replaces ``path`` on success and is removed on an error."""
    aside = path.with_name(path.name + ".partial")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
