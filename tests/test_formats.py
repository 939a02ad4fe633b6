"""The formats in which data sets come: every sample is found, numbered and read as it is; all else is refused."""

from __future__ import annotations

import builtins
import gzip
import hashlib
import multiprocessing
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mixdist.data import Cifar10, Idx, Memory
from mixdist.data.formats import SOURCES, Listing, Sample, open_listing
from mixdist.data.formats.listing import Files
from mixdist.data.images import SOURCE_FORMATS, Unreadable, decode
from mixdist.terms import Field
from tests import sources
from tests.errors import error_of
from tests.sources import MAKERS, make, picture, put

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
SIZE = {"celeba": 8, "imagenet": 8, "folder": 8, "parquet": 8}
"""A size for the images of formats whose images differ in size."""


def _samples(listing: Listing) -> list[tuple[str, Sample]]:
    return [(split, one) for split in listing.splits for one in listing.samples(split, 0, listing.count(split))]


def test_every_source_has_a_maker_here() -> None:
    assert MAKERS.keys() == SOURCES.keys()


@pytest.mark.parametrize("kind", MAKERS)
def test_each_sample_is_what_it_is(kind: str, tmp_path: Path) -> None:
    truths = make(kind, tmp_path)
    listing = open_listing(kind, tmp_path)
    found = _samples(listing)
    assert len(found) == len(truths) == sum(part.num for part in listing.parts)
    assert [split for split in ("train", "valid", "test") if split in listing.splits] == list(listing.splits)
    for (split, one), truth in zip(found, truths, strict=True):
        known = truth.split, truth.id, truth.label, truth.attributes
        assert (split, one.id, one.label, tuple(one.attributes)) == known
        raw = listing.reader.read(one)
        if isinstance(truth.raw, bytes):
            assert raw == truth.raw
        else:
            assert isinstance(raw, np.ndarray)
            assert raw.dtype == np.uint8
            np.testing.assert_array_equal(raw, truth.raw)
            assert listing.image == raw.shape


@pytest.mark.parametrize("kind", MAKERS)
def test_a_range_of_a_split_is_that_part_of_it_and_classes_may_be_left_out(kind: str, tmp_path: Path) -> None:
    make(kind, tmp_path)
    listing, without = open_listing(kind, tmp_path), open_listing(kind, tmp_path, labels=False)
    for split in listing.splits:
        num = listing.count(split)
        whole = listing.samples(split, 0, num)
        for size in (1, 2, 3, num, num + 5):
            pieces = [listing.samples(split, first, first + size) for first in range(0, num, size)]
            assert [one for piece in pieces for one in piece] == whole
    assert [one._replace(label=None) for _, one in _samples(listing)] == [one for _, one in _samples(without)]
    assert without.class_names == ()
    assert listing.passed_over == (kind == "folder")  # what is no image is counted, hidden files not even that


def _read(reader: Any, sample: Sample) -> Any:
    return reader.read(sample)


