"""Reads and decodes samples, in worker processes or in this one. Nothing here needs torch.

Shape letters: C channels, H height, W width, n samples.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixdist.data.images import Decoder, Unreadable, decode
from mixdist.data.shards.storage import Damage, Storage
from mixdist.data.workers import Workers

Content = Literal["image", "npy"]
MAX_BYTES = 1 << 28
"""Of one array in an npy member."""
_MOST, _LEAST = 64, 4
"""Samples that a worker process is sent at once."""


class Wanted(NamedTuple):
    """Where a sample's bytes lie, and their crc32."""

    shard: str
    offset: int
    size: int
    crc: int


class Bad(NamedTuple):
    """A sample that cannot be read: its place among those asked for, and the reason."""

    place: int
    reason: str


Read = tuple[NDArray[Any], list[Bad]]
"""Samples (n, *shape), zeros where one is bad, and which are."""


@dataclass(frozen=True)
class Reading:
    """How the bytes of a sample become an array.

    Args:
        storage: where shards lie.
        content: image (JPEG, PNG, WebP) or npy.
        channels: C of images, 1 or 3.
        size: side that images are brought to; see :func:`mixdist.data.images.fit`.
        crop: side of the square that is kept before.
        decoder: of JPEGs.
        shape: that every array must have; None takes any.
        dtype: that every array must have; of rows one with names.
    """

    storage: Storage
    content: Content = "image"
    channels: int = 3
    size: int | None = None
    crop: int | None = None
    decoder: Decoder = "pillow"
    shape: tuple[int, ...] | None = None
    dtype: Any = "uint8"

    def one(self, wanted: Wanted) -> NDArray[Any]:
        """Read a sample.

        Raises:
            Unreadable: it cannot be decoded, or has another shape.
            Damage: its bytes are not what the index says.
        """
        data = self.storage.read(*wanted)
        if self.content == "image":
            array: NDArray[Any] = decode(data, self.channels, self.size, self.crop, self.decoder)
            remedy = "set size to bring all to one"
        else:
            array, remedy = read_npy(data), "store arrays of one shape and type"
        if self.shape is not None and (array.shape != self.shape or array.dtype != self.dtype):
            raise Unreadable(
                f"it is {array.shape} of {array.dtype}, expected {self.shape} of {self.dtype} like others: {remedy}"
            )
        return array

    def several(self, wanted: list[Wanted]) -> Read:
        """Read n samples."""
        assert self.shape is not None
        arrays, bad = np.zeros((len(wanted), *self.shape), dtype=self.dtype), []
        for place, one in enumerate(wanted):
            try:
                arrays[place] = self.one(one)
            except (Unreadable, Damage) as error:
                bad.append(Bad(place, str(error)))
        return arrays, bad


class Pool:
    """Reads samples in worker processes or in this one.

    Args:
        reading: how.
        workers: processes; 0 reads here, when samples are waited for.
    """

    def __init__(self, reading: Reading, workers: int) -> None:
        self.reading, self.workers = reading, workers
        self._workers = Workers(reading.several, workers, "lower data.init_args.workers")

    def start(self, wanted: list[Wanted]) -> Callable[[], Read]:
        """Start to read n samples; return a callable that blocks until they are there.

        Raises:
            ValueError: here or in that callable: a process was killed.
            OSError: in that callable: storage cannot be reached.
        """
        if not self.workers or not wanted:
            return partial(self.reading.several, wanted)
        size = min(_MOST, max(_LEAST, -(-len(wanted) // (2 * self.workers))))
        started = [self._workers.start(wanted[first : first + size]) for first in range(0, len(wanted), size)]

        def finish() -> Read:
            parts = [read() for read in started]
            bad = [Bad(n * size + one.place, one.reason) for n, (_, some) in enumerate(parts) for one in some]
            return np.concatenate([arrays for arrays, _ in parts]), bad

        return finish

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        self._workers.close()


def read_npy(data: bytes) -> NDArray[Any]:
    """Read an array of numbers; no pickle, and nothing larger than 256 MiB.

    Raises:
        Unreadable: it is no such array.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = header(stream)
        claimed = int(np.prod(shape, dtype=object)) * dtype.itemsize
        kinds = [dtype[name].base.kind for name in dtype.names] if dtype.names else [dtype.kind]
        if any(kind not in "biuf" for kind in kinds) or claimed > MAX_BYTES:
            raise ValueError(f"it claims {shape} of {dtype}, expected numbers of at most {MAX_BYTES} bytes")
        stream.seek(0)
        array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    except (ValueError, KeyError, TypeError, OSError, EOFError, SyntaxError) as error:
        raise Unreadable(f"it is no .npy array of numbers ({' '.join(str(error).split())})") from None
    return array if array.dtype.names else np.ascontiguousarray(array)  # which would give a row an axis
