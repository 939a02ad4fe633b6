"""What a rank was started with, as names and values that must be the same on every rank."""

from __future__ import annotations

import ast
import inspect
import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from mixdist.config.config import Config
from mixdist.config.parsing import plain
from mixdist.config.places import find
from mixdist.parallel.identity import source_of

_DIRECTORIES = ("out", "resume", "run")
_INSTALLED = tuple(
    os.path.join(os.path.realpath(sysconfig.get_path(kind)), "")
    for kind in ("stdlib", "platstdlib", "purelib", "platlib")
)


def card(command: str, parsed: Namespace) -> dict[str, Any]:
    """Return what must be the same on every rank: the config, other options, the sources of the user's own classes.

    Keys are dotted options. A path under ``data`` counts as one that is given, whatever it is: hosts may have copies of
    the data in different places, and rows are compared once they are loaded.

    Args:
        command: what the ranks do.
        parsed: all keys of a config, and the command's own options.
    """
    found: dict[str, Any] = {"command": command}
    names = [name for name in (*Config.__dataclass_fields__, *vars(parsed)) if name != "config"]
    given = {name: plain(parsed[name]) for name in dict.fromkeys(names)}
    for name, value in given.items():
        if name in _DIRECTORIES and value is not None:
            found[name] = os.path.normpath(value)
        else:
            found |= flat(name, value)
    for name, value in found.items():
        if name.startswith("data.") and isinstance(value, str) and (os.sep in value or os.path.exists(value)):
            found[name] = "a path"
    return found | {f"source of {name}": source_of(path) for name, path in _sources(given)}


def flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the keys below a value, as dotted options, with their values."""
    if isinstance(value, dict) and isinstance(value.get("class_path"), str):
        yield key, value["class_path"]
        for part in ("init_args", "dict_kwargs"):
            for name, inner in (value.get(part) or {}).items():
                yield from flat(f"{key}.{name}", inner)
    elif isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from flat(f"{key}.{name}", inner)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for i, inner in enumerate(value):
            yield from flat(f"{key}[{i}]", inner)
    else:
        yield key, value


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("class_path"), str):
            yield value["class_path"]
        value = list(value.values())
    for inner in value if isinstance(value, list) else ():
        yield from _class_paths(inner)


def _sources(given: Any) -> Iterator[tuple[str, Path]]:
    """Yield name and file of the modules of a config's classes and of what they derive from, outside mixdist and torch.

    Of modules that are not installed, also the modules that theirs import and that are not installed either.
    """
    made = [find(path) for path in _class_paths(given)]
    classes = [base for one in made for base in getattr(one, "__mro__", [one] if inspect.isroutine(one) else [])]
    names = [base.__module__ for base in classes]
    known: set[str] = set()
    for name in names:  # which grows
        file = None if name in known else _file(name)
        known.add(name)
        if file is None or name.partition(".")[0] in ("mixdist", "torch"):
            continue
        yield name, file
        if not _is_installed(file):
            imported = _imported(name, file)
            names += [other for other in imported if (found := _file(other)) is not None and not _is_installed(found)]


def _imported(name: str, file: Path) -> list[str]:
    """Return the modules that a module's text imports, wherever that stands, and the packages it lies in."""
    found = [name[:end] for end, letter in enumerate(name) if letter == "."]
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    with suppress(OSError, SyntaxError, ValueError, ImportError):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                found += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = resolve_name("." * node.level + (node.module or ""), package)
                found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return found


def _file(name: str) -> Path | None:
    """Return the file of a module; None for what is no module, or part of Python."""
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names:
        return None
    if name in sys.modules:
        file = getattr(sys.modules[name], "__file__", None)
        return None if file is None else Path(file)
    if top != name and ((found := _file(top)) is None or _is_installed(found)):
        return None  # else looking for it would import an installed package
    with suppress(ImportError, ValueError, AttributeError):  # it is imported when a function runs
        spec = find_spec(name)
        return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None
    return None


def _is_installed(file: Path) -> bool:
    return os.path.realpath(file).startswith(_INSTALLED)
