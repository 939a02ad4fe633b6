"""Posteriors and priors of a latent with a location and a scale, of which q(z|x) and p(z) are of one kind.

All functions act elementwise in nats; the caller sums over dimensions. Shape letters: L latent.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixdist.stats import laplace_kl, laplace_log_prob

PosteriorName = Literal["laplace", "normal"]
LEAST_SCALE = 1e-6
"""Added to every scale, as the authors of seed document 003 do."""


class LocationScale(ABC):
    """z = loc + scale e, with e of a standard distribution.

    Attributes:
        raw: what ``scale`` maps to 1.
    """

    raw: float

    @abstractmethod
    def scale(self, raw: Tensor) -> Tensor:
        """Return positive scales (..., L) from a network's outputs."""

    @abstractmethod
    def standard(self, eps: Tensor) -> Tensor:
        """Return e from standard normal numbers, by its quantiles."""

    @abstractmethod
    def log_prob(self, z: Tensor, loc: Tensor | float, scale: Tensor) -> Tensor:
        """Return the log density at z."""

    @abstractmethod
    def slope(self, z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """Return the derivative of the log density by z."""

    @abstractmethod
    def kl(self, loc: Tensor, scale: Tensor, prior: Tensor | float) -> Tensor:
        """Return the KL divergence to the one of location 0 and scale ``prior``."""


class Normal(LocationScale):
    """N(loc, scale^2), scale = softplus(raw) + 1e-6.

    Examples:
        >>> import torch
        >>> from mixdist.experts.location_scale import Normal
        >>> Normal().kl(torch.tensor(1.0), torch.tensor(1.0), 1.0)
        tensor(0.5000)
    """

    raw = math.log(math.expm1(1.0 - LEAST_SCALE))

    def scale(self, raw: Tensor) -> Tensor:
        return F.softplus(raw) + LEAST_SCALE

    def standard(self, eps: Tensor) -> Tensor:
        return eps

    def log_prob(self, z: Tensor, loc: Tensor | float, scale: Tensor) -> Tensor:
        return -0.5 * ((z - loc) / scale).square() - scale.log() - 0.5 * math.log(2.0 * math.pi)

    def slope(self, z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        return (loc - z) / scale.square()

    def kl(self, loc: Tensor, scale: Tensor, prior: Tensor | float) -> Tensor:
        ratio = scale / prior
        return 0.5 * ((loc / prior).square() + ratio.square() - 1.0) - ratio.log()


class Laplace(LocationScale):
    """Laplace(loc, scale), scale = L softmax(raw) + 1e-6: the scales of a latent have the mean 1.

    Examples:
        >>> import torch
        >>> from mixdist.experts.location_scale import Laplace
        >>> Laplace().standard(torch.tensor([-0.6745, 0.6745]))  # the quartiles, -log 2 and log 2
        tensor([-0.6932,  0.6932])
    """

    raw = 0.0

    def scale(self, raw: Tensor) -> Tensor:
        return raw.shape[-1] * torch.softmax(raw, dim=-1) + LEAST_SCALE

    def standard(self, eps: Tensor) -> Tensor:
        # |e| = -log(2 Phi(-|eps|)), exact in both tails.
        return -eps.sign() * (torch.special.log_ndtr(-eps.abs()) + math.log(2.0))

    def log_prob(self, z: Tensor, loc: Tensor | float, scale: Tensor) -> Tensor:
        return laplace_log_prob(z, loc if isinstance(loc, Tensor) else z.new_full((), loc), scale.log())

    def slope(self, z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        return (loc - z).sign() / scale

    def kl(self, loc: Tensor, scale: Tensor, prior: Tensor | float) -> Tensor:
        return laplace_kl(loc / prior, scale / prior)


KINDS: dict[PosteriorName, LocationScale] = {"laplace": Laplace(), "normal": Normal()}


class Prior(nn.Module):
    """p(z) with location 0 and scales that are learned, from 1, or 1.

    Args:
        kind: laplace or normal.
        latent: L; may be 0.
        learned: whether the scales learn.

    Examples:
        >>> from mixdist.experts.location_scale import Prior
        >>> Prior("laplace", 3, learned=True).scale()
        tensor([1.0000, 1.0000, 1.0000], grad_fn=<AddBackward0>)
    """

    def __init__(self, kind: PosteriorName, latent: int, learned: bool) -> None:
        super().__init__()
        self.kind = KINDS[kind]
        raw = torch.full((latent,), self.kind.raw)
        self.raw: Tensor
        if learned and latent:
            self.raw = nn.Parameter(raw)
        else:
            self.register_buffer("raw", raw, persistent=False)

    def scale(self) -> Tensor:
        """Return the scales, (L,)."""
        return self.kind.scale(self.raw)

    def log_prob(self, z: Tensor) -> Tensor:
        """Return log p(z), nats: (..., L) to (...)."""
        return self.kind.log_prob(z, 0.0, self.scale()).sum(-1)

    def kl(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Return KL(q || p) by dimension, nats, of q with this location and scale."""
        return self.kind.kl(loc, scale, self.scale())

    def draw(self, eps: Tensor) -> Tensor:
        """Return z ~ p(z) from standard normal numbers (..., L)."""
        return self.scale() * self.kind.standard(eps)
