"""CIFAR-10 in its official binary version: a label byte, then 32x32 pixels of red, green and blue, for each image."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mixdist.data.dataset import Dataset, Source
from mixdist.terms import Field

NUM_CLASSES = 10
_SHAPE = (3, 32, 32)
_RECORD = 1 + 3 * 32 * 32
_PER_FILE = 10_000
_TRAIN = tuple(f"data_batch_{n}.bin" for n in range(1, 6))
_TEST, _NAMES, _FOLDER = "test_batch.bin", "batches.meta.txt", "cifar-10-batches-bin"


class Cifar10(Source):
    """A folder with CIFAR-10's binary files: "x" uint8 (3, 32, 32) with scale 1/255, label "y" uint8 of 10 classes.

    ``data_batch_1.bin`` to ``data_batch_5.bin`` are the training set: those that are there are read, at least one
    must be. ``test_batch.bin`` is the test set and must be there. ``batches.meta.txt`` names the classes where it
    is there. A file may hold fewer than the official 10,000 images. The id of a sample is its place in the official
    order, 10,000 a file, test images from 50,000: it does not depend on which files are there.

    Args:
        root: the folder, or the one that holds ``cifar-10-batches-bin``.
        limit: takes the first so many samples of the training set and of the test set; None takes all.

    Raises:
        ValueError: if ``limit`` is less than 1.
    """

    def __init__(self, root: str, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit ({limit}) must be at least 1: set it to a number of samples, or to null for all.")
        self.root, self.limit = root, limit

    def load(self) -> tuple[Dataset, Dataset]:
        """Read the files.

        Raises:
            ValueError: if the folder or a needed file is missing, or a file is empty, truncated, too large or foreign.
        """
        root = Path(self.root)
        if not root.is_dir():
            raise ValueError(f"root ({self.root!r}) is not a folder: set it to that of CIFAR-10's binary files.")
        folder = root / _FOLDER if (root / _FOLDER).is_dir() else root
        batches = [(n * _PER_FILE, folder / name) for n, name in enumerate(_TRAIN) if (folder / name).exists()]
        if not batches:
            raise ValueError(f"{str(folder)!r} has none of the files {_TRAIN[0]!r} to {_TRAIN[-1]!r}: put one there.")
        if not (folder / _TEST).exists():
            raise ValueError(f"{str(folder)!r} has no file {_TEST!r}: put it there.")
        names = _class_names(folder / _NAMES)
        return self._read(batches, names), self._read([(len(_TRAIN) * _PER_FILE, folder / _TEST)], names)

    def _read(self, files: list[tuple[int, Path]], names: tuple[str, ...]) -> Dataset:
        """One data set of files, each with its first id."""
        ids, records = [], []
        left = self.limit
        for first_id, path in files:
            if left == 0:
                break
            read = _records(path)
            # A copy, so that the rest of the file does not stay in memory behind a view.
            kept = read if left is None or left >= len(read) else read[:left].clone()
            left = None if left is None else left - len(kept)
            records.append(kept)
            ids.append(torch.arange(first_id, first_id + len(kept)))
        rows = torch.cat(records)
        labels, images = rows[:, 0].clone(), rows[:, 1:].reshape(-1, *_SHAPE)
        spec = {
            "x": Field(_SHAPE, torch.uint8, scale=1 / 255),
            "y": Field((), torch.uint8, num_classes=NUM_CLASSES),
        }
        return Dataset({"id": torch.cat(ids), "x": images, "y": labels}, spec, "y", names)


def _records(path: Path) -> Tensor:
    """The records of a file, uint8 (N, 3073)."""
    try:
        with path.open("rb") as stream:
            # One byte beyond the largest file: a foreign one of any size is refused without reading it.
            body = stream.read(_PER_FILE * _RECORD + 1)
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error.strerror}): mend or fetch the file again.") from error
    if not body:
        raise ValueError(f"{str(path)!r} is empty, expected at least one image: fetch the file again.")
    if len(body) > _PER_FILE * _RECORD:
        raise ValueError(
            f"{str(path)!r} has more than {_PER_FILE} images of {_RECORD} bytes: take the binary version of CIFAR-10."
        )
    if len(body) % _RECORD:
        raise ValueError(
            f"{str(path)!r} is truncated or foreign: {len(body)} bytes are not a multiple of {_RECORD}, an image with "
            "its label: fetch the file again."
        )
    records = torch.frombuffer(bytearray(body), dtype=torch.uint8).reshape(-1, _RECORD)
    wrong = (records[:, 0] >= NUM_CLASSES).nonzero()
    if len(wrong):
        place = int(wrong[0])
        raise ValueError(
            f"{str(path)!r} has the label {int(records[place, 0])} at image {place}, expected 0 to {NUM_CLASSES - 1}: "
            "take the binary version of CIFAR-10."
        )
    return records


def _class_names(path: Path) -> tuple[str, ...]:
    """The names in the file, a line each; none without the file."""
    if not path.exists():
        return ()
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as text: fetch the file again, or remove it.") from error
    if len(names) != NUM_CLASSES:
        raise ValueError(
            f"{str(path)!r} has {len(names)} names, expected {NUM_CLASSES}: fetch the file again, or remove it."
        )
    return names
