"""Phases of steps, checkpoints, resume."""

from mixdist.training.upcycled import Upcycled

__all__ = ["Upcycled"]
