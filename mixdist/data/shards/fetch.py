"""Files in a folder at an address: ranges, whole files and streams, with further tries where they may help."""

from __future__ import annotations

import logging
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from io import BytesIO
from itertools import islice
from types import ModuleType
from typing import TypeVar
from urllib.parse import urlsplit

from mixdist.data.shards.address import OBJECT_STORES, Info, Refused, Transient, check_address

T = TypeVar("T")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
_WARN_AFTER = 3  # failed tries
_READ_AHEAD = 2  # blocks of a stream
_log = logging.getLogger(__name__)


class RemoteFolder:
    """Files in a folder at an address.

    Args:
        base: address of the folder.
        block: bytes that are asked for at once.
        retries: tries after the first.
        timeout_s: seconds in which a server must answer, and in which what was asked for must have come.
        settings: names what a user can raise where all tries failed; empty where nothing can be set.

    Raises:
        ValueError: the address is not read from.

    The other methods raise:
        Missing: there is no such file.
        Refused: the server will not give it.
        OSError: all tries failed.
    """

    def __init__(self, base: str, block: int, retries: int, timeout_s: float, settings: str = "") -> None:
        check_address(base)
        self.base, self.block, self.retries, self.timeout_s = base.rstrip("/") + "/", block, retries, timeout_s
        self._settings = settings

    def address(self, name: str) -> str:
        """Return a file's address."""
        return self.base + name

    @property
    def patience_s(self) -> float:
        """Seconds after which no other try begins; the last may then take twice ``timeout_s``."""
        pauses = (min(FIRST_PAUSE_S * 2**i, LONGEST_PAUSE_S) for i in range(self.retries))
        return sum(pauses) + (self.retries + 1) * self.timeout_s

    def info(self, name: str) -> Info:
        """Return a file's size and version."""
        return self._try(name, None, lambda address: _transport(address).info(address, self.block, self.timeout_s))

    def read(self, name: str, offset: int, size: int, until: float | None = None) -> tuple[bytes, Info | None]:
        """Return a range of a file, and the whole file's size and version where the server sends them along.

        Args:
            name: of the file.
            offset: where the range begins.
            size: bytes; fewer come only where the file ends.
            until: time.monotonic() after which no other try begins; None gives ``patience_s``.
        """
        return self._try(name, until, lambda address: _transport(address).read(address, offset, size, self.timeout_s))

    def whole(self, name: str, limit: int) -> bytes:
        """Return a whole file of at most ``limit`` bytes."""
        num_bytes = self.info(name).num_bytes
        if num_bytes > limit:
            raise Refused(
                f"{self.address(name)} has {num_bytes} bytes, expected at most {limit}: check what lies there"
            )
        return b"".join(self.read(name, *place)[0] for place in self._places(num_bytes))

    @contextmanager
    def stream(self, name: str) -> Iterator[RemoteStream]:
        """Open a file for reading from front to back; a read raises OSError once the file was changed, too."""
        pool = ThreadPoolExecutor(_READ_AHEAD)
        try:
            yield RemoteStream(self._blocks(name, pool))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _blocks(self, name: str, pool: ThreadPoolExecutor) -> Iterator[bytes]:
        found = self.info(name)
        rest = (pool.submit(self.read, name, *place) for place in self._places(found.num_bytes))
        ahead, left = deque(islice(rest, _READ_AHEAD)), found.num_bytes
        while ahead:
            block, now = ahead.popleft().result()
            ahead.extend(islice(rest, 1))
            cut = len(block) < min(self.block, left)
            left -= len(block)
            if cut or (now or found) != found or (not ahead and self.info(name) != found):
                raise OSError(f"{self.address(name)} was changed while it was read: wait until it is complete")
            yield block

    def _places(self, num_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield offset and size of each block of a file."""
        return ((offset, min(self.block, num_bytes - offset)) for offset in range(0, num_bytes, self.block))

    def _try(self, name: str, until: float | None, attempt: Callable[[str], T]) -> T:
        """Try, and try again after growing pauses, while the failure may pass."""
        address, start = self.address(name), time.monotonic()
        until = start + self.patience_s if until is None else until
        for tries in range(1, self.retries + 2):
            try:
                return attempt(address)
            except Transient as failure:
                reason, pause = str(failure), max(failure.pause_s, _pause(address, tries))
            if tries > self.retries or time.monotonic() + pause > until:
                break
            if tries == _WARN_AFTER:
                _log.warning("mixdist: %s fails (%s): trying again for up to %.0f s", address, reason, until - start)
            time.sleep(pause)
        spent = f"{tries} tries and {time.monotonic() - start:.1f} s"
        remedy = "check that the server answers and start again"
        remedy += f", or raise {self._settings}" if self._settings else ""
        raise OSError(f"{address} did not come in {spent} ({reason}): {remedy}")


class RemoteStream:
    """A file of which the blocks come one after another."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._block = blocks, BytesIO()

    def read(self, size: int, /) -> bytes:
        """Return at most ``size`` bytes; none at the end."""
        data = self._block.read(size)
        if not data:
            self._block = BytesIO(next(self._blocks, b""))
            data = self._block.read(size)
        return data


def _transport(address: str) -> ModuleType:
    kind = "objects" if urlsplit(address).scheme in OBJECT_STORES else "http"
    return import_module(f"mixdist.data.shards.{kind}")  # here, since each costs 60 ms that local shards need not wait


def _pause(address: str, tries: int) -> float:
    """Return seconds to wait: they double, and processes that failed together do not come back together."""
    spread = zlib.crc32(f"{address} {os.getpid()} {tries}".encode()) / 2**32
    return min(FIRST_PAUSE_S * 2 ** (tries - 1), LONGEST_PAUSE_S) * (0.5 + 0.5 * spread)
