"""The index of shards, and the command that makes it of shards that others wrote."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixdist.cli import shards as commands
from mixdist.data.shards import fetch
from mixdist.data.shards.address import expand
from mixdist.data.shards.index import HEAD, SAMPLES, ShardIndex, check_names, split_of
from mixdist.data.shards.scan import assemble, scan
from tests.errors import error_of, refusal_of
from tests.launch import here
from tests.range_server import RangeServer
from tests.tars import COUNTS, make_shards, sample_of, write_shard


def same_index(one: ShardIndex, other: ShardIndex) -> bool:
    """Whether all is equal but what is for people and what says where the shards lie."""
    for field in dataclasses.fields(ShardIndex):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name not in ("source", "base", "made") and not (a is b or np.array_equal(a, b)):
            return False
    return one.fingerprint == other.fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_shards(tmp_path / "shards")
    return tmp_path / "shards"


def _bytes(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in (HEAD, SAMPLES)]


# The index itself.


def test_what_is_written_is_read(folder: Path) -> None:
    index = ShardIndex.read(folder)
    assert same_index(index, ShardIndex.parse("x", *_bytes(folder)))
    assert len(index) == sum(COUNTS.values())
    assert index.splits == ("train", "test")
    assert index.places("test").tolist() == list(range(44, 53))
    parts = [index.part(i) for i in range(4)]
    np.testing.assert_array_equal(np.concatenate([part.member_NM2 for part in parts]), index.member_NM2)
    assert [len(part) for part in parts] == list(COUNTS.values())


def test_the_same_index_has_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, now = _bytes(folder), time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e6)
    monkeypatch.setattr(time, "localtime", lambda *_: time.gmtime(now + 1e6))
    ShardIndex.read(folder).write(folder)
    assert _bytes(folder) == before


def test_a_disk_that_is_full_leaves_the_old_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ShardIndex.read(folder)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        index.write(folder)
    assert same_index(ShardIndex.read(folder), index)
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("name", [HEAD, SAMPLES])
def test_half_an_index_is_none(folder: Path, name: str) -> None:
    (folder / name).unlink()
    error_of(lambda: ShardIndex.read(folder), name, "mixdist index")


def _changed(folder: Path, path: tuple[Any, ...], value: Any, signed: bool) -> ShardIndex:
    """Read an index that was changed and then made to look whole, as someone who means harm would."""
    index = ShardIndex.read(folder)
    head, arrays = json.loads((folder / HEAD).read_bytes()), dict(index._arrays())
    if path[0] in arrays:
        name, *place = path
        changed = arrays[name].copy()
        if place:
            changed[tuple(place)] = value
        arrays[name] = changed if place else changed.astype(value)
    else:
        *parents, last = path
        target = head
        for key in parents:
            target = target[key]
        target[last] = value
    samples = io.BytesIO()
    np.savez_compressed(samples, **arrays)
    head["samples_sha256"] = hashlib.sha256(samples.getvalue()).hexdigest()
    if signed:
        digest = hashlib.sha256(json.dumps(head["shards"], sort_keys=True).encode())
        digest.update(json.dumps([head[k] for k in ("extensions", "class_names", "attribute_names", "image")]).encode())
        for array in arrays.values():
            digest.update(np.ascontiguousarray(array).data)
        head["fingerprint"] = digest.hexdigest()
    return ShardIndex.parse("x", json.dumps(head).encode(), samples.getvalue())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((("shards", 0, "name"), name) for name in ("../x.tar", "/etc/x.tar", "pipe:touch x.tar", 3)),
        *((("shards", 0, "num_samples"), num) for num in (-1, 0, 14)),
        *((("shards", 0), None), (("shards",), None), (("shards", 0, "more"), 1), (("extensions",), ["cls"])),
        *((("format",), 2), (("id",), object)),
    ],
)
def test_an_index_that_cannot_be_is_refused_whoever_signed_it(folder: Path, path: Any, value: Any) -> None:
    error_of(lambda: _changed(folder, path, value, signed=path != ("id",)), "the index of x")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("shards", 0, "name"), "train-000001.tar"),
        *((("shards", 0, "num_bytes"), size) for size in (1024, 1e9)),
        *((("shards", 0, "sha256"), "00"), (("shards", 0, "first_id"), 1)),
        *((("extensions",), names) for names in (["cls", "json", "pkl"], ["png", "json", "cls"])),
        *((("class_names",), names) for names in (["a"], ["a", "b", "d"], ["a", "b", 3])),
        *((("attribute_names",), ["Round"]), (("image",), [3, 8]), (("image",), [3, 8, -8])),
        *((("id", place), value) for place, value in ((3, 2), (13, 3), (0, -1))),
        *((("member", 0, 0, 0), place) for place in (0, 513, -1, -512, 2**62)),
        *((("member", 0, 0, 1), size) for size in (-1, 2**62)),
        *((("label", 0), -1), (("attribute", 0, 0), 2), (("crc", 0, 0), 1)),
        *((("id",), np.float64), (("crc",), np.uint64)),
    ],
)  # fmt: skip
def test_any_other_value_differs_from_the_fingerprint(folder: Path, path: Any, value: Any) -> None:
    assert same_index(_changed(folder, ("source",), "for people", signed=False), ShardIndex.read(folder))
    error_of(lambda: _changed(folder, path, value, signed=False), "the index of x", "mixdist index")


@pytest.mark.parametrize(
    "head", [b"", b"[]", b"3", b"null", b"{}", b'{"format": 1}', b"[" * 100_000, b"\xff", b'{"format": 1e999}']
)
def test_what_is_no_index_is_refused(head: bytes) -> None:
    error_of(lambda: ShardIndex.parse("x", head, b""), "the index of x")


@pytest.mark.parametrize("samples", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"PK\x05\x06" + bytes(18)])
def test_what_are_no_samples_is_refused(folder: Path, samples: bytes) -> None:
    head = json.loads((folder / HEAD).read_bytes())
    head["samples_sha256"] = hashlib.sha256(samples).hexdigest()
    error_of(lambda: ShardIndex.parse("x", json.dumps(head).encode(), samples), "the index of x")


class _Harm:
    """What a pickle runs when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_no_pickle_runs(tmp_path: Path) -> None:
    ran, harm = tmp_path / "ran", pickle.dumps(_Harm(tmp_path / "ran"))
    pickle.loads(harm)
    assert ran.exists()  # it would
    ran.unlink()
    for number, name in enumerate(("pkl", "pickle", "pyd", "pth")):
        folder = tmp_path / f"shards-{number}"
        folder.mkdir()
        write_shard(folder / "train-0.tar", [{"__key__": "1", "jpg": b"", name: harm}])
        refusal_of("index", folder, named=(f"'1.{name}'", repr(name), "pickles"))
    # Under a name that is read: bytes stay bytes, as an image they are undecodable, as npy they are not opened.
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "train-0.tar", [{"__key__": "1", "jpg": harm, "json": harm, "npy": harm, "txt": harm}])
    assert here("index", str(folder)).code == 0
    assert "jpg of sample 0" in refusal_of("verify", folder, "--decode").out
    # And in the index's own arrays.
    samples, head = io.BytesIO(), json.loads((folder / HEAD).read_bytes())
    np.savez(samples, allow_pickle=True, id=np.array([_Harm(ran)], dtype=object))
    head["samples_sha256"] = hashlib.sha256(samples.getvalue()).hexdigest()
    (folder / HEAD).write_text(json.dumps(head))
    (folder / SAMPLES).write_bytes(samples.getvalue())
    refusal_of("verify", folder, named=("allow_pickle=False",))
    assert not ran.exists()


