"""Makes the index of tar shards that anyone wrote: each is read once, front to back; what is ambiguous is refused.

Shape letters: N samples, M members of a sample, A attributes.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from mixdist.data.shards.index import ABSENT, EXTENSIONS, ShardEntry, ShardIndex, check_names
from mixdist.data.shards.tar import AGAIN, PIECE, Member, Stream, Tar

_COLUMN = {extension: column for column, extension in enumerate(EXTENSIONS)}
_CLS, _JSON = _COLUMN["cls"], _COLUMN["json"]
_PICKLES = ("pkl", "pickle", "pyd", "pt", "pth")
_CLASS = re.compile(rb"\s*([0-9]{1,9})\s*")
_RENAME = "rename it and make the shard again"

Attributes = tuple[tuple[str, ...], NDArray[np.uint8]]


@dataclass(frozen=True, eq=False)
class Scan:
    """What one shard holds.

    Args:
        name: of the file.
        num_bytes: of the file.
        sha256: of the file.
        keys: N names of samples, in order: the members' names up to the first dot after the folder.
        member_NM2: where each member's bytes begin in the tar and how many there are, int64, M as ``EXTENSIONS``; -1
            where it is absent.
        crc_NM: zlib.crc32 of each member's bytes, uint32; 0 where it is absent.
        label_N: classes from ``cls``, int64; None unless every sample has one.
        attributes: A names and uint8 (N, A) of 0 and 1, from ``json``; None unless every sample has the same names.
        left_out: a line for each of labels and attributes that only some samples have.
    """

    name: str
    num_bytes: int
    sha256: str
    keys: list[str]
    member_NM2: NDArray[np.int64]
    crc_NM: NDArray[np.uint32]
    label_N: NDArray[np.int64] | None = None
    attributes: Attributes | None = None
    left_out: tuple[str, ...] = ()


def scan(path: Path) -> Scan:
    """Read a tar file once; see :func:`scan_stream`.

    Raises:
        ValueError: it is no plain file, cannot be read, or is refused.
    """
    if not path.is_file():  # opening a fifo would wait for ever
        raise ValueError(f"shard {str(path)!r} is no file: put it back, or leave it out")
    try:
        with path.open("rb", buffering=0) as file:
            return scan_stream(file, path.name)
    except OSError as error:
        raise ValueError(f"shard {str(path)!r} cannot be read ({error.strerror}): {AGAIN}") from None


def scan_stream(stream: Stream, name: str) -> Scan:
    """Read a tar from any stream once, front to back, in pieces of 1 MiB.

    Args:
        stream: gives the shard's bytes.
        name: of the shard.

    Raises:
        ValueError: the tar is damaged, cut, or holds anything but plain files; a name is unsafe, has more than one
            dot, no extension or one that is not in ``EXTENSIONS``; a sample's members do not follow each other; a
            ``cls`` is no whole number; there is no sample.
        OSError: the stream fails.
    """
    tar = Tar(stream, name)
    samples = _Samples(tar)
    while (member := tar.member()) is not None:
        samples.add(member, *tar.payload(member))
    if not samples.keys:
        tar.refuse(0, "the archive has no sample", "leave it out")
    return samples.scan()


class _Samples:
    """The samples found so far; numbers are kept in flat arrays, a member each."""

    def __init__(self, tar: Tar) -> None:
        self.tar = tar
        self.keys: dict[str, None] = {}  # in order
        self._key = ""
        self._columns = 0  # of the sample that is being read, a bit each
        self._sample, self._column, self._crc = array("q"), array("B"), array("I")
        self._offset, self._size = array("q"), array("q")
        self._labels = array("q")
        self._names: tuple[str, ...] = ()  # of the attributes in json, as long as all samples have the same
        self._values, self._num_attributed = bytearray(), 0

    def add(self, member: Member, crc: int, data: bytes) -> None:
        """Take a member.

        Raises:
            ValueError: it belongs to no sample.
        """
        key, column = self._place(member)
        if key != self._key:
            if key in self.keys:
                what = f"key {key!r} of {member.name!r} comes again after other samples (a duplicate, or interleaved)"
                remedy = "put a sample's members one after the other under a key of its own"
                self.tar.refuse(member.header, what, remedy)
            self.keys[key] = None
            self._key, self._columns = key, 0
        if self._columns >> column & 1:
            what = f"sample {key!r} has a second {EXTENSIONS[column]!r} ({member.name!r})"
            self.tar.refuse(member.header, what, "give every sample a key of its own")
        self._columns |= 1 << column
        self._sample.append(len(self.keys) - 1)
        self._column.append(column)
        self._offset.append(member.offset)
        self._size.append(member.size)
        self._crc.append(crc)
        if column == _CLS:
            self._labels.append(self._label(member, data))
        elif column == _JSON:
            self._add_attributes(_attributes(data) if member.size <= PIECE and b'"attributes"' in data else {})

    def _place(self, member: Member) -> tuple[str, int]:
        """Return a member's key and the column of its extension."""
        folder, slash, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        column = _COLUMN.get(extension.lower())
        if column is None or not stem:
            self._refuse_name(member, stem, extension)
        return folder + slash + stem, column

    def _refuse_name(self, member: Member, stem: str, extension: str) -> NoReturn:
        what = f"has the extension {extension!r}, expected {', '.join(EXTENSIONS)}"
        remedy = "leave it out, or convert it"
        last = extension.rpartition(".")[2].lower()
        if last in _PICKLES:
            what = f"has the extension {last!r}: pickles are never read"
        elif not stem:
            what, remedy = "has no key before its dot", _RENAME
        elif "." in extension:
            what = "has a dotted key: what follows the first dot would be taken for its extension"
            remedy = "name members KEY.EXTENSION, with one dot"
        elif not extension:
            what, remedy = "has no extension", _RENAME
        self.tar.refuse(member.header, f"{member.name!r} {what}", remedy)

    def _label(self, member: Member, data: bytes) -> int:
        match = _CLASS.fullmatch(data) if member.size <= 64 else None
        if match is None:
            found = data[:20] if member.size <= PIECE else f"{member.size} bytes"
            what = f"{member.name!r} holds {found!r}, expected a class as a whole number from 0"
            self.tar.refuse(member.header, what, "number the classes, or name the member txt")
        return int(match[1])

    def _add_attributes(self, found: dict[str, Any]) -> None:
        self._names = self._names or tuple(found)
        same = tuple(found) == self._names
        if found and (same or found.keys() == set(self._names)):
            self._values += bytes(found.values() if same else [found[name] for name in self._names])
            self._num_attributed += 1

    def scan(self) -> Scan:
        """Return arrays with a row for each sample."""
        num, where = len(self.keys), (np.array(self._sample), np.array(self._column))
        member_NM2 = np.full((num, len(EXTENSIONS), 2), ABSENT, dtype=np.int64)
        member_NM2[where] = np.stack([self._offset, self._size], axis=-1)
        crc_NM = np.zeros((num, len(EXTENSIONS)), dtype=np.uint32)
        crc_NM[where] = self._crc
        shard, left_out = self.tar.shard, []
        if 0 < len(self._labels) < num:
            left_out.append(f"labels: {len(self._labels)} of {num} samples of shard {shard!r} have a cls")
        attributes = None
        if self._num_attributed == num:
            attributes = self._names, np.array(self._values, dtype=np.uint8).reshape(num, len(self._names))
        elif self._names:
            left_out.append(f"attributes: not all samples of shard {shard!r} have the same ones of 0 and 1 in json")
        return Scan(
            shard,
            self.tar.stream.offset,
            self.tar.stream.sha256,
            list(self.keys),
            member_NM2,
            crc_NM,
            np.array(self._labels, dtype=np.int64) if len(self._labels) == num else None,
            attributes,
            tuple(left_out),
        )


