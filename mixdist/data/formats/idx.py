"""MNIST and its relatives in their own file format, idx: a big-endian header, then the bytes; four files.

Shape letters: N samples, H height, W width.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from mixdist.data.formats.listing import Arrays, Listing, Missing, Part
from mixdist.data.formats.trees import Entry, digest, reading

Bytes = NDArray[np.uint8]

_MAX_BYTES = 2**31
_PIECE = 1 << 20
_SPLITS = {"train": "train", "t10k": "test"}
IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"


def fits(root: Path) -> bool:
    return any((root / f"{prefix}-{IMAGES}{end}").is_file() for prefix in _SPLITS for end in ("", ".gz"))


def make_listing(root: Path, labels: bool = True) -> Listing:
    """List the four files of :class:`mixdist.data.Idx`, with its ids."""
    parts, told, bodies, sizes, first_id = [], [], [], [], 0
    for prefix, split in _SPLITS.items():
        images, classes = read_idx(find(root, f"{prefix}-{IMAGES}"), 3), read_idx(find(root, f"{prefix}-{LABELS}"), 1)
        if len(images) != len(classes):
            raise ValueError(
                f"'{prefix}-{IMAGES}' has {len(images)} images and '{prefix}-{LABELS}' {len(classes)} labels, expected "
                "as many: take both from one data set"
            )
        label_N = classes.astype(np.int64) if labels else None
        parts.append(Part(split, first_id, len(images), f"{prefix}-{IMAGES}", label_N=label_N))
        told.append(Entry(prefix, images.size))
        bodies += [images.tobytes(), classes.tobytes()]
        sizes.append((1, *images.shape[1:]))
        first_id += len(images)
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the images in {str(root)!r} have {sizes[0][1]}x{sizes[0][2]} pixels in training and "
            f"{sizes[1][1]}x{sizes[1][2]} in testing, expected one size: take files of one data set"
        )
    name = digest(told, *bodies)
    return Listing(tuple(parts), Arrays(root, read_images), name, image=(1, *images.shape[1:]), channels=1)


def read_images(path: Path) -> Bytes:
    """Read the images of a file, as it is or with ``.gz``, uint8 (N, 1, H, W)."""
    return read_idx(find(path.parent, path.name), num_dims=3)[:, None]


def find(root: Path, name: str) -> Path:
    """Find a file, as it is or with ``.gz``.

    Raises:
        Missing: there is neither.
    """
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    raise Missing(f"{str(root)!r} has no file {name!r} or '{name}.gz': put one of them there")


def read_idx(path: Path, num_dims: int) -> Bytes:
    """Read the bytes of an idx file in the shape that its header gives.

    Raises:
        ValueError: it is foreign, damaged, or too large.
    """
    with (
        reading(path, "idx", EOFError, zlib.error),
        gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream,
    ):
        return _read_stream(stream, str(path), num_dims)


def _read_stream(stream: BinaryIO | gzip.GzipFile, path: str, num_dims: int) -> Bytes:
    magic, expected = stream.read(4), bytes((0, 0, 0x08, num_dims))
    if magic != expected:
        found = f"0x{magic.hex()}" if magic else "nothing"
        kind = "images" if num_dims == 3 else "labels"
        raise ValueError(
            f"{path!r} begins with {found}, expected 0x{expected.hex()} for {kind} in idx format: fetch the file again."
        )
    start = 4 + 4 * num_dims
    header = stream.read(start - 4)
    if len(header) < start - 4:
        raise ValueError(_truncated(path, start, 4 + len(header)))
    dims = struct.unpack(f">{num_dims}I", header)
    size = math.prod(dims)
    if not 0 < size <= _MAX_BYTES:
        raise ValueError(
            f"{path!r} claims {' x '.join(map(str, dims))} = {size} bytes, expected from 1 to {_MAX_BYTES}: "
            "fetch the file again, or split the data set."
        )
    body = _read_at_most(stream, size + 1)
    if len(body) < size:
        raise ValueError(_truncated(path, start + size, start + len(body)))
    if len(body) > size:
        raise ValueError(f"{path!r} goes on after the {size} bytes that its header claims: fetch the file again.")
    return np.frombuffer(body, dtype=np.uint8).reshape(dims)


def _read_at_most(stream: BinaryIO | gzip.GzipFile, size: int) -> bytearray:
    """Return up to ``size`` bytes, read in pieces: a header may claim far more than the file has."""
    body = bytearray()
    while len(body) < size and (piece := stream.read(min(_PIECE, size - len(body)))):
        body += piece
    return body


def _truncated(path: str, expected: int, found: int) -> str:
    return f"{path!r} is truncated: expected {expected} bytes, found {found}: fetch the file again."
