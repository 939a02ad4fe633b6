"""UCI's multiple features: 2,000 handwritten digits, each in six views.

Shape letters: N rows, M views, D numbers of a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixdist.arguments import check_arguments
from mixdist.data.dataset import Dataset, Source, Splits
from mixdist.data.formats.trees import reading
from mixdist.data.paired import PRESENT, present_field
from mixdist.data.sources.splits import TEST, check_part, held_out
from mixdist.noise import Draw, Purpose
from mixdist.terms import Batch, Field, Spec

SIZES = {"fac": 216, "fou": 76, "kar": 64, "mor": 6, "pix": 240, "zer": 47}
PIXELS, LEVELS = (1, 16, 15), 6
"""The view pix is an image: means over 2 x 3 pixels of a binary one."""


class Views(Source):
    """UCI's multiple features, up to six views of each of 2,000 digits, and label "y"; views may be absent.

    Fields are named after the files ``mfeat-fac`` and so on: "pix" is an image uint8 (1, 16, 15) with scale 1/6, the
    others float32 (D,), each number standardised by the training rows that have it. A file is the official one, 200
    rows a class in the order of classes, or ``mfeat-fac.csv`` with the class in its last column. The id of a row is its
    place in the files. Test rows are chosen by id, the same in every run.

    With ``absent`` rows have the field "present", uint8 (M,), in the order of ``views``. In the training set each view
    of a row is absent with that probability, keyed by id; a row that would have none keeps one. What is absent is 0.
    Test rows have all views.

    Args:
        root: folder of the files.
        views: which of fac, fou, kar, mor, pix and zer; unset, all.
        absent: probability that a view of a training row is absent, from 0 to below 1; 0 for no field "present".
        complete: keeps only those training rows that have all views, the others are left out.
        holdout: test rows: a part, or a number of rows.
        seed: of what is absent, not of the run.

    Raises:
        ValueError: an argument is out of range.

    Examples:
        >>> Views("data/mfeat", views=["pix", "fax"])
        Traceback (most recent call last):
        ...
        ValueError: views (fax) must be some of fac, fou, kar, mor, pix, zer, each once: correct it
    """

    def __init__(
        self,
        root: str,
        views: list[str] | None = None,
        absent: float = 0.0,
        complete: bool = False,
        holdout: int | float = 0.2,
        seed: int = 0,
    ) -> None:
        check_arguments(Views.__init__, locals(), "Views' ")
        views = list(SIZES) if views is None else views
        bad = [name for i, name in enumerate(views) if name not in SIZES or name in views[:i]]
        if bad or not views:
            told = ", ".join(bad) or "none"
            raise ValueError(f"views ({told}) must be some of {', '.join(SIZES)}, each once: correct it")
        if not 0 <= absent < 1:
            raise ValueError(f"absent ({absent}) must be a probability from 0 to below 1: set absent within it.")
        check_part("holdout", holdout)
        self.root, self.views, self.absent, self.complete = root, views, absent, complete
        self.holdout, self.seed = holdout, seed

    def load(self) -> Splits[Dataset]:
        """Read the files.

        Raises:
            ValueError: a file is missing, damaged, or disagrees with another; no training row is left.
        """
        numbers_of, class_N = self._read()
        ids = torch.arange(len(class_N))
        test_N = held_out("holdout", ids, self.holdout, TEST)
        there_NM = self._there(ids) | test_N[:, None]
        rows: Batch = {"id": ids, "y": torch.from_numpy(class_N).byte()}
        spec: dict[str, Any] = {"y": Field((), torch.uint8, num_classes=10)}
        for m, (name, numbers_ND) in enumerate(numbers_of.items()):
            rows[name], spec[name] = _field(name, numbers_ND, there_NM[:, m], there_NM[:, m] & ~test_N)
        if self.absent:
            rows[PRESENT], spec[PRESENT] = there_NM.byte(), present_field(len(self.views))
        kept_N = ~test_N & (there_NM.all(1) if self.complete else there_NM.any(1))
        if not kept_N.any():
            raise ValueError(
                f"absent ({self.absent}) leaves no training row with all {len(self.views)} views: lower it, or set "
                f"complete to false"
            )
        return Splits(_dataset(rows, spec, kept_N), _dataset(rows, spec, test_N))

    def _there(self, ids: Tensor) -> Tensor:
        """Return which views each row has, bool (N, M); where the draw leaves none, the one of the largest number."""
        chance_NM = Draw(self.seed, Purpose.DATA, step=3).uniform(ids, [0], (len(self.views),), torch.float64)[0]
        there_NM = chance_NM >= self.absent
        last_NM = torch.zeros_like(there_NM).scatter_(1, chance_NM.argmax(1, keepdim=True), True)
        return torch.where(there_NM.any(1, keepdim=True), there_NM, last_NM)

    def _read(self) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.int64]]:
        """Return the numbers of each view, (N, D), and the class of each row."""
        numbers_of: dict[str, NDArray[np.float64]] = {}
        class_N: NDArray[np.int64] | None = None
        for name in self.views:
            path = _find(Path(self.root), f"mfeat-{name}")
            numbers_of[name], found_N = _read_file(path, SIZES[name])
            if class_N is not None and not np.array_equal(found_N, class_N):
                raise ValueError(f"{str(path)!r} has other classes than {self.views[0]}: take both from one data set")
            class_N = found_N
        assert class_N is not None
        return numbers_of, class_N


def _find(root: Path, name: str) -> Path:
    for path in (root / f"{name}.csv", root / name):
        if path.is_file():
            return path
    raise ValueError(f"{str(root)!r} has no file {name!r} or '{name}.csv': put UCI's multiple features there")


def _read_file(path: Path, size: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the numbers and the classes of a file; a first line that numbers the columns is passed over.

    Raises:
        ValueError: it is damaged or foreign.
    """
    split = "," if path.suffix == ".csv" else None
    with reading(path, "a table of numbers", ValueError):
        table = np.loadtxt(path, delimiter=split, ndmin=2)
    if len(table) and np.array_equal(table[0, :size], np.arange(size)):
        table = table[1:]
    if not len(table) or table.shape[1] not in (size, size + 1):
        raise ValueError(
            f"{str(path)!r} has {len(table)} rows of {table.shape[1]} numbers, expected {size}, or {size + 1} with the "
            f"class: take UCI's multiple features"
        )
    class_N = table[:, size] if table.shape[1] > size else np.arange(len(table)) // max(len(table) // 10, 1)
    if not np.isfinite(table).all() or not np.isin(class_N, range(10)).all():
        raise ValueError(f"{str(path)!r} has a number that is not finite, or a class beyond 0 to 9: fetch it again")
    return table[:, :size], class_N.astype(np.int64)


def _field(name: str, numbers_ND: NDArray[np.float64], there_N: Tensor, by_N: Tensor) -> tuple[Tensor, Field]:
    """Return a view as stored, 0 where it is absent, and what it is; ``by_N`` are the rows it is standardised by."""
    if name == "pix" and np.isin(numbers_ND, range(LEVELS + 1)).all():
        pixels = torch.from_numpy(numbers_ND.astype(np.uint8)).reshape(-1, *PIXELS)
        return pixels * there_N[:, None, None, None], Field(PIXELS, torch.uint8, scale=1 / LEVELS)
    x_ND = torch.from_numpy(numbers_ND)
    own = x_ND[by_N] if bool(by_N.any()) else x_ND
    x_ND = (x_ND - own.mean(0)) / own.std(0, correction=0).clamp(min=1e-6)
    return (x_ND * there_N[:, None]).float(), Field((x_ND.shape[1],), torch.float32)


def _dataset(rows: Batch, spec: Spec, kept_N: Tensor) -> Dataset:
    names: Sequence[str] = tuple(map(str, range(10)))
    return Dataset({name: column[kept_N] for name, column in rows.items()}, spec, "y", tuple(names))