def _attributes(data: bytes) -> dict[str, Any]:
    """Return the attributes in a sample's json; none unless each is 0, 1, true or false."""
    try:
        found: dict[str, Any] = json.loads(data)["attributes"]
        values = list(found.values())
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return {}
    return found if {*map(type, values)} <= {bool, int} and {*values} <= {0, 1} else {}


def assemble(
    scans: Sequence[Scan],
    splits: Sequence[str],
    ids: Sequence[NDArray[np.int64]] | None = None,
    class_names: Sequence[str] = (),
    source: str = "",
    base: str | None = None,
    image: tuple[int, int, int] | None = None,
    made: dict[str, Any] | None = None,
    rows: dict[str, Any] | None = None,
) -> ShardIndex:
    """Make an index of shards, in their order.

    Labels are kept if every sample of every shard has one, else left out; so are attributes, which need the same names
    in every shard. :func:`left_out` says which and why.

    Args:
        scans: one a shard.
        splits: of each shard.
        ids: of each shard's samples, all different, or None to number on through all shards.
        class_names: of the labels, or empty.
        source: see :class:`ShardIndex`, as the following.
        base: the https address of the shards' folder, or None.
        image: the shape that all images are known to have.
        made: what prepare was asked for.
        rows: what the fields of rows are.

    Raises:
        ValueError: there is no shard, two have one name, a split has a key twice, a shard's name is no plain name, or
            a label has no class name.
    """
    if not scans:
        raise ValueError("there is no shard: name a folder that holds files ending in .tar")
    check_names([one.name for one in scans])
    _check_keys(scans, splits)
    starts = np.cumsum([0, *(len(one.keys) for one in scans)])
    if ids is None:
        ids = [np.arange(starts[i], starts[i + 1]) for i in range(len(scans))]
    assert [len(part) for part in ids] == [len(one.keys) for one in scans], "an id for each sample"
    assert all(len(np.unique(part)) == len(part) for part in ids), "ids are different"
    member_NM2 = np.concatenate([one.member_NM2 for one in scans])
    used_M = (member_NM2[..., 0] != ABSENT).any(0)
    label_N = _labels(scans, class_names)
    attribute_names, attribute_NA = _same_attributes(scans) or ((), None)
    return ShardIndex(
        tuple(
            ShardEntry(one.name, split, one.num_bytes, one.sha256, len(one.keys), int(part[0]))
            for one, split, part in zip(scans, splits, ids, strict=True)
        ),
        tuple(compress(EXTENSIONS, used_M)),
        np.concatenate(ids).astype(np.int64),
        member_NM2.compress(used_M, axis=1),
        np.concatenate([one.crc_NM for one in scans]).compress(used_M, axis=1),
        label_N,
        attribute_NA,
        tuple(class_names) if label_N is not None else (),
        attribute_names,
        image,
        source,
        base,
        made or {},
        rows or {},
    )


