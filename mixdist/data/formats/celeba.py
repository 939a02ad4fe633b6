"""CelebA in its official form: aligned faces, 40 attributes, the partition.

Shape letters: N samples, A attributes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixdist.data.formats.listing import SPLITS, Files, Listing, Missing, Part
from mixdist.data.formats.trees import digest, images, read_text

FOLDERS = ("img_align_celeba", "img_align_celeba_png")
ATTRIBUTES, PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"
_AGAIN = "fetch the file again"


def fits(root: Path) -> bool:
    return (root / ATTRIBUTES).is_file() or (root / PARTITION).is_file() or (root / FOLDERS[0]).is_dir()


def make_listing(root: Path, labels: bool = True) -> Listing:
    """List CelebA: ``img_align_celeba/NNNNNN.jpg`` (or .png), the attributes and the partition."""
    folder = next((root / name for name in FOLDERS if (root / name).is_dir()), None)
    if folder is None:
        raise Missing(f"{str(root)!r} has no folder {FOLDERS[0]!r}, expected CelebA's aligned faces in it")
    for name in (ATTRIBUTES, PARTITION):
        if not (root / name).is_file():
            raise Missing(f"{str(root)!r} has no file {name!r}: put it there, it comes with CelebA's faces")
    texts = {name: read_text(root / name) for name in (ATTRIBUTES, PARTITION)}
    split_of = _partition(root / PARTITION, texts[PARTITION])
    attribute_names, row_of, attribute_NA = _attributes(root / ATTRIBUTES, texts[ATTRIBUTES])
    entries, others = images(folder, deep=False)
    file_of = {Path(entry.path).stem: entry.path for entry in entries}
    _same(root / PARTITION, set(split_of), f"the images in {folder.name!r}", set(file_of))
    _same(root / PARTITION, set(split_of), repr(ATTRIBUTES), set(row_of))
    parts, first_id = [], 0
    for place, split in enumerate(SPLITS):
        stems = [stem for stem, number in split_of.items() if number == place]
        rows = np.array([row_of[stem] for stem in stems], dtype=np.int64)
        names = [file_of[stem] for stem in stems]
        if stems:
            parts.append(Part(split, first_id, len(stems), names=names, attribute_NA=attribute_NA[rows]))
        first_id += len(stems)
    name = digest(entries, *(text.encode() for text in texts.values()))
    return Listing(tuple(parts), Files(folder), name, attribute_names=attribute_names, passed_over=others)


def _partition(path: Path, text: str) -> dict[str, int]:
    """Return the split's number of each image, by its name without extension, in the file's order."""
    split_of: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise ValueError(f"{str(path)!r} line {number} is {line[:60]!r}, expected a name and 0, 1 or 2: {_AGAIN}")
        stem = Path(words[0]).stem
        if stem in split_of:
            raise ValueError(f"{str(path)!r} line {number} names {words[0]!r} once more: {_AGAIN}")
        split_of[stem] = int(words[1])
    if not split_of:
        raise ValueError(f"{str(path)!r} names no image: {_AGAIN}")
    return split_of


def _attributes(path: Path, text: str) -> tuple[tuple[str, ...], dict[str, int], NDArray[np.uint8]]:
    """Return names, the row of each image by its name without extension, and values (N, A) of 0 and 1."""
    lines = text.splitlines()
    names = tuple(lines[1].split()) if len(lines) > 1 else ()
    if not names or not lines[0].strip().isdecimal() or len(set(names)) != len(names):
        raise ValueError(f"{str(path)!r} must begin with a number of images and a line of attributes: {_AGAIN}")
    row_of: dict[str, int] = {}
    values = bytearray()
    for number, line in enumerate(lines[2:], start=3):
        words = line.split()
        if not words:
            continue
        stem = Path(words[0]).stem
        if len(words) != len(names) + 1 or not {"-1", "1"}.issuperset(words[1:]) or stem in row_of:
            raise ValueError(
                f"{str(path)!r} line {number} is {line[:60]!r}, expected another name and {len(names)} times -1 or 1: "
                f"{_AGAIN}"
            )
        row_of[stem] = len(row_of)
        values += bytes(word == "1" for word in words[1:])
    return names, row_of, np.frombuffer(bytes(values), dtype=np.uint8).reshape(len(row_of), len(names))


def _same(path: Path, listed: set[str], what: str, there: set[str]) -> None:
    for lacking, where in ((listed - there, f"of which {what} lack"), (there - listed, f"but {what} have beside them")):
        if lacking:
            raise ValueError(
                f"{str(path)!r} names {len(listed)} images, {where} {len(lacking)}, the first {min(lacking)!r}: "
                "fetch what is missing, or take out those that are in one place only"
            )
