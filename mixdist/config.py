"""What a run is: frozen dataclasses, read from YAML and dotted overrides.

Nothing below ``build`` sees these objects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from mixdist.data import Source
from mixdist.experts import Expert
from mixdist.gates import Gate
from mixdist.terms import Spec
from mixdist.trainer import Phase


@dataclass(frozen=True)
class MeshConfig:
    """Where experts live.

    Args:
        ep_size: ranks that together hold each expert once; unset, all ranks, or num_experts of them in each replica.
        device: auto takes CUDA (with NCCL) where there is some, else the CPU (with gloo).
        timeout_s: seconds after which a collective that some rank does not enter ends the run.
    """

    ep_size: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_s: float = 600.0


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save.

    Args:
        every: steps between checkpoints; unset, one at the end of each epoch. The end of the run is always saved.
        keep: how many of the newest to keep.
    """

    every: int | None = None
    keep: int = 3


@dataclass(frozen=True)
class Config:
    """A run.

    Args:
        data: class of mixdist.data, or your own Source.
        gate: class of mixdist.gates, or your own Gate; gives responsibilities.
        expert: class of mixdist.experts, or your own Expert.
        num_experts: how many experts.
        seed: names every random draw: the same seed, the same run.
        dtype: of parameters and real numbers.
        execution: how a rank runs its experts: one after another (loop) or as one batched product (stacked).
        pretrain: phases before the main one.
        train: the main phase.
        mesh: where experts live.
        checkpoint: when to save.
        log_every: steps between lines of metrics.jsonl.
        test_batch_size: rows of the global batch in evaluation.
    """

    data: Source
    gate: Callable[[Spec, int], Gate]
    expert: Callable[[Spec], Expert]
    num_experts: int
    seed: int = 0
    dtype: Literal["float32", "float64"] = "float32"
    execution: Literal["loop", "stacked"] = "loop"
    pretrain: list[Phase] = field(default_factory=list)
    train: Phase = field(default_factory=Phase)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log_every: int = 10
    test_batch_size: int = 1000


def check(config: Config) -> None:
    """Hold a config's numbers against what they can be.

    Raises:
        ValueError: a number that makes no sense, with its key.
    """
    positive = {
        "num_experts": config.num_experts,
        "log_every": config.log_every,
        "test_batch_size": config.test_batch_size,
        "mesh.timeout_s": config.mesh.timeout_s,
        "checkpoint.keep": config.checkpoint.keep,
        "checkpoint.every": config.checkpoint.every,
    }
    for name, phase in (*((f"pretrain[{i}]", p) for i, p in enumerate(config.pretrain)), ("train", config.train)):
        for key in ("epochs", "batch_size", "accumulate", "clip_norm"):
            positive[f"{name}.{key}"] = getattr(phase, key)
    for key, value in positive.items():
        if value is not None and not value > 0:
            raise ValueError(f"{key} ({value}) must be above 0: give 1 or more")
    if not 0 <= config.seed < 2**64:
        raise ValueError(f"seed ({config.seed}) must be from 0 to 2**64 - 1: choose another")
