"""Images with sentences.

Shape letters: N rows, one a sentence; I images.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mixdist.arguments import check_arguments
from mixdist.data.dataset import Dataset, Source, Splits
from mixdist.data.formats.listing import Files, Sample
from mixdist.data.formats.trees import images, read_text, subfolders
from mixdist.data.images import SOURCE_FORMATS, Unreadable, decode
from mixdist.data.paired import Paired
from mixdist.data.sources.splits import TEST, check_part, class_field, held_out
from mixdist.data.sources.synthetic import require_rows
from mixdist.data.words import encode, vocabulary
from mixdist.terms import Field

TABLE = "captions.txt"
TEXTS = {"train": "text_trainvalclasses.txt", "test": "text_testclasses.txt"}
"""Of CUB: the sentences of the images in the folders train and test, ten lines an image in the order of the paths."""
LINES_EACH = 10


class _Told(NamedTuple):
    """A split as its files have it: image files, the class of each, and image and text of each sentence."""

    files: list[str]
    classes: list[str]
    image_N: list[int]
    texts: list[str]
    first_id: int = 0


class Captions(Source):
    """Images with sentences: fields "image" uint8 (3, size, size) and "text" int16 (tokens,), one row a sentence.

    Two layouts are known. CUB's, as MMVAE's authors distribute it: folders ``train`` and ``test`` with a folder for
    each class, and ``text_trainvalclasses.txt`` and ``text_testclasses.txt`` with ten lines an image in the order of
    the sorted paths; the label "y" is the class. Or Flickr's: a folder ``images`` and ``captions.txt`` with the columns
    image and caption; test images are held out by their place, the same in every run, and there is no label.

    Words are those seen more than ``more_than`` times in training sentences; others are ``<unknown>``. A text is cut to
    ``tokens`` - 1 words and signs, has an end, and is padded with 0. The words are in ``words`` of the field. An image
    is in memory once, whatever the number of its sentences.

    Args:
        root: the folder.
        size: side of the images: the largest square in their middle, resized.
        tokens: numbers of a text.
        more_than: how often a word must be seen at least once more.
        holdout: test images of Flickr's layout: a part, or a number of images.
        limit: takes the first so many images of each split; unset, all.

    Raises:
        ValueError: a number is out of range.

    Examples:
        >>> import tempfile
        >>> from PIL import Image
        >>> from mixdist.data.words import decode as told
        >>> folder = tempfile.TemporaryDirectory()
        >>> root = Path(folder.name, "images")
        >>> root.mkdir()
        >>> lines = ["image,caption"]
        >>> for k in range(4):
        ...     Image.new("RGB", (9, 8)).save(root / f"{k}.jpg")
        ...     lines += [f"{k}.jpg,A dog runs."]
        >>> _ = (root.parent / TABLE).write_text("\\n".join(lines))
        >>> train, test, _ = Captions(folder.name, size=8, tokens=6, more_than=1, holdout=1).load()
        >>> row = train.take(torch.tensor([0]))
        >>> row["image"].shape, row["text"].tolist(), told(row["text"][0].tolist(), train.spec["text"].words)
        (torch.Size([1, 3, 8, 8]), [[4, 5, 6, 3, 1, 0]], 'a dog runs .')
        >>> folder.cleanup()
    """

    def __init__(
        self,
        root: str,
        size: int = 64,
        tokens: int = 32,
        more_than: int = 3,
        holdout: int | float = 0.1,
        limit: int | None = None,
    ) -> None:
        check_arguments(Captions.__init__, locals(), "Captions' ")
        require_rows(size=size, **({} if limit is None else {"limit": limit}))
        if tokens < 2 or more_than < 0:
            raise ValueError(f"tokens ({tokens}) must be at least 2 and more_than ({more_than}) at least 0: raise it")
        check_part("holdout", holdout)
        self.root, self.size, self.tokens = root, size, tokens
        self.more_than, self.holdout, self.limit = more_than, holdout, limit

    def load(self) -> Splits[Paired]:
        """Read sentences and images.

        Raises:
            ValueError: a file is missing or damaged, sentences and images do not fit, or no word is frequent enough.
        """
        root = Path(self.root)
        if (root / TABLE).is_file():
            told = self._flickr(root)
        elif (root / TEXTS["train"]).is_file():
            told = self._cub(root)
        else:
            raise ValueError(f"{self.root!r} has no file {TABLE!r} or {TEXTS['train']!r}: name a folder of captions")
        words = vocabulary(told[0].texts, self.more_than)
        names = tuple(sorted({name for one in told for name in one.classes}))
        return Splits(*(self._rows(one, words, names) for one in told))

    def _rows(self, told: _Told, words: tuple[str, ...], names: tuple[str, ...]) -> Paired:
        if not told.texts:
            raise ValueError(f"{self.root!r} leaves a split without sentences: change holdout ({self.holdout})")
        x = np.stack([self._image(name) for name in told.files])
        files = Dataset(
            {"id": torch.arange(len(x)), "x": torch.from_numpy(x)}, {"x": Field(x.shape[1:], torch.uint8, 1 / 255)}
        )
        image_N = torch.tensor(told.image_N)
        kind = torch.int16 if len(words) <= 2**15 else torch.int32
        columns = {"id": torch.arange(len(image_N)) + told.first_id}
        columns["text"] = encode(told.texts, words, self.tokens).to(kind)
        spec: dict[str, Any] = {"text": Field((self.tokens,), kind, num_classes=len(words), words=words)}
        if names:
            spec["y"] = class_field(len(names))
            number = torch.tensor([names.index(name) for name in told.classes])
            columns["y"] = number[image_N].to(spec["y"].dtype)
        return Paired((files,), ({"image": "x"},), image_N[:, None], columns, spec, "y" if names else None, names)

    def _image(self, name: str) -> NDArray[np.uint8]:
        try:
            raw = Files(Path(self.root)).read(Sample(0, name, "", 0, None, b""))
            return decode(raw, 3, self.size, formats=SOURCE_FORMATS)
        except (Unreadable, OSError) as error:
            raise ValueError(f"image {name!r} of {self.root!r} cannot be read ({error}): fix or remove it") from None

    def _flickr(self, root: Path) -> list[_Told]:
        lines = list(csv.reader(read_text(root / TABLE).splitlines()))
        head, odd = ["image", "caption"], [n for n, line in enumerate(lines) if len(line) != 2]
        if lines[:1] != [head] or odd:
            at = odd[0] + 1 if lines[:1] == [head] else 1
            raise ValueError(f"line {at} of {str(root / TABLE)!r} is not {','.join(head)}: correct it")
        pairs = [(image, caption) for image, caption in lines[1:]]
        files = list(dict.fromkeys(image for image, _ in pairs))
        test_I = held_out("holdout", torch.arange(len(files)), self.holdout, TEST) if files else torch.empty(0)
        found, first_id = [], 0
        for side in (False, True):
            own = [name for name, held in zip(files, test_I.tolist(), strict=True) if bool(held) == side]
            place = {name: number for number, name in enumerate(own[: self.limit])}
            kept = [(place[image], caption) for image, caption in pairs if image in place]
            texts = [caption for _, caption in kept]
            found.append(_Told([f"images/{n}" for n in place], [], [number for number, _ in kept], texts, first_id))
            first_id += len(kept)
        return found

    def _cub(self, root: Path) -> list[_Told]:
        found, first_id = [], 0
        for split, name in TEXTS.items():
            folder = root / split
            if not folder.is_dir():
                raise ValueError(f"{self.root!r} has no folder {split!r} with the images of {name}: put it there")
            files = [f"{inner}/{entry.path}" for inner in subfolders(folder) for entry in images(folder / inner)[0]]
            lines = [line for line in read_text(root / name).split("\n") if line.strip()]
            if len(lines) != LINES_EACH * len(files):
                raise ValueError(
                    f"{str(root / name)!r} has {len(lines)} lines for {len(files)} images, expected {LINES_EACH} an "
                    f"image: take both from one data set"
                )
            kept = files[: self.limit]
            image_N = [i for i in range(len(kept)) for _ in range(LINES_EACH)]
            classes = [path.partition("/")[0] for path in kept]
            texts = lines[: len(image_N)]
            found.append(_Told([f"{split}/{path}" for path in kept], classes, image_N, texts, first_id))
            first_id += len(texts)
        return found
