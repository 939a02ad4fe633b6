"""Engines: what happens between gradients and new parameters."""

from mixdist.engines.native import NativeEngine, NotFinite, OptimizerFactory, ScheduleFactory, Totals
from mixdist.engines.solo import SoloEngine

__all__ = ["NativeEngine", "NotFinite", "OptimizerFactory", "ScheduleFactory", "SoloEngine", "Totals"]
