"""What a mixture is worth on held-out rows.

Shape letters: B rows on this rank, N all rows, E experts, C classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor

from mixdist.data import Dataset, Loader
from mixdist.dispatch import Dispatch
from mixdist.mixtures import Moment, Scores, SoftMixture
from mixdist.routing import responsible
from mixdist.wire import gather_bytes


class Evaluation(NamedTuple):
    """Figures of a mixture on a data set, the same on every rank.

    Args:
        figures: name to number: loss, elbo, bound (nats a row), accuracy, nmi, ari, rmse where they apply.
        rows_E: rows for which each expert is the most responsible.
        loss_E: mean loss over those rows, nats; NaN without rows.
        counts_EC: experts against labels, rows; None without a label.
        expert_N: the most responsible expert of each row, in the data set's order.
    """

    figures: dict[str, float]
    rows_E: np.ndarray
    loss_E: np.ndarray
    counts_EC: np.ndarray | None
    expert_N: np.ndarray

    def first(self, expert: int, num_rows: int = 8) -> list[int]:
        """Give the places in the data set of the first rows for which an expert is the most responsible."""
        return np.flatnonzero(self.expert_N == expert)[:num_rows].tolist()


def evaluate(
    mixture: SoftMixture, dataset: Dataset, batch_size: int, seed: int, target: str | None = None
) -> Evaluation:
    """Evaluate on every row of a data set once; every rank calls it.

    The noise is keyed by row as in training, at step 0 of a phase of its own, so the result is the same on any layout.
    figures: ``loss`` = mean_n sum_e r_ne l_ne; ``elbo`` the same of ELBOs; ``bound`` = mean_n log sum_e r_ne
    exp(elbo_ne), a bound on the mixture's log-likelihood with the gate's responsibilities as weights; ``accuracy``
    after Hungarian matching of experts to classes; NMI (arithmetic) and ARI of experts against labels; ``rmse`` of the
    weighted mean prediction where the experts predict.

    Args:
        mixture: the mixture.
        dataset: held-out rows.
        batch_size: of the global batch.
        seed: of the run.
        target: the field that the experts predict; None where they do not.
    """
    dispatch = mixture.dispatch
    mesh = dispatch.mesh
    loader = Loader(dataset, batch_size, seed, 0, mesh.rank, mesh.world_size, ordered=True)
    tally = _Tally(dispatch, mesh.placement.num_experts, dataset)
    modules = [owned.module for owned in mixture.parts.owned()]
    for module in modules:
        module.eval()
    at = Moment(seed, phase=EVALUATION_PHASE)
    for index in range(loader.num_batches):
        shard = loader.batch(0, index).to(mesh.device)
        tally.add(shard.rows, mixture.score(shard, at))
        if target is not None:
            tally.add_error(mixture.predict(shard, at), mixture.values(shard.rows, (target,))[target])
    for module in modules:
        module.train()
    return tally.result()


EVALUATION_PHASE = 2**31
"""A phase number that no training phase has: it keys the noise of evaluation."""


class _Tally:
    """Sums over this rank's rows; every sum over ranks goes through one seam at the end."""

    def __init__(self, dispatch: Dispatch, num_experts: int, dataset: Dataset) -> None:
        self.dispatch, self.dataset = dispatch, dataset
        device = dispatch.mesh.device
        num_classes = dataset.num_classes or 1
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, elbo, bound, squared error
        self.loss_E = torch.zeros(num_experts, dtype=torch.float64, device=device)
        self.counts_EC = torch.zeros(num_experts, num_classes, dtype=torch.float64, device=device)
        self.chosen: list[Tensor] = []
        self.has_elbo = self.has_target = False

    def add(self, rows: dict[str, Tensor], scores: Scores) -> None:
        """Count a batch of this rank's rows."""
        resp_BE, expert_B = scores.log_resp_BE.double().exp(), responsible(scores.log_resp_BE)
        losses_BE = scores.losses_BE.double()
        self.sums[0] += (resp_BE * losses_BE).sum()
        if scores.elbo_BE is not None:
            elbo_BE = scores.elbo_BE.double()
            self.sums[1] += (resp_BE * elbo_BE).sum()
            self.sums[2] += torch.logsumexp(scores.log_resp_BE.double() + elbo_BE, dim=1).sum()
            self.has_elbo = True
        self.loss_E.index_add_(0, expert_B, losses_BE.gather(1, expert_B[:, None])[:, 0])
        label = self.dataset.label
        class_B = rows[label].long() if label else torch.zeros_like(expert_B)
        self.counts_EC.index_put_((expert_B, class_B), self.sums.new_ones(len(expert_B)), accumulate=True)
        self.chosen.append(torch.stack([rows["id"], expert_B], dim=1).cpu())

    def add_error(self, prediction: Tensor, target: Tensor) -> None:
        self.sums[3] += (prediction - target).double().square().sum()
        self.has_target = True

    def result(self) -> Evaluation:
        """Sum over ranks; every rank calls it."""
        over_batch = self.dispatch.over_batch
        sums = (over_batch.sum(self.sums) / len(self.dataset)).tolist()
        loss_E, counts_EC = over_batch.sum(self.loss_E).cpu().numpy(), over_batch.sum(self.counts_EC).cpu().numpy()
        rows_E = counts_EC.sum(1)
        figures = {"loss": sums[0]}
        if self.has_elbo:
            figures |= {"elbo": sums[1], "bound": sums[2]}
        if self.has_target:
            figures["rmse"] = sums[3] ** 0.5
        counts = counts_EC.round().astype(np.int64) if self.dataset.label else None
        if counts is not None:
            figures |= clustering(counts)
        with np.errstate(invalid="ignore"):
            return Evaluation(figures, rows_E.round().astype(np.int64), loss_E / rows_E, counts, self._experts())

    def _experts(self) -> np.ndarray:
        """Put every rank's (id, expert) pairs into the data set's order."""
        own = torch.cat(self.chosen).numpy().tobytes()
        pairs = np.frombuffer(b"".join(gather_bytes(own, self.dispatch.mesh.world)), dtype=np.int64).reshape(-1, 2)
        ids = self.dataset.rows["id"].numpy()
        by_id, order = np.argsort(pairs[:, 0]), np.argsort(ids)
        expert_N = np.empty(len(ids), dtype=np.int64)
        expert_N[order] = pairs[by_id, 1]
        return expert_N


