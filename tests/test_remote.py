"""Shards at an address: every byte, whatever the server does; and a cache that keeps its limit."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixdist.data.shards import cache as blocks
from mixdist.data.shards import fetch, http
from mixdist.data.shards.cache import Blocks
from mixdist.data.shards.index import ShardIndex
from mixdist.data.shards.remote import Cache, RemoteStorage
from mixdist.data.shards.storage import Damage, Storage
from mixdist.data.sources.shards import open_shards
from tests import light_reader
from tests.errors import error_of
from tests.range_server import RangeServer
from tests.small_shards import Member, make

BLOCK = 10_000
WATCHDOG_S = 60.0
SIZES = [[100, 0, 9000, 25_000, 3000, 41_000], [1, 12_000, 512], [3000] * 12]


def _error(call: Callable[[], object], *named: object, kind: type[Exception] = OSError) -> str:
    return error_of(call, *named, kind=kind)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(fetch, "LONGEST_PAUSE_S", 0.1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Member]]:
    folder = tmp_path_factory.mktemp("shards")
    return folder, make(folder, SIZES)


@pytest.fixture
def members(shards: tuple[Path, list[Member]]) -> list[Member]:
    return shards[1]


@pytest.fixture(scope="module")
def standing(shards: tuple[Path, list[Member]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RangeServer]:
    with RangeServer(shards[0], tmp_path_factory.mktemp("control")) as started:
        yield started


@pytest.fixture
def server(standing: RangeServer) -> RangeServer:
    standing.renew()
    return standing


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(str(tmp_path / "cache"), limit_gb=1e-3, block_mb=BLOCK / 1e6, retries=4, timeout_s=5.0)


def _changed(cache: Cache, **values: Any) -> Cache:
    return Cache(**{**cache.__dict__, **values})


def _kept(cache: Cache) -> list[Path]:
    return sorted(Path(cache.folder).glob("blocks/*"))


def _size(cache: Cache) -> int:
    total = 0
    for path in _kept(cache):
        with suppress(FileNotFoundError):  # removed meanwhile
            total += path.stat().st_size
    return total


def _read_all(remote: Storage, members: list[Member]) -> None:
    for one in members:
        assert remote.read(*one.place) == one.data, one.place


def test_every_member_is_read_and_fetched_once(
    server: RangeServer, members: list[Member], cache: Cache, processes: Any
) -> None:
    index, remote = open_shards(server.url, cache)
    assert isinstance(remote, RemoteStorage)
    assert len(index) == len(members)
    opened = len(server.requests)
    for i in np.random.default_rng(0).permutation(np.arange(len(members)).repeat(2)):
        assert remote.read(*members[i].place) == members[i].data
    asked = server.requests[opened:]
    assert len(set(asked)) == len(asked) == len(_kept(cache))
    # Another process, another object: everything is there.
    assert processes.apply(light_reader.read_all, (remote, members, 5)) == list(range(len(members)))
    _read_all(open_shards(server.url + "/", cache)[1], members)
    assert len([line for line in server.requests[opened:] if ".tar" in line]) == len(asked)
    remote.close()
    _read_all(remote, members)


@pytest.mark.parametrize("block", [31, 997, 3000, 1 << 20])
def test_blocks_of_any_size(server: RangeServer, cache: Cache, shards: tuple[Path, list[Member]], block: int) -> None:
    members = [one for one in shards[1] if one.size <= 50 * block]
    assert members
    _read_all(open_shards(server.url, _changed(cache, block_mb=block / 1e6, limit_gb=0.01))[1], members)


def test_the_index_lies_here_and_the_shards_there(
    server: RangeServer, shards: tuple[Path, list[Member]], cache: Cache, tmp_path: Path
) -> None:
    replace(ShardIndex.read(shards[0]), base=server.url).write(tmp_path)
    index, remote = open_shards(str(tmp_path), cache)
    assert isinstance(remote, RemoteStorage)
    remote.check(index)
    _read_all(remote, shards[1])


def test_a_shard_that_changed_is_another(cache: Cache, tmp_path: Path) -> None:
    changing = tmp_path / "changing"
    first = make(changing, [[5000, 6000]], seed=1)
    with RangeServer(changing, tmp_path) as other:
        _read_all(open_shards(other.url, cache)[1], first)
        second = make(changing, [[5000, 6000]], seed=2)
        assert second[0].data != first[0].data
        _read_all(open_shards(other.url, cache)[1], second)


# What may pass.


@pytest.mark.parametrize(
    "mood",
    [
        {"do": "error", "value": 500, "times": 3},
        {"do": "error", "value": 503, "times": 4},
        {"do": "error", "value": 429, "times": 1},
        {"do": "hang up", "times": 3},
        {"do": "cut", "value": 5, "times": 3},
        {"do": "another range", "times": 2},
        {"do": "wrong bytes", "times": 1},
        {"do": "wait", "value": 0.7, "times": 2},
        {"do": "trickle", "value": 0.05, "times": 1},
    ],
    ids=lambda mood: mood["do"],
)
def test_what_passes_is_tried_again(server: RangeServer, members: list[Member], cache: Cache, mood: Any) -> None:
    remote = open_shards(server.url, _changed(cache, timeout_s=0.5))[1]
    server.be(mood)
    before = len(server.requests)
    assert remote.read(*members[2].place) == members[2].data
    assert len(server.requests) > before + mood["times"]
    server.be()
    _read_all(remote, members)


def test_a_server_that_stays_away_ends_in_one_line(server: RangeServer, members: list[Member], cache: Cache) -> None:
    remote = open_shards(server.url, cache)[1]
    server.kill()
    start = time.monotonic()
    _error(lambda: remote.read(*members[0].place), f"{server.url}/{members[0].shard}", "5 tries", "refused")
    assert time.monotonic() - start < 2.0
    _error(lambda: open_shards(server.url, cache), f"{server.url}/index.json", "5 tries")
    server.start()
    _read_all(remote, members)


def test_no_try_begins_after_the_time_that_is_given(server: RangeServer, members: list[Member]) -> None:
    one = fetch.RemoteFolder(server.url, BLOCK, 50, 5.0)
    server.be({"do": "error", "value": 500, "times": 100})
    _error(lambda: one.read(members[0].shard, 0, 10, time.monotonic()), members[0].shard, "1 tries", 500)
    _error(lambda: one.read(members[0].shard, 0, 10, time.monotonic() + 0.3), members[0].shard, "tries and 0")


def test_reads_share_a_connection_that_a_fork_does_not(server: RangeServer, members: list[Member]) -> None:
    one = fetch.RemoteFolder(server.url, BLOCK, 4, 5.0)

    def read() -> None:
        for i in range(20):
            assert len(one.read(members[0].shard, i, 100)[0]) == 100

    read()
    assert len(server.requests) == 20
    used = set(server.connections)
    assert len(used) == 1
    child = multiprocessing.get_context("fork").Process(target=read)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, which is what is tried here
        child.start()
    child.join(WATCHDOG_S)
    assert child.exitcode == 0
    read()
    assert len(set(server.connections)) == 2
    assert server.connections.count(next(iter(used))) == 40
    server.be({"do": "redirect", "value": "{path}"})
    read()
    assert len(set(server.connections)) == 2


def test_the_pause_that_a_server_asks_for_is_kept(server: RangeServer, members: list[Member]) -> None:
    one, start = fetch.RemoteFolder(server.url, BLOCK, 4, 5.0), time.monotonic()
    server.be({"do": "error", "value": 503, "retry_after": "1"})
    assert one.read(members[0].shard, 0, 10)
    assert 1.0 <= time.monotonic() - start < 4.0
    server.be({"do": "error", "value": 503, "retry_after": "3600"})
    _error(lambda: one.read(members[0].shard, 0, 10), members[0].shard, "1 tries", "3600 s")
    server.be({"do": "error", "value": 503, "retry_after": "soon"})
    assert one.read(members[0].shard, 0, 10)


def test_proxies_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "direct.example.org")
    one = fetch.RemoteFolder("https://example.org/x", BLOCK, 0, 5.0)
    told = _error(lambda: one.info("a.tar"), "example.org/x/a.tar")
    assert "refused" in told
    assert "secret" not in told
    proxied, direct = (http._pool(f"https://{host}/") for host in ("example.org", "direct.example.org"))
    assert proxied.proxy_headers == {"proxy-authorization": "Basic dXNlcjpzZWNyZXQ="}
    assert direct.proxy is None
    monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:9")
    _error(lambda: one.info("a.tar"), "example.org/x/a.tar", "proxy")


def test_this_machine_is_reached_past_proxies(
    server: RangeServer, members: list[Member], cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    _read_all(open_shards(server.url, cache)[1], members)


@pytest.mark.parametrize("mood", ["wait", "trickle"])
def test_nothing_hangs_past_its_bound(server: RangeServer, members: list[Member], cache: Cache, mood: str) -> None:
    remote = open_shards(server.url, _changed(cache, timeout_s=0.2, retries=2))[1]
    server.be({"do": mood, "value": 10.0 if mood == "wait" else 0.1, "times": 100})
    start = time.monotonic()
    _error(lambda: remote.read(*members[2].place), members[2].shard, "3 tries", "cache.timeout_s (0.2)")
    assert time.monotonic() - start < 0.03 + 3 * 2 * 0.2 + 1.0


def test_waiting_for_anothers_fetch_has_a_bound(server: RangeServer, members: list[Member], cache: Cache) -> None:
    remote = open_shards(server.url, _changed(cache, timeout_s=0.2, retries=0))[1]
    turns = Path(cache.folder) / "turns"
    turns.mkdir(parents=True)
    with ExitStack() as stack:
        for i in range(blocks._NUM_TURNS):  # another process that was stopped in the middle of its fetches
            fcntl.flock(stack.enter_context(open(turns / f"{i:03d}", "w")), fcntl.LOCK_EX)
        start = time.monotonic()
        assert remote.read(*members[0].place) == members[0].data
        waited = time.monotonic() - start
        assert 0.15 < waited < 2.0
        _read_all(remote, members[:1] * 100)  # what is kept waits for nobody
        assert time.monotonic() - start < waited + 0.15


# What does not pass.


@pytest.mark.parametrize(
    ("mood", "kind", "named"),
    [
        ({"do": "error", "value": 404}, Damage, ("404", "10000 bytes at offset 0")),
        ({"do": "error", "value": 403}, OSError, ("403",)),
        ({"do": "error", "value": 400}, OSError, ("400",)),
        ({"do": "ignore ranges"}, OSError, ("Range",)),
        ({"do": "redirect", "value": "file:///etc/passwd"}, OSError, ("file:///etc/passwd",)),
        ({"do": "redirect", "value": "http://example.org/x?key=secret"}, OSError, ("http://example.org/x", "https")),
        ({"do": "redirect", "value": "http://user:secret@127.0.0.1/x"}, OSError, ("password",)),
        ({"do": "redirect", "value": "https://127.0.0.1/x?key=secret"}, OSError, ("https://127.0.0.1/x", "scheme")),
        ({"do": "redirect", "value": "{path}"}, OSError, ("5 times",)),
    ],
    ids=["404", "403", "400", "ranges", "file", "http", "password", "https", "circle"],
)
def test_what_is_final(
    server: RangeServer, members: list[Member], cache: Cache, mood: Any, kind: type[Exception], named: tuple[str, ...]
) -> None:
    remote = open_shards(server.url, cache)[1]
    before = len(server.requests)
    server.be({**mood, "times": 6})
    told = _error(lambda: remote.read(*members[0].place), f"{server.url}/{members[0].shard}", *named, kind=kind)
    assert "secret" not in told
    assert len(server.requests) - before == (6 if mood.get("value") == "{path}" else 1)
    server.be()
    _read_all(remote, members)


def test_redirects_that_keep_the_scheme_are_followed(server: RangeServer, members: list[Member], cache: Cache) -> None:
    remote = open_shards(server.url, cache)[1]
    server.be({"do": "redirect", "value": f"{server.url}{{path}}", "times": 3})
    _read_all(remote, members)


def test_bytes_that_stay_wrong_are_damage(server: RangeServer, members: list[Member], cache: Cache) -> None:
    remote = open_shards(server.url, cache)[1]
    server.be({"do": "wrong bytes", "times": 100})
    before, one = len(server.requests), members[2]
    _error(lambda: remote.read(*one.place), f"{server.url}/{one.shard}", f"9000 at offset {one.offset}", kind=Damage)
    assert len(server.requests) == before + 4  # two blocks, twice


def test_shards_that_do_not_fit_the_index(shards: tuple[Path, list[Member]], cache: Cache, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(shards[0], folder)
    one, members = shards[1][0], shards[1]
    num_bytes = (folder / one.shard).stat().st_size
    with RangeServer(folder, tmp_path) as server:
        index, remote = open_shards(server.url, cache)
        remote.check(index)
        os.truncate(folder / one.shard, 15_000)
        for member in (one, members[5]):
            _error(lambda member=member: remote.read(*member.place), one.shard, 15_000, num_bytes, kind=Damage)
        _error(lambda: remote.check(index), one.shard, server.url, 15_000, num_bytes, kind=ValueError)
        (folder / one.shard).unlink()
        _error(lambda: remote.check(index), one.shard, server.url, kind=ValueError)
        _error(lambda: remote.read(*one.place), one.shard, "404", kind=Damage)
        place = one.shard, num_bytes - 999, 1000, 0
        _error(lambda: remote.read(*place), one.shard, f"1000 at offset {num_bytes - 999}", kind=Damage)
        (folder / "index.npz").write_bytes(b"other")
        _error(lambda: open_shards(server.url, cache), server.url, "index.npz", kind=ValueError)
        (folder / "index.npz").unlink()
        _error(lambda: open_shards(server.url, cache), f"{server.url}/index.npz", "404", kind=ValueError)


def test_check_ends_when_the_server_is_away(server: RangeServer, cache: Cache) -> None:
    index, remote = open_shards(server.url, cache)
    server.be({"do": "error", "value": 403, "times": 100})
    _error(lambda: remote.check(index), server.url, 403)
    server.be({"do": "ignore ranges", "times": 100})
    _error(lambda: remote.check(index), server.url, "Range")
    server.kill()
    _error(lambda: remote.check(index), server.url, "5 tries")


def test_an_https_index_leads_to_no_http(monkeypatch: pytest.MonkeyPatch, shards: tuple[Path, list[Member]]) -> None:
    folder = shards[0]
    head = (folder / "index.json").read_bytes().replace(b'"base": null', b'"base": "http://127.0.0.1:80/"')
    files = {"index.json": head, "index.npz": (folder / "index.npz").read_bytes()}
    monkeypatch.setattr(fetch.RemoteFolder, "whole", lambda self, name, *_: files[name])
    _error(lambda: open_shards("https://h/x", Cache()), "https://h/x", "http://127.0.0.1:80/", kind=ValueError)


def test_https_with_a_certificate(
    shards: tuple[Path, list[Member]], cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not here to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, *words]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    with RangeServer(shards[0], tmp_path, certificate, key) as server:
        _error(lambda: open_shards(server.url, cache), server.url, "certificate")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        _read_all(open_shards(server.url, cache)[1], shards[1])
        server.be({"do": "redirect", "value": "http://127.0.0.1/{path}"})
        _error(lambda: open_shards(server.url, cache), server.url, "http://127.0.0.1/", "scheme")


# The cache.


def _rot(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [_rot, Path.unlink, *(lambda path, n=n: os.truncate(path, n) for n in (0, 3000))])
def test_a_harmed_block_is_fetched_again(
    server: RangeServer, members: list[Member], cache: Cache, harm: Callable[[Path], Any]
) -> None:
    _read_all(open_shards(server.url, cache)[1], members)
    kept, before = _kept(cache), len(server.requests)
    for path in kept:
        harm(path)
    fresh = open_shards(server.url, cache)[1]
    _read_all(fresh, members)
    assert _kept(cache) == kept
    assert len([line for line in server.requests[before:] if ".tar" in line]) == len(kept)
    for path in kept:  # now under the eyes of one that has seen them whole
        harm(path)
    _read_all(fresh, members)


def test_the_cache_keeps_its_limit_and_the_newest(server: RangeServer, members: list[Member], cache: Cache) -> None:
    small = _changed(cache, limit_gb=5 * (BLOCK + 20) / 1e9)
    remote = open_shards(server.url, small)[1]
    for _ in range(3):
        for one in members:
            assert remote.read(*one.place) == one.data
            assert _size(small) <= small.limit_gb * 1e9
    assert len(_kept(small)) >= 4
    # The blocks used last are there.
    before = len(server.requests)
    for one in members[-4:]:
        assert remote.read(*one.place) == one.data
    assert len(server.requests) == before


def test_use_counts_and_not_age(tmp_path: Path) -> None:
    kept, old = Blocks(tmp_path, 5 * (BLOCK + 20), 1.0), time.time() - 100
    for i, name in enumerate("abcde"):
        kept.store(name, bytes(BLOCK))
        os.utime(tmp_path / "blocks" / f"{name}.block", (old + i, old + i))
    again = Blocks(tmp_path, 5 * (BLOCK + 20), 1.0)
    assert again.read("a", BLOCK, 0, 10) == bytes(10)
    again.store("f", bytes(BLOCK))
    assert {path.stem for path in (tmp_path / "blocks").iterdir()} == {"a", "d", "e", "f"}


def test_a_block_is_held_against_its_checksum_when_it_is_opened(tmp_path: Path) -> None:
    kept = Blocks(tmp_path, 10**6, 1.0)
    kept.store("a", bytes(BLOCK))
    _rot(tmp_path / "blocks" / "a.block")
    assert Blocks(tmp_path, 10**6, 1.0).read("a", BLOCK, 0, 10) is None  # though these ten are right
    assert kept.read("a", BLOCK, 0, 10) is None


def test_writers_that_died_are_counted_and_swept(server: RangeServer, members: list[Member], cache: Cache) -> None:
    small = _changed(cache, limit_gb=5 * (BLOCK + 20) / 1e9)
    remote = open_shards(server.url, small)[1]
    _read_all(remote, members)
    dead = Path(small.folder) / "blocks" / "x.block.1-1.partial"
    dead.write_bytes(bytes(BLOCK))
    os.utime(dead, (0, 0))
    (Path(small.folder) / "used").write_text("nonsense")
    _read_all(remote, members)
    assert not dead.exists()
    assert _size(small) <= small.limit_gb * 1e9
    shutil.rmtree(Path(small.folder))  # somebody makes room
    _read_all(open_shards(server.url, small)[1], members)


def test_a_folder_that_cannot_be_written(server: RangeServer, members: list[Member], cache: Cache) -> None:
    Path(cache.folder).write_text("a file")
    remote = open_shards(server.url, cache)[1]
    _error(lambda: remote.read(*members[0].place), "cache.folder", cache.folder)


def test_a_full_disk(server: RangeServer, members: list[Member], cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    room = 4 * BLOCK

    def write(self: Blocks, path: str, data: bytes) -> None:
        if _size(cache) + len(data) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        _write(self, path, data)

    _write = Blocks._write
    monkeypatch.setattr(Blocks, "_write", write)
    _read_all(open_shards(server.url, cache)[1], members)  # room is made, though the limit is higher
    room = 0
    shutil.rmtree(cache.folder)
    one = open_shards(server.url, cache)[1]
    _error(lambda: one.read(*members[0].place), "cache.folder", 10_020, "No space left on device")
    assert not _kept(cache)


# Many processes.


@pytest.fixture(scope="module")
def processes() -> Iterator[Any]:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        yield pool


def _results(running: list[AsyncResult[list[int]]], meanwhile: Callable[[], object] = lambda: None) -> list[list[int]]:
    end = time.monotonic() + WATCHDOG_S
    while not all(one.ready() for one in running):
        assert time.monotonic() < end, "the readers hang"
        meanwhile()
        time.sleep(0.01)
    return [one.get(1) for one in running]


def test_reads_go_on_after_the_server_was_killed(
    server: RangeServer, members: list[Member], cache: Cache, processes: Any
) -> None:
    remote = open_shards(server.url, _changed(cache, retries=8))[1]
    opened = len(server.requests)
    server.be({"do": "wait", "value": 0.1, "times": 1000})  # so that it is in the middle of an answer
    running = [processes.apply_async(light_reader.read_all, (remote, members, seed, 0.1)) for seed in (None, 0, 1)]
    killed = 0

    def kill_and_start() -> None:
        nonlocal killed
        if killed < 2 and len(server.requests) >= opened + 4 * (killed + 1):
            killed += 1
            server.kill()
            time.sleep(0.7)
            server.start()

    assert _results(running, kill_and_start) == [list(range(len(members)))] * 3
    assert killed == 2
    # One machine fetches a block once, but for those that were cut off.
    assert len(server.requests) - opened <= len(_kept(cache)) + 3 * killed


def test_processes_share_a_small_cache(
    server: RangeServer, members: list[Member], cache: Cache, processes: Any
) -> None:
    small = _changed(cache, limit_gb=5 * (BLOCK + 20) / 1e9)
    remote = open_shards(server.url, small)[1]
    running = [processes.apply_async(light_reader.read_all, (remote, members * 5, seed)) for seed in (1, 2, 3)]
    sizes: list[int] = []
    assert _results(running, lambda: sizes.append(_size(small))) == [list(range(5 * len(members)))] * 3
    assert 3 * BLOCK < max(sizes) <= small.limit_gb * 1e9 + 3 * (BLOCK + 20)


def test_readers_need_no_torch(processes: Any) -> None:
    assert not processes.apply(light_reader.has_torch)
