"""Small data sets in their official layouts, made by the tests, with what each sample is."""

from __future__ import annotations

import gzip
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy import io as matlab

WNIDS = ("n01440764", "n01443537", "n02007558")
HUB_NAMES = ("cat", "dog", "owl")


class Truth(NamedTuple):
    """One sample: raw is its file's bytes, or pixels uint8 (C, H, W)."""

    split: str
    id: int
    label: int | None
    raw: Any
    attributes: tuple[int, ...] = ()


def picture(
    seed: int, size: tuple[int, int] = (20, 14), mode: str = "RGB", kind: str = "JPEG", **options: Any
) -> bytes:
    """A file with a picture of its own: smooth, so that JPEG hardly changes it."""
    random = np.random.default_rng(seed)
    bands = len(Image.new(mode, (1, 1)).getbands())
    small = random.integers(0, 256, (3, 4, bands), dtype=np.uint8)
    layers = [Image.fromarray(small[:, :, band]).resize(size, Image.Resampling.BICUBIC) for band in range(bands)]
    stream = io.BytesIO()
    (layers[0] if bands == 1 else Image.merge(mode, layers)).save(stream, kind, **options)
    return stream.getvalue()


def put(path: Path, data: bytes) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return data


def celeba(root: Path, num: int = 9, size: tuple[int, int] = (20, 14)) -> list[Truth]:
    """The partition goes 0, 1, 2 in turn, so that the order of ids is not that of the file."""
    names = ("Smiling", "Male", "Bald")
    attributes = np.random.default_rng(1).integers(0, 2, (num, 3))
    files = [f"{k + 1:06d}.jpg" for k in range(num)]
    images = [put(root / "img_align_celeba" / name, picture(k, size)) for k, name in enumerate(files)]
    rows = [f"{name} {' '.join(f'{2 * a - 1:2d}' for a in row)}" for name, row in zip(files, attributes, strict=True)]
    put(root / "list_attr_celeba.txt", "\n".join([str(num), " ".join(names), *rows, ""]).encode())
    put(root / "list_eval_partition.txt", "".join(f"{n} {k % 3}\n" for k, n in enumerate(files)).encode())
    order = sorted(range(num), key=lambda k: (k % 3, k))
    splits = ("train", "valid", "test")
    return [
        Truth(splits[k % 3], place, None, images[k], tuple(map(int, attributes[k]))) for place, k in enumerate(order)
    ]


def imagenet(root: Path) -> list[Truth]:
    found = []
    for folder, split, num in (("train", "train", 3), ("val", "valid", 1)):
        for label, wnid in enumerate(WNIDS):
            for k in range(num):
                name = f"{wnid}_{k}.JPEG" if folder == "train" else f"ILSVRC2012_val_{label:08d}.JPEG"
                raw = put(root / folder / wnid / name, picture(100 * label + k + num, (30 + k, 20)))
                found.append(Truth(split, len(found), label, raw))
    return found


