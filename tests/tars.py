"""Small sets of tar shards for tests, written by webdataset and indexed."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from webdataset import TarWriter

from mixdist.data.shards.index import ShardIndex, split_of
from mixdist.data.shards.scan import assemble, scan

SIDE = 8
COUNTS = {"train-000000.tar": 13, "train-000001.tar": 1, "train-000002.tar": 30, "test-000000.tar": 9}
"""Samples of each shard: uneven."""


def image_of(sample: int, side: int = SIDE) -> NDArray[np.uint8]:
    """Give the pixels of a sample, (H, W, 3): noise that its number decides."""
    return np.random.default_rng(sample).integers(0, 256, (side, side, 3), dtype=np.uint8)


def encoded(pixels: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    """Give pixels as an image file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def write_shard(path: Path, samples: Sequence[dict[str, bytes | str]]) -> None:
    """Write samples, each with its "__key__" and the bytes of its members."""
    with open(path, "wb") as stream, TarWriter(stream, encoder=False, mtime=0) as tar:
        for sample in samples:
            tar.write({name: v.encode() if isinstance(v, str) and name[0] != "_" else v for name, v in sample.items()})


def sample_of(number: int) -> dict[str, bytes | str]:
    """Give a sample with an image, one of three classes, and two attributes."""
    attributes = {"Round": number % 2, "Tall": int(number % 5 == 0)}
    about = json.dumps({"name": f"{number}.png", "attributes": attributes})
    image = encoded(image_of(number))
    return {"__key__": f"{number:09d}", "png": image, "cls": str(number % 3), "json": about}


def make_shards(folder: Path, counts: dict[str, int] = COUNTS) -> ShardIndex:
    """Write shards of numbered samples with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for name, count in counts.items():
        write_shard(folder / name, [sample_of(first + n) for n in range(count)])
        first += count
    return make_index(folder, list(counts))


def make_index(folder: Path, names: Sequence[str]) -> ShardIndex:
    """Index shards that are there."""
    scans = [scan(folder / name) for name in names]
    index = assemble(scans, [split_of(name) for name in names], class_names=("a", "b", "c"), image=(3, SIDE, SIDE))
    index.write(folder)
    return index
