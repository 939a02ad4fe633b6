"""What all pictures share: colours, and PNG files that are whole or absent."""

from __future__ import annotations

# Petroff 2021 (arXiv:2107.02270): ten colours that stay apart under the common colour vision deficiencies.
PALETTE = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
MARKERS = "os^Dv"
INK, FAINT, PALE = "#22262b", "#6b737c", "#c3cad1"


def colour_of(expert: int) -> str:
    return PALETTE[expert % len(PALETTE)]
