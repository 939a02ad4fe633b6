"""p(x|z) and p(y|x): the distributions that an expert's outputs parametrise.

Shape letters: R rows, E experts (leading, only in a stack), D features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mixdist.arguments import check_arguments
from mixdist.nets.continuous_bernoulli import (
    continuous_bernoulli_log_prob,
    continuous_bernoulli_mean,
    continuous_bernoulli_quantile,
)
from mixdist.stats import (
    bernoulli_log_prob,
    laplace_log_prob,
    laplace_quantile,
    logistic_log_prob,
    logistic_quantile,
    normal_log_prob,
    normal_quantile,
    normal_sum_log_prob,
)
from mixdist.terms import Field

LikelihoodName = Literal["gaussian", "laplace", "bernoulli", "continuous_bernoulli", "logistic"]
MeanName = Literal["sigmoid", "identity"]
ScaleName = Literal["learned", "channel", "pixel", "decoder"]
NO_SCALE = "bernoulli", "continuous_bernoulli"
"""They read the output as logits: one number says all."""
_FIRST_SCALE = {"gaussian": 1.0, "laplace": 1.0, "logistic": 0.1}
LEAST_SCALE = 1e-3
"""The floor of scales that are many, in units of x, where none is given: some values of a row may hardly vary."""


class Likelihood(nn.Module):
    """The distribution of x given a network's output: its log-probability in nats a row, its mean, and samples.

    The log-probability is summed over all features of a row (pixels and colours of an image).

    Gaussian, Laplace and logistic have the location ``mean(output)`` and a scale: a fixed number; or learned from 1
    (from 0.1 for logistic), one for all features (``learned``), one for each channel of an image (``channel``), or one
    for each number of a row, so for each pixel and colour (``pixel``); or given by the decoder for each number of a row
    (``decoder``), whose output is then all locations and after them all log scales, which start about the same values.
    Bernoulli and continuous Bernoulli read the output as logits and accept x in [0, 1].

    With ``components`` K a number is logistic about one of K locations, each with a scale, by probabilities from the
    decoder: P(x) = sum_k pi_k P_k(x) (Salimans et al. 2017, eq. 2, but colours of a pixel are independent given z). The
    decoder's output is then K maps of locations, K of log scales and K of log pi, up to a constant.

    With a floor a scale is floor + exp(r) of a real r. The sum is smooth: r has a gradient however near the scale is
    to its floor, where a clamp would have none, so a scale can always grow again.

    Gaussian and Laplace are densities: their log has no upper limit, and changes by D log s where x is divided by s.
    Continuous Bernoulli is a density on [0, 1]: Bernoulli's p^x (1 - p)^(1 - x), divided by its integral.
    Logistic is a probability mass over the levels k / (num_levels - 1), and Bernoulli over 0 and 1: never above 0
    nats. Bernoulli of values between 0 and 1, such as grey pixels, is the negative cross-entropy, neither density nor
    mass (Loaiza-Ganem and Cunningham 2019). A density of pixels that are levels can grow without limit, so it
    compares with a mass only where it was trained on levels with uniform noise of a step added: its log plus D log of
    the step is then a lower bound of a mass's (Theis et al. 2016, section 3.1).

    Args:
        name: gaussian, laplace, bernoulli, continuous_bernoulli, or logistic:
            :func:`mixdist.stats.logistic_log_prob`.
        scale: the standard deviation (gaussian) or the scale (laplace, logistic), in units of x; or learned, channel,
            pixel or decoder.
        mean: sigmoid for data in [0, 1], identity for any real data; without effect where logits are read.
        num_levels: of the logistic; by default 256.
        floor: the least scale, in units of x; unset, 0.001 for channel, pixel and decoder, none for learned.
        shape: of a row, for channel and pixel.
        first: the first scale of scales that are not fixed, in units of x, exactly so for learned, channel and pixel;
            unset, 1, for logistic 0.1, and the floor added.
        components: K of a mixture of logistics; needs scale decoder.

    Attributes:
        is_a: density or mass.
        levels: of a mass, how many; None for a density.
        num_maps: how many numbers of a network's output are of one number of x: 2 with scale decoder, else 1;
            3 K with components.

    Raises:
        ValueError: a scale or a floor that is not positive, a floor or a first scale of a scale that is fixed, a first
            scale not above the floor; channel for rows that are no images.

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
        self,
        name: LikelihoodName,
        scale: float | ScaleName,
        mean: MeanName,
        num_levels: int | None = None,
        floor: float | None = None,
        shape: Sequence[int] = (),
        first: float | None = None,
        components: int = 1,
    ) -> None:
        check_arguments(Likelihood.__init__, locals(), "Likelihood's ")
        super().__init__()
        fixed = not isinstance(scale, str)
        if not isinstance(scale, str) and not 0 < scale < math.inf:
            raise ValueError(f"scale ({scale}) must be a positive number, or one of {', '.join(get_args(ScaleName))}")
        if floor is not None and (fixed or not 0 < floor < math.inf):
            remedy = "leave it out" if fixed else "give a positive number, such as 0.001"
            raise ValueError(f"floor ({floor}) does not suit scale ({scale}): {remedy}")
        if components < 1 or (components > 1 and (name, scale) != ("logistic", "decoder")):
            raise ValueError(
                f"components ({components}) must be 1, or more for likelihood logistic with scale decoder, not for "
                f"{name} with {scale}: leave it out, or set those"
            )
        self.name, self.mean_name, self.num_levels, self.components = name, mean, num_levels or 256, components
        self.is_a: Literal["density", "mass"] = "mass" if name in ("bernoulli", "logistic") else "density"
        self.levels = {"bernoulli": 2, "logistic": self.num_levels}.get(name)
        self.scale, self.num_maps, self.width = scale, 1, math.prod(shape)
        self.floor = LEAST_SCALE if floor is None and scale in ("channel", "pixel", "decoder") else floor
        if name in NO_SCALE:
            if first is not None:
                raise ValueError(f"first_scale ({first}) means nothing for {name}, which has no scale: leave it out")
            return
        self.first = self._first(first)
        self.log_scale: float | Tensor = math.log(self.first if isinstance(scale, str) else scale)
        if scale == "decoder":
            self.num_maps = 2 if components == 1 else 3 * components
        elif not fixed:
            # (1, n) broadcasts over (R, D), and (E, 1, n) over (E, R, D) when experts are stacked.
            count = _num_channels(shape) if scale == "channel" else self.width if scale == "pixel" else 1
            self.log_scale = nn.Parameter(torch.full((1, count), self.log_scale))

    def _first(self, first: float | None) -> float:
        """Return exp(r) of a scale that begins at ``first``.

        Raises:
            ValueError: no scale can begin there.
        """
        if first is None:
            return _FIRST_SCALE[self.name]
        floor = self.floor or 0.0
        if not isinstance(self.scale, str) or not floor < first < math.inf:
            fixed = "leave it out" if not isinstance(self.scale, str) else f"give a number above the floor, {floor:g}"
            raise ValueError(f"first_scale ({first}) does not suit scale ({self.scale}): {fixed}")
        return first - floor

    @property
    def limits(self) -> tuple[float, float] | None:
        """The range of the x that it can model, or None for all real numbers."""
        bounded = self.name in (*NO_SCALE, "logistic") or self.mean_name == "sigmoid"
        return (0.0, 1.0) if bounded else None

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """Return log p(x|output), nats, (R,) or (E, R), for x (R, D) and output (R, D) or (E, R, D).

        With scale decoder the output has 2 D numbers a row.
        """
        if self.name == "bernoulli":
            return bernoulli_log_prob(x, output).sum(-1)
        if self.name == "continuous_bernoulli":
            return continuous_bernoulli_log_prob(x, output).sum(-1)
        if self.components > 1:
            log_pi, location, log_scales = self._mixture(output)
            log_p = logistic_log_prob(x.unsqueeze(-2), location, log_scales, self.num_levels)
            return (log_pi + log_p).logsumexp(-2).sum(-1)
        mean, log_scale = self.mean(output), self.log_scales(output)
        if self.name == "logistic":
            return logistic_log_prob(x, mean, log_scale, self.num_levels).sum(-1)
        if self.name == "laplace":
            return laplace_log_prob(x, mean, log_scale).sum(-1)
        several = isinstance(log_scale, Tensor) and log_scale.shape[-1] > 1
        return normal_log_prob(x, mean, log_scale).sum(-1) if several else normal_sum_log_prob(x, mean, log_scale)

    def log_scales(self, output: Tensor) -> Tensor | float:
        """Return the log of the scales, which broadcasts with ``mean(output)``; not of Bernoulli, nor of components."""
        raw = self.log_scale
        if self.scale == "decoder":
            raw = output.chunk(2, dim=-1)[1] + raw
        return self._floored(raw)

    def _floored(self, raw: Tensor | float) -> Tensor | float:
        if not isinstance(raw, Tensor):
            return raw
        if self.floor is not None:
            raw = torch.logaddexp(raw, raw.new_tensor(math.log(self.floor)))
        return raw.repeat_interleave(self.width // raw.shape[-1], dim=-1) if self.scale == "channel" else raw

    def _mixture(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log pi, location and log scale of each component, (..., K, D)."""
        maps = output.unflatten(-1, (self.num_maps, -1))
        location, raw, logits = maps.split(self.components, dim=-2)
        log_scale = self._floored(raw + self.log_scale)
        assert isinstance(log_scale, Tensor)
        return logits.log_softmax(-2), torch.sigmoid(location) if self.mean_name == "sigmoid" else location, log_scale

    def set_scales(self, scale_D: Tensor) -> Tensor:
        """Begin the scales at given ones, (D,); where one is of several numbers, at the root of their mean square.

        Returns:
            what the second half of the decoder's output must be for them, (D,), where the decoder gives scales.

        Raises:
            ValueError: one is not above the floor.
        """
        learned = self.log_scale if isinstance(self.log_scale, nn.Parameter) else None
        count, floor = self.width if learned is None else learned.shape[-1], self.floor or 0.0
        scale_n = scale_D.square().reshape(count, -1).mean(1).sqrt()
        if not float(scale_n.min()) > floor:
            raise ValueError(f"floor ({floor:g}) must be below the first scale ({float(scale_n.min()):.6g}): lower it")
        raw_n = (scale_n - floor).log()
        if learned is not None:
            learned.data.copy_(raw_n[None])
        return raw_n - math.log(self.first)

    def mean(self, output: Tensor) -> Tensor:
        """Return E[x | output], (..., D); the location for logistic, which clipping moves."""
        if self.components > 1:
            log_pi, location, _ = self._mixture(output)
            return (log_pi.exp() * location).sum(-2)
        if self.name == "continuous_bernoulli":
            return continuous_bernoulli_mean(output)
        if self.num_maps == 2:
            output = output.chunk(2, dim=-1)[0]
        if self.name == "bernoulli" or self.mean_name == "sigmoid":
            return torch.sigmoid(output)
        return output

    def draw(self, output: Tensor, uniform: Tensor) -> Tensor:
        """Return x ~ p(x | output) by the inverse of its distribution function, (R, D): 0 or 1 for Bernoulli.

        Args:
            output: (R, D), or (R, 2 D) with scale decoder.
            uniform: independent numbers, uniform on (0, 1), (R, D).
        """
        if self.components > 1:
            return self._draw_mixture(output, uniform)
        if self.name == "continuous_bernoulli":
            return continuous_bernoulli_quantile(uniform, output)
        mean = self.mean(output)
        if self.name == "bernoulli":
            return (uniform < mean).to(mean.dtype)
        log_scale = self.log_scales(output)
        if self.name == "logistic":
            return logistic_quantile(uniform, mean, log_scale, self.num_levels)
        quantile = normal_quantile if self.name == "gaussian" else laplace_quantile
        return quantile(uniform, mean, log_scale)

    def _draw_mixture(self, output: Tensor, uniform: Tensor) -> Tensor:
        """Choose a component by u; where u lies in that component's part of (0, 1) is uniform again, and chooses x."""
        log_pi, location, log_scale = self._mixture(output)
        pi = log_pi.exp()
        upto = pi.cumsum(-2)
        chosen = (uniform.unsqueeze(-2) >= upto[..., :-1, :]).sum(-2, keepdim=True)
        own, below, mean, scale = (t.gather(-2, chosen).squeeze(-2) for t in (pi, upto - pi, location, log_scale))
        tiny = torch.finfo(uniform.dtype).eps
        within = ((uniform - below) / own).clamp(tiny, 1.0 - tiny)
        return logistic_quantile(within, mean, scale, self.num_levels)


def _num_channels(shape: Sequence[int]) -> int:
    if len(shape) != 3:
        raise ValueError(
            f"scale (channel) needs images (channels, height, width), but rows have shape {tuple(shape)}: take pixel"
        )
    return shape[0]


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
