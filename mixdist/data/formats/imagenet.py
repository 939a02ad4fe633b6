"""ImageNet in its official tree: a folder for each class, named by its WordNet id."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from mixdist.data.formats.listing import Files, Listing, Missing, Part
from mixdist.data.formats.trees import Entry, digest, images, read_text, subfolders

_WNID = re.compile(r"n\d{8}")
_NAMES = ("LOC_synset_mapping.txt", "words.txt")


def fits(root: Path) -> bool:
    return (root / "train").is_dir() and any(_WNID.fullmatch(name) for name in subfolders(root / "train"))


def make_listing(root: Path, labels: bool = True) -> Listing:
    """List ``train/WNID/*`` and, where it is there, ``val/WNID/*``; the class is the place of the id in sorted order.

    Raises:
        ValueError: a folder is no class, val has images outside of classes or another class, or there is no image.
    """
    if not fits(root):
        raise Missing(f"{str(root)!r} has no folders such as 'train/n01440764', expected ImageNet's official tree")
    wnids = subfolders(root / "train")
    parts: list[Part] = []
    listed: list[Entry] = []
    passed_over = 0
    for folder, split in (("train", "train"), ("val", "valid")):
        if not (root / folder).is_dir():
            continue
        _check(root / folder, wnids)
        entries: list[Entry] = []
        classes: list[int] = []
        for wnid in subfolders(root / folder):  # a class may have no image to validate with
            found, others = images(root / folder / wnid)
            entries += [Entry(f"{folder}/{wnid}/{entry.path}", entry.num_bytes) for entry in found]
            classes += [wnids.index(wnid)] * len(found)
            passed_over += others
        if entries:
            label_N = np.array(classes, dtype=np.int64) if labels else None
            paths = [entry.path for entry in entries]
            parts.append(Part(split, len(listed), len(entries), names=paths, label_N=label_N))
            listed += entries
    if not listed:
        raise ValueError(f"{str(root)!r} has no image in its classes: unpack the archives of ImageNet there")
    names = _class_names(root, wnids) if labels else ()
    told = digest(listed, "\n".join(names).encode())
    return Listing(tuple(parts), Files(root), told, class_names=names, passed_over=passed_over)


def _check(folder: Path, wnids: list[str]) -> None:
    for name in subfolders(folder):
        if not _WNID.fullmatch(name):
            raise ValueError(f"{str(folder / name)!r} is no class such as 'n01440764': move it out of {folder.name}")
        if name not in wnids:
            raise ValueError(f"{str(folder / name)!r} is a class that train has not: fetch it, or move this one away")
    loose, _ = images(folder, deep=False)
    if loose:
        raise ValueError(
            f"{str(folder / loose[0].path)!r} and {len(loose) - 1} more lie in no class: sort them into folders such "
            f"as '{folder.name}/n01440764', or move {folder.name} away"
        )


def _class_names(root: Path, wnids: list[str]) -> tuple[str, ...]:
    """Return words for the ids, from a list that lies in the folder, else the ids themselves."""
    path = next((root / name for name in _NAMES if (root / name).is_file()), None)
    words = {}
    for line in read_text(path).splitlines() if path else ():
        wnid, _, name = line.strip().replace("\t", " ").partition(" ")
        words[wnid] = name.strip()
    return tuple(words.get(wnid) or wnid for wnid in wnids)
