"""p(x|z) and p(y|x): what the last layer of an expert means.

Shape letters: R rows, E experts (leading, only in a stack), D features.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from mixdist.stats import bernoulli_log_prob, laplace_log_prob, normal_log_prob

LikelihoodName = Literal["gaussian", "laplace", "bernoulli"]
MeanName = Literal["sigmoid", "identity"]


class Likelihood(nn.Module):
    """log p(x | output) in nats, summed over features.

    Gaussian and Laplace have the mean ``mean(output)`` and one scale for all features: fixed, or learned as a
    parameter of the expert (``scale="learned"``, from 1). Bernoulli reads the output as logits and accepts x in [0, 1].

    Args:
        name: gaussian, laplace or bernoulli.
        scale: the standard deviation (gaussian) or the Laplace scale b, in units of x; or "learned".
        mean: sigmoid for data in [0, 1], identity for any real data; without effect on bernoulli.

    Raises:
        ValueError: a scale that is not positive.
    """

    def __init__(self, name: LikelihoodName, scale: float | Literal["learned"], mean: MeanName) -> None:
        super().__init__()
        if scale != "learned" and not 0 < scale < math.inf:
            raise ValueError(f"scale ({scale}) must be a positive number or 'learned'")
        self.name, self.mean_name = name, mean
        if name == "bernoulli":
            return
        # (1, 1) broadcasts over (R, D), and (E, 1, 1) over (E, R, D) when experts are stacked.
        self.log_scale = nn.Parameter(torch.zeros(1, 1)) if scale == "learned" else math.log(scale)

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """Give log p(x|output), nats: x (R, D), output (R, D) or (E, R, D); result (R,) or (E, R)."""
        if self.name == "bernoulli":
            return bernoulli_log_prob(x, output).sum(-1)
        density = normal_log_prob if self.name == "gaussian" else laplace_log_prob
        return density(x, self.mean(output), self.log_scale).sum(-1)

    def mean(self, output: Tensor) -> Tensor:
        """Give E[x | output], of the output's shape."""
        if self.name == "bernoulli" or self.mean_name == "sigmoid":
            return torch.sigmoid(output)
        return output
