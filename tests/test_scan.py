"""The strict reader of tar shards, with tarfile and webdataset as judges: same members, or a refusal in one line."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from mixdist.data.shards.index import EXTENSIONS
from mixdist.data.shards.scan import Scan, assemble, left_out, scan, scan_stream
from mixdist.data.shards.tar import PIECE
from tests.errors import error_of
from tests.tars import sample_of

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
ATTRIBUTES = b'{"attributes": {"Round": 1, "Tall": false}}'
SAMPLES = [
    *(("a/000.jpg", b"one"), ("a/000.cls", b"3"), ("a/000.json", ATTRIBUTES)),
    *(("a/001.jpg", b""), ("a/001.cls", b" 10\n"), ("a/001.json", b'{"attributes": {"Tall": true, "Round": 0}}')),
    *(("a/002.JPG", bytes(range(256)) * 9), ("a/002.cls", b"0"), ("a/002.json", ATTRIBUTES)),
]
Members = list[tuple[str, bytes]]


def tar_of(members: Members, kind: str = "ustar", more: Callable[[tarfile.TarInfo], None] = lambda _: None) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=FORMATS[kind]) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            more(header)
            tar.addfile(header, io.BytesIO(data))
    return stream.getvalue()


def _of(data: bytes) -> Scan:
    return scan_stream(io.BytesIO(data), "x.tar")


def _refused(data: bytes, *named: object) -> str:
    told = error_of(lambda: _of(data), "shard 'x.tar', byte ", *named)
    assert told.count(": ") >= 2  # the place, what is wrong, the remedy
    return told


def same_scan(one: Scan, other: Scan) -> bool:
    same = np.array_equal(one.member_NM2, other.member_NM2) and np.array_equal(one.crc_NM, other.crc_NM)
    return same and one.keys == other.keys


def _judged(data: bytes) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Each file's offset, size and crc, by tarfile."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            if member.isfile():
                stream = tar.extractfile(member)
                assert stream is not None
                key, _, extension = member.name.removeprefix("./").rpartition(".")
                found[key, extension.lower()] = (member.offset_data, member.size, zlib.crc32(stream.read()))
    return found


def _found(one: Scan) -> dict[tuple[str, str], tuple[int, int, int]]:
    return {
        (key, extension): (*map(int, one.member_NM2[place, column]), int(one.crc_NM[place, column]))
        for place, key in enumerate(one.keys)
        for column, extension in enumerate(EXTENSIONS)
        if one.member_NM2[place, column, 0] >= 0
    }


def _expanded(data: bytes) -> Any:
    """The files that webdataset finds."""
    return webdataset.tariterators.tar_file_expander([{"url": "x", "stream": io.BytesIO(data)}])


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "folder", ["", "./", "train/n01/", f"{'f' * 90}/{'g' * 20}/", f"{'long/' * 60}", "bäume/木/", "with space/"]
)
def test_tarfile_finds_the_same_members(kind: str, folder: str) -> None:
    if kind == "ustar" and len(folder) > 255:
        pytest.skip("ustar has no names that long")
    random = np.random.default_rng(0)
    members = [
        (f"{folder}{key}.{extension}", b"7" if extension == "cls" else random.bytes(size))
        for key, size in enumerate((0, 1, 511, 512, 513, 5000, 3 * PIECE + 1))
        for extension in ("cls", "png", "txt", "npy")[: 1 + key % 4]
    ]
    data = tar_of(members, kind)
    one = _of(data)
    assert _found(one) == _judged(data)
    assert (one.num_bytes, len(one.keys)) == (len(data), 7)


def test_webdataset_finds_the_same_samples(tmp_path: Path) -> None:
    path = tmp_path / "train-0.tar"
    with webdataset.TarWriter(str(path)) as tar:  # with pax headers for its fractions of seconds
        for number in range(200):
            tar.write({**sample_of(number), "txt": "tree"} if number % 2 else sample_of(number))
    one, data = scan(path), path.read_bytes()
    assert (one.num_bytes, one.keys) == (len(data), [f"{number:09d}" for number in range(200)])
    files = {tuple(s["fname"].rsplit(".", 1)): s["data"] for s in _expanded(data) if "fname" in s}
    assert {name: data[at : at + size] for name, (at, size, _) in _found(one).items()} == files
    assert one.label_N is not None
    assert one.label_N.tolist() == [number % 3 for number in range(200)]
    assert one.attributes is not None
    assert one.attributes[0] == ("Round", "Tall")


@pytest.mark.parametrize("size", [1, 7, 512, 1000, 1 << 20])
def test_a_stream_in_pieces_of_any_size_is_the_file(tmp_path: Path, size: int) -> None:
    class Slow(io.BytesIO):
        def read(self, most: int | None = -1, /) -> bytes:
            return super().read(min(size, most or size))

    path = tmp_path / "x.tar"
    path.write_bytes(tar_of(SAMPLES))
    one, other = scan(path), scan_stream(Slow(path.read_bytes()), "x.tar")
    assert same_scan(one, other)
    assert (one.sha256, one.num_bytes, one.name) == (other.sha256, other.num_bytes, other.name)


def test_folders_and_global_headers_are_passed_over() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "a commit"}) as tar:
        for name in ("./", "a", "a/b"):
            header = tarfile.TarInfo(name)
            header.type = tarfile.DIRTYPE
            tar.addfile(header)
        header = tarfile.TarInfo("a/b/1.jpg")
        tar.addfile(header)
    assert _of(stream.getvalue()).keys == ["a/b/1"]


def test_absent_members_and_labels() -> None:
    one = _of(tar_of([("1.jpg", b"x"), ("2.jpg", b"y"), ("2.cls", b"4")]))
    assert {name for _, name in _found(one)} == {"cls", "jpg"}
    assert one.member_NM2[0, 0].tolist() == [-1, -1]
    assert one.crc_NM[0, 0] == 0
    assert one.label_N is None
    (line,) = one.left_out
    assert line.startswith("labels: 1 of 2 samples of shard 'x.tar'")
    whole = _of(tar_of(SAMPLES))
    assert whole.label_N is not None
    assert whole.label_N.tolist() == [3, 10, 0]
    assert whole.attributes is not None
    assert whole.attributes[0] == ("Round", "Tall")
    assert whole.attributes[1].tolist() == [[1, 0], [0, 1], [1, 0]]
    assert whole.left_out == ()


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ([b"{}", b"[1]"], False),
        ([b'{"attributes": 3}', b"no json"], False),
        ([b'{"attributes": {"a": 2}}', b'{"attributes": {"a": "1"}}'], False),
        ([b'{"attributes": {"a": 1.0}}', b'{"attributes": {}}'], False),
        ([b'{"attributes": {"a": 1}}', b"{}"], True),
        ([b'{"attributes": {"a": 1}}', b'{"attributes": {"b": 1}}'], True),
        ([b'{"attributes": {"a": 1}}', None], True),
        ([b'{"attributes": ' + b"[" * 100_000, b'"attributes"' + b"9" * 10_000], False),
    ],
)
def test_json_that_holds_no_attributes_is_carried(about: list[bytes | None], said: bool) -> None:
    pairs = [(i, pair) for i, text in enumerate(about) for pair in (("jpg", b""), ("json", text))]
    one = _of(tar_of([(f"{i}.{name}", data) for i, (name, data) in pairs if data is not None]))
    assert one.attributes is None
    assert "json" in {name for _, name in _found(one)}
    assert bool(one.left_out) == said


# Damage where webdataset is silent: cut at a member, a damaged header. All other damage is in test_damage.py.


def marker_end(data: bytes) -> int:
    """Where the end-of-archive marker ends."""
    last = max(at for at in range(0, len(data), 512) if any(data[at : at + 512]))
    return last + 3 * 512


def test_a_cut_at_any_member_is_refused_where_webdataset_is_silent() -> None:
    data = tar_of(SAMPLES)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        boundaries = [member.offset for member in tar]
    for boundary in boundaries:
        _refused(data[:boundary], f"byte {boundary}:")
        if boundary:
            list(_expanded(data[:boundary]))  # says nothing


def test_a_damaged_header_in_the_middle_is_refused_where_webdataset_is_silent() -> None:
    data = bytearray(tar_of(SAMPLES))
    data[2048 + 3] ^= 1
    _refused(bytes(data), "byte 2048:")
    assert len(list(_expanded(bytes(data)))) < len(SAMPLES)


def test_what_follows_the_marker_is_zeros() -> None:
    data = tar_of(SAMPLES)
    end = marker_end(data)
    for hurt in (data + data, data[:-1] + b"\1", data + b"\0", data[: end - 512] + data):
        _refused(hurt)
    for empty in (b"", bytes(10240)):
        _refused(empty, "byte 0:")


# Hostile or foreign members.


def _as(kind: bytes, **values: object) -> Callable[[tarfile.TarInfo], None]:
    def set_kind(header: tarfile.TarInfo) -> None:
        header.type = kind
        for name, value in values.items():
            setattr(header, name, value)

    return set_kind


@pytest.mark.parametrize(
    "kind",
    [
        *(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE),
        *(tarfile.CONTTYPE, b"Z"),
    ],
)
def test_only_plain_files_are_taken(kind: bytes) -> None:
    _refused(tar_of([("1.jpg", b"")], more=_as(kind, linkname="/etc/passwd")), "byte 0:", "'1.jpg'")


@pytest.mark.parametrize(
    "name",
    [
        *("../1.jpg", "a/../1.jpg", "a/../../etc/1.jpg", "..", "a/..", "/etc/1.jpg"),
        *("//1.jpg", "a//1.jpg", "a/./1.jpg"),
        *("a\\1.jpg", "..\\1.jpg", "a\n1.jpg", "a\x1b[31m.jpg", "a\u202e.jpg", "a\x7f/1.jpg", "./../1.jpg"),
        *("pipe:touch x.jpg", "file:a.jpg", "https://host/1.jpg", "C:1.jpg"),
    ],
)
@pytest.mark.parametrize("kind", FORMATS)
def test_unsafe_names_are_refused(name: str, kind: str) -> None:
    told = _refused(tar_of([("0.jpg", b""), (name, b"")], kind), repr(name.removeprefix("./")))
    assert any(f"byte {place}:" in told for place in (512, 1536))  # after a long name's own header


@pytest.mark.parametrize("name", ["..", "a/..", "../a", "/a", "/", "a//b", "a/./b", "a\\b", "a\nb", "a\x1bb"])
def test_unsafe_folders_are_refused(name: str) -> None:
    for end in (b"", b"/"):
        _refused(_header(name.encode() + end, kind=b"5") + END, "byte 0:", repr(name)[:-1])


@pytest.mark.parametrize(
    ("members", "named"),
    [
        (["1.pkl"], ("'1.pkl'", "'pkl'", "pickle")),
        (["1.pickle"], ("'pickle'",)),
        (["1.jpg", "1.pyd"], ("'pyd'", "pickle")),
        (["1.PT"], ("'pt'", "pickle")),
        (["1.seg.pth"], ("'pth'", "pickle")),
        (["1.exe"], ("'exe'", "cls, jpeg, jpg, json, npy, png, txt, webp")),
        (["1.jpg", "1.gz"], ("'gz'",)),
        (["README"], ("'README'",)),
        (["a/.jpg"], ("'a/.jpg'",)),
        (["._1.jpg"], ("'._1.jpg'",)),
        (["1."], ("'1.'",)),
        (["img.001.jpg", "img.002.jpg"], ("'img.001.jpg'",)),
        (["1.seg.png"], ("'1.seg.png'",)),
        (["1.jpg", "2.jpg", "1.cls"], ("key '1'", "'1.cls'")),
        (["a/1.jpg", "b/1.jpg", "a/1.jpg"], ("key 'a/1'", "'a/1.jpg'")),
        (["1.jpg", "2.jpg", "1.jpg"], ("key '1'",)),
        (["1.jpg", "1.jpg"], ("sample '1'", "'jpg'")),
        (["1.jpg", "1.JPG"], ("sample '1'", "'jpg'", "'1.JPG'")),
        (["1.jpg", "./1.jpg"], ("sample '1'", "'jpg'")),
    ],
)
def test_members_that_are_no_sample(members: list[str], named: tuple[str, ...]) -> None:
    _refused(tar_of([(name, b"") for name in members]), *named)


def test_dotted_keys_are_one_sample_to_webdataset() -> None:
    data = tar_of([("img.001.jpg", b"one"), ("img.002.jpg", b"two")])
    assert len(list(webdataset.tariterators.group_by_keys(_expanded(data)))) == 1
    _refused(data, "'img.001.jpg'")


@pytest.mark.parametrize("text", [b"", b"tench", b"-1", b"1.5", b"1_0", b"1" * 30, b"9" * 5000, b"\xb2", b"1 2"])
def test_a_class_is_a_whole_number(text: bytes) -> None:
    _refused(tar_of([("1.cls", text)]), "'1.cls'", repr(text[:20]))


def _header(name: bytes = b"1.jpg", size: bytes = b"00000000000\0", kind: bytes = b"0", magic: bytes = b"") -> bytes:
    """A header with a right checksum and whatever else."""
    head = bytearray(512)
    head[: len(name)] = name
    head[124:136], head[156:157], head[257:265] = size, kind, magic or b"ustar\x0000"
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


END = bytes(1024)


def _extended(kind: bytes, body: bytes) -> bytes:
    return _header(b"x", b"%011o\0" % len(body), kind) + body + bytes(-len(body) % 512)


def _pax(**records: str) -> bytes:
    def record(key: str, value: str) -> bytes:
        body = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(body) + 1
        while len(str(length)) + len(body) != length:
            length += 1
        return str(length).encode() + body

    return b"".join(record(*pair) for pair in records.items())


SIZES = (b"0000000000x\0", b"-0000000001\0", b"0o000000001\0", b"1_0 0000000\0", bytes(12), b"\xff" * 12)
RECORDS = (b"99 path=1.jpg\n", b"path=1.jpg\n", b"13 path=1.jpgX")
CUT = (b"\x80" + bytes(7) + b"\x00\x00\x04\x00", b"\x80" + b"\xff" * 11)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (_header(magic=bytes(8)) + END, ("byte 0:",)),
        (b"\x1f\x8b" + bytes(510), ("byte 0:", "unpack")),
        *((_header(size=size) + END, ("byte 0:", repr(size))) for size in SIZES),
        *((_header(size=size) + END, ("byte 1536:",)) for size in CUT),
        (_header(size=b"77777777777\0") + END, ("byte 1536:", "'1.jpg'", 8589934591, 512)),
        (_header(b"\xff\xfe.jpg") + END, (r"b'\xff\xfe.jpg'", "UTF-8")),
        (_header(b"a\0../b.jpg" + b"c" * 90) + END, ("byte 0:", r"a\x00../b.jpg")),
        (_header(b"") + END, ("byte 0:", "''")),
        (_header(b"a/", kind=b"0") + END, ("byte 0:", "'a/'")),
        (_header(b"a/", b"00000000001\0", b"5") + END, ("'a/'", 1)),
        (_extended(b"L", b"../1.jpg\0") + _header() + END, ("byte 1024:", "'../1.jpg'")),
        (_extended(b"L", b"1.pkl\0") + _header() + END, ("'pkl'",)),
        (_extended(b"L", b"2.jpg\0") * 2 + _header() + END, ("byte 1024:",)),
        (_extended(b"L", b"2.jpg\0") + END, ("byte 1024:",)),
        (_extended(b"L", b"x" * 70_000) + _header() + END, ("byte 0:", 70_000, 65_536)),
        (_extended(b"K", b"/etc/passwd\0") + _header() + END, ("byte 0:", "long link")),
        (_extended(b"x", _pax(path="/1.jpg")) + _header() + END, ("'/1.jpg'",)),
        (_extended(b"x", _pax(path="a\0.jpg")) + _header() + END, (r"'a\x00.jpg'",)),
        (_extended(b"x", _pax(path="2.jpg") * 2) + _header() + END, ("'path'",)),
        (_extended(b"x", _pax(path="2.jpg")) * 2 + _header() + END, ("byte 1024:",)),
        (_extended(b"x", _pax(size="512")) + _header() + END, ("'1.jpg'", "0 bytes", 512)),
        (_extended(b"x", _pax(size="-1")) + _header() + END, ("b'-1'",)),
        (_extended(b"x", _pax(size="0")) * 2 + _header() + END, ("byte 1024:",)),
        (_extended(b"x", _pax(linkpath="/etc")) + _header() + END, ("'linkpath'",)),
        (_extended(b"x", _pax(GNU__sparse__major="1")) + _header() + END, ("'GNU.sparse.major'",)),
        (_extended(b"x", _pax(hdrcharset="BINARY")) + _header() + END, ("'hdrcharset'",)),
        *((_extended(b"x", text) + _header() + END, ("pax", "byte 0")) for text in RECORDS),
        (_extended(b"g", _pax(path="1.jpg")) + _header() + END, ("'path'",)),
        (_extended(b"g", _pax(size="1")) + _header() + END, ("'size'",)),
    ],
)
def test_headers_made_to_mislead(data: bytes, named: tuple[object, ...]) -> None:
    _refused(data, *named)


def test_extended_headers_that_are_plain() -> None:
    assert _of(_extended(b"x", _pax(path="2.jpg", size="0", mtime="1.5")) + _header() + END).keys == ["2"]
    assert _of(_extended(b"L", b"3.jpg\0") + _extended(b"x", _pax(mtime="1.5")) + _header() + END).keys == ["3"]
    assert _of(_header(size=b"\x80" + bytes(11)) + END).keys == ["1"]
    assert _of(_header(kind=b"\0") + END).keys == ["1"]
    # A GNU header has other things where a POSIX one has the first part of its name.
    head = bytearray(_header(magic=b"ustar  \0"))
    head[345:356] = b"14000000000"
    _refused(bytes(head) + END, "byte 0:")


def test_memory_follows_the_archive_and_not_its_claims() -> None:
    tracemalloc.start()
    try:
        for size in (b"77777777777\0", b"\x80" + b"\xff" * 11):
            _refused(_header(size=size) + bytes(4 << 20), "'1.jpg'")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_no_file_and_no_plain_file(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.tar", tmp_path):
        error_of(lambda path=path: scan(path), path)


# Shards together.


def _named(name: str, members: Members) -> Scan:
    return scan_stream(io.BytesIO(tar_of(members)), name)


def test_shards_are_put_together() -> None:
    one = _named("train-0.tar", [("1.jpg", b"x"), ("1.cls", b"1"), ("2.jpg", b"y"), ("2.cls", b"0")])
    two = _named("train-1.tar", [("3.cls", b"2"), ("3.txt", b"z")])
    index = assemble([one, two], ["train", "valid"], class_names=("a", "b", "c"), base="https://host/", source="me")
    assert index.extensions == ("cls", "jpg", "txt")
    assert index.id_N.tolist() == [0, 1, 2]
    assert [shard.first_id for shard in index.shards] == [0, 2]
    assert index.label_N is not None
    assert index.label_N.tolist() == [1, 0, 2]
    assert index.member_NM2[:, 1, 1].tolist() == [1, 1, -1]
    assert index.member_NM2[:, 2, 1].tolist() == [-1, -1, 1]
    assert index.crc_NM[2].tolist() == [zlib.crc32(b"2"), 0, zlib.crc32(b"z")]
    assert (index.class_names, index.base, index.source, index.made) == (("a", "b", "c"), "https://host/", "me", {})
    given = assemble([one, two], ["train", "valid"], [np.array([5, 9]), np.array([2])])
    assert given.id_N.tolist() == [5, 9, 2]


def test_labels_and_attributes_are_of_all_or_none() -> None:
    full, bare = _named("a.tar", SAMPLES), _named("b.tar", [("x.jpg", b"")])
    index = assemble([full, bare], ["train", "train"], class_names=["c"] * 11)
    assert (index.label_N, index.attribute_NA, index.class_names, index.attribute_names) == (None, None, (), ())
    assert [(line.split(":")[0], "'b.tar'" in line) for line in left_out([full, bare])] == [
        ("labels", True),
        ("attributes", True),
    ]
    assert left_out([full]) == left_out([bare]) == []
    other = _named("c.tar", [("y.json", b'{"attributes": {"Tall": 1}}'), ("y.cls", b"1")])
    assert [line.split(":")[0] for line in left_out([full, other])] == ["attributes"]
    both = assemble([full, _named("d.tar", [(f"z/{n}", d) for n, d in SAMPLES])], ["train", "train"])
    assert both.attribute_NA is not None
    assert both.attribute_NA.tolist() == [[1, 0], [0, 1], [1, 0]] * 2


def test_shards_that_do_not_fit_each_other() -> None:
    one, two = _named("a.tar", [("1.jpg", b""), ("1.cls", b"4")]), _named("b.tar", [("1.jpg", b"")])
    error_of(lambda: assemble([one, two], ["train", "train"]), "key '1'", "'a.tar'", "'b.tar'", "'train'")
    assert len(assemble([one, two], ["train", "test"])) == 2
    error_of(lambda: assemble([one, one], ["train", "test"]), "'a.tar'")
    error_of(lambda: assemble([one], ["train"], class_names=["a", "b", "c", "d"]), "class 4", "class_names", 4)
    error_of(lambda: assemble([], []))
    foreign = _named("pipe:touch x.tar", [("1.jpg", b"")])
    error_of(lambda: assemble([foreign], ["train"]), "'pipe:touch x.tar'")
