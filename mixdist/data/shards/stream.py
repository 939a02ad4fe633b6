"""Shards at an address as streams, read once from front to back; and the addresses that a pattern stands for."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from urllib.parse import unquote

from braceexpand import braceexpand  # comes with webdataset, whose patterns these are

from mixdist.data.shards.http import Web, check_address
from mixdist.data.shards.index import check_names

_BLOCK = 4_000_000
_AHEAD = 2
_MOST = 100_000


def expand(pattern: str) -> tuple[str, list[str]]:
    """Return the folder and the names of the shards that a pattern stands for.

    Args:
        pattern: an address with braces, as ``https://host/train-{000000..000146}.tar``.

    Raises:
        ValueError: the braces do not match, there are more than 100,000 shards, they lie in several folders, an
            address is not fetched from, or a name is unsafe or there twice.
    """
    try:
        addresses = list(islice(braceexpand(pattern, escape=False), _MOST + 1))
    except ValueError as error:
        raise ValueError(f"{pattern!r} cannot be expanded ({error}): give one like train-{{000..146}}.tar") from None
    if len(addresses) > _MOST:
        raise ValueError(f"{pattern!r} stands for more than {_MOST} shards: index fewer at once")
    for address in addresses:
        check_address(address)
    bases = sorted({address.rpartition("/")[0] for address in addresses})
    if len(bases) > 1:
        raise ValueError(f"{pattern!r} has shards in {bases[0]!r} and {bases[1]!r}: give those of one folder")
    names = [unquote(address.rpartition("/")[2]) for address in addresses]
    check_names(names)
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise ValueError(f"{pattern!r} names shard {twice[0]!r} twice: name each once")
    return bases[0] + "/", names


class WebStream:
    """A file at an address; blocks are asked for ahead, and again where they do not come.

    Use it as a context; it ends what was asked for ahead.

    Args:
        web: the folder.
        name: of the file.

    Raises (on reading):
        OSError: it is not there or does not come, or changed meanwhile.
    """

    def __init__(self, web: Web, name: str) -> None:
        self._web, self._name = web, name
        self._pool = ThreadPoolExecutor(_AHEAD)
        self._blocks = self._fetched()
        self._rest = b""

    def __enter__(self) -> WebStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._blocks.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def read(self, size: int, /) -> bytes:
        """Return at most ``size`` bytes; none at the end."""
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return b""
            self._rest = block
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    def _fetched(self) -> Generator[bytes, None, None]:
        first, total = self._web.get(self._name, 0, _BLOCK)
        offsets = iter(range(len(first), total, _BLOCK)) if first else iter(())
        ahead: deque[Future[tuple[bytes, int]]] = deque()
        yield first
        while True:
            while len(ahead) < _AHEAD and (offset := next(offsets, None)) is not None:
                ahead.append(self._pool.submit(self._web.get, self._name, offset, min(_BLOCK, total - offset)))
            if not ahead:
                return
            block, now = ahead.popleft().result()
            if now != total:
                address = self._web.address(self._name)
                raise OSError(f"{address} had {total} bytes and now has {now}: wait until it is whole")
            yield block
