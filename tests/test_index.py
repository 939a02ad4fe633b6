"""The index of shards, and the command that makes it of shards that others wrote."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixdist.cli.main import main
from mixdist.data.shards import http as web
from mixdist.data.shards import stream
from mixdist.data.shards.http import Web
from mixdist.data.shards.index import HEAD, SAMPLES, ShardIndex, check_names, split_of
from mixdist.data.shards.scan import assemble, scan
from mixdist.data.shards.stream import WebStream, expand
from tests.range_server import RangeServer
from tests.tars import COUNTS, make_shards, sample_of, write_shard


def _error(call: Callable[[], object], match: str, kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def _equal(one: ShardIndex, other: ShardIndex) -> bool:
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


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


# The index itself.


def test_what_is_written_is_read(folder: Path) -> None:
    index = ShardIndex.read(folder)
    again = ShardIndex.parse("x", (folder / HEAD).read_bytes(), (folder / SAMPLES).read_bytes())
    assert _equal(index, again)
    assert len(index) == sum(COUNTS.values())
    assert index.splits == ("train", "test")
    assert index.places("test").tolist() == list(range(44, 53))
    parts = [index.part(i) for i in range(4)]
    np.testing.assert_array_equal(np.concatenate([part.member_NM2 for part in parts]), index.member_NM2)
    assert [len(part) for part in parts] == list(COUNTS.values())


def test_the_same_index_has_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [(folder / name).read_bytes() for name in (HEAD, SAMPLES)]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e6)
    monkeypatch.setattr(time, "localtime", lambda *_: time.gmtime(now + 1e6))
    ShardIndex.read(folder).write(folder)
    assert [(folder / name).read_bytes() for name in (HEAD, SAMPLES)] == before


def test_a_disk_that_is_full_leaves_the_old_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ShardIndex.read(folder)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        index.write(folder)
    assert _equal(ShardIndex.read(folder), index)
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("name", [HEAD, SAMPLES])
def test_a_cut_index_is_refused(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    for length in (*range(0, len(whole) - 2, max(1, len(whole) // 60)), len(whole) - 2):
        (folder / name).write_bytes(whole[:length])
        _error(lambda: ShardIndex.read(folder), "the index of .* cannot be used .*: put back .*mixdist index")
    (folder / name).unlink()
    _error(lambda: ShardIndex.read(folder), f"has no index .*{name}.*: make it with mixdist index")


@pytest.mark.parametrize("name", [HEAD, SAMPLES])
def test_a_flipped_bit_is_refused_or_changes_nothing(folder: Path, name: str) -> None:
    index, whole = ShardIndex.read(folder), (folder / name).read_bytes()
    files = {HEAD: (folder / HEAD).read_bytes(), SAMPLES: (folder / SAMPLES).read_bytes()}
    refused = 0
    for place in range(0, len(whole), 3):
        hurt = bytearray(whole)
        hurt[place] ^= 1 << (place % 7)
        given = {**files, name: bytes(hurt)}
        try:
            found = ShardIndex.parse("x", given[HEAD], given[SAMPLES])
        except ValueError as error:
            refused += "\n" not in str(error)
        else:
            assert name == HEAD
            assert _equal(found, index)
    assert refused > len(whole) / 3 * (0.6 if name == HEAD else 0.999)


def _changed(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> ShardIndex:
    """Read an index that was changed and then made to look whole, as someone who means harm would."""
    index = ShardIndex.read(folder)
    head, arrays = json.loads((folder / HEAD).read_bytes()), dict(index._arrays())
    change(head, arrays)
    samples = io.BytesIO()
    np.savez_compressed(samples, **arrays)
    head["samples_sha256"] = hashlib.sha256(samples.getvalue()).hexdigest()
    return ShardIndex.parse("x", json.dumps(head).encode(), samples.getvalue())


def _set(*path: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(head: dict[str, Any], _: dict[str, Any]) -> None:
        *parents, last, value = path
        for key in parents:
            head = head[key]
        head[last] = value

    return change


def _put(name: str, place: tuple[int, ...], value: int) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(_: dict[str, Any], arrays: dict[str, Any]) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][place] = value

    return change


def _typed(name: str, dtype: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda _, arrays: arrays.update({name: arrays[name].astype(dtype)})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_set("format", 2), "format 2 is another version's"),
        (_set("shards", 0, "name", "../x.tar"), "is no plain name"),
        (_set("shards", 0, "name", "/etc/x.tar"), "is no plain name"),
        (_set("shards", 0, "name", "pipe:touch x.tar"), "is no plain name"),
        (_set("shards", 0, "name", 3), "is no plain name"),
        (_set("shards", 0, "name", "train-000001.tar"), "a shard is there twice"),
        (_set("shards", 0, "num_samples", -1), "53.* ids of 39 samples"),
        (_set("shards", 0, "num_samples", 0), "53.* ids of 40 samples"),
        (_set("shards", 0, "num_bytes", 1e9), "impossible numbers"),
        (_set("shards", 0, "num_bytes", 1024), "a member lies outside its shard"),
        (_set("shards", 0, "num_samples", 14), "53.* ids of 54 samples"),
        (_set("shards", 0, "sha256", "00"), "no split or sha256"),
        (_set("shards", 0, "more", 1), "more"),
        (_set("shards", 0, None), "cannot be used"),
        (_set("shards", 0, "first_id", 1), "a shard's first id is another sample's"),
        (_set("shards", None), "cannot be used"),
        (_set("extensions", ["cls", "json", "pkl"]), "are not some of"),
        (_set("extensions", ["png", "json", "cls"]), "sorted"),
        (_set("extensions", ["cls"]), "cannot be used"),
        (_set("class_names", ["a"]), "class 2 has no name"),
        (_set("class_names", ["a", "b", 3]), "a text is none"),
        (_set("attribute_names", ["Round"]), "attributes are not 0 or 1"),
        (_set("image", [3, 8]), "is no .channels, height, width."),
        (_set("image", [3, 8, -8]), "is no .channels, height, width."),
        (_set("made", []), "a text is none"),
        (_set("class_names", ["a", "b", "d"]), "differs from its fingerprint"),
        (_put("id", (3,), 2), "ids do not ascend"),
        (_put("id", (13,), 3), "ids do not ascend"),
        (_put("id", (0,), -1), "ids do not ascend"),
        (_put("member", (0, 0, 0), 0), "a member lies outside its shard"),
        (_put("member", (0, 0, 0), 513), "a member lies outside its shard"),
        (_put("member", (0, 0, 0), -1), "a member lies outside its shard"),
        (_put("member", (0, 0, 0), -512), "a member lies outside its shard"),
        (_put("member", (0, 0, 1), -1), "a member lies outside its shard"),
        (_put("member", (0, 0, 1), 2**62), "a member lies outside its shard"),
        (_put("member", (0, 0, 0), 2**62), "a member lies outside its shard"),
        (_put("label", (0,), -1), "labels are not one from 0"),
        (_put("attribute", (0, 0), 2), "attributes are not 0 or 1"),
        (_put("crc", (0, 0), 1), "differs from its fingerprint"),
        (_typed("id", np.float64), "id has type float64"),
        (_typed("crc", np.uint64), "crc has type uint64"),
        (_typed("id", object), "allow_pickle=False"),
        (lambda _, arrays: arrays.pop("crc"), "crc"),
    ],
)
def test_an_index_that_cannot_be_is_refused(folder: Path, change: Callable[..., None], match: str) -> None:
    _error(lambda: _changed(folder, change), match)


@pytest.mark.parametrize(
    "head", [b"", b"[]", b"3", b"null", b"{}", b'{"format": 1}', b"[" * 100_000, b"\xff", b'{"format": 1e999}']
)
def test_what_is_no_index_is_refused(head: bytes) -> None:
    _error(lambda: ShardIndex.parse("x", head, b""), "the index of x cannot be used")


@pytest.mark.parametrize("samples", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"PK\x05\x06" + bytes(18)])
def test_what_are_no_samples_is_refused(folder: Path, samples: bytes) -> None:
    head = json.loads((folder / HEAD).read_bytes())
    head["samples_sha256"] = hashlib.sha256(samples).hexdigest()
    _error(lambda: ShardIndex.parse("x", json.dumps(head).encode(), samples), "the index of x cannot be used")


class _Harm:
    """What a pickle runs when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_no_pickle_runs(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    ran, harm = tmp_path / "ran", pickle.dumps(_Harm(tmp_path / "ran"))
    pickle.loads(harm)
    assert ran.exists()  # it would
    ran.unlink()
    for number, name in enumerate(("pkl", "pickle", "pyd", "pth")):
        folder = tmp_path / f"shards-{number}"
        folder.mkdir()
        write_shard(folder / "train-0.tar", [{"__key__": "1", "jpg": b"", name: harm}])
        code, _, err = run("index", folder)
        assert code == 2
        assert f"'1.{name}' has the extension {name!r}: pickles are never read" in err
    # Under a name that is read: bytes stay bytes, as an image they are undecodable, as npy they are not opened.
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "train-0.tar", [{"__key__": "1", "jpg": harm, "json": harm, "npy": harm, "txt": harm}])
    assert run("index", folder)[0] == 0
    code, out, _ = run("verify", folder, "--decode")
    assert code == 2
    assert "jpg of sample 0 cannot be decoded" in out
    # And in the index's own arrays.
    samples, head = io.BytesIO(), json.loads((folder / HEAD).read_bytes())
    np.savez(samples, allow_pickle=True, id=np.array([_Harm(ran)], dtype=object))
    head["samples_sha256"] = hashlib.sha256(samples.getvalue()).hexdigest()
    (folder / HEAD).write_text(json.dumps(head))
    (folder / SAMPLES).write_bytes(samples.getvalue())
    code, _, err = run("verify", folder)
    assert code == 2
    assert "allow_pickle=False" in err
    assert not ran.exists()


