"""CIFAR-10 and CIFAR-100 in their official binary versions.

Shape letters: N samples, C channels, H height, W width.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixdist.data.cifar import FOLDER, NAMES, PER_FILE, SHAPE, TEST, TRAIN, read_names, read_records
from mixdist.data.layouts.layout import Arrays, Layout, Missing, Part, folder_of
from mixdist.data.layouts.trees import Entry, digest

FOLDER_100, NAMES_100, FILES_100 = "cifar-100-binary", "fine_label_names.txt", {"train.bin": 50_000, "test.bin": 10_000}
# A coarse and a fine label stand before each image of CIFAR-100; the fine one is taken.
_read_100 = partial(read_records, num_labels=2, num_classes=100, most=50_000, kind="CIFAR-100")


def fits_10(root: Path) -> bool:
    return any((folder_of(root, FOLDER) / name).is_file() for name in (*TRAIN, TEST))


def fits_100(root: Path) -> bool:
    return any((folder_of(root, FOLDER_100) / name).is_file() for name in FILES_100)


def layout_10(root: Path, labels: bool = True) -> Layout:
    """List CIFAR-10: ids are places in the official order, as :class:`mixdist.data.Cifar10` gives them.

    Args:
        root: the folder of the files, or the one that holds ``cifar-10-batches-bin``.
        labels: whether to take the classes.

    Raises:
        Missing: there is no training file, or no test file.
        ValueError: a file is damaged or foreign.
    """
    folder = folder_of(root, FOLDER)
    files = [(place * PER_FILE, name) for place, name in enumerate(TRAIN) if (folder / name).is_file()]
    if not files:
        raise Missing(f"{str(folder)!r} has none of the files {TRAIN[0]!r} to {TRAIN[-1]!r}: put one there")
    if not (folder / TEST).is_file():
        raise Missing(f"{str(folder)!r} has no file {TEST!r}: put it there")
    parts, bodies = [], []
    for first_id, name in [*files, (len(TRAIN) * PER_FILE, TEST)]:
        records = read_records(folder / name).numpy()
        parts.append(_part("test" if name == TEST else "train", first_id, name, records[:, 0] if labels else records))
        bodies.append((name, records))
    names = read_names(folder / NAMES) if labels else ()
    return Layout(tuple(parts), Arrays(folder, images_10), _digest(bodies, names), names, image=SHAPE)


def layout_100(root: Path, labels: bool = True) -> Layout:
    """List CIFAR-100: the class is the fine label.

    Args:
        root: the folder of ``train.bin`` and ``test.bin``, or the one that holds ``cifar-100-binary``.
        labels: whether to take the classes.

    Raises:
        Missing: a file is missing.
        ValueError: a file is damaged or foreign.
    """
    folder = folder_of(root, FOLDER_100)
    parts, bodies, first_id = [], [], 0
    for name in FILES_100:
        if not (folder / name).is_file():
            raise Missing(f"{str(folder)!r} has no file {name!r}: put it there")
    for name in FILES_100:
        records = _read_100(folder / name).numpy()
        parts.append(_part(Path(name).stem, first_id, name, records[:, 1] if labels else records))
        bodies.append((name, records))
        first_id += len(records)
    names = read_names(folder / NAMES_100, 100) if labels else ()
    return Layout(tuple(parts), Arrays(folder, images_100), _digest(bodies, names), names, image=SHAPE)


def images_10(path: Path) -> NDArray[np.uint8]:
    """Read the images of a file of CIFAR-10, uint8 (N, 3, 32, 32)."""
    return read_records(path).numpy()[:, 1:].reshape(-1, *SHAPE)


def images_100(path: Path) -> NDArray[np.uint8]:
    """Read the images of a file of CIFAR-100, uint8 (N, 3, 32, 32)."""
    return _read_100(path).numpy()[:, 2:].reshape(-1, *SHAPE)


def _part(split: str, first_id: int, file: str, labels: NDArray[np.uint8]) -> Part:
    """A file's part; whole records in place of labels give one without classes."""
    return Part(split, first_id, len(labels), file, label_N=labels.astype(np.int64) if labels.ndim == 1 else None)


def _digest(bodies: list[tuple[str, NDArray[np.uint8]]], names: tuple[str, ...]) -> str:
    told = [Entry(name, records.size) for name, records in bodies]
    return digest(told, *(records.tobytes() for _, records in bodies), "\n".join(names).encode())
