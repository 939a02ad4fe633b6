"""Samples of the experts of a mixture, drawn where they live.

Shape letters: E all experts, S samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.numpy import load, save
from torch import Tensor

from mixdist.experts import Expert
from mixdist.noise import Moment, Purpose
from mixdist.parallel.agreement import gather_bytes
from mixdist.terms import Spec

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
def from_experts(mixture: Ensemble, show: Callable[[int, Expert], dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """Return what ``show`` makes of every expert in evaluation mode, by "e/name"; every rank calls it and gets all."""
    own: dict[str, np.ndarray] = {}
    for e, expert in mixture.bank.owned().items() if mixture.context.mesh.leads else ():
        training = expert.training
        shown = show(e, expert.eval())
        own |= {f"{e}/{name}": np.ascontiguousarray(tensor.cpu().numpy()) for name, tensor in shown.items()}
        expert.train(training)
    parts = [load(data) for data in gather_bytes(save(own), mixture.context.mesh.world)]
    return {name: array for part in parts for name, array in part.items()}


def samples_of(mixture: Ensemble, counts_E: np.ndarray, at: Moment, observed: bool) -> dict[int, np.ndarray]:
    """Draw from every expert where it lives; every rank calls it and gets all samples.

    Args:
        mixture: its experts ``draw``, or ``sample`` where not ``observed``.
        counts_E: how many of each expert.
        at: names the draws; its step is not used.
        observed: x ~ p(x|z); otherwise the means of p(x|z).

    Returns:
        for each expert (n, *shape of x).
    """

    def draw(e: int, expert: Expert) -> dict[str, Tensor]:
        ids_n = torch.arange(int(counts_E[e]), device=mixture.context.mesh.device)
        parts = [drawn(expert, e, ids, at, observed, mixture.spec, mixture.dtype) for ids in ids_n.split(DRAWN_AT_ONCE)]
        return {"samples": torch.cat(parts)}

    found = from_experts(mixture, draw)
    return {e: found[f"{e}/samples"] for e in range(len(counts_E))}


def drawn(expert: Expert, e: int, ids_n: Tensor, at: Moment, observed: bool, spec: Spec, dtype: torch.dtype) -> Tensor:
    """Draw an expert's samples of the given numbers, each a function of (seed, phase, its number, expert) alone.

    Returns:
        (n, *shape of x): x ~ p(x|z) where ``observed``, otherwise the means of p(x|z).
    """
    assert expert.latent_shape is not None
    at = Moment(at.seed, at.phase)
    eps = at.draw(Purpose.PRIOR).normal(ids_n, [e], expert.latent_shape, dtype)[0]
    if not observed:
        return expert.sample(eps)
    shape = spec[getattr(expert, "field", "x")].shape
    return expert.draw(eps, at.draw(Purpose.OBSERVATION).uniform(ids_n, [e], shape, dtype)[0])
