"""Which expert each sample of a data set belongs to: the table of hard assignment. Pure.

Shape letters: N samples, E experts.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixdist.messages import one_line
from mixdist.noise import Purpose, permutation

Table = NDArray[np.unsignedinteger[Any]]
StarvedRule = Literal["none", "freeze", "reseed"]
_NO_NPY = (ValueError, OSError, EOFError, SyntaxError, TokenError, MemoryError, OverflowError, TypeError)
"""What numpy raises over damaged files: it reads their header as Python, and takes room for as much as that claims."""


@dataclass(frozen=True, eq=False)
class Assignment:
    """One small integer a sample, in the data set's order.

    Args:
        expert_N: the expert of each sample; uint8, or uint16 with more than 256 experts.
        num_experts: E.
        data: fingerprint of the data set.
        round: after which it was made; 0 before the first.
    """

    expert_N: Table
    num_experts: int
    data: str
    round: int = 0

    def __len__(self) -> int:
        return len(self.expert_N)

    @staticmethod
    def of(expert_N: NDArray[np.integer[Any]], num_experts: int, data: str, round: int = 0) -> Assignment:
        """Make the table of experts given as any integers."""
        kind = np.dtype(np.uint8 if num_experts <= 256 else np.uint16)
        return Assignment(expert_N.astype(kind), num_experts, data, round)

    @staticmethod
    def uniform(num_samples: int, num_experts: int, data: str, seed: int) -> Assignment:
        """Split the samples at random into parts as even as possible: a function of the seed alone."""
        place_N = torch.empty(num_samples, dtype=torch.int64)
        place_N[permutation(seed, 0, 0, num_samples, purpose=Purpose.CHANCE)] = torch.arange(num_samples)
        return Assignment.of((place_N % num_experts).numpy(), num_experts, data)

    @property
    def counts_E(self) -> NDArray[np.int64]:
        """Samples of each expert."""
        return np.bincount(self.expert_N, minlength=self.num_experts)

    @property
    def share_E(self) -> NDArray[np.float64]:
        """alpha: each expert's part of the samples (seed document 004, section 3)."""
        share: NDArray[np.float64] = self.counts_E / len(self)
        return share

    @property
    def share_entropy(self) -> float:
        """H(alpha) = -sum_j alpha_j log alpha_j, nats."""
        share = self.share_E[self.share_E > 0]
        return float(-(share * np.log(share)).sum())

    def positions(self, expert: int) -> Tensor:
        """Return the places of an expert's samples in the data set, ascending, int64."""
        return torch.from_numpy(np.flatnonzero(self.expert_N == expert))

    def changed(self, other: Assignment) -> float:
        """Return the part of samples that have another expert in another table."""
        return float((self.expert_N != other.expert_N).mean())

    def to_bytes(self) -> bytes:
        """Return the table as an .npy file."""
        file = io.BytesIO()
        np.save(file, self.expert_N, allow_pickle=False)
        return file.getvalue()

    def describe(self) -> dict[str, Any]:
        """Return what the table is, as JSON: it stands beside the .npy file."""
        return {
            "round": self.round,
            "num_experts": self.num_experts,
            "data": self.data,
            "sha256": hashlib.sha256(self.expert_N.tobytes()).hexdigest(),
            "counts": self.counts_E.tolist(),
        }

    @staticmethod
    def load(path: Path, data: str, num_samples: int, num_experts: int) -> Assignment:
        """Read a table that a competition starts from, with its .json beside it.

        Raises:
            ValueError: it cannot be read, is damaged, or belongs to other data.
        """
        try:
            table, about = path.read_bytes(), json.loads(path.with_suffix(".json").read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"mixture.table {path} cannot be read with its .json beside it ({error}): name a table such as "
                f"runs/RUN/assignments/round-0001.npy"
            ) from None
        return Assignment.read(str(path), table, about, data, num_samples, num_experts)

    @staticmethod
    def read(name: str, table: bytes, about: Any, data: str, num_samples: int, num_experts: int) -> Assignment:
        """Read what ``to_bytes`` wrote, checked against what ``describe`` returned and against the data set.

        Raises:
            ValueError: it is no table, it is damaged, or it belongs to other data or another number of experts.
        """
        if not isinstance(about, dict) or not isinstance(about.get("round"), int):
            raise ValueError(f"table {name} has beside it no .json that tells of it: put back that of its own run")
        if about.get("data") != data:
            raise ValueError(
                f"table {name} belongs to the data set {str(about.get('data'))[:16]}, but the training set is "
                f"{data[:16]}: take the table of a run on the same data"
            )
        if about.get("num_experts") != num_experts:
            raise ValueError(
                f"table {name} has {about.get('num_experts')} experts, but num_experts is {num_experts}: set "
                f"num_experts to that, or take another table"
            )
        try:
            expert_N = np.lib.format.read_array(io.BytesIO(table), allow_pickle=False)
        except _NO_NPY as error:
            raise ValueError(f"table {name} is no .npy file ({one_line(str(error))}): take another") from None
        if hashlib.sha256(expert_N.tobytes()).hexdigest() != about.get("sha256"):
            raise ValueError(f"table {name} differs from its checksum: take another, or that of an earlier round")
        fits = expert_N.shape == (num_samples,) and expert_N.dtype.kind == "u"
        if not fits or expert_N.max(initial=0) >= num_experts:
            raise ValueError(
                f"table {name} does not hold an expert from 0 to {num_experts - 1} for each of {num_samples} samples: "
                f"take another"
            )
        return Assignment.of(expert_N, num_experts, data, about["round"])


