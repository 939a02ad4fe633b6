"""Data sets of any format in memory. Shape letters: N samples, C channels, H height, W width."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mixdist.arguments import check_arguments
from mixdist.data.dataset import Dataset, Source, Splits
from mixdist.data.formats import SOURCES, Listing, Sample, open_listing
from mixdist.data.images import SOURCE_FORMATS, Unreadable, decode
from mixdist.data.sources.splits import choose_splits, class_field
from mixdist.terms import Field


class Memory(Source):
    """A data set of any format, read into memory: images "x" uint8 (C, H, W) with scale 1/255.

    Where there are some, "y" is the class and "attributes" are binary attributes. Ids and files are those of ``mixdist
    prepare``, which makes :class:`mixdist.data.Shards` of what memory does not hold.

    Args:
        kind: of source: celeba, imagenet, cifar10, cifar100, svhn, idx (MNIST), parquet (the Hugging Face hub), or
            folder (any tree of images: folders train, valid and test are splits, the folders in them classes).
        root: its folder.
        limit: takes the first so many samples of each split; None takes all.
        num_classes: classes of the label; None for as many as have names, else as are there.
        size: bring images to this side: the largest square in their middle, resized; unset, they must have one size.
        crop: keep a square of this side in the middle first.
        channels: 3 for colour, 1 for grey; unset, what the source usually has.
        train: the training split, as the source has it.
        test: the held-out split; unset, test, or valid where there is no test.
        holdout: what is held out of the training split where there is no held-out split: a part, as 0.1, or a number
            of samples; chosen by id, the same in every run.

    The split valid, where there is one that is not the held-out one, is the validation set.

    Raises:
        ValueError: if a number is out of range, or there is no such kind.

    Examples:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = tempfile.TemporaryDirectory()
        >>> for split in ("train", "test"):
        ...     inner = Path(folder.name, split, "cat")
        ...     inner.mkdir(parents=True)
        ...     Image.new("RGB", (8, 8)).save(inner / "1.png")
        >>> train, test, _ = Memory("folder", folder.name).load()
        >>> train.spec["x"].shape, train.class_names, test.ids
        ((3, 8, 8), ('cat',), tensor([1]))
        >>> folder.cleanup()
    """

    def __init__(
        self,
        kind: str,
        root: str,
        limit: int | None = None,
        num_classes: int | None = None,
        size: int | None = None,
        crop: int | None = None,
        channels: int | None = None,
        train: str = "train",
        test: str | None = None,
        holdout: int | float = 0,
    ) -> None:
        check_arguments(Memory.__init__, locals(), "Memory's ")
        if kind not in SOURCES:
            raise ValueError(f"kind ({kind}) must be one of {', '.join(SOURCES)}")
        for name, value in {"limit": limit, "num_classes": num_classes, "size": size, "crop": crop}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1: raise it, or leave it out")
        if channels not in (None, 1, 3):
            raise ValueError(f"channels ({channels}) must be 1 for grey or 3 for colour")
        self.kind, self.root, self.limit, self.num_classes = kind, root, limit, num_classes
        self.size, self.crop, self.channels = size, crop, channels
        self.train, self.test, self.holdout = train, test, holdout

    def load(self) -> Splits[Dataset]:
        """Read the splits.

        Raises:
            ValueError: if the folder, a file or a split is missing, a file is damaged, foreign or disagrees with
                another, an image cannot be used, or images differ in size.
        """
        listing = open_listing(self.kind, Path(self.root))
        if listing.image and (self.size or self.crop or self.channels):
            raise ValueError(f"size, crop and channels are for image files, and {self.kind} has none: leave them out")
        samples_of = {split: listing.samples(split, 0, listing.count(split)) for split in listing.splits}
        ids_of = {split: np.array([one.id for one in samples]) for split, samples in samples_of.items()}
        chosen = choose_splits(self.root, ids_of, self.train, self.test, self.holdout)
        return Splits(
            *(self._dataset(listing, [samples_of[split][i] for i in places[: self.limit]]) for split, places in chosen)
        )

    def _dataset(self, listing: Listing, samples: Sequence[Sample]) -> Dataset:
        x = self._images(listing, samples)
        rows = {"id": torch.tensor([one.id for one in samples]), "x": torch.from_numpy(x)}
        spec = {"x": Field(x.shape[1:], torch.uint8, scale=1 / 255)}
        labels = [part.label_N for part in listing.parts if part.label_N is not None]
        if labels:
            highest = max(int(label_N.max()) for label_N in labels)
            spec["y"] = class_field(self.num_classes or len(listing.class_names) or highest + 1)
            rows["y"] = torch.tensor([one.label for one in samples]).to(spec["y"].dtype)
        if listing.attribute_names:
            spec["attributes"] = Field((len(listing.attribute_names),), torch.uint8)
            rows["attributes"] = torch.tensor([list(one.attributes) for one in samples], dtype=torch.uint8)
        return Dataset(
            rows,
            spec,
            "y" if labels else None,
            listing.class_names,
            attribute="attributes" if listing.attribute_names else None,
            attribute_names=listing.attribute_names,
        )

    def _images(self, listing: Listing, samples: Sequence[Sample]) -> NDArray[np.uint8]:
        x_NCHW: NDArray[np.uint8] | None = None
        for place, one in enumerate(samples):
            image = self._image(listing, one)
            if x_NCHW is None:
                x_NCHW = np.empty((len(samples), *image.shape), dtype=np.uint8)
            if image.shape != x_NCHW.shape[1:]:
                raise ValueError(
                    f"sample {one.id} ({one.name!r}) of {self.root!r} is {image.shape}, expected {x_NCHW.shape[1:]} "
                    "like the first: set size to bring all to one"
                )
            x_NCHW[place] = image
        assert x_NCHW is not None, "a split without samples"
        return x_NCHW

    def _image(self, listing: Listing, one: Sample) -> NDArray[Any]:
        try:
            raw = listing.reader.read(one)
            if isinstance(raw, bytes):
                channels = self.channels or listing.channels
                return decode(raw, channels, self.size, self.crop, formats=SOURCE_FORMATS)
            return raw
        except (Unreadable, OSError) as error:
            raise ValueError(
                f"sample {one.id} ({one.name!r}) of {self.root!r} cannot be read ({error}): fix or remove it"
            ) from None


class Idx(Memory):
    """MNIST's four files or its relatives': "x" uint8 (1, H, W) with scale 1/255, label "y" uint8.

    The files are ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte`` and
    ``t10k-labels-idx1-ubyte``, each as it is or with ``.gz``; of both, the plain one is read. The id of a sample is its
    place in the training file; those of the test file go on from there.

    Args:
        root: the folder.
        limit: takes the first so many samples of the training set and of the test set; None takes all.
        num_classes: classes of the label.

    Raises:
        ValueError: if ``limit`` is less than 1 or ``num_classes`` is not from 1 to 256.
    """

    def __init__(self, root: str, limit: int | None = None, num_classes: int = 10) -> None:
        check_arguments(Idx.__init__, locals(), "Idx's ")
        if not 1 <= num_classes <= 256:
            raise ValueError(f"num_classes ({num_classes}) must be from 1 to 256: labels are single bytes.")
        super().__init__("idx", root, limit, num_classes)


class Cifar10(Memory):
    """CIFAR-10's binary files: "x" uint8 (3, 32, 32) with scale 1/255, label "y" uint8 of 10 classes.

    ``data_batch_1.bin`` to ``data_batch_5.bin`` are the training set: those that are there are read, at least one
    must be. ``test_batch.bin`` is the test set and must be there. ``batches.meta.txt`` names the classes where it
    is there. A file may hold fewer than the official 10,000 images. The id of a sample is its place in the official
    order, 10,000 a file, test images from 50,000: it does not depend on which files are there.

    Args:
        root: the folder, or the one that holds ``cifar-10-batches-bin``.
        limit: takes the first so many samples of the training set and of the test set; None takes all.

    Raises:
        ValueError: if ``limit`` is less than 1.
    """

    def __init__(self, root: str, limit: int | None = None) -> None:
        check_arguments(Cifar10.__init__, locals(), "Cifar10's ")
        super().__init__("cifar10", root, limit, 10)
