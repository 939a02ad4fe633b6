"""Where rows come from and which rank reads them."""

from __future__ import annotations

from mixdist.data.augment import Augment
from mixdist.data.bananas import Bananas
from mixdist.data.cifar import Cifar10
from mixdist.data.dataset import Dataset, Samples, Source
from mixdist.data.digits import Digits
from mixdist.data.idx import Idx
from mixdist.data.loader import Loader, Shard, share
from mixdist.data.order import Epoch
from mixdist.data.shards.source import Shards
from mixdist.data.synthetic import Blobs, Parabolas

__all__ = [
    "Augment",
    "Bananas",
    "Blobs",
    "Cifar10",
    "Dataset",
    "Digits",
    "Epoch",
    "Idx",
    "Loader",
    "Parabolas",
    "Samples",
    "Shard",
    "Shards",
    "Source",
    "share",
]
