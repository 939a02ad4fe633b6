"""Mixtures: one short program for each family over gate, experts and dispatch."""

from mixdist.mixtures.ensemble import Ensemble, Scores
from mixdist.mixtures.hard import HardMixture, Referee, read_shares
from mixdist.mixtures.mixture import Mixture, Owned, Parts
from mixdist.mixtures.soft import SoftMixture

__all__ = ["Ensemble", "HardMixture", "Mixture", "Owned", "Parts", "Referee", "Scores", "SoftMixture", "read_shares"]
