"""What baselines are fitted to: rows of a data set as float64 numbers, read in batches.

Shape letters: N rows of the data set, B rows of a batch, D numbers of a row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mixdist.data import Loader, Samples
from mixdist.noise import Draw, Purpose
from mixdist.terms import Batch, Field

AT_ONCE = 1000
"""Rows that are read, and evaluated, at once; no result depends on it beyond rounding."""


@dataclass(frozen=True)
class Rows:
    """The rows of a data set as a baseline sees them.

    Args:
        dataset: where they come from.
        values: returns the numbers (B, ...) of stored rows.
    """

    dataset: Samples
    values: Callable[[Batch], Tensor]

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yield rows as stored and their numbers, float64 (B, D), in the data set's order.

        Raises:
            ValueError: a number is not finite, or a row cannot be read.
        """
        loader = Loader(self.dataset, AT_ONCE, 0, ordered=True)
        for index in range(loader.num_batches):
            rows = loader.batch(0, index).rows
            x_BD = self.values(rows).detach().double().reshape(len(rows["id"]), -1)
            good_B = x_BD.isfinite().all(1)
            if not good_B.all():
                place = int((~good_B).nonzero()[0])
                bad = x_BD[place][~x_BD[place].isfinite()][0].item()
                raise ValueError(f"sample {rows['id'][place]} holds {bad}, expected finite numbers: fix or remove it")
            yield rows, x_BD.numpy()

    def matrix(self, copies: float, asked_by: str) -> np.ndarray:
        """Return all rows, (N, D).

        Args:
            copies: how many arrays of that size the fit holds at once.
            asked_by: names the fit in messages.

        Raises:
            ValueError: they do not fit into memory.
        """
        x_ND: np.ndarray | None = None
        start = 0
        for _, x_BD in self.batches():
            if x_ND is None:
                size = x_BD.shape[1]
                require_memory(copies * 8 * len(self) * size, f"{asked_by} on {len(self)} rows of {size} numbers")
                x_ND = np.empty((len(self), size))
            x_ND[start : start + len(x_BD)] = x_BD
            start += len(x_BD)
        assert x_ND is not None
        return x_ND


def values_of(field: Field, name: str) -> Callable[[Batch], Tensor]:
    """Return what turns stored rows into the values of a field, as models see them."""
    return lambda rows: field.values(rows[name], torch.float64)


def dequantised(field: Field, name: str, seed: int) -> Callable[[Batch], Tensor]:
    """Return what turns stored levels into values, each spread evenly over its level.

    A value is (stored + u - 1/2) scale + offset, with u uniform on (0, 1), keyed by (seed, sample id). If p is a
    density of such values, the mean over u of log p plus D log |scale| is a lower bound on the log of a mass of the
    levels (Theis et al. 2016, section 3.1).
    """
    values, draw = values_of(field, name), Draw(seed, Purpose.DEQUANTISE)

    def spread(rows: Batch) -> Tensor:
        u = draw.uniform(rows["id"], [0], field.shape, torch.float64)[0]
        return values(rows) + (u - 0.5) * field.scale

    return spread


def require_memory(num_bytes: float, what: str) -> None:
    """Check that a fit has room.

    Raises:
        ValueError: it needs more bytes than are free.
    """
    free = free_memory()
    if free is not None and num_bytes > free:
        raise ValueError(
            f"{what} needs {num_bytes / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free: set --rows to fewer "
            f"training rows, or take a smaller model"
        )


def free_memory() -> int | None:
    """Return the bytes that a process can still take here; None where the system does not tell."""
    with suppress(OSError, ValueError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
