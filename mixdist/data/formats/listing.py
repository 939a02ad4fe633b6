"""A listing of a data set: numbered samples, known without reading an image, and a reader for worker processes.

Shape letters: N samples of a part, A attributes, C channels, H height, W width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mixdist.data.images import Unreadable

SPLITS = ("train", "valid", "test")
MAX_BYTES = 2**30

Raw = bytes | NDArray[np.uint8]
"""An image as its source has it: an encoded file, or pixels, uint8 (C, H, W)."""


class Missing(ValueError):
    """A file that a format needs is missing; perhaps the folder has another format."""


class Sample(NamedTuple):
    """One image of a source.

    Args:
        id: its global number.
        name: in the source, for messages; a file's path from the reader's folder where each image is a file.
        file: the file that it is a row of; empty where each image is a file.
        row: its place there.
        label: its class, or None.
        attributes: A bytes of 0 and 1, or none.
    """

    id: int
    name: str
    file: str
    row: int
    label: int | None
    attributes: bytes


class Reader(Protocol):
    """Reads images; it travels to worker processes."""

    def read(self, sample: Sample) -> Raw:
        """Read an image.

        Raises:
            Unreadable: it cannot be used, whatever is done about its file.
            OSError: its file cannot be read.
            ValueError: its file is not what it was when it was listed.
        """


@dataclass(frozen=True)
class Files:
    """Images that are files."""

    folder: Path

    def read(self, sample: Sample) -> bytes:
        path = self.folder / sample.name
        if os.path.lexists(path) and not path.is_file():  # opening a fifo would wait for ever
            raise Unreadable("it is no plain file, or a link to nothing")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise Unreadable(f"it has {size} bytes, expected at most {MAX_BYTES}")
        return path.read_bytes()


@dataclass
class Arrays:
    """Images that are rows of files; the file that was read last stays in memory.

    Args:
        folder: of the files.
        load: reads all images of a file, uint8 (N, C, H, W); a function of a module, so that it can travel.
    """

    folder: Path
    load: Callable[[Path], NDArray[np.uint8]]
    _last: tuple[str, NDArray[np.uint8]] | None = field(default=None, repr=False)

    def read(self, sample: Sample) -> NDArray[np.uint8]:
        if self._last is None or self._last[0] != sample.file:
            self._last = None  # the old one makes room before the new one is read
            self._last = sample.file, self.load(self.folder / sample.file)
        images_NCHW = self._last[1]
        if sample.row >= len(images_NCHW):
            raise ValueError(
                f"{str(self.folder / sample.file)!r} has {len(images_NCHW)} images, fewer than when it was listed: "
                "put it back, and start again with an empty --out"
            )
        return images_NCHW[sample.row]


@dataclass(frozen=True, eq=False)
class Part:
    """Images of one split that lie together, numbered on from ``first_id``.

    Args:
        split: train, valid, test or another.
        first_id: id of the first.
        num: N.
        file: that they are rows of; empty where each is a file.
        names: N paths from the reader's folder, where each is a file.
        label_N: classes, int64, or None.
        attribute_NA: uint8 of 0 and 1, or None.
    """

    split: str
    first_id: int
    num: int
    file: str = ""
    names: Sequence[str] = ()
    label_N: NDArray[np.int64] | None = None
    attribute_NA: NDArray[np.uint8] | None = None

    def sample(self, row: int) -> Sample:
        return Sample(
            self.first_id + row,
            self.names[row] if self.names else f"{self.file} image {row}",
            self.file,
            row,
            None if self.label_N is None else int(self.label_N[row]),
            b"" if self.attribute_NA is None else self.attribute_NA[row].tobytes(),
        )


@dataclass(frozen=True, eq=False)
class Listing:
    """All samples of a source, in its own order: split after split.

    Args:
        parts: in order; the parts of a split follow each other.
        reader: of the images.
        digest: names the content that was listed.
        class_names: of the label, or empty.
        attribute_names: A names, or empty.
        image: (C, H, W) where every image is known to have it.
        channels: that its images usually have.
        passed_over: files that are no images by their names.
    """

    parts: tuple[Part, ...]
    reader: Reader
    digest: str
    class_names: tuple[str, ...] = ()
    attribute_names: tuple[str, ...] = ()
    image: tuple[int, int, int] | None = None
    channels: int = 3
    passed_over: int = 0

    @property
    def splits(self) -> tuple[str, ...]:
        """Return the names of the splits, in order."""
        return tuple(dict.fromkeys(part.split for part in self.parts))

    def count(self, split: str) -> int:
        """Return the number of samples in a split."""
        return sum(part.num for part in self.parts if part.split == split)

    def samples(self, split: str, first: int, last: int) -> list[Sample]:
        """Return samples ``first`` to before ``last`` of a split."""
        found: list[Sample] = []
        start = 0
        for part in (part for part in self.parts if part.split == split):
            rows = range(max(first - start, 0), min(last - start, part.num))
            found += [part.sample(row) for row in rows]
            start += part.num
        return found


def folder_of(root: Path, inner: str) -> Path:
    """Return the folder of an official archive: ``root``, or ``inner`` where it holds that."""
    return root / inner if (root / inner).is_dir() else root
