"""Ranges of files over http and https; each process keeps its connections open."""

from __future__ import annotations

import os
import re
import socket
import ssl
import time
from contextlib import suppress
from functools import cache
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.exceptions import HTTPError, LocationValueError

from mixdist.data.shards.address import Info, Missing, Refused, Transient, check_address, without_secrets

_PIECE = 1 << 18
_CONNECTIONS = 16  # to one host that are kept: more than threads that read at once
_MOST_REDIRECTS = 5
_PLAIN: dict[str, Any] = {"retries": False, "redirect": False, "preload_content": False, "decode_content": False}
_TRANSIENT = (408, 425, 429)  # and 500 and above
_answered: set[str | None] = set()  # hosts; where one of these has no address, it may have one again soon


def info(address: str, block: int, timeout_s: float) -> Info:
    """Return a file's size and version.

    Args:
        address: of the file.
        block: bytes that are read at once later: a file up to this size may come whole.
        timeout_s: seconds in which the server must answer.

    Raises:
        Missing: there is no such file.
        Refused: the server will not give it.
        Transient: another try may succeed.
    """
    return _request(address, 0, 1, block, timeout_s)[1]


def read(address: str, offset: int, size: int, timeout_s: float) -> tuple[bytes, Info | None]:
    """Return a range of a file, fewer bytes than asked for only where the file ends; and what the answer says of it.

    Raises:
        Missing: there is no such file.
        Refused: the server will not give it.
        Transient: another try may succeed.
    """
    return _request(address, offset, size, size, timeout_s)


def _request(address: str, offset: int, size: int, most: int, timeout_s: float) -> tuple[bytes, Info]:
    end = time.monotonic() + timeout_s
    response = _follow(address, f"bytes={offset}-{offset + size - 1}", timeout_s)
    try:
        num_bytes, coming = _judge(response, address, offset, size, most)
        version = response.headers.get("ETag") or response.headers.get("Last-Modified", "")
        return _body(response, coming, end), Info(num_bytes, version)
    finally:
        response.close()  # a connection whose answer was read whole is already back in the pool


def _body(response: urllib3.BaseHTTPResponse, size: int, end: float) -> bytes:
    body = bytearray()
    try:
        while len(body) < size:
            if time.monotonic() > end:
                raise Transient(f"only {len(body)} of {size} bytes came in time")
            piece = response.read1(min(_PIECE, size - len(body)))
            if not piece:
                raise Transient(f"only {len(body)} of {size} bytes came")
            body += piece
    except HTTPError as error:
        raise Transient(_reason(error)) from None
    return bytes(body)


def _follow(address: str, ranged: str, timeout_s: float) -> urllib3.BaseHTTPResponse:
    """Send a request, and follow redirects that keep the scheme."""
    target = address
    for _ in range(_MOST_REDIRECTS + 1):
        response = _send(target, address, ranged, timeout_s)
        location = response.get_redirect_location()
        if not location:
            return response
        with suppress(HTTPError):  # once its body is read the connection is used again
            response.read1(_PIECE)
        response.close()
        target = urljoin(target, location)
        try:
            check_address(target, signed=True)
        except ValueError as error:
            raise Refused(f"{address} is redirected: {error}") from None
        if urlsplit(target).scheme != urlsplit(address).scheme:
            shown = without_secrets(target)
            raise Refused(f"{address} is redirected to {shown!r}, which has another scheme: give the final address")
    raise Refused(f"{address} is redirected more than {_MOST_REDIRECTS} times: give the final address")


