"""Sources, their errors, and the laws by which ranks share a batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mixdist.data import Bananas, Blobs, Dataset, Digits, Loader, Parabolas, RankBatch, Source, share
from mixdist.terms import Batch, Field
from tests.errors import error_of

WORLDS = (1, 2, 3, 5, 8)


def _dataset(size: int) -> Dataset:
    ids = torch.arange(size) * 3 + 2**33
    return Dataset({"id": ids, "x": torch.arange(size, dtype=torch.float32)}, {"x": Field((), torch.float32)})


# Data sets


def _rows(**changed: Tensor) -> Batch:
    rows = {"id": torch.tensor([10, 11, 12]), "x": torch.zeros(3, 2), "y": torch.zeros(3, dtype=torch.uint8)}
    return rows | changed


def _make(**changed: Tensor) -> Dataset:
    spec = {"x": Field((2,), torch.float32), "y": Field((), torch.uint8, num_classes=4)}
    return Dataset(_rows(**changed), spec, "y", ("a", "b", "c", "d"))


def test_a_dataset_takes_rows() -> None:
    dataset = _make(y=torch.tensor([0, 1, 3], dtype=torch.uint8))
    assert len(dataset) == 3
    assert dataset.num_classes == 4
    taken = dataset.take(torch.tensor([2, 0]))
    assert taken["id"].tolist() == [12, 10]
    assert taken["y"].tolist() == [3, 0]
    assert taken["x"].shape == (2, 2)
    assert len(dataset.take(torch.tensor([], dtype=torch.int64))["id"]) == 0
    assert _dataset(3).num_classes is None


def test_classes_of_a_byte_may_be_256_and_others_not_negative() -> None:
    rows = {"id": torch.arange(256), "y": torch.arange(256).to(torch.uint8)}
    assert Dataset(rows, {"y": Field((), torch.uint8, num_classes=256)}, "y").num_classes == 256
    rows = {"id": torch.tensor([5]), "y": torch.tensor([-1])}
    spec = {"y": Field((), torch.int64, num_classes=4)}
    error_of(lambda: Dataset(rows, spec, "y"), "field 'y' of sample 5", -1)


@pytest.mark.parametrize(
    ("name", "column", "named"),
    [
        *(
            ("x", torch.tensor([[0, 0], [0, value], [0, 0]]), ("field 'x' of sample 11", value))
            for value in (float("nan"), float("inf"), -float("inf"))
        ),
        ("y", torch.tensor([0, 3, 4], dtype=torch.uint8), ("field 'y' of sample 12", 4, "0 to 3")),
        ("x", torch.zeros(3, 3), ("x",)),
        ("x", torch.zeros(2, 2), ("x",)),
        ("x", torch.zeros(3, 2, dtype=torch.float64), ("x",)),
        ("id", torch.tensor([1, 1, 2]), ("id",)),
        ("id", torch.tensor([1, 3, 2], dtype=torch.int32), ("id",)),
        ("id", torch.arange(0), ("0 samples",)),
        ("z", torch.zeros(3), ("z",)),
    ],
)
def test_rows_that_do_not_fit_their_spec_are_refused(name: str, column: Tensor, named: tuple[object, ...]) -> None:
    error_of(lambda: _make(**{name: column}), *named)


def _with_attributes(attributes: Tensor, *names: str, field: Field | None = None) -> Dataset:
    rows = {"id": torch.tensor([10, 11, 12]), "marks": attributes}
    described = field or Field((attributes.shape[1],), torch.uint8)
    return Dataset(rows, {"marks": described}, attribute="marks", attribute_names=names)


def test_attributes_are_bytes_of_0_and_1_with_a_name_each() -> None:
    marks = torch.tensor([[0, 1], [1, 1], [0, 0]], dtype=torch.uint8)
    assert _with_attributes(marks).attribute_names == ()
    assert _with_attributes(marks, "Young", "Male").first(2).attribute_names == ("Young", "Male")
    error_of(lambda: _with_attributes(marks, "Young"), "attribute_names (1)", 2)
    error_of(lambda: _with_attributes(marks * 2), "field 'marks' of sample 10", 2, "0 or 1")
    fields = Field((2,), torch.uint8, num_classes=2), Field((), torch.uint8), Field((2,), torch.int64)
    for field, column in zip(fields, (marks, marks[:, 0], marks.long()), strict=True):
        error_of(partial(_with_attributes, column, field=field), "attribute 'marks'")
    rows, spec = {"id": torch.arange(3), "x": torch.zeros(3)}, {"x": Field((), torch.float32)}
    error_of(lambda: Dataset(rows, spec, attribute="marks"), "attribute 'marks'")
    error_of(lambda: Dataset(rows, spec, attribute_names=("Young",)), "attribute_names (1)", 0)


# Sources


@pytest.mark.parametrize("source", [Digits(), Blobs(), Blobs(1, 1, 3, 1), Parabolas()], ids=lambda s: type(s).__name__)
def test_every_source_keeps_its_splits_apart_and_repeats_itself(source: Source) -> None:
    train, test, _ = source.load()
    again = source.load().train
    assert not set(train.rows["id"].tolist()) & set(test.rows["id"].tolist())
    assert train.spec == test.spec
    assert train.label == test.label
    assert all(torch.equal(train.rows[name], again.rows[name]) for name in train.rows)


def test_a_source_must_load() -> None:
    with pytest.raises(TypeError):
        Source()  # type: ignore[abstract]


def test_digits() -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    train, test, _ = Digits().load()
    assert (len(train), len(test)) == (1438, 359)
    for part in (train, test):
        ids = part.rows["id"]
        assert torch.equal(ids, ids.sort().values)
        assert part.rows["x"].dtype == torch.uint8
        assert part.rows["x"].max() == 16
        values = part.spec["x"].values(part.rows["x"], torch.float64)
        np.testing.assert_array_equal(values.flatten(1).numpy() * 16, images[ids])
        np.testing.assert_array_equal(part.rows["y"].numpy(), labels[ids])
        assert part.rows["y"].bincount(minlength=10).min() >= 20
    assert train.num_classes == 10
    assert train.class_names == tuple("0123456789")


def test_a_smaller_test_set_of_digits_is_part_of_a_larger_one() -> None:
    small, large = (set(Digits(fraction).load()[1].rows["id"].tolist()) for fraction in (0.1, 0.3))
    assert small < large
    assert len(small) == 180


def test_blobs_have_the_spread_and_separation_asked_for() -> None:
    source = Blobs(num_classes=4, num_features=5, rows=8000, test_rows=400, spread=0.2, separation=3.0, seed=9)
    assert torch.pdist(source.centres()).min().item() == pytest.approx(3.0)
    train, test, _ = source.load()
    assert (len(train), len(test)) == (8000, 400)
    for part in (train, test):
        centres = source.centres()[part.rows["y"].long()]
        assert (part.rows["x"] - centres).std().item() == pytest.approx(0.2, rel=0.05)
        assert torch.equal(torch.cdist(part.rows["x"].double(), source.centres()).argmin(1), part.rows["y"].long())
    assert not torch.equal(Blobs(seed=1).load()[0].rows["x"], Blobs(seed=2).load()[0].rows["x"])


def test_parabolas_follow_their_formula() -> None:
    train = Parabolas(rows=5000, split=0.4, noise=0.02).load().train
    x, y, branch = (train.rows[name].double() for name in ("x", "y", "branch"))
    assert train.label == "branch"
    assert train.num_classes == 2
    assert x.shape == y.shape == (5000, 1)
    assert torch.equal(branch, (x[:, 0] >= 0.4).double())
    noise = y - torch.where(x < 0.4, x**2 - 1, 1 - x**2)
    assert noise.std().item() == pytest.approx(0.02, rel=0.05)
    assert noise.abs().max() < 0.02 * 5
    assert x.abs().max() <= 1
    assert branch.mean().item() == pytest.approx(0.3, abs=0.03)


def test_k_means_does_not_find_the_split_of_the_parabolas() -> None:
    from sklearn.cluster import KMeans

    train = Parabolas().load().train
    x, branch = train.rows["x"].numpy(), train.rows["branch"].numpy()
    clusters = KMeans(2, n_init=3, random_state=0).fit(x)
    assert abs(clusters.cluster_centers_.mean()) < 0.05
    agreement = (clusters.labels_ == branch).mean()
    assert max(agreement, 1 - agreement) < 0.85


@pytest.mark.parametrize(
    ("source", "name", "value"),
    [
        *((Digits, "test_fraction", value) for value in (0.0, 1.0, -0.5, 2.0, float("nan"))),
        *((Blobs, "num_classes", value) for value in (0, 257)),
        *((Blobs, name, value) for name, value in {"num_features": 0, "rows": 0, "test_rows": -1}.items()),
        *((Blobs, name, value) for name, value in {"spread": -0.1, "separation": float("nan"), "seed": -1}.items()),
        *((Parabolas, "split", value) for value in (1.0, float("nan"))),
        *((Parabolas, name, value) for name, value in {"noise": float("inf"), "rows": 0}.items()),
        *((Bananas, name, value) for name, value in {"modes": 4, "rows": 0, "test_rows": -2, "seed": -1}.items()),
        *((Bananas, "separation", value) for value in (-1.0, float("nan"))),
    ],
)
def test_arguments_out_of_range_are_refused(source: Any, name: str, value: float) -> None:
    error_of(lambda: source(**{name: value}).load(), f"{name} ({value})")


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_digits_refuses_a_fraction_that_leaves_a_set_empty(fraction: float) -> None:
    error_of(lambda: Digits(fraction).load(), "0 samples")


# Sharing


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 100, 101])
def test_shares_cover_all_once_and_evenly(count: int, world: int) -> None:
    shares = [share(count, rank, world) for rank in range(world)]
    assert [position for part in shares for position in part] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def _ids(shard: RankBatch) -> list[int]:
    return shard.rows["id"].tolist()


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 10, 37, 100])
def test_worlds_see_the_same_batches(batch_size: int, ordered: bool) -> None:
    dataset = _dataset(37)
    for world in WORLDS:
        one = Loader(dataset, batch_size, seed=3, phase=1, ordered=ordered)
        loaders = [Loader(dataset, batch_size, 3, 1, rank, world, ordered) for rank in range(world)]
        for epoch, index in ((0, 0), (2, one.num_batches - 1), (1, 0)):
            whole = one.batch(epoch, index)
            shards = [loader.batch(epoch, index) for loader in loaders]
            assert [sample for shard in shards for sample in _ids(shard)] == _ids(whole)
            counts = tuple(len(_ids(shard)) for shard in shards)
            assert all(shard.counts == counts and shard.total == whole.total for shard in shards)
            assert torch.equal(torch.cat([shard.rows["x"] for shard in shards]), whole.rows["x"])


@pytest.mark.parametrize("batch_size", [1, 5, 37, 64])
def test_an_epoch_holds_every_sample_once(batch_size: int) -> None:
    dataset = _dataset(37)
    loader = Loader(dataset, batch_size, seed=0)
    epochs: list[list[int]] = []
    for epoch in range(3):
        shards = [loader.batch(epoch, index) for index in range(loader.num_batches)]
        assert all(shard.total == batch_size for shard in shards[:-1])
        assert 0 < shards[-1].total <= batch_size
        epochs.append([sample for shard in shards for sample in _ids(shard)])
        assert sorted(epochs[-1]) == dataset.rows["id"].tolist()
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_are_random_access() -> None:
    dataset = _dataset(50)
    loader = Loader(dataset, 8, seed=1)
    forward = {(epoch, i): _ids(loader.batch(epoch, i)) for epoch in range(3) for i in range(loader.num_batches)}
    for (epoch, index), ids in reversed(forward.items()):
        assert _ids(loader.batch(epoch, index)) == ids
        assert _ids(Loader(dataset, 8, seed=1).batch(epoch, index)) == ids
    assert _ids(Loader(dataset, 8, seed=2).batch(0, 0)) != forward[0, 0]
    assert _ids(Loader(dataset, 8, seed=1, phase=1).batch(0, 0)) != forward[0, 0]


def test_ordered_batches_follow_the_file() -> None:
    dataset = _dataset(20)
    loader = Loader(dataset, 6, seed=1, ordered=True)
    ids = [sample for index in range(loader.num_batches) for sample in _ids(loader.batch(5, index))]
    assert ids == dataset.rows["id"].tolist()


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("world", WORLDS)
def test_splits_agree_on_every_rank(world: int, num_parts: int) -> None:
    dataset = _dataset(37)
    shards = [Loader(dataset, 30, 4, 0, rank, world).batch(1, 1) for rank in range(world)]
    splits = [shard.split(num_parts) for shard in shards]
    for rank, (shard, parts) in enumerate(zip(shards, splits, strict=True)):
        assert len(parts) == num_parts
        assert [sample for part in parts for sample in _ids(part)] == _ids(shard)
        assert [len(_ids(part)) for part in parts] == [part.counts[rank] for part in parts]
        assert [part.counts for part in parts] == [part.counts for part in splits[0]]
        sizes = [len(_ids(part)) for part in parts]
        assert max(sizes) - min(sizes) <= 1
    assert sum(part.total for part in splits[0]) == shards[0].total


def test_the_loader_refuses_sizes_out_of_range() -> None:
    error_of(lambda: Loader(_dataset(3), 0, seed=0), "batch_size (0)")
    error_of(lambda: Loader(_dataset(3), 2, seed=0).batch(0, 0).split(0), "num_parts (0)")
    error_of(lambda: Loader(_dataset(3), 2, seed=-1).batch(0, 0), "seed (-1)")
    with pytest.raises(AssertionError):
        Loader(_dataset(3), 2, seed=0).batch(0, 2)
