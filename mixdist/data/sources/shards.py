"""Tar shards as a source: splits, fields, and how images become rows.

Shape letters: M samples of the index, A attributes.
"""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixdist.arguments import check_arguments
from mixdist.data.augment import Augment
from mixdist.data.dataset import Source, Splits
from mixdist.data.fields import dtype_of, read_spec
from mixdist.data.images import Decoder, Unreadable
from mixdist.data.order import OrderName
from mixdist.data.shards.index import ABSENT, ShardIndex
from mixdist.data.shards.reader import Pool, Reading
from mixdist.data.shards.remote import Cache, RemoteStorage, read_index
from mixdist.data.shards.samples import ShardSamples, Shelf
from mixdist.data.shards.storage import Damage, LocalStorage, Storage
from mixdist.data.sources.splits import choose_splits, class_field
from mixdist.terms import Field, Spec

IMAGES = ("jpg", "jpeg", "png", "webp")


class Labels(NamedTuple):
    """The class of each sample.

    Args:
        field: how it is stored.
        stored_M: the classes.
        names: of the classes, or empty.
    """

    field: Field
    stored_M: Tensor
    names: tuple[str, ...]


class Shards(Source):
    """A folder or address of tar shards with an index, as ``mixdist prepare`` and ``mixdist index`` make them.

    Fields: "x", images uint8 (channels, height, width) with scale 1/255, or what .npy members hold; "y", the class,
    where there is one; "attributes", binary ones, where there are some. The id of a sample is the one in the index.
    Shards that ``mixdist prepare rows`` made have the fields of the source that they are of, such as several modalities
    and "present". Only the index is in memory; samples are decoded in worker processes, each once an epoch in the whole
    cluster for a soft mixture.

    Args:
        root: the folder, or its address: https://, or s3://, gs://, hf:// or az:// with the extra of that name.
        size: bring images to this side: the largest square in their middle, resized; unset, they must have one size.
        crop: keep a square of this side in the middle first.
        channels: 3 for colour, 1 for grey; unset, what the index says, or 3.
        label: y, the class; an attribute's name, for its two values; none; or auto: y where there are classes.
        train: the training split, as the index has it.
        test: the held-out split; unset, test, or valid where there is no test.
        holdout: what is held out of the training split where there is no held-out split: a part, as 0.1, or a number
            of samples; chosen by id, the same in every run.
        limit: takes the first so many samples of each split; unset, all.
        order: of an epoch: blocks mixes neighbours in storage, so that few places are read at a time; full mixes all.
        block: neighbours in a block.
        window: blocks that are mixed at a time: block x window samples.
        workers: decoding processes of each rank; 0 decodes in the rank itself.
        ahead: batches that are decoded before they are needed.
        decoder: of JPEGs: pillow, or simplejpeg (pip install mixdist[fast]).
        on_error: what a sample that cannot be read does: raise ends the run; skip looks through all samples before the
            first step, and leaves those out, listed.
        max_skipped: the largest part of the samples that skip may leave out.
        augment: random changes of training images: flip, shift.
        cache: where shards from an address are kept.

    The split valid, where there is one that is not the held-out one, is the validation set.

    Raises:
        ValueError: if a number is out of range, or the decoder is not installed.
    """

    def __init__(
        self,
        root: str,
        size: int | None = None,
        crop: int | None = None,
        channels: int | None = None,
        label: str = "auto",
        train: str = "train",
        test: str | None = None,
        holdout: int | float = 0,
        limit: int | None = None,
        order: OrderName = "blocks",
        block: int = 64,
        window: int = 128,
        workers: int = 2,
        ahead: int = 2,
        decoder: Decoder = "pillow",
        on_error: Literal["raise", "skip"] = "raise",
        max_skipped: float = 0.01,
        augment: Augment | None = None,
        cache: Cache | None = None,
    ) -> None:
        check_arguments(Shards.__init__, locals(), "Shards' ")
        least = {"size": (size, 1), "crop": (crop, 1), "limit": (limit, 1), "block": (block, 1), "window": (window, 1)}
        for name, (value, lowest) in {**least, "workers": (workers, 0), "ahead": (ahead, 0)}.items():
            if value is not None and value < lowest:
                raise ValueError(f"{name} ({value}) must be at least {lowest}: raise {name}.")
        if channels not in (None, 1, 3):
            raise ValueError(
                f"channels ({channels}) must be 1 for grey or 3 for colour: set it to one of them, or leave it out."
            )
        if not 0 <= max_skipped <= 1:
            raise ValueError(f"max_skipped ({max_skipped}) must be between 0 and 1")
        if decoder == "simplejpeg" and find_spec("simplejpeg") is None:
            raise ValueError("decoder (simplejpeg) is not installed: pip install 'mixdist[fast]', or take pillow.")
        self.root, self.label, self.train, self.test, self.holdout = root, label, train, test, holdout
        self.limit, self.workers, self.augment, self.cache = limit, workers, augment, cache or Cache()
        self.channels, self.size, self.crop, self.decoder = channels, size, crop, decoder
        self.shelving = {"order": order, "block": block, "window": window, "ahead": ahead}
        self.skipping = {"on_error": on_error, "max_skipped": max_skipped}

    def load(self) -> Splits[ShardSamples]:
        """Read the index, and one sample for its shape.

        Raises:
            ValueError: there is no index, it does not fit its shards, or a split or field is missing.
            OSError: the address cannot be reached.
        """
        index, storage = open_shards(self.root, self.cache)
        storage.check(index)
        splits = self._splits(index)
        content = _content(self.root, index)
        reading = self._reading(index, storage, splits[0])
        shelf = Shelf(index, Pool(reading, self.workers), content, **self.shelving, **self.skipping)  # type: ignore[arg-type]
        assert reading.shape is not None
        if index.rows:
            return Splits(*(self._rows(shelf, places) for places in splits))
        kind = torch.from_numpy(np.zeros(0, dtype=reading.dtype)).dtype
        spec = {"x": Field(reading.shape, kind, scale=1 / 255 if kind == torch.uint8 else 1.0)}
        if self.augment is not None:
            self.augment.check(reading.shape)
        labels, attribute_MA = self._labels(index), index.attribute_NA
        if labels is not None:
            spec["y"] = labels.field
        if attribute_MA is not None:
            spec["attributes"] = Field((attribute_MA.shape[1],), torch.uint8)
        return Splits(*(self._samples(shelf, places, spec, labels) for places in splits))

    def _splits(self, index: ShardIndex) -> list[NDArray[np.int64]]:
        """Return the places of the training samples, of those for tests and, where there are some, for validation."""
        ids_of = {split: index.id_N[index.places(split)] for split in index.splits}
        chosen = choose_splits(self.root, ids_of, self.train, self.test, self.holdout)
        return [index.places(split)[places[: self.limit]] for split, places in chosen]

    def _reading(self, index: ShardIndex, storage: Storage, train: NDArray[np.int64]) -> Reading:
        content = "image" if any(extension in IMAGES for extension in index.extensions) else "npy"
        channels = self.channels or (index.image[0] if index.image else 3)
        if content == "npy" and (self.size or self.crop or self.channels):
            raise ValueError(f"size, crop and channels are for images, and {self.root!r} holds .npy: leave them out")
        assert channels in (1, 3)
        reading = Reading(storage, content, channels, self.size, self.crop, self.decoder)  # type: ignore[arg-type]
        side = self.size or self.crop
        if self.crop and index.image and self.crop > min(index.image[1:]):
            raise ValueError(
                f"crop ({self.crop}) must be at most the side of the images of {self.root!r}, which are "
                f"{index.image[1]} x {index.image[2]}: lower it"
            )
        if content == "image" and (side or index.image):
            return replace(reading, shape=(channels, side, side) if side else (channels, *index.image[1:]))  # type: ignore[index]
        try:
            first = Shelf(index, Pool(reading, 0), _content(self.root, index)).wanted(train[:1])[0]
            array = reading.one(first)
        except (Unreadable, Damage) as error:
            raise ValueError(
                f"sample {index.id_N[train[0]]} of {self.root!r} cannot be read ({error}): set size or fix it"
            ) from None
        return replace(reading, shape=array.shape, dtype=array.dtype if array.dtype.names else str(array.dtype))

    def _labels(self, index: ShardIndex) -> Labels | None:
        if self.label == "none" or (self.label == "auto" and index.label_N is None):
            return None
        if self.label in ("auto", "y"):
            if index.label_N is None:
                raise ValueError(
                    f"label ({self.label}) asks for classes, and the shards of {self.root!r} have none (no .cls in "
                    f"every sample): set it to none{_or_one_of(index)}"
                )
            classes, names = index.label_N, index.class_names
        elif self.label in index.attribute_names and index.attribute_NA is not None:
            classes = index.attribute_NA[:, index.attribute_names.index(self.label)].astype(np.int64)
            names = (f"not {self.label}", self.label)
        else:
            raise ValueError(
                f"label ({self.label}) is not in the shards of {self.root!r}: set it to auto, none{_or_one_of(index)}"
            )
        num_classes = max(len(names), int(classes.max()) + 1)
        field = class_field(num_classes)
        return Labels(field, torch.from_numpy(classes).to(field.dtype), names if len(names) == num_classes else ())

    def _samples(self, shelf: Shelf, places: NDArray[np.int64], spec: Spec, labels: Labels | None) -> ShardSamples:
        index, at = shelf.index, torch.from_numpy(places)
        attribute_MA = index.attribute_NA
        return ShardSamples(
            shelf,
            places,
            spec,
            None if labels is None else labels.stored_M[at],
            None if attribute_MA is None else torch.from_numpy(attribute_MA)[at],
            () if labels is None else labels.names,
            index.attribute_names if attribute_MA is not None else (),
            self.augment,
            None if labels is None else "y",
            None if attribute_MA is None else "attributes",
        )

    def _rows(self, shelf: Shelf, places: NDArray[np.int64]) -> ShardSamples:
        """Return samples that are rows of another source."""
        index, told = shelf.index, shelf.index.rows
        spec, label = read_spec(told["spec"]), told["label"]
        if self.augment is not None:
            raise ValueError(f"augment is for images, and {self.root!r} holds rows of a source: leave it out")
        if self.label not in ("auto", "none", label):
            has = f" {label}," if label else ""
            raise ValueError(
                f"label ({self.label}) is not that of the rows of {self.root!r}: set it to{has} auto or none"
            )
        stored = dtype_of({name: field for name, field in spec.items() if name != label or index.label_N is None})
        if (found := shelf.pool.reading.dtype) != stored:
            raise ValueError(f"the rows of {self.root!r} are {found}, and its index says {stored}: prepare them anew")
        label_N = None
        if label is not None and index.label_N is not None:
            label_N = torch.from_numpy(index.label_N[places]).to(spec[label].dtype)
        if self.label == "none" and label is not None:
            del spec[label]
            label, label_N = None, None
        names, attribute_names = index.class_names if label else (), tuple(told["attribute_names"])
        attribute = told["attribute"]
        return ShardSamples(
            shelf, places, spec, label_N, None, names, attribute_names, label=label, attribute=attribute
        )