def left_out(scans: Sequence[Scan]) -> list[str]:
    """Return a line each for labels and attributes that the index leaves out: which shard lacks them."""
    said = {line.partition(":")[0]: line for one in reversed(scans) for line in one.left_out}
    for what in ("labels", "attributes"):
        lacks = [one.name for one in scans if (one.label_N if what == "labels" else one.attributes) is None]
        if 0 < len(lacks) < len(scans):
            said.setdefault(what, f"{what}: shard {lacks[0]!r} has none, others have")
    if all(one.attributes for one in scans) and _same_attributes(scans) is None:
        said.setdefault("attributes", "attributes: their names differ between shards")
    return list(said.values())


def _check_keys(scans: Sequence[Scan], splits: Sequence[str]) -> None:
    names: set[str] = set()
    seen: dict[str, dict[str, str]] = {}  # the shard of each key, by split
    for one, split in zip(scans, splits, strict=True):
        if one.name in names:
            raise ValueError(f"shard {one.name!r} is there twice: give every shard a name of its own")
        names.add(one.name)
        shard_of = seen.setdefault(split, {})
        for key in one.keys:
            first = shard_of.setdefault(key, one.name)
            if first != one.name:
                raise ValueError(
                    f"key {key!r} is in shards {first!r} and {one.name!r} of split {split!r}: "
                    "give every sample a key of its own"
                )


def _labels(scans: Sequence[Scan], class_names: Sequence[str]) -> NDArray[np.int64] | None:
    if any(one.label_N is None for one in scans):
        return None
    label_N = np.concatenate([one.label_N for one in scans if one.label_N is not None])
    highest = int(label_N.max())
    if class_names and highest >= len(class_names):
        raise ValueError(
            f"class {highest} is in the shards, but class_names has {len(class_names)} names: give a name for each "
            f"class from 0 to {highest}"
        )
    return label_N


def _same_attributes(scans: Sequence[Scan]) -> Attributes | None:
    found = [one.attributes for one in scans if one.attributes is not None]
    if len(found) < len(scans) or any(names != found[0][0] for names, _ in found):
        return None
    return found[0][0], np.concatenate([values for _, values in found])
