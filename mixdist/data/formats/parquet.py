"""Parquet files as on the Hugging Face hub: an image and a label in each row.

Shape letters: N samples.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixdist.data.formats.listing import SPLITS, Listing, Missing, Part, Sample
from mixdist.data.formats.trees import Entry, digest, reading
from mixdist.data.images import Unreadable

IMAGES, LABELS = ("image", "img", "jpg", "png", "webp"), ("label", "fine_label", "labels", "cls")
_NAME = re.compile(r"(?P<split>[A-Za-z0-9_]+?)(-(?P<place>\d{5})-of-(?P<num>\d{5}))?(-[0-9a-f]{16})?\.parquet")
_KIN = {"validation": "valid", "val": "valid", "dev": "valid"}


def fits(root: Path) -> bool:
    return any(any(folder.glob("*.parquet")) for folder in (root, root / "data"))


def make_listing(root: Path, labels: bool = True) -> Listing:
    """List files such as ``train-00000-of-00002.parquet`` in a folder or in its folder data.

    The image is the column image (or img, jpg, png, webp): bytes, or a struct with bytes. The class is the column label
    (or fine_label, labels, cls) of whole numbers, named by the hub's metadata where it is there.

    Raises:
        ValueError: pyarrow is not installed, a file of a split is missing, or one has other columns than the first.
    """
    _pyarrow()
    folder = root if any(root.glob("*.parquet")) else root / "data"
    files = _files(root, folder)
    parts, told, tails, first_id = [], [], [], 0
    columns: tuple[str, str | None] | None = None
    class_names: tuple[str, ...] = ()
    for split, name in files:
        opened = _open(folder / name)
        found = _columns(folder / name, opened.schema_arrow, labels)
        if columns is None:
            columns, class_names = found, _class_names(opened.schema_arrow, found[1])
        elif found != columns:
            raise ValueError(
                f"{str(folder / name)!r} has columns {found}, others {columns}: take files of one data set"
            )
        label_N = None if found[1] is None else _labels(folder / name, opened, found[1], split)
        num = opened.metadata.num_rows
        if num:
            parts.append(Part(split, first_id, num, name, label_N=label_N))
        size = (folder / name).stat().st_size
        told.append(Entry(name, size))
        tails.append(_tail(folder / name, size, opened.metadata.serialized_size))
        first_id += num
    if not parts:
        raise ValueError(f"the files in {str(folder)!r} have no row: fetch the file again")
    assert columns is not None
    name = digest(told, *tails, "\n".join(class_names).encode())
    return Listing(tuple(parts), Rows(folder, columns[0]), name, class_names=class_names)


@dataclass
class Rows:
    """Images in a column of parquet files; the row group that was read last stays in memory."""

    folder: Path
    column: str
    _last: tuple[str, int, int, Any] | None = field(default=None, repr=False)

    def read(self, sample: Sample) -> bytes:
        last = self._last
        if last is None or last[0] != sample.file or not 0 <= sample.row - last[1] < last[2]:
            self._last = last = None
            self._last = last = self._group(sample)
        value = last[3][sample.row - last[1]].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            raise Unreadable("it is empty")
        assert isinstance(data, bytes)
        return data

    def _group(self, sample: Sample) -> tuple[str, int, int, Any]:
        """Return the file, first row, number of rows and column of the row group that a sample lies in."""
        path = self.folder / sample.file
        opened = _open(path)
        first = 0
        for group in range(opened.metadata.num_row_groups):
            num = opened.metadata.row_group(group).num_rows
            if sample.row < first + num:
                table = _told(path, partial(opened.read_row_group, group, columns=[self.column]))
                return sample.file, first, num, table.column(self.column).combine_chunks()
            first += num
        raise ValueError(
            f"{str(path)!r} has {first} rows, fewer than when it was listed: put it back, and start again with an "
            "empty --out"
        )


def _files(root: Path, folder: Path) -> list[tuple[str, str]]:
    """Return split and name of each file, in order of the splits."""
    files: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
    for path in sorted(folder.glob("*.parquet")):
        match = _NAME.fullmatch(path.name)
        if match is None:
            raise ValueError(
                f"{str(path)!r} is not named as on the hub, expected such as 'train-00000-of-00002.parquet': rename it"
            )
        split = _KIN.get(match["split"], match["split"])
        files.setdefault((split, match["split"]), []).append(
            (int(match["place"] or 0), int(match["num"] or 1), path.name)
        )
    if not files:
        raise Missing(f"{str(root)!r} has no file such as 'train-00000-of-00002.parquet', nor has its folder 'data'")
    splits = [split for split, _ in files]
    for (split, word), found in files.items():
        nums = {num for _, num, _ in found}
        if splits.count(split) > 1 or sorted(place for place, _, _ in found) != list(range(max(nums))) or len(nums) > 1:
            raise ValueError(
                f"{str(folder)!r} has {len(found)} files of {word!r}, expected each from 00000 to before "
                f"{max(nums):05d} once, as the names say: fetch the others, or number what is there anew"
            )
    known = [key for split in SPLITS for key in files if key[0] == split]
    order = [*known, *sorted(files.keys() - known)]
    return [(split, name) for split, word in order for *_, name in files[split, word]]


def _columns(path: Path, schema: Any, labels: bool) -> tuple[str, str | None]:
    """Return the names of the columns of images and of labels."""
    types = _pyarrow().types
    kinds = {item.name: item.type for item in schema}

    def is_image(kind: Any) -> bool:
        if types.is_struct(kind):
            at = kind.get_field_index("bytes")
            return at >= 0 and (types.is_binary(kind[at].type) or types.is_large_binary(kind[at].type))
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    image = next((name for name in IMAGES if name in kinds and is_image(kinds[name])), None)
    if image is None:
        raise ValueError(
            f"{str(path)!r} has columns {', '.join(kinds)}, expected image (or {', '.join(IMAGES[1:])}) with bytes: "
            "rename the column of the images"
        )
    label = next((name for name in LABELS if name in kinds and types.is_integer(kinds[name])), None)
    return image, label if labels else None


def _labels(path: Path, opened: Any, column: str, split: str) -> NDArray[np.int64]:
    found = _told(path, lambda: opened.read(columns=[column]).column(column))
    label_N = np.asarray(found.fill_null(-1).to_numpy(), dtype=np.int64)
    if len(label_N) and label_N.min() < 0:
        raise ValueError(
            f"{str(path)!r} has rows of {split} without a class ({column} {label_N.min()}): move the files of {split} "
            "away, or take no classes with --labels none"
        )
    return label_N


def _class_names(schema: Any, column: str | None) -> tuple[str, ...]:
    """Return the hub's names of the classes, or none."""
    if column is None:
        return ()
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _tail(path: Path, size: int, num_bytes: int) -> bytes:
    """Return the file's own table of contents, with statistics of its columns."""
    with path.open("rb") as file:
        file.seek(max(size - num_bytes - 8, 0))
        return file.read()


def _open(path: Path) -> Any:
    from pyarrow import parquet  # an extra, imported where it is used

    return _told(path, lambda: parquet.ParquetFile(path))


def _told(path: Path, read: Any) -> Any:
    with reading(path, "parquet", _pyarrow().ArrowException):
        return read()


def _pyarrow() -> Any:
    try:
        import pyarrow  # an extra, imported where it is used
    except ImportError:
        raise ValueError("parquet needs pyarrow, which is not installed: pip install 'mixdist[parquet]'") from None
    return pyarrow
