"""Ranges of files at an https address: asked for again while that can help, and refused in one line where it cannot."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import socket
import ssl
import time
import zlib
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from typing import Any, NamedTuple, TypeVar
from urllib.error import URLError
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request, getproxies

T = TypeVar("T")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
TOLD_AFTER = 3
"""Failed tries after which a wait is told on stderr."""
_PIECE = 1 << 18
_REDIRECTS, _MOST_REDIRECTS = (301, 302, 303, 307, 308), 5
_PASSING = (408, 425, 429)
_log = logging.getLogger(__name__)


class Refused(OSError):
    """An answer that another try would not better; the message is one line with the address and the remedy."""


class Missing(Refused):
    """There is no such file at the address."""


class _Passing(Exception):
    """A try that failed in a way that may pass."""


class _Answer(NamedTuple):
    response: HTTPResponse
    total: int  # bytes of the whole file
    length: int  # bytes that this answer brings


def check_address(address: str, signed: bool = False) -> None:
    """Refuse what is not fetched from: https only, and http where it does not leave this machine.

    Args:
        address: of a folder or a file.
        signed: whether it may have a query, as the targets of redirects have.

    Raises:
        ValueError: it has another scheme, no host, a user's name or password, or is no folder's address.
    """
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"address {address!r} cannot be read ({error}): give one like https://host/folder") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"the address at {host!r} has a user's name or password: give one that needs none")
    if parts.scheme not in ("http", "https") or not host or re.search(r"[\s\x00-\x1f\x7f\\]", address):
        raise ValueError(f"address {address!r} is not fetched from: give one like https://host/folder, or a folder")
    if parts.scheme == "http" and not _is_loopback(host):
        raise ValueError(f"address {address!r} may be read and changed on its way: give an https address")
    if not signed and (parts.query or parts.fragment):
        raise ValueError(f"address {address!r} has a '?' or '#', so it is no folder's: give the folder of the shards")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Web:
    """Files in a folder at an address.

    Args:
        base: address of the folder.
        retries: tries after the first.
        timeout_s: seconds in which a server must answer, and in which what was asked for must have come.
        settings: names what a user can raise where all tries failed; empty where nothing can be set.

    Raises:
        ValueError: the address is not fetched from.
    """

    def __init__(self, base: str, retries: int, timeout_s: float, settings: str = "") -> None:
        check_address(base)
        self.base, self.retries, self.timeout_s = base.rstrip("/") + "/", retries, timeout_s
        self.settings = settings
        self._answered = False
        self._opener: OpenerDirector | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opener": None}

    def address(self, name: str) -> str:
        """Return a file's address."""
        return self.base + quote(name)

    @property
    def patience_s(self) -> float:
        """Seconds after which no other try begins; the last may then take twice ``timeout_s``."""
        pauses = (min(FIRST_PAUSE_S * 2**i, LONGEST_PAUSE_S) for i in range(self.retries))
        return sum(pauses) + (self.retries + 1) * self.timeout_s

    def get(self, name: str, offset: int, size: int, until: float | None = None) -> tuple[bytes, int]:
        """Fetch a range of a file.

        Args:
            name: of the file.
            offset: where the range begins.
            size: bytes; fewer come only where the file ends.
            until: time.monotonic() after which no other try begins; None gives all the patience.

        Returns:
            the bytes, and how many the whole file has.

        Raises:
            Missing: there is no such file.
            Refused: the server will not give it.
            OSError: all tries failed.
        """
        address = self.address(name)
        return self._patiently(address, until, lambda: self._fetch(address, offset, size))

    def size(self, name: str, block: int) -> int | None:
        """Ask how many bytes a file has; None where there is none.

        Args:
            name: of the file.
            block: bytes that are asked for at once later: a file up to this size may come whole.

        Raises:
            Refused: the server will not say.
            OSError: all tries failed.
        """
        address = self.address(name)

        def ask() -> int:
            answer = self._open(address, 0, block)
            answer.response.close()
            return answer.total

        try:
            return self._patiently(address, None, ask)
        except Missing:
            return None

    def whole(self, name: str, block: int, limit: int) -> bytes:
        """Fetch a whole file.

        Args:
            name: of the file.
            block: bytes that are asked for at once.
            limit: bytes that are not expected in any such file.

        Raises:
            Missing: there is no such file.
            Refused: the server will not give it, or it is larger than the limit.
            OSError: all tries failed.
        """
        data, total = self.get(name, 0, block)
        if total > limit:
            raise Refused(f"{self.address(name)} has {total} bytes, expected at most {limit}: look what lies there")
        parts = [data]
        for offset in range(block, total, block):
            parts.append(self.get(name, offset, min(block, total - offset))[0])
        return b"".join(parts)

    def _patiently(self, address: str, until: float | None, attempt: Callable[[], T]) -> T:
        """Try, and try again after growing pauses, while the failure may pass."""
        start = time.monotonic()
        until = start + self.patience_s if until is None else until
        for tries in range(1, self.retries + 2):
            try:
                result = attempt()
            except _Passing as failure:
                why = str(failure)
            else:
                self._answered = True
                return result
            pause = _pause(address, tries)
            if tries > self.retries or time.monotonic() + pause > until:
                break
            if tries == TOLD_AFTER:
                _log.warning("mixdist: %s fails (%s): trying again for up to %.0f s", address, why, until - start)
            time.sleep(pause)
        spent = f"{tries} tries and {time.monotonic() - start:.1f} s"
        remedy = "see that the server answers and start again" + (
            f", or raise {self.settings}" if self.settings else ""
        )
        raise OSError(f"{address} did not come in {spent} ({why}): {remedy}")

    def _fetch(self, address: str, offset: int, size: int) -> tuple[bytes, int]:
        end = time.monotonic() + self.timeout_s
        answer = self._open(address, offset, size)
        body = bytearray()
        with answer.response as response:
            try:
                while len(body) < answer.length:
                    piece = response.read1(min(_PIECE, answer.length - len(body)))
                    if not piece or (time.monotonic() > end and len(body) + len(piece) < answer.length):
                        came = f"{len(body) + len(piece)} of {answer.length} bytes came"
                        raise _Passing(f"only {came} in {time.monotonic() - end + self.timeout_s:.1f} s")
                    body += piece
            except (OSError, HTTPException) as error:
                raise _Passing(_reason(error)) from None
        return bytes(body), answer.total

    def _open(self, address: str, offset: int, size: int) -> _Answer:
        """Ask for a range; the caller closes the response."""
        response = self._follow(address, {"Range": f"bytes={offset}-{offset + size - 1}"})
        try:
            return _judge(response, address, offset, size)
        except BaseException:
            response.close()
            raise

    def _follow(self, address: str, headers: dict[str, str]) -> HTTPResponse:
        """Send a request, and follow redirects that keep the scheme."""
        target = address
        for _ in range(_MOST_REDIRECTS + 1):
            response = self._send(Request(target, headers={"User-Agent": "mixdist", **headers}), address)
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or location is None:
                return response
            response.close()
            scheme, target = urlsplit(target).scheme, urljoin(target, location)
            try:
                check_address(target, signed=True)
            except ValueError as error:
                raise Refused(f"{address} leads elsewhere, and that {error}") from None
            if urlsplit(target).scheme != scheme:
                raise Refused(f"{address} leads from {scheme} to another scheme: give the address that it leads to")
        raise Refused(f"{address} leads on more than {_MOST_REDIRECTS} times: give the address that it leads to")

    def _send(self, request: Request, address: str) -> HTTPResponse:
        try:
            response: HTTPResponse = self._opened().open(request, timeout=self.timeout_s)
        except (OSError, HTTPException) as error:
            cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise Refused(
                    f"{address} has a certificate that is not trusted ({_reason(cause)}): see to it"
                ) from None
            if isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME and not self._answered:
                raise Refused(f"{address} has a host that is not known: see that the name is right") from None
            raise _Passing(_reason(cause)) from None
        return response

    def _opened(self) -> OpenerDirector:
        """Return what knows http and https and nothing else: no files, no ftp, and no redirects of its own."""
        if self._opener is None:
            proxies = {scheme: proxy for scheme, proxy in getproxies().items() if scheme == "https"}
            self._opener = OpenerDirector()
            for handler in (ProxyHandler(proxies), HTTPHandler(), HTTPSHandler()):
                self._opener.add_handler(handler)
        return self._opener


