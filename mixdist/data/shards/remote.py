"""Shards at an https address, read block-wise through a folder of limited size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mixdist.data.shards.index import ShardEntry, ShardIndex


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


class RemoteStorage:
    """Shards at an address.

    Args:
        base: https address of their folder.
        cache: where and how they are kept.
        shards: of the index.
    """

    def __init__(self, base: str, cache: Cache, shards: Sequence[ShardEntry]) -> None:
        raise NotImplementedError

    def read(self, shard: str, offset: int, size: int, crc: int) -> bytes:
        """See :meth:`Storage.read`."""
        raise NotImplementedError

    def check(self, index: ShardIndex) -> None:
        """See :meth:`Storage.check`."""
        raise NotImplementedError

    def close(self) -> None:
        """See :meth:`Storage.close`."""
        raise NotImplementedError


def read_index(address: str, cache: Cache) -> ShardIndex:
    """Read the index at an address."""
    raise NotImplementedError
