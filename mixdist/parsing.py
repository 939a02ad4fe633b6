"""From words and YAML to a Config, and from the parser's complaints to one line that helps.

The grammar is jsonargparse's: every dataclass field is a key, every key an option, and an unknown one is an error.
Its complaints nest like the config, ``Parser key "gate": ... Parser key "hidden": Expected a ...``: keys and classes on
the way say where, the innermost sentence says what. ``explain`` turns both into one line.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mixdist.config import Config, check
from mixdist.data import Source
from mixdist.experts import Expert
from mixdist.gates import Gate
from mixdist.objectives import Balance, Objective
from mixdist.trainer import Phase

RESOLVED = "config.yaml"
EXAMPLE = "configs/digits_moe.yaml"


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
        kind = _KINDS.get(_last(key))
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
        _try_out(f"pretrain[{i}]", phase)
    _try_out("train", config.train)
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


def one_line(text: str) -> str:
    """Put a message on one line."""
    return " ".join(text.split())


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
    _check_node(root, path, "", _keys(parser), set())


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
    made = _find(class_path)
    kind = _KINDS.get(_last(key))
    if made is not None and not inspect.isclass(made):
        raise ValueError(f"{key} ({class_path}) must be a class: {_choose(key)}")
    if kind is not None and made is kind.base:
        raise ValueError(f"{key} ({class_path}) is the base class of what can stand there: {_choose(key)}")


def _try_out(name: str, phase: Phase) -> None:
    """Step a phase's optimiser and schedule once on one number: better now than after the phases before it."""
    number = torch.nn.Parameter(torch.zeros(1))
    number.grad = torch.zeros(1)
    part, remedy = "optimizer", "choose one that works element by element, such as torch.optim.Adam"
    try:
        optimizer = phase.optimizer([number])
        with suppress(AssertionError):  # capturable optimisers want CUDA
            optimizer.step()
        part, remedy = "schedule", "choose one that needs no metric, such as torch.optim.lr_scheduler.StepLR"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch would have it made before the step
            if phase.schedule is not None:
                phase.schedule(optimizer).step()
    except (TypeError, ValueError, RuntimeError) as error:
        told = one_line(str(error))
        raise ValueError(f"{name}.{part} cannot be used ({told}): change its init_args, or {remedy}") from None


# After the parser: its complaints in plain words.


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
        before, after = message[:position], message[position:]
        first, *rest = [*re.findall(r'Parser key "([^"]+)"', before), ""]
        key = first + "".join(f".init_args.{name}" for name in rest if name)
        key = key.replace("pretrain.init_args.", "pretrain.")  # its elements are sections, not classes
        # A factory's class stands behind the complaint, any other class before it.
        path = re.findall(r"given class_path '([^']+)'|(expects a function or a callable class)", before)
        if path and path[-1][1]:
            path = [*re.findall(r"class_path='([^']+)'()", after)[:1]]
        return _Place(key, path[-1][0] if path else None, message)

    def inner(self, name: str) -> str:
        """Give the key of an argument of this place's class."""
        section = self.class_path is None or self.class_path.endswith(".Phase")
        return f"{self.key}.{name}" if section else f"{self.key}.init_args.{name}"


Teller = Callable[[re.Match[str], _Place, ArgumentParser], str]


def _unknown_option(found: re.Match[str], place: _Place, parser: ArgumentParser) -> str:
    name = found["key"]
    if place.class_path:
        kind = _KINDS.get(_last(place.key))
        if kind is not None and _find(place.class_path) is kind.base:
            return f"{place.key} has init_args ({name}) but no class_path: {_choose(place.key)}"
        taken = _init_args(place.class_path)
        owner = place.key if place.class_path.endswith(".Phase") else place.class_path
        return f"unknown config key {place.inner(name)}: {_instead(name, taken)}{owner} takes {_listed(taken)}"
    group = found.groupdict().get("group")
    if group:
        taken = [k.removeprefix(f"{group}.") for k in _keys(parser) if k.startswith(f"{group}.")]
        return f"unknown config key {group}.{name}: {_instead(name, taken)}{group} takes {_listed(taken)}"
    near = _instead(name, _keys(parser))
    return f"unknown config key {name}: {near}a config takes {_listed([*Config.__dataclass_fields__])}"


def _unrecognized(found: re.Match[str], place: _Place, parser: ArgumentParser) -> str:
    word = found["words"].split()[0]
    if not word.startswith("-"):
        hint = f"write --config {word}" if word.endswith((".yaml", ".yml")) else "options begin with --"
        return f"unexpected word {word}: {hint}; see {parser.prog} --help"
    near = _near(word.lstrip("-").partition("=")[0], _keys(parser)).replace("did you mean ", "did you mean --")
    return f"unknown option {word}: {near}see {parser.prog} --help for all options"


