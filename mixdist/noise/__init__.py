"""Random numbers that belong to rows: pure functions of (seed, purpose, phase, step, sample id, expert)."""

from mixdist.noise.draws import (
    ASSIGNMENT_PHASE,
    DISCRIMINATOR_PHASE,
    EVALUATION_PHASE,
    RESTART_PHASE,
    SCORING_PHASE,
    TRIAL_PHASE,
    Draw,
    Kind,
    Moment,
    Purpose,
    derive,
    hashes,
    permutation,
    weights_seed,
)

__all__ = [
    "ASSIGNMENT_PHASE",
    "DISCRIMINATOR_PHASE",
    "EVALUATION_PHASE",
    "RESTART_PHASE",
    "SCORING_PHASE",
    "TRIAL_PHASE",
    "Draw",
    "Kind",
    "Moment",
    "Purpose",
    "derive",
    "hashes",
    "permutation",
    "weights_seed",
]
