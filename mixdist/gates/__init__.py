"""Gates: modules that compute the responsibility of each expert for each row."""

from mixdist.gates.consistent import Consistent
from mixdist.gates.fixed import LabelOracle, Uniform
from mixdist.gates.gate import Gate
from mixdist.gates.softmax import Softmax

__all__ = ["Consistent", "Gate", "LabelOracle", "Softmax", "Uniform"]
