"""Ensembles without a gate, which minimise what their own options say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mixdist.data import RankBatch, Samples
from mixdist.gates import Gate
from mixdist.mixtures.ensemble import Ensemble
from mixdist.mixtures.mixture import Stage
from mixdist.mixtures.objectives import WeightedLoss
from mixdist.noise import Moment
from mixdist.parallel.route import Route
from mixdist.terms import Gating


class Gateless(Ensemble):
    """Base of families whose experts all take part in every row."""

    def check(self, stages: Mapping[str, Stage]) -> None:
        kind = type(self).__name__
        for name, stage in stages.items():
            if type(stage.objective) is not WeightedLoss or stage.objective.balance is not None:
                told = type(stage.objective).__name__
                raise ValueError(
                    f"{name}.objective ({told}) is not for {kind}, whose options say what it minimises: drop it"
                )
            if stage.trains != "both":
                raise ValueError(f"{name}.trains ({stage.trains}) is not for {kind}, which has no gate: set it to both")

    def diagnose(self, batch: RankBatch) -> dict[str, Any]:
        return {}

    @property
    def drawn_field(self) -> str | None:
        return None

    # What follows is only asked of mixtures of densities.

    def choose(self, batch: RankBatch, route: Route, at: Moment) -> Gating:
        raise AssertionError(f"{type(self).__name__} has no gate")

    @property
    def decides_by(self) -> tuple[str, ...]:
        return ()

    def shares(self, dataset: Samples, batch_size: int, at: Moment) -> Tensor:
        raise AssertionError(f"{type(self).__name__} has no shares")

    def gate_in_process(self) -> Gate:
        raise AssertionError(f"{type(self).__name__} has no gate")