def test_readers_travel_to_other_processes(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for kind in MAKERS:
            truths = make(kind, tmp_path / kind)
            listing = open_listing(kind, tmp_path / kind)
            assert len(pickle.dumps(listing.reader)) < 1000  # the listing stays here
            samples = [one for _, one in _samples(listing)]
            # Out of order, so that a reader with a file in memory has to change it.
            for k in (0, len(samples) - 1, 1):
                np.testing.assert_array_equal(pool.apply(_read, (listing.reader, samples[k])), truths[k].raw)


@pytest.mark.parametrize("kind", ["celeba", "imagenet", "folder"])
def test_listing_opens_no_image(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(kind, tmp_path)
    opened: list[str] = []
    real = Path.open

    def watched(path: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(path.name)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", watched)
    monkeypatch.setattr(builtins, "open", lambda *args, **kwargs: pytest.fail(f"opened {args}"))
    open_listing(kind, tmp_path)
    assert all(name.endswith(".txt") for name in opened)


@pytest.mark.parametrize("kind", MAKERS)
def test_the_digest_names_the_content(kind: str, tmp_path: Path) -> None:
    make(kind, tmp_path / "a")
    make(kind, tmp_path / "b")
    first = open_listing(kind, tmp_path / "a").digest
    assert first == open_listing(kind, tmp_path / "a").digest == open_listing(kind, tmp_path / "b").digest
    # Another image with another size, or another byte of a file of many images.
    files = [path for path in sorted((tmp_path / "b").rglob("[a-zA-Z0-9]*")) if path.is_file()]
    if kind in ("celeba", "imagenet", "folder"):
        path = next(path for path in files if path.suffix.lower() in (".jpg", ".jpeg"))
        path.write_bytes(path.read_bytes() + b"\0")
    elif kind in ("cifar10", "cifar100", "idx"):
        path = next(path for path in files if path.suffix in (".bin", ""))
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    elif kind == "svhn":
        (tmp_path / "b" / "train_32x32.mat").write_bytes((tmp_path / "b" / "test_32x32.mat").read_bytes())
    else:
        sources.parquet(tmp_path / "b", names=False)
    assert open_listing(kind, tmp_path / "b").digest != first


WORDS = b"n01440764\ttench, Tinca tinca\nn01443537\tgoldfish\nn09999999\tno\n"


def _lines(*names: object) -> bytes:
    return "\n".join(map(str, names)).encode()


@pytest.mark.parametrize(
    ("kind", "name", "content", "known"),
    [
        ("imagenet", "", b"", sources.WNIDS),
        ("imagenet", "words.txt", WORDS, ("tench, Tinca tinca", "goldfish", "n02007558")),
        ("cifar10", "cifar-10-batches-bin/batches.meta.txt", _lines(*range(10), ""), tuple("0123456789")),
        ("cifar100", "fine_label_names.txt", _lines(*range(100)), tuple(map(str, range(100)))),
        ("folder", "", b"", ("ant", "bee", "cat")),
        ("parquet", "", b"", sources.HUB_NAMES),
    ],
)  # fmt: skip
def test_names_of_classes(kind: str, name: str, content: bytes, known: tuple[str, ...], tmp_path: Path) -> None:
    make(kind, tmp_path)
    if name:
        put(tmp_path / name, content)
    assert open_listing(kind, tmp_path).class_names == known


# In memory.


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_in_memory_is_what_the_source_holds(kind: str, tmp_path: Path) -> None:
    truths = make(kind, tmp_path)
    listing = open_listing(kind, tmp_path)
    test = "test" if "test" in listing.splits else "valid"
    names = ["train", test, *(["valid"] if "valid" in listing.splits and test == "test" else [])]
    loaded = Memory(kind, str(tmp_path), size=SIZE.get(kind)).load()
    assert (loaded.valid is None) == (len(names) == 2)
    for split, dataset in zip(names, loaded, strict=False):
        held = [truth for truth in truths if truth.split == split]
        raws = [truth.raw for truth in held]
        is_file = isinstance(raws[0], bytes)
        images = [decode(raw, 3, SIZE[kind], formats=SOURCE_FORMATS) if is_file else raw for raw in raws]
        assert dataset.ids.tolist() == [truth.id for truth in held]
        np.testing.assert_array_equal(dataset.rows["x"].numpy(), np.stack(images))
        assert dataset.spec["x"] == Field(images[0].shape, torch.uint8, scale=1 / 255)
        assert dataset.class_names == listing.class_names
        if held[0].label is not None:
            assert dataset.rows["y"].tolist() == [truth.label for truth in held]
        assert (dataset.label is None) == (held[0].label is None)
        if held[0].attributes:
            assert dataset.rows["attributes"].tolist() == [list(truth.attributes) for truth in held]
        assert dataset.attribute_names == listing.attribute_names


@pytest.mark.parametrize(("kind", "source"), [("idx", Idx), ("cifar10", Cifar10)])
def test_runs_name_their_data_by_bytes_ids_and_classes(kind: str, source: Any, tmp_path: Path) -> None:
    held = [truth for truth in make(kind, tmp_path) if truth.split == "train"]
    ids, y = np.array([truth.id for truth in held]), np.array([truth.label for truth in held], dtype=np.uint8)
    digest = hashlib.sha256(ids.tobytes() + np.stack([truth.raw for truth in held]).tobytes() + y.tobytes())
    train = source(str(tmp_path)).load().train
    assert train.fingerprint == digest.hexdigest()
    assert (train.label, train.num_classes, train.spec["y"].dtype) == ("y", 10, torch.uint8)


def test_ids_do_not_depend_on_which_files_are_there_nor_on_the_folder(tmp_path: Path) -> None:
    make("cifar10", tmp_path)
    inner = tmp_path / "cifar-10-batches-bin"
    assert Cifar10(str(tmp_path)).load()[0].fingerprint == Cifar10(str(inner)).load()[0].fingerprint
    (inner / "data_batch_1.bin").unlink()
    train, test, _ = Cifar10(str(tmp_path)).load()
    assert (train.ids.tolist(), test.ids.tolist()) == ([20_000, 20_001, 20_002], [50_000, 50_001])


@pytest.mark.parametrize(
    ("source", "kind", "limit", "ids"),
    [(Idx, "idx", 2, ([0, 1], [7, 8])), (Cifar10, "cifar10", 5, ([0, 1, 2, 3, 20_000], [50_000, 50_001]))],
)
def test_a_limit_takes_the_first(source: Any, kind: str, limit: int, ids: Any, tmp_path: Path) -> None:
    make(kind, tmp_path)
    whole, some = source(str(tmp_path)).load(), source(str(tmp_path), limit=limit).load()
    for all_rows, part, known in zip(whole[:2], some[:2], ids, strict=True):
        assert part.ids.tolist() == known
        assert part.fingerprint == all_rows.first(limit).fingerprint
        x = part.rows["x"]
        assert x.untyped_storage().nbytes() == x.nbytes  # the rest of the file does not stay in memory behind a view
    assert len(source(str(tmp_path), limit=100).load()[0]) == 7


def test_a_part_is_held_out_where_there_is_no_other_split(tmp_path: Path) -> None:
    for k in range(60):
        put(tmp_path / "in" / f"{k % 3}" / f"{k:02d}.png", picture(k, (9, 9), kind="PNG"))
    train, test, _ = Memory("folder", str(tmp_path / "in"), holdout=0.3).load()
    assert sorted([*train.ids.tolist(), *test.ids.tolist()]) == list(range(60))
    assert 5 < len(test) < 35
    assert train.num_classes == test.num_classes == 3
    error_of(lambda: Memory("folder", str(tmp_path / "in")).load(), "test", "train", "holdout")
    put(tmp_path / "in" / "0" / "00.png", picture(0, (9, 8), kind="PNG"))
    error_of(lambda: Memory("folder", str(tmp_path / "in"), holdout=0.3).load(), "(3, 8, 9)", "(3, 9, 9)", "size")
    put(tmp_path / "in" / "0" / "00.png", b"no image")
    error_of(lambda: Memory("folder", str(tmp_path / "in"), holdout=0.3).load(), "sample 0", "'0/00.png'")


@pytest.mark.parametrize(
    ("make_source", "named"),
    [
        (lambda root: Idx(root, limit=0), ("limit", 0)),
        (lambda root: Cifar10(root, limit=-1), ("limit", -1)),
        (lambda root: Idx(root, num_classes=0), ("num_classes", 0)),
        (lambda root: Idx(root, num_classes=257), ("num_classes", 257)),
        (lambda root: Idx(root, num_classes=2).load(), ("'y'", "0 to 1")),
        (lambda root: Idx(f"{root}/nowhere").load(), ("nowhere",)),
        (lambda root: Memory("coco", root), ("kind", "coco", "celeba")),
        (lambda root: Memory("idx", root, channels=2), ("channels", 2)),
        (lambda root: Memory("idx", root, size=0), ("size", 0)),
        (lambda root: Memory("idx", root, size=8).load(), ("size", "idx")),
        (lambda root: Memory("idx", root, holdout=0.95).load(), ("holdout", 0.95)),
        (lambda root: Memory("idx", root, holdout=0.1).load(), ("holdout", 0.1, "'test'")),
        (lambda root: Memory("idx", root, train="training").load(), ("training", "train, test")),
        (lambda root: Memory("idx", root, test="valid").load(), ("valid", "train, test")),
    ],
)
def test_arguments_that_do_not_fit(make_source: Callable[[str], object], named: Any, tmp_path: Path) -> None:
    make("idx", tmp_path)
    error_of(lambda: make_source(str(tmp_path)), *named)


# What is refused: a change of a whole source, and what the message must name.

Change = Callable[[Path], object]
IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte")
CIFAR, MAT = "cifar-10-batches-bin/", "test_32x32.mat"
ATTRIBUTES, PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"
LAST = "data/train-00001-of-00002.parquet"


def write(name: str, data: bytes | Callable[[bytes], bytes]) -> Change:
    return lambda root: put(root / name, data if isinstance(data, bytes) else data((root / name).read_bytes()))


def swap(name: str, old: str, new: str) -> Change:
    def change(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new, 1))

    return change


def remove(*names: str) -> Change:
    return lambda root: [(root / name).unlink() for name in names]


def folder(name: str) -> Change:
    return lambda root: (root / name).mkdir(parents=True)


def both(*changes: Change) -> Change:
    return lambda root: [change(root) for change in changes]


def packed(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda data: gzip.compress(change(gzip.decompress(data)))


def dims(*sizes: int) -> bytes:
    return b"\0\0\x08\x03" + struct.pack(">3I", *sizes) + bytes(100)


def flip(place: int, mask: int = 0xFF) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        hurt = bytearray(data)
        hurt[place] ^= mask
        return bytes(hurt)

    return change


def mat(**content: Any) -> Change:
    from scipy import io as matlab

    return lambda root: matlab.savemat(root / MAT, content)


def table(**columns: Any) -> Change:
    def change(root: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.table(columns), root / LAST)

    return change


X = np.zeros((32, 32, 3, 2), np.uint8)
MISTAKES: list[tuple[str, Change, tuple[object, ...]]] = [
    ("idx", remove(IDX[2]), (f"'{IDX[2]}'", f"'{IDX[2]}.gz'")),
    ("idx", write(IDX[0], b"\x89PNG\r\n\x1a\n" + bytes(100)), (IDX[0], "0x89504e47", "0x00000803")),
    ("idx", write(IDX[0], b"\0\0\x08\x01" + bytes(100)), (IDX[0], "0x00000801", "0x00000803")),
    ("idx", write(IDX[0], b""), (IDX[0], "nothing", "0x00000803")),
    *(("idx", write(IDX[0], lambda data, n=n: data[:n]), (IDX[0], 16, n)) for n in (4, 10)),
    *(("idx", write(IDX[0], lambda data, n=n: data[:n]), (IDX[0], 646, n)) for n in (16, 100, 639)),
    ("idx", write(IDX[0], lambda data: data + b"\0"), (IDX[0], 630)),
    ("idx", write(IDX[1], packed(lambda data: data[:-2])), (IDX[1], 15, 13)),
    ("idx", write(IDX[1], lambda data: data[:-12]), (IDX[1],)),
    ("idx", write(IDX[1], lambda data: data[:-4]), (IDX[1],)),
    ("idx", write(IDX[1], flip(10)), (IDX[1],)),
    ("idx", write(IDX[1], flip(-6, 1)), (IDX[1],)),
    ("idx", write(IDX[1], b"not packed at all"), (IDX[1],)),
    ("idx", write(IDX[1], gzip.compress(b"\0\0\x08\x01\0\0\0\x06" + bytes(6))), (IDX[0], 7, "train-labels", 6)),
    ("idx", write(IDX[2], lambda data: data[:8] + bytes((0, 0, 0, 9, 0, 0, 0, 10)) + data[16:]), ("10x9", "9x10")),
    *(
        ("idx", write(IDX[0], dims(*sizes)), (IDX[0], " x ".join(map(str, sizes)), 2**31))
        for sizes in ((2**32 - 1,) * 3, (2**31 // 20, 20, 21), (0, 4, 5), (7, 0, 5))
    ),
    ("cifar10", remove(CIFAR + "test_batch.bin"), ("'test_batch.bin'",)),
    ("cifar10", both(remove(CIFAR + "test_batch.bin"), folder(CIFAR + "test_batch.bin")), ("'test_batch.bin'",)),
    ("cifar10", remove(*(f"{CIFAR}data_batch_{n}.bin" for n in (1, 3))), ("'data_batch_1.bin'", "'data_batch_5.bin'")),
    *(
        ("cifar10", write(CIFAR + name, change), (name, *named))
        for name in ("data_batch_3.bin", "test_batch.bin")
        for change, named in (
            (b"", ()),
            (lambda data: data[:-1], (3073,)),
            (lambda data: data + b"\0", (3073,)),
            (lambda data: data[:3073] + b"\x0a" + data[3074:], ("label 10", "image 1", "0 to 9")),
            (bytes(3073) * 10_001, (10_000,)),
        )
    ),
    ("cifar10", write(CIFAR + "batches.meta.txt", b"cat\n"), ("batches.meta.txt", 1, 10)),
    ("cifar10", write(CIFAR + "batches.meta.txt", b"\xff\xfe"), ("batches.meta.txt",)),
    ("cifar100", write("test.bin", lambda data: data[:-7]), ("test.bin", 3074)),
    ("cifar100", write("test.bin", lambda data: data[:3075] + b"d" + data[3076:]), ("label 100", "image 1", "0 to 99")),
    ("svhn", write(MAT, lambda data: data[:-7]), (MAT,)),
    ("svhn", mat(y=np.ones((3, 1))), (MAT, "X")),
    ("svhn", mat(X=X, y=np.ones((3, 1))), (MAT, 2, 3)),
    ("svhn", mat(X=X, y=np.full((2, 1), 11)), (MAT, "1 to 10")),
    ("svhn", mat(X=X, y=np.array([["a"], ["b"]], object)), (MAT, "'y'")),
    ("celeba", swap(PARTITION, "000002.jpg 1", "000002.jpg 3"), (PARTITION, "line 2", "'000002.jpg 3'")),
    ("celeba", swap(PARTITION, "000002.jpg 1", "000001.jpg 1"), (PARTITION, "line 2", "'000001.jpg'")),
    ("celeba", swap(PARTITION, "000002.jpg 1\n", ""), (PARTITION, 8, "'000002'")),
    ("celeba", write(PARTITION, b"\xff\xfe"), (PARTITION,)),
    ("celeba", swap(ATTRIBUTES, "000002.jpg", "000099.jpg"), (ATTRIBUTES, "'000002'")),
    ("celeba", swap(ATTRIBUTES, " 1", " 2"), (ATTRIBUTES, "line ", 3)),
    ("celeba", swap(ATTRIBUTES, "9\nSmiling", "Smiling"), (ATTRIBUTES,)),
    ("celeba", swap(ATTRIBUTES, "Smiling Male", "Male Male"), (ATTRIBUTES,)),
    ("celeba", remove("img_align_celeba/000004.jpg"), (PARTITION, 9, "'000004'")),
    ("imagenet", folder("val/n09999999"), ("val/n09999999",)),
    ("imagenet", write("val/ILSVRC2012_val_00000009.JPEG", b"x"), ("ILSVRC2012_val_00000009.JPEG",)),
    ("imagenet", folder("train/cats"), ("train/cats",)),
    ("imagenet", lambda root: [path.unlink() for path in root.rglob("*.JPEG")], ("no image", "ImageNet")),
    ("folder", write("extra/1.jpg", b"x"), ("extra/1.jpg", "'test', 'train', 'validation'")),
    ("folder", folder("val"), ("'val'", "'validation'")),
    ("folder", write("train/0.jpg", b"x"), ("train/0.jpg", "--labels none")),
    ("parquet", write(LAST, lambda data: data[:-7]), (LAST,)),
    ("parquet", remove(LAST), ("'train'", "00000", "00002")),
    ("parquet", table(img=[b"x"], label=[1]), (LAST, "img", "image")),
    ("parquet", table(image=[b"x"], label=[-1]), (LAST, "label -1", "--labels none")),
    ("parquet", lambda root: (root / LAST).rename(root / "data" / "a b.parquet"), ("a b.parquet",)),
    ("parquet", lambda root: sources.parquet(root, "pixels", False), ("pixels, label, other", "image")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "named"), MISTAKES)
def test_what_is_not_as_it_should_be_is_named(kind: str, change: Change, named: Any, tmp_path: Path) -> None:
    make(kind, tmp_path)
    change(tmp_path)
    told = error_of(lambda: open_listing(kind, tmp_path), *named)
    assert error_of(lambda: Memory(kind, str(tmp_path)).load()) == told


@pytest.mark.parametrize("is_packed", [True, False])
def test_memory_follows_the_file_and_not_its_claims(is_packed: bool, tmp_path: Path) -> None:
    # A header that claims 2 GiB over nothing, and 64 MiB of zeros packed behind a header that claims one byte.
    make("idx", tmp_path)
    if is_packed:
        (tmp_path / IDX[0]).unlink()
        (tmp_path / f"{IDX[0]}.gz").write_bytes(gzip.compress(dims(1, 1, 1) + bytes(64 << 20), 1))
    else:
        (tmp_path / IDX[0]).write_bytes(dims(2**11, 2**10, 2**10))
    tracemalloc.start()
    try:
        error_of(lambda: Idx(str(tmp_path)).load(), IDX[0])
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_files_that_change_after_the_listing(tmp_path: Path) -> None:
    make("cifar100", tmp_path / "c")
    listing = open_listing("cifar100", tmp_path / "c")
    write("train.bin", lambda data: data[:3074])(tmp_path / "c")
    error_of(lambda: listing.reader.read(listing.samples("train", 4, 5)[0]), "train.bin", 1)
    make("svhn", tmp_path / "s")
    mat(X=X.astype(float), y=np.ones((2, 1)))(tmp_path / "s")  # a listing reads the header alone
    listing = open_listing("svhn", tmp_path / "s")
    error_of(lambda: listing.reader.read(listing.samples("test", 0, 1)[0]), MAT, "float64")


@pytest.mark.parametrize("kind", MAKERS)
def test_another_format_is_named(kind: str, tmp_path: Path) -> None:
    make(kind, tmp_path / "made")
    (tmp_path / "empty").mkdir()
    for other in MAKERS:
        if other != kind and not (other == "folder" and kind in ("celeba", "imagenet")):  # trees of images as well
            error_of(lambda other=other: open_listing(other, tmp_path / "made"), f"looks like {kind}")
    assert "looks like" not in error_of(lambda: open_listing(kind, tmp_path / "empty"), "empty")
    error_of(lambda: open_listing(kind, tmp_path / "nowhere"), "nowhere", kind)
    error_of(lambda: open_listing("coco", tmp_path), "coco", *MAKERS)


# Trees of images.


def test_celeba_as_png(tmp_path: Path) -> None:
    make("celeba", tmp_path)
    for path in list((tmp_path / "img_align_celeba").iterdir()):
        with Image.open(path) as image:
            image.save(path.with_suffix(".png"))
        path.unlink()
    assert _samples(open_listing("celeba", tmp_path))[0][1].name == "000001.png"


def test_without_splits_all_is_train(tmp_path: Path) -> None:
    for place, name in enumerate(("b/1.jpg", "a/x/2.jpg", "a/1.png")):
        put(tmp_path / name, picture(place))
    assert [(split, one.name, one.label) for split, one in _samples(open_listing("folder", tmp_path))] == [
        ("train", "a/1.png", 0),
        ("train", "a/x/2.jpg", 0),
        ("train", "b/1.jpg", 1),
    ]
    put(tmp_path / "0.jpg", picture(9))
    assert _samples(open_listing("folder", tmp_path, labels=False))[0][1].name == "0.jpg"


def test_links(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "1.jpg", picture(1))
    root = tmp_path / "root"
    root.mkdir()
    (root / "ant").symlink_to(tmp_path / "elsewhere")
    assert [one.name for _, one in _samples(open_listing("folder", root))] == ["ant/1.jpg"]
    (root / "ant" / "again").symlink_to(root)
    error_of(lambda: open_listing("folder", root), "again")


def test_what_only_looks_like_an_image_is_set_aside(tmp_path: Path) -> None:
    put(tmp_path / "ant" / "1.jpg", picture(1))
    (tmp_path / "ant" / "2.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "ant" / "3.jpg")  # reading it would wait for ever
    with open(tmp_path / "ant" / "4.jpg", "wb") as file:
        file.truncate(2**30 + 1)
    listing = open_listing("folder", tmp_path)
    whole, *others = [one for _, one in _samples(listing)]
    assert listing.reader.read(whole)
    for one in others:
        error_of(lambda one=one: listing.reader.read(one), kind=Unreadable)
    error_of(lambda: Files(tmp_path).read(others[2]), 2**30 + 1, 2**30, kind=Unreadable)


def test_names_of_any_bytes(tmp_path: Path) -> None:
    os.mkdir(os.fsencode(tmp_path) + b"/a")
    with open(os.fsencode(tmp_path) + b"/a/\xff\xfe.jpg", "wb") as file:
        file.write(picture(1))
    listing = open_listing("folder", tmp_path)
    assert listing.reader.read(_samples(listing)[0][1]) == picture(1)


# Parquet.


def test_columns_of_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    for column, is_struct in (("img", True), ("jpg", False)):
        truths = sources.parquet(tmp_path / column, column, is_struct, names=False)
        listing = open_listing("parquet", tmp_path / column)
        assert [listing.reader.read(one) for _, one in _samples(listing)] == [truth.raw for truth in truths]
        assert listing.class_names == ()
    assert _samples(listing)[6][1].name == "train-00001-of-00002.parquet image 1"
    table(jpg=[b"x"], label=[-1])(tmp_path / "jpg")
    assert open_listing("parquet", tmp_path / "jpg", labels=False).count("train") == 6


def test_parquet_reads_a_row_group_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    make("parquet", tmp_path)
    listing = open_listing("parquet", tmp_path)
    read: list[int] = []
    real = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, group, **kw: read.append(group) or real(self, group, **kw)
    )
    for one in listing.samples("train", 0, 9):
        listing.reader.read(one)
    assert read == [0, 1, 2, 0, 1]


def test_rows_without_an_image(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    rows = [{"bytes": None, "path": "elsewhere.png"}, None, {"bytes": b"", "path": None}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), tmp_path / "train.parquet")
    listing = open_listing("parquet", tmp_path)
    for one in listing.samples("train", 0, 3):
        error_of(lambda one=one: listing.reader.read(one), kind=Unreadable)


def test_without_pyarrow_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "train.parquet", b"")
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    error_of(lambda: open_listing("parquet", tmp_path), "pyarrow", "pip install 'mixdist[parquet]'")


@pytest.mark.parametrize(
    ("kind", "name", "counts"),
    [
        ("celeba", "celeba", {"train": 7000, "valid": 500, "test": 500}),
        ("imagenet", "imagenet", {"train": 334}),
        ("cifar10", "cifar10", {"train": 10_000, "test": 1000}),
        ("idx", "mnist", {"train": 60_000, "test": 10_000}),
    ],
)
def test_real_data(kind: str, name: str, counts: dict[str, int]) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is absent: the real data was not tried")
    listing = open_listing(kind, DATA / name)
    assert {split: listing.count(split) for split in listing.splits} == counts
