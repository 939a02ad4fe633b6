"""A strict reader of the tar format, front to back: what is not plainly a whole archive of plain files is refused.

Python's own tarfile takes a cut archive for a shorter one, and stops without a word at a damaged header.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from typing import NamedTuple, NoReturn, Protocol

BLOCK = 512
PIECE = 1 << 20
AGAIN = "fetch or make the shard again"
REMAKE = "make the shard again with plain files only"
_ZEROS = bytes(BLOCK)
_BASE = 65521
"""zlib.adler32 sums bytes modulo this prime, ten times faster than Python does."""
_POSIX, _GNU = b"ustar\x0000", b"ustar  \x00"
_FILE, _FOLDER = (0x30, 0), 0x35
_LONG_NAME, _PAX, _PAX_GLOBAL = b"Lxg"
_DEVICES = "a character device", "a block device"
_KINDS = dict(zip(b"1234", ("a hard link", "a symbolic link", *_DEVICES), strict=True))
_KINDS |= dict(zip(b"6KS", ("a fifo", "a long link", "a sparse file"), strict=True))
_OCTAL = re.compile(rb" *([0-7]+)[ \0]*")
_RECORD = re.compile(rb"([1-9][0-9]{0,8}) ([^=\n]+)=")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_NO_PARTS = frozenset(("", ".", ".."))
_MAX_EXTENSION = 1 << 16


class Stream(Protocol):
    """What can be read front to back."""

    def read(self, size: int, /) -> bytes: ...


class HashedStream:
    """A stream that is read once, front to back, with a checksum over all of it."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._sha256 = stream, hashlib.sha256()
        self._block, self._at, self._start = b"", 0, 0

    @property
    def offset(self) -> int:
        """Return the number of bytes taken so far; at the end, all of them."""
        return self._start + self._at

    @property
    def sha256(self) -> str:
        """Return the sha256 of all that came from the stream so far."""
        return self._sha256.hexdigest()

    def take(self, length: int) -> bytes:
        """Read so many bytes, or as many as there are: memory grows with what comes, not with what is asked for."""
        if len(self._block) - self._at < length:
            self._fill(length)
        data = self._block[self._at : self._at + length]
        self._at += len(data)
        return data

    def _fill(self, length: int) -> None:
        """Buffer ``length`` bytes from here on, or as many as there are."""
        pieces = [self._block[self._at :]]
        self._start += self._at
        there = len(pieces[0])
        while there < length and (piece := self._stream.read(PIECE)):
            self._sha256.update(piece)
            pieces.append(piece)
            there += len(piece)
        self._block, self._at = b"".join(pieces), 0


class Member(NamedTuple):
    """A plain file: its name, where its header and its bytes begin, and how many there are."""

    name: str
    header: int
    offset: int
    size: int


