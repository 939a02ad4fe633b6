"""Which figures tables show."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = (
    "log_likelihood",
    "conditional_log_likelihood",
    "gate_log_likelihood",
    "prediction_accuracy",
    "prediction_rmse",
    "rmse_value",
    "accuracy",
    "nmi",
    "ari",
    "coherence_given_1",
    "coherence_given_2",
    "coherence_given_3",
    "coherence_given_4",
    "coherence_joint",
    "log_joint",
)


def headlines(figures: Sequence[str]) -> list[str]:
    """Return the figures to show of those that there are, the one to compare first; all, where none is known."""
    return [name for name in SHOWN if name in figures] or list(figures)