def _records(num: int, num_labels: int, num_classes: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    labels = random.integers(0, num_classes, (num, num_labels))
    return np.concatenate([labels, random.integers(0, 256, (num, 3072))], axis=1).astype(np.uint8)


def cifar10(root: Path) -> list[Truth]:
    found = []
    for first_id, name, num in ((0, "data_batch_1", 4), (20_000, "data_batch_3", 3), (50_000, "test_batch", 2)):
        records = _records(num, 1, 10, first_id)
        put(root / "cifar-10-batches-bin" / f"{name}.bin", records.tobytes())
        split = "test" if name.startswith("test") else "train"
        found += [Truth(split, first_id + k, int(row[0]), row[1:].reshape(3, 32, 32)) for k, row in enumerate(records)]
    return found


def cifar100(root: Path) -> list[Truth]:
    found: list[Truth] = []
    for first_id, split, num in ((0, "train", 5), (50_000, "test", 3)):
        records = _records(num, 2, 100, num)
        put(root / f"{split}.bin", records.tobytes())
        found += [Truth(split, first_id + k, int(row[1]), row[2:].reshape(3, 32, 32)) for k, row in enumerate(records)]
    return found


def svhn(root: Path) -> list[Truth]:
    found: list[Truth] = []
    for split, num in (("train", 5), ("test", 3)):
        random = np.random.default_rng(num)
        x, y = random.integers(0, 256, (32, 32, 3, num), dtype=np.uint8), random.integers(1, 11, num)
        y[0] = 10
        root.mkdir(parents=True, exist_ok=True)
        matlab.savemat(root / f"{split}_32x32.mat", {"X": x, "y": y[:, None].astype(np.uint8)}, do_compression=True)
        found += [Truth(split, len(found) + k, int(y[k]) % 10, x[:, :, :, k].transpose(2, 0, 1)) for k in range(num)]
    return found


def idx(root: Path) -> list[Truth]:
    found: list[Truth] = []
    for prefix, split, num in (("train", "train", 7), ("t10k", "test", 3)):
        random = np.random.default_rng(num)
        x, y = random.integers(0, 256, (num, 10, 9), dtype=np.uint8), random.integers(0, 10, num, dtype=np.uint8)
        put(root / f"{prefix}-images-idx3-ubyte", b"\0\0\x08\x03" + struct.pack(">3I", *x.shape) + x.tobytes())
        packed = gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", num) + y.tobytes())
        put(root / f"{prefix}-labels-idx1-ubyte.gz", packed)
        found += [Truth(split, len(found) + k, int(y[k]), x[k][None]) for k in range(num)]
    return found


def folder(root: Path) -> list[Truth]:
    """Splits, classes with folders of their own, formats of all kinds, and a file that is no image."""
    found = []
    wanted = [
        ("train", "train/ant/1.jpg", 0, {}),
        ("train", "train/ant/deeper/2.PNG", 0, {"kind": "PNG"}),
        ("train", "train/bee/a.webp", 1, {"kind": "WEBP", "lossless": True}),
        ("train", "train/bee/b.gif", 1, {"kind": "GIF", "mode": "L"}),
        ("valid", "validation/bee/c.bmp", 1, {"kind": "BMP"}),
        ("test", "test/cat/d.tiff", 2, {"kind": "TIFF"}),
    ]
    for place, (split, name, label, options) in enumerate(wanted):
        found.append(Truth(split, place, label, put(root / name, picture(place, **options))))
    put(root / "train" / "ant" / "notes.txt", b"no image")
    put(root / "train" / "ant" / "._1.jpg", b"hidden")
    return found


def parquet(root: Path, column: str = "image", struct: bool = True, names: bool = True) -> list[Truth]:
    import pyarrow as pa
    from pyarrow import parquet as pq

    (root / "data").mkdir(parents=True, exist_ok=True)
    about = {"info": {"features": {"label": {"names": list(HUB_NAMES), "_type": "ClassLabel"}}}}
    found: list[Truth] = []
    for split, file, num in (
        ("train", "train-00000-of-00002.parquet", 5),
        ("train", "train-00001-of-00002.parquet", 4),
        ("valid", "validation-00000-of-00001.parquet", 2),
        ("test", "test-00000-of-00001-0123456789abcdef.parquet", 3),
    ):
        first = len(found)
        images = [picture(first + k, kind="PNG") for k in range(num)]
        labels = [(first + k) % 3 for k in range(num)]
        rows = [{"bytes": image, "path": f"{k}.png"} for k, image in enumerate(images)] if struct else images
        table = pa.table({column: rows, "label": pa.array(labels, pa.int64()), "other": ["x"] * num})
        if names:
            table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
        pq.write_table(table, root / "data" / file, row_group_size=2)
        found += [Truth(split, first + k, labels[k], images[k]) for k in range(num)]
    return found


_ALL = (celeba, imagenet, cifar10, cifar100, svhn, idx, folder, parquet)
MAKERS: dict[str, Callable[[Path], list[Truth]]] = {maker.__name__: maker for maker in _ALL}


def make(kind: str, root: Path) -> list[Truth]:
    """Make a source; those that need what is not installed skip the test, aloud."""
    if kind == "parquet":
        import pytest

        pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'mixdist[parquet]'")
    root.mkdir(parents=True, exist_ok=True)
    return MAKERS[kind](root)
