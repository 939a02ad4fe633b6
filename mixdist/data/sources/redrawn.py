"""Sources of dequantised and of binarised rows, over any other source."""

from __future__ import annotations

from typing import Literal, get_args

from mixdist.arguments import check_arguments
from mixdist.data.contracts import load
from mixdist.data.dataset import Samples, Source, Splits
from mixdist.data.redrawn import Binarise, Dequantise, Redraw, Redrawn

BinariseName = Literal["static", "dynamic", "threshold"]


class _Over(Source):
    """A source over another one."""

    source: Source
    field: str

    def _redrawn(self, how: Redraw) -> Splits[Samples]:
        """Return the splits of the other source, drawn anew."""
        made = [None if part is None else Redrawn(part, self.field, how) for part in load(self.source)]
        for part in made:
            if part is not None:
                part.check()
        return Splits(*made)  # type: ignore[arg-type]


class Dequantised(_Over):
    """Another source with one field of levels spread evenly: level k of n as (k + u) / n, u uniform on (0, 1).

    For densities of pixels (Uria et al. 2013, section 5.1): the mean over u of log p((k + u) / n) - D log n is a lower
    bound of a log mass of the levels, the integral of p over a level (Theis et al. 2016, section 3.1), so it cannot
    grow without limit, and ``bits_per_dim`` of an evaluation is what papers report. u is keyed by sample, so it is the
    same on every layout: in training new in each epoch, else the same in every run.

    Args:
        source: whose rows it reads, in memory or in shards.
        field: bytes that mean levels k / (n - 1) on [0, 1], such as pixels of 256 levels.
        seed: of u outside of training, not of the run.

    Raises:
        ValueError: the source is none, or the seed is out of range.

    Examples:
        >>> from mixdist.data import Dequantised, Digits
        >>> train = Dequantised(Digits()).load().train
        >>> train.spec["x"].dtype, round(1 / train.spec["x"].scale), train.spec["x"].drawn
        (torch.float32, 17, 'dequantised (seed 0)')
    """

    def __init__(self, source: Source, field: str = "x", seed: int = 0) -> None:
        check_arguments(Dequantised.__init__, locals(), "Dequantised's ")
        _check("Dequantised", source, seed)
        self.source, self.field, self.seed = source, field, seed

    def load(self) -> Splits[Samples]:
        """Read the source.

        Raises:
            ValueError: it has no such field, or the field is not of levels.
        """
        return self._redrawn(Dequantise(self.seed))


class Binarised(_Over):
    """Another source with one field of numbers from 0 to 1 as zeros and ones, as for binarised MNIST.

    A draw is keyed by sample, so it is the same on every layout. The static one is a draw of its own and not the files
    of Larochelle and Murray (2011), whose test digits differ in their draw alone.

    Args:
        source: whose rows it reads, in memory or in shards.
        kind: static: 1 with the number's probability, once for all epochs and runs (Salakhutdinov and Murray 2008);
            dynamic: in training drawn anew in each epoch (Burda et al. 2016), else as static; threshold: 1 from 0.5 on.
        field: numbers from 0 to 1, such as pixels of scale 1/255.
        seed: of the draws that are the same in every run, not of the run.

    Raises:
        ValueError: the source is none, another kind, or the seed is out of range.

    Examples:
        >>> import torch
        >>> from mixdist.data import Binarised, Digits
        >>> train = Binarised(Digits()).load().train
        >>> train.take(torch.tensor([0]))["x"].unique(), train.spec["x"].drawn
        (tensor([0, 1], dtype=torch.uint8), 'binarised (static, seed 0)')
    """

    def __init__(self, source: Source, kind: BinariseName = "static", field: str = "x", seed: int = 0) -> None:
        check_arguments(Binarised.__init__, locals(), "Binarised's ")
        _check("Binarised", source, seed)
        if kind not in get_args(BinariseName):
            raise ValueError(f"kind ({kind!r}) must be one of {', '.join(get_args(BinariseName))}")
        self.source, self.kind, self.field, self.seed = source, kind, field, seed

    def load(self) -> Splits[Samples]:
        """Read the source.

        Raises:
            ValueError: it has no such field, or a number of it is not from 0 to 1.
        """
        return self._redrawn(Binarise(self.kind, self.seed))


def _check(name: str, source: Source, seed: int) -> None:
    if not isinstance(source, Source):
        raise ValueError(f"source of {name} ({source!r}) must be a source of data: give one, such as Digits()")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed of {name} ({seed}) must be from 0 to 2**64 - 1: choose another")
