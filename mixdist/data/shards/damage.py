"""Bytes of shards that are not what the index says."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

REMEDY = "run mixdist verify on the folder, and fetch or make that shard again"


class Damage(ValueError):
    """Bytes that are not what the index says; the message is one line with the shard and the offset."""


def hold(where: str, offset: int, size: int, crc: int, data: bytes) -> bytes:
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


def hold_sizes(folder: str, sizes: Iterable[tuple[str, int, int | None]]) -> None:
    """Check the sizes of shards against the index.

    Args:
        folder: path or address, for the message.
        sizes: name, bytes by the index, and bytes found or None where there is no such file, of each shard.

    Raises:
        ValueError: one is missing or of another size.
    """
    for name, expected, found in sizes:
        if found != expected:
            has = "is missing" if found is None else f"has {found} bytes"
            raise ValueError(
                f"shard {name!r} {has} in {folder!r}, but the index says {expected} bytes: put the file that the index "
                f"was made for there; mixdist verify tells what else differs"
            )
