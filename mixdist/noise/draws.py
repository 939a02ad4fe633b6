"""Random numbers that belong to rows: pure functions of (seed, purpose, phase, step, sample id, expert).

The generator has no state (:mod:`mixdist.noise.philox`). A row's numbers are therefore the same on any rank, in any
batch and beside any other rows.

Shape letters: R rows, E experts, T pairs of a row and an expert, N numbers of a row in blocks of four.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

from mixdist.noise.philox import MASK, Words, philox, rounds

_CHUNK = 1 << 16


class Purpose(IntEnum):
    """The use of a draw. The numbers are part of every stream's key: changing one changes every run."""

    WEIGHTS = 1  # initial weights of an expert
    POSTERIOR = 2  # eps of an expert's posterior sample
    GATE = 3  # the gate: its initial weights and its own eps
    ORDER = 4  # the order of samples in an epoch
    PRIOR = 5  # samples from the prior, for pictures
    DATA = 6  # synthetic data and splits
    IMPORTANCE = 7  # eps of the posterior samples that estimate a likelihood
    RIVAL = 8  # an expert's samples for its discriminator: z
    OBSERVATION = 9  # x given z, where samples are drawn with it
    DISCRIMINATOR = 10  # initial weights of a discriminator
    CHANCE = 11  # assignments by chance: the first split, random scores
    BLOCKS = 12  # the order of blocks of neighbouring samples in an epoch
    AUGMENT = 13  # flips and shifts of a row in an epoch
    SPLIT = 14  # which rows are set apart: phase 0 for testing, phase 1 for validation
    MOSAIC = 15  # the places of a mixture's samples in a picture
    DEQUANTISE = 16  # where in its level a value lies
    START = 17  # a start of a gate or of experts from training rows: which, and its seed
    MIXING = 18  # Dirichlet weights of components
    MASK = 19  # which components are kept
    DECODER = 20  # initial weights of a shared decoder
    PRIVATE = 21  # eps of the private latents of a modality
    SUBSET = 22  # which modalities are in a row's random subsets
    JUDGE = 23  # classifiers that judge what is generated: weights, order of rows
    CLONE = 24  # what tells clones of one trained expert apart
    BINARISE = 25  # whether a number between 0 and 1 becomes 1
    EXPLORATION = 26  # which expert a competition gives a row, where that is not the best


class Kind(IntEnum):
    """What the words of a stream become. Each kind has streams of its own, so one draw may give all of them."""

    NORMAL = 1
    UNIFORM = 2
    HASH = 3


_FIRST = {Purpose.OBSERVATION: Kind.UNIFORM, Purpose.AUGMENT: Kind.UNIFORM} | dict.fromkeys(
    (Purpose.ORDER, Purpose.CHANCE, Purpose.BLOCKS, Purpose.SPLIT, Purpose.MOSAIC, Purpose.START), Kind.HASH
)
"""The kind whose streams a purpose names by 0, where that is not NORMAL: that of the purpose's first use."""

# Phase numbers that no phase of training has: each keys the noise of one use.
TRIAL_PHASE = 2**27  # what is run to be checked or timed alone, as often as that takes
RESTART_PHASE = 2**28  # + round: training of an expert that got new weights in that round
DISCRIMINATOR_PHASE = 2**29  # + round: samples for discriminators; alone, their passes over the data
SCORING_PHASE = 2**30  # + round: scores of training rows in a competition
EVALUATION_PHASE = 2**31  # figures
ASSIGNMENT_PHASE = 2**31 + 1  # scores that assign rows in an evaluation


