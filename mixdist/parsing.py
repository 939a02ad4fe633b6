"""From words and YAML to a Config.

The grammar is jsonargparse's: every dataclass field is a key, every key an option, and an unknown one is an error.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from mixdist.complaints import EXAMPLE, KINDS, choose, explain, find, keys_of, last_part, one_line
from mixdist.config import Config, check
from mixdist.engines import OptimizerFactory, ScheduleFactory
from mixdist.scores import Discriminators

RESOLVED = "config.yaml"


def config_parser(prog: str = "mixdist train", description: str = "") -> ArgumentParser:
    """Make a parser of all keys of a Config, from YAML files (``--config``) and dotted options."""
    parser = plain_parser(prog, description)
    parser.add_argument("--config", action="config", help="a YAML file; options after it override it")
    parser.add_class_arguments(Config)
    return parser


def plain_parser(prog: str, description: str) -> ArgumentParser:
    """Make a parser without keys that raises instead of exiting and accepts no abbreviation."""
    return ArgumentParser(
        prog=prog, description=description, exit_on_error=False, allow_abbrev=False, formatter_class=_Help
    )


class _Help(DefaultHelpFormatter):
    def _expand_help(self, action: Any) -> str:
        key, _, _ = str(action.dest).partition(".help")
        kind = KINDS.get(last_part(key))
        text = str(super()._expand_help(action))
        if text.startswith("Show the help for"):
            example = f" {kind.module}.{kind.example}" if kind else ""
            return f"tell what can be set inside, as --{key}.help{example}"
        if text == "Path to a configuration file.":
            return f"a YAML file with the keys of {key}"
        if kind:
            text = text.replace(f"{kind.module}.{kind.base.__name__}, ", "")  # a base class cannot be chosen
        text = re.sub(r"Callable\[\[.*\], (\w+)\]", r"\1", re.sub(r"<class '(\w+)'>", r"\1", text))
        return text.replace("known subclasses", "choose of")


def parse(parser: ArgumentParser, words: Sequence[str]) -> Namespace:
    """Parse words.

    Raises:
        ValueError: an unknown key, a wrong type, a missing file: one line.
    """
    for path in values_of(words, "--config"):
        _check_yaml(path, parser)
    with _explained(parser, ArgumentError, TypeError, AttributeError, ImportError):
        parsed: Namespace = parser.parse_args(list(words))
    return parsed


def values_of(words: Sequence[str], option: str) -> list[str]:
    """Find what is given for an option, as ``--option VALUE`` or ``--option=VALUE``, before parsing."""
    given = [
        word.partition("=")[2] if "=" in word else "".join(words[place : place + 1])
        for place, word in enumerate(words, start=1)
        if word.partition("=")[0] == option
    ]
    return [value for value in given if value and not value.startswith("--")]


def make_config(parser: ArgumentParser, parsed: Namespace) -> Config:
    """Make the Config of what was parsed: classes are imported, sources made; modules wait for the data's spec.

    Raises:
        ValueError: a value that makes no sense.
    """
    for key, class_path in _classes(parsed):
        _check_class(key, class_path)
    with _explained(parser, ArgumentError):
        made = parser.instantiate(parsed)
    config = Config(**{name: made[name] for name in Config.__dataclass_fields__})
    check(config)
    for i, phase in enumerate(config.pretrain):
        _try_out(f"pretrain[{i}]", phase.optimizer, phase.schedule)
    _try_out("train", config.train.optimizer, config.train.schedule)
    if config.competition is not None and isinstance(config.competition.score, Discriminators):
        _try_out("competition.score.init_args", config.competition.score.optimizer)
    return config


def dump(parser: ArgumentParser, parsed: Namespace) -> str:
    """Give the resolved config as YAML, without what belongs to the command and not to the run."""
    own = Namespace({name: parsed[name] for name in Config.__dataclass_fields__})
    text: str = config_parser().dump(own)
    return text


def read_config(path: Path) -> Config:
    """Read a YAML file.

    Raises:
        ValueError: it cannot be read or does not parse.
    """
    parser = config_parser("mixdist train")
    return make_config(parser, parse(parser, ["--config", str(path)]))


# Before the parser: what it would pass over or say badly.


def _check_yaml(path: str, parser: ArgumentParser) -> None:
    """Hold a config file against YAML's grammar; the parser itself lets the last of two equal keys win."""
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read ({error.strerror}): give a file such as {EXAMPLE}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {path} is not text ({error.reason}): give a YAML file in UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1} column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ValueError(f"--config {path}{where} is not YAML ({one_line(problem)}): mend that line") from None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"--config {path} has no keys: expected lines such as num_experts: 10; see {EXAMPLE}")
    _check_node(root, path, "", keys_of(parser), set())


def _check_node(node: yaml.Node, path: str, key: str, keys: Sequence[str], seen: set[int]) -> None:
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    children: list[tuple[str, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(f"{key}.{name.value}".lstrip("."), value) for name, value in node.value]
        names = [child for child, _ in children]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            line = [value.start_mark.line + 1 for name, value in children if name == twice][1]
            raise ValueError(f"--config {path} line {line} has the key {twice} once more: keep one of the two")
    elif isinstance(node, yaml.SequenceNode):
        children = [(key, value) for value in node.value]
    inside = [name for name in keys if name.startswith(f"{key}.")]
    if inside and not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1
        raise ValueError(
            f"--config {path} line {line}: {key} is a section: write its keys, such as {inside[0]}, below it"
        )
    for name, child in children:
        _check_node(child, path, name, keys, seen)


def _classes(node: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Find every class that a parsed config names, with its key."""
    if isinstance(node, list):
        for i, inner in enumerate(node):
            yield from _classes(inner, f"{key}[{i}]")
    elif isinstance(node, Namespace):
        if isinstance(node.get("class_path"), str):
            yield key, node.class_path
        for name, inner in vars(node).items():
            yield from _classes(inner, f"{key}.{name}".lstrip("."))


def _check_class(key: str, class_path: str) -> None:
    """The parser accepts functions, and base classes that cannot be made."""
    made = find(class_path)
    kind = KINDS.get(last_part(key))
    if made is not None and not inspect.isclass(made):
        raise ValueError(f"{key} ({class_path}) must be a class: {choose(key)}")
    if kind is not None and made is kind.base:
        raise ValueError(f"{key} ({class_path}) is the base class of what can stand there: {choose(key)}")


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
    except (TypeError, ValueError, RuntimeError) as error:
        told = one_line(str(error))
        raise ValueError(f"{name}.{part} cannot be used ({told}): change its init_args, or {remedy}") from None


@contextmanager
def _explained(parser: ArgumentParser, *errors: type[Exception]) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    except SyntaxError as error:
        line = f"{error.filename} line {error.lineno}"
        raise ValueError(f"{line}, imported for a class of the config, is not Python ({error.msg}): mend it") from None
    except errors as error:
        raise ValueError(explain(str(error), parser)) from None
    except ValueError as error:
        text = one_line(str(error))
        within = re.search(r"Errors: - (.*?) - Expected a <class 'NoneType'>", text)
        raise ValueError(within[1] if within else text) from None
