"""Where a competition is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RoundPosition:
    """Where a competition is.

    Args:
        phase: number of the phase; the last one is the rounds.
        round: within them, from 1; 0 is the scoring of experts that pretrained on all samples.
        epoch: within the phase of pretraining, or within the round.
        total: epochs and scorings done in the run.
        stopped: the last round moved too few samples for another.
    """

    phase: int = 0
    round: int = 0
    epoch: int = 0
    total: int = 0
    stopped: bool = False