@lru_cache(maxsize=1 << 16)
def _stream(seed: int, purpose: Purpose, phase: int, expert: int, kind: int = 0) -> tuple[int, int, int, int]:
    """Return the block of four words that names a stream, computed on the host."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed ({seed}) must be from 0 to 2**64 - 1: choose another seed.")
    assert 0 <= min(phase, expert) <= max(phase, expert) <= MASK, f"phase {phase} and expert {expert} must be uint32"
    return rounds((int(purpose), phase, expert, kind), (seed & MASK, seed >> 32))


def derive(seed: int, purpose: Purpose, phase: int = 0, expert: int = 0, kind: Kind | None = None) -> tuple[int, int]:
    """Return the Philox key of a stream: the first two words of philox((purpose, phase, expert, kind), seed).

    Args:
        seed: the run's seed, 64 bits.
        purpose: what is drawn.
        phase: the trainer's phase.
        expert: the global expert number; 0 where there is none, as for the gate, which has a purpose of its own.
        kind: what the words become; 0 stands for the purpose's first kind, and for None.

    Raises:
        ValueError: if the seed is not from 0 to 2**64 - 1.
    """
    first = _FIRST.get(purpose, Kind.NORMAL)
    return _stream(seed, purpose, phase, expert, 0 if kind in (None, first) else int(kind))[:2]


def weights_seed(seed: int, purpose: Purpose, expert: int = 0, phase: int = 0) -> int:
    """Return a seed for ``torch.manual_seed``, from 0 to 2**63 - 1, for each purpose, expert and phase (or round).

    It consists of the other two words of the block that ``derive`` takes its key from: torch's CUDA generator is Philox
    too, and under the same key its numbers could be those of a ``Draw``.

    Raises:
        ValueError: if the seed is not from 0 to 2**64 - 1.
    """
    low, high = _stream(seed, purpose, phase, expert)[2:]
    return low | (high & 0x7FFFFFFF) << 32


@dataclass(frozen=True)
class Draw:
    """The key of random draws, except for their rows and experts.

    Numbers come in blocks of four with counter (block, low half of the id, high half of the id, step) and key
    ``derive(seed, purpose, phase, expert, kind)``, so a longer row starts with the numbers of a shorter one, and
    ``normal`` and ``uniform`` of one draw are independent.

    Args:
        seed: the run's seed, 64 bits.
        purpose: what is drawn.
        phase: the trainer's phase.
        step: the step within the phase; its low 32 bits are used.

    Examples:
        >>> import torch
        >>> from mixdist.noise import Draw, Purpose
        >>> draw = Draw(seed=0, purpose=Purpose.POSTERIOR, step=7)
        >>> eps = draw.normal(torch.tensor([3, 1000]), experts=[0, 1], shape=(5,))
        >>> eps.shape
        torch.Size([2, 2, 5])
        >>> torch.equal(eps[1, 1], draw.normal(torch.tensor([1000]), experts=[1], shape=(5,))[0, 0])
        True
    """

    seed: int
    purpose: Purpose
    phase: int = 0
    step: int = 0

    def normal(
        self,
        ids_R: Tensor,
        experts: Sequence[int],
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        steps_R: Tensor | None = None,
        of_T: Tensor | None = None,
    ) -> Tensor:
        """Return standard normal numbers by Box and Muller: sqrt(-2 log u) cos(2 pi v) and sqrt(-2 log u) sin(2 pi v).

        They are computed in float64 and rounded to ``dtype`` last: runs of different precision see the same noise.

        Args:
            ids_R: int64 sample ids; or (E, R), those of each expert's own rows; or (T,), those of pairs.
            experts: global expert numbers.
            shape: of what one expert draws for one row.
            dtype: of the result.
            steps_R: int64, a step for each row, in place of the draw's own: the rows of many steps at once.
            of_T: int64, for pairs of a row and an expert: where in ``experts`` each pair's expert is.

        Returns:
            A tensor (E, R, *shape), or (T, *shape) of pairs, on the device of the ids.

        Raises:
            ValueError: if the seed is not from 0 to 2**64 - 1.
        """
        words = self._words(Kind.NORMAL, ids_R, experts, shape, steps_R, of_T)
        radius = _unit(torch.stack(words[0::2], -1)).log_().mul_(-2.0).sqrt_()
        angle = _unit(torch.stack(words[1::2], -1)).mul_(2.0 * math.pi)
        numbers = torch.stack((angle.cos().mul_(radius), angle.sin_().mul_(radius)), -1)
        return _rows(numbers.flatten(-3), shape, dtype)

    def uniform(
        self, ids_R: Tensor, experts: Sequence[int], shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return uniform numbers on the open interval (0, 1): (word + 1/2) / 2**32.

        Rounding to ``dtype`` never reaches 0 or 1. Arguments, result and errors are those of ``normal``.
        """
        numbers = _unit(torch.stack(self._words(Kind.UNIFORM, ids_R, experts, shape), -1))
        limits = torch.finfo(dtype)
        return _rows(numbers.flatten(-2), shape, dtype).clamp_(limits.tiny, 1.0 - limits.eps / 2)

    def _words(
        self,
        kind: Kind,
        ids: Tensor,
        experts: Sequence[int],
        shape: tuple[int, ...],
        steps_R: Tensor | None = None,
        of_T: Tensor | None = None,
    ) -> Words:
        """Return Philox words, each (E, R, blocks), or (T, blocks)."""
        assert ids.dtype == torch.int64, f"ids are {ids.dtype}"
        assert ids.ndim == 1 or (ids.ndim == 2 and of_T is None), f"ids are {tuple(ids.shape)}"
        keys_E2 = _keys(self.seed, self.purpose, self.phase, tuple(experts), kind, ids.device)
        k0, k1 = (keys_E2[:, None] if of_T is None else keys_E2[of_T])[..., None].unbind(-2)
        block = _blocks(-(-math.prod(shape) // 4), ids.device)
        step = self.step & MASK if steps_R is None else (steps_R & MASK)[:, None]
        return philox((block, (ids & MASK)[..., None], ((ids >> 32) & MASK)[..., None], step), (k0, k1))


@lru_cache(maxsize=256)
def _keys(
    seed: int, purpose: Purpose, phase: int, experts: tuple[int, ...], kind: Kind, device: torch.device
) -> Tensor:
    """Return the keys of experts' streams, int64 (E, 2): what goes to a device goes there once, not in every step."""
    keys = [derive(seed, purpose, phase, expert, kind) for expert in experts]
    return torch.tensor(keys, dtype=torch.int64, device=device).reshape(-1, 2)


@lru_cache(maxsize=256)
def _blocks(count: int, device: torch.device) -> Tensor:
    """Return the numbers of a row's blocks, int64 (count,)."""
    return torch.arange(count, device=device)


@dataclass(frozen=True)
class Moment:
    """The position of a step in a run; with a row's id and an expert it is the key of every random draw.

    Args:
        seed: of the run.
        phase: number of the phase.
        step: training step within the phase, from 0.

    Examples:
        >>> from mixdist.noise import Moment, Purpose
        >>> Moment(seed=0, step=7).draw(Purpose.GATE)
        Draw(seed=0, purpose=<Purpose.GATE: 3>, phase=0, step=7)
    """

    seed: int
    phase: int = 0
    step: int = 0

    def draw(self, purpose: Purpose) -> Draw:
        """Return the draws of one purpose at this moment."""
        return Draw(self.seed, purpose, self.phase, self.step)


def permutation(
    seed: int, phase: int, epoch: int, size: int, expert: int = 0, purpose: Purpose = Purpose.ORDER
) -> Tensor:
    """Return the order of ``size`` samples in an epoch: a sort by 64-bit keyed hashes, equal hashes by position.

    Args:
        seed: the run's seed, 64 bits.
        phase: the trainer's phase.
        epoch: the epoch within the phase; its low 32 bits are used.
        size: the number of samples.
        expert: the expert whose order it is, if each expert has its own.
        purpose: the use of the order.

    Returns:
        An int64 tensor (size,) that holds each of 0 to size - 1 once.

    Raises:
        ValueError: if the seed is not from 0 to 2**64 - 1.
    """
    return torch.sort(hashes(seed, phase, epoch, torch.arange(size), expert, purpose), stable=True).indices


def hashes(
    seed: int, phase: int, epoch: int, ids_N: Tensor, expert: int = 0, purpose: Purpose = Purpose.ORDER
) -> Tensor:
    """Return a keyed 64-bit hash of each id, int64 (N,); arguments and errors as for ``permutation``."""
    key, zero = derive(seed, purpose, phase, expert, Kind.HASH), torch.tensor(0)
    found = torch.empty(len(ids_N), dtype=torch.int64)
    # In pieces, because the temporary words of a hundred million ids would not fit beside them.
    for start in range(0, len(ids_N), _CHUNK):
        ids = ids_N[start : start + _CHUNK]
        low, high, _, _ = philox((zero, ids & MASK, (ids >> 32) & MASK, epoch & MASK), key)
        found[start : start + _CHUNK] = low | high << 32
    return found


def _unit(words: Tensor) -> Tensor:
    """Return words as float64 in (0, 1): exact, since 33 bits fit."""
    return words.to(torch.float64).add_(0.5).mul_(2.0**-32)


def _rows(numbers: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the first numbers of each row in the row's shape: (..., N) to (..., *shape)."""
    return numbers[..., : math.prod(shape)].reshape(*numbers.shape[:-1], *shape).to(dtype).contiguous()
