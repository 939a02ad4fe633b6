"""From a config to objects; besides the commands, the only reader of configs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mixdist.config.config import Config
from mixdist.config.sameness import check_attributes, check_rows, check_weights
from mixdist.data import Samples, Splits
from mixdist.data.fields import describe_spec
from mixdist.data.sources.splits import load_splits
from mixdist.engines.engine import takes_stacks
from mixdist.messages import describe_failure, last_own_line
from mixdist.mixtures import Context, Mixture
from mixdist.mixtures.probe import check_json, shown
from mixdist.parallel.agreement import Agreed, agreed, gather_json
from mixdist.parallel.launch import Launch
from mixdist.parallel.mesh import Mesh, Placement, choose_device
from mixdist.parallel.wire import LostRank, Wire
from mixdist.terms import Parts, Spec
from mixdist.training.loop import Program
from mixdist.training.selection import Selection
from mixdist.training.trainer import Trainer

DTYPES = {"float32": torch.float32, "float64": torch.float64}
SKIPS_SHOWN = 20
PLAIN = (bool, int, float, str, type(None))
KINDS = {"train": "training", "valid": "validation", "test": "test"}
"""What the rows of a split are called."""


@dataclass(frozen=True)
class Session:
    """A config made real on this rank: its place, its data, its mixture."""

    mesh: Mesh
    train: Samples
    test: Samples
    mixture: Mixture
    valid: Samples | None = None

    @property
    def watched(self) -> str:
        """The split that a run is looked at by until its last step: valid where there are such rows, else test."""
        return "test" if self.valid is None else "valid"

    def split(self, name: str) -> Samples:
        """Return the rows of a split: train, valid or test.

        Raises:
            ValueError: there are no validation rows.
        """
        rows: Samples | None = getattr(self, name)
        if rows is None:
            raise ValueError(
                f"--split {name} has no rows in this run: train with valid, such as 0.1 of the training rows, or name "
                f"train or test"
            )
        return rows

    def close(self) -> None:
        """End what works for the data."""
        for rows in (self.train, self.test, self.valid):
            if rows is not None:
                rows.close()


def build_mesh(config: Config, card: Mapping[str, Any] | None = None) -> Mesh:
    """Find this rank's place and meet the others.

    Args:
        config: the run.
        card: what must be the same on every rank, as ``mixdist.config.card`` makes it.

    Raises:
        ValueError: no layout fits, no device is there, or the ranks do not find each other or were not started alike.
    """
    # Where a gradient stays 0, Adam's mean of it sinks to subnormal numbers, with which some processors are slow.
    torch.set_flush_denormal(True)
    launch = Launch.read()
    if not hasattr(config.mixture, "num_experts"):
        raise ValueError(f"{type(config.mixture).__name__} has no num_experts: set it in its __init__")
    placement = Placement.plan(config.mixture.num_experts, launch.world_size, config.mesh.ep_size)
    return Mesh(placement, launch, choose_device(config.mesh.device, launch), config.mesh.timeout_s, card)


def build(config: Config, mesh: Mesh, tests: bool = True) -> Session:
    """Load the data and make the mixture's modules; every rank calls it.

    Args:
        config: the run.
        mesh: this rank's place.
        tests: whether test rows will be read although there are validation rows: by the last step alone.

    Raises:
        Agreed: something does not fit; the same message on every rank.
    """

    def make() -> Splits:
        splits = load_splits(config.data, config.valid, tests)
        order_of(splits.train)
        build_mixture(config, splits.train.spec, mesh)
        return splits

    session = _session(config, agreed(make, mesh.world), mesh, tests)
    check_weights(config.mixture, mesh)
    check_attributes(config.mixture, mesh)
    config.mixture.check_data({KINDS[name]: session.split(name) for name in _read(session.valid, tests)})
    if takes_stacks(config.engine):
        config.mixture.tune(session.train, config.train)
    return session


def load_data(config: Config, mesh: Mesh) -> Session:
    """Load the data and leave the mixture without modules; every rank calls it.

    Raises:
        Agreed: the data cannot be loaded.
    """
    return _session(config, agreed(lambda: load_splits(config.data, config.valid), mesh.world), mesh, tests=True)


def _session(config: Config, splits: Splits, mesh: Mesh, tests: bool) -> Session:
    names = _read(splits.valid, tests)
    splits = splits._replace(**{name: readable(name, getattr(splits, name), mesh) for name in names})
    check_rows({KINDS[name]: getattr(splits, name) for name in names}, config.data, mesh)
    return Session(mesh, splits.train, splits.test, config.mixture, splits.valid)


def _read(valid: Samples | None, tests: bool) -> list[str]:
    """Return the splits whose rows a command reads."""
    return ["train", "test"] if valid is None else ["train", "valid", *(["test"] if tests else [])]


def build_mixture(config: Config, spec: Spec, mesh: Mesh) -> Mixture:
    """Make the mixture's modules on this rank.

    Raises:
        ValueError: the data does not have what they need, or what the user wrote for them fails.
    """
    mixture, method = config.mixture, "setup"
    try:
        mixture.setup(Context(config.seed, DTYPES[config.dtype], spec, mesh, Wire(mesh.device)))
        method = "parts"
        parts: Any = mixture.parts
        if not isinstance(parts, Parts):
            kind = type(mixture).__name__
            raise ValueError(f"mixture: {kind}.parts returns {shown(parts)}, expected mixdist.terms.Parts: return that")
        mixture.owned()
    except (ValueError, OSError, LostRank):
        raise
    except Exception as error:
        if not last_own_line(error):
            raise  # a mistake of this package
        raise ValueError(
            f"mixture: {type(mixture).__name__}.{method} fails ({describe_failure(error)}): fix it"
        ) from error
    return mixture


def build_program(config: Config, session: Session, fresh: bool) -> Program:
    """Make what advances training; every rank calls it.

    Args:
        config: the run.
        session: its data and mixture.
        fresh: the run begins; otherwise it goes on from a checkpoint.
    """
    make = session.mixture.program or Trainer
    phases = [*config.pretrain, config.train]
    program: Program = make(session.mixture, session.train, phases, config.engine, config.log_every, fresh)
    return program


def build_selection(config: Config, session: Session, program: Program) -> Selection | None:
    """Make what chooses the best checkpoint; None where nothing is monitored.

    Raises:
        ValueError: there are no validation rows, the family cannot be evaluated between steps, or the figure's name
            does not say whether it is to be small or large.
    """
    wanted, mixture = f"select.monitor ({config.select.monitor})", session.mixture
    if config.select.monitor is None:
        return None
    if session.valid is None:
        raise ValueError(
            f"{wanted} needs validation rows, and the data has none: set valid to a part of the training rows, such as "
            f"0.1, or leave select out"
        )
    lacking = [] if mixture.has_figures else [f"{type(mixture).__name__}.measure"]
    lacking += [] if hasattr(program, "ready") else [f"{type(program).__name__}.ready"]
    if lacking:
        raise ValueError(f"{wanted} needs {' and '.join(lacking)}: write that method, or leave select out")
    return Selection(config.select, mixture, session.valid, session.train, config.test_batch_size, config.seed)


def readable(split: str, dataset: Samples, mesh: Mesh) -> Samples:
    """Leave out what cannot be read, where the data is to do so: every rank looks at its share, all take all lists."""
    own = agreed(lambda: dataset.unreadable(mesh.rank, mesh.world_size), mesh.world)
    skipped = [(int(sample), str(why)) for part in gather_json(own, mesh.world) for sample, why in part]
    if not skipped:
        return dataset
    if mesh.rank == 0:
        for _, why in skipped[:SKIPS_SHOWN]:
            print(f"mixdist: skipped: {why}", file=sys.stderr)
        more = f", the first {SKIPS_SHOWN} named above" if len(skipped) > SKIPS_SHOWN else ""
        of = f"{len(dataset)} {KINDS[split]} samples"
        print(f"mixdist: {len(skipped)} of {of} skipped{more}", file=sys.stderr, flush=True)
    try:
        return dataset.without([sample for sample, _ in skipped])
    except ValueError as mistake:
        raise Agreed(str(mistake)) from None


def describe(config: Config, dataset: Samples) -> dict[str, Any]:
    """Return, as JSON, what must be the same for a checkpoint to be resumed; enough to load it without its data."""
    phases, kind = [*config.pretrain, config.train], type(config.mixture)
    mixture = check_json(f"mixture: {kind.__name__}.describe", config.mixture.describe(phases))
    return {
        "seed": config.seed,
        "dtype": config.dtype,
        "valid": config.valid,
        "batch_sizes": [phase.batch_size for phase in phases],
        "pretrain_epochs": [phase.epochs for phase in config.pretrain],
        "data": dataset.fingerprint,
        **order_of(dataset),
        "source": {
            name: value for name, value in getattr(config.data, "__dict__", {}).items() if isinstance(value, PLAIN)
        },
        "spec": describe_spec(dataset.spec),
        "label": dataset.label,
        "class_names": list(dataset.class_names),
        "mixture": {"family": f"{kind.__module__}.{kind.__qualname__}", **mixture},
    }


def order_of(dataset: Samples) -> dict[str, Any]:
    """Return what decides the order of a data set's rows, by the keys that a config has them under.

    Raises:
        ValueError: it is no JSON, so that no checkpoint can hold it.
    """
    kind, options = type(dataset).__name__, dataset.order_options
    try:
        return {f"data.{name}": value for name, value in json.loads(json.dumps(options)).items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{kind}.order_options ({options}) must be JSON by name ({error}): return numbers, words and lists"
        ) from None
