"""The parser's complaints in plain words: one line with the key, the value, what was expected and the remedy.

jsonargparse's complaints nest like the config, ``Parser key "gate": ... Parser key "hidden": Expected a ...``: keys and
classes on the way say where, the innermost sentence says what. ``explain`` turns both into one line.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser

from mixdist.messages import one_line

EXAMPLE = "configs/digits_moe.yaml"


def explain(message: str, parser: ArgumentParser) -> str:
    """Say in one line what the parser objects to, and what to write instead."""
    for pattern, tell in _COMPLAINTS:
        found = re.search(pattern, message, flags=re.M)
        if found:
            return one_line(tell(found, _Place.of(message, found.start()), parser))
    return f"{one_line(message)}; see {parser.prog} --help"


class _Place(NamedTuple):
    """Where in a config a complaint belongs: the dotted key, and the class whose argument it is."""

    key: str
    class_path: str | None
    text: str

    @staticmethod
    def of(message: str, position: int) -> _Place:
        """Read the place of the complaint that begins at a position of the parser's message."""
        before, after = message[:position], message[position:]
        first, *rest = [*re.findall(r'Parser key "([^"]+)"', before), ""]
        key = first + "".join(f".init_args.{name}" for name in rest if name)
        for section in ("pretrain", "competition"):  # one is a list of sections, one may be left out: no classes
            key = key.replace(f"{section}.init_args.", f"{section}.")
        # A factory's class stands behind the complaint, any other class before it.
        path = re.findall(r"given class_path '([^']+)'|(expects a function or a callable class)", before)
        if path and path[-1][1]:
            path = [*re.findall(r"class_path='([^']+)'()", after)[:1]]
        return _Place(key, path[-1][0] if path else None, message)

    def inner(self, name: str) -> str:
        """Return the key of an argument of this place's class."""
        return f"{self.key}.{name}" if _is_section(self.class_path) else f"{self.key}.init_args.{name}"


def _is_section(class_path: str | None) -> bool:
    """Return whether what the parser calls a class is a section of a config."""
    return class_path is None or class_path.endswith((".Phase", ".Rules"))


Teller = Callable[[re.Match[str], _Place, ArgumentParser], str]


def _unknown_option(found: re.Match[str], place: _Place, parser: ArgumentParser) -> str:
    name = found["key"]
    if place.class_path:
        kind = KINDS.get(last_part(place.key))
        if kind is not None and find(place.class_path) is kind.base:
            return f"{place.key} has init_args ({name}) but no class_path: {choose(place.key)}"
        taken = _init_args(place.class_path)
        owner = place.key if _is_section(place.class_path) else place.class_path
        return f"unknown config key {place.inner(name)}: {_instead(name, taken)}{owner} takes {_listed(taken)}"
    group = found.groupdict().get("group")
    if group:
        taken = [k.removeprefix(f"{group}.") for k in keys_of(parser) if k.startswith(f"{group}.")]
        return f"unknown config key {group}.{name}: {_instead(name, taken)}{group} takes {_listed(taken)}"
    near = _instead(name, keys_of(parser))
    fields = [*find("mixdist.config.config.Config").__dataclass_fields__]
    return f"unknown config key {name}: {near}a config takes {_listed(fields)}"


def _unrecognized(found: re.Match[str], place: _Place, parser: ArgumentParser) -> str:
    word = found["words"].split()[0]
    if not word.startswith("-"):
        hint = f"write --config {word}" if word.endswith((".yaml", ".yml")) else "options begin with --"
        return f"unexpected word {word}: {hint}; see {parser.prog} --help"
    near = _near(word.lstrip("-").partition("=")[0], keys_of(parser)).replace("did you mean ", "did you mean --")
    return f"unknown option {word}: {near}see {parser.prog} --help for all options"


def _wrong_type(found: re.Match[str], place: _Place, parser: ArgumentParser) -> str:
    value = found["value"].partition(". Got value: Namespace(")[0]
    whole = re.search(rf"\b{last_part(place.key)}=(\[[^\]]*\])", place.text)
    return _expected(place.key, value if whole is None or value == whole[1] else f"{value} in {whole[1]}", [found[1]])


def _wrong_types(found: re.Match[str], place: _Place, parser: ArgumentParser) -> str:
    inside = place.text[found.start() :].partition("Given value type")
    value = re.search(r"Given value: (.*)", inside[2])
    text = value[1].partition(". Got value: Namespace(")[0] if value else "?"
    return _expected(place.key, text, re.findall(rf"- {_EXPECTED}", inside[0]))