def _send(target: str, address: str, ranged: str, timeout_s: float) -> urllib3.BaseHTTPResponse:
    host = urlsplit(target).hostname
    headers, timeout = {"User-Agent": "mixdist", "Range": ranged}, urllib3.Timeout(timeout_s, timeout_s)
    try:
        response = _pool(target).request("GET", target, headers=headers, timeout=timeout, **_PLAIN)
    except LocationValueError:
        raise Refused(f"{address} has a host or proxy that cannot be used: check both") from None
    except HTTPError as error:
        cause = _cause(error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            why = f"has a certificate that is not trusted ({_reason(error)})"
            raise Refused(f"{address} {why}: have it renewed, or set SSL_CERT_FILE") from None
        if isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME and host not in _answered:
            raise Refused(f"{address} has an unknown host: check its name") from None
        raise Transient(_reason(error)) from None
    _answered.add(host)
    return response


def _pool(target: str) -> urllib3.PoolManager:
    """Return this process's connections to a target: directly, or through the proxy that the environment names."""
    parts, proxies = urlsplit(target), getproxies()
    proxy = proxies.get("https") or proxies.get("all")
    direct = parts.scheme == "http" or proxy_bypass(parts.hostname or "")  # http is this machine
    return _connections(os.getpid(), None if direct else proxy)


@cache
def _connections(pid: int, proxy: str | None) -> urllib3.PoolManager:
    """Make a pool of connections; one for each process, since a forked one must not use its parent's sockets."""
    if proxy is None:
        return urllib3.PoolManager(maxsize=_CONNECTIONS)
    url = urllib3.util.parse_url(proxy if "://" in proxy else f"http://{proxy}")
    login = urllib3.make_headers(proxy_basic_auth=unquote(url.auth)) if url.auth else None
    return urllib3.ProxyManager(url._replace(auth=None).url, maxsize=_CONNECTIONS, proxy_headers=login)


def _judge(response: urllib3.BaseHTTPResponse, address: str, offset: int, size: int, most: int) -> tuple[int, int]:
    """Return the bytes of the whole file, and how many of them this answer brings."""
    status, content_range = response.status, response.headers.get("Content-Range", "").strip()
    if status == 206:
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", content_range)
        if not found:
            came = f"{address} came with Content-Range {content_range!r}"
            raise Refused(f"{came}, expected place and size: take another server")
        first, last, num_bytes = map(int, found.groups())
        if (first, last) != (offset, min(offset + size, num_bytes) - 1):
            raise Transient(f"bytes {first}-{last} came instead of {offset}-{offset + size - 1}")
        return num_bytes, last + 1 - first
    if status == 200:
        length = response.headers.get("Content-Length", "")
        if not length.isdecimal() or offset or int(length) > most:
            came = f"{address} came whole ({length or 'unknown'} bytes) where {size} at {offset} were asked for"
            raise Refused(f"{came}: the server ignores Range; take another, or download the folder")
        return int(length), min(int(length), size)
    if status == 416 and (found := re.fullmatch(r"bytes \*/(\d+)", content_range)):
        return int(found[1]), 0
    told = f"{status} {response.reason or ''}".strip()
    if status >= 500 or status in _TRANSIENT:
        pause_s = _retry_after(response)
        asked = f" and asks to wait {pause_s:.0f} s" if pause_s else ""
        raise Transient(f"it answered {told}{asked}", pause_s)
    if status in (404, 410):
        raise Missing(f"{address} is not there ({told}): check the address")
    if status in (401, 403):
        raise Refused(f"{address} is not public ({told}): make it readable, or download the folder")
    raise Refused(f"{address} is refused ({told}): check the address")


def _retry_after(response: urllib3.BaseHTTPResponse) -> float:
    try:
        return urllib3.Retry().get_retry_after(response) or 0.0
    except HTTPError:  # neither seconds nor a date
        return 0.0


def _cause(error: BaseException) -> BaseException:
    """Return the innermost error: urllib3's own wrap it and name objects."""
    inner = error.__cause__ or next((one for one in error.args if isinstance(one, BaseException)), None)
    return error if inner is None else _cause(inner)


def _reason(error: BaseException) -> str:
    cause = _cause(error)
    return " ".join(str(cause).split()) or type(cause).__name__
