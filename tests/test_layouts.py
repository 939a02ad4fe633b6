"""The layouts in which data sets come: every sample is found, numbered and read as it is; all else is refused."""

from __future__ import annotations

import builtins
import gzip
import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mixdist.data import Cifar10, Idx
from mixdist.data.formats import SOURCES, Listing, Sample, open_listing
from mixdist.data.formats.listing import Files
from mixdist.data.images import Unreadable
from tests import sources
from tests.sources import MAKERS, make, picture, put

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def _error(call: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def _samples(layout: Listing) -> list[tuple[str, Sample]]:
    return [(split, one) for split in layout.splits for one in layout.samples(split, 0, layout.count(split))]


def test_every_source_has_a_maker_here() -> None:
    assert MAKERS.keys() == SOURCES.keys()


@pytest.mark.parametrize("kind", MAKERS)
def test_each_sample_is_what_it_is(kind: str, tmp_path: Path) -> None:
    truths = make(kind, tmp_path)
    layout = open_listing(kind, tmp_path)
    found = _samples(layout)
    assert len(found) == len(truths) == sum(part.num for part in layout.parts)
    assert [split for split in ("train", "valid", "test") if split in layout.splits] == list(layout.splits)
    for (split, one), truth in zip(found, truths, strict=True):
        assert (split, one.id, one.label, tuple(one.attributes)) == (
            truth.split,
            truth.id,
            truth.label,
            truth.attributes,
        )
        raw = layout.reader.read(one)
        if isinstance(truth.raw, bytes):
            assert raw == truth.raw
        else:
            assert isinstance(raw, np.ndarray)
            assert raw.dtype == np.uint8
            np.testing.assert_array_equal(raw, truth.raw)
            assert layout.image == raw.shape


@pytest.mark.parametrize("kind", MAKERS)
def test_a_range_of_a_split_is_that_part_of_it(kind: str, tmp_path: Path) -> None:
    make(kind, tmp_path)
    layout = open_listing(kind, tmp_path)
    for split in layout.splits:
        num = layout.count(split)
        whole = layout.samples(split, 0, num)
        for size in (1, 2, 3, num, num + 5):
            pieces = [layout.samples(split, first, first + size) for first in range(0, num, size)]
            assert [one for piece in pieces for one in piece] == whole


@pytest.mark.parametrize("kind", MAKERS)
def test_classes_may_be_left_out(kind: str, tmp_path: Path) -> None:
    make(kind, tmp_path)
    with_classes, without = open_listing(kind, tmp_path), open_listing(kind, tmp_path, labels=False)
    assert [one._replace(label=None) for _, one in _samples(with_classes)] == [one for _, one in _samples(without)]
    assert without.class_names == ()


def _read(reader: Any, sample: Sample) -> Any:
    return reader.read(sample)


def test_readers_travel_to_other_processes(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for kind in MAKERS:
            truths = make(kind, tmp_path / kind)
            layout = open_listing(kind, tmp_path / kind)
            assert len(pickle.dumps(layout.reader)) < 1000  # the listing stays here
            samples = [one for _, one in _samples(layout)]
            # Out of order, so that a reader with a file in memory has to change it.
            for k in (0, len(samples) - 1, 1):
                np.testing.assert_array_equal(pool.apply(_read, (layout.reader, samples[k])), truths[k].raw)


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


def test_names_of_classes(tmp_path: Path) -> None:
    make("imagenet", tmp_path / "i")
    assert open_listing("imagenet", tmp_path / "i").class_names == sources.WNIDS
    (tmp_path / "i" / "words.txt").write_text("n01440764\ttench, Tinca tinca\nn01443537\tgoldfish\nn09999999\tno\n")
    assert open_listing("imagenet", tmp_path / "i").class_names == ("tench, Tinca tinca", "goldfish", "n02007558")
    make("cifar10", tmp_path / "c")
    names = [f"class {c}" for c in range(10)]
    put(tmp_path / "c" / "cifar-10-batches-bin" / "batches.meta.txt", "\n".join(names).encode())
    assert open_listing("cifar10", tmp_path / "c").class_names == tuple(names)
    make("cifar100", tmp_path / "d")
    put(tmp_path / "d" / "fine_label_names.txt", "\n".join(f"{c}" for c in range(100)).encode())
    assert open_listing("cifar100", tmp_path / "d").class_names[99] == "99"
    make("folder", tmp_path / "f")
    assert open_listing("folder", tmp_path / "f").class_names == ("ant", "bee", "cat")


def test_names_of_attributes(tmp_path: Path) -> None:
    make("celeba", tmp_path)
    assert open_listing("celeba", tmp_path).attribute_names == ("Smiling", "Male", "Bald")


def test_ids_are_those_of_the_sources_in_memory(tmp_path: Path) -> None:
    make("cifar10", tmp_path / "cifar10")
    make("idx", tmp_path / "idx")
    for kind, source in (("cifar10", Cifar10), ("idx", Idx)):
        layout = open_listing(kind, tmp_path / kind)
        for split, dataset in zip(("train", "test"), source(str(tmp_path / kind)).load(), strict=True):
            samples = layout.samples(split, 0, layout.count(split))
            assert [one.id for one in samples] == dataset.rows["id"].tolist()
            assert [one.label for one in samples] == dataset.rows["y"].tolist()
            images = np.stack([layout.reader.read(one) for one in samples])
            np.testing.assert_array_equal(images, dataset.rows["x"].numpy())


# CelebA.


def test_celeba_as_png(tmp_path: Path) -> None:
    make("celeba", tmp_path)
    folder = tmp_path / "img_align_celeba"
    for path in list(folder.iterdir()):
        with Image.open(path) as image:
            image.save(path.with_suffix(".png"))
        path.unlink()
    layout = open_listing("celeba", tmp_path)
    assert _samples(layout)[0][1].name == "000001.png"


@pytest.mark.parametrize(
    ("name", "old", "new", "match"),
    [
        ("list_eval_partition.txt", "000002.jpg 1", "000002.jpg 3", r"line 2 is '000002.jpg 3', expected a name and 0"),
        ("list_eval_partition.txt", "000002.jpg 1", "000001.jpg 1", r"line 2 names '000001.jpg' once more"),
        (
            "list_eval_partition.txt",
            "000002.jpg 1\n",
            "",
            r"names 8 images, but .* have beside them 1, the first '000002'",
        ),
        (
            "list_attr_celeba.txt",
            "000002.jpg",
            "000099.jpg",
            r"of which 'list_attr_celeba.txt' lack 1, the first '0000",
        ),
        ("list_attr_celeba.txt", " 1", " 2", r"line \d+ is .* expected another name and 3 times -1 or 1"),
        ("list_attr_celeba.txt", "9\nSmiling", "Smiling", r"must begin with a number of images"),
        ("list_attr_celeba.txt", "Smiling Male", "Male Male", r"must begin with a number of images and a line"),
    ],
)
def test_lists_of_celeba_that_are_wrong(name: str, old: str, new: str, match: str, tmp_path: Path) -> None:
    make("celeba", tmp_path)
    text = (tmp_path / name).read_text()
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new, 1))
    _error(lambda: open_listing("celeba", tmp_path), match)


