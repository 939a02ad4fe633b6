"""Samples of a whole mixture, and the density that they have.

Shape letters: E all experts, S samples, H rows that choose the bandwidth, D numbers in a row.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import load, save

from mixdist.data import Samples
from mixdist.evaluation.kde import parzen
from mixdist.mixtures import Ensemble
from mixdist.noise import Moment, Purpose, permutation
from mixdist.parallel.agreement import agree, gather_bytes, gather_json

HELD_OUT = 2000
"""Most training rows that choose a bandwidth; a tenth of them where there are fewer than ten times as many."""

DRAWN_AT_ONCE = 1000
"""Samples that an expert draws at once."""


class KernelDensity(NamedTuple):
    """The mean log density of rows under a kernel density on a mixture's samples, and how it was taken.

    Args:
        log_likelihood: mean over the rows, nats; in units of values, as the model sees them.
        num_samples: S.
        counts_E: samples of each expert.
        bandwidth: standard deviation of the kernel, in units of values.
        at_edge: the best bandwidth was the first or last one tried, so the number is not to be trusted.
        chosen_on: training rows that chose the bandwidth; none of them is reported.
        rows: rows reported.
    """

    log_likelihood: float
    num_samples: int
    counts_E: list[int]
    bandwidth: float
    at_edge: bool
    chosen_on: int
    rows: int

    def describe(self) -> dict[str, Any]:
        """Say, in JSON, how it was taken."""
        return {
            "samples": self.num_samples,
            "samples_of_experts": self.counts_E,
            "drawn": "x ~ sum_k alpha_k p_k(x), with the noise of p(x|z): as many of each expert as its weight says",
            "bandwidth": self.bandwidth,
            "bandwidth_at_edge": self.at_edge,
            "bandwidth_chosen_on": f"{self.chosen_on} training rows, none of them among those reported",
            "rows": self.rows,
        }


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
    for e, expert in mixture.bank.owned().items() if mixture.dispatch.mesh.leads else ():
        expert.eval()
        parts = [
            _draw(mixture, e, torch.arange(first, min(first + DRAWN_AT_ONCE, int(counts_E[e]))), at, observed)
            for first in range(0, max(1, int(counts_E[e])), DRAWN_AT_ONCE)
        ]
        expert.train()
        own[str(e)] = np.ascontiguousarray(np.concatenate(parts))
    found: dict[str, np.ndarray] = {}
    for data in gather_bytes(save(own), mixture.dispatch.mesh.world):
        found |= load(data)
    return {e: found[str(e)] for e in range(len(counts_E))}


def _draw(mixture: Ensemble, e: int, ids_n: torch.Tensor, at: Moment, observed: bool) -> np.ndarray:
    expert, ids_n = mixture.bank.owned()[e], ids_n.to(mixture.dispatch.mesh.device)
    assert expert.noise_shape is not None
    eps = Moment(at.seed, at.phase).draw(Purpose.PRIOR).normal(ids_n, [e], expert.noise_shape, mixture.dtype)[0]
    if not observed:
        return expert.sample(eps).cpu().numpy()
    shape = mixture.spec[modelled(mixture)].shape
    seen = Moment(at.seed, at.phase).draw(Purpose.OBSERVATION).uniform(ids_n, [e], shape, mixture.dtype)[0]
    return expert.draw(eps, seen).cpu().numpy()


def modelled(mixture: Ensemble) -> str:
    """Name the field whose density the experts give: the one they predict, or the one they generate."""
    template = mixture.bank.template
    return str(getattr(template, "target" if template.can("predict") else "field", "x"))


def kernel_density(
    mixture: Ensemble, share_E: np.ndarray, dataset: Samples, train: Samples, at: Moment, num_samples: int
) -> KernelDensity:
    """Draw S samples x ~ sum_e alpha_e p_e(x) and estimate the log density of rows from them; every rank calls it.

    See :func:`mixdist.evaluation.kde.parzen`. The expectation is never above minus the data's entropy, and far below
    it with few samples or many numbers in a row: compare only figures of as many samples. Expert counts are those of
    :func:`apportioned`, so their own randomness adds nothing.

    Args:
        mixture: its experts draw.
        share_E: alpha, the weights of the mixture as a density.
        dataset: the rows reported; those that choose the bandwidth are left out.
        train: the training rows.
        at: names the draws.
        num_samples: S.

    Raises:
        Agreed: the samples are all one point, or no row is left to report.
    """
    name, mesh = modelled(mixture), mixture.dispatch.mesh
    counts_E = apportioned(share_E, num_samples)
    samples = samples_of(mixture, counts_E, at, observed=True)
    held_out = permutation(at.seed, at.phase, 0, len(train))[: min(HELD_OUT, max(1, len(train) // 10))]
    reported = torch.isin(dataset.ids, train.ids[held_out]).logical_not().nonzero()[:, 0]
    told, error = None, None
    if mesh.rank == 0:
        try:
            estimate = parzen(
                np.concatenate([drawn.reshape(len(drawn), math.prod(drawn.shape[1:])) for drawn in samples.values()]),
                *(_flat(rows, name, index) for rows, index in ((train, held_out), (dataset, reported))),
            )
            told = [float(estimate.log_density_N.mean()), estimate.bandwidth, estimate.at_edge]
        except ValueError as mistake:
            error = f"--kde ({num_samples}): {mistake}"
    agree(gather_json(error, mesh.world)[0], mesh.world)
    log_likelihood, bandwidth, at_edge = gather_json(told, mesh.world)[0]
    return KernelDensity(
        log_likelihood, num_samples, counts_E.tolist(), bandwidth, at_edge, len(held_out), len(reported)
    )


def check_draws(mixture: Ensemble, num_samples: int) -> None:
    """Check a number of samples against what the experts can do.

    Raises:
        ValueError: it is negative, or the experts cannot draw.
    """
    if num_samples < 0:
        raise ValueError(f"--kde ({num_samples}) must be 0 or more: give 10000 for a usual estimate, 0 for none")
    template = mixture.bank.template
    if num_samples and (template.noise_shape is None or not template.can("draw")):
        raise ValueError(
            f"--kde ({num_samples}) needs experts that draw x, and {type(template).__name__} does not: set --kde 0"
        )


def _flat(dataset: Samples, name: str, index: torch.Tensor) -> np.ndarray:
    values = dataset.spec[name].values(dataset.take(index)[name], torch.float64)
    return values.reshape(len(index), -1).numpy()
