"""From words and YAML to a Config, and from the parser's complaints to one line that helps.

The grammar is jsonargparse's: every dataclass field is a key, every key an option, and an unknown one is an error.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from mixdist.config import Config, check

RESOLVED = "config.yaml"


def config_parser(prog: str = "mixdist train", description: str = "") -> ArgumentParser:
    """Make a parser of all keys of a Config, from YAML files (``--config``) and dotted options."""
    parser = ArgumentParser(prog=prog, exit_on_error=False, description=description)
    parser.add_argument("--config", action="config", help="a YAML file; options after it override it")
    parser.add_class_arguments(Config)
    return parser


def parse(parser: ArgumentParser, words: Sequence[str]) -> Namespace:
    """Parse words.

    Raises:
        ValueError: an unknown key, a wrong type, a missing file: one line.
    """
    with _explained(parser):
        parsed: Namespace = parser.parse_args(list(words))
    return parsed


def make_config(parser: ArgumentParser, parsed: Namespace) -> Config:
    """Make the Config of what was parsed: classes are imported, sources made; modules wait for the data's spec.

    Raises:
        ValueError: a value that makes no sense.
    """
    with _explained(parser):
        made = parser.instantiate(parsed)
    config = Config(**{name: made[name] for name in Config.__dataclass_fields__})
    check(config)
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
    parser = config_parser("mixdist")
    return make_config(parser, parse(parser, ["--config", str(path)]))


@contextmanager
def _explained(parser: ArgumentParser) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    except (ArgumentError, TypeError, ImportError, AttributeError) as error:
        raise ValueError(explain(str(error), parser)) from None
    except ValueError as error:
        raise ValueError(one_line(str(error))) from None


def one_line(text: str) -> str:
    """Put a message on one line."""
    return " ".join(text.split())


def explain(message: str, parser: ArgumentParser) -> str:
    """Say in one line what the parser objects to, and what to write instead."""
    text = one_line(message)
    for pattern, tell in _COMPLAINTS:
        found = re.search(pattern, text)
        if found:
            return tell(found, text, parser)
    return f"{text}; see {parser.prog} --help"


def _unknown_option(found: re.Match[str], text: str, parser: ArgumentParser) -> str:
    outer, inner = _outer_key(text), found["key"]
    path = re.findall(r"class_path='([^']+)'", text)
    if outer and path:
        known = _init_args(path[-1])
        return f"unknown config key {outer}.init_args.{inner}: {path[-1]} takes {', '.join(known)}{_near(inner, known)}"
    keys = _keys(parser)
    if outer:
        keys = [k.removeprefix("train.") for k in keys if k.startswith("train.")]
        return f"unknown config key {inner} in {outer}: it takes {', '.join(keys)}{_near(inner, keys)}"
    return f"unknown config key {inner}{_near(inner, keys)}; see {parser.prog} --help for all keys"


def _unrecognized(found: re.Match[str], text: str, parser: ArgumentParser) -> str:
    word = found["words"].split()[0]
    key = word.lstrip("-").partition("=")[0]
    return f"unknown option {word}{_near(key, _keys(parser))}; see {parser.prog} --help for all options"


def _wrong_type(found: re.Match[str], text: str, parser: ArgumentParser) -> str:
    names = re.findall(r'Parser key "([^"]+)"', text)
    key = names[0] if len(names) == 1 else f"{names[0]}.init_args.{names[-1]}"
    value = found["value"].partition(". Got value: Namespace")[0].strip()
    return f"{key} ({value}) has the wrong type: expected {found['type']}; give a value of that type"


def _missing(found: re.Match[str], text: str, parser: ArgumentParser) -> str:
    return f"the config lacks {found['keys']}: add it to the YAML, or start from one under configs/"


def _no_class(found: re.Match[str], text: str, parser: ArgumentParser) -> str:
    path = found["path"].strip("'\" ")
    return (
        f"{_outer_key(text)} names the class {path}, which cannot be found: give an import path such as "
        f"mixdist.gates.Softmax; a file of your own must lie in the working directory or on PYTHONPATH"
    )


_COMPLAINTS: tuple[tuple[str, Callable[[re.Match[str], str, ArgumentParser], str]], ...] = (
    (r"unrecognized arguments: (?P<words>.*)", _unrecognized),
    (r"Option '(?P<key>[^']+)' is not accepted", _unknown_option),
    (r"does not accept option '(?P<key>[^']+)'", _unknown_option),
    (r"Expected a dot import path string: (?P<path>\S+)", _no_class),
    (r"No module named (?P<path>'[^']+')", _no_class),
    (r"Problem importing '(?P<path>[^']+)'", _no_class),
    (r"Expected an? (?:<class ')?(?P<type>[^>']+?)'?>?\. Got value: (?P<value>.*)", _wrong_type),
    (r"arguments are required: (?P<keys>.*)", _missing),
    (r"Key \"(?P<keys>[^\"]+)\" is required", _missing),
)


def _outer_key(text: str) -> str:
    found = re.search(r'Parser key "([^"]+)"', text)
    return found[1] if found else ""


def _keys(parser: ArgumentParser) -> list[str]:
    return sorted({action.dest for action in parser._actions if action.dest not in ("help", "print_config")})


def _near(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _init_args(class_path: str) -> list[str]:
    """Name what a class takes from a config."""
    module, _, name = class_path.rpartition(".")
    try:
        signature: Any = inspect.signature(getattr(importlib.import_module(module), name))
    except (ImportError, AttributeError, ValueError, TypeError):
        return []
    return [p for p in signature.parameters if p not in ("spec", "num_experts", "params", "optimizer")]
