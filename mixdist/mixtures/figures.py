"""The figures of experts and of their mixture.

Shape letters: B rows on this rank, N all rows, E experts, C classes, A attributes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mixdist.data import RankBatch, Samples
from mixdist.experts.importance import Evidence
from mixdist.mixtures.evidence import difference_sums, evidence, mixture_log_likelihood, noise_free_losses
from mixdist.mixtures.health import dead, duplicates, in_words
from mixdist.mixtures.routing import responsible
from mixdist.mixtures.study import Evaluation, Request, Study
from mixdist.stats import entropy

if TYPE_CHECKING:
    from mixdist.mixtures.ensemble import Ensemble, Scores


@dataclass(frozen=True, kw_only=True)
class ExpertEvaluation(Evaluation):
    """Figures of a mixture of experts on a data set, the same on every rank.

    Args:
        rows_E: rows for which each expert is the most responsible.
        counts_EC: experts against labels, rows; None without a label.
        expert_N: the most responsible expert of each row, in the data set's order.
        share_E: mean responsibility of each expert.
        on_own: for each expert the means over the rows for which it is the most responsible, NaN without rows: loss,
            elbo, log_likelihood with its standard error (mean over rows), squared_error of reconstructions.
        on_all: the same means over all rows.
        weight_E: alpha, the mixture's weights as a density; None where no likelihood was asked for.
        attribute_EA: the part of the rows for which each expert is the most responsible that has each attribute; NaN
            without rows; None where the data set has no attributes.
        attribute_A: the part of all rows that has each attribute; None as above.
    """

    rows_E: np.ndarray
    counts_EC: np.ndarray | None = None
    expert_N: np.ndarray
    share_E: np.ndarray
    on_own: dict[str, np.ndarray] = field(default_factory=dict)
    on_all: dict[str, np.ndarray] = field(default_factory=dict)
    weight_E: np.ndarray | None = None
    attribute_EA: np.ndarray | None = None
    attribute_A: np.ndarray | None = None

    def first(self, expert: int, num_rows: int = 8) -> list[int]:
        """Return the places in the data set of the first rows for which an expert is the most responsible."""
        return np.flatnonzero(self.expert_N == expert)[:num_rows].tolist()

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Return headers and a line for each expert: number, rows, means over them, and what it took.

        What it took is its most frequent class with the class's share of its rows, and the attribute whose rate differs
        most from that of all rows, with both rates.
        """
        shown = {"loss": "mean loss"}
        if "log_likelihood" in self.on_own:
            shown |= {"elbo": "elbo", "log_likelihood": "log-likelihood"}
        lines: list[list[Any]] = []
        for e, rows in enumerate(self.rows_E):
            line = [e, int(rows), *(f"{self.on_own[name][e]:.4g}" if rows else "-" for name in shown)]
            if self.counts_EC is not None:
                most = int(self.counts_EC[e].argmax())
                name = class_names(self.dataset)[most]
                line.append(f"{name} ({self.counts_EC[e, most] / rows:.0%})" if rows else "-")
            if self.attribute_EA is not None:
                line.append(self.stands_out(e) or "-")
            lines.append(line)
        took = [f"took {self.dataset.label}"] if self.dataset.label else []
        took += ["attribute (of all rows)"] if self.attribute_EA is not None else []
        return ["expert", "rows", *shown.values(), *took], lines

    def stands_out(self, e: int) -> str:
        """Name the attribute whose rate among an expert's rows differs most from that of all rows, with both rates.

        Such as "Blond_Hair 61% (15%)"; empty without rows or attributes, or where no rate differs.
        """
        if self.attribute_EA is None or self.attribute_A is None or not self.rows_E[e]:
            return ""
        rate_A, all_A = self.attribute_EA[e], self.attribute_A
        most = int(np.abs(rate_A - all_A).argmax())
        if rate_A[most] == all_A[most]:
            return ""
        return f"{attribute_names(self.dataset)[most]} {rate_A[most]:.0%} ({all_A[most]:.0%})"

    def describe(self) -> dict[str, Any]:
        """Return all of it as JSON: figures, findings, a record for each expert, what is known of experts' rows."""
        experts = [
            {
                "expert": e,
                "rows": int(rows),
                "mean_responsibility": float(self.share_E[e]),
                "weight": None if self.weight_E is None else float(self.weight_E[e]),
                "on_own_rows": {name: float(means[e]) for name, means in self.on_own.items()},
                "on_all_rows": {name: float(means[e]) for name, means in self.on_all.items()},
            }
            for e, rows in enumerate(self.rows_E)
        ]
        arrays = {name: getattr(self, name) for name in ("counts_EC", "attribute_EA", "attribute_A")}
        return {
            **super().describe(),
            "experts": experts,
            "label": self.dataset.label,
            "class_names": list(self.dataset.class_names),
            "attribute": self.dataset.attribute,
            "attribute_names": attribute_names(self.dataset) if self.dataset.attribute else [],
            **{name: None if array is None else array.tolist() for name, array in arrays.items()},
        }


