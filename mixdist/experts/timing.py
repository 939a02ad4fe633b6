"""Which execution is faster here: both are timed, once, on rows of the run's own size.

Shape letters: R rows, E experts on this rank.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping

import torch

from mixdist.experts.bank import Compute, Execution, ExpertBank, Noise
from mixdist.experts.expert import Expert
from mixdist.terms import Batch

WARMUP, TURNS = 2, 7


def time_executions(
    experts: Mapping[int, Expert], rows: Batch, noise: Noise | None, compute: Compute
) -> dict[Execution, float]:
    """Return the median seconds of a forward and backward pass of copies of the experts, by execution.

    The ways take turns, after a warm-up. One that these experts cannot run is absent.

    Args:
        experts: this rank's, on their device; they stay as they are.
        rows: R rows of real numbers on that device.
        noise: draws for them.
        compute: how an expert runs its rows.
    """
    banks: dict[Execution, ExpertBank] = {"loop": ExpertBank(copy.deepcopy(dict(experts)), "loop", compute)}
    if banks["loop"].can_stack:
        banks["stacked"] = ExpertBank(copy.deepcopy(dict(experts)), "stacked", compute)
    seconds: dict[Execution, list[float]] = {way: [] for way in banks}
    for turn in range(WARMUP + TURNS):
        for way, bank in banks.items():
            begin = _now(rows)
            losses_RE = bank(rows, noise).loss_R
            assert losses_RE is not None
            if losses_RE.requires_grad:
                losses_RE.mean().backward()
            if turn >= WARMUP:
                seconds[way].append(_now(rows) - begin)
    return {way: statistics.median(s) for way, s in seconds.items()}


def _now(rows: Batch) -> float:
    if rows["id"].is_cuda:
        torch.cuda.synchronize(rows["id"].device)
    return time.perf_counter()
