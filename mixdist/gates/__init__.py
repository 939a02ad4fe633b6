"""Gates: modules that compute the responsibility of each expert for each row."""

from mixdist.gates.consistent import Consistent
from mixdist.gates.dmvae import DMVAE
from mixdist.gates.fixed import LabelOracle, Uniform
from mixdist.gates.gate import Gate
from mixdist.gates.gmm import GMM
from mixdist.gates.latent_gmm import LatentGMM
from mixdist.gates.softmax import Softmax
from mixdist.gates.vade import VaDE

__all__ = ["DMVAE", "GMM", "Consistent", "Gate", "LabelOracle", "LatentGMM", "Softmax", "Uniform", "VaDE"]
