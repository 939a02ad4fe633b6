"""Damage anywhere in what is stored is refused in one line that names the place, or changes nothing."""

from __future__ import annotations

import gzip
import io
import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mixdist.data.formats.idx import read_idx
from mixdist.data.shards.index import HEAD, SAMPLES, ShardIndex
from mixdist.data.shards.scan import scan_stream
from mixdist.data.shards.storage import LocalStorage
from mixdist.data.shards.verify import Verdict, examine
from tests import small_shards
from tests.tars import make_shards
from tests.test_index import same_index
from tests.test_scan import FORMATS, marker_end, same_scan, tar_of
from tests.test_scan import SAMPLES as MEMBERS

BITS = (0, 1, 2, 3, 4, 5, 6, 7)
THIRD = "train-000002.tar"


class Artefact(NamedTuple):
    """Something stored.

    Args:
        whole: its bytes.
        read: gives what bytes hold, or raises ValueError.
        end: cut before it, it is refused; cut behind it, it is the same.
        cuts: lengths to cut it to.
        flips: bytes to change.
        found: the part of the changes that must be found; the others must change nothing.
        named: what every refusal names.
        same: whether it holds the same.
        bits: to flip in each byte; one by its place where there is none.
    """

    whole: bytes
    read: Callable[[bytes], Any]
    end: int
    cuts: Iterable[int]
    flips: Sequence[int]
    found: float = 1.0
    named: str = ""
    same: Callable[[Any, Any], Any] = operator.eq
    bits: tuple[int, ...] = ()


