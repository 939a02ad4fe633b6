"""What a mixture is worth on held-out rows.

Shape letters: B rows on this rank, N all rows, E experts, C classes, A attributes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixdist.data import Loader, Samples
from mixdist.evaluation.evidence import evidence, mixture_log_likelihood, noise_free_losses, reconstructed
from mixdist.evaluation.health import dead, duplicates, in_words
from mixdist.experts.importance import Evidence
from mixdist.mixtures import Ensemble, Scores
from mixdist.mixtures.routing import responsible
from mixdist.noise import Moment
from mixdist.parallel.agreement import gather_bytes
from mixdist.parallel.dispatch import Dispatch
from mixdist.stats import entropy
from mixdist.terms import Field

EVALUATION_PHASE = 2**31
"""A phase number that no training phase has: it keys the noise of evaluation."""


class Evaluation(NamedTuple):
    """Figures of a mixture on a data set, the same on every rank.

    Args:
        figures: name to number; see :func:`evaluate`.
        rows_E: rows for which each expert is the most responsible.
        loss_E: mean loss over those rows, nats; NaN without rows.
        counts_EC: experts against labels, rows; None without a label.
        expert_N: the most responsible expert of each row, in the data set's order.
        share_E: mean responsibility of each expert.
        on_own: for each expert the means over the rows for which it is the most responsible: loss, elbo,
            log_likelihood with its standard error (mean over rows), squared_error of reconstructions.
        on_all: the same means over all rows.
        findings: a sentence for each dead expert and each pair of duplicates (:mod:`mixdist.evaluation.health`).
        weight_E: alpha, the mixture's weights as a density; None where no likelihood was asked for.
        attribute_EA: the part of the rows for which each expert is the most responsible that has each attribute; NaN
            without rows; None where the data set has no attributes.
        attribute_A: the part of all rows that has each attribute; None as above.
    """

    figures: dict[str, float]
    rows_E: np.ndarray
    loss_E: np.ndarray
    counts_EC: np.ndarray | None
    expert_N: np.ndarray
    share_E: np.ndarray
    on_own: dict[str, np.ndarray]
    on_all: dict[str, np.ndarray]
    findings: list[str]
    weight_E: np.ndarray | None = None
    attribute_EA: np.ndarray | None = None
    attribute_A: np.ndarray | None = None

    def first(self, expert: int, num_rows: int = 8) -> list[int]:
        """Return the places in the data set of the first rows for which an expert is the most responsible."""
        return np.flatnonzero(self.expert_N == expert)[:num_rows].tolist()


def evaluate(
    mixture: Ensemble,
    dataset: Samples,
    batch_size: int,
    seed: int,
    target: str | None = None,
    num_samples: int | None = None,
    shares_from: Samples | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Evaluate on every row of a data set once; every rank calls it.

    Noise is keyed by row in a phase of its own, so the result is the same on any layout. With r_ne the
    responsibilities, e(n) the most responsible expert and D the numbers in a row, the figures are

    - ``loss`` = mean_n sum_e r_ne l_ne; ``elbo`` the same of ELBOs; ``bound`` = mean_n log sum_e r_ne exp(elbo_ne);
      nats. An ELBO is log p(x|z) - KL at one posterior sample or, with ``num_samples``, the mean of S log-weights.
    - ``log_likelihood_shares`` with ``num_samples``: the mixture bound, mean_n log sum_e alpha_e p_e(x_n), with p_e
      importance-sampled. alpha is the mean responsibility over ``shares_from``, or in a hard mixture the expert's part
      of the training set. This is the figure to compare.
    - ``log_likelihood_gate`` with ``num_samples``: mean_n log sum_e r_ne p_e(x_n), no density of x: in a hard mixture
      the likelihood of the winner. See :func:`mixdist.evaluation.evidence.mixture_log_likelihood` for both.
    - ``exact_log_likelihood`` = mean_n log p(x_n) where the data set knows it, which no model exceeds in expectation.
    - ``rmse_row`` = sqrt(mean_n sum_d (x_nd - xhat_nd)^2) and ``rmse_value`` = rmse_row / sqrt(D) of the
      reconstructions by e(n), at the mean of q(z|x): for images, error per image and per pixel, in units of x.
    - of the weighted mean prediction: ``rmse`` = sqrt(mean_n ||y_n - yhat_n||^2) for numbers; for classes
      ``prediction_accuracy`` and ``nll`` = -mean_n log sum_e r_ne p_e(y_n|x_n), nats.
    - ``accuracy``, ``purity``, ``nmi``, ``ari``: see :func:`clustering`.
    - ``routing_entropy`` = mean_n H(r_n), nats, 0 in a hard mixture, and ``experts_in_use`` = exp H(mean_n r_n).

    Log densities are those of values, as models see them; :func:`stored_units` turns them into those of stored numbers.

    Args:
        mixture: the mixture.
        dataset: held-out rows.
        batch_size: of the global batch.
        seed: of the run.
        target: the field that the experts predict; None where they do not.
        num_samples: S, importance samples for each row and expert; None for no likelihoods.
        shares_from: rows that the mixture's weights are taken from, the training rows; None for ``dataset`` itself.
        on_batch: is told the batches done and all batches.
    """
    mesh = mixture.dispatch.mesh
    at = Moment(seed, phase=EVALUATION_PHASE)
    modules = [owned.module for owned in mixture.parts.owned()]
    for module in modules:
        module.eval()
    tally = _Tally(mixture.dispatch, mesh.placement.num_experts, dataset, reconstructed(mixture))
    share_E = None if num_samples is None else mixture.shares(shares_from or dataset, batch_size, at)
    loader = Loader(dataset, batch_size, seed, 0, mesh.rank, mesh.world_size, ordered=True)
    for index in range(loader.num_batches):
        shard = loader.batch(0, index).to(mesh.device)
        route = mixture.send(shard)
        scores = mixture.score(shard, route, at)
        found = None if num_samples is None else evidence(mixture, shard, route, at, num_samples)
        tally.add(shard.rows, scores, found, share_E)
        tally.add_noise_free(scores, *noise_free_losses(mixture, route))
        if target is not None:
            tally.add_prediction(mixture.predict(scores, route), mixture.values(shard.rows, (target,))[target])
        on_batch(index + 1, loader.num_batches)
    for module in modules:
        module.train()
    result = tally.result()
    return result if share_E is None else result._replace(weight_E=share_E.cpu().numpy())


