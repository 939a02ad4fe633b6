"""Tar shards of random bytes with an index made by hand, for tests of what reads them."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mixdist.data.shards.index import ShardEntry, ShardIndex


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
    members, entries = [], []
    folder.mkdir(parents=True, exist_ok=True)
    for number, shard_sizes in enumerate(sizes):
        name = f"train-{number:06d}.tar"
        with tarfile.open(folder / name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for place, size in enumerate(shard_sizes):
                header = tarfile.TarInfo(f"{len(members) + place:09d}.jpg")
                header.size = size
                tar.addfile(header, io.BytesIO(random.bytes(size)))
        whole = (folder / name).read_bytes()
        first = len(members)
        with tarfile.open(folder / name) as tar:
            for header in tar:
                data = whole[header.offset_data : header.offset_data + header.size]
                members.append(Member(name, header.offset_data, header.size, zlib.crc32(data), data))
        digest = hashlib.sha256(whole).hexdigest()
        entries.append(ShardEntry(name, "train", len(whole), digest, len(shard_sizes), first))
    index = ShardIndex(
        tuple(entries),
        ("jpg",),
        np.arange(len(members)),
        np.array([[[one.offset, one.size]] for one in members], dtype=np.int64),
        np.array([[one.crc] for one in members], dtype=np.uint32),
        base=base,
    )
    index.write(folder)
    return members


def rebased(folder: Path, base: str | None) -> None:
    """Write an index again with another address of the shards."""
    replace(ShardIndex.read(folder), base=base).write(folder)
