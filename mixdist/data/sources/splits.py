"""Which samples are trained on and which are held out, where a source has splits by name; how classes are stored."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from mixdist.noise import Purpose, hashes
from mixdist.terms import Field

Chosen = tuple[str, NDArray[np.int64]]
"""The name of a split, and places in it."""


def choose_splits(
    root: str, ids_of: Mapping[str, NDArray[np.int64]], train: str, test: str | None, holdout: float
) -> tuple[Chosen, Chosen]:
    """Choose the training and the held-out samples.

    Args:
        root: where they come from, for messages.
        ids_of: the samples' global ids, by the name of their split.
        train: name of the training split.
        test: name of the held-out split; None for test, or valid where there is no test.
        holdout: the part of the training split that is held out where there is no held-out split: chosen by id, the
            same in every run.

    Raises:
        ValueError: a split is missing or empty, or there are both a held-out split and ``holdout``.
    """
    if not 0 <= holdout <= 0.9:
        raise ValueError(f"holdout ({holdout}) must be between 0 and 0.9")
    has = ", ".join(ids_of)
    name = test or next((split for split in ("test", "valid") if split in ids_of), "test")
    if train not in ids_of:
        raise ValueError(f"train ({train}) is no split of {root!r}, which has {has}: name one of them")
    everything = np.arange(len(ids_of[train]))
    if name in ids_of:
        if holdout:
            raise ValueError(
                f"holdout ({holdout:g}) is for data without the split {name!r}, and {root!r} has it: leave holdout "
                "out, or set test to another name"
            )
        return (train, everything), (name, np.arange(len(ids_of[name])))
    if not holdout:
        raise ValueError(
            f"test ({name}) is no split of {root!r}, which has {has}: name one of them, or set holdout to the part of "
            "the training samples to hold out, such as 0.1"
        )
    # The top 53 bits of a hash are a number from -1/2 to 1/2, whatever the run's seed.
    chance = hashes(0, 0, 0, torch.from_numpy(ids_of[train]), purpose=Purpose.DATA).double() / 2.0**64 + 0.5
    held = (chance < holdout).numpy()
    if held.all() or not held.any():
        raise ValueError(
            f"holdout ({holdout:g}) leaves {(~held).sum()} training and {held.sum()} held-out samples: change it"
        )
    return (train, everything[~held]), (train, everything[held])


def class_field(num_classes: int) -> Field:
    """Return how a class is stored: in the fewest bytes."""
    kind = torch.uint8 if num_classes <= 256 else torch.int16 if num_classes <= 2**15 else torch.int32
    return Field((), kind, num_classes=num_classes)
