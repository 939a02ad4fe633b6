"""Samples of the experts of a mixture, drawn where they live.

Shape letters: E all experts, S samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.numpy import load, save

from mixdist.mixtures.study import Evaluation
from mixdist.noise import Moment, Purpose
from mixdist.parallel.agreement import gather_bytes

if TYPE_CHECKING:
    from mixdist.mixtures.ensemble import Ensemble

DRAWN_AT_ONCE = 1000
"""Samples that an expert draws at once."""


def apportioned(share_E: np.ndarray, num_samples: int) -> np.ndarray:
    """Return each expert floor(S alpha_e) of S samples, and those with the largest remainders one more; ties by number.

    Args:
        share_E: alpha, which sums to 1.
        num_samples: S.
    """
    exact_E = num_samples * np.asarray(share_E, dtype=np.float64)
    # Shares are quotients: S alpha_e may miss a whole number by its rounding.
    counts_E = np.floor(exact_E + 1e-9).astype(np.int64)
    order = np.argsort(-(exact_E - counts_E).round(9), kind="stable")
    counts_E[order[: num_samples - counts_E.sum()]] += 1
    return counts_E


@torch.no_grad()
def samples_of(mixture: Ensemble, counts_E: np.ndarray, at: Moment, observed: bool) -> dict[int, np.ndarray]:
    """Draw from every expert where it lives; every rank calls it and gets all samples.

    The i-th sample of an expert is a function of (seed, phase, i, expert) alone.

    Args:
        mixture: its experts ``draw``, or ``sample`` where not ``observed``.
        counts_E: how many of each expert.
        at: names the draws; its step is not used.
        observed: x ~ p(x|z); otherwise the means of p(x|z).

    Returns:
        for each expert (n, *shape of x).
    """
    own = {}
    for e, expert in mixture.bank.owned().items() if mixture.context.mesh.leads else ():
        expert.eval()
        parts = [
            _draw(mixture, e, torch.arange(first, min(first + DRAWN_AT_ONCE, int(counts_E[e]))), at, observed)
            for first in range(0, max(1, int(counts_E[e])), DRAWN_AT_ONCE)
        ]
        expert.train()
        own[str(e)] = np.ascontiguousarray(np.concatenate(parts))
    found: dict[str, np.ndarray] = {}
    for data in gather_bytes(save(own), mixture.context.mesh.world):
        found |= load(data)
    return {e: found[str(e)] for e in range(len(counts_E))}


def _draw(mixture: Ensemble, e: int, ids_n: torch.Tensor, at: Moment, observed: bool) -> np.ndarray:
    expert, ids_n = mixture.bank.owned()[e], ids_n.to(mixture.context.mesh.device)
    assert expert.noise_shape is not None
    eps = Moment(at.seed, at.phase).draw(Purpose.PRIOR).normal(ids_n, [e], expert.noise_shape, mixture.dtype)[0]
    if not observed:
        return expert.sample(eps).cpu().numpy()
    shape = mixture.spec[mixture.modelled].shape
    seen = Moment(at.seed, at.phase).draw(Purpose.OBSERVATION).uniform(ids_n, [e], shape, mixture.dtype)[0]
    return expert.draw(eps, seen).cpu().numpy()


def draw_mixture(
    mixture: Ensemble, num_samples: int, evaluation: Evaluation, at: Moment
) -> tuple[list[int], np.ndarray]:
    """Draw S samples x ~ sum_e alpha_e p_e(x), as many of each expert as :func:`apportioned` says."""
    weight_E = evaluation.weight_E  # type: ignore[attr-defined]
    assert weight_E is not None
    counts_E = apportioned(weight_E, num_samples)
    return counts_E.tolist(), np.concatenate(list(samples_of(mixture, counts_E, at, observed=True).values()))
