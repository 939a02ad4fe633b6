"""Philox 4x32-10: random words as a function of a counter and a key.

Of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011): a bijection of a 128-bit counter
under a 64-bit key, without state.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from mixdist.messages import one_line

Word = TypeVar("Word", int, Tensor, Any)
Words = tuple[Tensor, Tensor, Tensor, Tensor]

MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor | int], key: tuple[Tensor | int, Tensor | int]) -> Words:
    """Return four pseudo-random words for each counter by Philox 4x32-10.

    Args:
        counter: four int64 tensors of uint32 words that broadcast together; the last may be an int.
        key: two uint32 words, int64 tensors that broadcast with the counter, or ints.

    Returns:
        Four int64 tensors of the common shape with words from 0 to 2**32 - 1.
    """
    # The rounds mix all words, so every word gets the common shape without being expanded first.
    if (device := counter[0].device).type != "cpu":
        run = compiled(device) if device.type == "cuda" else rounds
        return run(cast(Words, counter), cast(tuple[Tensor, Tensor], key))
    # NumPy takes 0.5 to 0.7 of torch's time on a CPU. Its scalars would warn that they wrap, hence at least one axis.
    c0, c1, c2, c3, k0, k1 = (np.atleast_1d(w.numpy()) if isinstance(w, Tensor) else w for w in (*counter, *key))
    return cast(Words, tuple(map(torch.from_numpy, rounds((c0, c1, c2, c3), (k0, k1)))))


def rounds(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Run the ten rounds, for tensors (products wrap at 64 bits) and for Python ints (products do not)."""
    c0, c1, c2, c3 = counter
    for i in range(_ROUNDS):
        k0, k1 = (key[0] + i * _KEY_STEPS[0]) & MASK, (key[1] + i * _KEY_STEPS[1]) & MASK
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # c1 and c3 keep their high halves until the end: only their low halves are ever read.
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & MASK, p1, ((p0 >> 32) ^ c3 ^ k1) & MASK, p0
    return c0, c1 & MASK, c2, c3 & MASK


@lru_cache(maxsize=8)
def compiled(device: torch.device, backend: Any = "inductor") -> Callable[[Words, tuple[Tensor, Tensor]], Words]:
    """Return the rounds as one operator of a device where there were 120; they are integers, so the bits are the same.

    That is checked once, on a few counters. Where torch cannot compile, as without Triton or with
    ``TORCH_COMPILE_DISABLE=1``, or where a bit differs, it is the rounds as they are.
    """
    made = torch.compile(rounds, dynamic=True, backend=backend)
    words = torch.tensor([[0, 1, 7, MASK], [MASK, 0, 3 << 30, 1]], device=device)
    counter, key = (words[0], words[1], words[:, :1], 5), (words[1][None], words[0][None])
    try:
        return made if all(map(torch.equal, made(counter, key), rounds(counter, key))) else rounds
    except Exception as error:  # of compilers, of any kind
        warnings.warn(f"noise is not compiled on {device} ({one_line(str(error))}): steps take longer", stacklevel=2)
        return rounds
