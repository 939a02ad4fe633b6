"""Shards in a folder: every member's bytes, and what is refused."""

from __future__ import annotations

import os
import pickle
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mixdist.data.shards import storage
from mixdist.data.shards.index import ShardIndex
from mixdist.data.shards.remote import Cache
from mixdist.data.shards.storage import Damage, LocalStorage
from mixdist.data.sources.shards import open_shards
from tests.errors import error_of
from tests.small_shards import Member, make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "shards"


@pytest.fixture
def members(folder: Path) -> list[Member]:
    return make(folder, [[100, 0, 512, 3000], [1, 70_000], [511, 513, 2000]])


def _num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_every_member_is_read_in_any_order(folder: Path, members: list[Member]) -> None:
    index, local = open_shards(str(folder), Cache())
    assert isinstance(local, LocalStorage)
    local.check(index)
    for i in np.random.default_rng(0).permutation(np.arange(len(members)).repeat(3)):
        assert local.read(*members[i].place) == members[i].data
    for one, (offset, size), crc in zip(members, index.member_NM2[:, 0], index.crc_NM[:, 0], strict=True):
        assert local.read(one.shard, int(offset), int(size), int(crc)) == one.data
    local.close()


def test_few_shards_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_OPEN", 3)
    members = make(tmp_path, [[50]] * 10)
    before, local = _num_descriptors(), LocalStorage(tmp_path)
    for one in members * 2:
        assert local.read(*one.place) == one.data
        assert _num_descriptors() <= before + 3
    local.close()
    assert _num_descriptors() == before
    assert local.read(*members[0].place) == members[0].data  # opened again
    del local
    assert _num_descriptors() == before


def test_pickling_leaves_descriptors_behind(folder: Path, members: list[Member]) -> None:
    local = LocalStorage(folder)
    local.read(*members[0].place)
    before, copy = _num_descriptors(), pickle.loads(pickle.dumps(local))
    assert _num_descriptors() == before
    assert copy.read(*members[5].place) == members[5].data
    local.close()
    assert copy.read(*members[5].place) == members[5].data


def test_threads_get_their_own_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_OPEN", 2)  # so that threads close each other's files all the time
    members = make(tmp_path, [[300, 400]] * 6)
    local, wrong = LocalStorage(tmp_path), []

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, len(members), 500):
            try:
                assert local.read(*members[i].place) == members[i].data
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong


def test_what_differs_from_the_index_is_named_with_its_place(folder: Path, members: list[Member]) -> None:
    one, whole = members[3], (folder / members[3].shard).read_bytes()
    hurt = bytearray(whole)
    hurt[one.offset + one.size - 1] ^= 4
    (folder / one.shard).write_bytes(hurt)
    index, local = open_shards(str(folder), Cache())
    local.check(index)  # the size is right
    error_of(lambda: local.read(*one.place), one.shard, one.size, one.offset, "mixdist verify", kind=Damage)
    assert local.read(*members[2].place) == members[2].data
    os.truncate(folder / one.shard, one.offset + 1000)
    error_of(lambda: local.read(*one.place), one.shard, one.size - 1000, one.size, one.offset, kind=Damage)
    sizes = one.offset + 1000, len(whole)
    error_of(lambda: local.check(index), f"shard '{one.shard}'", *sizes, folder, "mixdist verify")
    (folder / one.shard).write_bytes(whole)
    (folder / members[4].shard).unlink()
    error_of(lambda: local.read(*members[5].place), members[5].shard, 70_000, members[5].offset, kind=Damage)
    error_of(lambda: local.check(index), f"shard '{members[4].shard}'", folder, 81_920)


def test_memory_follows_the_file_and_not_its_claims(folder: Path, members: list[Member]) -> None:
    local = LocalStorage(folder)
    tracemalloc.start()
    try:
        error_of(lambda: local.read(members[0].shard, 512, 1 << 50, 0), members[0].shard, 1 << 50, kind=Damage)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_what_is_no_set_of_shards(folder: Path, members: list[Member], tmp_path: Path) -> None:
    for root in (str(tmp_path / "nowhere"), str(tmp_path)):
        error_of(lambda root=root: open_shards(root, Cache()), root)
    for root in (
        *("http://example.org/shards", "http://10.0.0.1/shards", "http://127.0.0.1.example.org/"),
        *("https://user:secret@example.org/", "https://example.org/shards?key=secret", "https:///shards"),
        *("https://example.org:x/", "https://example.org/a b", "file:///etc", "ftp://example.org/", "pipe:touch it"),
    ):
        named = "https://..." if "@" in root else root.partition("?")[0]
        assert "secret" not in error_of(lambda root=root: open_shards(root, Cache()), named)
        replace(ShardIndex.read(folder), base=root).write(folder)
        error_of(lambda: open_shards(str(folder), Cache()), named)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"folder": ""}, ("cache.folder", "''")),
        ({"limit_gb": 0}, ("cache.limit_gb", 0)),
        ({"limit_gb": float("inf")}, ("cache.limit_gb", "inf")),
        ({"block_mb": float("nan")}, ("cache.block_mb", "nan")),
        ({"block_mb": 1e-7}, ("cache.block_mb", 1e-7)),
        ({"limit_gb": 0.015}, ("limit_gb", 0.015, "block_mb", 4.0)),
        ({"retries": -1}, ("cache.retries", -1)),
        ({"timeout_s": 0}, ("cache.timeout_s", 0)),
    ],
)
def test_the_cache_refuses_numbers_out_of_range(values: dict[str, float], named: tuple[object, ...]) -> None:
    error_of(lambda: Cache(**values), *named)  # type: ignore[arg-type]