def test_faces_that_are_missing_are_not_passed_over(tmp_path: Path) -> None:
    make("celeba", tmp_path)
    (tmp_path / "img_align_celeba" / "000004.jpg").unlink()
    _error(
        lambda: open_listing("celeba", tmp_path),
        r"names 9 images, of which the images in .* lack 1, the first '000004'",
    )
    (tmp_path / "list_eval_partition.txt").write_bytes(b"\xff\xfe")
    _error(lambda: open_listing("celeba", tmp_path), "cannot be read as text")


# ImageNet.


def test_trees_of_imagenet_that_are_wrong(tmp_path: Path) -> None:
    make("imagenet", tmp_path)
    extra = tmp_path / "val" / "n09999999"
    extra.mkdir()
    _error(lambda: open_listing("imagenet", tmp_path), "n09999999' is a class that train has not")
    extra.rmdir()
    loose = tmp_path / "val" / "ILSVRC2012_val_00000009.JPEG"
    put(loose, picture(0))
    _error(lambda: open_listing("imagenet", tmp_path), "val_00000009.JPEG' and 0 more lie in no class")
    loose.unlink()
    (tmp_path / "train" / "cats").mkdir()
    _error(lambda: open_listing("imagenet", tmp_path), "cats' is no class such as 'n01440764'")


