"""Experts: each says, for rows handed to it, how well it models them."""

from mixdist.experts.bank import Execution, ExpertBank
from mixdist.experts.classifier import Classifier
from mixdist.experts.conv_vae import ConvVAE
from mixdist.experts.expert import Expert
from mixdist.experts.regressor import Regressor
from mixdist.experts.vae import VAE

__all__ = ["VAE", "Classifier", "ConvVAE", "Execution", "Expert", "ExpertBank", "Regressor"]
