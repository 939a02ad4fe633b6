"""Experts as clusters, compared with the label of rows.

Shape letters: N rows, E experts, C classes.
"""

from __future__ import annotations

import numpy as np

from mixdist.mixtures.study import linearised


def clustering(expert_N: np.ndarray, class_N: np.ndarray) -> dict[str, np.ndarray]:
    """Return, for each figure that compares experts with labels, a column (N,) whose mean is the figure.

    - ``accuracy``: share of rows on the best one-to-one matching of experts to classes (Hungarian method), which is
      chosen on these rows; the column says which rows are on it.
    - ``purity``: share of rows of their expert's most frequent class among these rows; the column says which.
    - ``nmi``: mutual information over the arithmetic mean of the entropies; ``ari``: adjusted Rand index (Hubert and
      Arabie 1985). Both are smooth functions of the table of experts against classes: the columns are linearised.

    Standard errors are those of the columns. For accuracy and purity that is the delta method as well: what is chosen
    on the rows is a maximum, whose derivative is that of the chosen term (where one choice is best).
    """
    # Heavy, and needed at the end of a run alone.
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    counts_EC = np.zeros((expert_N.max() + 1, class_N.max() + 1), dtype=np.int64)
    np.add.at(counts_EC, (expert_N, class_N), 1)
    matched_EC = np.zeros(counts_EC.shape)
    matched_EC[linear_sum_assignment(counts_EC, maximize=True)] = 1.0
    table_EC = counts_EC / len(expert_N)
    nmi, ari = (f(class_N, expert_N) for f in (normalized_mutual_info_score, adjusted_rand_score))
    return {
        "accuracy": matched_EC[expert_N, class_N],
        "purity": (counts_EC.argmax(1)[expert_N] == class_N).astype(np.float64),
        "nmi": linearised(float(nmi), _nmi_influence(table_EC)[expert_N, class_N]),
        "ari": linearised(float(ari), _ari_influence(table_EC)[expert_N, class_N]),
    }


def _nmi_influence(table_EC: np.ndarray) -> np.ndarray:
    """Return the influence of a row in each cell on 2 I / (H_experts + H_classes), for a table of shares."""
    expert_E1, class_1C = table_EC.sum(1, keepdims=True), table_EC.sum(0, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):  # cells without rows are not read
        expert_score, class_score = -np.log(expert_E1), -np.log(class_1C)
        information_EC = np.where(table_EC > 0, np.log(table_EC) + expert_score + class_score, 0.0)
    entropies_EC = np.where(table_EC > 0, expert_score + class_score, 0.0)
    information, entropies = (table_EC * information_EC).sum(), (table_EC * entropies_EC).sum()
    if entropies == 0:
        return np.zeros_like(table_EC)
    influence_EC: np.ndarray = 2 * (information_EC - information / entropies * entropies_EC) / entropies
    return influence_EC


def _ari_influence(table_EC: np.ndarray) -> np.ndarray:
    """Return the influence of a row in each cell on the adjusted Rand index of many rows, for a table of shares.

    That is (s - ab) / ((a + b) / 2 - ab), with s, a and b the sums of squares of cells, experts and classes.
    """
    expert_E1, class_1C = table_EC.sum(1, keepdims=True), table_EC.sum(0, keepdims=True)
    s, a, b = (float(np.square(part).sum()) for part in (table_EC, expert_E1, class_1C))
    above, below = s - a * b, (a + b) / 2 - a * b
    if below <= 0:
        return np.zeros_like(table_EC)
    by_a, by_b = (-other / below - above * (0.5 - other) / below**2 for other in (b, a))
    influence_EC: np.ndarray = 2 * (table_EC / below + by_a * expert_E1 + by_b * class_1C)
    return influence_EC
