"""Experts: modules that compute, for each row, how well they model it."""

from mixdist.experts.bank import Compute, Execution, ExpertBank, Noise
from mixdist.experts.centroid import Centroid
from mixdist.experts.classifier import Classifier
from mixdist.experts.component import Component
from mixdist.experts.expert import Expert
from mixdist.experts.modality import Modality
from mixdist.experts.regressor import Regressor
from mixdist.experts.silent import Silent
from mixdist.experts.timing import time_executions
from mixdist.experts.vae import VAE

__all__ = [
    "VAE",
    "Centroid",
    "Classifier",
    "Component",
    "Compute",
    "Execution",
    "Expert",
    "ExpertBank",
    "Modality",
    "Noise",
    "Regressor",
    "Silent",
    "time_executions",
]
