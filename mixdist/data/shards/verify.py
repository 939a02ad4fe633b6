"""Shards checked against their index: what is missing, cut or changed, by shard, offset and id."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

from mixdist.data.images import Unreadable, open_image, plain
from mixdist.data.shards.index import ABSENT, ShardIndex
from mixdist.data.shards.tar import PIECE, HashedStream, Stream

IMAGES = ("jpeg", "jpg", "png", "webp")
MOST_TOLD = 100
"""Samples that are named in one shard; the others are counted."""


class Verdict(NamedTuple):
    """What was found in a shard: a line each, and how many of its samples are damaged."""

    lines: list[str]
    num_hurt: int


def missing(part: ShardIndex, why: str) -> Verdict:
    """Return the verdict on a shard that cannot be read."""
    (shard,) = part.shards
    line = f"shard {shard.name!r} {why}: it has {len(part)} samples, ids {part.id_N[0]} to {part.id_N[-1]}"
    return Verdict([line], len(part))


def examine(stream: Stream, part: ShardIndex, decode: bool) -> Verdict:
    """Read a shard once, front to back, and check all of it against its index.

    Args:
        stream: gives the shard's bytes.
        part: the index of this shard alone.
        decode: whether every image is decoded, too.

    Raises:
        OSError: the stream fails.
    """
    (shard,) = part.shards
    source = HashedStream(stream)
    num_members = part.member_NM2.shape[1]
    offsets, sizes = part.member_NM2[..., 0].ravel(), part.member_NM2[..., 1].ravel()
    order = np.argsort(offsets, kind="stable")
    order = order[offsets[order] != ABSENT]
    hurt: dict[int, str] = {}  # place of the sample -> the first line about it
    for where in order.tolist():
        place, column = divmod(where, num_members)
        offset, size = int(offsets[where]), int(sizes[where])
        data, what = _member(source, offset, size, int(part.crc_NM[place, column]))
        if what is None and decode and place not in hurt and part.extensions[column] in IMAGES:
            try:
                plain(open_image(data), 3)
            except Unreadable as error:
                what = f"cannot be decoded: {error}"
        if what is not None and place not in hurt:
            hurt[place] = (
                f"shard {shard.name!r}, byte {offset}: {part.extensions[column]} of sample {part.id_N[place]} {what}"
            )
    while source.take(PIECE):
        pass
    lines = list(hurt.values())[:MOST_TOLD]
    if len(hurt) > MOST_TOLD:
        lines.append(f"shard {shard.name!r}: and {len(hurt) - MOST_TOLD} more samples like these")
    if source.offset != shard.num_bytes:
        lines.insert(0, f"shard {shard.name!r} has {source.offset} bytes, expected {shard.num_bytes}")
    elif source.sha256 != shard.sha256 and len(hurt) == len(part) > 1:
        lines = [f"shard {shard.name!r} is another file than the index was made for: no sample is where it should be"]
    elif source.sha256 != shard.sha256:
        but = "" if hurt else ", but in headers or padding only: no sample is damaged"
        lines.insert(0, f"shard {shard.name!r} differs from its sha256{but}")
    return Verdict(lines, len(hurt))


def _member(source: HashedStream, offset: int, size: int, crc: int) -> tuple[bytes, str | None]:
    """Return the bytes of the member at a place, and what is wrong with them."""
    gap = offset - source.offset
    if gap < 0:
        return b"", f"overlaps the member before it, which ends at {source.offset}: the index is not this shard's"
    while gap > PIECE and source.take(PIECE):
        gap -= PIECE
    data = source.take(gap + size)[gap:]
    if len(data) < size:
        return data, f"is cut off: {len(data)} of its {size} bytes are there"
    if zlib.crc32(data) != crc:
        return data, f"has other bytes than the index says (crc32 of its {size} bytes)"
    return data, None
