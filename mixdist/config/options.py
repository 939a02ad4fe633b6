"""From arguments to what a command takes: the parser's settings, its help, and its complaints in one line.

Needs no torch.

The grammar is jsonargparse's: every dataclass field is a key, every key an option, and an unknown one is an error.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace, Unset, set_parsing_settings

from mixdist.config.complaints import EXAMPLE, explain, said
from mixdist.config.lists import wrong_entry
from mixdist.config.places import near
from mixdist.messages import describe_failure, failing_class, last_own_line, one_line

_CLASS = ("class_path", "init_args")
set_parsing_settings(unset_sentinel=True)  # where None means that nothing is given, null is accepted for any type


def plain_parser(prog: str, description: str) -> ArgumentParser:
    """Make a parser without keys that raises instead of exiting and accepts no abbreviation."""
    return _Parser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)


class _Parser(ArgumentParser):
    """The library's, but that help on a class leaves out what its maker gives, also where null may stand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": _Help, **kwargs})  # the library makes some of help by itself

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        added: list[str] = super().add_class_arguments(*args, **kwargs)
        for action in self._actions:
            hints = get_args(getattr(action, "_typehint", None)) if action.dest.endswith(".help") else ()
            makers = [hint for hint in hints if get_origin(hint) is Callable]
            if len(makers) == 1:
                vars(action)["_typehint"] = makers[0]
        return added


class _Help(DefaultHelpFormatter):
    def _expand_help(self, action: Any) -> str:
        text = str(super()._expand_help(action))
        if text == "Path to a configuration file.":
            return f"a YAML file with the keys of {action.dest}"
        text = re.sub(r"<class '(\w+)'>", r"\1", text)
        text = re.sub(r"(\(required, .*), default: Unset", r"\1", text).replace("default: Unset", "default: null")
        while (short := re.sub(r"Callable\[\[(?:[^][]|\[[^][]*\])*\], (\w+)\]", r"\1", text)) != text:
            text = short  # a factory is told by what it makes, innermost ones first
        # A base class cannot be chosen.
        return re.sub(r"(\b(\w+)\b.*known subclasses: )[\w.]*\.\2, ", r"\1", text)


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parse arguments.

    Raises:
        ValueError: an unknown key, a wrong type, a missing file: one line.
    """
    for path in values_of(argv, "--config"):
        _check_yaml(path)
    if "" in sys.path:  # the parser changes directory while it reads a file, and classes lie in this one
        sys.path[sys.path.index("")] = os.getcwd()
    try:
        with explained(parser):
            parsed: Namespace = parser.parse_args(_nulls_as_json(parser, argv))
    except ValueError as error:
        raise ValueError(wrong_entry(str(error), parser, values_of(argv, "--config"), argv) or str(error)) from error
    for name, value in vars(parsed).items():
        if value is Unset:
            parsed[name] = None
    return parsed


def _nulls_as_json(parser: ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Give null for an argument of a class as JSON for that class: the parser would hand it on as the word None."""
    words: list[str] = []
    known, rest = parser._option_string_actions, iter(argv)
    for word in rest:
        option, equals, value = word.partition("=")
        ends = [end for end, letter in enumerate(option) if letter == "." and option[:end] in known]
        if not ends or option in known:
            words.append(word)
            continue
        given = [] if equals else list(islice(rest, 1))
        if "null" in (value, *given):
            inner: Any = None
            for key in reversed(option[ends[-1] + 1 :].split(".")):
                inner = {key: inner}
            words.append(f"{option[: ends[-1]]}={json.dumps(inner)}")
        else:
            words += [word, *given]
    return words


def values_of(argv: Sequence[str], option: str) -> list[str]:
    """Find what is given for an option, as ``--option VALUE`` or ``--option=VALUE``, before parsing."""
    given = [
        word.partition("=")[2] if "=" in word else "".join(argv[place : place + 1])
        for place, word in enumerate(argv, start=1)
        if word.partition("=")[0] == option
    ]
    return [value for value in given if value and not value.startswith("--")]


@contextmanager
def explained(parser: ArgumentParser) -> Iterator[None]:
    """Put what the parser objects to into plain words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    except SyntaxError as error:
        line = f"{error.filename} line {error.lineno}"
        raise ValueError(f"{line}, imported for a class of the config, is not Python ({error.msg}): fix it") from None
    except Exception as error:
        if told := _own_failure(error):
            raise ValueError(told) from error
        if isinstance(error, (ArgumentError, TypeError, AttributeError, ImportError)):
            raise ValueError(explain(str(error), parser)) from None
        if isinstance(error, ValueError):
            raise ValueError(said(str(error))) from None
        raise


def _own_failure(error: BaseException) -> str:
    """Return which class of the user's own cannot be made, and why; nothing where that is not what an error is of."""
    one: BaseException | None = error
    while one is not None:
        if not isinstance(one, (ValueError, OSError)) and last_own_line(one) and (kind := failing_class(one)):
            return f"{kind}.__init__ fails ({describe_failure(one)}): fix it"
        one = one.__cause__ or one.__context__
    return ""


def _check_yaml(path: str) -> None:
    """Check a config file against YAML's grammar; the parser itself lets the last of two equal keys win."""
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        told = getattr(error, "strerror", None) or one_line(str(error))
        raise ValueError(f"--config {path} cannot be read as YAML ({told}): give a file such as {EXAMPLE}") from None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"--config {path} has no keys: expected lines such as seed: 1; see {EXAMPLE}")
    nodes: list[yaml.Node] = [root]
    for node in nodes:  # which grows by what is inside; aliases may lead back
        if isinstance(node, yaml.SequenceNode):
            nodes += [inner for inner in node.value if inner not in nodes]
        elif isinstance(node, yaml.MappingNode):
            nodes += [inner for _, inner in node.value if inner not in nodes]
            for name, told in _wrong_keys(node):
                raise ValueError(f"--config {path} line {name.start_mark.line + 1}: the key {name.value} {told}")


def _wrong_keys(node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, str]]:
    """Yield keys that come twice, that a class does not have, or that have no section where one must be."""
    names = [str(name.value) for name, _ in node.value]
    for i, (name, value) in enumerate(node.value):
        guess = near(names[i], _CLASS)
        if names[i] in names[:i]:
            yield name, "comes twice in one section: keep one of the two"
        elif names[i] not in _CLASS and (guess or set(_CLASS) & set(names)):
            yield name, f"is unknown: {guess}a class takes {' and '.join(_CLASS)}"
        elif names[i] == "class_path" and value.tag.endswith(":null"):
            yield name, "(null) must be the import path of a class"
        elif names[i] == "init_args" and not isinstance(value, yaml.MappingNode):
            shown = value.value if isinstance(value, yaml.ScalarNode) else "a list"
            yield name, f"({shown}) must be a section with the arguments of the class"
