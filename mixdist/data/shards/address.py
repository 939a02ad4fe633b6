"""Addresses of shards: which are read, what a pattern stands for, and how reading from one may fail."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from itertools import islice
from typing import NamedTuple
from urllib.parse import urlsplit

from braceexpand import braceexpand  # comes with webdataset, whose patterns these are

from mixdist.data.shards.index import check_names

OBJECT_STORES = ("s3", "gs", "hf", "az", "memory")
"""Schemes that fsspec reads; the first four name the extra that installs what they need."""
_EXPECTED = "expected a folder, or an address like https://host/folder or s3://bucket/folder"
_MOST_SHARDS = 100_000


class Refused(OSError):
    """An answer that another try would not change; the message is one line with the address and the remedy."""


class Missing(Refused):
    """There is no such file at the address."""


class Transient(Exception):
    """A try that failed in a way that may pass.

    Args:
        reason: of the failure.
        pause_s: seconds that the server asks to wait before the next try.
    """

    def __init__(self, reason: str, pause_s: float = 0.0) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


class Info(NamedTuple):
    """A file's bytes, and a value that differs once the file was changed."""

    num_bytes: int
    version: str


def check_address(address: str, signed: bool = False) -> None:
    """Refuse an address that is not read from; http is read from this machine only.

    Args:
        address: of a folder or a file.
        signed: whether it may have a query, as the targets of redirects have.

    Raises:
        ValueError: it has another scheme, no host, a user's name or password, or a query.
    """
    shown = without_secrets(address)
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError(f"address {shown!r} cannot be read: {_EXPECTED}") from None
    if "@" in parts.netloc:
        raise ValueError(f"address {shown!r} has a user's name or password: give one that needs none")
    plain = address.startswith(f"{parts.scheme}://") and not re.search(r"[\s\x00-\x1f\x7f\\]", address)
    if parts.scheme not in ("http", "https", *OBJECT_STORES) or not host or not plain:
        raise ValueError(f"address {shown!r} is not one that shards are read from: {_EXPECTED}")
    if parts.scheme == "http" and not _is_loopback(host):
        raise ValueError(f"address {shown!r} may be read and changed on its way: give an https address")
    if not signed and (parts.query or parts.fragment):
        raise ValueError(f"address {shown!r} has a '?' or '#', expected a folder: give the folder of the shards")


def without_secrets(address: str) -> str:
    """Return an address as it may be printed: without a user's name and password, and without its query."""
    if "@" in address:
        scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/*", address)
        return f"{scheme[0] if scheme else ''}..."
    return re.sub(r"(?s)[?#].*", "?...", address)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def expand(pattern: str) -> tuple[str, list[str]]:
    """Return the folder and the names of the shards that a pattern stands for.

    Args:
        pattern: an address with braces, as ``https://host/train-{000000..000146}.tar``.

    Raises:
        ValueError: the braces do not match, there are more than 100,000 shards, they lie in several folders, an
            address is not read from, or a name is unsafe or there twice.
    """
    shown = without_secrets(pattern)
    try:
        addresses = list(islice(braceexpand(pattern, escape=False), _MOST_SHARDS + 1))
    except ValueError as error:
        raise ValueError(f"{shown!r} cannot be expanded ({error}): give one like train-{{000..146}}.tar") from None
    if len(addresses) > _MOST_SHARDS:
        raise ValueError(f"{shown!r} stands for more than {_MOST_SHARDS} shards: index fewer at once")
    for address in addresses:
        check_address(address)
    bases = sorted({address.rpartition("/")[0] for address in addresses})
    if len(bases) > 1:
        raise ValueError(f"{shown!r} has shards in {bases[0]!r} and {bases[1]!r}: give those of one folder")
    names = [address.rpartition("/")[2] for address in addresses]
    check_names(names)
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{shown!r} names shard {name!r} twice: name each once")
    return bases[0] + "/", names