@pytest.mark.parametrize(
    "name", ["pipe:touch ran.tar", "train 0.tar", "-rf.tar", "a;touch ran.tar", "$(touch ran).tar"]
)
def test_no_name_of_a_shard_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "train-0.tar", [sample_of(1)])
    (folder / "train-0.tar").rename(folder / name)
    assert refusal_of("index", folder, named=(f"shard {name!r}",)).out == ""
    for address in (f"pipe:cat {folder / name}", "pipe:touch ran", "file:///etc/train-0.tar", "ftp://h/train-0.tar"):
        refusal_of("index", address, "--out", tmp_path / "out", named=(address,))
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_names_and_splits() -> None:
    for name, split in {
        "train-000000.tar": "train",
        "imagenet_training-12.tar": "train",
        "val-1.tar": "valid",
        "validation_0003.tar": "valid",
        "valid.tar": "valid",
        "data-test-7.tar": "test",
        "00012.tar": "train",
        "extra-000.tar": "extra",
        "latest-3.tar": "latest",
    }.items():
        assert split_of(name) == split
        check_names([name])
    for name in (".tar", "a/b.tar", "..tar", "x.tgz", "x.tar.gz", "a b.tar", "é.tar", "x.tar\n"):
        error_of(lambda name=name: check_names([name]), repr(name))


