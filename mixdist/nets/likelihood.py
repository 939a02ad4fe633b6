"""p(x|z) and p(y|x): the distributions that an expert's outputs parametrise.

Shape letters: R rows, E experts (leading, only in a stack), D features.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from mixdist.stats import (
    bernoulli_log_prob,
    laplace_log_prob,
    laplace_quantile,
    logistic_log_prob,
    logistic_quantile,
    normal_quantile,
    normal_sum_log_prob,
)
from mixdist.terms import Field

LikelihoodName = Literal["gaussian", "laplace", "bernoulli", "logistic"]
MeanName = Literal["sigmoid", "identity"]
_FIRST_SCALE = {"gaussian": 1.0, "laplace": 1.0, "logistic": 0.1}


class Likelihood(nn.Module):
    """The distribution of x given a network's output: its log-probability in nats a row, its mean, and samples.

    The log-probability is summed over all features of a row (pixels and colours of an image).

    Gaussian, Laplace and logistic have the location ``mean(output)`` and one scale for all features: fixed, or learned
    as a parameter of the expert (``scale="learned"``, from 1; from 0.1 for logistic). Bernoulli reads the output as
    logits and accepts x in [0, 1].

    Gaussian and Laplace are densities: their log has no upper limit, and changes by D log s where x is divided by s.
    Logistic is a probability mass over the levels k / (num_levels - 1), and Bernoulli over 0 and 1: never above 0
    nats. Bernoulli of values between 0 and 1, such as grey pixels, is the negative cross-entropy, neither density nor
    mass (Loaiza-Ganem and Cunningham 2019). A density of pixels that are levels can grow without limit, so it
    compares with a mass only where it was trained on levels with uniform noise of a step added: its log plus D log of
    the step is then a lower bound of a mass's (Theis et al. 2016, section 3.1).

    Args:
        name: gaussian, laplace, bernoulli, or logistic: :func:`mixdist.stats.logistic_log_prob`.
        scale: the standard deviation (gaussian) or the scale (laplace, logistic), in units of x; or "learned".
        mean: sigmoid for data in [0, 1], identity for any real data; without effect on bernoulli.
        num_levels: of the logistic; by default 256.

    Attributes:
        is_a: density or mass.
        levels: of a mass, how many; None for a density.

    Raises:
        ValueError: a scale that is not positive.

    Examples:
        >>> import torch
        >>> from mixdist.nets.likelihood import Likelihood
        >>> likelihood = Likelihood("gaussian", scale=0.5, mean="sigmoid")
        >>> likelihood.mean(torch.zeros(2, 3))
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000]])
        >>> likelihood.log_prob(torch.full((2, 3), 0.5), torch.zeros(2, 3))
        tensor([-0.6774, -0.6774])
    """

    def __init__(
        self, name: LikelihoodName, scale: float | Literal["learned"], mean: MeanName, num_levels: int | None = None
    ) -> None:
        super().__init__()
        if scale != "learned" and not 0 < scale < math.inf:
            raise ValueError(f"scale ({scale}) must be a positive number or 'learned'")
        self.name, self.mean_name, self.num_levels = name, mean, num_levels or 256
        self.is_a: Literal["density", "mass"] = "mass" if name in ("bernoulli", "logistic") else "density"
        self.levels = {"bernoulli": 2, "logistic": self.num_levels}.get(name)
        if name == "bernoulli":
            return
        # (1, 1) broadcasts over (R, D), and (E, 1, 1) over (E, R, D) when experts are stacked.
        learned = scale == "learned"
        log_scale = math.log(_FIRST_SCALE[name] if scale == "learned" else scale)
        self.log_scale = nn.Parameter(torch.full((1, 1), log_scale)) if learned else log_scale

    @property
    def limits(self) -> tuple[float, float] | None:
        """The range of the x that it can model, or None for all real numbers."""
        bounded = self.name in ("bernoulli", "logistic") or self.mean_name == "sigmoid"
        return (0.0, 1.0) if bounded else None

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """Return log p(x|output), nats: x (R, D), output (R, D) or (E, R, D); result (R,) or (E, R)."""
        if self.name == "bernoulli":
            return bernoulli_log_prob(x, output).sum(-1)
        if self.name == "logistic":
            return logistic_log_prob(x, self.mean(output), self.log_scale, self.num_levels).sum(-1)
        mean = self.mean(output)
        if self.name == "gaussian":
            return normal_sum_log_prob(x, mean, self.log_scale)
        return laplace_log_prob(x, mean, self.log_scale).sum(-1)

    def mean(self, output: Tensor) -> Tensor:
        """Return E[x | output], of the output's shape; the location for logistic, which clipping moves."""
        if self.name == "bernoulli" or self.mean_name == "sigmoid":
            return torch.sigmoid(output)
        return output

    def draw(self, output: Tensor, uniform: Tensor) -> Tensor:
        """Return x ~ p(x | output) by the inverse of its distribution function, (R, D): 0 or 1 for Bernoulli.

        Args:
            output: (R, D).
            uniform: independent numbers, uniform on (0, 1), (R, D).
        """
        mean = self.mean(output)
        if self.name == "bernoulli":
            return (uniform < mean).to(mean.dtype)
        if self.name == "logistic":
            return logistic_quantile(uniform, mean, self.log_scale, self.num_levels)
        quantile = normal_quantile if self.name == "gaussian" else laplace_quantile
        return quantile(uniform, mean, self.log_scale)


def check_levels(field: Field, name: str, asked_by: str) -> int:
    """Return the number of levels of a field's values, k / (levels - 1) on [0, 1]: 256 for scale 1/255.

    Raises:
        ValueError: it is not stored so; a mass over levels would then mean nothing.
    """
    steps = round(1 / field.scale) if 0 < field.scale <= 1 else 0
    if field.dtype != torch.uint8 or field.offset or not 1 <= steps <= 255 or abs(steps * field.scale - 1) > 1e-6:
        raise ValueError(
            f"{asked_by}'s likelihood 'logistic' needs bytes that mean levels on [0, 1], as uint8 with scale 1/255, "
            f"but the field {name!r} is {field.dtype} with scale {field.scale:.6g} and offset {field.offset:.6g}: "
            "choose gaussian"
        )
    return steps + 1
