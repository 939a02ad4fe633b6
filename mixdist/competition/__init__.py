"""Hard assignment: experts compete for the samples of a data set in rounds (seed document 004)."""

from mixdist.competition.competition import Competition
from mixdist.competition.discriminators import Discriminator
from mixdist.competition.mixture import HardMixture
from mixdist.competition.rounds import Rounds
from mixdist.competition.rules import Rules
from mixdist.competition.scores import Discriminators, Elbo, Fixed, LabelOracle, Likelihood, Random, Score
from mixdist.competition.table import Assignment

__all__ = [
    "Assignment",
    "Competition",
    "Discriminator",
    "Discriminators",
    "Elbo",
    "Fixed",
    "HardMixture",
    "LabelOracle",
    "Likelihood",
    "Random",
    "Rounds",
    "Rules",
    "Score",
]