class Tar:
    """Yields members one after the other: call :meth:`member`, then for its :meth:`payload`, until there is none.

    Args:
        stream: the archive.
        shard: its name, for messages.
    """

    def __init__(self, stream: Stream, shard: str) -> None:
        self.shard, self.stream = shard, HashedStream(stream)
        self._take = self.stream.take

    def refuse(self, offset: int, what: str, remedy: str) -> NoReturn:
        """Raise the ValueError that names the shard and the place."""
        raise ValueError(f"shard {self.shard!r}, byte {offset}: {what}: {remedy}")

    def member(self) -> Member | None:
        """Read the next header; None at the end, after which only zeros may follow.

        Raises:
            ValueError: damaged, cut, no plain file or folder, or an unsafe name.
        """
        longer: str | None = None
        claimed: int | None = None  # bytes, by a pax header
        first = place = self.stream.offset
        while (head := self._header(place)) is not None:
            kind, size = head[156], self._size(head, place)
            if kind in (_LONG_NAME, _PAX, _PAX_GLOBAL):
                found, bytes_found = self._extension(kind, size, place)
                if None not in (found, longer) or None not in (bytes_found, claimed):
                    self.refuse(place, "a member has two long names or sizes, expected one", REMAKE)
                longer = longer if found is None else found
                claimed = claimed if bytes_found is None else bytes_found
                place = self.stream.offset
                continue
            name = self._name(head, place) if longer is None else longer
            if claimed is not None and claimed != size:
                what = f"{name!r} has {size} bytes by its header and {claimed} by its pax header"
                self.refuse(place, what, REMAKE)
            if kind in _FILE:
                return Member(self._checked(name.removeprefix("./"), place), first, place + BLOCK, size)
            self._skip_folder(kind, name, size, place)
            longer, claimed = None, None
            first = place = self.stream.offset
        if first != place:
            self.refuse(place, "the archive ends after an extended header, expected its file", AGAIN)
        return None

    def payload(self, member: Member) -> tuple[int, bytes]:
        """Read a member's bytes: their zlib.crc32, and the last piece of at most 1 MiB (all, of a small member).

        Raises:
            ValueError: the archive ends before them.
        """
        padding = -member.size % BLOCK
        crc, data, left = 0, b"", member.size + padding
        while left:
            length = min(left, PIECE)
            data = self._take(length)
            if len(data) < length:
                self._cut(f"inside {member.name!r}, whose {member.size} bytes begin at {member.offset}")
            left -= length
            if padding and not left:
                data = data[:-padding]
            crc = zlib.crc32(data, crc)
        return crc, data

    def _cut(self, where: str) -> NoReturn:
        self.refuse(self.stream.offset, f"the archive ends {where}", AGAIN)

    def _header(self, place: int) -> bytes | None:
        """Return the next 512 bytes, with checksum and magic number checked; None at the end of the archive."""
        head = self._take(BLOCK)
        if len(head) < BLOCK:
            if not head:
                self.refuse(place, "the archive ends without its end-of-archive marker (two blocks of zeros)", AGAIN)
            self.refuse(place, f"{len(head)} bytes are left, expected a header of {BLOCK}", AGAIN)
        if not head[0] and head == _ZEROS:
            self._end(place)
            return None
        magic = head[257:265]
        if magic != _POSIX and (magic != _GNU or head[345:500].strip(b"\0")):
            packed = " (the file is packed: unpack it first)" if head[:2] == b"\x1f\x8b" and not place else ""
            self.refuse(place, f"no header of a POSIX or GNU tar{packed}", AGAIN)
        stated = head[148:156]
        match = _OCTAL.fullmatch(stated)
        # The low half of each is 1 + the sum of the bytes; the checksum's own eight count as spaces.
        found = (zlib.adler32(head) & 0xFFFF) - (zlib.adler32(stated) & 0xFFFF) + 8 * 0x20
        if match is None or (found - int(match[1], 8)) % _BASE:
            self.refuse(place, "the header differs from its checksum", AGAIN)
        return head

    def _end(self, place: int) -> None:
        if self._take(BLOCK) != _ZEROS:
            self.refuse(place, "one block of zeros, expected the end-of-archive marker of two", AGAIN)
        while rest := self._take(PIECE):
            if any(rest):
                self.refuse(place, "bytes follow the end-of-archive marker, expected zeros only", AGAIN)
        if self.stream.offset % BLOCK:
            self.refuse(self.stream.offset, f"the archive's size is no multiple of {BLOCK}", AGAIN)

    def _size(self, head: bytes, place: int) -> int:
        field = head[124:136]
        match = _OCTAL.fullmatch(field)
        if match is not None:
            return int(match[1], 8)
        if field[0] != 0x80:
            self.refuse(place, f"the size {field!r} is no number from 0", AGAIN)
        return int.from_bytes(field[1:], "big")

    def _name(self, head: bytes, place: int) -> str:
        name = head[: head.find(b"\0", 0, 100) if not head[99] else 100]
        if head[345]:
            name = head[345:500].split(b"\0", 1)[0] + b"/" + name
        return self._decoded(name, place)

    def _decoded(self, name: bytes, place: int) -> str:
        try:
            return name.decode()
        except UnicodeDecodeError:
            self.refuse(place, f"the name {name!r} is not UTF-8", "rename it and make the shard again")

    def _checked(self, name: str, place: int) -> str:
        """Return a name.

        Raises:
            ValueError: it leaves its folder, or has characters that no file's name needs.
        """
        strange = not name.isprintable() or "\\" in name or (":" in name and _SCHEME.match(name))
        if strange or not _NO_PARTS.isdisjoint(name.split("/")):
            what = f"the name {name!r} is unsafe, expected a relative one without '..', empty parts"
            self.refuse(place, f"{what}, '\\', ':' or controls", "rename it and make the shard again")
        return name

    def _skip_folder(self, kind: int, name: str, size: int, place: int) -> None:
        """Skip a folder; refuse everything else."""
        if kind != _FOLDER:
            what = _KINDS.get(kind, f"a member of type {bytes([kind])!r}")
            self.refuse(place, f"{name!r} is {what}, expected a plain file", REMAKE)
        folder = name.removesuffix("/").removeprefix("./")
        if folder != ".":
            self._checked(folder or name, place)
        if size:
            self.refuse(place, f"the folder {name!r} has {size} bytes, expected none", REMAKE)

    def _extension(self, kind: int, size: int, place: int) -> tuple[str | None, int | None]:
        """Return the name and the size in the bytes of a long name or a pax header, where it gives them."""
        if size > _MAX_EXTENSION:
            self.refuse(place, f"an extended header of {size} bytes, expected at most {_MAX_EXTENSION}", REMAKE)
        data = self._take(size)
        if len(data) < size or len(self._take(-size % BLOCK)) < -size % BLOCK:
            self._cut("inside an extended header")
        if kind == _LONG_NAME:
            return self._decoded(data.split(b"\0", 1)[0], place), None
        records = self._records(data, place)
        utf8 = records.get("hdrcharset", b"UTF-8") in (b"UTF-8", b"ISO-IR 10646 2000 UTF-8")
        never = {"linkpath", *(() if utf8 else ("hdrcharset",)), *(("path", "size") if kind == _PAX_GLOBAL else ())}
        for key in records:
            if key in never or key.startswith("GNU.sparse"):
                self.refuse(place, f"a pax record {key!r}, expected those of plain files", REMAKE)
        name, claimed = records.get("path"), records.get("size")
        if claimed is not None and not re.fullmatch(rb"[0-9]{1,18}", claimed):
            self.refuse(place, f"the pax size {claimed!r} is no number from 0", AGAIN)
        return None if name is None else self._decoded(name, place), None if claimed is None else int(claimed)

    def _records(self, data: bytes, place: int) -> dict[str, bytes]:
        """Return pax records, "LENGTH KEY=VALUE" with a line end each, no key twice."""
        records: dict[str, bytes] = {}
        at = 0
        while at < len(data):
            match = _RECORD.match(data, at)
            end = at + int(match[1]) if match else 0
            if match is None or end > len(data) or match.end() >= end or data[end - 1] != 0x0A:
                self.refuse(place, f"a pax header is damaged at byte {at} of its {len(data)}", AGAIN)
            key = self._decoded(match[2], place)
            if key in records:
                self.refuse(place, f"a pax header has {key!r} twice", REMAKE)
            records[key] = data[match.end() : end - 1]
            at = end
        return records
