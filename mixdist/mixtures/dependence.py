"""How dependent the latents of components are, pair by pair, and how much of that is the number of rows.

Shape letters: N rows, E components, L latent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixdist.mixtures.penalties import median_kernel
from mixdist.noise import Purpose, permutation

NUM_ROWS, NUM_SHUFFLES = 500, 20
"""Rows that dependence is measured on, and how often their order is shuffled for its floor."""


class Dependence(NamedTuple):
    """dHSIC of components' latents.

    Args:
        whole: of all components together.
        pair_EE: of each pair; on the diagonal of a component with itself, the most that there is.
        floor_EE: the mean of the same over shuffles of the second one's rows, which leave no dependence.
    """

    whole: float
    pair_EE: Tensor
    floor_EE: Tensor

    @property
    def pairs(self) -> tuple[float, float]:
        """Return the means over pairs of different components, and that of their floor."""
        others = ~torch.eye(len(self.pair_EE), dtype=torch.bool)
        return float(self.pair_EE[others].mean()), float(self.floor_EE[others].mean())


def dependence(z_NEL: Tensor, seed: int) -> Dependence:
    """Return dHSIC of draws z, by its V-statistic with Gaussian kernels of the median bandwidth.

    The formula is that of :class:`mixdist.mixtures.DHSIC` (seed document 002, equation 15), for all components and for
    two (figure 12). It is a V-statistic, so even independent latents have some, about 1 / N: the floor says how much.

    Args:
        z_NEL: draws of q(z_i|x), rows in an order that no layout changes.
        seed: of the shuffles.
    """
    z_ENL = z_NEL.double().cpu().transpose(0, 1)
    num = z_ENL.shape[1]
    square_EN = z_ENL.square().sum(-1)
    squared_ENN = square_EN[:, :, None] + square_EN[:, None] - 2.0 * z_ENL @ z_ENL.mT
    kernel_ENN = median_kernel(squared_ENN.clamp(min=0.0))
    row_EN = kernel_ENN.mean(-1)
    all_E = row_EN.mean(-1)
    whole = kernel_ENN.prod(0).mean() + all_E.prod() - 2.0 * row_EN.prod(0).mean()

    def pairs(order_N: Tensor) -> Tensor:
        other_ENN, other_EN = kernel_ENN[:, order_N][:, :, order_N], row_EN[:, order_N]
        joint_EE = kernel_ENN.flatten(1) @ other_ENN.flatten(1).mT / num**2
        return joint_EE + torch.outer(all_E, all_E) - 2.0 * row_EN @ other_EN.mT / num

    shuffles = [pairs(permutation(seed, 0, n, num, purpose=Purpose.CHANCE)) for n in range(NUM_SHUFFLES)]
    return Dependence(float(whole), pairs(torch.arange(num)), torch.stack(shuffles).mean(0))
