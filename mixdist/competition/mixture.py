"""The hard mixture: each row belongs to one expert, the one that scores it highest.

Shape letters: B rows on this rank, R rows routed here, E all experts, e experts on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixdist.competition.contracts import inspect_competitors
from mixdist.competition.discriminators import Discriminator
from mixdist.competition.rules import Rules
from mixdist.competition.scores import Discriminators
from mixdist.data import RankBatch, Samples
from mixdist.experts import Compute, Expert, ExpertBank
from mixdist.gates import Gate
from mixdist.mixtures import Context, Ensemble, MakeExpert, Stage, check_fields
from mixdist.mixtures.declared import check_apart, check_made_alike, is_small
from mixdist.mixtures.mixture import Outputs
from mixdist.mixtures.routing import responsible
from mixdist.noise import ASSIGNMENT_PHASE, Moment, Purpose
from mixdist.parallel.route import Route
from mixdist.terms import Batch, Gating, Owned, Parts


class HardMixture(Ensemble):
    """Experts, their discriminators, and each one's normaliser over the training set; seed document 004.

    As a density of x it is sum_j alpha_j p_j(x), with alpha_j the shares of the training set. A row goes to
    argmax_j alpha_j p_j(x), the most probable expert under that density, where shares count; else to argmax_j p_j(x).

    Args:
        expert: class of mixdist.experts, or your own Expert, for all of them; or a list with one for each expert.
        num_experts: how many experts; with a list, its length.
        compute: how an expert runs its rows.
        rules: of the competition; its score says how experts are compared.

    Attributes:
        first_N: the expert that each training sample begins with, where a new run's experts say so; else None.
    """

    shares_are = "each expert's part of the training rows in the last round's table"

    def __init__(
        self,
        expert: MakeExpert | list[MakeExpert],
        num_experts: int | None,
        compute: Compute,
        rules: Rules,
    ) -> None:
        super().__init__(expert, num_experts, "loop", compute)
        self.rules, self.score_rule = rules, rules.score
        self.first_N: np.ndarray | None = None

    @property
    def discriminating(self) -> Discriminators | None:
        """How discriminators train; None where the score needs none."""
        return self.score_rule if isinstance(self.score_rule, Discriminators) else None

    def setup(self, context: Context) -> None:
        """Make this rank's experts, and one discriminator to see that it can be made."""
        super().setup(context)
        self.discriminators: dict[int, Discriminator] = {}
        self.log_z_E = torch.zeros(self.num_experts, dtype=torch.float64, device=context.mesh.device)
        self.share_E = torch.full_like(self.log_z_E, 1 / self.num_experts)
        for expert in self.bank.owned().values():
            self.score_rule.check(self.spec, self.num_experts, expert)
        if self.discriminating is not None:
            first = self.make_discriminator(self.bank.ids[0])  # fails now where the network does not suit the data
            again = self.make_discriminator(self.bank.ids[0])
            check_apart({"discriminator": first, **{f"expert {e}": one for e, one in self.bank.owned().items()}})
            if is_small(first):
                check_made_alike("mixture.score", first, again)
        check_fields("mixture.score", self.score_rule, self.spec)

    def optimizers(self) -> dict[str, Callable[[Iterable[Tensor]], Any]]:
        """Return the discriminators' optimiser."""
        return {} if self.discriminating is None else {"score": self.discriminating.optimizer}

    def make_discriminator(self, e: int, round: int = 0) -> Discriminator:
        """Return a discriminator with the initial weights of its expert's number and a round."""
        assert self.discriminating is not None
        make = self.discriminating.discriminator
        return self.context.make(lambda: make(self.spec), Purpose.DISCRIMINATOR, e, round, "mixture.score")

    @property
    def parts(self) -> Parts:
        """Nothing is shared; the experts are this rank's own."""
        return self.bank.parts({})

    def receive(self, experts: Mapping[int, Expert], discriminators: Mapping[int, Discriminator]) -> None:
        """Take this rank's experts and discriminators, as training left them."""
        self.bank = ExpertBank(experts, "loop", self.compute)
        self.discriminators = dict(discriminators)

    def owned(self) -> list[Owned]:
        """Return experts and discriminators."""
        return self.parts.owned() + [
            Owned(f"discriminator {e}", discriminator, e) for e, discriminator in self.discriminators.items()
        ]

    def state(self) -> dict[str, Any]:
        """Return log Z and alpha, (E,) each."""
        return {"log_z": self.log_z_E.tolist(), "share": self.share_E.tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take what ``state`` returned, and make discriminators to be loaded.

        Raises:
            ValueError: nothing had been scored.
        """
        if not state["share"]:
            raise ValueError("the newest checkpoint is from before the first scores: no mixture yet: continue training")
        device = self.log_z_E.device
        self.log_z_E, self.share_E = (
            torch.tensor(state[name], dtype=torch.float64, device=device) for name in ("log_z", "share")
        )
        if self.discriminating is not None and not self.discriminators:
            self.discriminators = {e: self.make_discriminator(e) for e in self.bank.ids}

    def density_weights(self, share_E: np.ndarray) -> np.ndarray:
        """Return alpha, whatever the responsibilities."""
        return self.share_E.cpu().numpy()

    def inspect(self, rows: Batch, batch: RankBatch, at: Moment, stage: Stage | None = None) -> Outputs:
        """Check experts, score and discriminators."""
        return inspect_competitors(self, self.bank.owned(), self.discriminators, rows, batch, at, stage)

    @property
    def extra_fields(self) -> tuple[str, ...]:
        """The fields that the score reads."""
        return self.score_rule.fields

    @property
    def decides_by(self) -> tuple[str, ...]:
        """Return the fields that experts read, for their scores, and those of the score."""
        return tuple(dict.fromkeys([name for facts in self.facts for name in (*facts.fields, *self.extra_fields)]))

    def choose(self, batch: RankBatch, route: Route, at: Moment) -> Gating:
        at = Moment(at.seed, ASSIGNMENT_PHASE)  # not of the figures: a winner by luck would look better than it is
        scores_Re = self.scores(self.values(route.rows(), self.fields), at)
        return Gating(self.decide(self.dispatch.combine(scores_Re, route)))

    def decide(self, scores_BE: Tensor) -> Tensor:
        """Return the log weights of all experts, 0 for the winner, given scores before normalisation, (B, E)."""
        scores_BE = scores_BE.double() - self.log_z_E
        return won(scores_BE + self.share_E.log() if self.rules.counts_shares else scores_BE)

    def scores(self, rows: Batch, at: Moment) -> Tensor:
        """Return the scores of rows by this rank's experts, before normalisation, (R, e)."""
        columns = [
            self.score_rule.column(e, expert, self.discriminators.get(e), rows, at, self.dtype)
            for e, expert in self.bank.owned().items()
        ]
        return torch.stack(columns, dim=1)

    def shares(self, dataset: Samples, batch_size: int, at: Moment) -> Tensor:
        """Return alpha, of the training set, whatever data set is asked about."""
        return self.share_E

    def gate_in_process(self) -> Gate:
        """Return the mixture's decisions as a gate."""
        return HardGate(self)


class HardGate(Gate):
    """A hard mixture's decisions in one process, in a gate's place: log 1 for the winner, log 0 for the others.

    Args:
        mixture: has all experts, and their discriminators where the score has them.
    """

    def __init__(self, mixture: HardMixture) -> None:
        super().__init__()
        self.mixture, self.at = mixture, Moment(mixture.context.seed, ASSIGNMENT_PHASE)
        read = (name for expert in mixture.bank.owned().values() for name in expert.fields)
        self.fields = tuple(dict.fromkeys((*read, *mixture.extra_fields)))

    def forward(self, rows: Batch, eps: Tensor | None) -> Gating:
        return Gating(self.mixture.decide(self.mixture.scores(rows, self.at)).to(self.mixture.dtype))


def won(scores_BE: Tensor) -> Tensor:
    """Return log one-hot of argmax_e, ties to the lowest expert: 0 and -inf, (B, E)."""
    log_one_hot_BE = torch.full_like(scores_BE, -math.inf)
    return log_one_hot_BE.scatter_(1, responsible(scores_BE)[:, None], 0.0)