def test_classes_of_imagenet_without_images(tmp_path: Path) -> None:
    (tmp_path / "train" / "n01440764").mkdir(parents=True)
    _error(lambda: open_listing("imagenet", tmp_path), "has no image in its classes")


# Any folder.


def test_without_splits_all_is_train(tmp_path: Path) -> None:
    for place, name in enumerate(("b/1.jpg", "a/x/2.jpg", "a/1.png")):
        put(tmp_path / name, picture(place))
    layout = open_listing("folder", tmp_path)
    assert [(split, one.name, one.label) for split, one in _samples(layout)] == [
        ("train", "a/1.png", 0),
        ("train", "a/x/2.jpg", 0),
        ("train", "b/1.jpg", 1),
    ]
    put(tmp_path / "0.jpg", picture(9))
    _error(lambda: open_listing("folder", tmp_path), r"0.jpg' lies in no folder that could be its class.*--labels none")
    assert _samples(open_listing("folder", tmp_path, labels=False))[0][1].name == "0.jpg"


def test_what_lies_beside_the_splits_is_refused(tmp_path: Path) -> None:
    make("folder", tmp_path)
    put(tmp_path / "extra" / "1.jpg", picture(0))
    _error(
        lambda: open_listing("folder", tmp_path), r"extra/1.jpg' lies beside the splits 'test', 'train', 'validation'"
    )
    (tmp_path / "extra" / "1.jpg").unlink()
    (tmp_path / "val").mkdir()
    _error(lambda: open_listing("folder", tmp_path), "has 'val' and 'validation' for one split")


def test_what_is_no_image_is_counted(tmp_path: Path) -> None:
    make("folder", tmp_path)
    assert open_listing("folder", tmp_path).passed_over == 1  # hidden files are not even that


def test_links(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "1.jpg", picture(1))
    root = tmp_path / "root"
    root.mkdir()
    (root / "ant").symlink_to(tmp_path / "elsewhere")
    assert [one.name for _, one in _samples(open_listing("folder", root))] == ["ant/1.jpg"]
    (root / "ant" / "again").symlink_to(root)
    _error(lambda: open_listing("folder", root), "is a link to a folder that it lies in")
    (root / "ant" / "again").unlink()


