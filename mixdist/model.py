"""``mixdist.load``: the model of a run, in one process, without its data."""

from __future__ import annotations

import warnings
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from mixdist.config.build import build_mixture
from mixdist.config.parsing import RESOLVED, read_config
from mixdist.data.fields import read_spec
from mixdist.parallel.launch import Launch
from mixdist.parallel.mesh import Mesh, Placement
from mixdist.training.checkpoint import CheckpointStore, load_mixture, read_state
from mixdist.training.selection import Which, choose_checkpoint


def load(run: str | PathLike[str], weights: Which = "best", ema: bool = False) -> Any:
    """Return the model of a run's checkpoint; neither the data nor the ranks that trained it are needed.

    What it is depends on the family: of soft mixtures and competitions a :class:`mixdist.mixtures.Model`.

    Args:
        run: its directory.
        weights: of the best checkpoint, where the run's ``select`` monitors a figure, else of the newest good one; or
            of the newest good one in any case.
        ema: take the moving averages of weights of a run that was trained with ``train.ema``.

    Raises:
        ValueError: the directory holds no run, or no good checkpoint, or no averages.
    """
    if not isinstance(run, (str, PathLike)):
        raise ValueError(f"run ({run!r}) must be the path of a run's directory: name one that mixdist train made")
    directory = Path(run)
    if not (directory / RESOLVED).is_file():
        raise ValueError(f"{directory} holds no run ({RESOLVED} is missing): name a directory that mixdist train made")
    config = read_config(directory / RESOLVED)
    number = config.mixture.num_experts
    mesh = Mesh(Placement.plan(number, 1), Launch(), torch.device("cpu"))
    path, passed_over = choose_checkpoint(CheckpointStore(directory / "checkpoints", mesh), weights)
    for sentence in passed_over:
        warnings.warn(f"{sentence}; using {path.name}", stacklevel=2)
    about = read_state(path)["run"]
    if about["mixture"]["num_experts"] != number:
        raise ValueError(
            f"{directory / RESOLVED} has num_experts {number}, but checkpoint {path.name} was made with "
            f"{about['mixture']['num_experts']}: put the run's own {RESOLVED} back"
        )
    mixture = build_mixture(config, read_spec(about["spec"]), mesh)
    load_mixture(path, mixture, ema)
    for owned in mixture.owned():
        owned.module.eval()
    model: Any = mixture.model(about["class_names"])
    if model is None:
        raise ValueError(
            f"mixture: {type(mixture).__name__}.model returns None: return what users are to have of a run"
        )
    return model
