"""What a run is: frozen dataclasses, read from YAML and dotted overrides.

Nothing below ``build`` sees these objects.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mixdist.data import Source
from mixdist.data.sources.splits import check_part
from mixdist.engines import EngineFactory
from mixdist.engines.average import check_decay
from mixdist.mixtures import Mixture
from mixdist.training.phases import POSITIVE, Phase
from mixdist.training.selection import Select


@dataclass(frozen=True)
class MeshConfig:
    """Where experts live.

    Args:
        ep_size: ranks that together hold each expert once; unset, all ranks, or num_experts of them in each replica.
        device: auto takes CUDA (with NCCL) where there is some, else the CPU (with gloo).
        timeout_s: seconds after which a collective that some rank does not enter ends the run. In a competition ranks
            meet once a round (delivery: read) or once an epoch (wire): give more than the busiest rank takes beyond
            the idlest.
    """

    ep_size: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_s: float = 600.0


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save.

    Args:
        every: steps between checkpoints, in a competition epochs and scorings; unset, one at the end of each epoch, in
            a competition of each round. The end of the run is always saved.
        keep: how many of the newest to keep; the best is kept besides, where ``select`` monitors a figure.
    """

    every: int | None = None
    keep: int = 3


@dataclass(frozen=True)
class Config:
    """A run.

    Args:
        data: class of mixdist.data, or your own Source.
        valid: validation rows, cut out of the training rows by their ids, the same in every run: a part, such as 0.1,
            or a number of rows; unset, the source's own, if it has some. Choices are made on them; test rows are left
            to the end.
        mixture: class of mixdist.mixtures, mixdist.competition.Competition, or your own Mixture: the family, with its
            experts and all options that it alone has.
        seed: names every random draw: the same seed, the same run.
        dtype: of parameters and real numbers.
        engine: class of mixdist.engines, or your own Engine: reduces gradients, clips and steps; unset, Native.
            A competition takes Native alone.
        pretrain: phases before the main one.
        train: the main phase.
        mesh: where experts live.
        checkpoint: when to save.
        select: which checkpoint is the best, and whether training ends early: by a figure on validation rows.
        log_every: steps between lines of metrics.jsonl; a competition has one for each epoch of pretraining and each
            round, whatever is said here.
        test_batch_size: rows of the global batch in evaluation.
        pictures: whether a run that ends is drawn, into its directory's images/.
    """

    data: Source
    mixture: Mixture
    valid: int | float | None = None
    seed: int = 0
    dtype: Literal["float32", "float64"] = "float32"
    engine: EngineFactory | None = None
    pretrain: list[Phase] = field(default_factory=list)
    train: Phase = field(default_factory=Phase)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    select: Select = field(default_factory=Select)
    log_every: int = 10
    test_batch_size: int = 1000
    pictures: bool = True


def check(config: Config) -> None:
    """Check a config's numbers against what they can be.

    Raises:
        ValueError: a number that makes no sense, with its key.
    """
    phases = {**{f"pretrain[{i}]": phase for i, phase in enumerate(config.pretrain)}, "train": config.train}
    positive = {
        "log_every": config.log_every,
        "test_batch_size": config.test_batch_size,
        "mesh.timeout_s": config.mesh.timeout_s,
        "checkpoint.keep": config.checkpoint.keep,
        "checkpoint.every": config.checkpoint.every,
    }
    for name, phase in phases.items():
        if phase.ema is not None:
            check_decay(phase.ema, f"{name}.ema")
        for key in POSITIVE:
            positive[f"{name}.{key}"] = getattr(phase, key)
    for key, value in positive.items():
        if value is not None and not value > 0:
            raise ValueError(f"{key} ({value}) must be above 0: give 1 or more")
    config.select.check()
    if config.valid is not None:
        check_part("valid", config.valid)
    if not 0 <= config.seed < 2**64:
        raise ValueError(f"seed ({config.seed}) must be from 0 to 2**64 - 1: choose another")
    config.mixture.check(phases)
