"""CIFAR-10 and CIFAR-100 in their official binary versions.

Shape letters: N samples, C channels, H height, W width.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixdist.data.formats.listing import Arrays, Listing, Missing, Part, folder_of
from mixdist.data.formats.trees import Entry, digest, read_text, reading

SHAPE = (3, 32, 32)


class Cifar(NamedTuple):
    """One of the two data sets.

    Args:
        name: for people.
        folder: in the official archive.
        files: of the training set, then the one of the test set.
        most: images that a file has at most.
        names: file with a class's name in each line.
        num_classes: of the label.
        num_labels: bytes of labels in front of an image; the last of them is the class.
    """

    name: str
    folder: str
    files: tuple[str, ...]
    most: int
    names: str
    num_classes: int
    num_labels: int

    def fits(self, root: Path) -> bool:
        return any((folder_of(root, self.folder) / name).is_file() for name in self.files)

    def make_listing(self, root: Path, labels: bool = True) -> Listing:
        """List CIFAR: ids are places in the official order, so many a file, whichever files are there."""
        folder = folder_of(root, self.folder)
        *train, test = self.files
        if not any((folder / name).is_file() for name in train):
            raise Missing(f"{str(folder)!r} has none of the files {', '.join(map(repr, train))}: put one there")
        if not (folder / test).is_file():
            raise Missing(f"{str(folder)!r} has no file {test!r}: put it there")
        parts, listed, bodies = [], [], []
        for place, name in enumerate(self.files):
            if (folder / name).is_file():
                records = read_records(self, folder / name)
                label_N = records[:, self.num_labels - 1].astype(np.int64) if labels else None
                split = "test" if name == test else "train"
                parts.append(Part(split, place * self.most, len(records), name, label_N=label_N))
                listed.append(Entry(name, records.size))
                bodies.append(records.tobytes())
        names = _names(self, folder / self.names) if labels else ()
        content = digest(listed, *bodies, "\n".join(names).encode())
        return Listing(tuple(parts), Arrays(folder, partial(images, self)), content, names, image=SHAPE)


FILES_10 = (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin")
CIFAR_10 = Cifar("CIFAR-10", "cifar-10-batches-bin", FILES_10, 10_000, "batches.meta.txt", 10, 1)
FILES_100 = ("train.bin", "test.bin")
CIFAR_100 = Cifar("CIFAR-100", "cifar-100-binary", FILES_100, 50_000, "fine_label_names.txt", 100, 2)


def images(kind: Cifar, path: Path) -> NDArray[np.uint8]:
    """Read the images of a file, uint8 (N, 3, 32, 32)."""
    return read_records(kind, path)[:, kind.num_labels :].reshape(-1, *SHAPE)


def read_records(kind: Cifar, path: Path) -> NDArray[np.uint8]:
    """Read the records of a file, uint8 (N, num_labels + 3072).

    Raises:
        ValueError: the file cannot be read, or is empty, truncated, too large or foreign.
    """
    length = kind.num_labels + math.prod(SHAPE)
    with reading(path, kind.name), path.open("rb") as stream:
        # One byte beyond the largest file: a foreign one of any size is refused without reading it.
        body = stream.read(kind.most * length + 1)
    if not body or len(body) % length or len(body) > kind.most * length:
        size = f"more than {len(body) - 1}" if len(body) > kind.most * length else f"{len(body)}"
        raise ValueError(
            f"{str(path)!r} has {size} bytes, expected from 1 to {kind.most} images of {length} bytes each: fetch the "
            f"binary version of {kind.name}"
        )
    records = np.frombuffer(bytearray(body), dtype=np.uint8).reshape(-1, length)
    label_N = records[:, kind.num_labels - 1]
    if (label_N >= kind.num_classes).any():
        place = int(np.argmax(label_N >= kind.num_classes))
        raise ValueError(
            f"{str(path)!r} has the label {label_N[place]} at image {place}, expected 0 to {kind.num_classes - 1}: "
            f"fetch the binary version of {kind.name}"
        )
    return records


def _names(kind: Cifar, path: Path) -> tuple[str, ...]:
    """Return the names in a file, a line each; none without the file."""
    names = tuple(filter(None, map(str.strip, read_text(path).splitlines()))) if path.exists() else ()
    if len(names) not in (0, kind.num_classes):
        raise ValueError(
            f"{str(path)!r} has {len(names)} names, expected {kind.num_classes}: fetch the file again, or remove it"
        )
    return names
