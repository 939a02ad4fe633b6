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

    Args:
        root: the folder.
        labels: whether to take the classes.

    Raises:
        Missing: there is no image.
        ValueError: an image lies beside the splits or in no class, or two folders are the same split.
    """
    entries, others = images(root)
    if not entries:
        raise Missing(f"{str(root)!r} has no image, expected files that end in {', '.join(EXTENSIONS)}")
    folder_of = _splits(root)
    sorted_entries: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    if folder_of:
        split_by = {folder: split for split, folder in folder_of.items()}
        for entry in entries:
            split = split_by.get(entry.path.partition("/")[0]) if "/" in entry.path else None
            if split is None:
                told = ", ".join(map(repr, split_by))
                raise ValueError(f"{str(root / entry.path)!r} lies beside the splits {told}: move it into one, or away")
            sorted_entries[split].append(entry)
    else:
        sorted_entries["train"] = entries
    depth = 1 if folder_of else 0
    class_names = _class_names(root, entries, depth) if labels else ()
    number = {name: label for label, name in enumerate(class_names)}
    parts, first_id = [], 0
    for split, found in sorted_entries.items():
        if not found:
            continue
        names = [entry.path for entry in found]
        classes = [number[name.split("/")[depth]] for name in names] if labels else None
        label_N = None if classes is None else np.array(classes, dtype=np.int64)
        parts.append(Part(split, first_id, len(names), names=names, label_N=label_N))
        first_id += len(names)
    return Listing(tuple(parts), Files(root), digest(entries), class_names=class_names, passed_over=others)


def _splits(root: Path) -> dict[str, str]:
    """Return the folder of each split, by the split's name."""
    folder_of: dict[str, str] = {}
    for name in subfolders(root):
        split = _KIN.get(name.lower())
        if split in folder_of:
            raise ValueError(f"{str(root)!r} has {folder_of[split]!r} and {name!r} for one split: keep one of them")
        if split is not None:
            folder_of[split] = name
    return folder_of


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
