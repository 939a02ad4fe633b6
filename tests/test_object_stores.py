"""Shards in object stores: fsspec's memory, and S3 as a local server speaks it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from mixdist.data.shards import fetch, objects
from mixdist.data.shards.index import ShardIndex
from mixdist.data.shards.remote import Cache
from mixdist.data.shards.storage import Damage
from mixdist.data.sources.shards import open_shards
from tests.errors import error_of, refusal_of
from tests.launch import here
from tests.small_shards import Member, make
from tests.tars import make_shards
from tests.test_shards_cli import SOFT, config_of

BLOCK = 10_000


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[tuple[str, list[Member], Cache]]:
    """Shards in memory, their members, and a cache."""
    members = make(tmp_path / "shards", [[100, 0, 25_000], [3000] * 4])
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "shards") + "/", "/bucket/", recursive=True)
    yield "memory://bucket", members, Cache(str(tmp_path / "cache"), 1e-3, BLOCK / 1e6, retries=2, timeout_s=2.0)
    memory.rm("/bucket", recursive=True)


def test_every_member_is_read(store: tuple[str, list[Member], Cache]) -> None:
    root, members, cache = store
    index, remote = open_shards(root, cache)
    remote.check(index)
    assert [remote.read(*one.place) for one in members] == [one.data for one in members]


def test_what_is_wrong_is_named(store: tuple[str, list[Member], Cache]) -> None:
    root, members, cache = store
    index, remote = open_shards(root, cache)
    path, shard = f"/bucket/{members[0].shard}", f"{root}/{members[0].shard}"
    whole = fsspec.filesystem("memory").cat_file(path)
    fsspec.filesystem("memory").pipe_file(path, bytes(len(whole)))
    error_of(lambda: remote.read(*members[0].place), shard, kind=Damage)
    fsspec.filesystem("memory").pipe_file(path, whole[:15_000])
    error_of(lambda: remote.read(*members[2].place), shard, 15_000, len(whole), kind=Damage)
    error_of(lambda: remote.check(index), members[0].shard, root, 15_000, kind=ValueError)
    fsspec.filesystem("memory").rm(path)
    error_of(lambda: remote.read(*members[2].place), shard, kind=Damage)
    error_of(lambda: open_shards("memory://nowhere", cache), "memory://nowhere", kind=ValueError)


def test_a_file_that_changes_while_it_is_read(store: tuple[str, list[Member], Cache]) -> None:
    root, members, _ = store
    path = f"/bucket/{members[0].shard}"
    whole = fsspec.filesystem("memory").cat_file(path)
    folder = fetch.RemoteFolder(root, 4000, 1, 2.0)
    for other in (whole, whole[:9000], whole + bytes(512)):  # written anew it has another version
        with folder.stream(members[0].shard) as stream:
            assert stream.read(100)
            fsspec.filesystem("memory").pipe_file(path, other)
            read = lambda stream=stream: [None for _ in iter(lambda: stream.read(4000), b"")]  # noqa: E731
            error_of(read, f"{root}/{members[0].shard}", kind=OSError)


@pytest.mark.parametrize(
    ("failure", "tries", "named"),
    [
        (ConnectionError("slow\nserver"), 3, ("slow server", "3 tries")),
        (PermissionError("no"), 1, ("no", "credentials")),
        (ImportError("Install x", name="s3fs"), 1, ("pip install 'mixdist[memory]'",)),
    ],
)
def test_failures_of_a_store(
    store: tuple[str, list[Member], Cache],
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
    tries: int,
    named: tuple[str, ...],
) -> None:
    asked = []

    def fail(*_: object, **__: object) -> None:
        asked.append(1)
        raise failure

    folder = fetch.RemoteFolder(store[0], BLOCK, 2, 2.0)
    with monkeypatch.context() as patched:
        patched.setattr(type(fsspec.filesystem("memory")), "info", fail)
        error_of(lambda: folder.info("a.tar"), f"{store[0]}/a.tar", *named, kind=OSError)
    assert len(asked) == tries


@pytest.mark.parametrize(
    ("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("az", "adlfs"), ("hf", "huggingface_hub")]
)
def test_a_store_without_its_package(monkeypatch: pytest.MonkeyPatch, scheme: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys.modules["fsspec.registry"], "_registry", {})
    told = f"{scheme}://bucket/x/a.tar"
    error_of(lambda: objects.info(told, 1, 2.0), told, f"pip install 'mixdist[{scheme}]'", kind=OSError)


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket with shards in a local S3 server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    make_shards(tmp_path / "shards")
    bucket = fsspec.filesystem("s3")
    bucket.mkdir("bucket")
    bucket.put(str(tmp_path / "shards" / "*.tar"), "bucket/")
    yield "s3://bucket"
    server.stop()
    fsspec.filesystem("s3").clear_instance_cache()


def test_s3_is_indexed_verified_and_trained_from(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = here("index", f"{s3}/{{test-000000,train-{{000000..000002}}}}.tar", "--out", "index", "--workers", "0")
    assert (ended.code, ended.err) == (0, "")
    assert ShardIndex.read(Path("index")).base == f"{s3}/"
    assert here("verify", "index", "--workers", "0").code == 0
    cache = {"folder": str(tmp_path / "cache"), "limit_gb": 2e-5, "block_mb": 0.004}
    fsspec.filesystem("s3").put("index/", "bucket/", recursive=True)
    for root, out in (("index", "one"), (s3, "two")):
        ended = here("train", "--config", config_of(SOFT, {"root": root, "cache": cache}), "--out", out)
        assert ended.code == 0, ended.err
    assert "secret" not in refusal_of("index", f"{s3}/other.tar", "--out", "no", named=(f"{s3}/other.tar",)).err
    error_of(lambda: fetch.RemoteFolder(s3, BLOCK, 0, 5.0).info("none"), f"{s3}/none", kind=OSError)
    assert objects.read(f"{s3}/train-000000.tar", 10**9, 5, 5.0)[0] == b""
