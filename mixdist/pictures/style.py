"""What all pictures share: colours, and PNG files that are whole or absent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Petroff 2021 (arXiv:2107.02270): ten colours that stay apart under the common colour vision deficiencies.
PALETTE = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
MARKERS = "os^Dv"
INK, FAINT, PALE = "#22262b", "#6b737c", "#c3cad1"


def colour_of(expert: int) -> str:
    return PALETTE[expert % len(PALETTE)]


@contextmanager
def aside_of(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` that takes its place when all went well, and goes away when not."""
    aside = Path(path).with_name(f"{Path(path).name}.new")
    aside.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
