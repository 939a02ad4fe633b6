"""Which experts are of no use: dead ones, and two that became the same. Pure.

Shape letters: N rows, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DEAD_SHARE = 0.01
"""An expert is dead with less than this part of an even share 1/E of the rows."""

SAME_LOSS = 0.01
"""Two experts are duplicates where their losses differ by less than this part of the losses' own deviation."""


def dead(share_E: np.ndarray) -> list[int]:
    """Name the experts with share_e < 0.01 / E.

    Responsibilities count, not rows won: in a bag, where all are responsible alike, no expert is dead.

    Args:
        share_E: mean responsibility of each expert over the rows.
    """
    return np.flatnonzero(share_E < DEAD_SHARE / len(share_E)).tolist()


def duplicates(mean_FE: np.ndarray) -> list[tuple[int, int]]:
    """Name the pairs i < j with d_ij < 0.01 s: experts that model every row alike.

    d_ij = sqrt(1/N sum_n (l_ni - l_nj)^2), s = sqrt(1/(N E) sum_ne (l_ne - mean_n l_ne)^2). The losses are taken with
    noise 0 (a VAE at the mean of q(z|x)): noise, which belongs to experts too, would part two copies of one expert by
    more than that, and at the mean the order and rotation of latent dimensions do not matter.

    Args:
        mean_FE: means over the rows, (E + 2, E): (l_ni - l_nj)^2, then l_ne, then l_ne^2. No deviation, no pairs.
    """
    *squares_EE, mean_E, square_E = mean_FE
    with np.errstate(invalid="ignore"):  # losses that are not finite make no pair
        spread = np.sqrt(max((square_E - mean_E**2).mean(), 0.0))
    first, second = np.nonzero(np.triu(np.sqrt(squares_EE) < SAME_LOSS * spread, k=1))
    return list(zip(first.tolist(), second.tolist(), strict=True))


def in_words(share_E: np.ndarray, dead_experts: Sequence[int], pairs: Sequence[tuple[int, int]]) -> list[str]:
    """Return a sentence for each finding."""
    least = DEAD_SHARE / len(share_E)
    told = [f"expert {e} is dead: its mean responsibility {share_E[e]:.2g} is below {least:.2g}" for e in dead_experts]
    limit = f"{SAME_LOSS:.0%} of their deviation over rows"
    return told + [f"experts {i} and {j} are duplicates: their losses differ by less than {limit}" for i, j in pairs]
