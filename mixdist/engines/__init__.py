"""Engines: what happens between gradients and new parameters."""

from mixdist.engines.native import Native, NotFinite, OptimizerFactory, ScheduleFactory, Totals
from mixdist.engines.solo import Solo

__all__ = ["Native", "NotFinite", "OptimizerFactory", "ScheduleFactory", "Solo", "Totals"]
