"""The index of a folder of tar shards: where every member of every sample lies, and what it should be.

Shape letters: N samples, M members of a sample, A attributes.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixdist.files import write_file

HEAD, SAMPLES = "index.json", "index.npz"
FORMAT = 1
ABSENT = -1
EXTENSIONS = ("cls", "jpeg", "jpg", "json", "npy", "png", "txt", "webp")
"""Of members, in small letters: what is read; nothing else is."""
_NOT_OURS = (
    *(ValueError, KeyError, TypeError, AttributeError, AssertionError, OverflowError, OSError, EOFError),
    *(RecursionError, NotImplementedError, MemoryError, zipfile.BadZipFile, zlib.error),
)
"""What numpy, zipfile and json raise on foreign bytes."""
_TUPLES, _OTHERS = ("extensions", "class_names", "attribute_names", "image"), ("source", "base", "made")
_ARRAYS = {"id": "id_N", "member": "member_NM2", "crc": "crc_NM", "label": "label_N", "attribute": "attribute_NA"}
ABOUT_ROWS = {"spec", "label", "attribute", "attribute_names"}
"""What ``ShardIndex.rows`` says."""
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.tar")


@dataclass(frozen=True)
class ShardEntry:
    """One tar file.

    Args:
        name: of the file, without a folder.
        split: train, valid, test or another part of the data set.
        num_bytes: of the file.
        sha256: of the file.
        num_samples: in it.
        first_id: global id of its first sample.
    """

    name: str
    split: str
    num_bytes: int
    sha256: str
    num_samples: int
    first_id: int


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """What is known of a set of shards; samples are in the order of the shards.

    Args:
        shards: in order.
        extensions: of the members of a sample, as ("cls", "jpg"); M.
        id_N: global ids, int64, all different; ascending within a shard, but of rows, which keep their source's order.
        member_NM2: where each member's bytes begin in its shard and how many there are, int64; -1 where a sample lacks
            it.
        crc_NM: zlib.crc32 of each member's bytes, uint32; 0 where a sample lacks it.
        label_N: class of each sample, int64; None where samples have none.
        attribute_NA: binary attributes of each sample, uint8 of 0 and 1; None where samples have none.
        class_names: of the label, or empty.
        attribute_names: A names, or empty.
        image: (channels, height, width) where every image is known to have it, else None.
        source: what the shards were made of and how, for people.
        base: the address of the folder of the shards; None where they lie beside the index.
        made: what ``mixdist prepare`` was asked for, to tell whether an interrupted one goes on; empty for others'
            shards.
        rows: where each sample is a row of several fields, one .npy array whose fields have names: ``spec``, the fields
            as JSON (:func:`mixdist.data.fields.describe_spec`), and the names of ``label`` and ``attribute``; else
            empty.
    """

    shards: tuple[ShardEntry, ...]
    extensions: tuple[str, ...]
    id_N: NDArray[np.int64]
    member_NM2: NDArray[np.int64]
    crc_NM: NDArray[np.uint32]
    label_N: NDArray[np.int64] | None = None
    attribute_NA: NDArray[np.uint8] | None = None
    class_names: tuple[str, ...] = ()
    attribute_names: tuple[str, ...] = ()
    image: tuple[int, int, int] | None = None
    source: str = ""
    base: str | None = None
    made: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        num = sum(shard.num_samples for shard in self.shards)
        assert self.id_N.shape == (num,), f"{self.id_N.shape} ids of {num} samples"
        assert self.member_NM2.shape == (num, len(self.extensions), 2), self.member_NM2.shape
        assert self.crc_NM.shape == (num, len(self.extensions)), self.crc_NM.shape

    def __len__(self) -> int:
        return len(self.id_N)

    @property
    def starts(self) -> NDArray[np.int64]:
        """Return the place of each shard's first sample, and at the end the number of samples."""
        return np.cumsum([0, *(shard.num_samples for shard in self.shards)], dtype=np.int64)

    @property
    def splits(self) -> tuple[str, ...]:
        """Return the names of the parts, in order of appearance."""
        return tuple(dict.fromkeys(shard.split for shard in self.shards))

    def places(self, split: str) -> NDArray[np.int64]:
        """Return the places of the samples of a part, ascending."""
        nums = [shard.num_samples for shard in self.shards]
        return np.flatnonzero(np.repeat([shard.split == split for shard in self.shards], nums))

    def part(self, i: int) -> ShardIndex:
        """Return the index of shard ``i`` alone."""
        rows = slice(*self.starts[i : i + 2])
        arrays = {_ARRAYS[name]: array[rows] for name, array in self._arrays().items()}
        return replace(self, shards=self.shards[i : i + 1], **arrays)  # type: ignore[arg-type]

    @property
    def fingerprint(self) -> str:
        """Return a hash of the content: sha256 over the shards' checksums, samples and labels, wherever they lie."""
        digest = hashlib.sha256(json.dumps([asdict(shard) for shard in self.shards], sort_keys=True).encode())
        digest.update(json.dumps([self.extensions, self.class_names, self.attribute_names, self.image]).encode())
        if self.rows:
            digest.update(json.dumps(self.rows, sort_keys=True).encode())
        for array in self._arrays().values():
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {name: array for name, field in _ARRAYS.items() if (array := getattr(self, field)) is not None}

    def write(self, folder: Path) -> None:
        """Write ``index.npz`` and then ``index.json``, which makes it complete.

        Raises:
            OSError: they cannot be written; then nothing is left under their names that was not there.
        """
        samples = io.BytesIO()
        np.savez_compressed(samples, **self._arrays())  # type: ignore[arg-type]  # its zip has a fixed date: the same index, the same bytes
        head = {
            "format": FORMAT,
            "shards": [asdict(shard) for shard in self.shards],
            **{name: getattr(self, name) for name in (*_TUPLES, *_OTHERS)},
            **({"rows": self.rows} if self.rows else {}),
            "samples_sha256": hashlib.sha256(samples.getvalue()).hexdigest(),
            "fingerprint": self.fingerprint,
        }
        write_file(folder / SAMPLES, samples.getvalue())
        write_file(folder / HEAD, (json.dumps(head, indent=1) + "\n").encode())

    @staticmethod
    def parse(name: str, head: bytes, samples: bytes) -> ShardIndex:
        """Undo ``write``; checksums find damage, and names are checked.

        Args:
            name: of the folder or address, for messages.
            head: the content of ``index.json``.
            samples: the content of ``index.npz``.

        Raises:
            ValueError: it is no index, is damaged, of another version, or names files outside its folder.
        """
        try:
            about = json.loads(head)
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']!r} is another version's, expected {FORMAT}")
            if hashlib.sha256(samples).hexdigest() != about["samples_sha256"]:
                raise ValueError(f"{SAMPLES} differs from its checksum")
            with np.load(io.BytesIO(samples), allow_pickle=False) as arrays:
                rest: dict[str, Any] = {field: arrays[key] for key, field in _ARRAYS.items() if key in arrays.files}
            rest |= {name: about[name] for name in _OTHERS}
            rest["rows"] = about.get("rows", {})
            if rest["rows"] and set(rest["rows"]) != ABOUT_ROWS:
                raise ValueError(f"rows has {', '.join(rest['rows'])}, expected {', '.join(sorted(ABOUT_ROWS))}")
            rest |= {name: None if about[name] is None else tuple(about[name]) for name in _TUPLES}
            index = ShardIndex(tuple(ShardEntry(**entry) for entry in about["shards"]), **rest)
            check_names([shard.name for shard in index.shards])  # even if signed: a name must stay in the folder
            if index.fingerprint != about["fingerprint"]:
                raise ValueError(f"{HEAD} differs from its fingerprint")
        except _NOT_OURS as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(
                f"the index of {name} cannot be used ({reason}): put back the one that was made with the shards, or "
                f"make it anew with mixdist index"
            ) from None
        return index

    @staticmethod
    def read(folder: Path) -> ShardIndex:
        """Read the index in a folder.

        Raises:
            ValueError: there is none, or it cannot be used.
        """
        if not folder.is_dir():
            raise ValueError(f"{str(folder)!r} is not a folder: name one that mixdist prepare or mixdist index made")
        try:
            head, samples = (folder / HEAD).read_bytes(), (folder / SAMPLES).read_bytes()
        except PermissionError as error:
            raise ValueError(
                f"the index {error.filename!r} cannot be read ({error.strerror}): make it readable"
            ) from None
        except OSError as error:
            raise ValueError(
                f"{str(folder)!r} has no index ({error.filename}: {error.strerror}): make it with mixdist index, or "
                f"finish mixdist prepare"
            ) from None
        return ShardIndex.parse(str(folder), head, samples)


def split_of(name: str) -> str:
    """Return the split that a shard's name says: train, valid or test, else what precedes the number."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    for kin in (("train", "training"), ("valid", "val", "validation"), ("test",)):
        if words.intersection(kin):
            return kin[0]
    return re.sub(r"[-_.]*\d*\.tar$", "", name) or "train"


def check_names(names: Sequence[str]) -> None:
    """Refuse names of shards with more than letters, digits, "_", "-" and ".".

    Raises:
        ValueError: a name has a folder, begins with a dot, or does not end in .tar.
    """
    for name in names:
        if not _SAFE_NAME.fullmatch(name):
            raise ValueError(
                f"shard {name!r} must be a plain name of letters, digits, '_', '-' and '.' that ends in .tar: rename it"
            )
