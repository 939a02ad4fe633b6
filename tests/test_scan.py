"""The strict reader of tar shards, with tarfile and webdataset as judges: same members, or a refusal in one line."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from mixdist.data.shards.scan import Scan, assemble, left_out, scan, scan_stream
from mixdist.data.shards.tar import PIECE
from tests.tars import sample_of, write_shard

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
ATTRIBUTES = b'{"attributes": {"Round": 1, "Tall": false}}'
SAMPLES = [
    *(("a/000.jpg", b"one"), ("a/000.cls", b"3"), ("a/000.json", ATTRIBUTES)),
    *(("a/001.jpg", b""), ("a/001.cls", b" 10\n"), ("a/001.json", b'{"attributes": {"Tall": true, "Round": 0}}')),
    *(("a/002.JPG", bytes(range(256)) * 9), ("a/002.cls", b"0"), ("a/002.json", ATTRIBUTES)),
]
Members = list[tuple[str, bytes]]


def _tar(members: Members, kind: str = "ustar", more: Callable[[tarfile.TarInfo], None] = lambda _: None) -> bytes:
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


def _refused(data: bytes, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        _of(data)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("shard 'x.tar', byte ")
    assert str(caught.value).count(": ") >= 2  # the place, what is wrong, the remedy


def _same(one: Scan, other: Scan) -> bool:
    return (
        (one.keys, one.extensions) == (other.keys, other.extensions)
        and np.array_equal(one.member_NM2, other.member_NM2)
        and np.array_equal(one.crc_NM, other.crc_NM)
    )


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
        for column, extension in enumerate(one.extensions)
        if one.member_NM2[place, column, 0] >= 0
    }


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
    data = _tar(members, kind)
    one = _of(data)
    assert _found(one) == _judged(data)
    assert (one.num_bytes, len(one.keys)) == (len(data), 7)


def test_webdataset_finds_the_same_samples(tmp_path: Path) -> None:
    path = tmp_path / "train-0.tar"
    with webdataset.TarWriter(str(path)) as tar:  # with pax headers for its fractions of seconds
        for number in range(5):
            tar.write({**sample_of(number), "txt": "tree"} if number % 2 else sample_of(number))
    one, data = scan(path), path.read_bytes()
    assert one.num_bytes == len(data)
    with path.open("rb") as stream:
        samples = list(webdataset.tariterators.tar_file_expander([{"url": "x", "stream": stream}]))
    files = {(s["fname"].rpartition(".")[0], s["fname"].rpartition(".")[2]): s["data"] for s in samples if "fname" in s}
    assert {name: data[at : at + size] for name, (at, size, _) in _found(one).items()} == files
    assert one.label_N is not None
    assert one.label_N.tolist() == [0, 1, 2, 0, 1]
    assert one.attributes is not None
    assert one.attributes[0] == ("Round", "Tall")


@pytest.mark.parametrize("size", [1, 7, 512, 1000, 1 << 20])
def test_a_stream_in_pieces_of_any_size_is_the_file(tmp_path: Path, size: int) -> None:
    class Slow(io.BytesIO):
        def read(self, most: int | None = -1, /) -> bytes:
            return super().read(min(size, most or size))

    path = tmp_path / "x.tar"
    path.write_bytes(_tar(SAMPLES))
    one, other = scan(path), scan_stream(Slow(path.read_bytes()), "x.tar")
    assert _same(one, other)
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
    one = _of(_tar([("1.jpg", b"x"), ("2.jpg", b"y"), ("2.cls", b"4")]))
    assert one.extensions == ("cls", "jpg")
    assert one.member_NM2[0, 0].tolist() == [-1, -1]
    assert one.crc_NM[0, 0] == 0
    assert one.label_N is None
    assert one.left_out == ("labels: 1 of 2 samples of shard 'x.tar' have a cls",)
    whole = _of(_tar(SAMPLES))
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
    members = [
        (f"{i}.{name}", data)
        for i, text in enumerate(about)
        for name, data in (("jpg", b""), ("json", text))
        if data is not None
    ]
    one = _of(_tar(members))
    assert one.attributes is None
    assert "json" in one.extensions
    assert bool(one.left_out) == said


# Damage. webdataset's silent cases (cut at a member, damaged header, cut inside a member) are here.


def _marker(data: bytes) -> int:
    """Where the end-of-archive marker ends."""
    last = max(at for at in range(0, len(data), 512) if any(data[at : at + 512]))
    return last + 3 * 512


@pytest.mark.parametrize("kind", FORMATS)
def test_a_shard_cut_at_any_block_is_refused(kind: str) -> None:
    data = _tar([*SAMPLES, (f"{'l' * (90 if kind == 'ustar' else 200)}.jpg", b"x" * 600)], kind)
    whole, end = _of(data), _marker(data)
    for length in range(0, len(data), 512):
        if length < end:
            _refused(data[:length], "the archive ends|one block of zeros")
        else:
            assert _same(_of(data[:length]), whole)  # zeros after the marker belong to no sample
    for length in range(1, end, 97):
        if length % 512:
            _refused(data[:length], "the archive ends|are left, expected a header|one block of zeros")


def test_a_cut_at_any_member_is_refused_where_webdataset_is_silent() -> None:
    data = _tar(SAMPLES)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        boundaries = [member.offset for member in tar]
    for boundary in boundaries:
        _refused(data[:boundary], f"byte {boundary}: .*ends without its end-of-archive marker")
        if boundary:
            url = [{"url": "x", "stream": io.BytesIO(data[:boundary])}]
            list(webdataset.tariterators.tar_file_expander(url))  # says nothing


def test_any_flipped_byte_of_a_header_is_found() -> None:
    data, harmless, told = _tar(SAMPLES, "gnu"), set(), set()
    whole = _of(data)
    place = 512 * 2  # the second member's header
    for byte in range(512):
        for mask in (*(1 << bit for bit in range(8)), 0xFF):
            hurt = bytearray(data)
            hurt[place + byte] ^= mask
            try:
                one = _of(bytes(hurt))
            except ValueError as error:
                told.add(str(error).partition(":")[0])
            else:
                assert _same(one, whole)
                assert one.sha256 != whole.sha256
                harmless.add((byte, mask))
    assert told == {f"shard 'x.tar', byte {place}"}
    # A space for a NUL or a leading 0, around the digits of the checksum, which it does not cover.
    assert {byte for byte, _ in harmless} <= set(range(148, 156))
    assert len(harmless) < 8


def test_a_damaged_header_in_the_middle_is_refused_where_webdataset_is_silent() -> None:
    data = bytearray(_tar(SAMPLES))
    data[2048 + 3] ^= 1
    _refused(bytes(data), "byte 2048: the header differs from its checksum")
    found = list(webdataset.tariterators.tar_file_expander([{"url": "x", "stream": io.BytesIO(bytes(data))}]))
    assert len(found) < len(SAMPLES)


def test_what_follows_the_marker_is_zeros() -> None:
    data = _tar(SAMPLES)
    _refused(data + data, "bytes follow the end-of-archive marker")
    _refused(data[:-1] + b"\1", "bytes follow the end-of-archive marker")
    _refused(data + b"\0", "size is no multiple of 512")
    end = _marker(data)
    _refused(data[: end - 512] + data, "one block of zeros, expected the end-of-archive marker of two")
    _refused(b"", "byte 0: the archive ends without its end-of-archive marker")
    _refused(bytes(10240), "has no sample")


# Hostile or foreign members.


def _as(kind: bytes, **values: object) -> Callable[[tarfile.TarInfo], None]:
    def set_kind(header: tarfile.TarInfo) -> None:
        header.type = kind
        for name, value in values.items():
            setattr(header, name, value)

    return set_kind


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (tarfile.LNKTYPE, "is a hard link, expected a plain file"),
        (tarfile.SYMTYPE, "is a symbolic link, expected a plain file"),
        (tarfile.CHRTYPE, "is a character device"),
        (tarfile.BLKTYPE, "is a block device"),
        (tarfile.FIFOTYPE, "is a fifo"),
        (tarfile.GNUTYPE_SPARSE, "is a sparse file"),
        (tarfile.CONTTYPE, "is a member of type b'7'"),
        (b"Z", "is a member of type b'Z'"),
    ],
)
def test_only_plain_files_are_taken(kind: bytes, match: str) -> None:
    _refused(_tar([("1.jpg", b"")], more=_as(kind, linkname="/etc/passwd")), f"'1.jpg' {match}")


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../1.jpg",
            "a/../1.jpg",
            "a/../../etc/1.jpg",
            "..",
            "a/..",
            "/etc/1.jpg",
            "//1.jpg",
            "a//1.jpg",
            "a/./1.jpg",
        ),
        *("a\\1.jpg", "..\\1.jpg", "a\n1.jpg", "a\x1b[31m.jpg", "a\u202e.jpg", "a\x7f/1.jpg", "./../1.jpg"),
        *("pipe:touch x.jpg", "file:a.jpg", "https://host/1.jpg", "C:1.jpg", "././1.jpg", "/.jpg"),
    ],
)
@pytest.mark.parametrize("kind", FORMATS)
def test_unsafe_names_are_refused(name: str, kind: str) -> None:
    _refused(_tar([("0.jpg", b""), (name, b"")], kind), "byte (512|1536): the name .* is unsafe")


@pytest.mark.parametrize("name", ["..", "a/..", "../a", "/a", "/", "a//b", "a/./b", "a\\b", "a\nb", "a\x1bb"])
def test_unsafe_folders_are_refused(name: str) -> None:
    _refused(_header(name.encode(), kind=b"5") + END, "is unsafe")
    _refused(_header(name.encode() + b"/", kind=b"5") + END, "is unsafe")


@pytest.mark.parametrize(
    ("members", "match"),
    [
        (["1.pkl"], "'1.pkl' has the extension 'pkl': pickles are never read"),
        (["1.pickle"], "pickles are never read"),
        (["1.jpg", "1.pyd"], "pickles are never read"),
        (["1.PT"], "pickles are never read"),
        (["1.seg.pth"], "pickles are never read"),
        (["1.exe"], "has the extension 'exe', expected cls, jpeg, jpg, json, npy, png, txt, webp"),
        (["1.jpg", "1.gz"], "has the extension 'gz'"),
        (["README"], "has no extension"),
        (["a/.jpg"], "has no key before its dot"),
        (["._1.jpg"], "has no key before its dot"),
        (["1."], "has no extension"),
        (["img.001.jpg", "img.002.jpg"], "'img.001.jpg' has a dotted key"),
        (["1.seg.png"], "dotted key"),
        (["1.jpg", "2.jpg", "1.cls"], "key '1' of '1.cls' comes again after other samples"),
        (["a/1.jpg", "b/1.jpg", "a/1.jpg"], "key 'a/1' of 'a/1.jpg' comes again"),
        (["1.jpg", "2.jpg", "1.jpg"], "comes again after other samples .a duplicate, or interleaved."),
        (["1.jpg", "1.jpg"], "sample '1' has a second 'jpg'"),
        (["1.jpg", "1.JPG"], "sample '1' has a second 'jpg'"),
        (["1.jpg", "./1.jpg"], "sample '1' has a second 'jpg'"),
    ],
)
def test_members_that_are_no_sample(members: list[str], match: str) -> None:
    _refused(_tar([(name, b"") for name in members]), match)


def test_dotted_keys_are_one_sample_to_webdataset() -> None:
    data = _tar([("img.001.jpg", b"one"), ("img.002.jpg", b"two")])
    files = webdataset.tariterators.tar_file_expander([{"url": "x", "stream": io.BytesIO(data)}])
    assert len(list(webdataset.tariterators.group_by_keys(files))) == 1
    _refused(data, "dotted key")


@pytest.mark.parametrize("text", [b"", b"tench", b"-1", b"1.5", b"1_0", b"1" * 30, b"9" * 5000, b"\xb2", b"1 2"])
def test_a_class_is_a_whole_number(text: bytes) -> None:
    _refused(_tar([("1.cls", text)]), "'1.cls' holds .*, expected a class as a whole number from 0")


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


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (_header(magic=bytes(8)) + END, "no header of a POSIX or GNU tar"),
        (b"\x1f\x8b" + bytes(510), "the file is packed: unpack it first"),
        (_header(size=b"0000000000x\0") + END, "the size .* is no number"),
        (_header(size=b"-0000000001\0") + END, "the size .* is no number"),
        (_header(size=b"0o000000001\0") + END, "the size .* is no number"),
        (_header(size=b"1_0 0000000\0") + END, "the size .* is no number"),
        (_header(size=bytes(12)) + END, "the size .* is no number"),
        (_header(size=b"\xff" * 12) + END, "the size .* is no number"),
        (_header(size=b"\x80" + bytes(7) + b"\x00\x00\x04\x00") + END, "ends without its end-of-archive marker"),
        (_header(size=b"\x80" + b"\xff" * 11) + END, "the archive ends inside"),
        (_header(size=b"77777777777\0") + END, "the archive ends inside '1.jpg', whose 8589934591 bytes begin at 512"),
        (_header(b"\xff\xfe.jpg") + END, "is not UTF-8"),
        (_header(b"a\0../b.jpg" + b"c" * 90) + END, "is unsafe"),
        (_header(b"") + END, "is unsafe"),
        (_header(b"a/", kind=b"0") + END, "is unsafe"),
        (_header(b"a/", b"00000000001\0", b"5") + END, "the folder 'a/' has 1 bytes"),
        (_extended(b"L", b"../1.jpg\0") + _header() + END, "is unsafe"),
        (_extended(b"L", b"1.pkl\0") + _header() + END, "pickles are never read"),
        (_extended(b"L", b"2.jpg\0") * 2 + _header() + END, "has two long names"),
        (_extended(b"L", b"2.jpg\0") + END, "ends after an extended header"),
        (_extended(b"L", b"x" * 70_000) + _header() + END, "extended header of 70000 bytes, expected at most 65536"),
        (_extended(b"K", b"/etc/passwd\0") + _header() + END, "is a long link"),
        (_extended(b"x", _pax(path="/1.jpg")) + _header() + END, "is unsafe"),
        (_extended(b"x", _pax(path="a\0.jpg")) + _header() + END, "is unsafe"),
        (_extended(b"x", _pax(path="2.jpg") * 2) + _header() + END, "has 'path' twice"),
        (_extended(b"x", _pax(path="2.jpg")) * 2 + _header() + END, "has two long names"),
        (_extended(b"x", _pax(size="512")) + _header() + END, "has 0 bytes by its header and 512 by its pax header"),
        (_extended(b"x", _pax(size="-1")) + _header() + END, "the pax size b'-1' is no number"),
        (_extended(b"x", _pax(size="0")) * 2 + _header() + END, "has two long names or sizes"),
        (_extended(b"x", _pax(linkpath="/etc")) + _header() + END, "a pax record 'linkpath'"),
        (_extended(b"x", _pax(GNU__sparse__major="1")) + _header() + END, "a pax record 'GNU.sparse.major'"),
        (_extended(b"x", _pax(hdrcharset="BINARY")) + _header() + END, "a pax record 'hdrcharset'"),
        (_extended(b"x", b"99 path=1.jpg\n") + _header() + END, "a pax header is damaged at byte 0"),
        (_extended(b"x", b"path=1.jpg\n") + _header() + END, "a pax header is damaged"),
        (_extended(b"x", b"13 path=1.jpgX") + _header() + END, "a pax header is damaged"),
        (_extended(b"g", _pax(path="1.jpg")) + _header() + END, "a pax record 'path'"),
        (_extended(b"g", _pax(size="1")) + _header() + END, "a pax record 'size'"),
    ],
)
def test_headers_made_to_mislead(data: bytes, match: str) -> None:
    _refused(data, match)


def test_extended_headers_that_are_plain() -> None:
    assert _of(_extended(b"x", _pax(path="2.jpg", size="0", mtime="1.5")) + _header() + END).keys == ["2"]
    assert _of(_extended(b"L", b"3.jpg\0") + _extended(b"x", _pax(mtime="1.5")) + _header() + END).keys == ["3"]
    assert _of(_header(size=b"\x80" + bytes(11)) + END).keys == ["1"]
    assert _of(_header(kind=b"\0") + END).keys == ["1"]
    # A GNU header has other things where a POSIX one has the first part of its name.
    head = bytearray(_header(magic=b"ustar  \0"))
    head[345:356] = b"14000000000"
    _refused(bytes(head) + END, "no header of a POSIX or GNU tar")


def test_memory_follows_the_archive_and_not_its_claims() -> None:
    tracemalloc.start()
    try:
        for size in (b"77777777777\0", b"\x80" + b"\xff" * 11):
            _refused(_header(size=size) + bytes(4 << 20), "the archive ends inside")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_no_file_and_no_plain_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.tar' is no file"):
        scan(tmp_path / "nowhere.tar")
    with pytest.raises(ValueError, match="is no file"):
        scan(tmp_path)


# Shards together.


def _named(name: str, members: Members) -> Scan:
    return scan_stream(io.BytesIO(_tar(members)), name)


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
    assert left_out([full, bare]) == [
        "labels: shard 'b.tar' has none, others have",
        "attributes: shard 'b.tar' has none, others have",
    ]
    assert left_out([full]) == left_out([bare]) == []
    other = _named("c.tar", [("y.json", b'{"attributes": {"Tall": 1}}'), ("y.cls", b"1")])
    assert left_out([full, other]) == ["attributes: their names differ between shards"]
    both = assemble([full, _named("d.tar", [(f"z/{n}", d) for n, d in SAMPLES])], ["train", "train"])
    assert both.attribute_NA is not None
    assert both.attribute_NA.tolist() == [[1, 0], [0, 1], [1, 0]] * 2


def test_shards_that_do_not_fit_each_other() -> None:
    one, two = _named("a.tar", [("1.jpg", b""), ("1.cls", b"4")]), _named("b.tar", [("1.jpg", b"")])
    with pytest.raises(ValueError, match=r"key '1' is in shards 'a.tar' and 'b.tar' of split 'train'"):
        assemble([one, two], ["train", "train"])
    assert len(assemble([one, two], ["train", "test"])) == 2
    with pytest.raises(ValueError, match=r"shard 'a.tar' is there twice"):
        assemble([one, one], ["train", "test"])
    with pytest.raises(ValueError, match="class 4 is in the shards, but class_names has 4 names"):
        assemble([one], ["train"], class_names=["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="there is no shard"):
        assemble([], [])
    with pytest.raises(ValueError, match=r"shard 'pipe:touch x.tar' must be a plain name"):
        assemble([_named("pipe:touch x.tar", [("1.jpg", b"")])], ["train"])


def test_many_samples_are_scanned_in_order(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.tar", [sample_of(number) for number in range(200)])
    one = scan(tmp_path / "x.tar")
    assert one.keys == [f"{number:09d}" for number in range(200)]
    assert one.label_N is not None
    np.testing.assert_array_equal(one.label_N, np.arange(200) % 3)
    data = (tmp_path / "x.tar").read_bytes()
    for place, extension in ((0, "png"), (199, "json")):
        at, size = one.member_NM2[place, one.extensions.index(extension)]
        assert data[at : at + size] == (
            sample_of(place)[extension] if extension == "png" else str(sample_of(place)["json"]).encode()
        )
    assert json.loads(data[at : at + size])["name"] == "199.png"
