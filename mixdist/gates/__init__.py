"""Gates: which expert is responsible for a row."""

from mixdist.gates.consistent import Consistent
from mixdist.gates.fixed import LabelOracle, Uniform
from mixdist.gates.gate import Gate
from mixdist.gates.softmax import Softmax

__all__ = ["Consistent", "Gate", "LabelOracle", "Softmax", "Uniform"]
