"""Where rows come from and which rank reads them.

Names are imported when they are first used: processes that prepare, check or decode shards need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixdist.data.augment import Augment
    from mixdist.data.dataset import Dataset, Samples, Source, Splits
    from mixdist.data.loader import Loader, RankBatch, share
    from mixdist.data.order import Epoch
    from mixdist.data.paired import Paired
    from mixdist.data.sources.affine import AffineTargets
    from mixdist.data.sources.bananas import Bananas
    from mixdist.data.sources.captions import Captions
    from mixdist.data.sources.digits import Digits
    from mixdist.data.sources.memory import Cifar10, Idx, Memory
    from mixdist.data.sources.mnist_svhn import MnistSvhn
    from mixdist.data.sources.pairs import Pairs
    from mixdist.data.sources.redrawn import Binarised, Dequantised
    from mixdist.data.sources.shards import Shards
    from mixdist.data.sources.spiral import Spiral
    from mixdist.data.sources.synthetic import Blobs, Parabolas
    from mixdist.data.sources.textures import Textures
    from mixdist.data.sources.views import Views

_HOMES = {
    "augment": ("Augment",),
    "dataset": ("Dataset", "Samples", "Source", "Splits"),
    "loader": ("Loader", "RankBatch", "share"),
    "order": ("Epoch",),
    "paired": ("Paired",),
    "sources.affine": ("AffineTargets",),
    "sources.bananas": ("Bananas",),
    "sources.captions": ("Captions",),
    "sources.digits": ("Digits",),
    "sources.memory": ("Cifar10", "Idx", "Memory"),
    "sources.mnist_svhn": ("MnistSvhn",),
    "sources.pairs": ("Pairs",),
    "sources.redrawn": ("Binarised", "Dequantised"),
    "sources.shards": ("Shards",),
    "sources.spiral": ("Spiral",),
    "sources.synthetic": ("Blobs", "Parabolas"),
    "sources.textures": ("Textures",),
    "sources.views": ("Views",),
}
__all__ = [
    "AffineTargets",
    "Augment",
    "Bananas",
    "Binarised",
    "Blobs",
    "Captions",
    "Cifar10",
    "Dataset",
    "Dequantised",
    "Digits",
    "Epoch",
    "Idx",
    "Loader",
    "Memory",
    "MnistSvhn",
    "Paired",
    "Pairs",
    "Parabolas",
    "RankBatch",
    "Samples",
    "Shards",
    "Source",
    "Spiral",
    "Splits",
    "Textures",
    "Views",
    "share",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            made = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
            return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