def test_what_only_looks_like_an_image_is_set_aside(tmp_path: Path) -> None:
    put(tmp_path / "ant" / "1.jpg", picture(1))
    (tmp_path / "ant" / "2.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "ant" / "3.jpg")
    layout = open_listing("folder", tmp_path)
    whole, *odd = [one for _, one in _samples(layout)]
    assert layout.reader.read(whole)
    for one in odd:
        with pytest.raises(Unreadable, match="no plain file"):
            layout.reader.read(one)


def test_names_of_any_bytes(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/a"
    os.mkdir(folder)
    with open(folder + b"/\xff\xfe.jpg", "wb") as file:
        file.write(picture(1))
    layout = open_listing("folder", tmp_path)
    assert layout.reader.read(_samples(layout)[0][1]) == picture(1)


def test_a_file_too_large_to_be_an_image(tmp_path: Path) -> None:
    with open(tmp_path / "1.jpg", "wb") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(Unreadable, match="it has 1073741825 bytes, expected at most 1073741824"):
        Files(tmp_path).read(Sample(0, "1.jpg", "", 0, None, b""))


# Files with many images.


def test_cut_and_foreign_files(tmp_path: Path) -> None:
    for kind, name, match in (
        ("cifar10", "cifar-10-batches-bin/test_batch.bin", "is truncated or foreign: .* not a multiple of 3073"),
        ("cifar100", "test.bin", "is truncated or foreign: .* not a multiple of 3074"),
        ("idx", "train-images-idx3-ubyte", "is truncated"),
        ("svhn", "train_32x32.mat", "cannot be read as MATLAB's"),
        ("parquet", "data/train-00001-of-00002.parquet", "cannot be read as parquet"),
    ):
        if kind == "parquet":
            pytest.importorskip("pyarrow")
        make(kind, tmp_path / kind)
        path = tmp_path / kind / name
        path.write_bytes(path.read_bytes()[:-7])
        _error(lambda kind=kind: open_listing(kind, tmp_path / kind), match)


def test_a_file_that_shrinks_after_the_listing(tmp_path: Path) -> None:
    make("cifar100", tmp_path)
    layout = open_listing("cifar100", tmp_path)
    path = tmp_path / "train.bin"
    path.write_bytes(path.read_bytes()[:3074])
    _error(lambda: layout.reader.read(layout.samples("train", 4, 5)[0]), "has 1 images, fewer than when it was listed")


def test_labels_of_cifar100_are_checked(tmp_path: Path) -> None:
    make("cifar100", tmp_path)
    body = bytearray((tmp_path / "test.bin").read_bytes())
    body[3074 + 1] = 100
    (tmp_path / "test.bin").write_bytes(body)
    _error(lambda: open_listing("cifar100", tmp_path), "has the label 100 at image 1, expected 0 to 99")


def test_foreign_matlab_files(tmp_path: Path) -> None:
    from scipy import io

    make("svhn", tmp_path)
    for content, match in (
        ({"y": np.ones((3, 1))}, "has no X of 4 dimensions"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.ones((3, 1))}, "has 2 images and 3 labels"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.full((2, 1), 11)}, "expected as many of 1 to 10"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([["a"], ["b"]], object)}, "has no numbers 'y'"),
    ):
        io.savemat(tmp_path / "test_32x32.mat", content)
        _error(lambda: open_listing("svhn", tmp_path), match)
    io.savemat(tmp_path / "test_32x32.mat", {"X": np.zeros((32, 32, 3, 2)), "y": np.ones((2, 1))})
    layout = open_listing("svhn", tmp_path)
    _error(lambda: layout.reader.read(layout.samples("test", 0, 1)[0]), "has X float64")


def test_idx_images_of_two_sizes(tmp_path: Path) -> None:
    make("idx", tmp_path)
    body = b"\0\0\x08\x03" + bytes((0, 0, 0, 3, 0, 0, 0, 9, 0, 0, 0, 10)) + bytes(270)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(body)
    _error(lambda: open_listing("idx", tmp_path), "have 10x9 pixels in training and 9x10 in testing")
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(body)[:-3])
    _error(lambda: open_listing("idx", tmp_path), "cannot be read")


# Parquet.


def test_columns_of_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    for column, is_struct in (("img", True), ("jpg", False)):
        truths = sources.parquet(tmp_path / column, column, is_struct, names=False)
        layout = open_listing("parquet", tmp_path / column)
        assert [layout.reader.read(one) for _, one in _samples(layout)] == [truth.raw for truth in truths]
        assert layout.class_names == ()
    sources.parquet(tmp_path / "no", "pixels", False)
    _error(lambda: open_listing("parquet", tmp_path / "no"), "has columns pixels, label, other, expected image")