def _index(name: str) -> Callable[[Path], Artefact]:
    def make(folder: Path) -> Artefact:
        make_shards(folder)
        files = {one: (folder / one).read_bytes() for one in (HEAD, SAMPLES)}
        whole = files[name]

        def read(data: bytes) -> ShardIndex:
            given = {**files, name: data}
            return ShardIndex.parse("x", given[HEAD], given[SAMPLES])

        num = len(whole)
        end = num - 1 if name == HEAD else num  # a line end is the last of JSON
        # Not found in JSON: blanks for blanks, and what is for people.
        found = 0.6 if name == HEAD else 0.999
        cuts = (*range(0, num, max(1, num // 60)), num - 2, num - 1)
        return Artefact(whole, read, end, cuts, range(0, num, 3), found, "the index of x", same_index)

    return make


def _members(folder: Path) -> Artefact:
    members = small_shards.make(folder, [[100, 0, 512, 3000]])
    path = folder / members[0].shard

    def read(data: bytes) -> list[bytes]:
        path.write_bytes(data)
        local = LocalStorage(folder)
        try:
            return [local.read(*one.place) for one in members]
        finally:
            local.close()

    whole, end = path.read_bytes(), max(one.offset + one.size for one in members)
    inside = [at for one in members for at in range(one.offset, one.offset + one.size, 7)]
    return Artefact(whole, read, end, range(0, len(whole), 97), inside, 1.0, f"{path.name}'")


def _archive(kind: str) -> Callable[[Path], Artefact]:
    def make(_: Path) -> Artefact:
        whole = tar_of([*MEMBERS, (f"{'l' * (90 if kind == 'ustar' else 200)}.jpg", b"x" * 600)], kind)
        cuts = (*range(0, len(whole), 512), *(n for n in range(1, marker_end(whole), 97) if n % 512))
        return Artefact(whole, _scanned, marker_end(whole), cuts, (), 1.0, "shard 'x.tar', byte ", same_scan)

    return make


def _header(_: Path) -> Artefact:
    whole, second = tar_of(MEMBERS, "gnu"), 1024
    # Not found: a blank for a NUL or a leading 0, around the digits of the checksum, which it does not cover.
    found, named = 1 - 8 / (512 * 8), f"shard 'x.tar', byte {second}:"
    return Artefact(whole, _scanned, 0, (), range(second, second + 512), found, named, same_scan, BITS)


def _scanned(data: bytes) -> Any:
    return scan_stream(io.BytesIO(data), "x.tar")


def _packed(folder: Path) -> Artefact:
    folder.mkdir(parents=True)
    whole = gzip.compress(b"\0\0\x08\x01\0\0\0\x40" + bytes(range(64)), mtime=0)
    path = folder / "train-labels-idx1-ubyte.gz"

    def read(data: bytes) -> list[int]:
        path.write_bytes(data)
        return list(read_idx(path, 1).tolist())

    # Not found: the time and the system in gzip's header.
    return Artefact(whole, read, len(whole), range(len(whole)), range(len(whole)), 0.85, path.name)


ARTEFACTS: dict[str, Callable[[Path], Artefact]] = {
    **{name: _index(name) for name in (HEAD, SAMPLES)},
    "members of a shard": _members,
    **{f"{kind} archive": _archive(kind) for kind in FORMATS},
    "header in an archive": _header,
    "packed idx file": _packed,
}


def _is_refused(one: Artefact, known: Any, data: bytes) -> bool:
    told = ""
    try:
        held = one.read(data)
    except ValueError as error:
        told = str(error)
    assert one.named in told if told else one.same(held, known)
    assert "\n" not in told
    return bool(told)


@pytest.mark.parametrize("kind", ARTEFACTS)
def test_cut_anywhere_it_is_refused(kind: str, tmp_path: Path) -> None:
    one = ARTEFACTS[kind](tmp_path / "x")
    known = one.read(one.whole)
    for length in one.cuts:
        assert _is_refused(one, known, one.whole[:length]) == (length < one.end), f"cut to {length}"


@pytest.mark.parametrize("kind", ARTEFACTS)
def test_any_flipped_bit_is_found_or_changes_nothing(kind: str, tmp_path: Path) -> None:
    one = ARTEFACTS[kind](tmp_path / "x")
    known, refused = one.read(one.whole), []
    for place in one.flips:
        for bit in one.bits or (place % 8,):
            hurt = bytearray(one.whole)
            hurt[place] ^= 1 << bit
            refused.append(_is_refused(one, known, bytes(hurt)))
    assert sum(refused) >= one.found * len(refused)


# What is told of a shard that differs from its index.


def _examined(part: ShardIndex, data: bytes) -> Verdict:
    return examine(io.BytesIO(data), part, decode=False)


@pytest.fixture
def shard(tmp_path: Path) -> tuple[ShardIndex, bytes]:
    part = make_shards(tmp_path).part(2)
    whole = (tmp_path / THIRD).read_bytes()
    assert _examined(part, whole).lines == []
    return part, whole


def test_a_flipped_bit_is_told_with_its_sample_or_outside_of_members_with_none(
    shard: tuple[ShardIndex, bytes],
) -> None:
    part, whole = shard
    inside: dict[int, tuple[int, int, int]] = {}
    for n in range(len(part)):
        for column, (offset, size) in enumerate(part.member_NM2[n].tolist()):
            inside |= dict.fromkeys(range(offset, offset + size), (n, column, offset))
    for place in range(0, len(whole), 61):
        hurt = bytearray(whole)
        hurt[place] ^= 1 << place % 8
        verdict = _examined(part, bytes(hurt))
        assert verdict.num_hurt == (place in inside)
        assert len(verdict.lines) == 1 + (place in inside)
        assert verdict.lines[0].startswith(f"shard '{THIRD}'")
        if place in inside:
            n, column, offset = inside[place]
            named = f"shard '{THIRD}', byte {offset}: {part.extensions[column]} of sample {14 + n} "
            assert verdict.lines[1].startswith(named)


def test_a_cut_shard_is_told_with_every_sample_that_is_lost(shard: tuple[ShardIndex, bytes]) -> None:
    part, whole = shard
    end_N = part.member_NM2.sum(-1).max(-1)
    for length in range(0, len(whole), 512):  # every boundary of a member is one
        verdict = _examined(part, whole[:length])
        assert verdict.lines[0].startswith(f"shard '{THIRD}' has {length} bytes")
        assert str(len(whole)) in verdict.lines[0]
        lost = {int(line.partition(" of sample ")[2].split()[0]) for line in verdict.lines[1:]}
        assert lost == {14 + n for n, end in enumerate(end_N) if end > length}