# The command.


def test_a_folder_is_indexed(folder: Path, tmp_path: Path) -> None:
    by_hand, names = ShardIndex.read(folder), tmp_path / "classes.txt"
    names.write_text("a\nb\n c \n")
    refusal_of("index", folder, named=(HEAD, "--force"))
    words = ["index", str(folder), "--force", "--class_names", str(names)]
    ended = here(*words)
    assert (ended.code, ended.err) == (0, "")
    found = ShardIndex.read(folder)
    assert [shard.name for shard in found.shards] == sorted(COUNTS)
    known = ("test", "train"), ("a", "b", "c"), ("Round", "Tall")
    assert (found.splits, found.class_names, found.attribute_names) == known
    assert {shard.name: shard.sha256 for shard in found.shards} == {s.name: s.sha256 for s in by_hand.shards}
    assert "train: 44 samples" in ended.out
    assert "members: cls, json, png   labels: 3 classes   attributes: 2" in ended.out
    assert "mixdist verify" in ended.out.splitlines()[-1]
    before = _bytes(folder)
    assert here(*words, "--workers", "2").code == 0
    assert _bytes(folder) == before
    assert here("verify", str(folder)).code == 0


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.tar", [sample_of(0)])
    write_shard(tmp_path / "test-0.tar", [{"__key__": "1", "png": b""}])
    ended = here("index", str(tmp_path))
    assert ended.code == 0
    for what in ("labels", "attributes"):
        assert f"left out: {what}: shard 'test-0.tar'" in ended.out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("", ("SOURCE",)),
        ("nowhere", ("nowhere", ".tar")),
        ("shards/train-0.tar", ("shards/train-0.tar",)),
        ("bare", ("bare", ".tar")),
        ("shards --out bare", ("--out", "bare")),
        ("shards --workers -1", ("--workers", -1, 1024)),
        ("shards --class_names none", ("--class_names", "none")),
        ("shards --class_names no", ("--class_names", "no", "UTF-8")),
        ("shards --class_names gap", ("--class_names", "gap")),
        ("shards --class_names few", ("class 2", "class_names", 1)),
        ("https://host/{a,b}.tar", ("--out",)),
        ("http://host/a.tar --out bare", ("http://host/a.tar", "https")),
        ("https://u:p@host/a.tar --out bare", ("'https://...'", "password")),
        ("https://host/a.tar?key=1 --out bare", ("https://host/a.tar?", "'?'")),
        ("https://host/{a,b --out bare", ("https://host/{a,b",)),
        ("https://host/{a,a}.tar --out bare", ("'a.tar'",)),
        ("https://host/{a,b}/c.tar --out bare", ("https://host/a", "https://host/b")),
        ("https://host/%2e%2e%2fa.tar --out bare", ("'%2e%2e%2fa.tar'",)),
        ("https://host/{0..999999}.tar --out bare", ("{0..999999}", 100_000)),
    ],
)
def test_what_the_command_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, named: tuple[object, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    bare, shards = Path("bare"), Path("shards")
    bare.mkdir()
    shards.mkdir()
    write_shard(shards / "train-0.tar", [sample_of(2)])
    Path("no").write_bytes(b"\xff\xfe")
    Path("gap").write_text("a\n\nb\n")
    Path("few").write_text("a\n")
    assert refusal_of("index", *words.split(), named=named).out == ""
    assert not list(bare.iterdir())
    assert not (shards / HEAD).exists()


def test_one_bad_shard_leaves_no_index(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.tar", [sample_of(0)])
    write_shard(tmp_path / "train-1.tar", [sample_of(1)])
    whole = (tmp_path / "train-1.tar").read_bytes()
    (tmp_path / "train-1.tar").write_bytes(whole[:1024])
    for workers in (0, 2):
        refusal_of("index", tmp_path, "--workers", workers, named=("shard 'train-1.tar', byte ",))
    assert not (tmp_path / HEAD).exists()
    os.mkfifo(tmp_path / "train-2.tar")  # reading it would wait for ever
    (tmp_path / "train-1.tar").write_bytes(whole)
    refusal_of("index", tmp_path, named=("train-2.tar",))


# Shards at an address.


@pytest.fixture
def server(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setattr(fetch, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(commands, "_BLOCK", 4000)
    with RangeServer(folder, tmp_path) as started:
        yield started


def test_shards_at_an_address_are_indexed(folder: Path, server: RangeServer, tmp_path: Path) -> None:
    out = tmp_path / "index"
    server.be({"do": "cut", "value": 100}, {"do": "error", "value": 503}, {"do": "hang up", "times": 2})
    ended = here("index", f"{server.url}/train-{{000000..000002}}.tar", "--out", str(out), "--workers", "0")
    assert (ended.code, ended.err) == (0, "")
    found = ShardIndex.read(out)
    names = sorted(name for name in COUNTS if name.startswith("train"))
    assert same_index(found, assemble([scan(folder / name) for name in names], ["train"] * 3))
    assert found.base == server.url + "/"
    assert here("verify", str(out), "--decode", "--workers", "0").code == 0
    # Damage there is told as damage here is.
    at = int(found.member_NM2[5, 2, 0])
    data = bytearray((folder / names[0]).read_bytes())
    data[at] ^= 1
    (folder / names[0]).write_bytes(data)
    (folder / names[2]).unlink()
    told = refusal_of("verify", out, "--workers", 0).out
    assert f"shard {names[0]!r}, byte {at}: png of sample 5 " in told
    assert f"shard {names[2]!r} is missing at {server.url}/: it has 30 samples, ids 14 to 43" in told


def test_an_address_that_gives_no_shard(server: RangeServer, tmp_path: Path) -> None:
    out = tmp_path / "index"
    refusal_of(
        "index", f"{server.url}/train-9.tar", "--out", out, "--workers", 0, named=(server.url, "train-9.tar", 404)
    )
    server.be({"do": "redirect", "value": "http://example.com/x.tar"})
    words = "index", f"{server.url}/train-000000.tar", "--out", out, "--workers", 0
    refusal_of(*words, named=(server.url, "http://example.com/x.tar"))
    assert not out.exists()


def test_a_file_that_changes_while_it_comes(server: RangeServer, folder: Path) -> None:
    with fetch.RemoteFolder(server.url, 4000, 1, 5.0).stream("train-000002.tar") as one:
        assert len(one.read(100)) == 100
        with open(folder / "train-000002.tar", "ab") as file:
            file.write(bytes(512))
        error_of(lambda: [None for _ in iter(lambda: one.read(4000), b"")], "train-000002.tar", kind=OSError)


def test_patterns() -> None:
    assert expand("https://host/a/x-{08..10}.tar") == ("https://host/a/", ["x-08.tar", "x-09.tar", "x-10.tar"])
    assert expand("http://127.0.0.1:80/{b,a}.tar") == ("http://127.0.0.1:80/", ["b.tar", "a.tar"])
    assert expand("https://host/x.tar") == ("https://host/", ["x.tar"])
