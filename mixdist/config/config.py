"""What a run is: frozen dataclasses, read from YAML and dotted overrides.

Nothing below ``build`` sees these objects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from mixdist.competition.rules import Rules
from mixdist.data import Source
from mixdist.experts import Compute, Expert
from mixdist.gates import Gate
from mixdist.mixtures.objectives import WeightedLoss
from mixdist.mixtures.routing import TopK
from mixdist.terms import Spec
from mixdist.training.phases import Phase


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
class DispatchConfig:
    """How rows and losses travel; the run is the same either way.

    Args:
        one_way: send the gradients of the losses ahead with the rows, so that an expert differentiates at once; needs
            an objective that is linear in the experts' losses.
        prefetch: send the next step's rows while this step's experts run; needs dense routing.
    """

    one_way: bool = False
    prefetch: bool = False


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save.

    Args:
        every: steps between checkpoints, in a competition epochs and scorings; unset, one at the end of each epoch, in
            a competition of each round. The end of the run is always saved.
        keep: how many of the newest to keep.
    """

    every: int | None = None
    keep: int = 3


@dataclass(frozen=True)
class Config:
    """A run.

    Args:
        data: class of mixdist.data, or your own Source.
        expert: class of mixdist.experts, or your own Expert.
        num_experts: how many experts.
        gate: class of mixdist.gates, or your own Gate; gives responsibilities. A competition has none.
        competition: the rules by which experts compete for samples (hard assignment); unset, a gate decides (soft).
        seed: names every random draw: the same seed, the same run.
        dtype: of parameters and real numbers.
        execution: how a rank runs its experts: one after another (loop), as one batched product (stacked), or the
            faster of the two here (auto: timed once; the run's config.yaml keeps which it took).
        routing: top-k; unset, every expert sees every row.
        dispatch: how rows and losses travel.
        compute: how an expert runs its rows.
        pretrain: phases before the main one.
        train: the main phase.
        mesh: where experts live.
        checkpoint: when to save.
        log_every: steps between lines of metrics.jsonl; a competition has one for each epoch of pretraining and each
            round, whatever is said here.
        test_batch_size: rows of the global batch in evaluation.
    """

    data: Source
    expert: Callable[[Spec], Expert]
    num_experts: int
    gate: Callable[[Spec, int], Gate] | None = None
    competition: Rules | None = None
    seed: int = 0
    dtype: Literal["float32", "float64"] = "float32"
    execution: Literal["auto", "loop", "stacked"] = "auto"
    routing: TopK | None = None
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    compute: Compute = field(default_factory=Compute)
    pretrain: list[Phase] = field(default_factory=list)
    train: Phase = field(default_factory=Phase)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log_every: int = 10
    test_batch_size: int = 1000


def check(config: Config) -> None:
    """Check a config's numbers against what they can be.

    Raises:
        ValueError: a number that makes no sense, with its key.
    """
    if config.competition is not None:
        _check_competition(config)
    elif config.gate is None:
        raise ValueError(
            "a config needs a gate (soft mixture) or a competition (hard assignment), and this has neither: set gate, "
            "such as {class_path: mixdist.gates.Softmax}, or competition, such as {rounds: 20}"
        )
    positive = {
        "num_experts": config.num_experts,
        "log_every": config.log_every,
        "test_batch_size": config.test_batch_size,
        "mesh.timeout_s": config.mesh.timeout_s,
        "checkpoint.keep": config.checkpoint.keep,
        "checkpoint.every": config.checkpoint.every,
    }
    phases = (*((f"pretrain[{i}]", p) for i, p in enumerate(config.pretrain)), ("train", config.train))
    for name, phase in phases:
        for key in ("epochs", "batch_size", "accumulate", "clip_norm"):
            positive[f"{name}.{key}"] = getattr(phase, key)
    for key, value in positive.items():
        if value is not None and not value > 0:
            raise ValueError(f"{key} ({value}) must be above 0: give 1 or more")
    if not 0 <= config.seed < 2**64:
        raise ValueError(f"seed ({config.seed}) must be from 0 to 2**64 - 1: choose another")
    if config.routing is not None and config.routing.k > config.num_experts:
        raise ValueError(
            f"routing.k ({config.routing.k}) must be at most num_experts ({config.num_experts}): lower it, or leave "
            f"routing out for every expert to see every row"
        )
    for key in ("micro_batch", "recompute", "compile"):
        value = getattr(config.compute, key)
        if config.execution == "stacked" and value:
            raise ValueError(
                f"compute.{key} ({value}) needs experts in a loop, and execution is stacked: set that to loop or auto"
            )
    if config.dispatch.prefetch and config.routing is not None:
        raise ValueError(
            "dispatch.prefetch (true) needs dense routing: with top-k a row's way depends on the gate after the step "
            "before; set it to false, or leave routing out"
        )
    for name, phase in phases:
        if config.dispatch.one_way and not phase.objective.linear:
            kind = type(phase.objective).__name__
            raise ValueError(
                f"dispatch.one_way (true) needs an objective linear in the experts' losses, and {name}.objective is "
                f"{kind}: set it to false, or take WeightedLoss"
            )


def _check_competition(config: Config) -> None:
    """Refuse what a competition cannot do, or would pass over."""
    unused = {
        "gate": config.gate is not None,
        "routing": config.routing is not None,
        "dispatch.one_way": config.dispatch.one_way,
        "dispatch.prefetch": config.dispatch.prefetch,
        "execution": config.execution == "stacked",
    }
    for key, given in unused.items():
        if given:
            raise ValueError(
                f"{key} is given, but in a competition each expert trains by itself on its own samples: leave {key} "
                f"out, or competition"
            )
    for i, phase in enumerate((*config.pretrain, config.train)):
        name = f"pretrain[{i}]" if i < len(config.pretrain) else "train"
        objective = phase.objective
        if type(objective) is not WeightedLoss or objective.balance is not None or objective.entropy_bonus:
            kind = type(objective).__name__ + (" with balance or entropy" if objective.linear else "")
            raise ValueError(
                f"{name}.objective ({kind}) needs all experts' losses of a sample, and in a competition only its own "
                f"expert sees it: leave the objective out (WeightedLoss), or take a gate in place of competition"
            )
        if phase.trains == "gate" or phase.accumulate != 1:
            key, value = ("trains", phase.trains) if phase.trains == "gate" else ("accumulate", phase.accumulate)
            raise ValueError(
                f"{name}.{key} ({value}) means nothing in a competition: leave it out; to bound memory there is "
                f"compute.micro_batch"
            )
