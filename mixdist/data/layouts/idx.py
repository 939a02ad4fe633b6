"""MNIST and its relatives: the four idx files.

Shape letters: N samples, H height, W width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixdist.data.idx import IMAGES, LABELS, PREFIXES, find, read_idx, read_pair
from mixdist.data.layouts.layout import Arrays, Layout, Missing, Part
from mixdist.data.layouts.trees import Entry, digest

_SPLITS = dict(zip(PREFIXES, ("train", "test"), strict=True))


def fits(root: Path) -> bool:
    return any((root / f"{prefix}-{IMAGES}{end}").is_file() for prefix in PREFIXES for end in ("", ".gz"))


def layout(root: Path, labels: bool = True) -> Layout:
    """List the four files of :class:`mixdist.data.Idx`, with its ids.

    Args:
        root: the folder.
        labels: whether to take the classes.

    Raises:
        Missing: a file is missing.
        ValueError: a file is damaged or foreign, or two disagree.
    """
    for name in (f"{prefix}-{kind}" for prefix in PREFIXES for kind in (IMAGES, LABELS)):
        if not (root / name).is_file() and not (root / f"{name}.gz").is_file():
            raise Missing(f"{str(root)!r} has no file {name!r} or '{name}.gz': put one of them there")
    parts, told, bodies, sizes, first_id = [], [], [], [], 0
    for prefix, split in _SPLITS.items():
        images, classes = (tensor.numpy() for tensor in read_pair(root, prefix))
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
    return Layout(tuple(parts), Arrays(root, read_images), name, image=(1, *images.shape[1:]), channels=1)


def read_images(path: Path) -> NDArray[np.uint8]:
    """Read the images of a file, as it is or with ``.gz``, uint8 (N, 1, H, W)."""
    images: NDArray[np.uint8] = read_idx(find(path.parent, path.name), num_dims=3).numpy()
    return images[:, None]
