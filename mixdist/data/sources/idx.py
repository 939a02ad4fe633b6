"""MNIST and its relatives in their own file format, idx: a big-endian header, then the bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mixdist.data.dataset import Dataset, Source
from mixdist.data.formats.idx import PREFIXES, read_pair
from mixdist.terms import Field


class Idx(Source):
    """A folder with MNIST's four files: "x" uint8 (1, H, W) with scale 1/255, label "y" uint8.

    The files are ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte`` and
    ``t10k-labels-idx1-ubyte``, each as it is or with ``.gz``; of both, the plain one is read. The id of a sample is its
    place in the training file; those of the test file go on from there.

    Args:
        root: the folder.
        limit: takes the first so many samples of the training set and of the test set; None takes all.
        num_classes: classes of the label.

    Raises:
        ValueError: if ``limit`` is less than 1 or ``num_classes`` is not from 1 to 256.
    """

    def __init__(self, root: str, limit: int | None = None, num_classes: int = 10) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit ({limit}) must be at least 1: set it to a number of samples, or to null for all.")
        if not 1 <= num_classes <= 256:
            raise ValueError(f"num_classes ({num_classes}) must be from 1 to 256: labels are single bytes.")
        self.root, self.limit, self.num_classes = root, limit, num_classes

    def load(self) -> tuple[Dataset, Dataset]:
        """Read the four files.

        Raises:
            ValueError: if the folder or a file is missing, foreign, damaged, too large, or disagrees with another.
        """
        root = Path(self.root)
        if not root.is_dir():
            raise ValueError(f"root ({self.root!r}) is not a folder: set it to the folder with MNIST's four files.")
        (train_x, train_y), (test_x, test_y) = (map(torch.from_numpy, read_pair(root, prefix)) for prefix in PREFIXES)
        if train_x.shape[1:] != test_x.shape[1:]:
            sizes = f"{_size(train_x)} pixels in training and {_size(test_x)} in testing"
            raise ValueError(
                f"the images in {str(root)!r} have {sizes}, expected one size: take files of one data set."
            )
        return self._dataset(0, train_x, train_y), self._dataset(len(train_x), test_x, test_y)

    def _dataset(self, first_id: int, images: Tensor, labels: Tensor) -> Dataset:
        if self.limit is not None and self.limit < len(images):
            # A copy, so that the rest of the file does not stay in memory behind a view.
            images, labels = images[: self.limit].clone(), labels[: self.limit].clone()
        shape = (1, *images.shape[1:])
        spec = {
            "x": Field(shape, torch.uint8, scale=1 / 255),
            "y": Field((), torch.uint8, num_classes=self.num_classes),
        }
        ids = torch.arange(first_id, first_id + len(images))
        return Dataset({"id": ids, "x": images.unsqueeze(1), "y": labels}, spec, "y")


def _size(images: Tensor) -> str:
    return "x".join(str(length) for length in images.shape[1:])
