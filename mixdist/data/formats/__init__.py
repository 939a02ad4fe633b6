"""The formats in which data sets come, as numbered samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from mixdist.data.formats import celeba, cifar, folder, idx, imagenet, parquet, svhn
from mixdist.data.formats.listing import Listing, Missing, Part, Raw, Reader, Sample

__all__ = ["SOURCES", "Listing", "Missing", "Part", "Raw", "Reader", "Sample", "open_listing"]


class _Make(Protocol):
    def __call__(self, root: Path, labels: bool = True) -> Listing: ...


class Source(NamedTuple):
    """A kind of source: what lists it, and whether a folder looks like it."""

    make_listing: _Make
    fits: Callable[[Path], bool]


SOURCES = {
    "celeba": Source(celeba.make_listing, celeba.fits),
    "imagenet": Source(imagenet.make_listing, imagenet.fits),
    "cifar10": Source(partial(cifar.make_listing, cifar.CIFAR_10), partial(cifar.fits, cifar.CIFAR_10)),
    "cifar100": Source(partial(cifar.make_listing, cifar.CIFAR_100), partial(cifar.fits, cifar.CIFAR_100)),
    "svhn": Source(svhn.make_listing, svhn.fits),
    "idx": Source(idx.make_listing, idx.fits),
    "parquet": Source(parquet.make_listing, parquet.fits),
    "folder": Source(folder.make_listing, folder.fits),  # the last: what fits another fits it as well
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
