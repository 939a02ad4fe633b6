"""A family of two stages, for parity: what MVAE and MMVAE need of dispatch, in the smallest form.

Every expert shows a small number to all others (exchange), weighs its wide feature by it, and the features are summed
over experts (combine_sum) into a shared decoder; two statistics of the global batch, one by gathering and one by
summing, join the loss.

Shape letters: B rows on this rank, R rows routed here, E all experts, e experts here, H features, D numbers of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixdist.data import RankBatch
from mixdist.mixtures.objectives import Objective
from mixdist.nets.mlp import FeedForward
from mixdist.noise import Moment, Purpose
from mixdist.parallel.dispatch import Dispatch
from mixdist.terms import Outcome, Parts, Spec

WIDTH = 6


class Component(nn.Module):
    """An expert of the first stage: a score and a feature from x and noise."""

    def __init__(self, num_values: int) -> None:
        super().__init__()
        self.score = FeedForward([num_values, 5, 1], "tanh")
        self.feature = FeedForward([num_values + 2, WIDTH], "tanh")

    def features(self, x: Tensor, eps: Tensor) -> Tensor:
        return torch.tanh(self.feature(torch.cat([x, eps], dim=1)))


class TwoStage:
    """The program: send, score, exchange, features, combine_sum, shared decoder, statistics of the batch."""

    def __init__(self, components: dict[int, Component], decoder: nn.Module, dispatch: Dispatch, spec: Spec) -> None:
        self.components, self.decoder, self.dispatch, self.spec = components, decoder, dispatch, spec

    @property
    def parts(self) -> Parts:
        return Parts({"decoder": self.decoder}, dict(self.components))

    def backward(
        self, shard: RankBatch, objective: Objective, at: Moment, num_parts: int = 1, upcoming: RankBatch | None = None
    ) -> Outcome:
        dispatch, spec = self.dispatch, self.spec["x"]
        route = dispatch.send(shard.rows, ("x",), shard.counts)
        rows = route.rows()
        x_RD = spec.values(rows["x"], torch.float64).flatten(1)
        eps = at.draw(Purpose.POSTERIOR).normal(rows["id"], list(self.components), (2,), torch.float64)
        score_Re = torch.stack([c.score(x_RD)[:, 0] for c in self.components.values()], dim=1)
        mean_R = dispatch.exchange(score_Re, route).exp().mean(1)
        feature_ReH = torch.stack(
            [c.features(x_RD, eps[i]) / mean_R[:, None] for i, c in enumerate(self.components.values())], dim=1
        )
        weights_BE = torch.softmax(dispatch.combine(score_Re, route), dim=1)
        h_BH = dispatch.combine_sum(feature_ReH, weights_BE, route)
        own_BD = spec.values(shard.rows["x"], torch.float64).flatten(1)
        rows_loss = (self.decoder(h_BH) - own_BD).square().sum() / shard.total
        loss = rows_loss + self._statistics(h_BH, shard)
        loss.backward()
        resp = weights_BE.detach()
        zeros = torch.zeros_like(resp.sum(0))
        return Outcome(
            loss.detach(), {"rows": rows_loss.detach()}, resp.sum(0), zeros, zeros, zeros, *[zeros.sum()] * 3
        )

    def settle(self) -> None:
        """Nothing is ever under way."""

    def _statistics(self, h_BH: Tensor, shard: RankBatch) -> Tensor:
        over_batch = self.dispatch.over_batch
        # Each rank compares its rows with all rows: the sum over ranks is the sum over pairs, no share is needed.
        all_NH = over_batch.gather(h_BH, shard.counts)
        kernel = torch.exp(-(h_BH[:, None] - all_NH[None]).square().sum(-1)).sum() / shard.total**2
        # Every rank computes this one in full, and shares it.
        spread = (over_batch.sum(h_BH.sum(0)) / shard.total).square().sum()
        return kernel + over_batch.share(spread)
