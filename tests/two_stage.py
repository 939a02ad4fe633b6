"""A family of two stages, outside the package: what MVAE and MMVAE need of mixdist, in the smallest form.

Every expert shows a small number to all others (exchange), weighs its wide feature by it, and the features are summed
over experts (combine_sum) into a shared decoder; two statistics of the global batch, one by gathering and one by
summing, join the loss.

Shape letters: B rows on this rank, R rows routed here, E all experts, e experts here, H features, D numbers of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mixdist.data import RankBatch, Samples
from mixdist.mixtures import Context, Evaluation, Mixture, Objective, Stage
from mixdist.mixtures.pictures import Picture, Rows
from mixdist.noise import EVALUATION_PHASE, Draw, Moment, Purpose
from mixdist.terms import Batch, Outcome, Parts


def layers(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with tanh between them."""
    steps: list[nn.Module] = []
    for before, after in pairwise(widths):
        steps += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*steps[:-1])


class Component(nn.Module):
    """An expert of the first stage: a score and a feature from x and noise."""

    def __init__(self, num_values: int, width: int) -> None:
        super().__init__()
        self.score, self.feature = layers([num_values, 5, 1]), layers([num_values + 2, width])

    def features(self, x: Tensor, eps: Tensor) -> Tensor:
        return torch.tanh(self.feature(torch.cat([x, eps], dim=1)))


class TwoStage(Mixture):
    """The program: send, score, exchange, features, combine_sum, shared decoder, statistics of the batch.

    Args:
        num_experts: components.
        width: of a feature.
    """

    def __init__(self, num_experts: int = 4, width: int = 6) -> None:
        self.num_experts, self.width = num_experts, width

    def setup(self, context: Context) -> None:
        super().setup(context)
        num_values = context.spec["x"].num_values
        self.components = {
            e: context.make(lambda: Component(num_values, self.width), Purpose.WEIGHTS, e) for e in context.mesh.experts
        }
        self.decoder = context.make(lambda: layers([self.width, num_values]), Purpose.GATE)

    @property
    def parts(self) -> Parts:
        return Parts({"decoder": self.decoder}, dict(self.components))

    def describe(self, stages: Sequence[Stage]) -> dict[str, Any]:
        return {**super().describe(stages), "width": self.width}

    def x_of(self, rows: Batch) -> Tensor:
        return self.context.values(rows, ("x",))["x"].flatten(1)

    def through(self, batch: RankBatch, at: Moment) -> tuple[Tensor, Tensor]:
        """Return the weights (B, E) and the sum of features (B, H) of this rank's rows."""
        dispatch = self.dispatch
        route = dispatch.send(batch.rows, ("x",), batch.counts)
        rows = route.rows()
        x_RD = self.x_of(rows)
        eps = at.draw(Purpose.POSTERIOR).normal(rows["id"], list(self.components), (2,), self.context.dtype)
        score_Re = torch.stack([c.score(x_RD)[:, 0] for c in self.components.values()], dim=1)
        mean_R = dispatch.exchange(score_Re, route).exp().mean(1)
        feature_ReH = torch.stack(
            [c.features(x_RD, eps[i]) / mean_R[:, None] for i, c in enumerate(self.components.values())], dim=1
        )
        weights_BE = torch.softmax(dispatch.combine(score_Re, route), dim=1)
        return weights_BE, dispatch.combine_sum(feature_ReH, weights_BE, route)

    def backward(
        self, batch: RankBatch, objective: Objective, at: Moment, num_parts: int = 1, upcoming: RankBatch | None = None
    ) -> Outcome:
        weights_BE, h_BH = self.through(batch, at)
        rows_loss = (self.decoder(h_BH) - self.x_of(batch.rows)).square().sum() / batch.total
        loss = rows_loss + self._statistics(h_BH, batch)
        loss.backward()
        return Outcome(loss.detach(), {"rows": rows_loss.detach()}, {"weight": weights_BE.detach().sum(0)})

    def _statistics(self, h_BH: Tensor, batch: RankBatch) -> Tensor:
        over_batch = self.dispatch.over_batch
        # Each rank compares its rows with all rows: the sum over ranks is the sum over pairs, no share is needed.
        all_NH = over_batch.gather(h_BH, batch.counts)
        kernel = torch.exp(-(h_BH[:, None] - all_NH[None]).square().sum(-1)).sum() / batch.total**2
        # Every rank computes this one in full, and shares it.
        spread = (over_batch.sum(h_BH.sum(0)) / batch.total).square().sum()
        return kernel + over_batch.share(spread)

    @torch.no_grad()
    def measure(self, batch: RankBatch, at: Moment) -> dict[str, Tensor]:
        weights_BE, h_BH = self.through(batch, at)
        error = (self.decoder(h_BH) - self.x_of(batch.rows)).square().sum()
        return {"squared_error": error, "largest_weight": weights_BE.max(1).values}

    @torch.no_grad()
    def pictures(self, dataset: Samples, evaluation: Evaluation, seed: int) -> list[Picture]:
        shape, first = dataset.spec["x"].shape, dataset.take(torch.arange(8))
        ranks = self.context.mesh.world_size  # every rank reconstructs the same rows
        _, h_BH = self.through(RankBatch(first, (8,) * ranks), Moment(seed, EVALUATION_PHASE))
        images = [part.reshape(-1, *shape).numpy() for part in (self.x_of(first), self.decoder(h_BH))]
        return [Rows("two_stages.png", images, ["originals", "reconstructions"])]

    def model(self, class_names: Sequence[str]) -> TwoStageModel:
        return TwoStageModel(self)


class TwoStageModel:
    """What ``mixdist.load`` returns of it."""

    def __init__(self, mixture: TwoStage) -> None:
        self.mixture = mixture

    @torch.no_grad()
    def reconstruct(self, rows: Batch) -> Tensor:
        """Reconstruct stored rows with their ids."""
        batch = RankBatch(rows, (len(rows["id"]),))
        _, h_BH = self.mixture.through(batch, Moment(self.mixture.context.seed, EVALUATION_PHASE))
        return self.mixture.decoder(h_BH).reshape(rows["x"].shape)

    @torch.no_grad()
    def rows_of_samples(self, num_samples: int, seed: int = 0) -> dict[str, Tensor]:
        """Decode features that are drawn at random."""
        context = self.mixture.context
        draw, ids = Draw(seed, Purpose.PRIOR), torch.arange(num_samples)
        h_NH = draw.normal(ids, [0], (self.mixture.width,), context.dtype)[0]
        return {"the mixture": self.mixture.decoder(h_NH).reshape(-1, *context.spec["x"].shape)}
