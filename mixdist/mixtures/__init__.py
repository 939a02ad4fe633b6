"""Mixtures: one short program for each family over gate, experts and dispatch."""

from mixdist.mixtures.ensemble import Ensemble, Scores
from mixdist.mixtures.mixture import Mixture
from mixdist.mixtures.objectives import (
    Balance,
    Information,
    KLBalance,
    MixtureLikelihood,
    Objective,
    VarianceBalance,
    WeightedLoss,
)
from mixdist.mixtures.routing import RoutingPlan, TopK
from mixdist.mixtures.soft import Soft

__all__ = [
    "Balance",
    "Ensemble",
    "Information",
    "KLBalance",
    "Mixture",
    "MixtureLikelihood",
    "Objective",
    "RoutingPlan",
    "Scores",
    "Soft",
    "TopK",
    "VarianceBalance",
    "WeightedLoss",
]
