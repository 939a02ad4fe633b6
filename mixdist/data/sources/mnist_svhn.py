"""MNIST and SVHN paired by class."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from mixdist.arguments import check_arguments
from mixdist.data.dataset import Samples, Source, Splits
from mixdist.data.paired import Paired, keyed_order, labels_of, members
from mixdist.data.shards.index import HEAD
from mixdist.data.sources.memory import Memory
from mixdist.data.sources.shards import Shards
from mixdist.data.sources.synthetic import require_rows


class MnistSvhn(Source):
    """An MNIST digit and an SVHN digit of one class a row: fields "mnist" and "svhn", label "y".

    The pairing is that of the authors' code (Shi, Siddharth, Paige and Torr 2019): of each class the first n images of
    both, n the smaller number of them and at most ``max_per_class``, in ``pairs`` random orders each, joined. It is an
    index: 1.68 million training pairs of the official files take 27 MB beside the images. Training and test pairs are
    made of training and test images; ``valid`` of a config cuts pairs, whose images stand in other pairs.

    Args:
        mnist: folder of MNIST's four files, or of the shards that ``mixdist prepare idx`` made of them, or an address.
        svhn: folder of ``train_32x32.mat`` and ``test_32x32.mat``, or of the shards of ``mixdist prepare svhn``.
        pairs: random orders of each class.
        max_per_class: images of a class that are used at most.
        seed: of the pairing, not of the run.

    Raises:
        ValueError: a number is less than 1.

    Examples:
        >>> MnistSvhn("data/mnist", "data/svhn", pairs=0)
        Traceback (most recent call last):
        ...
        ValueError: pairs (0) must be at least 1: raise pairs.
    """

    def __init__(self, mnist: str, svhn: str, pairs: int = 30, max_per_class: int = 10_000, seed: int = 0) -> None:
        check_arguments(MnistSvhn.__init__, locals(), "MnistSvhn's ")
        require_rows(pairs=pairs, max_per_class=max_per_class)
        self.mnist, self.svhn, self.pairs, self.max_per_class, self.seed = mnist, svhn, pairs, max_per_class, seed

    def load(self) -> Splits[Paired]:
        """Read both data sets and pair them.

        Raises:
            ValueError: a file is missing, damaged or foreign, or they have no class in common.
            OSError: an address cannot be reached.
        """
        first, second = _opened(self.mnist, "idx").load(), _opened(self.svhn, "svhn").load()
        train = self._paired((first.train, second.train), 0)
        return Splits(train, self._paired((first.test, second.test), len(train)))

    def _paired(self, parts: tuple[Samples, Samples], first_id: int) -> Paired:
        labels = [labels_of(part, "MnistSvhn") for part in parts]
        index_N2 = self._index(labels, int(first_id > 0))
        if not len(index_N2):
            raise ValueError(f"{self.mnist!r} and {self.svhn!r} have no class in common: name the digits of both")
        columns = {"id": torch.arange(first_id, first_id + len(index_N2)), "y": labels[0][index_N2[:, 0]].byte()}
        names = ({"mnist": "x"}, {"svhn": "x"})
        return Paired(parts, names, index_N2, columns, {"y": parts[0].spec["y"]}, "y", parts[0].class_names)

    def _index(self, labels: list[Tensor], split: int) -> Tensor:
        pieces = [torch.empty(0, 2, dtype=torch.int64)]
        for c in range(10):
            own = [members(label_N, c) for label_N in labels]
            n = min(*(len(one) for one in own), self.max_per_class)
            for p in range(self.pairs):
                orders = [keyed_order(one[:n], self.seed, c, p, 2 * split + m) for m, one in enumerate(own)]
                pieces.append(torch.stack(orders, 1))
        return torch.cat(pieces)


def _opened(root: str, kind: str) -> Source:
    """Return the source of a folder of official files, or of shards."""
    if (Path(root) / HEAD).is_file() or re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", root):
        return Shards(root, label="y", order="full")
    return Memory(kind, root, num_classes=10)
