"""Shards at an address, read block-wise through a folder of limited size."""

from __future__ import annotations

import hashlib
import math
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mixdist.data.shards.address import Missing, without_secrets
from mixdist.data.shards.cache import Blocks
from mixdist.data.shards.fetch import RemoteFolder
from mixdist.data.shards.index import HEAD, SAMPLES, ShardEntry, ShardIndex
from mixdist.data.shards.storage import REMEDY, Damage, check_bytes, check_sizes

_ASKED_AT_ONCE = 8
_LARGEST_INDEX = 1 << 32


@dataclass(frozen=True)
class Cache:
    """How shards from an address are fetched and kept; local shards need none of it.

    Args:
        folder: where blocks are kept, for all runs and processes of a machine.
        limit_gb: size of the folder, in 1e9 bytes; beyond it the blocks used least recently are removed.
        block_mb: bytes that are fetched at once, in 1e6: more wait less on a distant server, fewer waste less where
            samples are read in a fully random order and the limit is less than the shards.
        retries: tries after the first for a block that does not come; the pauses between them grow from 0.5 to 30
            seconds, 90 in all for 8.
        timeout_s: seconds in which a server must answer, and in which a block must have come.
    """

    folder: str = "~/.cache/mixdist"
    limit_gb: float = 10.0
    block_mb: float = 4.0
    retries: int = 8
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if not self.folder:
            raise ValueError("cache.folder ('') must name a folder: give one on a disk with room for limit_gb")
        for name, lowest in {"limit_gb": 0.0, "block_mb": 1e-6, "timeout_s": 0.0}.items():  # at least a byte
            value = getattr(self, name)
            if not (lowest <= value < math.inf and value > 0):
                raise ValueError(f"cache.{name} ({value}) must be positive and finite, and block_mb at least a byte")
        if self.limit_gb * 1e3 < 4 * self.block_mb:
            raise ValueError(
                f"cache.limit_gb ({self.limit_gb}) must hold at least 4 blocks of block_mb ({self.block_mb}): "
                f"raise it, or lower block_mb"
            )
        if self.retries < 0:
            raise ValueError(f"cache.retries ({self.retries}) must be at least 0")


class RemoteStorage:
    """Shards at an address; a block is fetched once and kept for all processes of the machine.

    A member whose checksum differs is fetched once more, past what is kept.

    Args:
        base: address of their folder.
        cache: where and how they are kept.
        shards: of the index.

    Raises:
        ValueError: the address is not read from.
    """

    def __init__(self, base: str, cache: Cache, shards: Sequence[ShardEntry]) -> None:
        self._folder = _folder(base, cache)
        self._blocks = Blocks(Path(cache.folder).expanduser(), int(cache.limit_gb * 1e9), cache.timeout_s)
        self._shards = {shard.name: (shard.num_bytes, self._stem(shard)) for shard in shards}

    def read(self, shard: str, offset: int, size: int, crc: int) -> bytes:
        """See :meth:`Storage.read`."""
        num_bytes, stem = self._shards[shard]
        if not 0 <= offset <= offset + size <= num_bytes:
            check_bytes(self._folder.address(shard), offset, size, crc, bytes(max(0, min(num_bytes - offset, size))))
        numbers = range(offset // self._folder.block, -(-(offset + size) // self._folder.block)) if size else range(0)
        data = b"".join([self._part(shard, number, offset, offset + size) for number in numbers])
        if zlib.crc32(data) != crc:
            for number in numbers:
                self._blocks.drop(f"{stem}-{number:06d}")
            data = b"".join([self._part(shard, number, offset, offset + size) for number in numbers])
        return check_bytes(self._folder.address(shard), offset, size, crc, data)

    def check(self, index: ShardIndex) -> None:
        """See :meth:`Storage.check`."""
        pool = ThreadPoolExecutor(_ASKED_AT_ONCE)
        try:
            found = pool.map(self._num_bytes, [shard.name for shard in index.shards])
            check_sizes(self._folder.base, index, found)
        finally:
            pool.shutdown(cancel_futures=True)

    def close(self) -> None:
        """See :meth:`Storage.close`."""
        self._blocks.close()

    def _part(self, shard: str, number: int, start: int, stop: int) -> bytes:
        """Return what a block has of the bytes from ``start`` to ``stop`` of a shard."""
        num_bytes, stem = self._shards[shard]
        name, first = f"{stem}-{number:06d}", number * self._folder.block
        size = min(self._folder.block, num_bytes - first)
        start, stop = max(start - first, 0), min(stop - first, size)
        part = self._blocks.read(name, size, start, stop)
        if part is None:
            until = time.monotonic() + self._folder.patience_s
            with self._blocks.turn(name, until):
                part = self._blocks.read(name, size, start, stop)  # another process may have fetched it meanwhile
                if part is None:
                    block = self._fetch(shard, first, size, until)
                    self._blocks.store(name, block)
                    part = block[start:stop]
        return part

    def _fetch(self, shard: str, first: int, size: int, until: float) -> bytes:
        address, num_bytes = self._folder.address(shard), self._shards[shard][0]
        try:
            block, now = self._folder.read(shard, first, size, until)
            found = now.num_bytes if now else num_bytes if len(block) == size else self._num_bytes(shard)
            if found != num_bytes:
                has = f"has {found} bytes, but the index says {num_bytes}"
                raise Damage(f"{address!r} {has} (wanted for {size} at offset {first}): {REMEDY}")
        except Missing as missing:
            raise Damage(f"{missing}; wanted for {size} bytes at offset {first}") from None
        return block

    def _num_bytes(self, shard: str) -> int | None:
        try:
            return self._folder.info(shard).num_bytes
        except Missing:
            return None

    def _stem(self, shard: ShardEntry) -> str:
        """Name the content of a shard's blocks: a shard that is changed has others."""
        content = f"{self._folder.address(shard.name)}\n{shard.sha256}\n{self._folder.block}"
        return hashlib.sha256(content.encode()).hexdigest()[:40]


def read_index(address: str, cache: Cache) -> ShardIndex:
    """Read the index in a folder at an address.

    Raises:
        ValueError: the address is not read from, has no index, or one that cannot be used.
        OSError: it cannot be reached.
    """
    folder = _folder(address, cache)
    try:
        head, samples = (folder.whole(name, _LARGEST_INDEX) for name in (HEAD, SAMPLES))
    except Missing as missing:
        raise ValueError(f"{address!r} has no index ({missing}); mixdist index makes one") from None
    index = ShardIndex.parse(address, head, samples)
    scheme = address.partition(":")[0]
    if index.base is not None and index.base.partition(":")[0] not in (scheme, "https"):
        raise ValueError(
            f"the index of {address} leads to {without_secrets(index.base)!r}, expected {scheme} or https: make it anew"
        )
    return index


def _folder(base: str, cache: Cache) -> RemoteFolder:
    settings = f"cache.retries ({cache.retries}) or cache.timeout_s ({cache.timeout_s:g})"
    return RemoteFolder(base, int(cache.block_mb * 1e6), cache.retries, cache.timeout_s, settings)
