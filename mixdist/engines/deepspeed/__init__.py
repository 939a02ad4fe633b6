"""DeepSpeed as an engine; the library is imported where it is used."""

from mixdist.engines.deepspeed.engine import DeepSpeed

__all__ = ["DeepSpeed"]
