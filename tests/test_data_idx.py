"""MNIST's file format: what is read, and one message for each way a file can be wrong."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mixdist.data import Idx
from mixdist.terms import Field


def _error(call: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def _idx(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def arrays() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, high, shape) for high, shape in ((256, (7, 4, 5)), (10, 7), (256, (3, 4, 5)), (10, 3))]


@pytest.fixture
def root(tmp_path: Path, arrays: list[np.ndarray]) -> Path:
    for place, (name, array) in enumerate(zip(NAMES, arrays, strict=True)):
        if place % 2:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(_idx(array)))
        else:
            (tmp_path / name).write_bytes(_idx(array))
    return tmp_path


def test_idx_reads_plain_and_packed_files(root: Path, arrays: list[np.ndarray]) -> None:
    train, test = Idx(str(root)).load()
    np.testing.assert_array_equal(train.rows["x"].numpy()[:, 0], arrays[0])
    np.testing.assert_array_equal(train.rows["y"].numpy(), arrays[1])
    np.testing.assert_array_equal(test.rows["x"].numpy()[:, 0], arrays[2])
    np.testing.assert_array_equal(test.rows["y"].numpy(), arrays[3])
    assert train.rows["id"].tolist() == list(range(7))
    assert test.rows["id"].tolist() == [7, 8, 9]
    assert train.spec["x"] == Field((1, 4, 5), torch.uint8, scale=1 / 255)
    assert train.num_classes == 10
    assert train.label == "y"


def test_a_limit_keeps_the_ids(root: Path) -> None:
    train, test = Idx(str(root), limit=2).load()
    assert train.rows["id"].tolist() == [0, 1]
    assert test.rows["id"].tolist() == [7, 8]
    assert train.rows["x"].untyped_storage().nbytes() == 2 * 20
    assert len(Idx(str(root), limit=100).load()[0]) == 7


def test_idx_refuses_arguments_out_of_range(root: Path) -> None:
    _error(lambda: Idx("data", limit=0), r"limit \(0\) must be at least 1")
    _error(lambda: Idx("data", num_classes=0), r"num_classes \(0\) must be from 1 to 256")
    _error(lambda: Idx(str(root), num_classes=2).load(), "field 'y' of sample .* expected a class from 0 to 1")


def test_a_missing_folder_or_file(root: Path) -> None:
    _error(lambda: Idx(str(root / "nowhere")).load(), "root .*nowhere.* is not a folder")
    (root / NAMES[2]).unlink()
    _error(lambda: Idx(str(root)).load(), f"has no file '{NAMES[2]}' or '{NAMES[2]}.gz'")


def test_a_foreign_file(root: Path, arrays: list[np.ndarray]) -> None:
    (root / NAMES[0]).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    _error(lambda: Idx(str(root)).load(), "begins with 0x89504e47, expected 0x00000803 for images")
    (root / NAMES[0]).write_bytes(_idx(arrays[1]))
    _error(lambda: Idx(str(root)).load(), "begins with 0x00000801, expected 0x00000803")
    (root / NAMES[0]).write_bytes(b"")
    _error(lambda: Idx(str(root)).load(), "begins with nothing, expected 0x00000803")


@pytest.mark.parametrize("kept", [10, 16, 100])
def test_a_truncated_file(root: Path, kept: int) -> None:
    whole = (root / NAMES[0]).read_bytes()
    (root / NAMES[0]).write_bytes(whole[:kept])
    expected = 16 if kept < 16 else 16 + 7 * 20
    _error(lambda: Idx(str(root)).load(), f"is truncated: expected {expected} bytes, found {kept}")


def test_a_packed_file_whose_contents_are_truncated(root: Path, arrays: list[np.ndarray]) -> None:
    (root / f"{NAMES[1]}.gz").write_bytes(gzip.compress(_idx(arrays[1])[:-2]))
    _error(lambda: Idx(str(root)).load(), "is truncated: expected 15 bytes, found 13")


@pytest.mark.parametrize("damage", ["cut", "tail", "bits", "checksum", "plain"])
def test_a_damaged_packed_file(root: Path, damage: str) -> None:
    path = root / f"{NAMES[1]}.gz"
    whole = bytearray(path.read_bytes())
    if damage == "cut":
        whole = whole[:-12]
    elif damage == "tail":
        whole = whole[:-4]
    elif damage == "bits":
        whole[10] = 0xFF
    elif damage == "checksum":
        whole[-6] ^= 1
    else:
        whole = bytearray(b"not packed at all")
    path.write_bytes(whole)
    _error(lambda: Idx(str(root)).load(), r"labels-idx1-ubyte.gz' cannot be read \(.+\): fetch the file again")


def test_bytes_after_the_end(root: Path, arrays: list[np.ndarray]) -> None:
    (root / NAMES[0]).write_bytes(_idx(arrays[0]) + b"\0")
    _error(lambda: Idx(str(root)).load(), "goes on after the 140 bytes that its header claims")


def test_labels_and_images_that_disagree(root: Path, arrays: list[np.ndarray]) -> None:
    (root / f"{NAMES[1]}.gz").write_bytes(gzip.compress(_idx(arrays[1][:-1])))
    _error(lambda: Idx(str(root)).load(), f"'{NAMES[0]}' has 7 images and '{NAMES[1]}' 6 labels")


def test_images_of_two_sizes(root: Path, arrays: list[np.ndarray]) -> None:
    (root / NAMES[2]).write_bytes(_idx(arrays[2].reshape(3, 5, 4)))
    _error(lambda: Idx(str(root)).load(), "4x5 pixels in training and 5x4 in testing, expected one size")


@pytest.mark.parametrize("dims", [(2**32 - 1, 2**32 - 1, 2**32 - 1), (2**31 // 20, 20, 21), (0, 4, 5), (7, 0, 5)])
def test_absurd_dimensions(root: Path, dims: tuple[int, ...]) -> None:
    (root / NAMES[0]).write_bytes(bytes((0, 0, 8, 3)) + struct.pack(">3I", *dims) + bytes(100))
    _error(lambda: Idx(str(root)).load(), f"claims {' x '.join(map(str, dims))} = .* expected from 1 to {2**31}")


@pytest.mark.parametrize("packed", [True, False])
def test_memory_follows_the_file_and_not_its_claims(root: Path, packed: bool) -> None:
    # A header that claims 2 GiB over nothing, and 64 MiB of zeros packed behind a header that claims one byte.
    if packed:
        (root / NAMES[0]).unlink()
        claims = bytes((0, 0, 8, 3)) + struct.pack(">3I", 1, 1, 1)
        (root / f"{NAMES[0]}.gz").write_bytes(gzip.compress(claims + bytes(64 << 20), 1))
    else:
        (root / NAMES[0]).write_bytes(bytes((0, 0, 8, 3)) + struct.pack(">3I", 2**11, 2**10, 2**10) + bytes(100))
    tracemalloc.start()
    try:
        _error(lambda: Idx(str(root)).load(), "goes on after" if packed else "truncated")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
