"""Samples in shards: the same rows in the same order, whoever reads them and however."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mixdist.competition.delivery import OwnReader, bring
from mixdist.data import Augment, Epoch, Loader, Shards
from mixdist.data.order import shuffled_blocks
from mixdist.data.shards.samples import ShardSamples
from mixdist.noise import DISCRIMINATOR_PHASE
from mixdist.parallel.mesh import Placement
from tests.errors import error_of
from tests.tars import COUNTS, SIDE, encoded, image_of, make_index, make_shards, sample_of, write_shard

NUM_TRAIN = 44
BLOCKS: dict[str, Any] = {"block": 5, "window": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder)
    return folder


@pytest.fixture(scope="module")
def by_workers(folder: Path) -> Iterator[dict[int, ShardSamples]]:
    """The training samples, read by so many processes."""
    made = {workers: Shards(str(folder), workers=workers, **BLOCKS).load()[0] for workers in (0, 2, 4)}
    yield made
    for samples in made.values():
        samples.close()


def stream(samples: ShardSamples, ranks: int, start: int = 0, phase: int = 3) -> list[list[int]]:
    """Give the ids of each global batch of two epochs, from a step on, as the ranks have them one after another."""
    loaders = [Loader(samples, 7, 5, phase, rank, ranks, epochs=2) for rank in range(ranks)]
    batches = []
    for step in range(start, 2 * loaders[0].num_batches):
        shards = [loader.batch(*divmod(step, loader.num_batches)) for loader in loaders]
        for shard in shards:
            for sample, x in zip(shard.rows["id"].tolist(), shard.rows["x"], strict=True):
                assert np.array_equal(x.permute(1, 2, 0).numpy(), image_of(sample))
        batches.append([sample for shard in shards for sample in shard.rows["id"].tolist()])
    return batches


def test_samples_are_what_was_written(folder: Path) -> None:
    train, test, _ = Shards(str(folder), workers=0).load()
    assert (len(train), len(test)) == (NUM_TRAIN, 9)
    assert torch.cat([train.ids, test.ids]).tolist() == list(range(sum(COUNTS.values())))
    rows = test.take(torch.tensor([8, 0, 3]))
    assert rows["id"].tolist() == [52, 44, 47]
    for sample, x, y, attributes in zip(*(rows[name] for name in ("id", "x", "y", "attributes")), strict=True):
        assert np.array_equal(x.permute(1, 2, 0).numpy(), image_of(int(sample)))
        assert int(y) == sample % 3
        assert attributes.tolist() == [sample % 2, int(sample % 5 == 0)]
    assert train.class_names == ("a", "b", "c")
    assert train.attribute_names == ("Round", "Tall")
    assert set(train.take(torch.tensor([1]), fields=("y",))) == {"id", "y"}


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_the_stream_of_ids_is_one_for_all_ranks_and_workers(by_workers: dict[int, ShardSamples], ranks: int) -> None:
    expected = stream(by_workers[0], 1)
    assert expected != stream(by_workers[0], 1, phase=2)
    for epoch in (expected[:7], expected[7:]):
        assert sorted(sample for batch in epoch for sample in batch) == list(range(NUM_TRAIN))
    for samples in by_workers.values():
        assert stream(samples, ranks) == expected


@pytest.mark.parametrize("start", [1, 6, 7, 13])
def test_a_stream_goes_on_from_any_step_on_another_layout(by_workers: dict[int, ShardSamples], start: int) -> None:
    expected = stream(by_workers[0], 1)
    for ranks, workers in ((3, 2), (2, 0), (5, 4)):
        assert stream(by_workers[workers], ranks, start) == expected[start:]


@pytest.mark.parametrize(("block", "window", "batch"), [(1, 1, 1), (5, 2, 7), (4, 100, 16), (100, 1, 3), (7, 3, 1000)])
def test_an_order_by_blocks_holds_each_position_once_and_mixes_few_blocks(block: int, window: int, batch: int) -> None:
    positions = torch.arange(0, 230, 2)  # an expert's own: not all
    order = shuffled_blocks(positions, Epoch(1, 0, 4, expert=2), block, window, batch)
    assert sorted(order.tolist()) == positions.tolist()
    assert order.tolist() == shuffled_blocks(positions, Epoch(1, 0, 4, expert=2), block, window, batch).tolist()
    if len(positions) > batch:
        assert order.tolist() != shuffled_blocks(positions, Epoch(1, 0, 5, expert=2), block, window, batch).tolist()
    for part in order.split(batch):
        in_blocks = (part // block).tolist()
        changes = sum(a != b for a, b in itertools.pairwise(in_blocks))
        assert changes == len(set(in_blocks)) - 1  # a batch goes through its blocks one after another
        most = window * (-(-len(part) // max(1, window * (block // 2))) + 1)
        assert len(set(in_blocks)) <= most


def test_blocks_come_in_any_order_and_mix_evenly() -> None:
    firsts = np.zeros(8)
    pairs = 0
    for number in range(400):
        order = shuffled_blocks(torch.arange(64), Epoch(0, 0, number), 8, 2, 4)
        firsts[int(order[0]) // 8] += 1
        pairs += len(set((order[:4] // 8).tolist()))
    assert (abs(firsts - 50) < 5 * np.sqrt(50)).all()
    assert 1.6 < pairs / 400 < 2.0  # four of sixteen samples of two blocks: 1.88 blocks in the mean


def test_augmentation_belongs_to_the_row_and_the_epoch() -> None:
    ids, epoch = torch.arange(400), Epoch(7, 1, 2)
    images = torch.arange(400 * 3 * 6 * 5, dtype=torch.int32).reshape(400, 3, 6, 5)
    both = Augment(flip=True, shift=2)
    changed = both(images, ids, epoch)
    some = torch.tensor([3, 77, 200])
    assert torch.equal(both(images[some], ids[some], epoch), changed[some])
    assert not torch.equal(both(images, ids, dataclasses.replace(epoch, number=3)), changed)
    flipped = Augment(flip=True)(images, ids, epoch)
    as_they_are = (flipped == images).flatten(1).all(1)
    assert torch.equal(flipped[~as_they_are], images[~as_they_are].flip(-1))
    assert 150 < as_they_are.sum() < 250


def test_shifts_move_by_every_offset_and_mirror_edges() -> None:
    ids, shift = torch.arange(500), 2
    images = torch.randint(0, 256, (500, 3, 6, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    moved = Augment(shift=shift)(images, ids, Epoch(0))
    assert moved.dtype == torch.uint8
    seen = set()
    for before, after in zip(images, moved, strict=True):
        wide = torch.from_numpy(np.pad(before.numpy(), ((0, 0), (2, 2), (2, 2)), mode="reflect"))
        places = [(i, j) for i in range(5) for j in range(5) if torch.equal(wide[:, i : i + 6, j : j + 5], after)]
        assert len(places) == 1
        seen.update(places)
    assert len(seen) == 25


def test_training_rows_are_augmented_and_held_out_ones_are_not(folder: Path) -> None:
    train, test, _ = Shards(str(folder), workers=0, augment=Augment(flip=True)).load()
    everything = torch.arange(NUM_TRAIN)
    plain = train.take(everything)["x"]
    assert torch.equal(plain, train.take(everything)["x"])
    assert not torch.equal(plain, train.take(everything, Epoch(0))["x"])
    shard = Loader(test, 9, 0, ordered=True).batch(0, 0)
    assert np.array_equal(shard.rows["x"][0].permute(1, 2, 0).numpy(), image_of(44))


def test_a_split_is_held_out_by_id_where_there_is_none(tmp_path: Path) -> None:
    make_shards(tmp_path, {"train-000000.tar": 200})
    train, test, _ = Shards(str(tmp_path), holdout=0.2, workers=0).load()
    assert sorted([*train.ids.tolist(), *test.ids.tolist()]) == list(range(200))
    assert 20 <= len(test) <= 60
    again = Shards(str(tmp_path), holdout=0.2, workers=0, limit=10).load()
    assert [part.ids.tolist() for part in again[:2]] == [train.ids[:10].tolist(), test.ids[:10].tolist()]


def test_images_are_brought_to_a_size_and_a_label_may_be_an_attribute(folder: Path) -> None:
    train = Shards(str(folder), size=4, crop=6, label="Tall", workers=0).load().train
    assert train.spec["x"].shape == (3, 4, 4)
    assert train.class_names == ("not Tall", "Tall")
    assert train.take(torch.arange(11))["y"].tolist() == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    assert Shards(str(folder), channels=1, workers=0).load()[0].take(torch.tensor([0]))["x"].shape == (1, 1, SIDE, SIDE)
    assert Shards(str(folder), label="none", workers=0).load()[0].label is None


def test_arrays_are_read_without_pickles(tmp_path: Path) -> None:
    def array_of(number: int, values: Any) -> dict[str, bytes | str]:
        file = io.BytesIO()
        np.save(file, values, allow_pickle=True)
        return {"__key__": f"{number:03d}", "npy": file.getvalue()}

    write_shard(tmp_path / "train-0.tar", [array_of(n, np.full(3, n, dtype=np.float32)) for n in range(5)])
    write_shard(tmp_path / "test-0.tar", [array_of(5, np.full(3, 5, dtype=np.float32)), array_of(6, np.array([None]))])
    make_index(tmp_path, ["train-0.tar", "test-0.tar"])
    train, test, _ = Shards(str(tmp_path), workers=0).load()
    assert train.take(torch.tensor([4, 1]))["x"].tolist() == [[4.0] * 3, [1.0] * 3]
    error_of(lambda: test.take(torch.tensor([1])), "sample 6 in shard test-0.tar at offset ", ".npy")


class TestDamage:
    """What is wrong with a sample is told with shard, id and offset."""

    def flip(self, folder: Path, place: int) -> tuple[str, int]:
        """Flip a bit in a sample's image; give its shard and offset."""
        samples = Shards(str(folder), workers=0).load()[0]
        shard, offset, size, _ = samples.shelf.wanted(samples.places[[place]])[0]
        data = bytearray((folder / shard).read_bytes())
        data[offset + size // 2] ^= 1
        (folder / shard).write_bytes(data)
        return shard, offset

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_flipped_bit(self, tmp_path: Path, workers: int) -> None:
        make_shards(tmp_path)
        shard, offset = self.flip(tmp_path, 20)
        samples = Shards(str(tmp_path), workers=workers).load()[0]
        named = f"sample 20 in shard {shard} at offset {offset}: ", "on_error"
        error_of(lambda: samples.take(torch.arange(NUM_TRAIN)), *named)
        assert len(samples.take(torch.arange(20))["x"]) == 20
        samples.close()

    def test_skipped_samples_are_the_same_on_any_layout(self, tmp_path: Path) -> None:
        make_shards(tmp_path)
        bad = sample_of(30)
        bad["png"] = bad["png"][:60]  # type: ignore[index]
        write_shard(tmp_path / "train-000002.tar", [bad if n == 30 else sample_of(n) for n in range(14, 44)])
        make_index(tmp_path, list(COUNTS))
        self.flip(tmp_path, 3)
        samples = Shards(str(tmp_path), workers=0, on_error="skip", max_skipped=0.1).load()[0]
        for ranks in (1, 2, 3):
            told = [one for rank in range(ranks) for one in samples.unreadable(rank, ranks)]
            assert [sample for sample, _ in told] == [3, 30]
            assert all(f"sample {sample} in shard" in why for sample, why in told)
        kept = samples.without([3, 30])
        assert kept.ids.tolist() == [n for n in range(NUM_TRAIN) if n not in (3, 30)]
        assert len(kept.take(torch.arange(42))["x"]) == 42
        assert kept.fingerprint != samples.fingerprint
        few = Shards(str(tmp_path), workers=0, on_error="skip", max_skipped=0.02).load()[0]
        error_of(lambda: few.without([3, 30]), "2 of 44 samples", "data.init_args.max_skipped", 0.02)

    def test_other_sizes_are_no_rows(self, tmp_path: Path) -> None:
        odd = {"__key__": "000000001", "png": encoded(image_of(1, 6)), "cls": "0"}
        write_shard(tmp_path / "train-0.tar", [{**sample_of(0)}, {**sample_of(1), **odd}])
        index = make_index(tmp_path, ["train-0.tar"])
        dataclasses.replace(index, image=None).write(tmp_path)
        samples = Shards(str(tmp_path), workers=0, holdout=0.0, test="train").load()[0]
        error_of(lambda: samples.take(torch.arange(2)), "sample 1 ", "(3, 6, 6)", "(3, 8, 8)", "size")


def test_experts_and_discriminators_have_other_orders_of_blocks(folder: Path) -> None:
    samples, everything = Shards(str(folder), workers=0, **BLOCKS).load()[0], torch.arange(NUM_TRAIN)
    orders = [samples.ordered(everything, Epoch(0, phase), 4) for phase in (0, DISCRIMINATOR_PHASE)]
    firsts = [list(dict.fromkeys((order // BLOCKS["block"]).tolist())) for order in orders]
    assert firsts[0] != firsts[1]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_owners_read_their_own_samples_whatever_the_skew(by_workers: dict[int, ShardSamples], ranks: int) -> None:
    expert_N = np.repeat(np.arange(8), [20, 10, 6, 4, 2, 1, 1, 0])  # one has nothing
    expert_N = np.random.default_rng(0).permutation(expert_N)
    placement, epoch = Placement.plan(8, ranks), Epoch(3, 1, 2)

    def batches(samples: ShardSamples, e: int) -> list[torch.Tensor]:
        own = torch.from_numpy(np.flatnonzero(expert_N == e))
        return list(samples.ordered(own, dataclasses.replace(epoch, expert=e), 4).split(4)) if len(own) else []

    def read(samples: ShardSamples, rank: int) -> dict[int, list[list[int]]]:
        """Give the ids of the batches of each expert of a rank."""
        mesh: Any = SimpleNamespace(placement=placement, rank=rank, device=torch.device("cpu"))
        experts = placement.experts_of(placement.member_of(rank))
        wanted = {p: [b for e in placement.experts_of(p) for b in batches(samples, e)] for p in range(ranks)}
        brought = bring(OwnReader(samples, mesh), mesh, wanted.__getitem__, ("x",), epoch)()
        ids = brought.rows["id"]
        for sample, x in zip(ids.tolist(), brought.rows["x"], strict=True):
            assert np.array_equal(x.permute(1, 2, 0).numpy(), image_of(sample))
        return {e: [ids[brought.place(batch)].tolist() for batch in batches(samples, e)] for e in experts}

    expected = {e: [batch.tolist() for batch in batches(by_workers[0], e)] for e in range(8)}  # here ids are positions
    assert sorted(n for own in expected.values() for batch in own for n in batch) == list(range(NUM_TRAIN))
    for samples in by_workers.values():
        assert {e: own for rank in range(ranks) for e, own in read(samples, rank).items()} == expected


def test_the_held_out_split_is_test_or_else_valid(tmp_path: Path) -> None:
    make_shards(tmp_path, {"train-0.tar": 5, "val-0.tar": 3})
    assert Shards(str(tmp_path), workers=0).load()[1].ids.tolist() == [5, 6, 7]
    make_shards(tmp_path, {"train-0.tar": 5, "val-0.tar": 3, "test-0.tar": 2})
    assert Shards(str(tmp_path), workers=0).load()[1].ids.tolist() == [8, 9]
    assert Shards(str(tmp_path), test="valid", workers=0).load()[1].ids.tolist() == [5, 6, 7]
