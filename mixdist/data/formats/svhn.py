"""SVHN's cropped digits in their official MATLAB files.

Shape letters: N samples, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixdist.data.formats.listing import Arrays, Listing, Missing, Part
from mixdist.data.formats.trees import Entry, digest, reading

FILES = {"train": "train_32x32.mat", "test": "test_32x32.mat"}
SHAPE = (3, 32, 32)


def fits(root: Path) -> bool:
    return any((root / name).is_file() for name in FILES.values())


def make_listing(root: Path, labels: bool = True) -> Listing:
    """List ``train_32x32.mat`` and ``test_32x32.mat``; the files' class 10 is the digit 0."""
    for name in FILES.values():
        if not (root / name).is_file():
            raise Missing(f"{str(root)!r} has no file {name!r}: put SVHN's cropped digits there")
    parts, entries, hashes, first_id = [], [], [], 0
    for split, name in FILES.items():
        label_N = _labels(root / name)
        parts.append(Part(split, first_id, len(label_N), name, label_N=label_N if labels else None))
        entries.append(Entry(name, len(label_N)))
        with (root / name).open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").digest())
        first_id += len(label_N)
    return Listing(tuple(parts), Arrays(root, images), digest(entries, *hashes), image=SHAPE)


def images(path: Path) -> NDArray[np.uint8]:
    """Read the images of a file, uint8 (N, 3, 32, 32).

    Raises:
        ValueError: it is damaged or foreign.
    """
    array_HWCN = _read(path, "X")
    if array_HWCN.dtype != np.uint8 or array_HWCN.ndim != 4 or array_HWCN.shape[:3] != (32, 32, 3):
        raise ValueError(
            f"{str(path)!r} has X {array_HWCN.dtype} {array_HWCN.shape}, expected uint8 (32, 32, 3, N): take SVHN's "
            "cropped digits"
        )
    return np.ascontiguousarray(array_HWCN.transpose(3, 2, 0, 1))


def _labels(path: Path) -> NDArray[np.int64]:
    label_N = _read(path, "y").reshape(-1)
    num = images_of(path)
    if len(label_N) != num or not num or not np.isin(label_N, range(1, 11)).all():
        raise ValueError(
            f"{str(path)!r} has {num} images and {len(label_N)} labels, expected as many of 1 to 10: take SVHN's "
            "cropped digits"
        )
    return label_N.astype(np.int64) % 10


def images_of(path: Path) -> int:
    """Return the number of images in a file, from its header.

    Raises:
        ValueError: it is damaged or foreign.
    """
    shapes = {name: shape for name, shape, _ in _told(path, "whosmat")}
    if len(shapes.get("X", ())) != 4:
        raise ValueError(f"{str(path)!r} has no X of 4 dimensions: take SVHN's cropped digits")
    return int(shapes["X"][3])


def _read(path: Path, name: str) -> NDArray[Any]:
    found = _told(path, "loadmat", variable_names=[name]).get(name)
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "uif":
        raise ValueError(f"{str(path)!r} has no numbers {name!r}: take SVHN's cropped digits")
    return found


def _told(path: Path, function: str, **options: Any) -> Any:
    from scipy import io  # slow to import: every worker process would wait for it

    with reading(path, "MATLAB's", Exception):  # the library has no error of its own for a file that is damaged
        return getattr(io, function)(str(path), **options)
