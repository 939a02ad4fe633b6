"""Validation rows: the same ids in every run, on every layout and of every source; test rows wait for the last step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixdist.data import Bananas, Blobs, Dataset, Digits, Memory, Parabolas, Shards, Source, Splits
from mixdist.data.sources.splits import load_splits
from mixdist.terms import Field
from tests import sources
from tests.errors import error_of, refusal_of
from tests.launch import HARD, SMALL, changed, here, refused, together, write_config
from tests.tars import make_shards

OWN = '''
"""A source as a user would write it: a plain pair, whose test rows cannot even be looked at."""
from mixdist.data import Blobs, Dataset, Source


class Sealed(Dataset):
    def start(self, index, epoch=None, fields=None):
        raise ValueError("test rows were read")

    @property
    def fingerprint(self):
        raise ValueError("test rows were read")

    def unreadable(self, rank, world_size):
        raise ValueError("test rows were read")


class Rows(Source):
    def load(self):
        train, test, _ = Blobs(rows=120, test_rows=30, spread=0.2).load()
        return train, Sealed(test.rows, test.spec, test.label)
'''


class Pair(Source):
    """A source of before there were validation rows."""

    def load(self) -> Any:
        return tuple(Blobs(rows=90, test_rows=20).load()[:2])


def shards(folder: Path, **options: Any) -> Shards:
    make_shards(folder, {"train-000000.tar": 60, "test-000000.tar": 9})
    return Shards(str(folder), workers=0, **options)


def idx(folder: Path) -> Memory:
    sources.idx(folder)
    return Memory("idx", str(folder))


MAKERS: dict[str, Callable[[Path], Source]] = {
    "digits": lambda folder: Digits(),
    "blobs": lambda folder: Blobs(rows=200),
    "parabolas": lambda folder: Parabolas(rows=200),
    "bananas": lambda folder: Bananas(rows=200, test_rows=20),
    "memory": idx,
    "shards": shards,
    "own": lambda folder: Pair(),
}


@pytest.mark.parametrize("valid", [0.4, 3])
@pytest.mark.parametrize("kind", MAKERS)
def test_every_source_is_cut_by_ids(kind: str, valid: float, tmp_path: Path) -> None:
    source = MAKERS[kind](tmp_path)
    whole = Splits(*source.load())
    cut, again = load_splits(source, valid), load_splits(source, valid)
    assert cut.valid is not None
    train, held = set(cut.train.ids.tolist()), set(cut.valid.ids.tolist())
    assert train | held == set(whole.train.ids.tolist())
    assert not train & held
    assert not (train | held) & set(whole.test.ids.tolist())
    assert len(cut.train) + len(cut.valid) == len(whole.train)
    assert valid < 1 or len(cut.valid) == valid
    assert cut.test.fingerprint == whole.test.fingerprint
    for part, same in zip(cut, again, strict=True):
        assert part is not None
        assert same is not None
        assert part.fingerprint == same.fingerprint
        assert (part.spec, part.label, part.class_names) == (
            whole.train.spec,
            whole.train.label,
            whole.train.class_names,
        )
    assert cut.train.fingerprint != whole.train.fingerprint
    # A row keeps what is its own, in the data set's order.
    places = torch.isin(whole.train.ids, cut.valid.ids).nonzero()[:, 0]
    for name, column in cut.valid.take(torch.arange(len(cut.valid))).items():
        assert torch.equal(column, whole.train.take(places)[name])
    if whole.train.log_density_N is not None:
        assert torch.equal(cut.valid.log_density_N, whole.train.log_density_N[places])
    assert load_splits(source, None).train.fingerprint == whole.train.fingerprint


def test_a_row_stays_where_it_is_when_rows_are_added() -> None:
    few, more = (load_splits(Blobs(rows=rows), 0.3).valid for rows in (300, 600))
    assert few is not None
    assert more is not None
    assert few.ids.tolist() == [n for n in more.ids.tolist() if n < 300]
    assert 60 < len(few) < 120


def test_the_first_rows_by_hash_grow_with_their_number() -> None:
    few, more = (load_splits(Digits(), number).valid for number in (100, 300))
    assert few is not None
    assert more is not None
    assert (len(few), len(more)) == (100, 300)
    assert set(few.ids.tolist()) < set(more.ids.tolist())


def test_what_is_held_out_for_tests_says_nothing_about_validation(tmp_path: Path) -> None:
    """With one hash for both, no row would be left below the threshold."""
    make_shards(tmp_path, {"train-000000.tar": 200})
    cut = load_splits(Shards(str(tmp_path), holdout=0.3, workers=0), 0.3)
    assert cut.valid is not None
    parts = [set(part.ids.tolist()) for part in (cut.train, cut.test, cut.valid)]
    assert sorted(n for part in parts for n in part) == list(range(200))
    assert 0.15 < len(parts[2]) / (len(parts[0]) + len(parts[2])) < 0.45
    exact = load_splits(Shards(str(tmp_path), holdout=20, workers=0), 30)
    assert [len(part) for part in exact if part is not None] == [150, 20, 30]


def test_a_source_s_own_validation_rows_are_taken_as_they_are(tmp_path: Path) -> None:
    make_shards(tmp_path, {"train-0.tar": 5, "val-0.tar": 3, "test-0.tar": 2})
    loaded = load_splits(Shards(str(tmp_path), workers=0), None)
    assert loaded.valid is not None
    assert loaded.valid.ids.tolist() == [5, 6, 7]
    for options in ({"test": "valid"}, {"train": "valid"}):
        assert Shards(str(tmp_path), workers=0, **options).load().valid is None  # type: ignore[arg-type]
    assert len(Shards(str(tmp_path), workers=0, limit=2).load().valid or ()) == 2
    error_of(lambda: load_splits(Shards(str(tmp_path), workers=0), 0.5), "valid (0.5)", "Shards", 3)


@pytest.mark.parametrize("found", [None, (), (1,), (1, 2, 3, 4), {"train": 1, "test": 2}])
def test_a_source_must_return_splits(found: Any) -> None:
    class Odd(Source):
        def load(self) -> Any:
            return found

    error_of(lambda: load_splits(Odd(), None), "Odd.load", "Splits(train, test)")


@pytest.mark.parametrize("part", [0, 0.0, -3, -0.1, 1.0, 2.5, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["valid", "holdout"])
def test_no_part_and_no_number(name: str, part: float, tmp_path: Path) -> None:
    if name == "valid":
        error_of(lambda: load_splits(Blobs(), part), f"valid ({part})")
    elif part:  # which is none
        make_shards(tmp_path, {"train-000000.tar": 20})
        error_of(lambda: Shards(str(tmp_path), holdout=part, workers=0).load(), f"holdout ({part})")


@pytest.mark.parametrize("part", [50, 1000, 1e-12, 1 - 1e-12])
def test_rows_are_left_on_both_sides(part: float) -> None:
    error_of(lambda: load_splits(Blobs(rows=50), part), f"valid ({part})", 50)


# Runs


def test_training_looks_at_validation_rows_and_leaves_test_rows_alone(folder: Path) -> None:
    (folder / "watched_rows.py").write_text(OWN)
    expert = HARD["mixture"]["init_args"]["expert"]
    config = write_config(
        folder / "c.yaml", changed(SMALL, data="watched_rows.Rows", expert=expert, train__batch_size=40, valid=0.2)
    )
    watched = "--select.monitor", "loss"
    for words in (("--out", "soft"), ("--out", "select", *watched), ("--out", "on", "--train.epochs", "2", *watched)):
        ended = here("train", "--config", config, *words)
        assert (ended.code, ended.err) == (0, "")
        assert " validation rows: loss " in ended.out
    hard = write_config(folder / "hard.yaml", changed(HARD, data="watched_rows.Rows", valid=0.2))
    ended = here("train", "--config", hard, "--out", "hard", *watched)
    assert (ended.code, ended.err) == (0, "")
    assert " validation rows: loss " in ended.out
    for split in ("valid", "train"):
        ended = here("evaluate", "soft", "--split", split, "--num_samples", "1")
        assert (ended.code, ended.err) == (0, "")
    refusal_of("evaluate", "soft", named=("test rows were read",))


def test_the_same_rows_on_any_layout(folder: Path) -> None:
    config = write_config(folder / "c.yaml", changed(valid=0.25))
    assert here("train", "--config", config, "--out", "run").code == 0
    valid = load_splits(Digits(), 0.25).valid
    assert valid is not None
    found = []
    for ranks in (1, 2):
        words = "evaluate", "run", "--split", "valid", "--num_samples", "2"
        ended = here(*words) if ranks == 1 else together(*words, ranks=2, folder=folder)
        assert ended.code == 0, ended
        assert f"{len(valid)} validation rows: " in ended.out
        found.append(json.loads((folder / "run" / "evaluation-valid.json").read_text()))
    for told in found:
        assert told["protocol"]["split"] == "valid"
        assert told["protocol"]["data"] == valid.fingerprint
    assert found[0]["figures"] == pytest.approx(found[1]["figures"], rel=1e-5)
    assert not (folder / "run" / "evaluation.json").exists()


def test_other_validation_rows_are_another_run(folder: Path) -> None:
    config = write_config(folder / "c.yaml", changed(valid=0.25))
    assert here("train", "--config", config, "--out", "run").code == 0
    for words in (("train", "--resume", "run"), ("evaluate", "run")):
        for value in ("0.5", "100", "null"):
            refusal_of(*words, "--valid", value, named=("valid 0.25", "None" if value == "null" else value))


def test_a_run_without_validation_rows_has_none(folder: Path) -> None:
    assert here("train", "--config", write_config(folder / "c.yaml", changed()), "--out", "run").code == 0
    refused("evaluate", "run", "--split", "valid", names="--split valid train test")
    refused("evaluate", "run", "--split", "dev", names="split dev train valid test")


@pytest.mark.parametrize("value", [0, -1, 1.0, 1.5, 0.0, 5000, "half"])
def test_a_part_that_cannot_be_is_refused(value: Any, folder: Path) -> None:
    refused("train", "--config", write_config(folder / "c.yaml", changed(valid=value)), names=f"valid {value}")


def test_datasets_with_attributes_are_cut() -> None:
    marks = torch.tensor([[0, 1], [1, 1], [0, 0]], dtype=torch.uint8)
    rows = {"id": torch.tensor([10, 11, 12]), "marks": marks}
    dataset = Dataset(rows, {"marks": Field((2,), torch.uint8)}, attribute="marks", attribute_names=("a", "b"))
    part = dataset.part(torch.tensor([0, 2]))
    assert (part.attribute, part.attribute_names, part.ids.tolist()) == ("marks", ("a", "b"), [10, 12])