def winners(scores_NE: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """Return argmax_e of each row (seed document 004, section 4); ties go to the lowest expert.

    Raises:
        ValueError: a score is not a number, or a row has no expert that could have made it.
    """
    bad_E = np.isnan(scores_NE).any(0)
    if bad_E.any():
        expert = int(np.flatnonzero(bad_E)[0])
        raise ValueError(f"the score of expert {expert} is not a number for some samples: lower the learning rates")
    best: NDArray[np.int64] = np.argmax(scores_NE, axis=1)  # numpy promises the first of equal maxima
    if np.isneginf(np.take_along_axis(scores_NE, best[:, None], axis=1)).any():
        raise ValueError("every expert's score is minus infinity for some samples: lower the learning rates")
    return best


def log_shares(counts_E: NDArray[np.integer[Any]] | None, num_experts: int) -> NDArray[np.float64]:
    """Return log alpha, alpha_j = counts_j / N, (E,), -inf for an expert without samples; zeros without counts."""
    if counts_E is None:
        return np.zeros(num_experts)
    with np.errstate(divide="ignore"):  # an expert without samples wins none
        found: NDArray[np.float64] = np.log(counts_E / counts_E.sum())
    return found


def starved(counts_E: NDArray[np.int64], below: float) -> list[int]:
    """Name the experts with fewer than ``below`` times an even share of the samples.

    Args:
        counts_E: samples of each expert.
        below: part of an even share N / E.
    """
    return np.flatnonzero(counts_E < below * counts_E.sum() / len(counts_E)).tolist()


def reseeded(
    expert_N: NDArray[np.int64], best_N: NDArray[np.floating[Any]], starved_experts: list[int], num_experts: int
) -> NDArray[np.int64]:
    """Return each starved expert an even share of the samples that are modelled worst.

    The samples with the lowest winning scores, equal ones by place, are dealt to the starved experts in turn, each
    getting ceil(N / E) (fewer where the worst half of the data set is used up).

    Args:
        expert_N: the winners.
        best_N: their scores.
        starved_experts: the starved experts.
        num_experts: E.
    """
    num = min(len(starved_experts) * math.ceil(len(expert_N) / num_experts), len(expert_N) // 2)
    worst = np.argsort(best_N, kind="stable")[:num]
    result = expert_N.copy()
    result[worst] = np.asarray(starved_experts)[np.arange(num) % len(starved_experts)]
    return result
