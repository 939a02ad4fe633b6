"""Mixtures: one training step for each family, over gate, experts and dispatch."""

from mixdist.mixtures.clustered import ClusterStart
from mixdist.mixtures.context import Context
from mixdist.mixtures.declared import check_fields
from mixdist.mixtures.ensemble import Ensemble, MakeExpert
from mixdist.mixtures.expert_start import ExpertStart, PCAStart
from mixdist.mixtures.facts import Facts
from mixdist.mixtures.figures import ExpertEvaluation
from mixdist.mixtures.masks import Masks
from mixdist.mixtures.mixture import Mixture, Stage
from mixdist.mixtures.mmvae import MMVAE
from mixdist.mixtures.model import Model
from mixdist.mixtures.multimodal import MakeModality
from mixdist.mixtures.mvae import MVAE
from mixdist.mixtures.objectives import (
    Balance,
    GateLoss,
    Information,
    KLBalance,
    Objective,
    SoftMinLoss,
    VarianceBalance,
    WeightedLoss,
)
from mixdist.mixtures.penalties import DHSIC, MMD, W2, MutualPosterior, Penalty
from mixdist.mixtures.poe import MoPoE, PoEMVAE
from mixdist.mixtures.routing import RoutingPlan, TopK
from mixdist.mixtures.scores import Scores
from mixdist.mixtures.soft import Soft
from mixdist.mixtures.study import Evaluation, Request, Study

__all__ = [
    "DHSIC",
    "MMD",
    "MMVAE",
    "MVAE",
    "W2",
    "Balance",
    "ClusterStart",
    "Context",
    "Ensemble",
    "Evaluation",
    "ExpertEvaluation",
    "ExpertStart",
    "Facts",
    "GateLoss",
    "Information",
    "KLBalance",
    "MakeExpert",
    "MakeModality",
    "Masks",
    "Mixture",
    "MoPoE",
    "Model",
    "MutualPosterior",
    "Objective",
    "PCAStart",
    "Penalty",
    "PoEMVAE",
    "Request",
    "RoutingPlan",
    "Scores",
    "Soft",
    "SoftMinLoss",
    "Stage",
    "Study",
    "TopK",
    "VarianceBalance",
    "WeightedLoss",
    "check_fields",
]