def open_shards(root: str, cache: Cache) -> tuple[ShardIndex, Storage]:
    """Open a set of shards by its index.

    Args:
        root: a folder with an index, the shards beside it or at the address that the index names; or the address of
            such a folder.
        cache: where and how shards from an address are kept.

    Raises:
        ValueError: root is neither, or has no index that can be used.
        OSError: the address cannot be reached.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir() and re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", root):
        index = read_index(root, cache)
        return index, RemoteStorage(index.base or root, cache, index.shards)
    index = ShardIndex.read(folder)
    return index, LocalStorage(folder) if index.base is None else RemoteStorage(index.base, cache, index.shards)


def _content(root: str, index: ShardIndex) -> NDArray[np.int64]:
    """Return which member of each sample holds its content: an image, else an .npy array."""
    wanted = [e for e in IMAGES if e in index.extensions] or [e for e in ("npy",) if e in index.extensions]
    if not wanted:
        has = ", ".join(index.extensions)
        raise ValueError(f"the shards of {root!r} hold {has}, expected one of {', '.join(IMAGES)}, npy: take others")
    columns = [index.extensions.index(extension) for extension in wanted]
    there_Mk = index.member_NM2[:, columns, 0] != ABSENT
    lacking = np.flatnonzero(~there_Mk.any(1))
    if len(lacking):
        raise ValueError(
            f"sample {index.id_N[lacking[0]]} of {root!r} has none of {', '.join(wanted)}, which others have: add it "
            f"or take the sample out, and index again"
        )
    return np.asarray(columns)[there_Mk.argmax(1)]


def _or_one_of(index: ShardIndex) -> str:
    return f", or one of the attributes {', '.join(index.attribute_names)}" if index.attribute_names else ""
