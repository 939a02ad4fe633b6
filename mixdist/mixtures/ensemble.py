"""Experts behind a dispatch, whatever decides who is responsible for a row.

Shape letters: B rows on this rank, R rows routed here, E all experts, e experts on this rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixdist.data import RankBatch, Samples
from mixdist.experts import ExpertBank, Noise
from mixdist.noise import Moment, Purpose
from mixdist.parallel.dispatch import Dispatch
from mixdist.parallel.route import Route
from mixdist.terms import Batch, ExpertTerms, Owned, Parts, Spec


class Scores(NamedTuple):
    """What a mixture makes of B rows.

    Args:
        log_resp_BE: log responsibilities.
        losses_BE: each expert's loss, as in training, nats.
        elbo_BE: each expert's bound on log p(x) (VAEs) or its log p(y|x) (regressors), nats; None without one.
    """

    log_resp_BE: Tensor
    losses_BE: Tensor
    elbo_BE: Tensor | None


class Ensemble(ABC):
    """What soft and hard mixtures share: rows reach every expert, and each row has weights over experts.

    Args:
        bank: this rank's experts.
        dispatch: brings rows to experts and fields back.
        spec: the fields of stored rows.
        dtype: of real numbers.
    """

    def __init__(self, bank: ExpertBank, dispatch: Dispatch, spec: Spec, dtype: torch.dtype) -> None:
        self.bank, self.dispatch, self.spec, self.dtype = bank, dispatch, spec, dtype

    @property
    @abstractmethod
    def parts(self) -> Parts:
        """Its modules on this rank."""

    def owned(self) -> list[Owned]:
        """This rank's modules as checkpoints have them."""
        return self.parts.owned()

    def take_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take what a checkpoint's state says of the mixture beside its modules; mostly nothing."""

    @abstractmethod
    def choose(self, shard: RankBatch, route: Route, at: Moment) -> Tensor:
        """Return the log weights of all experts for each of this rank's rows outside training, (B, E)."""

    @abstractmethod
    def shares(self, dataset: Samples, batch_size: int, at: Moment) -> Tensor:
        """Return each expert's part of a data set, (E,) float64: the weights of the mixture as a density of x."""

    def density_weights(self, share_E: Tensor) -> Tensor:
        """Return the weights of the mixture as a density of x, given the mean responsibilities, (E,)."""
        return share_E

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that travel with a row."""
        return self.bank.template.fields

    def send(self, shard: RankBatch) -> Route:
        """Start sending this rank's rows to all experts."""
        return self.dispatch.send(shard.rows, self.fields, shard.counts)

    def values(self, rows: Batch, fields: tuple[str, ...]) -> Batch:
        """Turn the named stored fields into numbers; the id stays."""
        named = {name: self.spec[name].values(rows[name], self.dtype) for name in fields}
        return {"id": rows["id"], **named}

    def noise(self, at: Moment) -> Noise | None:
        """Return the draws of the experts' posteriors at a moment, or None where they need none."""
        shape = self.bank.template.noise_shape
        if shape is None:
            return None
        draw = at.draw(Purpose.POSTERIOR)
        return lambda ids, experts: draw.normal(ids, experts, shape, self.dtype)

    def expert_terms(self, route: Route, at: Moment) -> ExpertTerms:
        """Run this rank's experts on the rows that arrive: fields (R, e, ...)."""
        rows = self.values(route.rows(), self.bank.template.fields)
        return self.bank(rows, self.noise(at), route.mask_Re)

    @torch.no_grad()
    def score(self, shard: RankBatch, route: Route, at: Moment) -> Scores:
        """Say who is responsible for rows and what all experts make of them, without training or capacity.

        Every rank calls it, with the route that ``send`` gave for the shard.
        """
        log_weights_BE = self.choose(shard, route, at)
        terms = self.expert_terms(route, at)
        losses_BE = self.dispatch.combine(terms.loss_R, route)
        elbo_BE = None
        if terms.log_px_R is not None:
            bound = terms.log_px_R if terms.kl_R is None else terms.log_px_R - terms.kl_R
            elbo_BE = self.dispatch.combine(bound, route)
        return Scores(log_weights_BE, losses_BE, elbo_BE)

    @torch.no_grad()
    def predict(self, scores: Scores, route: Route) -> Tensor:
        """Return the mean of the experts' predictions under the weights of ``score``, (B, *shape of the target)."""
        rows = self.values(route.rows(), self.bank.template.fields)
        predictions = torch.stack([expert.predict(rows) for expert in self.bank.owned().values()], dim=1)
        return self.dispatch.combine_sum(predictions, scores.log_resp_BE.exp(), route)