def clustering(counts_EC: np.ndarray) -> dict[str, float]:
    """Compare experts with labels, from their contingency table.

    accuracy: largest share of rows on a one-to-one matching of experts to classes (Hungarian method); nmi: mutual
    information over the arithmetic mean of the entropies; ari: adjusted Rand index.
    """
    experts, classes = linear_sum_assignment(counts_EC, maximize=True)
    e, c = np.nonzero(counts_EC)
    by_expert, by_class = (np.repeat(index, counts_EC[e, c]) for index in (e, c))
    return {
        "accuracy": float(counts_EC[experts, classes].sum() / counts_EC.sum()),
        "nmi": float(normalized_mutual_info_score(by_class, by_expert)),
        "ari": float(adjusted_rand_score(by_class, by_expert)),
    }


def expert_rows(evaluation: Evaluation, class_names: tuple[str, ...]) -> list[list[Any]]:
    """Give one line for each expert: number, rows, mean loss, and the class it took with its share."""
    lines: list[list[Any]] = []
    for e, rows in enumerate(evaluation.rows_E):
        loss = f"{evaluation.loss_E[e]:.4g}" if rows else "-"
        line = [e, int(rows), loss]
        if evaluation.counts_EC is not None:
            took = int(evaluation.counts_EC[e].argmax())
            name = class_names[took] if class_names else str(took)
            line.append(f"{name} ({evaluation.counts_EC[e, took] / rows:.0%})" if rows else "-")
        lines.append(line)
    return lines
