"""Placement of experts on ranks by load; pure."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def load_balanced(load_E: NDArray[np.floating[Any]], num_members: int) -> list[list[int]]:
    """Place experts on the members of a group by load, longest first, each where least is so far (Graham 1969).

    Equal loads go by number, equal members to the one with fewer experts, then to the lowest; so that a member
    without an expert is only left where there are fewer experts than members.

    Args:
        load_E: what each expert costs, in any unit.
        num_members: P.

    Returns:
        each member's experts, ascending.
    """
    placed: list[list[int]] = [[] for _ in range(num_members)]
    load_P = [0.0] * num_members
    for e in sorted(range(len(load_E)), key=lambda e: (-load_E[e], e)):
        member = min(range(num_members), key=lambda p: (load_P[p], len(placed[p]), p))
        placed[member].append(e)
        load_P[member] += float(load_E[e])
    return [sorted(experts) for experts in placed]