class _Tally:
    """Named sums over this rank's rows; every sum over ranks goes through one seam at the end.

    Args:
        dispatch: of the mixture.
        num_experts: E.
        dataset: what is evaluated on.
        field: the field that the experts reconstruct, or None.
    """

    def __init__(self, dispatch: Dispatch, num_experts: int, dataset: Samples, field: str | None) -> None:
        self.dispatch, self.dataset, self.num_experts = dispatch, dataset, num_experts
        self.num_values = dispatch.spec[field].num_values if field else 0
        self.sums: dict[str, Tensor] = {}
        self.chosen: list[Tensor] = []

    def add(self, rows: dict[str, Tensor], scores: Scores, found: Evidence | None, share_E: Tensor | None) -> None:
        """Count a batch of this rank's rows."""
        log_resp_BE, expert_B = scores.log_resp_BE.double(), responsible(scores.log_resp_BE)
        resp_BE = log_resp_BE.exp()
        self._sum("share", resp_BE.sum(0))
        self._sum("entropy", entropy(log_resp_BE, dim=-1).sum())
        self._sum("loss", (resp_BE * scores.losses_BE).sum())
        self._each("loss", scores.losses_BE, expert_B)
        elbo_BE = scores.elbo_BE if found is None else found.elbo
        if elbo_BE is not None:
            self._sum("elbo", (resp_BE * elbo_BE).sum())
            self._sum("bound", mixture_log_likelihood(elbo_BE, log_resp_BE).sum())
            self._each("elbo", elbo_BE, expert_B)
        if found is not None and share_E is not None:
            self._sum("log_likelihood_shares", mixture_log_likelihood(found.log_px, share_E.log()).sum())
            self._sum("log_likelihood_gate", mixture_log_likelihood(found.log_px, log_resp_BE).sum())
            self._each("log_likelihood", found.log_px, expert_B)
            self._each("log_likelihood_error", found.error, expert_B)
        label = self.dataset.label
        class_B = rows[label].long() if label else torch.zeros_like(expert_B)
        counts_EC = resp_BE.new_zeros(self.num_experts, self.dataset.num_classes or 1)
        counts_EC.index_put_((expert_B, class_B), resp_BE.new_ones(len(expert_B)), accumulate=True)
        self._sum("counts", counts_EC)
        if self.dataset.attribute:
            attribute_BA = rows[self.dataset.attribute].to(resp_BE.dtype)
            counts_EA = attribute_BA.new_zeros(self.num_experts, attribute_BA.shape[1])
            self._sum("attributes", counts_EA.index_add(0, expert_B, attribute_BA))
        self.chosen.append(torch.stack([rows["id"], expert_B], dim=1).cpu())

    def add_noise_free(self, scores: Scores, losses_BE: Tensor, squared_BE: Tensor | None) -> None:
        """Count what the experts make of the batch without noise."""
        self._sum("noise_free_losses", losses_BE.sum(0))
        self._sum("noise_free_squares", losses_BE.square().sum(0))
        by_expert = losses_BE.T.contiguous()
        distance_EE = torch.cdist(by_expert, by_expert, compute_mode="donot_use_mm_for_euclid_dist")
        self._sum("difference", distance_EE.square())
        if squared_BE is not None:
            expert_B = responsible(scores.log_resp_BE)
            self._sum("squared_error", squared_BE.gather(1, expert_B[:, None]).sum())
            self._each("squared_error", squared_BE, expert_B)

    def add_prediction(self, prediction: Tensor, target: Tensor) -> None:
        """Count predictions: numbers against numbers, or probabilities (B, C) against classes."""
        if target.is_floating_point():
            self._sum("prediction_error", (prediction - target).double().square().sum())
            return
        probability_B = prediction.double().gather(1, target[:, None])[:, 0]
        self._sum("nll", -probability_B.log().sum())
        self._sum("prediction_accuracy", (prediction.argmax(1) == target).double().sum())

    def _sum(self, name: str, value: Tensor) -> None:
        value = value.detach().double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _each(self, name: str, field_BE: Tensor, expert_B: Tensor) -> None:
        """Count each expert's field, over its own rows and over all."""
        field_BE = field_BE.double()
        own_B = field_BE.gather(1, expert_B[:, None])[:, 0]
        self._sum(f"own {name}", field_BE.new_zeros(self.num_experts).index_add(0, expert_B, own_B))
        self._sum(f"all {name}", field_BE.sum(0))

    def result(self) -> Evaluation:
        """Sum over ranks; every rank calls it."""
        num_rows, over_batch = len(self.dataset), self.dispatch.over_batch
        sums = {name: over_batch.sum(value.contiguous()).cpu().numpy() for name, value in self.sums.items()}
        rows_E, share_E = sums["counts"].sum(1), sums["share"] / num_rows
        counts_EC = sums["counts"].round().astype(np.int64) if self.dataset.label else None
        with np.errstate(invalid="ignore"):
            on_own = {n.removeprefix("own "): s / rows_E for n, s in sums.items() if n.startswith("own ")}
            attribute_EA = sums["attributes"] / rows_E[:, None] if self.dataset.attribute else None
        on_all = {n.removeprefix("all "): s / num_rows for n, s in sums.items() if n.startswith("all ")}
        variance = float((sums["noise_free_squares"] / num_rows - (sums["noise_free_losses"] / num_rows) ** 2).mean())
        pairs = duplicates(np.sqrt(sums["difference"] / num_rows), math.sqrt(max(variance, 0.0)))
        return Evaluation(
            self._figures(sums, counts_EC),
            rows_E.round().astype(np.int64),
            on_own["loss"],
            counts_EC,
            self._experts(),
            share_E,
            on_own,
            on_all,
            in_words(share_E, dead(share_E), pairs),
            attribute_EA=attribute_EA,
            attribute_A=sums["attributes"].sum(0) / num_rows if self.dataset.attribute else None,
        )

    def _figures(self, sums: dict[str, np.ndarray], counts_EC: np.ndarray | None) -> dict[str, float]:
        mean = {name: float(value) / len(self.dataset) for name, value in sums.items() if value.ndim == 0}
        names = ("loss", "elbo", "bound", "log_likelihood_shares", "log_likelihood_gate", "prediction_accuracy", "nll")
        figures = {name: mean[name] for name in names if name in mean}
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

    def _experts(self) -> np.ndarray:
        """Put every rank's (id, expert) pairs into the data set's order."""
        own = torch.cat(self.chosen).numpy().tobytes()
        pairs = np.frombuffer(b"".join(gather_bytes(own, self.dispatch.mesh.world)), dtype=np.int64).reshape(-1, 2)
        ids = self.dataset.ids.numpy()
        by_id, order = np.argsort(pairs[:, 0]), np.argsort(ids)
        expert_N = np.empty(len(ids), dtype=np.int64)
        expert_N[order] = pairs[by_id, 1]
        return expert_N


