"""Tar shards of random bytes, with their members as tarfile finds them, for tests of what reads shards."""

from __future__ import annotations

import io
import itertools
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mixdist.data.shards.scan import assemble, scan


class Member(NamedTuple):
    """Where a member lies, as :meth:`Storage.read` wants it, and its bytes."""

    shard: str
    offset: int
    size: int
    crc: int
    data: bytes

    @property
    def place(self) -> tuple[str, int, int, int]:
        return self.shard, self.offset, self.size, self.crc


def make(folder: Path, sizes: list[list[int]], seed: int = 0, base: str | None = None) -> list[Member]:
    """Write shards whose members have these sizes, and the index; give the members in order."""
    random = np.random.default_rng(seed)
    numbers = itertools.count()
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"train-{number:06d}.tar" for number in range(len(sizes))]
    for name, shard_sizes in zip(names, sizes, strict=True):
        with tarfile.open(folder / name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for size in shard_sizes:
                header = tarfile.TarInfo(f"{next(numbers):09d}.jpg")
                header.size = size
                tar.addfile(header, io.BytesIO(random.bytes(size)))
    assemble([scan(folder / name) for name in names], ["train"] * len(names), base=base).write(folder)
    members = []
    for name in names:
        whole = (folder / name).read_bytes()
        with tarfile.open(folder / name) as tar:
            for header in tar:
                data = whole[header.offset_data : header.offset_data + header.size]
                members.append(Member(name, header.offset_data, header.size, zlib.crc32(data), data))
    return members
