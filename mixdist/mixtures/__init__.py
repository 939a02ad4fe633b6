"""Mixtures: one short program for each family over gate, experts and dispatch."""

from mixdist.mixtures.mixture import Mixture, Moment, Owned, Parts
from mixdist.mixtures.soft import Scores, SoftMixture

__all__ = ["Mixture", "Moment", "Owned", "Parts", "Scores", "SoftMixture"]