def stored_units(field: Field) -> float | None:
    """Return D log s, nats: log p(stored) = log p(values) + D log s, for values = stored * s + offset; or None.

    It holds for densities (gaussian, laplace, kernel, exact); a mass (logistic, Bernoulli) has no units.
    """
    return None if field.num_classes is not None else field.num_values * math.log(abs(field.scale))


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


def expert_table(evaluation: Evaluation, dataset: Samples) -> tuple[list[str], list[list[Any]]]:
    """Return headers and a line for each expert: number, rows, means over them, and what it took.

    What it took is its most frequent class with the class's share of its rows, and the attribute whose rate differs
    most from that of all rows, with both rates.
    """
    label, class_names = dataset.label, dataset.class_names
    shown = {"loss": "mean loss"}
    if "log_likelihood" in evaluation.on_own:
        shown |= {"elbo": "elbo", "log_likelihood": "log-likelihood"}
    lines: list[list[Any]] = []
    for e, rows in enumerate(evaluation.rows_E):
        line = [e, int(rows), *(f"{evaluation.on_own[name][e]:.4g}" if rows else "-" for name in shown)]
        if evaluation.counts_EC is not None:
            most = int(evaluation.counts_EC[e].argmax())
            name = class_names[most] if class_names else str(most)
            line.append(f"{name} ({evaluation.counts_EC[e, most] / rows:.0%})" if rows else "-")
        if evaluation.attribute_EA is not None:
            line.append(stands_out(evaluation, dataset, e) or "-")
        lines.append(line)
    took = [f"took {label}"] if label else []
    took += ["attribute (of all rows)"] if evaluation.attribute_EA is not None else []
    return ["expert", "rows", *shown.values(), *took], lines


def stands_out(evaluation: Evaluation, dataset: Samples, e: int) -> str:
    """Name the attribute whose rate among an expert's rows differs most from that of all rows, with both rates.

    Such as "Blond_Hair 61% (15%)"; empty without rows or attributes, or where no rate differs, as with one expert.
    """
    if evaluation.attribute_EA is None or evaluation.attribute_A is None or not evaluation.rows_E[e]:
        return ""
    rate_A, all_A = evaluation.attribute_EA[e], evaluation.attribute_A
    most = int(np.abs(rate_A - all_A).argmax())
    if rate_A[most] == all_A[most]:
        return ""
    return f"{attribute_names(dataset)[most]} {rate_A[most]:.0%} ({all_A[most]:.0%})"


def attribute_names(dataset: Samples) -> list[str]:
    """Name the attributes, by number where they have no names."""
    assert dataset.attribute is not None
    return list(dataset.attribute_names) or [str(a) for a in range(dataset.spec[dataset.attribute].shape[0])]
