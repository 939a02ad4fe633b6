"""Ranges of files in object stores, by fsspec, with the credentials that each store's own tools use."""

from __future__ import annotations

import asyncio
import re
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.asyn import get_loop, sync

from mixdist.data.shards.address import Info, Missing, Refused, Transient

_VERSIONS = ("ETag", "etag", "generation", "blob_id", "xet_hash", "LastModified", "last_modified", "created")
_NOT_ALLOWED = re.compile("Credential|Auth|Forbidden|Gated|Token")


def info(address: str, block: int, timeout_s: float) -> Info:
    """Return a file's size and version; see :func:`mixdist.data.shards.http.info`."""
    found = _call("info", address, timeout_s, refresh=True)
    if found["type"] != "file":
        raise Missing(f"{address} is not there: it is a {found['type']}")
    return Info(found["size"], " ".join(str(found[key]) for key in _VERSIONS if key in found))


def read(address: str, offset: int, size: int, timeout_s: float) -> tuple[bytes, Info | None]:
    """Return a range of a file; see :func:`mixdist.data.shards.http.read`, though nothing is said of the file here."""
    more = {"cache_type": "none"} if urlsplit(address).scheme == "hf" else {}  # it would read ahead
    try:
        data: bytes = _call("cat_file", address, timeout_s, start=offset, end=offset + size, **more)
    except Transient:  # or the range begins behind the end, for which each store has another error
        if offset and info(address, size, timeout_s).num_bytes <= offset:
            return b"", None
        raise
    if len(data) > size:
        raise Transient(f"{len(data)} bytes came instead of {size}")
    return data, None


def _call(method: str, address: str, timeout_s: float, **options: Any) -> Any:
    """Call a method of the address's file system, in a bounded time."""
    scheme = urlsplit(address).scheme
    try:
        system = fsspec.filesystem(scheme)  # one for each process: fsspec makes it anew after a fork
        function = (
            getattr(system, f"_{method}") if system.async_impl else partial(asyncio.to_thread, getattr(system, method))
        )
        return sync(get_loop(), function, address, timeout=timeout_s, **options)
    except ImportError as error:
        raise Refused(f"{address} needs {error.name or scheme!r}: pip install 'mixdist[{scheme}]'") from None
    except FileNotFoundError:
        raise Missing(f"{address} is not there: check the address and that the credentials may see it") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": ")
        if isinstance(error, (PermissionError, ValueError, TypeError)) or _NOT_ALLOWED.search(type(error).__name__):
            raise Refused(f"{address} is not given ({reason}): check the credentials of this machine") from None
        raise Transient(reason) from None
