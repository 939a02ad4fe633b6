"""Which entry of a list is wrong: the parser names a list's key alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from mixdist.config.complaints import CONFIG, explain_at
from mixdist.config.places import Place

_ENTRY = "entry"


def wrong_entry(told: str, parser: ArgumentParser, configs: Sequence[str], argv: Sequence[str]) -> str | None:
    """Return what is wrong with the first bad entry of a list that a complaint may be of, by its place in the list.

    Args:
        told: the complaint, which names the list's key.
        parser: makes the parsers of one entry each, which are of its class.
        configs: YAML files, as given.
        argv: the command's words: a list may be an option's value.

    Returns:
        the complaint about the entry, ``mixture.expert[2].latnt`` in place of ``mixture.expert.latnt``; None where no
        list is to blame.
    """
    for place, value in _given(configs, argv):
        for entry, inside in _entries(place, value):
            owner = entry.key.rpartition("[")[0]
            if any(f" {owner}{end}" in f" {told}" for end in " .:") and (found := _complaint(entry, inside, parser)):
                return found
    return None


def _given(configs: Sequence[str], argv: Sequence[str]) -> Iterator[tuple[Place, Any]]:
    """Yield places and the values that are given for them: whole files, then options with lists or sections."""
    root = Place("", None, CONFIG)
    read = [yaml.safe_load(Path(path).read_text(encoding="utf-8")) for path in configs]
    for one in read:
        for name, value in one.items():
            yield root.inner(str(name)), value
    for word, after in zip(argv, [*argv[1:], ""], strict=False):  # of no words there is none after
        option, equals, value = word.partition("=")
        text = value if equals else after
        if option.startswith("--") and text.lstrip().startswith(("[", "{")):
            with suppress(yaml.YAMLError):
                yield _at(root, option[2:].split("."), read), yaml.safe_load(text)


def _at(place: Place, names: Sequence[str], nodes: Sequence[Any]) -> Place:
    """Return the place of a dotted option; the classes on its way are those of the files."""
    for name in names:
        nodes = [node.get("init_args", node).get(name) for node in nodes if isinstance(node, dict)]
        nodes = [node for node in nodes if isinstance(node, dict)]
        place = place.inner(name)
        for node in nodes:
            place = place._replace(path=node.get("class_path", place.path))
    return place


def _entries(place: Place, value: Any) -> Iterator[tuple[Place, Any]]:
    """Yield the entries of all lists of classes and sections, with their places; inner ones first."""
    if isinstance(value, list) and (hint := place.of_list()) is not None:
        for number, inner in enumerate(value):
            entry = Place(f"{place.key}[{number}]", hint)
            yield from _entries(entry, inner)
            yield entry, inner
    elif isinstance(value, dict):
        inside = value
        if isinstance(value.get("class_path"), str):
            place, inside = place._replace(path=value["class_path"]), value.get("init_args") or {}
        for name, inner in inside.items() if isinstance(inside, dict) else ():
            yield from _entries(place.inner(str(name)), inner)


def _complaint(entry: Place, value: Any, parser: ArgumentParser) -> str | None:
    """Return what a parser of this entry alone says; None where it is right."""
    alone = type(parser)(prog=parser.prog, exit_on_error=False)
    alone.add_argument(f"--{_ENTRY}", type=list[entry.hint])  # type: ignore[name-defined]
    try:
        alone.parse_object({_ENTRY: [value]})
    except (ArgumentError, TypeError, AttributeError, ImportError, ValueError) as error:
        return explain_at(entry, str(error).removeprefix(f'Parser key "{_ENTRY}":'), alone)
    return None
