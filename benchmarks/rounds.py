"""Rounds of a competition on a split that stays, which the benchmarks of hard assignment time.

Shape letters: N samples, E all experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rivals import SEED, adam
from torch import nn
from turns import figures

from mixdist import competition
from mixdist.competition import Assignment, Competition, Discriminators
from mixdist.competition.position import RoundPosition
from mixdist.data import Dataset
from mixdist.data.loader import share
from mixdist.experts import Expert
from mixdist.mixtures import Context
from mixdist.nets import Network
from mixdist.noise import Purpose, weights_seed
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import Wire
from mixdist.terms import Spec
from mixdist.training.phases import Phase

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Work:
    """What a round does.

    Args:
        expert: makes one for a data set's fields.
        judge: network of a discriminator; None for its own.
        epochs: of the experts.
        batch: rows of an expert's batch.
        judge_batches: of each discriminator.
    """

    expert: Callable[[Spec], Expert]
    judge: Network | None
    epochs: int
    batch: int
    judge_batches: int


def seeded(make: Callable[[Spec], M], spec: Spec, purpose: Purpose, number: int, round: int = 0) -> M:
    """Make a network with the weights that belong to its number and round."""
    torch.manual_seed(weights_seed(SEED, purpose, number, round))
    return make(spec)


def shares(num_rows: int, num_experts: int, skew: float) -> NDArray[np.int64]:
    """Samples of each expert, which fall geometrically, the first ``skew`` times the last."""
    weights_E = skew ** -np.linspace(0.0, 1.0, num_experts)
    bounds_E = np.rint(weights_E.cumsum() / weights_E.sum() * num_rows).astype(np.int64)
    return np.diff(bounds_E, prepend=0)


def skewed(dataset: Dataset, num_experts: int, skew: float) -> Assignment:
    """Share the samples out in parts that fall geometrically from expert 0 to the last, in a random order."""
    expert_N = np.repeat(np.arange(num_experts), shares(len(dataset), num_experts, skew))
    order_N = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(SEED)).numpy()
    return Assignment.of(expert_N[order_N], num_experts, dataset.fingerprint)


class Rounds(competition.Rounds):
    """A competition whose table stays: each round's expert epochs begin with the same skewed split.

    Args:
        way: delivery and placement.
        dataset: of all samples.
        table: each sample's expert.
        work: of a round.
        mesh: the ranks.
        wire: the collectives; unset, a plain one.
    """

    def __init__(
        self,
        way: dict[str, Any],
        dataset: Dataset,
        table: Assignment,
        work: Work,
        mesh: Mesh,
        wire: Wire | None = None,
    ) -> None:
        spec, judging = dataset.spec, Discriminators(work.judge, batches=work.judge_batches, optimizer=adam)
        rules: dict[str, Any] = {"rounds": 2**20, "start": "table", "table": "skewed", "score": judging, **way}
        mixture = Competition(work.expert, table.num_experts, **rules)
        mixture.setup(Context(SEED, torch.float32, spec, mesh, wire or Wire(mesh.device)))
        super().__init__(mixture, dataset, [Phase(work.epochs, work.batch, optimizer=adam)], fresh=False)
        self.table = table
        self.split, self.width = table, spec["x"].num_bytes
        self.first_loss: float | None = None

    def run(self, rounds: int) -> None:
        """Train the experts for some rounds, on the same split."""
        for _ in range(rounds):
            at = self.position
            self.position = RoundPosition(at.phase, at.round + 1, 0, at.total)
            while self._trains():
                self._epoch()
            self._agree()

    def settle(self) -> dict[str, Any]:
        """Run two rounds: from the first the pace is known, and experts move before the second."""
        self.run(1)
        record = self._record({})
        self.first_loss = record["loss"]
        self.run(1)
        record = self._record({})
        return {
            "moving_s": record.get("moving_s", 0.0),
            "moved_bytes": record["sync_bytes"],
            "homes": self.entrants.homes,
        }

    def traffic(self) -> dict[str, Any]:
        """Return the bytes that all ranks send in a round's epochs, and the least."""
        self.history.reset()
        self.run(1)
        record, mesh = self._record({}), self.mesh
        least = 0
        if self.rules.delivery == "wire":
            held = [share(len(self.split), rank, mesh.world_size) for rank in range(mesh.world_size)]
            owned = [np.isin(self.split.expert_N, experts) for experts in self.entrants.homes]
            away = [mine.sum() - mine[held[rank].start : held[rank].stop].sum() for rank, mine in enumerate(owned)]
            least = int(sum(away)) * self.width * self.phase.epochs
        sent = record["wire_bytes"] + record["sync_bytes"]
        return {"sent_bytes": sent, "least_bytes": least, "sent_over_least": sent / least if least else None}

    def judge(self, rounds: int) -> dict[str, Any]:
        """Return seconds of a round's discriminators and scores, those of the slowest rank; one more is not timed."""
        found = []
        for _ in range(rounds + 1):
            self.history.reset()
            record = self._round().record
            self.table = self.split
            assert record is not None
            found.append(record)
        names = ("discriminators_s", "scoring_s")
        return {name: figures([record[name] for record in found[1:]]) for name in names}
