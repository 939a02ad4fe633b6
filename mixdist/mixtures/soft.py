"""The soft mixture: gate, send, experts, combine, objective.

Shape letters: B rows on this rank, R rows routed here, E all experts, e experts on this rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixdist.data import Shard
from mixdist.dispatch import Dispatch, Route
from mixdist.experts import ExpertBank
from mixdist.gates import Gate
from mixdist.mixtures.mixture import Moment, Parts
from mixdist.noise import Purpose
from mixdist.objectives import Objective
from mixdist.stats import entropy
from mixdist.terms import Batch, ExpertTerms, Gating, Outcome, Spec


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


class SoftMixture:
    """Gate and experts, each row seen by every expert; seed documents 000 and 001.

    The gate runs once on all of a rank's rows and the experts in micro-batches, each of which is sent, run, combined
    and differentiated down to its responsibilities; the balance term, a statistic of the whole batch, is then
    differentiated once, and both gradients together go through the gate. So accumulation is exact.

    Args:
        gate: replicated on every rank.
        bank: this rank's experts.
        dispatch: brings rows to experts and losses back.
        spec: the fields of stored rows.
        dtype: of real numbers.
    """

    def __init__(self, gate: Gate, bank: ExpertBank, dispatch: Dispatch, spec: Spec, dtype: torch.dtype) -> None:
        self.gate, self.bank, self.dispatch, self.spec, self.dtype = gate, bank, dispatch, spec, dtype

    @property
    def parts(self) -> Parts:
        """The gate is shared; the experts are this rank's own."""
        return Parts({"gate": self.gate}, dict(self.bank.owned()))

    def backward(self, shard: Shard, objective: Objective, at: Moment, num_parts: int = 1) -> Outcome:
        """Add this rank's part of the gradient of the global loss to every parameter's ``grad``."""
        shards = shard.split(num_parts)
        first = self._send(shards[0])  # under way while the gate runs
        gating = self.gating(shard.rows, at)
        learns = gating.log_resp_BE.requires_grad
        sizes = [part.size for part in shards]
        leaves = [part.detach().requires_grad_(learns) for part in gating.log_resp_BE.split(sizes)]
        losses = []
        for i, (part, leaf) in enumerate(zip(shards, leaves, strict=True)):
            route = self._send(part) if i else first
            losses.append(self._backward_part(route, leaf, objective, at, shard.total))
        log_resp_BE, losses_BE = torch.cat(leaves), torch.cat(losses)
        with torch.no_grad():
            named = {"rows": objective.rows(log_resp_BE, losses_BE).sum() / shard.total}
        if objective.balance is not None:
            # In float64: near balance the term is a small difference of large numbers.
            resp_sum_E = self.dispatch.over_batch.sum(log_resp_BE.double().exp().sum(0))
            balance = self.dispatch.over_batch.share(objective.balance(resp_sum_E, shard.total))
            named["balance"] = balance.detach()
            if learns:
                balance.backward()
        if gating.loss_B is not None:
            named["gate"] = gating.loss_B.detach().sum() / shard.total
        self._backward_gate(gating, leaves, shard.total)
        return _outcome(named, log_resp_BE.detach(), losses_BE)

    def _send(self, shard: Shard) -> Route:
        return self.dispatch.send(shard.rows, self.bank.template.fields, shard.counts)

    def _backward_part(self, route: Route, log_resp_BE: Tensor, objective: Objective, at: Moment, total: int) -> Tensor:
        losses_BE = self.dispatch.combine(self.expert_terms(route, at).loss_R, route)
        loss = objective.rows(log_resp_BE, losses_BE).sum() / total
        if loss.requires_grad:
            loss.backward()
        return losses_BE.detach()

    def _backward_gate(self, gating: Gating, leaves: list[Tensor], total: int) -> None:
        outputs: list[Tensor] = []
        grads: list[Tensor | None] = []
        if gating.log_resp_BE.requires_grad:
            outputs.append(gating.log_resp_BE)
            grads.append(torch.cat([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]))
        if gating.loss_B is not None and gating.loss_B.requires_grad:
            outputs.append(gating.loss_B.sum() / total)
            grads.append(None)
        if outputs:
            torch.autograd.backward(outputs, grads)

    def gating(self, rows: Batch, at: Moment) -> Gating:
        """Ask the gate about this rank's stored rows."""
        eps = None
        if self.gate.noise_shape is not None:
            eps = at.draw(Purpose.GATE).normal(rows["id"], [0], self.gate.noise_shape, self.dtype)[0]
        return self.gate(self.values(rows, self.gate.fields), eps)

    def expert_terms(self, route: Route, at: Moment) -> ExpertTerms:
        """Run this rank's experts on the rows that arrive: fields (R, e, ...)."""
        rows, eps = route.rows(), None
        template = self.bank.template
        if template.noise_shape is not None:
            eps = at.draw(Purpose.POSTERIOR).normal(rows["id"], self.bank.ids, template.noise_shape, self.dtype)
        return self.bank(self.values(rows, template.fields), eps)

    @torch.no_grad()
    def score(self, shard: Shard, at: Moment) -> Scores:
        """Say what gate and experts make of rows, without training; every rank calls it."""
        route = self._send(shard)
        gating = self.gating(shard.rows, at)
        terms = self.expert_terms(route, at)
        losses_BE = self.dispatch.combine(terms.loss_R, route)
        elbo_BE = None
        if terms.log_px_R is not None:
            bound = terms.log_px_R if terms.kl_R is None else terms.log_px_R - terms.kl_R
            elbo_BE = self.dispatch.combine(bound, route)
        return Scores(gating.log_resp_BE, losses_BE, elbo_BE)

    @torch.no_grad()
    def predict(self, shard: Shard, at: Moment) -> Tensor:
        """Give the responsibility-weighted mean of the experts' predictions, (B, *shape of the target)."""
        route = self._send(shard)
        weights_BE = self.gating(shard.rows, at).log_resp_BE.exp()
        rows = self.values(route.rows(), self.bank.template.fields)
        predictions = torch.stack([expert.predict(rows) for expert in self.bank.owned().values()], dim=1)
        return self.dispatch.combine_sum(predictions, weights_BE, route)

    def values(self, rows: Batch, fields: tuple[str, ...]) -> Batch:
        """Turn the named stored fields into numbers; the id stays."""
        named = {name: self.spec[name].values(rows[name], self.dtype) for name in fields}
        return {"id": rows["id"], **named}


def _outcome(named: dict[str, Tensor], log_resp_BE: Tensor, losses_BE: Tensor) -> Outcome:
    parts = {name: value.double() for name, value in named.items()}
    resp_BE = log_resp_BE.double().exp()
    return Outcome(
        loss=torch.stack(list(parts.values())).sum(),
        parts=parts,
        load_E=resp_BE.sum(0),
        loss_E=losses_BE.double().sum(0),
        seen_E=resp_BE.new_full(resp_BE.shape[1:], len(losses_BE)),
        bad_E=(~losses_BE.isfinite()).double().sum(0),
        bad_gate=log_resp_BE.isnan().any(1).double().sum(),
        entropy=entropy(log_resp_BE, dim=-1).double().sum(),
    )
