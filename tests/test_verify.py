"""Damage to shards, found by shard, offset and id, whatever it is."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
from PIL import Image

from mixdist.data.shards.index import ShardIndex
from mixdist.data.shards.verify import MOST_TOLD
from tests.errors import refusal_of
from tests.launch import here
from tests.tars import COUNTS, encoded, image_of, make_index, make_shards, sample_of, write_shard

SECOND = "train-000002.tar"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_shards(tmp_path / "shards")
    return tmp_path / "shards"


def verify(*words: object) -> list[str]:
    """The lines of a verification that finds damage."""
    return refusal_of("verify", *words).out.splitlines()


def is_well(*words: object) -> bool:
    ended = here("verify", *map(str, words))
    assert ended.err == "" or ended.code == 2
    return ended.code == 0


def _change(path: Path, place: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= mask
    path.write_bytes(data)


def _where(index: ShardIndex, sample: int, extension: str) -> tuple[int, int]:
    offset, size = index.member_NM2[index.id_N.tolist().index(sample), index.extensions.index(extension)]
    return int(offset), int(size)


def test_whole_shards_are_well(folder: Path) -> None:
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    for words in ((), ("--decode",), ("--decode", "--workers", "2")):
        ended = here("verify", str(folder), *words)
        assert (ended.code, ended.err) == (0, "")
        (line,) = ended.out.splitlines()
        assert line.startswith("4 shards, 53 samples, ")
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


@pytest.mark.parametrize("extension", ["cls", "json", "png"])
def test_a_flipped_bit_is_found_in_its_sample(folder: Path, extension: str) -> None:
    offset, size = _where(ShardIndex.read(folder), 20, extension)
    _change(folder / SECOND, offset + size - 1)
    ended = refusal_of("verify", folder, named=("1 of 4 shards", "1 sample"))
    sha, member, total = ended.out.splitlines()
    assert sha.startswith(f"shard '{SECOND}'")
    assert "sha256" in sha
    assert member.startswith(f"shard '{SECOND}', byte {offset}: {extension} of sample 20 ")
    assert "1 shard and 1 sample" in total


def test_a_shard_that_is_cut_or_grew(folder: Path) -> None:
    whole = (folder / SECOND).read_bytes()
    for data in (whole[:-5000], whole + bytes(512), b""):
        (folder / SECOND).write_bytes(data)
        assert verify(folder)[0].startswith(f"shard '{SECOND}' has {len(data)} bytes, expected {len(whole)}")


def test_a_missing_and_a_strange_shard(folder: Path) -> None:
    whole = (folder / SECOND).read_bytes()
    (folder / SECOND).unlink()
    line = f"shard '{SECOND}' is missing: it has 30 samples, ids 14 to 43"
    assert line in verify(folder)
    assert line in verify(folder, "--workers", 2)
    (folder / SECOND).mkdir()
    assert verify(folder)[0].startswith(f"shard '{SECOND}' ")
    (folder / SECOND).rmdir()
    (folder / SECOND).write_bytes(whole)
    assert is_well(folder)
    write_shard(folder / "train-9.tar", [sample_of(99)])
    assert verify(folder)[0].startswith("shard 'train-9.tar' ")


def test_an_index_that_does_not_fit_its_shards(folder: Path, tmp_path: Path) -> None:
    # Shards of as many bytes, with other samples under the same names.
    for name, count in COUNTS.items():
        keys = (f"{name.removesuffix('.tar')}-{n}" for n in range(count))
        write_shard(folder / name, [{**sample_of(1000 + n), "__key__": key} for n, key in enumerate(keys)])
    assert len([line for line in verify(folder) if line.startswith(f"shard '{SECOND}'")]) == 1  # not one a sample
    # Two shards that changed places.
    make_index(folder, list(COUNTS))
    assert is_well(folder)
    first = folder / "train-000000.tar"
    first.rename(tmp_path / "aside")
    (folder / "test-000000.tar").rename(first)
    (tmp_path / "aside").rename(folder / "test-000000.tar")
    assert verify(folder)


def _png(width: int, height: int, rows: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_images_that_cannot_be_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg = encoded(image_of(0, 64), "JPEG")
    images = {
        "good": ("png", _png(2, 1, bytes(7))),  # a header made by hand is right
        "cut": ("jpg", jpeg[: len(jpeg) // 2]),
        "text": ("jpg", b"not an image"),
        "empty": ("png", b""),
        "bomb": ("png", _png(60_000, 60_000)),
        "large": ("png", _png(8_000, 7_000)),
        "larger": ("png", _png(10_000, 10_000)),  # Pillow only warns
        "gif": ("png", encoded(image_of(0), "GIF")),
        "webp": ("webp", encoded(image_of(0), "WEBP")),
        "jpeg": ("jpeg", jpeg),
    }
    write_shard(tmp_path / "train-0.tar", [{"__key__": key, kind: data} for key, (kind, data) in images.items()])
    index = make_index(tmp_path, ["train-0.tar"])
    assert is_well(tmp_path)  # the bytes are what they were
    loaded: list[tuple[int, int]] = []
    load = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda image: loaded.append(image.size) or load(image))
    tracemalloc.start()
    try:
        out = verify(tmp_path, "--decode")
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    bad = {"cut": "", "text": "", "empty": "", "bomb": 50_000_000, "large": 50_000_000, "larger": "10000 x 10000"}
    bad["gif"] = ""
    assert len(out) == len(bad) + 1
    for line, (key, named) in zip(out, bad.items(), strict=False):
        place = list(images).index(key)
        offset, _ = _where(index, place, images[key][0])
        assert line.startswith(f"shard 'train-0.tar', byte {offset}: {images[key][0]} of sample {place} ")
        assert str(named) in line
    assert not any(width * height > 10**6 for width, height in loaded)


def test_many_hurt_samples_are_counted(tmp_path: Path) -> None:
    num = MOST_TOLD + 20
    write_shard(tmp_path / "train-0.tar", [{"__key__": str(n), "jpg": b"no image"} for n in range(num)])
    make_index(tmp_path, ["train-0.tar"])
    ended = refusal_of("verify", tmp_path, "--decode", named=(f"{num} samples",))
    lines = ended.out.splitlines()
    assert len(lines) == MOST_TOLD + 2
    assert "20 more" in lines[MOST_TOLD]


def test_workers_tell_the_same_in_the_same_order(folder: Path) -> None:
    index = ShardIndex.read(folder)
    for i, shard in enumerate(index.shards):
        _change(folder / shard.name, int(index.part(i).member_NM2[0, -1, 0]))
    assert verify(folder) == verify(folder, "--workers", 3)


def test_what_the_command_refuses(tmp_path: Path) -> None:
    refusal_of("verify", tmp_path / "nowhere", named=("nowhere",))
    refusal_of("verify", tmp_path, named=(tmp_path, "mixdist index"))
    refusal_of("verify", tmp_path, "--workers", "-3", named=("--workers", -3, 1024))


def test_members_that_overlap_are_told(folder: Path) -> None:
    index = ShardIndex.read(folder)
    index.member_NM2[20, 0] = index.member_NM2[20, 1]  # an index made to mislead
    index.crc_NM[20, 0] = index.crc_NM[20, 1]
    index.write(folder)
    assert "of sample 20 " in verify(folder)[0]
