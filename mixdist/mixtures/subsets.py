"""Posteriors of subsets of modalities: which there are, and the product of their members'.

Shape letters: R rows, K subsets, M modalities, L latent.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

LEAST_SCALE, LARGEST_SCALE = 6.8e-3, 148.0
"""Scales in a product lie between these, exp(-5) and exp(5)."""


@lru_cache(maxsize=32)
def all_subsets(num: int, device: torch.device = torch.device("cpu")) -> Tensor:  # noqa: B008 (immutable)
    """Return every subset of the modalities but the empty one, those of one first, in order: (2^M - 1, M) bool.

    They are made, and sent to a device, once.

    Examples:
        >>> from mixdist.mixtures.subsets import all_subsets
        >>> all_subsets(2).tolist()
        [[True, False], [False, True], [True, True]]
    """
    codes = sorted(range(1, 1 << num), key=lambda code: (code.bit_count(), [not code >> m & 1 for m in range(num)]))
    return torch.tensor([[bool(code >> m & 1) for m in range(num)] for code in codes], device=device)


def random_subset(uniform_RM: Tensor, present_RM: Tensor) -> Tensor:
    """Return a random subset of the modalities present in each row, not empty, (R, M) bool."""
    chosen = (uniform_RM < 0.5) & present_RM
    first = torch.where(present_RM, uniform_RM, 2.0).argmin(1, keepdim=True)
    alone = torch.zeros_like(chosen).scatter(1, first, True) & present_RM
    return torch.where(chosen.any(1, keepdim=True), chosen, alone)


def product(loc_RML: Tensor, scale_RML: Tensor, members_RKM: Tensor, prior_L: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return location and scale of the product of the members' normal densities, each (R, K, L).

    With precisions t_m = 1 / (s_m^2 + 1e-8), the product has the precision t = sum t_m and the location
    sum t_m loc_m / t (Wu and Goodman 2018, section 2.2); the empty one is N(0, 1).

    Args:
        loc_RML: locations.
        scale_RML: scales.
        members_RKM: True where a modality belongs to the subset.
        prior_L: scales of a normal prior that is one more factor; None for none.
    """
    precision_RML = 1.0 / (scale_RML.clamp(LEAST_SCALE, LARGEST_SCALE).square() + 1e-8)
    chosen = members_RKM.to(loc_RML.dtype)
    total = torch.einsum("rkm,rml->rkl", chosen, precision_RML)
    if prior_L is not None:
        total = total + 1.0 / prior_L.square()
    total = torch.where(members_RKM.any(-1, keepdim=True), total, 1.0)
    return torch.einsum("rkm,rml->rkl", chosen, precision_RML * loc_RML) / total, total.rsqrt()
