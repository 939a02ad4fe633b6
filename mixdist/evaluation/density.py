"""The kernel density on a mixture's samples.

Shape letters: E all experts, S samples, H rows that choose the bandwidth, D numbers in a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from mixdist.data import Samples
from mixdist.evaluation.kde import parzen
from mixdist.mixtures import Evaluation, Mixture
from mixdist.noise import Moment, permutation
from mixdist.parallel.agreement import on_rank_0

HELD_OUT = 2000
"""Most training rows that choose a bandwidth; a tenth of them where there are fewer than ten times as many."""


class KernelDensity(NamedTuple):
    """The log density of rows under a kernel density on a mixture's samples, and how it was taken.

    Args:
        log_density_N: of each row, nats, in units of values, as the model sees them; NaN for rows not reported.
        reported: the places of the rows reported.
        num_samples: S.
        counts_E: samples of each expert, or of each cluster of a gate.
        drawn_of: expert or cluster.
        bandwidth: standard deviation of the kernel, in units of values.
        at_edge: the best bandwidth was the first or last one tried, so the number is not to be trusted.
        chosen_on: training rows that chose the bandwidth; none of them is reported.
    """

    log_density_N: np.ndarray
    reported: np.ndarray
    num_samples: int
    counts_E: list[int]
    drawn_of: str
    bandwidth: float
    at_edge: bool
    chosen_on: int

    def describe(self) -> dict[str, Any]:
        """Return, as JSON, how it was taken."""
        return {
            "samples": self.num_samples,
            (counts := f"samples_of_{self.drawn_of}s"): self.counts_E,
            "drawn": f"x of the whole mixture, with the noise of p(x|z); as many of each {self.drawn_of} as {counts}",
            "bandwidth": self.bandwidth,
            "bandwidth_at_edge": self.at_edge,
            "bandwidth_chosen_on": f"{self.chosen_on} training rows, none of them among those reported",
            "rows": len(self.reported),
        }


def kernel_density(
    mixture: Mixture, evaluation: Evaluation, train: Samples, at: Moment, num_samples: int
) -> KernelDensity:
    """Draw S samples x of the whole mixture and estimate the log density of rows from them; every rank calls it.

    See :func:`mixdist.evaluation.kde.parzen`. The expectation is never above minus the data's entropy, and far below
    it with few samples or many numbers in a row: compare only figures of as many samples.

    Args:
        mixture: it draws.
        evaluation: on the rows reported; those that choose the bandwidth are left out.
        train: the training rows.
        at: names the draws.
        num_samples: S.

    Raises:
        Agreed: the samples are all one point, or no row is left to report.
    """
    name, dataset = mixture.drawn_field, evaluation.dataset
    assert name is not None
    counts_E, samples = mixture.draw(num_samples, evaluation, at)
    held_out = permutation(at.seed, at.phase, 0, len(train))[: min(HELD_OUT, max(1, len(train) // 10))]
    reported = torch.isin(dataset.ids, train.ids[held_out]).logical_not().nonzero()[:, 0]

    def estimate() -> list[Any]:
        try:
            found = parzen(
                samples.reshape(len(samples), -1), _flat(train, name, held_out), _flat(dataset, name, reported)
            )
        except ValueError as mistake:
            raise ValueError(f"--kde ({num_samples}): {mistake}") from None
        return [found.log_density_N.tolist(), found.bandwidth, found.at_edge]

    log_density, bandwidth, at_edge = on_rank_0(estimate, mixture.context.mesh)
    log_density_N = np.full(len(dataset), np.nan)
    log_density_N[reported.numpy()] = log_density  # a tensor of one place would be a number
    return KernelDensity(
        log_density_N, reported.numpy(), num_samples, counts_E, mixture.drawn_of, bandwidth, at_edge, len(held_out)
    )


def check_draws(mixture: Mixture, num_samples: int) -> None:
    """Check a number of samples against what the mixture can do.

    Raises:
        ValueError: it is negative, or the mixture cannot draw.
    """
    if num_samples < 0:
        raise ValueError(f"--kde ({num_samples}) must be 0 or more: give 10000 for a usual estimate, 0 for none")
    if num_samples and mixture.drawn_field is None:
        raise ValueError(
            f"--kde ({num_samples}) needs samples with the noise of p(x|z), and {_drawless(mixture)}: leave --kde out"
        )


def _drawless(mixture: Mixture) -> str:
    """Say what of a mixture draws no samples."""
    experts = ", ".join({type(one).__name__: None for one in mixture.parts.experts.values()})
    gate = getattr(mixture, "gate", None)
    and_gate = "" if gate is None else f" nor its gate ({type(gate.model).__name__}) draws any, as VAE or the gate VaDE"
    told = f"neither experts ({experts}){and_gate}" if and_gate else f"its experts ({experts}) draw none"
    return f"of {type(mixture).__name__} {told}"


def _flat(dataset: Samples, name: str, index: torch.Tensor) -> np.ndarray:
    values = dataset.spec[name].values(dataset.take(index)[name], torch.float64)
    return values.reshape(len(index), -1).numpy()
