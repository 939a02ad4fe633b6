"""Which rows each expert sees, where that is not all of them.

Shape letters: R rows routed here, E experts on this rank, T pairs of a row and an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mixdist.terms import places


class Seen(NamedTuple):
    """The rows that each expert sees, where that is not all.

    Args:
        mask_RE: True where the expert sees the row.
        counts: rows that each expert sees.
        rows: for each expert, which these are.
        row_T: all of ``rows``, one expert's after another's.
        expert_T: the expert of each, by its place.
    """

    mask_RE: Tensor
    counts: list[int]
    rows: list[Tensor]
    row_T: Tensor
    expert_T: Tensor

    @staticmethod
    def of(mask_RE: Tensor, counts_E: Sequence[int] | None) -> Seen:
        """Ask the device how many rows each expert sees where that is not known."""
        counts = mask_RE.sum(0).tolist() if counts_E is None else list(counts_E)
        flat, num_rows = places(mask_RE.T, sum(counts)), max(len(mask_RE), 1)
        row_T = flat % num_rows
        return Seen(mask_RE, counts, list(row_T.split(counts)), row_T, flat // num_rows)

    def pairs_of(self, some: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return row and expert of the pairs of some experts, one expert's after another's."""
        if len(some) == len(self.counts):
            return self.row_T, self.expert_T
        experts = self.expert_T.split(self.counts)
        return torch.cat([self.rows[i] for i in some]), torch.cat([experts[i] for i in some])
