"""Which samples are trained on and which are held out; how classes are stored.

Shape letters: N samples.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixdist.data.contracts import check_first, is_own, load
from mixdist.data.dataset import Source, Splits
from mixdist.noise import Purpose, hashes
from mixdist.terms import Field

Chosen = tuple[str, NDArray[np.int64]]
"""The name of a split, and places in it."""

TEST, VALID = 0, 1
"""What is held out: each has hashes of its own, so that one cut says nothing about the other."""


def check_part(name: str, part: float) -> None:
    """Check a part that is to be held out: above 0 and below 1, or a whole number of rows.

    Raises:
        ValueError: it is neither.
    """
    if not (0 < part < 1 or (isinstance(part, int) and part >= 1)):
        raise ValueError(
            f"{name} ({part}) must be a part of the training rows above 0 and below 1, such as 0.1, or a whole number "
            f"of rows, such as 1000: choose one, or leave {name} out"
        )


def held_out(name: str, ids_N: Tensor, part: float, use: int) -> Tensor:
    """Return which samples are held out, bool (N,): a function of their ids alone, the same in every run.

    A part takes the samples whose hash is below it, so that each stays where it is when others are added. A whole
    number takes so many, those with the smallest hashes.

    Args:
        name: of the option that asks for it, for messages.
        ids_N: ids of the samples, int64.
        part: above 0 and below 1, or a whole number of samples.
        use: TEST or VALID.

    Raises:
        ValueError: it is neither, or no sample would be left on one side.
    """
    check_part(name, part)
    hash_N = hashes(0, use, 0, ids_N, purpose=Purpose.SPLIT)
    if part < 1:
        held_N = hash_N.double() / 2.0**64 + 0.5 < part  # a hash is from -2^63 to 2^63 - 1
    else:
        held_N = torch.zeros(len(ids_N), dtype=torch.bool)
        held_N[hash_N.argsort(stable=True)[: int(part)]] = True
    if held_N.all() or not held_N.any():
        raise ValueError(
            f"{name} ({part}) holds {int(held_N.sum())} of the {len(ids_N)} training rows out, expected at least 1 "
            f"and not all of them: change it"
        )
    return held_N


def load_splits(source: Source, valid: float | None, tests: bool = True) -> Splits:
    """Load a source, and cut validation rows out of its training rows where they are asked for.

    Args:
        source: of the data.
        valid: a part of the training rows or a number of them; None for the source's own validation rows, if any.
        tests: whether test rows may be read although there are validation rows.

    Raises:
        ValueError: the source breaks its contract, has validation rows of its own, or too few rows to be cut.
    """
    splits = load(source)
    if valid is not None:
        splits = _cut(source, splits, valid)
    if is_own(source):
        for one in splits if tests or splits.valid is None else (splits.train, splits.valid):
            if one is not None:
                check_first(source, one)
    return splits


def _cut(source: Source, splits: Splits, valid: float) -> Splits:
    """Cut validation rows out of the training rows."""
    if splits.valid is not None:
        raise ValueError(
            f"valid ({valid}) is for data without validation rows, and {type(source).__name__} has "
            f"{len(splits.valid)} of its own: leave valid out"
        )
    held_N = held_out("valid", splits.train.ids, valid, VALID)
    train, cut = (splits.train.part(kept_N.nonzero()[:, 0]) for kept_N in (~held_N, held_N))
    return Splits(train, splits.test, cut)


def choose_splits(
    root: str, ids_of: Mapping[str, NDArray[np.int64]], train: str, test: str | None, holdout: float
) -> list[Chosen]:
    """Choose the training samples, those for tests and, where there are others, those for validation.

    Args:
        root: where they come from, for messages.
        ids_of: the samples' global ids, by the name of their split.
        train: name of the training split.
        test: name of the held-out split; None for test, or valid where there is no test.
        holdout: what is held out of the training split where there is no held-out split; 0 for nothing.

    Raises:
        ValueError: a split is missing or empty, or there are both a held-out split and ``holdout``.
    """
    has = ", ".join(ids_of)
    name = test or next((split for split in ("test", "valid") if split in ids_of), "test")
    if train not in ids_of:
        raise ValueError(f"train ({train}) is no split of {root!r}, which has {has}: name one of them")
    if holdout:
        check_part("holdout", holdout)
    if name in ids_of:
        if holdout:
            raise ValueError(
                f"holdout ({holdout:g}) is for data without the split {name!r}, and {root!r} has it: leave holdout "
                "out, or set test to another name"
            )
        chosen = [(train, np.arange(len(ids_of[train]))), (name, np.arange(len(ids_of[name])))]
    elif holdout:
        held_N = held_out("holdout", torch.from_numpy(ids_of[train]), holdout, TEST).numpy()
        chosen = [(train, np.flatnonzero(~held_N)), (train, np.flatnonzero(held_N))]
    else:
        raise ValueError(
            f"test ({name}) is no split of {root!r}, which has {has}: name one of them, or set holdout to the part of "
            "the training samples to hold out, such as 0.1"
        )
    if "valid" in ids_of and "valid" not in (train, name):
        chosen.append(("valid", np.arange(len(ids_of["valid"]))))
    return chosen


def class_field(num_classes: int) -> Field:
    """Return how a class is stored: in the fewest bytes."""
    kind = torch.uint8 if num_classes <= 256 else torch.int16 if num_classes <= 2**15 else torch.int32
    return Field((), kind, num_classes=num_classes)
