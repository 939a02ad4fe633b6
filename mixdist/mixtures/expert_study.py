"""How the figures of experts and of their mixture are gathered.

Shape letters: B rows on this rank, R rows routed here, E experts, C classes, A attributes, N all rows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mixdist.data import RankBatch, Samples
from mixdist.mixtures.clusters import clustering
from mixdist.mixtures.evidence import (
    bits_per_dim,
    difference_sums,
    evidence,
    gate_evidence,
    gate_weighs,
    mixture_elbo,
    mixture_log_likelihood,
    noise_free_losses,
    stored_units,
    weighted,
)
from mixdist.mixtures.figures import ExpertEvaluation
from mixdist.mixtures.health import dead, duplicates, in_words
from mixdist.mixtures.posteriors import latents, posterior_sums
from mixdist.mixtures.routing import responsible
from mixdist.mixtures.study import KEYS, Evaluation, Request, Study, linearised
from mixdist.parallel.route import Route
from mixdist.stats import entropy
from mixdist.terms import Spec

if TYPE_CHECKING:
    from mixdist.mixtures.ensemble import Ensemble
    from mixdist.mixtures.scores import Scores

LEVEL = 1e-3
"""A number is on a level if it is as near to it, in steps between levels."""

LIKELIHOODS = ("log_likelihood", "conditional_log_likelihood", "elbo", "expert_elbo")
"""Likelihoods of experts, left out where experts differ so that some give none, or other ones."""

GATE_FIGURES = ("gate_loss", "gate_log_likelihood")
"""Figures of a gate that is a model of its own."""


class ExpertStudy(Study):
    """Gathers the figures of experts and of their mixture.

    r_ne are the responsibilities, e(n) the most responsible expert (ties go to the lowest number), alpha_e the shares,
    D the numbers in a row; nats a row. docs/evaluation.md has a line for each figure.

    - ``loss`` = mean_n sum_e r_ne l_ne, with the experts' losses as in training.
    - Of experts of x: ``log_likelihood`` = mean_n log sum_e alpha_e p_e(x_n), p_e exact or, with ``num_samples``,
      importance-sampled; ``elbo`` = mean_n sum_e r_ne (ELBO_ne + log alpha_e - log r_ne), a lower bound of it whatever
      the gate; ``expert_elbo`` = mean_n sum_e r_ne ELBO_ne, which is none. An ELBO is log p(x|z) - KL at one posterior
      sample. alpha is the mean responsibility over ``shares_from``, in a competition the expert's part of the table.
    - Of experts of y given x: ``conditional_log_likelihood`` = mean_n log sum_e w_ne p_e(y_n|x_n), and of the weighted
      mean prediction ``prediction_rmse`` or ``prediction_accuracy``. w is r, or alpha where what decides reads y.
    - ``bits_per_dim`` of masses of levels and densities of dequantised ones: ``log_likelihood`` in other units
      (:func:`mixdist.mixtures.evidence.bits_per_dim`).
    - ``gate_loss``: the gate's own loss; ``gate_log_likelihood`` = mean_n log p(x_n) of a gate that is a model, exact
      or importance-sampled.
    - ``prediction_error`` = mean_n sum_d (y_nd - yhat_nd)^2; ``unexplained_variance`` = that over what the mean of y
      has in place of yhat.
    - ``exact_log_likelihood`` = mean_n log p(x_n) where the data set knows it, which no model exceeds in expectation.
    - ``rmse_row`` = sqrt(mean_n sum_d (x_nd - xhat_nd)^2) and ``rmse_value`` = rmse_row / sqrt(D) of the
      reconstructions by e(n), at the mean of q(z|x).
    - ``kl`` = mean_n KL(q(z|x_n) || p(z)) of e(n); ``active_units``: those of e(n), mean over rows.
    - ``accuracy``, ``purity``, ``nmi``, ``ari``: :func:`mixdist.mixtures.clusters.clustering`.
    - ``routing_entropy`` = mean_n H(r_n), and ``experts_in_use`` = exp H(mean_n r_n), their effective number.

    Where experts differ, figures that some of them do not have are left out, and likelihoods if they are of different
    fields or kinds. Log densities are those of values, as models see them.

    Args:
        mixture: the mixture.
        dataset: the rows.
        request: what is asked for.
    """

    def __init__(self, mixture: Ensemble, dataset: Samples, request: Request) -> None:
        super().__init__(mixture.measure, dataset, request)
        self.mixture, self.num_experts = mixture, mixture.num_experts
        self.target = mixture.common("predicts")
        self.weighs = request.num_samples is not None and any(facts.weighs for facts in mixture.facts)
        self.has_losses = all(facts.has_loss for facts in mixture.facts)
        self.has_posteriors = any(facts.num_latent for facts in mixture.facts)
        self.share_E: Tensor | None = None

    def start(self) -> None:
        """Take the mixture's shares, where they are the weights of a density or of predictions."""
        request, mixture = self.request, self.mixture
        is_density = self.target is None and (mixture.one_density or mixture.common("draws") is not None)
        is_density = is_density and self.has_losses
        if is_density or mixture.reads_target:
            rows = request.shares_from or self.dataset
            self.share_E = mixture.shares(rows, request.batch_size, request.at)

    def add(self, batch: RankBatch) -> None:
        """Count a batch of this rank's rows."""
        route = self.mixture.send(batch)
        scores = self.mixture.score(batch, route, self.request.at)
        expert_B = responsible(scores.log_resp_BE)
        self._routing(batch, scores, expert_B)
        if scores.gate_loss_B is not None:
            self.keep(gate_loss=scores.gate_loss_B.double())
        if self.request.num_samples is not None and gate_weighs(self.mixture):
            found = gate_evidence(self.mixture, batch, self.request.at, self.request.num_samples)
            self.keep(gate_log_likelihood=found.log_px)
        self._likelihoods(batch, route, scores, expert_B)
        if self.has_losses:
            self._without_noise(route, expert_B)
        if self.has_posteriors:
            sums, kl_B = posterior_sums(self.mixture, route, expert_B)
            self.sum("posteriors", sums)
            self.keep(kl=kl_B)
        if self.target is not None:
            self._predictions(batch, route, scores)

    def _routing(self, batch: RankBatch, scores: Scores, expert_B: Tensor) -> None:
        """Count responsibilities and losses, and experts against the label and the attributes of the data set."""
        log_resp_BE = scores.log_resp_BE.double()
        resp_BE, label, attribute = log_resp_BE.exp(), self.dataset.label, self.dataset.attribute
        self.sum("share", resp_BE.sum(0))
        self.sum("share_products", resp_BE.T @ resp_BE)
        self.keep(expert=expert_B, routing_entropy=entropy(log_resp_BE, dim=-1))
        if self.has_losses:
            self.keep(loss=weighted(log_resp_BE, scores.losses_BE))
            self._each("loss", scores.losses_BE, expert_B)
        class_B = batch.rows[label].long() if label else torch.zeros_like(expert_B)
        counts_EC = resp_BE.new_zeros(self.num_experts, self.dataset.num_classes or 1)
        counts_EC.index_put_((expert_B, class_B), counts_EC.new_ones(len(expert_B)), accumulate=True)
        self.sum("counts", counts_EC)
        if attribute:
            attribute_BA = batch.rows[attribute].to(counts_EC.dtype)
            counts_EA = attribute_BA.new_zeros(self.num_experts, attribute_BA.shape[1])
            self.sum("attributes", counts_EA.index_add(0, expert_B, attribute_BA))

    def _likelihoods(self, batch: RankBatch, route: Route, scores: Scores, expert_B: Tensor) -> None:
        mixture, elbo_BE, log_px_BE = self.mixture, scores.elbo_BE, scores.exact_BE
        if self.weighs and self.request.num_samples is not None:
            found = evidence(mixture, batch, route, self.request.at, self.request.num_samples)
            log_px_BE = found.log_px if log_px_BE is None else found.log_px.where(~found.log_px.isnan(), log_px_BE)
            self._each("importance_error", found.error, expert_B)
        if elbo_BE is not None and self.target is None:
            self._each("elbo", elbo_BE, expert_B)
            self.keep(expert_elbo=weighted(scores.log_resp_BE, elbo_BE))
            if self.share_E is not None:
                self.keep(elbo=mixture_elbo(elbo_BE, scores.log_resp_BE, self.share_E.log()))
        if log_px_BE is not None:
            self._each("log_likelihood", log_px_BE, expert_B)
            if self.target is not None:
                log_weights = self._decided(scores).log_resp_BE
                self.keep(conditional_log_likelihood=mixture_log_likelihood(log_px_BE, log_weights))
            elif self.share_E is not None:
                self.keep(log_likelihood=mixture_log_likelihood(log_px_BE, self.share_E.log()))
        levels, name = mixture.common("levels"), mixture.modelled
        if levels is not None:
            at_B = mixture.values(batch.rows, (name,))[name].double().unsqueeze(-1).flatten(1) * (levels - 1)
            on_levels_B = ((at_B - at_B.round().clamp(0, levels - 1)).abs() < LEVEL).all(1)
            self.sum("off_levels", (~on_levels_B).sum())

    def _decided(self, scores: Scores) -> Scores:
        """Return the scores with the shares as weights, where the weights of a row have seen its target."""
        if not self.mixture.reads_target or self.share_E is None:
            return scores
        return scores._replace(log_resp_BE=self.share_E.log().to(scores.log_resp_BE).expand_as(scores.log_resp_BE))

    def _without_noise(self, route: Route, expert_B: Tensor) -> None:
        """Count what the experts make of the batch without noise."""
        losses_BE, squared_BE = noise_free_losses(self.mixture, route)
        self.sum("noise_free", difference_sums(losses_BE))
        if squared_BE is not None:
            self.keep(squared_error=squared_BE.gather(1, expert_B[:, None])[:, 0])
            self._each("squared_error", squared_BE, expert_B)

    def _predictions(self, batch: RankBatch, route: Route, scores: Scores) -> None:
        """Keep the errors of predictions: numbers against numbers, or probabilities (B, C) against classes."""
        prediction = self.mixture.predict(self._decided(scores), route)
        target = self.mixture.values(batch.rows, (self.target,))[self.target]
        if target.is_floating_point():
            error, target = ((one.double().unsqueeze(-1).flatten(1)) for one in (prediction - target, target))
            self.keep(prediction_error=error.square().sum(1))
            self.sum("target", torch.stack([target.sum(0), target.square().sum(0)]))
        else:
            self.keep(prediction_accuracy=(prediction.argmax(1) == target).double())

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
        with np.errstate(invalid="ignore"):
            on_own = {n.removeprefix("own "): s / rows_E for n, s in sums.items() if n.startswith("own ")}
            attribute_EA = sums["attributes"] / rows_E[:, None] if dataset.attribute else None
        on_all = {n.removeprefix("all "): s / num_rows for n, s in sums.items() if n.startswith("all ")}
        own, everything = ([latents(terms[i]) for terms in sums.get("posteriors", [])] for i in (0, 1))
        found = self._figures(sums, columns, own)
        alike = duplicates(sums["noise_free"] / num_rows) if "noise_free" in sums else []
        told = in_words(share_E, dead(share_E), alike)
        return ExpertEvaluation(
            dataset,
            found.figures,
            told + self._told(found),
            found.errors,
            found.columns,
            self._protocol(found, sums),
            rows_E=rows_E.round().astype(np.int64),
            counts_EC=sums["counts"].round().astype(np.int64) if dataset.label else None,
            expert_N=columns["expert"],
            share_E=share_E,
            on_own=on_own,
            on_all=on_all,
            latent_own=own,
            latent_all=everything,
            weight_E=None if self.share_E is None else self.share_E.cpu().numpy(),
            attribute_EA=attribute_EA,
            attribute_A=sums["attributes"].sum(0) / num_rows if dataset.attribute else None,
        )

    def _figures(
        self, sums: dict[str, np.ndarray], columns: dict[str, np.ndarray], own: list[dict[str, Any]]
    ) -> Evaluation:
        """Return figures, errors and columns: the means of columns, and what is a function of means."""
        dataset, mixture = self.dataset, self.mixture
        found = Evaluation(dataset, {}, columns={name: columns[name] for name in KEYS if name in columns})
        likelihoods = LIKELIHOODS if mixture.one_density else ()
        means = ("loss", *likelihoods, *GATE_FIGURES, "prediction_accuracy", "kl", "routing_entropy")
        for name in means:
            if name in columns and (mixture.alike or np.isfinite(columns[name]).all()):
                found = found.plus(name, columns[name])
        if "log_likelihood" in found.figures and not sums.get("off_levels"):
            kind, levels = mixture.common("log_px_is"), mixture.common("levels")
            if bits := bits_per_dim(mixture.spec[mixture.modelled], kind, levels):
                found = found.plus("bits_per_dim", bits[0] * columns["log_likelihood"] + bits[1])
        if dataset.log_density_N is not None:
            found = found.plus("exact_log_likelihood", dataset.log_density_N.numpy())
        for name, root in self._errors(sums, columns).items():
            found = found.plus(name, root)
        if "label" in columns:
            for name, column in clustering(columns["expert"], columns["label"].astype(np.int64)).items():
                found = found.plus(name, column)
        share_E = sums["share"] / len(dataset)
        log_share_E = np.log(np.maximum(share_E, np.finfo(np.float64).tiny))
        in_use = math.exp(-(share_E * log_share_E).sum())
        figures = found.figures | {"experts_in_use": in_use}
        if own and all(own[e] for e in np.unique(columns["expert"])):
            units_E = np.array([latent.get("active_units", 0) for latent in own])
            figures["active_units"] = float(units_E[columns["expert"]].mean())
        # By the delta method: d exp H / d r_e = -exp H (log r_e + 1), and rows' responsibilities sum to 1.
        covariance_EE = sums["share_products"] / len(dataset) - np.outer(share_E, share_E)
        variance = max(float(log_share_E @ covariance_EE @ log_share_E), 0.0)
        error = in_use * math.sqrt(variance / (len(dataset) - 1)) if len(dataset) > 1 else math.nan
        return Evaluation(dataset, figures, [], found.errors | {"experts_in_use": error}, found.columns)

    def _errors(self, sums: dict[str, np.ndarray], columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return columns of squared errors, and linearised ones of the roots of their means."""
        roots: dict[str, np.ndarray] = {}
        if "squared_error" in columns:
            num_values = self.mixture.spec[self.mixture.common("reconstructs")].num_values
            roots["rmse_row"] = root(columns["squared_error"])
            roots["rmse_value"] = roots["rmse_row"] / math.sqrt(num_values)
        if "prediction_error" in columns:
            num_values = self.mixture.spec[self.target].num_values
            roots["prediction_rmse"] = root(columns["prediction_error"] / num_values)
            roots["prediction_error"] = columns["prediction_error"]
            mean_D, square_D = sums["target"] / len(self.dataset)
            variance = float((square_D - mean_D**2).sum())
            if variance > 0:
                roots["unexplained_variance"] = columns["prediction_error"] / variance
        return roots

    def _told(self, found: Evaluation) -> list[str]:
        """Return a sentence for each figure that is not what it usually is."""
        told = []
        if self.mixture.reads_target:
            told.append(
                f"what decides about a row reads {self.target}, which the experts predict: predictions are weighed by "
                f"the shares instead"
            )
        if found.figures.get("elbo") == -math.inf:
            told.append("elbo is minus infinity: a row was given to an expert that has no share of the training rows")
        return told

    def _protocol(self, found: Evaluation, sums: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return, as JSON, what the likelihoods are and which weights they have; and the fields of other figures."""
        mixture, name, levels = self.mixture, self.mixture.modelled, self.mixture.common("levels")
        gate = getattr(mixture, "gate", None)
        told: dict[str, Any] = {}
        if gate and "gate_log_likelihood" in found.figures:
            told = {"gate_likelihood": gate.model.log_px_is, "gate_models": getattr(gate.model, "field", "x")}
        for ability, figures in (("reconstructs", "rmse_"), ("predicts", "prediction_")):
            if any(figure.startswith(figures) for figure in found.figures):
                told |= unit_of(ability, mixture.common(ability), mixture.spec)
        if not any(likelihood in found.figures for likelihood in LIKELIHOODS):
            return {"likelihood": None} | told
        kind = mixture.common("log_px_is") or "unknown"
        told |= {"drawn_as": drawn} if (drawn := mixture.spec[name].drawn) else {}
        told |= {"likelihood": "neither" if sums.get("off_levels") else kind, "likelihood_of": name}
        told["weights"] = "responsibilities" if self.share_E is None else mixture.shares_are
        if levels is not None:
            told["levels"] = levels
        if kind == "density":
            told["add_for_stored_units"] = stored_units(mixture.spec[name])
        return told


def unit_of(ability: str, name: str, spec: Spec) -> dict[str, Any]:
    """Return, as JSON, the field that errors are of, and what its stored numbers were multiplied by."""
    return {ability: name, f"{ability}_scale": spec[name].scale}


def root(squares_N: np.ndarray) -> np.ndarray:
    """Return the linearised column of the root of a mean of squares."""
    value = math.sqrt(squares_N.mean())
    return linearised(value, squares_N / (2 * value) if value else np.zeros_like(squares_N))
