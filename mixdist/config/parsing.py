"""From words and YAML to a Config."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace

import mixdist.competition
import mixdist.data
import mixdist.mixtures
from mixdist.config.complaints import CONFIG
from mixdist.config.config import Config, check
from mixdist.config.options import explained, parse, plain_parser
from mixdist.config.places import Place
from mixdist.engines import OptimizerFactory, ScheduleFactory
from mixdist.messages import one_line

RESOLVED = "config.yaml"


def config_parser(prog: str = "mixdist train", description: str = "") -> ArgumentParser:
    """Make a parser of all keys of a Config, from YAML files (``--config``) and dotted options."""
    parser = plain_parser(prog, description)
    for name in mixdist.data.__all__:
        getattr(mixdist.data, name)  # the parser knows of classes that were imported
    parser.add_argument("--config", action="config", help="a YAML file; options after it override it")
    parser.add_class_arguments(Config, fail_untyped=False)  # the spec of a class of one's own needs no type
    return parser


def make_config(parser: ArgumentParser, parsed: Namespace, trains: bool = True) -> Config:
    """Make the Config of what was parsed: classes are imported, sources made; modules wait for the data's spec.

    Args:
        parser: of the config.
        parsed: what it took from YAML and arguments.
        trains: try the optimisers, which takes seconds, since torch imports its compiler for the first of them.

    Raises:
        ValueError: a value that makes no sense.
    """
    for name in Config.__dataclass_fields__:
        Place("", None, CONFIG).inner(name).check(parsed[name])
    with explained(parser):
        made = parser.instantiate(parsed)
    config = Config(**{name: made[name] for name in Config.__dataclass_fields__})
    check(config)
    if not trains:
        return config
    for i, phase in enumerate(config.pretrain):
        _try_out(f"pretrain[{i}]", phase.optimizer, phase.schedule)
    _try_out("train", config.train.optimizer, config.train.schedule)
    for name, optimizer in config.mixture.optimizers().items():
        _try_out(f"mixture.{name}", optimizer)
    return config


def dump(parsed: Namespace) -> str:
    """Return the resolved config as YAML, without what belongs to the command and not to the run."""
    return yaml.safe_dump({name: plain(parsed[name]) for name in Config.__dataclass_fields__}, sort_keys=False)


def plain(value: Any) -> Any:
    """Return what was parsed as JSON: the parser itself cannot write lists of classes with arguments left open."""
    if isinstance(value, Namespace):
        return {name: plain(inner) for name, inner in vars(value).items()}
    if isinstance(value, Mapping):
        return {plain(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(inner) for inner in value), key=str)
    if isinstance(value, Enum):
        return value.name  # as it is given
    if inspect.isclass(value) or inspect.isroutine(value):  # their text has an address, another in each process
        return f"{value.__module__}.{value.__qualname__}"
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def read_config(path: Path) -> Config:
    """Read a YAML file, for anything but training.

    Raises:
        ValueError: it cannot be read or does not parse.
    """
    parser = config_parser("mixdist train")
    return make_config(parser, parse(parser, ["--config", str(path)]), trains=False)


def _try_out(name: str, make: OptimizerFactory, schedule: ScheduleFactory | None = None) -> None:
    """Step an optimiser and a schedule once on one number: better now than after the phases before it."""
    number = torch.nn.Parameter(torch.zeros(1))
    number.grad = torch.zeros(1)
    part, remedy = "optimizer", "choose one that works element by element, such as torch.optim.Adam"
    try:
        optimizer = make([number])
        with suppress(AssertionError):  # capturable optimisers want CUDA
            optimizer.step()
        part, remedy = "schedule", "choose one that needs no metric, such as torch.optim.lr_scheduler.StepLR"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch would have it made before the step
            if schedule is not None:
                schedule(optimizer).step()
        rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
        if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
            raise ValueError(f"learning rate {rates[0]}")
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, AttributeError) as error:
        told = one_line(str(error))
        raise ValueError(f"{name}.{part} cannot be used ({told}): change its init_args, or {remedy}") from None