@pytest.mark.parametrize(
    "name", ["pipe:touch ran.tar", "train 0.tar", "-rf.tar", "a;touch ran.tar", "$(touch ran).tar"]
)
def test_no_name_of_a_shard_runs(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "train-0.tar", [sample_of(1)])
    (folder / "train-0.tar").rename(folder / name)
    code, out, err = run("index", folder)
    assert (code, out) == (2, "")
    assert err.startswith(f"mixdist: shard {name!r} must be a plain name")
    assert err.count("\n") == 1
    for address in (f"pipe:cat {folder / name}", "pipe:touch ran", "file:///etc/train-0.tar", "ftp://h/train-0.tar"):
        code, _, err = run("index", address, "--out", tmp_path / "out")
        assert code == 2
        assert "is not fetched from" in err
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
        _error(lambda name=name: check_names([name]), "must be a plain name")


# The command.


def test_a_folder_is_indexed(folder: Path, run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    by_hand = ShardIndex.read(folder)
    names = tmp_path / "classes.txt"
    names.write_text("a\nb\n c \n")
    code, _, err = run("index", folder)
    assert code == 2
    assert "is there already" in err
    code, out, err = run("index", folder, "--force", "--class_names", names)
    assert (code, err) == (0, "")
    found = ShardIndex.read(folder)
    assert [shard.name for shard in found.shards] == sorted(COUNTS)
    assert (found.splits, found.class_names, found.attribute_names) == (
        ("test", "train"),
        ("a", "b", "c"),
        ("Round", "Tall"),
    )
    assert {shard.name: shard.sha256 for shard in found.shards} == {s.name: s.sha256 for s in by_hand.shards}
    assert "train: 44 samples" in out
    assert "members: cls, json, png   labels: 3 classes   attributes: 2" in out
    assert "mixdist verify" in out.splitlines()[-1]
    before = [(folder / name).read_bytes() for name in (HEAD, SAMPLES)]
    assert run("index", folder, "--force", "--class_names", names, "--workers", 2)[0] == 0
    assert [(folder / name).read_bytes() for name in (HEAD, SAMPLES)] == before
    assert run("verify", folder)[0] == 0


def test_what_is_left_out_is_told(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    write_shard(tmp_path / "train-0.tar", [sample_of(0)])
    write_shard(tmp_path / "test-0.tar", [{"__key__": "1", "png": b""}])
    code, out, _ = run("index", tmp_path)
    assert code == 0
    assert "left out: labels: shard 'test-0.tar' has none, others have" in out
    assert "left out: attributes: shard 'test-0.tar' has none, others have" in out


def test_what_the_command_refuses(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    bare, shards = tmp_path / "bare", tmp_path / "shards"
    bare.mkdir()
    shards.mkdir()
    write_shard(shards / "train-0.tar", [sample_of(2)])
    (tmp_path / "no").write_bytes(b"\xff\xfe")
    (tmp_path / "gap").write_text("a\n\nb\n")
    (tmp_path / "few").write_text("a\n")
    for words, match in (
        (("index",), "mixdist index needs SOURCE"),
        (("index", tmp_path / "nowhere"), "is not a folder: name one that holds files ending in .tar"),
        (("index", shards / "train-0.tar"), "is not a folder"),
        (("index", bare), "has no file that ends in .tar"),
        (("index", shards, "--out", bare), "is for addresses"),
        (("index", shards, "--workers", "-1"), "must be from 0 to 1024"),
        (("index", shards, "--class_names", tmp_path / "none"), "cannot be read"),
        (("index", shards, "--class_names", tmp_path / "no"), "is not UTF-8"),
        (("index", shards, "--class_names", tmp_path / "gap"), "must have the name of a class in each line"),
        (("index", shards, "--class_names", tmp_path / "few"), "class 2 is in the shards, but class_names has 1 names"),
        (("index", "https://host/{a,b}.tar"), "--out is missing"),
        (("index", "http://host/a.tar", "--out", bare), "may be read and changed on its way: give an https address"),
        (("index", "https://u:p@host/a.tar", "--out", bare), "has a user's name or password"),
        (("index", "https://host/a.tar?key=1", "--out", bare), "has a '\\?' or '#'"),
        (("index", "https://host/{a,b", "--out", bare), "cannot be expanded"),
        (("index", "https://host/{a,a}.tar", "--out", bare), "names shard 'a.tar' twice"),
        (("index", "https://host/{a,b}/c.tar", "--out", bare), "give those of one folder"),
        (("index", "https://host/%2e%2e%2fa.tar", "--out", bare), "must be a plain name"),
        (("index", "https://host/{0..999999}.tar", "--out", bare), "stands for more than 100000 shards"),
    ):
        code, out, err = run(*words)
        assert (code, out) == (2, ""), words
        assert err.startswith("mixdist: ")
        assert err.count("\n") == 1
        with pytest.raises(ValueError, match=match):
            raise ValueError(err)
        assert not list(bare.iterdir())
        assert not (shards / HEAD).exists()


def test_one_bad_shard_leaves_no_index(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    write_shard(tmp_path / "train-0.tar", [sample_of(0)])
    write_shard(tmp_path / "train-1.tar", [sample_of(1)])
    whole = (tmp_path / "train-1.tar").read_bytes()
    (tmp_path / "train-1.tar").write_bytes(whole[:1024])
    for workers in (0, 2):
        code, _, err = run("index", tmp_path, "--workers", workers)
        assert code == 2
        assert err.startswith("mixdist: shard 'train-1.tar', byte ")
    assert not (tmp_path / HEAD).exists()
    os.mkfifo(tmp_path / "train-2.tar")  # reading it would wait for ever
    (tmp_path / "train-1.tar").write_bytes(whole)
    code, _, err = run("index", tmp_path)
    assert code == 2
    assert "train-2.tar' is no file" in err


# Shards at an address.


@pytest.fixture
def server(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setattr(web, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(stream, "_BLOCK", 4000)
    started = RangeServer(folder, tmp_path)
    yield started
    started.kill()


def test_shards_at_an_address_are_indexed(
    folder: Path, server: RangeServer, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    out = tmp_path / "index"
    server.be({"do": "cut", "value": 100}, {"do": "error", "value": 503}, {"do": "hang up", "times": 2})
    code, _, err = run("index", f"{server.url}/train-{{000000..000002}}.tar", "--out", out, "--workers", 0)
    assert (code, err) == (0, "")
    found = ShardIndex.read(out)
    names = sorted(name for name in COUNTS if name.startswith("train"))
    assert _equal(found, assemble([scan(folder / name) for name in names], ["train"] * 3))
    assert found.base == server.url + "/"
    assert run("verify", out, "--decode", "--workers", 0)[0] == 0
    # Damage there is told as damage here is.
    at = int(found.member_NM2[5, 2, 0])
    data = bytearray((folder / names[0]).read_bytes())
    data[at] ^= 1
    (folder / names[0]).write_bytes(data)
    (folder / names[2]).unlink()
    code, told, _ = run("verify", out, "--workers", 0)
    assert code == 2
    assert f"shard {names[0]!r}, byte {at}: png of sample 5 has other bytes" in told
    assert f"shard {names[2]!r} is missing at {server.url}/: it has 30 samples, ids 14 to 43" in told


def test_an_address_that_gives_no_shard(
    server: RangeServer, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    out = tmp_path / "index"
    code, _, err = run("index", f"{server.url}/train-9.tar", "--out", out, "--workers", 0)
    assert code == 2
    assert "is not there (404" in err
    server.be({"do": "redirect", "value": "http://example.com/x.tar"})
    code, _, err = run("index", f"{server.url}/train-000000.tar", "--out", out, "--workers", 0)
    assert code == 2
    assert "leads elsewhere" in err
    assert not out.exists()


def test_a_file_that_changes_while_it_comes(server: RangeServer, folder: Path) -> None:
    with WebStream(Web(server.url, 1, 5.0), "train-000002.tar") as one:
        assert len(one.read(100)) == 100
        with open(folder / "train-000002.tar", "ab") as file:
            file.write(bytes(512))
        _error(lambda: [None for _ in iter(lambda: one.read(4000), b"")], "wait until it is whole", OSError)


def test_patterns() -> None:
    assert expand("https://host/a/x-{08..10}.tar") == ("https://host/a/", ["x-08.tar", "x-09.tar", "x-10.tar"])
    assert expand("http://127.0.0.1:80/{b,a}.tar") == ("http://127.0.0.1:80/", ["b.tar", "a.tar"])
    assert expand("https://host/x.tar") == ("https://host/", ["x.tar"])
