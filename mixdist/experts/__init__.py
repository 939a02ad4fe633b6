"""Experts: each says, for rows handed to it, how well it models them."""

from mixdist.experts.bank import Execution, ExpertBank
from mixdist.experts.expert import Expert
from mixdist.experts.regressor import Regressor
from mixdist.experts.vae import VAE

__all__ = ["VAE", "Execution", "Expert", "ExpertBank", "Regressor"]
