"""CIFAR-10's binary files: what is read, and one message for each way they can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mixdist.data import Cifar10
from mixdist.terms import Field

CLASSES = [f"class {c}" for c in range(10)]


def _error(call: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def _records(count: int, seed: int) -> np.ndarray:
    """Records as in the files: a label, then the planes."""
    random = np.random.default_rng(seed)
    labels, pixels = random.integers(0, 10, (count, 1)), random.integers(0, 256, (count, 3072))
    return np.concatenate([labels, pixels], 1).astype(np.uint8)


@pytest.fixture
def files() -> dict[str, np.ndarray]:
    return {"data_batch_1.bin": _records(4, 1), "data_batch_3.bin": _records(3, 3), "test_batch.bin": _records(2, 9)}


@pytest.fixture
def root(tmp_path: Path, files: dict[str, np.ndarray]) -> Path:
    for name, records in files.items():
        (tmp_path / name).write_bytes(records.tobytes())
    return tmp_path


def test_what_is_there_is_read(root: Path, files: dict[str, np.ndarray]) -> None:
    train, test = Cifar10(str(root)).load()
    records = np.concatenate([files["data_batch_1.bin"], files["data_batch_3.bin"]])
    np.testing.assert_array_equal(train.rows["y"].numpy(), records[:, 0])
    np.testing.assert_array_equal(train.rows["x"].numpy(), records[:, 1:].reshape(-1, 3, 32, 32))
    # Byte 1 + 1024 c + 32 h + w of a record is colour c at row h and column w.
    assert train.rows["x"][5, 2, 7, 11] == records[5, 1 + 1024 * 2 + 32 * 7 + 11]
    np.testing.assert_array_equal(test.rows["y"].numpy(), files["test_batch.bin"][:, 0])
    assert train.spec["x"] == Field((3, 32, 32), torch.uint8, scale=1 / 255)
    assert (train.label, train.num_classes, train.class_names) == ("y", 10, ())


def test_ids_do_not_depend_on_which_files_are_there(root: Path) -> None:
    train, test = Cifar10(str(root)).load()
    assert train.rows["id"].tolist() == [0, 1, 2, 3, 20_000, 20_001, 20_002]
    assert test.rows["id"].tolist() == [50_000, 50_001]
    (root / "data_batch_1.bin").unlink()
    assert Cifar10(str(root)).load()[0].rows["id"].tolist() == [20_000, 20_001, 20_002]


def test_a_limit_takes_the_first(root: Path, files: dict[str, np.ndarray]) -> None:
    train, test = Cifar10(str(root), limit=5).load()
    assert train.rows["id"].tolist() == [0, 1, 2, 3, 20_000]
    assert train.rows["y"][4] == files["data_batch_3.bin"][0, 0]
    assert len(test) == 2
    train, test = Cifar10(str(root), limit=1).load()
    assert (len(train), len(test)) == (1, 1)
    assert train.rows["x"].untyped_storage().nbytes() <= 3073
    _error(lambda: Cifar10(str(root), limit=0), r"limit \(0\) must be at least 1")


def test_names_and_the_folder_inside(root: Path, tmp_path: Path) -> None:
    (root / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n\n")
    inner = tmp_path / "outer" / "cifar-10-batches-bin"
    inner.mkdir(parents=True)
    for path in root.glob("*.*"):
        path.rename(inner / path.name)
    train, _ = Cifar10(str(inner.parent)).load()
    assert train.class_names == tuple(CLASSES)
    assert train.fingerprint == Cifar10(str(inner)).load()[0].fingerprint
    (inner / "batches.meta.txt").write_text("cat\n")
    _error(lambda: Cifar10(str(inner)).load(), r"batches.meta.txt.* has 1 names, expected 10")
    (inner / "batches.meta.txt").write_bytes(b"\xff\xfe")
    _error(lambda: Cifar10(str(inner)).load(), r"batches.meta.txt.* cannot be read as text")


def test_what_is_missing(root: Path) -> None:
    _error(lambda: Cifar10(str(root / "nowhere")).load(), "root .*nowhere.* is not a folder")
    (root / "test_batch.bin").rename(root / "kept")
    _error(lambda: Cifar10(str(root)).load(), "has no file 'test_batch.bin'")
    (root / "kept").rename(root / "test_batch.bin")
    for name in ("data_batch_1.bin", "data_batch_3.bin"):
        (root / name).unlink()
    _error(lambda: Cifar10(str(root)).load(), "has none of the files 'data_batch_1.bin' to 'data_batch_5.bin'")


@pytest.mark.parametrize("name", ["data_batch_3.bin", "test_batch.bin"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda whole: b"", "is empty"),
        (lambda whole: whole[:-1], "is truncated or foreign: .* bytes are not a multiple of 3073"),
        (lambda whole: whole + b"\x00", "is truncated or foreign"),
        (lambda whole: whole[:3073] + b"\x0a" + whole[3074:], "has the label 10 at image 1, expected 0 to 9"),
        (lambda whole: bytes(3073) * 10_001, "has more than 10000 images"),
    ],
)
def test_a_damaged_file(root: Path, name: str, damage: Callable[[bytes], bytes], said: str) -> None:
    (root / name).write_bytes(damage((root / name).read_bytes()))
    _error(lambda: Cifar10(str(root)).load(), f"{name}' {said}")


def test_a_folder_in_the_place_of_a_file(root: Path) -> None:
    (root / "test_batch.bin").unlink()
    (root / "test_batch.bin").mkdir()
    _error(lambda: Cifar10(str(root)).load(), "test_batch.bin' cannot be read")
