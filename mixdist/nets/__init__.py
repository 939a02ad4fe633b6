"""Networks: descriptions that experts, gates and discriminators make their modules from, for one expert or a stack."""

from mixdist.nets.centred import Centred
from mixdist.nets.conv import Conv, NormName
from mixdist.nets.deconv import Deconv
from mixdist.nets.linear import LinearPaths
from mixdist.nets.mlp import MLP, ActivationName, flat
from mixdist.nets.network import Network
from mixdist.nets.text import Text

__all__ = ["MLP", "ActivationName", "Centred", "Conv", "Deconv", "LinearPaths", "Network", "NormName", "Text", "flat"]
