"""The hard mixture: each row belongs to one expert, the one that scores it highest.

Shape letters: B rows on this rank, R rows routed here, E all experts, e experts on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mixdist.competition.discriminators import Discriminator
from mixdist.competition.scores import Score
from mixdist.data import RankBatch, Samples
from mixdist.experts import Expert, ExpertBank
from mixdist.gates import Gate
from mixdist.mixtures.ensemble import Ensemble
from mixdist.mixtures.routing import responsible
from mixdist.noise import Moment
from mixdist.parallel.dispatch import Dispatch
from mixdist.parallel.route import Route
from mixdist.terms import Batch, Gating, Owned, Parts, Spec


class HardMixture(Ensemble):
    """Experts, their discriminators, and each one's normaliser over the training set; seed document 004.

    As a density of x it is sum_j alpha_j p_j(x), with alpha_j the shares of the training set.

    Args:
        bank: this rank's experts.
        dispatch: brings rows to experts and scores back.
        spec: the fields of stored rows.
        dtype: of real numbers.
        score: how experts are compared.
    """

    def __init__(self, bank: ExpertBank, dispatch: Dispatch, spec: Spec, dtype: torch.dtype, score: Score) -> None:
        super().__init__(bank, dispatch, spec, dtype)
        num_experts, device = dispatch.mesh.placement.num_experts, dispatch.mesh.device
        self.score_rule = score
        self.judges: dict[int, Discriminator] = {}
        self.log_z_E = torch.zeros(num_experts, dtype=torch.float64, device=device)
        self.share_E = torch.full_like(self.log_z_E, 1 / num_experts)

    @property
    def parts(self) -> Parts:
        """Nothing is shared; the experts are this rank's own."""
        return Parts({}, dict(self.bank.owned()))

    def receive(self, experts: Mapping[int, Expert], judges: Mapping[int, Discriminator]) -> None:
        """Take this rank's experts and discriminators, as a competition or a checkpoint has them."""
        self.bank = ExpertBank(experts, "loop", self.bank.compute)
        self.judges = dict(judges)

    def owned(self) -> list[Owned]:
        return self.parts.owned() + [Owned(f"discriminator {e}", judge, e) for e, judge in self.judges.items()]

    def take_state(self, state: Mapping[str, Any]) -> None:
        self.log_z_E, self.share_E = (tensor.to(self.log_z_E.device) for tensor in read_shares(state))

    def density_weights(self, share_E: Tensor) -> Tensor:
        return self.share_E

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.bank.template.fields, *self.score_rule.fields)))

    def choose(self, shard: RankBatch, route: Route, at: Moment) -> Tensor:
        rows = self.values(route.rows(), self.fields)
        columns = [
            self.score_rule.column(e, expert, self.judges.get(e), rows, at, self.dtype)
            for e, expert in self.bank.owned().items()
        ]
        return won(self.dispatch.combine(torch.stack(columns, dim=1), route).double() - self.log_z_E)

    def shares(self, dataset: Samples, batch_size: int, at: Moment) -> Tensor:
        """alpha, of the training set, whatever data set is asked about."""
        return self.share_E


def read_shares(state: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return log Z and alpha, (E,) float64 each, from a checkpoint's state.

    Raises:
        ValueError: nothing had been scored.
    """
    if not state["share"]:
        raise ValueError("the newest checkpoint is from before the first scores: no mixture yet: continue training")
    log_z_E, share_E = (torch.tensor(state[name], dtype=torch.float64) for name in ("log_z", "share"))
    return log_z_E, share_E


class HardGate(Gate):
    """A hard mixture's decisions in one process, in a gate's place: log 1 for the winner, log 0 for the others.

    Args:
        experts: all, by number.
        judges: their discriminators, where the score has them.
        score: how experts are compared.
        log_z_E: each expert's normaliser over the training set.
        at: names the draws.
        dtype: of real numbers.
    """

    def __init__(
        self,
        experts: Mapping[int, Expert],
        judges: Mapping[int, Discriminator],
        score: Score,
        log_z_E: Tensor,
        at: Moment,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.experts, self.judges, self.score, self.at, self.dtype = dict(experts), dict(judges), score, at, dtype
        self.log_z_E = log_z_E
        self.fields = tuple(dict.fromkeys((*experts[0].fields, *score.fields)))

    def forward(self, rows: Batch, eps: Tensor | None) -> Gating:
        columns = [
            self.score.column(e, expert, self.judges.get(e), rows, self.at, self.dtype)
            for e, expert in self.experts.items()
        ]
        return Gating(won(torch.stack(columns, dim=1).double() - self.log_z_E).to(self.dtype))


def won(scores_BE: Tensor) -> Tensor:
    """Return log one-hot of argmax_e, ties to the lowest expert: 0 and -inf, (B, E)."""
    log_one_hot_BE = torch.full_like(scores_BE, -math.inf)
    return log_one_hot_BE.scatter_(1, responsible(scores_BE)[:, None], 0.0)
