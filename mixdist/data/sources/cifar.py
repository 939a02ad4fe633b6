"""CIFAR-10 in its official binary version: a label byte, then 32x32 pixels of red, green and blue, for each image."""

from __future__ import annotations

from pathlib import Path

import torch

from mixdist.data.dataset import Dataset, Source
from mixdist.data.formats.cifar import (
    FOLDER,
    NAMES,
    NUM_CLASSES,
    PER_FILE,
    SHAPE,
    TEST,
    TRAIN,
    read_names,
    read_records,
)
from mixdist.terms import Field


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
        folder = root / FOLDER if (root / FOLDER).is_dir() else root
        batches = [(n * PER_FILE, folder / name) for n, name in enumerate(TRAIN) if (folder / name).exists()]
        if not batches:
            raise ValueError(f"{str(folder)!r} has none of the files {TRAIN[0]!r} to {TRAIN[-1]!r}: put one there.")
        if not (folder / TEST).exists():
            raise ValueError(f"{str(folder)!r} has no file {TEST!r}: put it there.")
        names = read_names(folder / NAMES)
        return self._read(batches, names), self._read([(len(TRAIN) * PER_FILE, folder / TEST)], names)

    def _read(self, files: list[tuple[int, Path]], names: tuple[str, ...]) -> Dataset:
        """One data set of files, each with its first id."""
        ids, records = [], []
        left = self.limit
        for first_id, path in files:
            if left == 0:
                break
            read = torch.from_numpy(read_records(path))
            # A copy, so that the rest of the file does not stay in memory behind a view.
            kept = read if left is None or left >= len(read) else read[:left].clone()
            left = None if left is None else left - len(kept)
            records.append(kept)
            ids.append(torch.arange(first_id, first_id + len(kept)))
        rows = torch.cat(records)
        labels, images = rows[:, 0].clone(), rows[:, 1:].reshape(-1, *SHAPE)
        spec = {
            "x": Field(SHAPE, torch.uint8, scale=1 / 255),
            "y": Field((), torch.uint8, num_classes=NUM_CLASSES),
        }
        return Dataset({"id": torch.cat(ids), "x": images, "y": labels}, spec, "y", names)
