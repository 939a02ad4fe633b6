"""Shards in a folder: every member's bytes, and what is refused."""

from __future__ import annotations

import os
import pickle
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mixdist.data.shards import storage
from mixdist.data.shards.remote import Cache
from mixdist.data.shards.storage import Damage, LocalStorage, open_shards
from tests.small_shards import Member, make, rebased


def _error(call: Callable[[], object], match: str, kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


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


def test_a_flipped_bit_is_found(folder: Path, members: list[Member]) -> None:
    one = members[3]
    whole = bytearray((folder / one.shard).read_bytes())
    whole[one.offset + one.size - 1] ^= 4
    (folder / one.shard).write_bytes(whole)
    index, local = open_shards(str(folder), Cache())
    local.check(index)  # the size is right
    at = rf"{one.shard}' has other bytes than its index says in the 3000 at offset {one.offset}: run mixdist verify"
    _error(lambda: local.read(*one.place), at, Damage)
    assert local.read(*members[2].place) == members[2].data


def test_a_cut_shard_is_found(folder: Path, members: list[Member]) -> None:
    one = members[3]
    num_bytes = (folder / one.shard).stat().st_size
    os.truncate(folder / one.shard, one.offset + 1000)
    index, local = open_shards(str(folder), Cache())
    _error(lambda: local.read(*one.place), f"ends 2000 bytes too early for the 3000 at offset {one.offset}", Damage)
    sizes = f"has {one.offset + 1000} bytes in .* but the index says {num_bytes} bytes"
    has = f"shard '{one.shard}' {sizes}: .*mixdist verify"
    _error(lambda: local.check(index), has)


def test_a_missing_shard_is_named(folder: Path, members: list[Member]) -> None:
    index, local = open_shards(str(folder), Cache())
    (folder / members[4].shard).unlink()
    _error(lambda: local.read(*members[5].place), f"{members[5].shard}' is missing, wanted for 70000 bytes", Damage)
    _error(lambda: local.check(index), f"'{members[4].shard}' is missing in .* the index says 81920 bytes")


def test_memory_follows_the_file_and_not_its_claims(folder: Path, members: list[Member]) -> None:
    local = LocalStorage(folder)
    tracemalloc.start()
    try:
        _error(lambda: local.read(members[0].shard, 512, 1 << 50, 0), "ends .* bytes too early", Damage)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_what_is_no_set_of_shards(folder: Path, members: list[Member], tmp_path: Path) -> None:
    for root, why in {
        str(tmp_path / "nowhere"): "is not a folder",
        str(tmp_path): "has no index",
        "http://example.org/shards": "may be read and changed on its way: give an https address",
        "http://10.0.0.1/shards": "give an https address",
        "http://127.0.0.1.example.org/": "give an https address",
        "https://user:secret@example.org/": "the address at 'example.org' has a user's name or password",
        "https://example.org/shards?key=1": r"has a '\?' or '#'",
        "https:///shards": "is not fetched from",
        "https://example.org:x/": "cannot be read",
        "https://example.org/a b": "is not fetched from",
        "file:///etc": "is not fetched from: give one like https://host/folder, or a folder",
        "ftp://example.org/": "is not fetched from",
        "pipe:touch it": "is not fetched from",
        "s3://bucket/shards": "is not fetched from",
    }.items():
        _error(lambda root=root: open_shards(root, Cache()), why)
        rebased(folder, root if ":" in root else None)
        if ":" in root:
            _error(lambda: open_shards(str(folder), Cache()), why)
    with pytest.raises(ValueError, match="password") as caught:
        open_shards("https://user:secret@example.org/", Cache())
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"folder": ""}, r"cache.folder \(''\) must name a folder"),
        ({"limit_gb": 0}, r"cache.limit_gb \(0\) must be more than 0"),
        ({"limit_gb": float("inf")}, "must be more than 0 and finite"),
        ({"block_mb": float("nan")}, r"cache.block_mb \(nan\)"),
        ({"block_mb": 1e-7}, "must be at least a byte"),
        ({"limit_gb": 0.015}, r"limit_gb \(0.015\) must hold at least 4 blocks of block_mb \(4.0\)"),
        ({"retries": -1}, r"cache.retries \(-1\) must be at least 0"),
        ({"timeout_s": 0}, r"cache.timeout_s \(0\)"),
    ],
)
def test_the_cache_refuses_numbers_out_of_range(values: dict[str, float], why: str) -> None:
    _error(lambda: Cache(**values), why)  # type: ignore[arg-type]
