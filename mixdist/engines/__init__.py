"""Engines: what happens between gradients and new parameters."""

from mixdist.engines.native import NativeEngine, NotFinite, OptimizerFactory, ScheduleFactory, Totals

__all__ = ["NativeEngine", "NotFinite", "OptimizerFactory", "ScheduleFactory", "Totals"]
