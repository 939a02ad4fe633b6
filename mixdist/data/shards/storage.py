"""Where the bytes of shards come from: a folder here, or an address."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Protocol

from mixdist.data.shards.damage import REMEDY, Damage, hold, hold_sizes
from mixdist.data.shards.descriptors import Descriptors
from mixdist.data.shards.index import ShardIndex
from mixdist.data.shards.remote import Cache, RemoteStorage, read_index

__all__ = ["Damage", "LocalStorage", "Storage", "open_shards"]

MAX_OPEN = 64
"""Shards that a process keeps open: far under the usual limit of 1024 descriptors, with room for others' sockets."""


class Storage(Protocol):
    """Gives the bytes of members; picklable, and each process opens its own files and connections."""

    def read(self, shard: str, offset: int, size: int, crc: int) -> bytes:
        """Read a member and hold it against its checksum.

        Args:
            shard: name of the shard.
            offset: where the member begins in it.
            size: bytes.
            crc: zlib.crc32 of them.

        Raises:
            Damage: they are not what the index says: too few, others, or no such shard.
            OSError: they cannot be had.
        """

    def check(self, index: ShardIndex) -> None:
        """Check the sizes of the shards against the index.

        Raises:
            ValueError: a shard is missing or of another size.
            OSError: they cannot be asked for.
        """

    def close(self) -> None:
        """Close what is open; reading opens it again."""


class LocalStorage:
    """Shards in a folder, read at any place.

    Args:
        folder: with the shards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stem = os.path.join(folder, "")
        self._files = Descriptors(MAX_OPEN)

    def read(self, shard: str, offset: int, size: int, crc: int) -> bytes:
        """See :meth:`Storage.read`."""
        path = self._stem + shard
        try:
            data = self._files.read(path, offset, size)
        except FileNotFoundError:
            raise Damage(f"{path!r} is missing, wanted for {size} bytes at offset {offset}: {REMEDY}") from None
        return hold(path, offset, size, crc, data)

    def check(self, index: ShardIndex) -> None:
        """See :meth:`Storage.check`."""
        sizes = ((shard.name, shard.num_bytes, _size(self.folder / shard.name)) for shard in index.shards)
        hold_sizes(str(self.folder), sizes)

    def close(self) -> None:
        """See :meth:`Storage.close`."""
        self._files.close()


def open_shards(root: str, cache: Cache) -> tuple[ShardIndex, Storage]:
    """Open a set of shards by its index.

    Args:
        root: a folder with an index, the shards beside it or at the address that the index names; or the https address
            of such a folder.
        cache: where and how shards from an address are kept.

    Raises:
        ValueError: root is neither, or has no index that can be used.
        OSError: the address cannot be reached.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir() and re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", root):
        index = read_index(root, cache)
        return index, RemoteStorage(index.base or root, cache, index.shards)
    index = ShardIndex.read(folder)
    return index, LocalStorage(folder) if index.base is None else RemoteStorage(index.base, cache, index.shards)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
