"""CIFAR-10 and CIFAR-100 in their official binary versions.

Shape letters: N samples, C channels, H height, W width.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixdist.data.formats.listing import Arrays, Listing, Missing, Part, folder_of
from mixdist.data.formats.trees import Entry, digest

NUM_CLASSES = 10
SHAPE = (3, 32, 32)
PER_FILE = 10_000
TRAIN = tuple(f"data_batch_{n}.bin" for n in range(1, 6))
TEST, NAMES, FOLDER = "test_batch.bin", "batches.meta.txt", "cifar-10-batches-bin"
FOLDER_100, NAMES_100, FILES_100 = "cifar-100-binary", "fine_label_names.txt", {"train.bin": 50_000, "test.bin": 10_000}


def fits_10(root: Path) -> bool:
    return any((folder_of(root, FOLDER) / name).is_file() for name in (*TRAIN, TEST))


def fits_100(root: Path) -> bool:
    return any((folder_of(root, FOLDER_100) / name).is_file() for name in FILES_100)


def layout_10(root: Path, labels: bool = True) -> Listing:
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
        records = read_records(folder / name)
        parts.append(_part("test" if name == TEST else "train", first_id, name, records[:, 0] if labels else records))
        bodies.append((name, records))
    names = read_names(folder / NAMES) if labels else ()
    return Listing(tuple(parts), Arrays(folder, images_10), _digest(bodies, names), names, image=SHAPE)


def layout_100(root: Path, labels: bool = True) -> Listing:
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
        records = read_records_100(folder / name)
        parts.append(_part(Path(name).stem, first_id, name, records[:, 1] if labels else records))
        bodies.append((name, records))
        first_id += len(records)
    names = read_names(folder / NAMES_100, 100) if labels else ()
    return Listing(tuple(parts), Arrays(folder, images_100), _digest(bodies, names), names, image=SHAPE)


def images_10(path: Path) -> NDArray[np.uint8]:
    """Read the images of a file of CIFAR-10, uint8 (N, 3, 32, 32)."""
    return read_records(path)[:, 1:].reshape(-1, *SHAPE)


def images_100(path: Path) -> NDArray[np.uint8]:
    """Read the images of a file of CIFAR-100, uint8 (N, 3, 32, 32)."""
    return read_records_100(path)[:, 2:].reshape(-1, *SHAPE)


def _part(split: str, first_id: int, file: str, labels: NDArray[np.uint8]) -> Part:
    """A file's part; whole records in place of labels give one without classes."""
    return Part(split, first_id, len(labels), file, label_N=labels.astype(np.int64) if labels.ndim == 1 else None)


def _digest(bodies: list[tuple[str, NDArray[np.uint8]]], names: tuple[str, ...]) -> str:
    told = [Entry(name, records.size) for name, records in bodies]
    return digest(told, *(records.tobytes() for _, records in bodies), "\n".join(names).encode())


def read_records(
    path: Path, num_labels: int = 1, num_classes: int = NUM_CLASSES, most: int = PER_FILE, kind: str = "CIFAR-10"
) -> NDArray[np.uint8]:
    """Read the records of a file, uint8 (N, num_labels + 3072).

    Args:
        path: of the file.
        num_labels: bytes of labels in front of an image; the last of them is checked.
        num_classes: of that label.
        most: images that the official file has.
        kind: the name of the data set.

    Raises:
        ValueError: the file cannot be read, or is empty, truncated, too large or foreign.
    """
    length = num_labels + math.prod(SHAPE)
    try:
        with path.open("rb") as stream:
            # One byte beyond the largest file: a foreign one of any size is refused without reading it.
            body = stream.read(most * length + 1)
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error.strerror}): fix or fetch the file again.") from error
    if not body:
        raise ValueError(f"{str(path)!r} is empty, expected at least one image: fetch the file again.")
    if len(body) > most * length:
        raise ValueError(
            f"{str(path)!r} has more than {most} images of {length} bytes: take the binary version of {kind}."
        )
    if len(body) % length:
        raise ValueError(
            f"{str(path)!r} is truncated or foreign: {len(body)} bytes are not a multiple of {length}, an image with "
            "its label: fetch the file again."
        )
    records = np.frombuffer(bytearray(body), dtype=np.uint8).reshape(-1, length)
    labels = records[:, num_labels - 1]
    wrong = np.flatnonzero(labels >= num_classes)
    if len(wrong):
        place = int(wrong[0])
        raise ValueError(
            f"{str(path)!r} has the label {int(labels[place])} at image {place}, expected 0 to {num_classes - 1}: "
            f"take the binary version of {kind}."
        )
    return records


def read_records_100(path: Path) -> NDArray[np.uint8]:
    """Read those of CIFAR-100: a coarse and a fine label stand before each image; the fine one is taken."""
    return read_records(path, num_labels=2, num_classes=100, most=50_000, kind="CIFAR-100")


def read_names(path: Path, num_classes: int = NUM_CLASSES) -> tuple[str, ...]:
    """Read the names in a file, a line each; none without the file.

    Raises:
        ValueError: it is no text, or has another number of names.
    """
    if not path.exists():
        return ()
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as text: fetch the file again, or remove it.") from error
    if len(names) != num_classes:
        raise ValueError(
            f"{str(path)!r} has {len(names)} names, expected {num_classes}: fetch the file again, or remove it."
        )
    return names
