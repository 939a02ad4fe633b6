"""From words and YAML to a Config."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

import mixdist.competition
import mixdist.data
import mixdist.mixtures
from mixdist.config.complaints import CONFIG
from mixdist.config.config import Config, check
from mixdist.config.options import explained, parse, plain_parser
from mixdist.config.places import Place
from mixdist.training.phases import try_out

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
        try_out(f"pretrain[{i}]", phase.optimizer, phase.schedule)
    try_out("train", config.train.optimizer, config.train.schedule)
    for name, optimizer in config.mixture.optimizers().items():
        try_out(f"mixture.{name}", optimizer)
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
