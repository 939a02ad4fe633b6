"""Engines: what happens between gradients and new parameters."""

from mixdist.engines.deepspeed import DeepSpeed
from mixdist.engines.engine import Engine, EngineFactory, NotFinite, OptimizerFactory, ScheduleFactory, Totals
from mixdist.engines.fsdp import FSDP
from mixdist.engines.native import Native
from mixdist.engines.solo import Solo

__all__ = [
    "FSDP",
    "DeepSpeed",
    "Engine",
    "EngineFactory",
    "Native",
    "NotFinite",
    "OptimizerFactory",
    "ScheduleFactory",
    "Solo",
    "Totals",
]
