"""Shards checked against their index: what is missing, cut or changed, by shard, offset and id."""

from __future__ import annotations

import hashlib
import zlib
from typing import NamedTuple

import numpy as np

from mixdist.data.images import Unreadable, open_image, plain
from mixdist.data.shards.index import ABSENT, ShardIndex
from mixdist.data.shards.tar import PIECE, Stream

IMAGES = ("jpeg", "jpg", "png", "webp")
MOST_TOLD = 100
"""Samples that are named in one shard; the others are counted."""


class Verdict(NamedTuple):
    """What was found in a shard: a line each, and how many of its samples are hurt."""

    lines: list[str]
    num_hurt: int


def missing(part: ShardIndex, why: str) -> Verdict:
    """Return the verdict on a shard that cannot be read."""
    (shard,) = part.shards
    line = f"shard {shard.name!r} {why}: it has {len(part)} samples, ids {part.id_N[0]} to {part.id_N[-1]}"
    return Verdict([line], len(part))


def examine(stream: Stream, part: ShardIndex, decode: bool) -> Verdict:
    """Read a shard once, front to back, and hold all of it against its index.

    Args:
        stream: gives the shard's bytes.
        part: the index of this shard alone.
        decode: whether every image is decoded, too.

    Raises:
        OSError: the stream fails.
    """
    (shard,) = part.shards
    passage = _Passage(stream)
    num_members = part.member_NM2.shape[1]
    offsets, sizes = part.member_NM2[..., 0].ravel(), part.member_NM2[..., 1].ravel()
    order = np.argsort(offsets, kind="stable")
    order = order[offsets[order] != ABSENT]
    hurt: dict[int, str] = {}  # place of the sample -> the first line about it
    for where in order.tolist():
        place, column = divmod(where, num_members)
        offset, size = int(offsets[where]), int(sizes[where])
        what = passage.hold(offset, size, int(part.crc_NM[place, column]))
        if what is None and decode and place not in hurt and part.extensions[column] in IMAGES:
            what = _undecodable(passage.data)
        if what is not None and place not in hurt:
            hurt[place] = (
                f"shard {shard.name!r}, byte {offset}: {part.extensions[column]} of sample {part.id_N[place]} {what}"
            )
    num_bytes, sha256 = passage.finish()
    lines = _shortened(list(hurt.values()), shard.name)
    if num_bytes != shard.num_bytes:
        lines.insert(0, f"shard {shard.name!r} has {num_bytes} bytes, expected {shard.num_bytes}")
    elif sha256 != shard.sha256 and len(hurt) == len(part) > 1:
        lines = [f"shard {shard.name!r} is another file than the index was made for: no sample is where it should be"]
    elif sha256 != shard.sha256 and not hurt:
        lines = [f"shard {shard.name!r} differs from its sha256, but in headers or padding only: no sample is hurt"]
    elif sha256 != shard.sha256:
        lines.insert(0, f"shard {shard.name!r} differs from its sha256")
    return Verdict(lines, len(hurt))


def _shortened(lines: list[str], shard: str) -> list[str]:
    if len(lines) <= MOST_TOLD:
        return lines
    return [*lines[:MOST_TOLD], f"shard {shard!r}: and {len(lines) - MOST_TOLD} more samples like these"]


def _undecodable(data: bytes) -> str | None:
    try:
        plain(open_image(data), 3)
    except Unreadable as error:
        return f"cannot be decoded: {error}"
    return None


class _Passage:
    """A way through a stream with a checksum over all of it; only the member that is held is in memory."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._sha256 = stream, hashlib.sha256()
        self._block, self._at, self._offset = b"", 0, 0
        self.data = b""

    def hold(self, offset: int, size: int, crc: int) -> str | None:
        """Go to a member and read it; say what is wrong with it."""
        if offset < self._offset:
            return f"overlaps the member before it, which ends at {self._offset}: the index is not this shard's"
        self._pass_over(offset - self._offset)
        self.data = self._take(size)
        if len(self.data) < size:
            return f"is cut off: {len(self.data)} of its {size} bytes are there"
        if zlib.crc32(self.data) != crc:
            return f"has other bytes than the index says (crc32 of its {size} bytes)"
        return None

    def finish(self) -> tuple[int, str]:
        """Read to the end: the number of bytes and their sha256."""
        while self._next(PIECE):
            pass
        return self._offset, self._sha256.hexdigest()

    def _pass_over(self, size: int) -> None:
        while size and (piece := self._next(size)):
            size -= len(piece)

    def _take(self, size: int) -> bytes:
        """Read so many bytes, or as many as there are; memory follows what comes, not what was claimed."""
        data = self._next(size) if size else b""
        if len(data) == size:
            return data
        pieces, left = [data], size - len(data)
        while left and (piece := self._next(left)):
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def _next(self, size: int) -> bytes:
        """At most ``size`` bytes; none at the end."""
        if self._at == len(self._block):
            self._block, self._at = self._stream.read(PIECE), 0
            self._sha256.update(self._block)
        piece = self._block[self._at : self._at + size]
        self._at += len(piece)
        self._offset += len(piece)
        return piece
