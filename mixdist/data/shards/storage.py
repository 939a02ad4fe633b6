"""Where the bytes of shards come from: a folder here, or an address."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from mixdist.data.shards.index import ShardIndex

MAX_OPEN = 64
"""Shards that a process keeps open: far under the usual limit of 1024 descriptors, with room for others' sockets."""
REMEDY = "run mixdist verify on the folder, and fetch or make that shard again"
_LARGE = 1 << 24


class Damage(ValueError):
    """Bytes that are not what the index says; the message is one line with the shard and the offset."""


class Storage(Protocol):
    """Gives the bytes of members; picklable, and each process opens its own files and connections."""

    def read(self, shard: str, offset: int, size: int, crc: int) -> bytes:
        """Read a member and check it against its checksum.

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
        return check_bytes(path, offset, size, crc, data)

    def check(self, index: ShardIndex) -> None:
        """See :meth:`Storage.check`."""
        paths = (self.folder / shard.name for shard in index.shards)
        check_sizes(str(self.folder), index, (path.stat().st_size if path.exists() else None for path in paths))

    def close(self) -> None:
        """See :meth:`Storage.close`."""
        self._files.close()


class Descriptors:
    """Files opened for reading; the one used least recently is closed for the next.

    Pickling leaves them behind: another process opens its own.

    Args:
        limit: how many are open at once.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Read up to ``size`` bytes at a place; fewer where the file ends.

        Raises:
            OSError: the file cannot be opened or read.
        """
        file = self._open.pop(path, None)
        while file is None and len(self._open) >= self._limit:
            self._open.popitem(last=False)
        self._open[path] = file = file or _Descriptor(path)
        if size > _LARGE:  # memory follows the file and not its claims
            size = max(0, min(size, os.fstat(file.number).st_size - offset))
        data = os.pread(file.number, size, offset)
        while len(data) < size:  # a read of more than 2 GiB, or from a file system that gives less at once
            more = os.pread(file.number, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def holds(self, path: str) -> bool:
        """Return whether a file is open."""
        return path in self._open

    def forget(self, path: str) -> None:
        """Close a file, so that it is opened anew."""
        self._open.pop(path, None)

    def close(self) -> None:
        """Close all; reading opens them again."""
        self._open.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return Descriptors, (self._limit,)


class _Descriptor:
    """An open file; it is closed once no thread reads from it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def check_bytes(where: str, offset: int, size: int, crc: int, data: bytes) -> bytes:
    """Check a member's bytes against the index.

    Args:
        where: the shard's path or address, for the message.
        offset: where the member begins in the shard.
        size: bytes that the index gives it.
        crc: its crc32.
        data: what was read.

    Raises:
        Damage: there are too few of them, or their checksum is another.
    """
    if len(data) != size:
        raise Damage(f"{where!r} ends {size - len(data)} bytes too early for the {size} at offset {offset}: {REMEDY}")
    if zlib.crc32(data) != crc:
        raise Damage(f"{where!r} has other bytes than its index says in the {size} at offset {offset}: {REMEDY}")
    return data


def check_sizes(folder: str, index: ShardIndex, sizes: Iterable[int | None]) -> None:
    """Check the sizes of shards against the index.

    Args:
        folder: path or address, for the message.
        index: of the shards.
        sizes: bytes found of each shard, or None where there is no such file.

    Raises:
        ValueError: one is missing or of another size.
    """
    for shard, found in zip(index.shards, sizes, strict=True):
        if found != shard.num_bytes:
            has = "is missing" if found is None else f"has {found} bytes"
            raise ValueError(
                f"shard {shard.name!r} {has} in {folder!r}, but the index says {shard.num_bytes} bytes: put the file "
                f"that the index was made for there; mixdist verify names what else differs"
            )
