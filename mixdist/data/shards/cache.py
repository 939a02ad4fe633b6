"""A folder of limited size with blocks of files, for all processes of a machine."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from threading import get_ident

from mixdist.data.shards.storage import Descriptors

_HEAD = struct.Struct("<8sQI")  # magic, bytes, crc32
_MAGIC = b"mixblk1\n"
_PARTIAL = ".partial"
_MAX_OPEN = 8  # blocks that are removed take room on the disk while they are open
_NUM_TURNS = 256
_KEPT = 0.9  # of the limit, once it is passed: so that the folder is seldom listed
_DEAD_S = 300.0  # a file half written so long ago has no writer
_FRESH_S = 1.0  # a use that is not noted again


class Blocks:
    """Blocks by name; each is whole or absent, and any of them may go at any time.

    Args:
        folder: where they are.
        limit: bytes of them; it may be passed by a block for each process.
        wait_s: seconds to wait for another process's note of a block; after that a block is not kept.
    """

    def __init__(self, folder: Path, limit: int, wait_s: float) -> None:
        self.folder, self._limit, self._wait_s = folder, limit, wait_s
        self._files = Descriptors(_MAX_OPEN)
        self._sound: dict[str, int] = {}  # inode of the blocks whose checksum this process has seen

    def read(self, name: str, size: int, start: int, stop: int) -> bytes | None:
        """Read a part of a block; None where it is absent or damaged.

        Args:
            name: of the block.
            size: bytes of the whole block.
            start: first byte wanted.
            stop: byte after the last.
        """
        path = self._path(name)
        try:
            if not self._files.holds(path) and not self._is_sound(path, size):
                self.drop(name)
                return None
            data = self._files.read(path, _HEAD.size + start, stop - start)
        except OSError:  # removed by another process, or the disk cannot read it: it is fetched again
            self._files.forget(path)
            return None
        return data if len(data) == stop - start else None

    def drop(self, name: str) -> None:
        """Remove a block."""
        path = self._path(name)
        self._files.forget(path)
        self._sound.pop(path, None)
        with suppress(OSError):
            os.unlink(path)

    def store(self, name: str, data: bytes) -> None:
        """Keep a block, and remove those used least recently where the limit is passed.

        Raises:
            OSError: the folder cannot be written.
        """
        path, size = self._path(name), _HEAD.size + len(data)
        try:
            os.makedirs(self.folder / "blocks", exist_ok=True)
            if not self._reserve(size):
                return
            try:
                self._write(path, data)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self._shrink(self._total() // 2)  # the disk has less room than the limit
                self._write(path, data)
        except OSError as error:
            raise OSError(
                f"cache.folder ({str(self.folder)!r}) cannot keep a block of {size} bytes ({error.strerror}): make "
                f"room there, lower cache.limit_gb, or set cache.folder to another disk"
            ) from None

    def turn(self, name: str, until: float) -> AbstractContextManager[bool | None]:
        """Let one process of the machine at a time fetch a block; waits end at a time limit.

        Args:
            name: of the block.
            until: time.monotonic() after which it is fetched without a turn.
        """
        return _locked(self.folder / "turns" / f"{zlib.crc32(name.encode()) % _NUM_TURNS:03d}", until)

    def close(self) -> None:
        """Close what is open; reading opens it again."""
        self._files.close()

    def _path(self, name: str) -> str:
        return f"{self.folder}/blocks/{name}.block"

    def _is_sound(self, path: str, size: int) -> bool:
        """Check a block against its checksum, once in a process, and note that it is used."""
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if time.time() - status.st_mtime > _FRESH_S:
                with suppress(OSError):  # another user's
                    os.utime(file.fileno())
            if status.st_size != _HEAD.size + size:
                return False
            if self._sound.get(path) != status.st_ino:
                magic, num_bytes, crc = _HEAD.unpack(file.read(_HEAD.size))
                if magic != _MAGIC or num_bytes != size or zlib.crc32(file.read()) != crc:
                    return False
                self._sound[path] = status.st_ino
        return True

    def _write(self, path: str, data: bytes) -> None:
        """Write a block aside and rename it; unsynced, since its checksum finds what a crash leaves."""
        aside = f"{path}.{os.getpid()}-{get_ident()}{_PARTIAL}"
        try:
            with open(aside, "wb") as file:
                file.write(_HEAD.pack(_MAGIC, len(data), zlib.crc32(data)))
                file.write(data)
                inode = os.fstat(file.fileno()).st_ino
            os.replace(aside, path)
        except OSError:
            with suppress(OSError):
                os.unlink(aside)
            raise
        self._files.forget(path)
        self._sound[path] = inode

    def _reserve(self, size: int) -> bool:
        """Note a block before it is written, so that a writer that dies is counted; make room where there is none."""
        note = self.folder / "used"
        with _locked(note, time.monotonic() + self._wait_s) as locked:
            if locked is False:
                return False
            noted = note.read_bytes().strip()
            used = int(noted) if locked and noted.isdigit() else self._total()
            if used + size > self._limit:
                used = self._shrink(int(_KEPT * self._limit) - size)
            note.write_bytes(b"%d\n" % (used + size))
        return True

    def _total(self) -> int:
        return sum(size for _, size, _ in self._listed())

    def _shrink(self, goal: int) -> int:
        """Remove the blocks used least recently until the rest has at most ``goal`` bytes; return how many are left."""
        listed = sorted(self._listed())
        left = sum(size for _, size, _ in listed)
        for _, size, path in listed:
            if left > goal and not path.endswith(_PARTIAL):
                with suppress(FileNotFoundError):
                    os.unlink(path)
                left -= size
        return left

    def _listed(self) -> Iterator[tuple[float, int, str]]:
        """Yield time of use, bytes and path of every file; those whose writers died are removed."""
        now = time.time()
        with os.scandir(self.folder / "blocks") as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if not entry.name.endswith(_PARTIAL):
                        yield status.st_mtime, status.st_size, entry.path
                    elif now - status.st_mtime > _DEAD_S:
                        os.unlink(entry.path)
                    else:
                        yield now, status.st_size, entry.path


@contextmanager
def _locked(path: Path, until: float) -> Iterator[bool | None]:
    """Hold a file's lock; yields False where the time is over, None where it has none: whoever writes there fails."""
    try:
        os.makedirs(path.parent, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        yield None
        return
    try:
        yield _lock(descriptor, until)
    finally:
        with suppress(OSError):  # not by closing alone: a process forked meanwhile has the descriptor too
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _lock(descriptor: int, until: float) -> bool | None:
    pause = 0.001
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() + pause > until:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        except OSError:  # a file system without locks
            return None
        else:
            return True
