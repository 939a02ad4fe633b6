"""From arguments to what a command takes: the parser's settings, its help, and its complaints in one line.

Needs no torch.

The grammar is jsonargparse's: every dataclass field is a key, every key an option, and an unknown one is an error.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from mixdist.config.complaints import EXAMPLE, KINDS, choose, explain, find, keys_of, last_part
from mixdist.messages import one_line


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
            text = text.replace(f"{kind.module}.{kind.base_name}, ", "")  # a base class cannot be chosen
        text = re.sub(r"Callable\[\[.*\], (\w+)\]", r"\1", re.sub(r"<class '(\w+)'>", r"\1", text))
        return text.replace("known subclasses", "choose of")


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parse arguments.

    Raises:
        ValueError: an unknown key, a wrong type, a missing file: one line.
    """
    for path in values_of(argv, "--config"):
        _check_yaml(path, parser)
    _check_help(argv)
    with explained(parser, ArgumentError, TypeError, AttributeError, ImportError):
        parsed: Namespace = parser.parse_args(list(argv))
    return parsed


def values_of(argv: Sequence[str], option: str) -> list[str]:
    """Find what is given for an option, as ``--option VALUE`` or ``--option=VALUE``, before parsing."""
    given = [
        word.partition("=")[2] if "=" in word else "".join(argv[place : place + 1])
        for place, word in enumerate(argv, start=1)
        if word.partition("=")[0] == option
    ]
    return [value for value in given if value and not value.startswith("--")]


@contextmanager
def explained(parser: ArgumentParser, *errors: type[Exception]) -> Iterator[None]:
    """Put what the parser objects to into plain words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    except SyntaxError as error:
        line = f"{error.filename} line {error.lineno}"
        raise ValueError(f"{line}, imported for a class of the config, is not Python ({error.msg}): fix it") from None
    except errors as error:
        raise ValueError(explain(str(error), parser)) from None
    except ValueError as error:
        text = one_line(str(error))
        within = re.search(r"Errors: - (.*?) - Expected a <class 'NoneType'>", text)
        untyped = re.search(r"Parameter '(\w+)' from '(.*?)\.__init__' does not specify a type", text)
        if untyped:
            text = f"{untyped[2]} has an argument without a type, {untyped[1]}: write one, as in num_experts: int"
        raise ValueError(within[1] if within else text) from None


# Before the parser: what it would pass over or say badly.


def _check_help(argv: Sequence[str]) -> None:
    """Hold ``--KEY.help CLASS`` against the classes that there are; the parser would name no key."""
    for option in {word.partition("=")[0] for word in argv}:
        key = option.removeprefix("--").removesuffix(".help")
        kind = KINDS.get(last_part(key))
        if kind is None or option != f"--{key}.help":
            continue
        given = values_of(argv, option)
        if not given:
            raise ValueError(f"{option} needs a class: {choose(key)}")
        if not any(find(path) for path in (given[-1], f"{kind.module}.{given[-1]}")):
            raise ValueError(f"{option} {given[-1]} names no class that can be found: {choose(key)}")


def _check_yaml(path: str, parser: ArgumentParser) -> None:
    """Check a config file against YAML's grammar; the parser itself lets the last of two equal keys win."""
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
        raise ValueError(f"--config {path}{where} is not YAML ({one_line(problem)}): fix that line") from None
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
