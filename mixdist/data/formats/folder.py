"""Any tree of images; folders at its top are splits or classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mixdist.data.formats.listing import SPLITS, Files, Listing, Missing, Part
from mixdist.data.formats.trees import EXTENSIONS, Entry, digest, images, subfolders

_KIN = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}


def fits(root: Path) -> bool:
    return bool(images(root)[0])


def make_listing(root: Path, labels: bool = True) -> Listing:
    """List all images below a folder.

    Where it has a folder train, valid (or val, validation) or test, these are the splits; else all is train. The class
    of an image is the folder directly under its split, numbered in sorted order over all splits.

    Raises:
        ValueError: an image lies beside the splits or in no class, or two folders are the same split.
    """
    entries, others = images(root)
    if not entries:
        raise Missing(f"{str(root)!r} has no image, expected files that end in {', '.join(EXTENSIONS)}")
    split_of = _splits(root)
    names_of: dict[str, list[str]] = {split: [] for split in SPLITS}
    for entry in entries:
        split = split_of.get(entry.path.partition("/")[0]) if split_of else "train"
        if split is None:
            told = ", ".join(map(repr, split_of))
            raise ValueError(f"{str(root / entry.path)!r} lies beside the splits {told}: move it into one, or away")
        names_of[split].append(entry.path)
    depth = 1 if split_of else 0
    class_names = _class_names(root, entries, depth) if labels else ()
    number = {name: label for label, name in enumerate(class_names)}
    parts, first_id = [], 0
    for split, names in names_of.items():
        label_N = np.array([number[name.split("/")[depth]] for name in names], dtype=np.int64) if labels else None
        if names:
            parts.append(Part(split, first_id, len(names), names=names, label_N=label_N))
            first_id += len(names)
    return Listing(tuple(parts), Files(root), digest(entries), class_names=class_names, passed_over=others)


def _splits(root: Path) -> dict[str, str]:
    """Return the split of each folder that is one, by the folder's name."""
    split_of = {name: _KIN[name.lower()] for name in subfolders(root) if name.lower() in _KIN}
    for split in SPLITS:
        same = [name for name in split_of if split_of[name] == split]
        if len(same) > 1:
            raise ValueError(f"{str(root)!r} has {' and '.join(map(repr, same))} for one split: keep one of them")
    return split_of


def _class_names(root: Path, entries: list[Entry], depth: int) -> tuple[str, ...]:
    names = set()
    for entry in entries:
        folders = entry.path.split("/")[depth:-1]
        if not folders:
            raise ValueError(
                f"{str(root / entry.path)!r} lies in no folder that could be its class: sort the images into folders, "
                "or take no classes with --labels none"
            )
        names.add(folders[0])
    return tuple(sorted(names))