def _expected(key: str, value: str, types: Sequence[str]) -> str:
    known = [_PLAIN[t] for t in types if t in _PLAIN]
    for text in types:
        if text.startswith("typing.Literal"):
            words = re.findall(r"'([^']*)'", text)
            known += [(word, word) for word in words]
    if not known:
        return f"{key} ({value}) has the wrong type: expected {' or '.join(types)}"
    if known == [_PLAIN["<class 'NoneType'>"]]:  # what else may stand there is a section, which has no plain type
        return f"{key} ({value}) must be a section of keys, or null: write them below {last_part(key)}:"
    spelled, examples = zip(*known, strict=True)
    close = difflib.get_close_matches(value, [e for e in examples if e.isalpha() and e != "null"], n=1, cutoff=0.5)
    example = "[{epochs: 1}]" if key == "pretrain" else [*close, *(e for e in examples if e != "null"), "null"][0]
    return f"{key} ({value}) must be {_alternatives(spelled)}: write {last_part(key)}: {example}, for example"


def _missing(found: re.Match[str], place: _Place, parser: ArgumentParser) -> str:
    keys = found["keys"].strip().split(", ")
    listed = ", ".join(place.inner(key) if place.key else key for key in keys)
    if "config" not in keys_of(parser):
        return f"{parser.prog} needs {', '.join(key.upper() for key in keys)}: see {parser.prog} --help"
    if place.class_path:
        return f"the config lacks {listed}, without which {place.class_path} cannot be made: add it"
    add = "add it" if len(keys) == 1 else "add them"
    return f"the config lacks {listed}: {add}, or begin with --config and a file such as {EXAMPLE}"


def _no_value(found: re.Match[str], place: _Place, parser: ArgumentParser) -> str:
    return f"{found['option']} has no value: write one behind it; see {parser.prog} --help"


def _no_class(found: re.Match[str], place: _Place, parser: ArgumentParser) -> str:
    sought = found["path"].strip("'\" ")
    if "member" in found.groupdict():
        sought = f"{sought}.{found['member']}"
    dotless = found[0].startswith("Expected a dot")  # the word itself was refused, nothing was imported
    path = sought if dotless else place.class_path or _given(place) or sought
    if path != sought and not path.startswith(f"{sought}."):
        return f"{place.key} names {path}, whose import failed ({found[0]}): fix that file, or install what it needs"
    near = _near(last_part(path), _known(place.key))
    own = "a file of your own must lie in the working directory or on PYTHONPATH"
    return f"{place.key} names the class {path}, which cannot be found: {near or choose(place.key) + '; '}{own}"


def _given(place: _Place) -> str | None:
    found = re.search(r"Got value: (?:Namespace\(class_path=')?([\w.]+)", place.text)
    return found[1] if found else None


def _wrong_kind(found: re.Match[str], place: _Place, parser: ArgumentParser) -> str:
    return f"{place.key} ({found['path']}) must be a subclass of {found['base']}: {choose(place.key)}"


def _abstract(found: re.Match[str], place: _Place, parser: ArgumentParser) -> str:
    return f"{place.key} ({found['path']}) is the base class of what can stand there: {choose(place.key)}"


def _no_python(found: re.Match[str], place: _Place, parser: ArgumentParser) -> str:
    return f"{found['file']} line {found['line']}, imported for {place.key}, is not Python ({found['what']}): fix it"


def _no_spec(found: re.Match[str], place: _Place, parser: ArgumentParser) -> str:
    value = found["value"].partition(". Got value: ")[0]
    with suppress(ValueError, SyntaxError):
        given = ast.literal_eval(value)
        extra = [name for name in given if name not in ("class_path", "init_args")] if isinstance(given, dict) else []
        if extra:
            near = _instead(extra[0], ("class_path", "init_args"))
            return f"unknown config key {place.key}.{extra[0]}: {near}a class takes class_path and init_args"
    return f"{place.key} ({value}) must have class_path and, where needed, init_args, no more: {choose(place.key)}"


