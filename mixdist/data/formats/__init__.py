"""The formats in which data sets come, as numbered samples."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from mixdist.data.formats import celeba, cifar, folder, idx, imagenet, parquet, svhn
from mixdist.data.formats.listing import Listing, Missing, Part, Raw, Reader, Sample

__all__ = ["SOURCES", "Listing", "Missing", "Part", "Raw", "Reader", "Sample", "open_listing"]


class Format(Protocol):
    """How a kind of source comes: a module of this package, or an object."""

    def fits(self, root: Path) -> bool:
        """Return whether a folder looks like it."""

    def make_listing(self, root: Path, labels: bool = True) -> Listing:
        """List a folder of an official data set, or of any images.

        Args:
            root: the folder; for an archive with a folder of its own inside, either of the two.
            labels: whether to take the classes; those of CIFAR-100 are the fine ones, and CelebA has none.

        Raises:
            Missing: a file or a folder that makes the format is missing.
            ValueError: a file is damaged or foreign, or two disagree.
        """


SOURCES: dict[str, Format] = {
    "celeba": celeba,
    "imagenet": imagenet,
    "cifar10": cifar.CIFAR_10,
    "cifar100": cifar.CIFAR_100,
    "svhn": svhn,
    "idx": idx,
    "parquet": parquet,
    "folder": folder,  # the last: what fits another fits it as well
}


def open_listing(kind: str, root: Path, labels: bool = True) -> Listing:
    """List a source.

    Args:
        kind: a key of ``SOURCES``.
        root: its folder.
        labels: whether to take its classes.

    Raises:
        ValueError: the folder is missing, has another format, or a file in it is not as it should be.
    """
    if kind not in SOURCES:
        raise ValueError(f"source {kind!r} is unknown: choose of {', '.join(SOURCES)}")
    if not root.is_dir():
        raise ValueError(f"{str(root)!r} is no folder: name the one that holds the files of {kind}")
    try:
        return SOURCES[kind].make_listing(root, labels=labels)
    except Missing as missing:
        other = next((name for name, source in SOURCES.items() if name != kind and source.fits(root)), None)
        hint = f"; it looks like {other}: name that kind of source" if other else ""
        raise Missing(f"{missing}{hint}") from None
