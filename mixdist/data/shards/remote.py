"""Shards at an https address, read block-wise through a folder of limited size."""

from __future__ import annotations

import hashlib
import math
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mixdist.data.shards.cache import Blocks
from mixdist.data.shards.http import Missing, Web
from mixdist.data.shards.index import HEAD, SAMPLES, ShardEntry, ShardIndex
from mixdist.data.shards.storage import REMEDY, Damage, check_bytes, check_sizes

_ASKED_AT_ONCE = 8
_LARGEST_INDEX = 1 << 32


@dataclass(frozen=True)
class Cache:
    """How shards from an https address are fetched and kept; local shards need none of it.

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
        for name in ("limit_gb", "block_mb", "timeout_s"):
            value = getattr(self, name)
            if not (0 < value < math.inf):
                raise ValueError(f"cache.{name} ({value}) must be more than 0 and finite: give such a number")
        if self.block_mb * 1e6 < 1:
            raise ValueError(f"cache.block_mb ({self.block_mb}) must be at least a byte: give 1 or more")
        if self.limit_gb * 1e9 < 4 * self.block_mb * 1e6:
            raise ValueError(
                f"cache.limit_gb ({self.limit_gb}) must hold at least 4 blocks of block_mb ({self.block_mb}): "
                f"raise it, or lower block_mb"
            )
        if self.retries < 0:
            raise ValueError(f"cache.retries ({self.retries}) must be at least 0: give 0 or more")

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return int(self.block_mb * 1e6)


class RemoteStorage:
    """Shards at an address; a block is fetched once and kept for all processes of the machine.

    A member whose checksum differs is fetched once more, past what is kept.

    Args:
        base: https address of their folder; http where it is this machine.
        cache: where and how they are kept.
        shards: of the index.

    Raises:
        ValueError: the address is not fetched from.
    """

    def __init__(self, base: str, cache: Cache, shards: Sequence[ShardEntry]) -> None:
        self._web = _web(base, cache)
        self._block = cache.block_bytes
        self._blocks = Blocks(Path(cache.folder).expanduser(), int(cache.limit_gb * 1e9), cache.timeout_s)
        self._shards = {shard.name: (shard.num_bytes, self._stem(shard)) for shard in shards}

    def read(self, shard: str, offset: int, size: int, crc: int) -> bytes:
        """See :meth:`Storage.read`."""
        num_bytes, stem = self._shards[shard]
        if not 0 <= offset <= offset + size <= num_bytes:
            check_bytes(self._web.address(shard), offset, size, crc, bytes(max(0, min(num_bytes - offset, size))))
        numbers = range(offset // self._block, -(-(offset + size) // self._block)) if size else range(0)
        data = b"".join([self._part(shard, number, offset, offset + size) for number in numbers])
        if zlib.crc32(data) != crc:
            for number in numbers:
                self._blocks.drop(f"{stem}-{number:06d}")
            data = b"".join([self._part(shard, number, offset, offset + size) for number in numbers])
        return check_bytes(self._web.address(shard), offset, size, crc, data)

    def check(self, index: ShardIndex) -> None:
        """See :meth:`Storage.check`."""
        pool = ThreadPoolExecutor(_ASKED_AT_ONCE)
        try:
            found = pool.map(lambda shard: self._web.size(shard.name, self._block), index.shards)
            sizes = ((shard.name, shard.num_bytes, size) for shard, size in zip(index.shards, found, strict=True))
            check_sizes(self._web.base, sizes)
        finally:
            pool.shutdown(cancel_futures=True)

    def close(self) -> None:
        """See :meth:`Storage.close`."""
        self._blocks.close()

    def _part(self, shard: str, number: int, start: int, stop: int) -> bytes:
        """Return what a block has of the bytes from ``start`` to ``stop`` of a shard."""
        num_bytes, stem = self._shards[shard]
        first = number * self._block
        size = min(self._block, num_bytes - first)
        start, stop = max(start - first, 0), min(stop - first, size)
        name = f"{stem}-{number:06d}"
        part = self._blocks.read(name, size, start, stop)
        if part is None:
            until = time.monotonic() + self._web.patience_s
            with self._blocks.turn(name, until):
                part = self._blocks.read(name, size, start, stop)  # another process may have fetched it meanwhile
                if part is None:
                    block = self._fetch(shard, first, size, until)
                    self._blocks.store(name, block)
                    part = block[start:stop]
        return part

    def _fetch(self, shard: str, first: int, size: int, until: float) -> bytes:
        address, num_bytes = self._web.address(shard), self._shards[shard][0]
        try:
            block, total = self._web.get(shard, first, size, until)
        except Missing as missing:
            raise Damage(f"{missing}; wanted for {size} bytes at offset {first}") from None
        if total != num_bytes:
            raise Damage(
                f"{address!r} has {total} bytes, but the index says {num_bytes} (wanted for {size} at offset {first}): "
                f"{REMEDY}"
            )
        return block

    def _stem(self, shard: ShardEntry) -> str:
        """Name the content of a shard's blocks: a shard that is changed has others."""
        content = f"{self._web.address(shard.name)}\n{shard.sha256}\n{self._block}"
        return hashlib.sha256(content.encode()).hexdigest()[:40]


def read_index(address: str, cache: Cache) -> ShardIndex:
    """Read the index in a folder at an address.

    Raises:
        ValueError: the address is not fetched from, has no index, or one that cannot be used.
        OSError: it cannot be reached.
    """
    web = _web(address, cache)
    try:
        head, samples = (web.whole(name, cache.block_bytes, _LARGEST_INDEX) for name in (HEAD, SAMPLES))
    except Missing as missing:
        raise ValueError(f"{address!r} has no index ({missing}); mixdist index makes one") from None
    index = ShardIndex.parse(address, head, samples)
    if index.base is not None and not index.base.startswith("https:") and address.startswith("https:"):
        raise ValueError(f"the index of {address} leads to {index.base!r}, expected an https address: make it anew")
    return index


def _web(base: str, cache: Cache) -> Web:
    settings = f"cache.retries ({cache.retries}) or cache.timeout_s ({cache.timeout_s:g})"
    return Web(base, cache.retries, cache.timeout_s, settings)