class ExpertStudy(Study):
    """Gathers the figures of experts and of their mixture.

    With r_ne the responsibilities, e(n) the most responsible expert and D the numbers in a row, the figures are

    - ``loss`` = mean_n sum_e r_ne l_ne; ``elbo`` the same of ELBOs; ``bound`` = mean_n log sum_e r_ne exp(elbo_ne);
      nats. An ELBO is log p(x|z) - KL at one posterior sample or, with ``num_samples``, the mean of S log-weights.
    - ``log_likelihood_shares`` with ``num_samples``: the mixture bound, mean_n log sum_e alpha_e p_e(x_n), with p_e
      importance-sampled. alpha is the mean responsibility over ``shares_from``, or in a hard mixture the expert's part
      of the training set. This is the figure to compare.
    - ``log_likelihood_gate`` with ``num_samples``: mean_n log sum_e r_ne p_e(x_n), no density of x: in a hard mixture
      the likelihood of the winner. See :func:`mixdist.mixtures.evidence.mixture_log_likelihood` for both.
    - ``exact_log_likelihood`` = mean_n log p(x_n) where the data set knows it, which no model exceeds in expectation.
    - ``rmse_row`` = sqrt(mean_n sum_d (x_nd - xhat_nd)^2) and ``rmse_value`` = rmse_row / sqrt(D) of the
      reconstructions by e(n), at the mean of q(z|x): for images, error per image and per pixel, in units of x.
    - of the weighted mean prediction: ``rmse`` = sqrt(mean_n ||y_n - yhat_n||^2) for numbers; for classes
      ``prediction_accuracy`` and ``nll`` = -mean_n log sum_e r_ne p_e(y_n|x_n), nats.
    - ``accuracy``, ``purity``, ``nmi``, ``ari``: see :func:`clustering`.
    - ``routing_entropy`` = mean_n H(r_n), nats, 0 in a hard mixture, and ``experts_in_use`` = exp H(mean_n r_n).

    Where experts differ, figures that some of them do not have are left out, and likelihoods if they are densities of
    different fields. Log densities are those of values, as models see them;
    :func:`mixdist.mixtures.evidence.stored_units` turns them into those of stored numbers.

    Args:
        mixture: the mixture.
        dataset: the rows.
        request: what is asked for.
    """

    def __init__(self, mixture: Ensemble, dataset: Samples, request: Request) -> None:
        super().__init__(mixture.measure, dataset, request)
        self.mixture, self.num_experts = mixture, mixture.num_experts
        self.target = mixture.common("predicts")
        self.share_E: Tensor | None = None
        name = mixture.common("reconstructs")
        self.num_values = mixture.spec[name].num_values if name else 0

    def start(self) -> None:
        """Take the mixture's weights, where likelihoods are asked for."""
        request = self.request
        if request.num_samples is not None:
            rows = request.shares_from or self.dataset
            self.share_E = self.mixture.shares(rows, request.batch_size, request.at)

    def add(self, batch: RankBatch) -> None:
        """Count a batch of this rank's rows."""
        mixture, request = self.mixture, self.request
        route = mixture.send(batch)
        scores = mixture.score(batch, route, request.at)
        found = None
        if request.num_samples is not None:
            found = evidence(mixture, batch, route, request.at, request.num_samples)
        self._scores(batch, scores, found)
        self._noise_free(scores, *noise_free_losses(mixture, route))
        if self.target is not None:
            target = mixture.values(batch.rows, (self.target,))[self.target]
            self._prediction(mixture.predict(scores, route), target)

    def _scores(self, batch: RankBatch, scores: Scores, found: Evidence | None) -> None:
        log_resp_BE, expert_B = scores.log_resp_BE.double(), responsible(scores.log_resp_BE)
        resp_BE = log_resp_BE.exp()
        self.sum("share", resp_BE.sum(0))
        self.sum("entropy", entropy(log_resp_BE, dim=-1).sum())
        self.sum("loss", (resp_BE * scores.losses_BE).sum())
        self._each("loss", scores.losses_BE, expert_B)
        elbo_BE = scores.elbo_BE if found is None else found.elbo
        if elbo_BE is not None:
            self.sum("elbo", (resp_BE * elbo_BE).sum())
            self.sum("bound", mixture_log_likelihood(elbo_BE, log_resp_BE).sum())
            self._each("elbo", elbo_BE, expert_B)
        if found is not None and self.share_E is not None:
            self.sum("log_likelihood_shares", mixture_log_likelihood(found.log_px, self.share_E.log()).sum())
            self.sum("log_likelihood_gate", mixture_log_likelihood(found.log_px, log_resp_BE).sum())
            self._each("log_likelihood", found.log_px, expert_B)
            self._each("log_likelihood_error", found.error, expert_B)
        self._known(batch, expert_B)
        self.keep(batch, expert=expert_B)

    def _known(self, batch: RankBatch, expert_B: Tensor) -> None:
        """Count experts against the label and the attributes that the data set has."""
        label, attribute = self.dataset.label, self.dataset.attribute
        class_B = batch.rows[label].long() if label else torch.zeros_like(expert_B)
        counts_EC = torch.zeros(
            self.num_experts, self.dataset.num_classes or 1, dtype=torch.float64, device=expert_B.device
        )
        counts_EC.index_put_((expert_B, class_B), counts_EC.new_ones(len(expert_B)), accumulate=True)
        self.sum("counts", counts_EC)
        if attribute:
            attribute_BA = batch.rows[attribute].to(counts_EC.dtype)
            counts_EA = attribute_BA.new_zeros(self.num_experts, attribute_BA.shape[1])
            self.sum("attributes", counts_EA.index_add(0, expert_B, attribute_BA))

    def _noise_free(self, scores: Scores, losses_BE: Tensor, squared_BE: Tensor | None) -> None:
        """Count what the experts make of the batch without noise."""
        self.sum("noise_free", difference_sums(losses_BE))
        if squared_BE is not None:
            expert_B = responsible(scores.log_resp_BE)
            self.sum("squared_error", squared_BE.gather(1, expert_B[:, None]).sum())
            self._each("squared_error", squared_BE, expert_B)

    def _prediction(self, prediction: Tensor, target: Tensor) -> None:
        """Count predictions: numbers against numbers, or probabilities (B, C) against classes."""
        if target.is_floating_point():
            self.sum("prediction_error", (prediction - target).double().square().sum())
            return
        probability_B = prediction.double().gather(1, target[:, None])[:, 0]
        self.sum("nll", -probability_B.log().sum())
        self.sum("prediction_accuracy", (prediction.argmax(1) == target).double().sum())

    def _each(self, name: str, field_BE: Tensor, expert_B: Tensor) -> None:
        """Count each expert's field, over its own rows and over all."""
        field_BE = field_BE.double()
        own_B = field_BE.gather(1, expert_B[:, None])[:, 0]
        self.sum(f"own {name}", field_BE.new_zeros(self.num_experts).index_add(0, expert_B, own_B))
        self.sum(f"all {name}", field_BE.sum(0))

    def result(self, sums: dict[str, np.ndarray], columns: dict[str, np.ndarray]) -> ExpertEvaluation:
        """Return the evaluation."""
        num_rows, dataset = len(self.dataset), self.dataset
        rows_E, share_E = sums["counts"].sum(1), sums["share"] / num_rows
        counts_EC = sums["counts"].round().astype(np.int64) if dataset.label else None
        with np.errstate(invalid="ignore"):
            on_own = {n.removeprefix("own "): s / rows_E for n, s in sums.items() if n.startswith("own ")}
            attribute_EA = sums["attributes"] / rows_E[:, None] if dataset.attribute else None
        on_all = {n.removeprefix("all "): s / num_rows for n, s in sums.items() if n.startswith("all ")}
        return ExpertEvaluation(
            dataset,
            self._figures(sums, counts_EC),
            in_words(share_E, dead(share_E), duplicates(sums["noise_free"] / num_rows)),
            rows_E=rows_E.round().astype(np.int64),
            counts_EC=counts_EC,
            expert_N=columns["expert"],
            share_E=share_E,
            on_own=on_own,
            on_all=on_all,
            weight_E=None if self.share_E is None else self.share_E.cpu().numpy(),
            attribute_EA=attribute_EA,
            attribute_A=sums["attributes"].sum(0) / num_rows if dataset.attribute else None,
        )

    def _figures(self, sums: dict[str, np.ndarray], counts_EC: np.ndarray | None) -> dict[str, float]:
        mean = {name: float(value) / len(self.dataset) for name, value in sums.items() if value.ndim == 0}
        densities = (
            ("elbo", "bound", "log_likelihood_shares", "log_likelihood_gate") if self.mixture.one_density else ()
        )
        names = ("loss", *densities, "prediction_accuracy", "nll")
        known = [name for name in names if name in mean and (self.mixture.alike or math.isfinite(mean[name]))]
        figures = {name: mean[name] for name in known}
        if self.dataset.log_density_N is not None:
            figures["exact_log_likelihood"] = self.dataset.log_density_N.mean().item()
        if "prediction_error" in mean:
            figures["rmse"] = math.sqrt(mean["prediction_error"])
        if "squared_error" in mean:
            figures["rmse_row"] = math.sqrt(mean["squared_error"])
            figures["rmse_value"] = figures["rmse_row"] / math.sqrt(self.num_values)
        if counts_EC is not None:
            figures |= clustering(counts_EC)
        share_E = torch.from_numpy(sums["share"] / len(self.dataset))
        return figures | {
            "routing_entropy": mean["entropy"],
            "experts_in_use": math.exp(entropy(share_E.log(), dim=0).item()),
        }