def _judge(response: HTTPResponse, address: str, offset: int, size: int) -> _Answer:
    """Read the head of an answer to a request for a range."""
    status = response.status
    given = response.headers.get("Content-Range", "")
    if status == 206:
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", given.strip())
        if not found:
            raise Refused(
                f"{address} came with Content-Range {given!r}, expected its place and size: take another server"
            )
        first, last, total = map(int, found.groups())
        if (first, last) != (offset, min(offset + size, total) - 1):
            raise _Passing(f"bytes {first}-{last} came instead of {offset}-{offset + size - 1}")
        return _Answer(response, total, last + 1 - first)
    if status == 200:
        return _judge_whole(response, address, offset, size)
    if status == 416 and (beyond := re.fullmatch(r"bytes \*/(\d+)", given.strip())):
        return _Answer(response, int(beyond[1]), 0)
    told = f"{status} {response.reason}".strip()
    if status >= 500 or status in _PASSING:
        raise _Passing(f"it answered {told}")
    if status in (404, 410):
        raise Missing(f"{address} is not there ({told}): see that the address is right and the file was put there")
    if status in (401, 403):
        raise Refused(f"{address} is not given to everyone ({told}): make it readable, or fetch the folder yourself")
    raise Refused(f"{address} is not given ({told}): see that the address is right")


def _judge_whole(response: HTTPResponse, address: str, offset: int, size: int) -> _Answer:
    """A whole file came: that is enough where no more was asked for."""
    length = response.headers.get("Content-Length", "")
    if not length.isdecimal() or offset or int(length) > size:
        raise Refused(
            f"{address} came whole ({length or 'unknown'} bytes) where {size} at {offset} were asked for: the server "
            f"ignores Range; take one that does not, or fetch the folder yourself"
        )
    return _Answer(response, int(length), int(length))


def _pause(address: str, tries: int) -> float:
    """Seconds to wait: they double, and processes that failed together do not come back together."""
    spread = zlib.crc32(f"{address} {os.getpid()} {tries}".encode()) / 2**32
    return min(FIRST_PAUSE_S * 2 ** (tries - 1), LONGEST_PAUSE_S) * (0.5 + 0.5 * spread)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