_EXPECTED = r"Expected an? (<class '[^']+'>|typing\.Literal\[[^\]]*\])"
_COMPLAINTS: tuple[tuple[str, Teller], ...] = (
    (r"unrecognized arguments: (?P<words>.*)", _unrecognized),
    (r"argument (?P<option>--\S+): expected one argument", _no_value),
    (r"Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'", _unknown_option),
    (r"Option '(?P<key>[^']+)' is not accepted", _unknown_option),
    (r"arguments are required: (?P<keys>[\w., ]*\w)", _missing),
    (r"module '(?P<path>[^']+)' has no attribute '(?P<member>[^']+)'", _no_class),
    (r"No module named (?P<path>'[^']+')", _no_class),
    (r"Problem importing '(?P<path>[^']+)'", _no_class),
    (r"Expected '(?P<path>[^']+)' to be a subclass of <class '(?P<base>\w+)'>", _wrong_kind),
    (r"- (?P<what>[^\n]*) \((?P<file>\S+\.py), line (?P<line>\d+)\)", _no_python),
    (r"Expected an instantiatable class, but (?P<path>\S+) is abstract", _abstract),
    (r"Import path (?P<path>\S+) does not correspond to a subclass of (?P<base>\w+)", _wrong_kind),
    (r"Dict must include a class_path and optionally init_args, but got (?P<value>.*)", _no_spec),
    (r"Expected an import path or a subclass spec, but got (?P<value>.*)", _no_spec),
    (r"Not a valid subclass of \w+\. Got value: (?P<value>.*)", _no_spec),
    (rf"{_EXPECTED}\. Got value: (?P<value>.*)", _wrong_type),
    (rf"- (?!Expected a <class 'NoneType'>){_EXPECTED}$", _wrong_types),
    (r"Expected a dot import path string: (?P<path>\S+)", _no_class),
)
_LIST = ("a list", "[128, 64]")
_PLAIN = {
    "<class 'int'>": ("a whole number", "10"),
    "<class 'float'>": ("a number", "0.1"),
    "<class 'bool'>": ("true or false", "true"),
    "<class 'str'>": ("text", '"text"'),
    "<class 'NoneType'>": ("null", "null"),
    "<class 'list'>": _LIST,
    "<class 'tuple'>": _LIST,
    "<class 'collections.abc.Sequence'>": _LIST,
    "<class 'dict'>": ("a section of keys", "{}"),
}


class _Kind(NamedTuple):
    """What can stand at a key: subclasses of a base class, which is imported only where a complaint is about it."""

    module: str
    base_name: str
    example: str

    @property
    def base(self) -> type:
        made: type = getattr(importlib.import_module(self.module), self.base_name)
        return made


KINDS = {
    "data": _Kind("mixdist.data", "Source", "Digits"),
    "gate": _Kind("mixdist.gates", "Gate", "Softmax"),
    "expert": _Kind("mixdist.experts", "Expert", "VAE"),
    "objective": _Kind("mixdist.mixtures", "Objective", "WeightedLoss"),
    "score": _Kind("mixdist.competition", "Score", "Discriminators"),
    "network": _Kind("mixdist.nets", "Network", "MLP"),
    "balance": _Kind("mixdist.mixtures", "Balance", "VarianceBalance"),
    "optimizer": _Kind("torch.optim", "Optimizer", "Adam"),
    "schedule": _Kind("torch.optim.lr_scheduler", "LRScheduler", "StepLR"),
}


def _known(key: str) -> list[str]:
    """Name the classes that can stand at a key."""
    kind = KINDS.get(last_part(key))
    if kind is None:
        return []
    members = inspect.getmembers(importlib.import_module(kind.module))
    fitting = [n for n, m in members if inspect.isclass(m) and issubclass(m, kind.base) and m is not kind.base]
    return sorted(f"{kind.module}.{name}" for name in fitting if not name.startswith("_"))


def choose(key: str) -> str:
    known, kind = _known(key), KINDS.get(last_part(key))
    if kind is None:
        return "write class_path: package.module.Class"
    if len(known) > 8:
        return f"choose one of {kind.module}, such as {kind.module}.{kind.example}"
    return f"choose {_alternatives([*known, f'your own subclass of {kind.base_name}'])}"


def last_part(key: str) -> str:
    return re.sub(r"\[\d+\]", "", key).rpartition(".")[2]


def keys_of(parser: ArgumentParser) -> list[str]:
    kept = [action.dest for action in parser._actions if action.dest not in ("help", "print_config")]
    return list(dict.fromkeys(key for key in kept if not key.endswith(".help")))


def _near(word: str, known: Sequence[str]) -> str:
    """Ask for the known name most like a word, in whole or by its last part; empty where none is."""
    whole, last = {k.lower(): k for k in known}, {last_part(k).lower(): k for k in reversed(known)}
    for names, sought, cutoff in ((whole, word, 0.8), (last, last_part(word), 0.6)):
        close = difflib.get_close_matches(sought.lower(), names, n=1, cutoff=cutoff)
        if close:
            return f"did you mean {names[close[0]]}? "
    return ""


def _instead(name: str, taken: Sequence[str]) -> str:
    return _near(name, taken) or "remove it; "


def _alternatives(words: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words) or "no arguments"


def find(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


def _init_args(class_path: str) -> list[str]:
    """Name what a class takes from a config."""
    try:
        parameters = list(inspect.signature(find(class_path)).parameters.values())
    except (ValueError, TypeError):
        return []
    made = find(class_path)
    nothing = _is_section(class_path) or (inspect.isclass(made) and issubclass(made, find("mixdist.competition.Score")))
    handed_in = () if nothing else ("spec", "num_experts", "params", "optimizer")
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        # What **options hand on to a base class only the parser knows.
        return ArgumentParser().add_class_arguments(find(class_path), fail_untyped=False, skip=set(handed_in))
    return [p.name for p in parameters if p.kind != p.VAR_POSITIONAL and p.name not in handed_in]
