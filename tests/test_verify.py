"""Damage to shards, found by shard, offset and id, whatever it is."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixdist.cli.main import main
from mixdist.data.shards.index import ShardIndex
from mixdist.data.shards.verify import MOST_TOLD, Verdict, examine
from tests.tars import COUNTS, encoded, image_of, make_index, make_shards, sample_of, write_shard

Run = Callable[..., tuple[int, list[str], str]]
SECOND = "train-000002.tar"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_shards(tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: object) -> tuple[int, list[str], str]:
        code = main(["verify", *map(str, words)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        if code:
            assert code == 2
            assert err.startswith("mixdist: ")
            assert err.count("\n") == 1
        else:
            assert err == ""
        return code, out.splitlines(), err

    return call


def _change(path: Path, place: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= mask
    path.write_bytes(data)


def _where(index: ShardIndex, sample: int, extension: str) -> tuple[int, int]:
    offset, size = index.member_NM2[index.id_N.tolist().index(sample), index.extensions.index(extension)]
    return int(offset), int(size)


def test_whole_shards_are_well(folder: Path, verify: Run) -> None:
    for words in ((), ("--decode",), ("--decode", "--workers", 2)):
        code, out, _ = verify(folder, *words)
        assert code == 0
        (line,) = out
        assert line.startswith("4 shards, 53 samples, ")
        assert line.endswith(": all is well")


@pytest.mark.parametrize("extension", ["cls", "json", "png"])
@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_is_found_in_its_sample(folder: Path, verify: Run, extension: str, bit: int) -> None:
    offset, size = _where(ShardIndex.read(folder), 20, extension)
    _change(folder / SECOND, offset + (size - 1) * (bit % 2), 1 << bit)
    code, out, err = verify(folder)
    assert code == 2
    assert out[0] == f"shard '{SECOND}' differs from its sha256"
    assert out[1].startswith(
        f"shard '{SECOND}', byte {offset}: {extension} of sample 20 has other bytes than the index"
    )
    assert out[2].endswith("MB: 1 shard and 1 sample are damaged")
    assert len(out) == 3
    assert "(1 of 4 shards, 1 sample)" in err


def _examined(part: ShardIndex, data: bytes) -> Verdict:
    return examine(io.BytesIO(data), part, decode=False)


def test_a_flipped_byte_outside_the_members_is_found(folder: Path) -> None:
    part, whole, inside = ShardIndex.read(folder).part(2), (folder / SECOND).read_bytes(), set()
    for offset, size in part.member_NM2.reshape(-1, 2).tolist():
        inside.update(range(offset, offset + size))
    outside = sorted(set(range(len(whole))) - inside)
    for place in outside[::61]:
        hurt = bytearray(whole)
        hurt[place] ^= 1 << place % 8
        verdict = _examined(part, bytes(hurt))
        assert verdict.num_hurt == 0
        (line,) = verdict.lines
        assert line.startswith(f"shard '{SECOND}' differs from its sha256, but in headers or padding only")


def test_a_shard_cut_anywhere_is_found(folder: Path, verify: Run) -> None:
    part, whole = ShardIndex.read(folder).part(2), (folder / SECOND).read_bytes()
    end_N = part.member_NM2.sum(-1).max(-1)
    for length in range(0, len(whole), 512):  # every boundary of a member is one
        verdict = _examined(part, whole[:length])
        assert verdict.lines[0] == f"shard '{SECOND}' has {length} bytes, expected {len(whole)}"
        lost = {int(line.partition(" of sample ")[2].split()[0]) for line in verdict.lines if "is cut off" in line}
        assert lost == {14 + n for n, end in enumerate(end_N) if end > length}
    for data in (whole[:-5000], whole + bytes(512)):
        (folder / SECOND).write_bytes(data)
        code, out, _ = verify(folder)
        assert code == 2
        assert out[0] == f"shard '{SECOND}' has {len(data)} bytes, expected {len(whole)}"


def test_a_missing_an_empty_and_a_strange_shard(folder: Path, verify: Run) -> None:
    whole = (folder / SECOND).read_bytes()
    (folder / SECOND).unlink()
    line = f"shard '{SECOND}' is missing: it has 30 samples, ids 14 to 43"
    assert line in verify(folder)[1]
    assert line in verify(folder, "--workers", 2)[1]
    (folder / SECOND).mkdir()
    assert f"shard '{SECOND}' is no plain file" in verify(folder)[1][0]
    (folder / SECOND).rmdir()
    (folder / SECOND).write_bytes(b"")
    assert verify(folder)[1][0] == f"shard '{SECOND}' has 0 bytes, expected {len(whole)}"
    (folder / SECOND).write_bytes(whole)
    assert verify(folder)[0] == 0
    write_shard(folder / "train-9.tar", [sample_of(99)])
    code, out, _ = verify(folder)
    assert code == 2
    assert out[0] == "shard 'train-9.tar' is in the folder, but not in its index"


def test_an_index_that_does_not_fit_its_shards(folder: Path, verify: Run, tmp_path: Path) -> None:
    # Shards of as many bytes, with other samples under the same names.
    for name, count in COUNTS.items():
        keys = (f"{name.removesuffix('.tar')}-{n}" for n in range(count))
        write_shard(folder / name, [{**sample_of(1000 + n), "__key__": key} for n, key in enumerate(keys)])
    code, out, _ = verify(folder)
    assert code == 2
    assert f"shard '{SECOND}' is another file than the index was made for: no sample is where it should be" in out
    # Two shards that changed places.
    make_index(folder, list(COUNTS))
    assert verify(folder)[0] == 0
    first = folder / "train-000000.tar"
    first.rename(tmp_path / "aside")
    (folder / "test-000000.tar").rename(first)
    (tmp_path / "aside").rename(folder / "test-000000.tar")
    assert verify(folder)[0] == 2


def _png(width: int, height: int, rows: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_images_that_cannot_be_decoded(tmp_path: Path, verify: Run, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert verify(tmp_path)[0] == 0  # the bytes are what they were
    loaded: list[tuple[int, int]] = []
    load = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda image: loaded.append(image.size) or load(image))
    tracemalloc.start()
    try:
        code, out, _ = verify(tmp_path, "--decode")
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert code == 2
    reasons = {
        "cut": "it is truncated or damaged",
        "text": "it is no JPEG, PNG, WEBP image",
        "empty": "it is empty",
        "bomb": "it has more than 50000000 pixels",
        "large": "it has 8000 x 7000 pixels, expected from 1 to 50000000",
        "larger": "it has 10000 x 10000 pixels, expected from 1 to 50000000",
        "gif": "it is no JPEG, PNG, WEBP image",
    }
    assert len(out) == len(reasons) + 1
    for line, (key, reason) in zip(out, reasons.items(), strict=False):
        place = list(images).index(key)
        offset, _ = _where(index, place, images[key][0])
        assert line.startswith(
            f"shard 'train-0.tar', byte {offset}: {images[key][0]} of sample {place} cannot be decoded: {reason}"
        )
    assert not any(width * height > 10**6 for width, height in loaded)


def test_many_hurt_samples_are_counted(tmp_path: Path, verify: Run) -> None:
    num = MOST_TOLD + 20
    write_shard(tmp_path / "train-0.tar", [{"__key__": str(n), "jpg": b"no image"} for n in range(num)])
    make_index(tmp_path, ["train-0.tar"])
    code, out, err = verify(tmp_path, "--decode")
    assert code == 2
    assert out[MOST_TOLD] == "shard 'train-0.tar': and 20 more samples like these"
    assert len(out) == MOST_TOLD + 2
    assert f"{num} samples" in err


def test_workers_tell_the_same_in_the_same_order(folder: Path, verify: Run) -> None:
    index = ShardIndex.read(folder)
    for name in COUNTS:
        shard = next(i for i, shard in enumerate(index.shards) if shard.name == name)
        offset = int(index.part(shard).member_NM2[0, -1, 0])
        _change(folder / name, offset)
    alone, together = verify(folder), verify(folder, "--workers", 3)
    assert alone == together
    assert alone[0] == 2


def test_verify_changes_nothing(folder: Path, verify: Run) -> None:
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    verify(folder, "--decode")
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


def test_what_the_command_refuses(tmp_path: Path, verify: Run) -> None:
    assert "is not a folder" in verify(tmp_path / "nowhere")[2]
    assert "has no index" in verify(tmp_path)[2]
    assert "must be from 0 to 1024" in verify(tmp_path, "--workers", "-3")[2]


def test_members_that_overlap_are_told(folder: Path, verify: Run) -> None:
    index = ShardIndex.read(folder)
    members = index.member_NM2.copy()
    members[20, 0] = members[20, 1]  # an index made to mislead
    crc = index.crc_NM.copy()
    crc[20, 0] = crc[20, 1]
    np.copyto(index.member_NM2, members)
    np.copyto(index.crc_NM, crc)
    index.write(folder)
    code, out, _ = verify(folder)
    assert code == 2
    assert "of sample 20 overlaps the member before it" in out[0]