def test_names_of_classes_of_parquet(tmp_path: Path) -> None:
    make("parquet", tmp_path)
    layout = open_listing("parquet", tmp_path)
    assert layout.class_names == sources.HUB_NAMES
    assert _samples(layout)[6][1].name == "train-00001-of-00002.parquet image 1"


def test_parquet_reads_a_row_group_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    make("parquet", tmp_path)
    layout = open_listing("parquet", tmp_path)
    read: list[int] = []
    real = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, group, **kw: read.append(group) or real(self, group, **kw)
    )
    for one in layout.samples("train", 0, 9):
        layout.reader.read(one)
    assert read == [0, 1, 2, 0, 1]


def test_parquet_files_that_do_not_belong_together(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    make("parquet", tmp_path)
    last = tmp_path / "data" / "train-00001-of-00002.parquet"
    body = last.read_bytes()
    last.unlink()
    _error(
        lambda: open_listing("parquet", tmp_path), "has 1 files of 'train', expected each from 00000 to before 00002"
    )
    pq.write_table(pa.table({"img": [b"x"], "label": [1]}), last)
    _error(lambda: open_listing("parquet", tmp_path), "has columns .*img.*, others .*image")
    pq.write_table(pa.table({"image": [b"x"], "label": [-1]}), last)
    _error(lambda: open_listing("parquet", tmp_path), "has rows of train without a class .*--labels none")
    assert open_listing("parquet", tmp_path, labels=False).count("train") == 6
    last.write_bytes(body)
    last.rename(tmp_path / "data" / "a b.parquet")
    _error(lambda: open_listing("parquet", tmp_path), "a b.parquet' is not named as on the hub")


def test_rows_without_an_image(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    rows = [{"bytes": None, "path": "elsewhere.png"}, None, {"bytes": b"", "path": None}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), tmp_path / "train.parquet")
    layout = open_listing("parquet", tmp_path)
    for one in layout.samples("train", 0, 3):
        with pytest.raises(Unreadable, match="it is empty"):
            layout.reader.read(one)


def test_without_pyarrow_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "train.parquet", b"")
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    _error(lambda: open_listing("parquet", tmp_path), r"needs pyarrow, .* pip install 'mixdist\[parquet\]'")


# The wrong layout.


@pytest.mark.parametrize("kind", MAKERS)
def test_another_layout_is_named(kind: str, tmp_path: Path) -> None:
    make(kind, tmp_path)
    for other in MAKERS:
        if other == "folder" and kind in ("celeba", "imagenet"):
            continue  # theirs are trees of images as well
        if other == kind:
            continue
        _error(
            lambda other=other: open_listing(other, tmp_path), f"has no.*; it looks like {kind}: try mixdist prepare"
        )


@pytest.mark.parametrize("kind", MAKERS)
def test_a_folder_without_anything(kind: str, tmp_path: Path) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    _error(lambda: open_listing(kind, tmp_path / "nowhere"), "nowhere' is no folder: name the one that holds the files")
    with pytest.raises(ValueError, match="has no") as caught:
        open_listing(kind, tmp_path)
    assert "looks like" not in str(caught.value)
    _error(lambda: open_listing("coco", tmp_path), "source 'coco' is unknown: choose of celeba, imagenet")


@pytest.mark.parametrize(
    ("kind", "folder"), [("celeba", "celeba"), ("imagenet", "imagenet"), ("cifar10", "cifar10"), ("idx", "mnist")]
)
def test_real_data(kind: str, folder: str) -> None:
    if not (DATA / folder).is_dir():
        pytest.skip(f"{DATA / folder} is absent: the real data was not tried")
    layout = open_listing(kind, DATA / folder)
    counts = {split: layout.count(split) for split in layout.splits}
    assert (
        counts
        == {
            "celeba": {"train": 7000, "valid": 500, "test": 500},
            "imagenet": {"train": 334},
            "cifar10": {"train": 10_000, "test": 1000},
            "idx": {"train": 60_000, "test": 10_000},
        }[kind]
    )
