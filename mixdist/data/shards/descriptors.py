"""A limited number of open files, read at any place by any thread of a process."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Any

_LARGE = 1 << 24


class Descriptors:
    """Files opened for reading; the one used least recently is closed for the next.

    Pickling leaves them behind: another process opens its own.

    Args:
        limit: how many are open at once.
    """

    def __init__(self, limit: int) -> None:
        assert limit >= 1, limit
        self._limit = limit
        self._open: OrderedDict[str, int] = OrderedDict()
        # Held over a read: a descriptor that another thread closed could by then be another file's.
        self._lock = Lock()

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Read up to ``size`` bytes at a place; fewer where the file ends.

        Raises:
            OSError: the file cannot be opened or read.
        """
        with self._lock:
            descriptor = self._open.get(path)
            if descriptor is None:
                descriptor = self._add(path)
            else:
                self._open.move_to_end(path)
            if size > _LARGE:  # memory follows the file and not its claims
                size = max(0, min(size, os.fstat(descriptor).st_size - offset))
            data = os.pread(descriptor, size, offset)
            while len(data) < size:  # a read of more than 2 GiB, or from a file system that gives less at once
                more = os.pread(descriptor, size - len(data), offset + len(data))
                if not more:
                    break
                data += more
        return data

    def holds(self, path: str) -> bool:
        """Whether a file is open."""
        return path in self._open

    def forget(self, path: str) -> None:
        """Close a file, so that it is opened anew."""
        with self._lock:
            descriptor = self._open.pop(path, None)
            if descriptor is not None:
                os.close(descriptor)

    def close(self) -> None:
        """Close all; reading opens them again."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def _add(self, path: str) -> int:
        while len(self._open) >= self._limit:
            os.close(self._open.popitem(last=False)[1])
        descriptor = os.open(Path(path), os.O_RDONLY | os.O_CLOEXEC)
        self._open[path] = descriptor
        return descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self._limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["limit"])  # type: ignore[misc]

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()
