"""The parser's complaints in plain words: one line with the key, the value, what was expected and the remedy.

jsonargparse's complaints nest like the config, ``Parser key "gate": ... Parser key "hidden": Expected a ...``: the keys
and classes on the way say where, the innermost sentence says what. What can stand there is read from the annotations
of the classes on the way, so that no key needs to be known here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from mixdist.config.places import Place, find, near
from mixdist.messages import one_line

CONFIG = "mixdist.config.config.Config"
EXAMPLE = "configs/digits_moe.yaml"
_HEADER = re.compile(
    r'Parser key "(?P<key>[^"]+)":\s*'
    r"|Problem with given class_path '(?P<path>[^']+)':\s*"
    r"|(?P<factory>Type .*? expects a function or a callable class: )"
)
_NOISE = re.compile(
    r'Does not|Subtypes:|Errors:|Given value|Subclass types|a class path|a dict with|.*": Unable to load'
)
_UNKNOWN = re.compile(r"(?:Group '([^']+)' does not accept o|O)ption '([^']+)'|unrecognized arguments: --(\w+)\.(\w+)=")
_NO_CLASS = re.compile(r"import path|Import path|subclass|class_path|is abstract|Unable to load config")
_VALUE = re.compile(
    r"(?:G[oi][tv]\w* value:|import path string:|Import path|class, but|Unable to load config) "
    r"(?:NestedArg\(key='\w+', val=)?(.*)"
)
_OF_FAMILIES = ("gate", "expert", "num_experts", "routing", "execution", "compute", "score", "rounds")
_PLAIN = {
    "int": "a whole number such as 10",
    "float": "a number such as 0.1",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "list": "a list such as [128, 64]",
    "tuple": "a list such as [128, 64]",
    "collections.abc.Sequence": "a list such as [128, 64]",
    "dict": "a section of keys",
}


def explain(message: str, parser: ArgumentParser) -> str:
    """Return in one line what the parser objects to, and what to write instead."""
    return explain_at(Place("", None, CONFIG if "config" in keys_of(parser) else None), message, parser)


def explain_at(root: Place, message: str, parser: ArgumentParser) -> str:
    """Return what the parser objects to in what stands at a place."""
    place, sentences, rest = _innermost(message, root)
    for sentence in sentences:
        told = _unknown(sentence, place, parser) or _missing(sentence, place, parser)
        if told:
            return one_line(told)
    value = _VALUE.search(rest)
    given = re.split(r"\. Got value: Namespace\(| does not correspond| is abstract", value[1])[0] if value else ""
    if inspect.isabstract(made := find(given)):
        missing = " and ".join(sorted(made.__abstractmethods__))
        return f"{place.key} ({given}) cannot be made without {missing}: write what is missing, or choose another class"
    expected, why = _expected(sentences, place)
    if not expected or not place.key:
        return f"{place.key}: {one_line(sentences[0])}; see {parser.prog} --help".removeprefix(": ")
    return one_line(place.must_be(expected, place.path if place.path and place.wants() in expected else given, why))


def said(message: str) -> str:
    """Return in one line what a class said of its arguments, without what the parser tried beside it."""
    if "Does not validate" in message:
        sentences = _innermost(message, Place("", None))[1]
        message = next((text for text in sentences if not text.startswith("Expected a")), message)
    return one_line(message)


def keys_of(parser: ArgumentParser) -> list[str]:
    """Return the keys of a parser, those of its sections dotted."""
    kept = [action.dest for action in parser._actions if not action.dest.endswith("help")]
    return list(dict.fromkeys(key for key in kept if not key.startswith("print_")))


def _innermost(message: str, root: Place) -> tuple[Place, list[str], str]:
    """Return the deepest place that a message speaks of, what it says there, and the message from there on."""
    stack: list[tuple[int, re.Match[str]]] = []
    leaves: list[tuple[list[re.Match[str]], str, str]] = []
    lines = message.splitlines()
    for number, line in enumerate(lines):
        text = line.lstrip().removeprefix("- ")
        depth = len(line) - len(text)
        while stack and stack[-1][0] >= depth + (not line.lstrip().startswith("- ")):
            stack.pop()
        while not _NOISE.match(text) and (header := _HEADER.match(text)):
            stack.append((depth, header))
            text = text[header.end() :]
        if text and not _NOISE.match(text):
            leaves.append(([header for _, header in stack], text, "\n".join([text, *lines[number + 1 :]])))
    depths = [sum(bool(header["key"]) for header in headers) for headers, _, _ in leaves]
    headers, _, rest = leaves[depths.index(max(depths))]
    sentences = [text for (_, text, _), depth in zip(leaves, depths, strict=True) if depth == max(depths)]
    return _follow(headers, rest, root), sentences, rest


def _follow(headers: Sequence[re.Match[str]], rest: str, place: Place) -> Place:
    """Go from the root to where the headers lead."""
    # The class of a factory is told behind what is wrong with it, the innermost first.
    made = re.findall(r"Got value: Namespace\((?:init_args=.*?, )?class_path='([^']+)'", rest)
    factories = made[: sum(bool(header["factory"]) for header in headers)]
    for header in headers:
        if header["key"]:
            for name in header["key"].split("."):
                place = place.inner(name)
        elif header["path"] or factories:
            place = place._replace(path=header["path"] or factories.pop())
    return place


def _unknown(sentence: str, place: Place, parser: ArgumentParser) -> str | None:
    """Return what to say of a key or a word that nothing takes."""
    found = _UNKNOWN.search(sentence)
    if found:
        group, name = found[1] or found[3], (found[2] or found[4]).partition(".")[0]
        place = place.inner(group) if group else place
        if place.path and place.is_base():
            return f"{place.key} has no class_path ({name} is given): {place.remedy('')}"
        taken = place.arguments() if place.made else keys_of(parser)
        owner = (place.key and (place.path or place.key)) or "a config"
        listed = ", ".join(dict.fromkeys(key.partition(".")[0] for key in taken)) or "no arguments"
        guess = near(name, taken if place.key else keys_of(parser)) or "remove it; "
        if not place.key and name in _OF_FAMILIES:
            guess = "it belongs under mixture.init_args; "
        return f"unknown config key {place.inner(name).key}: {guess}{owner} takes {listed}"
    if not sentence.startswith("unrecognized arguments: "):
        return None
    word = sentence.split()[2]
    guess = near(word.lstrip("-").partition("=")[0], keys_of(parser)).replace("mean ", "mean --")
    what, guess = ("option", guess) if word.startswith("-") else ("word", "options begin with --, as --config FILE; ")
    return f"unknown {what} {word}: {guess}see {parser.prog} --help"


def _missing(sentence: str, place: Place, parser: ArgumentParser) -> str | None:
    """Return what to say of keys that are not given."""
    found = re.search(r"arguments are required: ([\w., ]*\w)", sentence)
    if not found:
        return None
    if "config" not in keys_of(parser):
        return f"{parser.prog} needs {found[1].upper()}: see {parser.prog} --help"
    keys = ", ".join(place.inner(name).key for name in found[1].split(", "))
    if place.key:
        return f"the config lacks {keys}, which {place.path or place.key} needs: add it"
    return f"the config lacks {keys}: write what is missing, or begin with --config and a file such as {EXAMPLE}"


def _expected(sentences: Sequence[str], place: Place) -> tuple[list[str], str]:
    """Return what could stand at a place by what the parser tried in turn, and why no class could."""
    expected, why = [], ""
    for sentence in sentences:
        plain = re.match(r"Expected an? <class '([\w.]+)'>", sentence)
        if plain and plain[1] in _PLAIN:
            expected.append(_PLAIN[plain[1]] if place.base is None else _PLAIN[plain[1]].partition(" such as")[0])
        elif sentence.startswith("Expected a typing.Literal"):
            expected += re.findall(r"'([^']*)'", sentence.partition("]")[0])
        elif place.base is not None and "a number" not in expected:
            expected.append(place.wants())
            said = sentence.partition(". Got value")[0]
            why = "" if _NO_CLASS.search(said) else said
    return list(dict.fromkeys(expected)), why