def clustering(counts_EC: np.ndarray) -> dict[str, float]:
    """Compare experts with labels, from their contingency table.

    accuracy: largest share of rows on a one-to-one matching of experts to classes (Hungarian method); purity: share of
    rows of their expert's most frequent class; nmi: mutual information over the arithmetic mean of the entropies; ari:
    adjusted Rand index.
    """
    # Heavy, and needed at the end of a run alone.
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    experts, classes = linear_sum_assignment(counts_EC, maximize=True)
    e, c = np.nonzero(counts_EC)
    by_expert, by_class = (np.repeat(index, counts_EC[e, c]) for index in (e, c))
    return {
        "accuracy": float(counts_EC[experts, classes].sum() / counts_EC.sum()),
        "purity": float(counts_EC.max(1).sum() / counts_EC.sum()),
        "nmi": float(normalized_mutual_info_score(by_class, by_expert)),
        "ari": float(adjusted_rand_score(by_class, by_expert)),
    }


def class_names(dataset: Samples) -> list[str]:
    """Name the classes of the label, by number where they have no names."""
    return list(dataset.class_names) or [str(c) for c in range(dataset.num_classes or 0)]


def attribute_names(dataset: Samples) -> list[str]:
    """Name the attributes, by number where they have no names."""
    assert dataset.attribute is not None
    return list(dataset.attribute_names) or [str(a) for a in range(dataset.spec[dataset.attribute].shape[0])]
