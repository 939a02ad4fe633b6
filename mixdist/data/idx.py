"""MNIST and its relatives in their own file format, idx: a big-endian header, then the bytes."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mixdist.data.dataset import Dataset, Source
from mixdist.terms import Field

_MAX_BYTES = 2**31
_PIECE = 1 << 20
PREFIXES = ("train", "t10k")
IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"


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
        (train_x, train_y), (test_x, test_y) = (read_pair(root, prefix) for prefix in PREFIXES)
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


def read_pair(root: Path, prefix: str) -> tuple[Tensor, Tensor]:
    """Read the images (N, H, W) and labels (N,) of "train" or "t10k", uint8.

    Raises:
        ValueError: a file is missing, foreign, damaged or too large, or the two disagree.
    """
    images = read_idx(find(root, f"{prefix}-{IMAGES}"), num_dims=3)
    labels = read_idx(find(root, f"{prefix}-{LABELS}"), num_dims=1)
    if len(images) != len(labels):
        raise ValueError(
            f"'{prefix}-{IMAGES}' has {len(images)} images and '{prefix}-{LABELS}' {len(labels)} labels, "
            f"expected as many: take both from one data set."
        )
    return images, labels


def find(root: Path, name: str) -> Path:
    """Find a file, as it is or with ``.gz``.

    Raises:
        ValueError: there is neither.
    """
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    raise ValueError(f"root ({str(root)!r}) has no file {name!r} or '{name}.gz': put one of them there.")


def read_idx(path: Path, num_dims: int) -> Tensor:
    """Read the bytes of an idx file in the shape that its header gives.

    Raises:
        ValueError: it is foreign, damaged, or too large.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            return _read_stream(stream, str(path), num_dims)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{str(path)!r} cannot be read ({_one_line(error)}): fetch the file again.") from error


def _read_stream(stream: BinaryIO | gzip.GzipFile, path: str, num_dims: int) -> Tensor:
    magic, expected = stream.read(4), bytes((0, 0, 0x08, num_dims))
    if magic != expected:
        found = f"0x{magic.hex()}" if magic else "nothing"
        kind = "images" if num_dims == 3 else "labels"
        raise ValueError(
            f"{path!r} begins with {found}, expected 0x{expected.hex()} for {kind} in idx format: fetch the file again."
        )
    header = stream.read(4 * num_dims)
    if len(header) < 4 * num_dims:
        raise ValueError(_truncated(path, 4 + 4 * num_dims, 4 + len(header)))
    dims = struct.unpack(f">{num_dims}I", header)
    size = math.prod(dims)
    if not 0 < size <= _MAX_BYTES:
        raise ValueError(
            f"{path!r} claims {' x '.join(map(str, dims))} = {size} bytes, expected from 1 to {_MAX_BYTES}: "
            "fetch the file again, or split the data set."
        )
    body = _read_at_most(stream, size + 1)
    if len(body) < size:
        raise ValueError(_truncated(path, 4 + 4 * num_dims + size, 4 + 4 * num_dims + len(body)))
    if len(body) > size:
        raise ValueError(f"{path!r} goes on after the {size} bytes that its header claims: fetch the file again.")
    return torch.frombuffer(body, dtype=torch.uint8).reshape(dims)


def _read_at_most(stream: BinaryIO | gzip.GzipFile, size: int) -> bytearray:
    """Up to ``size`` bytes, in pieces: a header may claim far more than the file has."""
    body = bytearray()
    while len(body) < size and (piece := stream.read(min(_PIECE, size - len(body)))):
        body += piece
    return body


def _truncated(path: str, expected: int, found: int) -> str:
    return f"{path!r} is truncated: expected {expected} bytes, found {found}: fetch the file again."


def _size(images: Tensor) -> str:
    return "x".join(str(length) for length in images.shape[1:])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