def _wrong_type(found: re.Match[str], place: _Place, parser: ArgumentParser) -> str:
    value = found["value"].partition(". Got value: Namespace(")[0]
    whole = re.search(rf"\b{_last(place.key)}=(\[[^\]]*\])", place.text)
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
    spelled, examples = zip(*known, strict=True)
    close = difflib.get_close_matches(value, [e for e in examples if e.isalpha() and e != "null"], n=1, cutoff=0.5)
    example = "[{epochs: 1}]" if key == "pretrain" else [*close, *(e for e in examples if e != "null"), "null"][0]
    return f"{key} ({value}) must be {_alternatives(spelled)}: write {_last(key)}: {example}, for example"


def _missing(found: re.Match[str], place: _Place, parser: ArgumentParser) -> str:
    keys = found["keys"].strip().split(", ")
    listed = ", ".join(place.inner(key) if place.key else key for key in keys)
    if "config" not in _keys(parser):
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
    path = place.class_path or _given(place) or sought
    if path != sought and not path.startswith(f"{sought}."):
        return f"{place.key} names {path}, whose import failed ({found[0]}): mend that file, or install what it needs"
    near = _near(_last(path), _known(place.key))
    own = "a file of your own must lie in the working directory or on PYTHONPATH"
    return f"{place.key} names the class {path}, which cannot be found: {near or _choose(place.key) + '; '}{own}"


def _given(place: _Place) -> str | None:
    found = re.search(r"Got value: (?:Namespace\(class_path=')?([\w.]+)", place.text)
    return found[1] if found else None


def _wrong_kind(found: re.Match[str], place: _Place, parser: ArgumentParser) -> str:
    return f"{place.key} ({found['path']}) must be a subclass of {found['base']}: {_choose(place.key)}"


def _no_spec(found: re.Match[str], place: _Place, parser: ArgumentParser) -> str:
    value = found["value"].partition(". Got value: ")[0]
    with suppress(ValueError, SyntaxError):
        given = ast.literal_eval(value)
        extra = [name for name in given if name not in ("class_path", "init_args")] if isinstance(given, dict) else []
        if extra:
            near = _instead(extra[0], ("class_path", "init_args"))
            return f"unknown config key {place.key}.{extra[0]}: {near}a class takes class_path and init_args"
    return f"{place.key} ({value}) must have class_path and, where needed, init_args, no more: {_choose(place.key)}"


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
    base: type
    module: str
    example: str


_KINDS = {
    "data": _Kind(Source, "mixdist.data", "Digits"),
    "gate": _Kind(Gate, "mixdist.gates", "Softmax"),
    "expert": _Kind(Expert, "mixdist.experts", "VAE"),
    "objective": _Kind(Objective, "mixdist.objectives", "WeightedLoss"),
    "balance": _Kind(Balance, "mixdist.objectives", "VarianceBalance"),
    "optimizer": _Kind(Optimizer, "torch.optim", "Adam"),
    "schedule": _Kind(LRScheduler, "torch.optim.lr_scheduler", "StepLR"),
}


def _known(key: str) -> list[str]:
    """Name the classes that can stand at a key."""
    kind = _KINDS.get(_last(key))
    if kind is None:
        return []
    members = vars(importlib.import_module(kind.module)).items()
    fitting = [n for n, m in members if inspect.isclass(m) and issubclass(m, kind.base) and m is not kind.base]
    return sorted(f"{kind.module}.{name}" for name in fitting if not name.startswith("_"))


def _choose(key: str) -> str:
    known, kind = _known(key), _KINDS.get(_last(key))
    if kind is None:
        return "write class_path: package.module.Class"
    if len(known) > 6:
        return f"choose one of {kind.module}, such as {kind.module}.{kind.example}"
    return f"choose {_alternatives([*known, f'your own subclass of {kind.base.__name__}'])}"


def _last(key: str) -> str:
    return re.sub(r"\[\d+\]", "", key).rpartition(".")[2]


def _keys(parser: ArgumentParser) -> list[str]:
    kept = [action.dest for action in parser._actions if action.dest not in ("help", "print_config")]
    return list(dict.fromkeys(key for key in kept if not key.endswith(".help")))


def _near(word: str, known: Sequence[str]) -> str:
    """Ask for the known name most like a word, in whole or by its last part; empty where none is."""
    whole, last = {k.lower(): k for k in known}, {_last(k).lower(): k for k in reversed(known)}
    for names, sought, cutoff in ((whole, word, 0.8), (last, _last(word), 0.6)):
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


def _find(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


def _init_args(class_path: str) -> list[str]:
    """Name what a class takes from a config."""
    try:
        parameters = inspect.signature(_find(class_path)).parameters.values()
    except (ValueError, TypeError):
        return []
    handed_in = () if class_path.endswith(".Phase") else ("spec", "num_experts", "params", "optimizer")
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [name for name in named if name not in handed_in]
