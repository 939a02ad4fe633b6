"""What can stand where in a config, read from the annotations of the classes on the way. Needs no torch."""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser, Namespace

_LONGEST = 80
PLAIN = (int, type(None))
"""Types that may stand in place of a section, where the annotation has them."""


class Place(NamedTuple):
    """A key of a config: its name as a dotted option, its annotation, and the import path of the class given for it."""

    key: str
    hint: Any
    path: str | None = None

    @property
    def base(self) -> Any:
        """The class that what stands here is, or makes, one of; None where a plain value stands."""
        return next(iter(_bases(self.hint)), None)

    @property
    def made(self) -> Any:
        """The class that is given here, else the one that must stand here."""
        return (find(self.path) if self.path else None) or self.base

    def inner(self, name: str) -> Place:
        """Return the place of an argument of what stands here."""
        hints: dict[str, Any] = {}
        for one in reversed(getattr(self.made, "__mro__", ())):
            with suppress(NameError, TypeError):
                hints |= typing.get_type_hints(one.__init__)
        return Place(f"{self.key}.{name}".lstrip("."), hints.get(name))

    def of_list(self) -> Any:
        """Return the annotation of an entry, where a list of classes or of sections can stand here; else None."""
        return next((hint for hint in _lists(self.hint) if _bases(hint)), None)

    def arguments(self) -> list[str]:
        """Return the names that a config can set here, those inside a section dotted."""
        handed_in = _num_handed_in(self.hint)
        skip: set[str | int] = {handed_in} if handed_in else set()
        return ArgumentParser().add_class_arguments(self.made, fail_untyped=False, skip=skip)

    def is_section(self) -> bool:
        """Return whether keys stand below this one, and no class can be chosen."""
        return dataclasses.is_dataclass(self.base) and not self.choices()

    def is_base(self) -> bool:
        """Return whether the class given is that of which a subclass must be given."""
        return self.made is self.base and bool(self.choices())

    def choices(self) -> list[str]:
        """Return the import paths of the classes for this place that a package offers."""
        found = [] if self.base is None else [self.base]
        for one in found:  # which grows
            found += one.__subclasses__()
        paths = {_public_path(one, self.base.__module__) for one in found[1:] if not inspect.isabstract(one)}
        return sorted(path for path in paths if path)

    def wants(self) -> str:
        """Return what must stand here, where it is no plain value."""
        if self.is_section():
            return f"a section with the keys {', '.join(field.name for field in dataclasses.fields(self.base))}"
        return f"the import path of a subclass of {getattr(self.base, '__name__', 'a class')}"

    def must_be(self, expected: Sequence[str], given: str, why: str = "") -> str:
        """Return that what is given here must be something else, and what."""
        given = "null" if given == "None" else given
        shown = f" ({given[:_LONGEST]}{' ...' if len(given) > _LONGEST else ''})" if given else ""
        wanted = " or ".join(filter(None, [", ".join(expected[:-1]), expected[-1]]))
        classes = self.remedy(given) if self.wants() in expected and not self.is_section() else ""
        remedy = near(given, expected) or classes
        return f"{self.key}{shown} must be {wanted}{why and f' ({why})'}{remedy and f': {remedy}'}"

    def remedy(self, given: str) -> str:
        """Return the class that a word may have meant, or those to choose from."""
        known = self.choices() or list(filter(None, [_public_path(self.base, self.base.__module__)]))
        own = "a file of your own must lie in the working directory or on PYTHONPATH"
        return (near(given, known) or f"choose {', '.join(known)}; " if known else "") + own

    def check(self, value: Any) -> None:
        """Check what was parsed: the parser accepts functions and base classes as classes, and anything as a section.

        Raises:
            ValueError: nothing can be made of it.
        """
        if isinstance(value, list):
            for number, inner in enumerate(value):
                Place(f"{self.key}[{number}]", self.of_list()).check(inner)
        elif isinstance(value, Namespace):
            place, inside = self, value
            if "class_path" in value:
                place, inside = self._replace(path=value.class_path), value.get("init_args") or Namespace()
                if not inspect.isclass(place.made) or place.is_base():
                    raise ValueError(place.must_be([place.wants()], value.class_path))
            for name, inner in vars(inside).items():
                place.inner(name).check(inner)
        elif self.is_section() and not isinstance(value, tuple(t for t in typing.get_args(self.hint) if t in PLAIN)):
            raise ValueError(self.must_be([self.wants()], str(value)))


def find(path: str) -> Any:
    """Return what an import path names; None where there is nothing."""
    module, _, name = path.rpartition(".")
    with suppress(ImportError, AttributeError, ValueError, SyntaxError):
        return getattr(importlib.import_module(module), name)
    return None


def near(word: str, known: Sequence[str]) -> str:
    """Ask for the known name most like a word, in whole or by its last part; empty where none is."""
    whole = {name.lower(): name for name in known}
    last = {name.lower().rpartition(".")[2]: name for name in reversed(known) if "." in name}
    for names, sought, cutoff in ((whole, word, 0.75), (last, word.rpartition(".")[2], 0.6)):
        close = difflib.get_close_matches(sought.lower(), names, n=1, cutoff=cutoff)
        if close:
            return f"did you mean {names[close[0]]}? "
    return ""


def _bases(hint: Any) -> list[type]:
    """Return the classes in an annotation that are no plain values; of a factory, those that it makes."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is collections.abc.Callable:
        arguments = arguments[-1:]
    if arguments:
        return [base for argument in arguments for base in _bases(argument)]
    return [hint] if inspect.isclass(hint) and hint.__module__ != "builtins" else []


def _lists(hint: Any) -> list[Any]:
    """Return the annotations of the entries of lists in an annotation."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (list, collections.abc.Sequence):
        return [arguments[0]]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [entry for argument in arguments for entry in _lists(argument)]
    return []


def _num_handed_in(hint: Any) -> int:
    """Return how many arguments a factory takes, which a config cannot set."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is collections.abc.Callable:
        return len(arguments[0])
    return max(map(_num_handed_in, arguments), default=0)


def _public_path(one: type, home: str) -> str | None:
    """Return the shortest import path of a class in a package, or in the module of its base class."""
    parts = one.__module__.split(".")
    for name in (".".join(parts[:end]) for end in range(1, len(parts) + 1)):
        module = sys.modules.get(name)
        if getattr(module, one.__name__, None) is one and (hasattr(module, "__path__") or name == home):
            return None if one.__name__.startswith("_") else f"{name}.{one.__name__}"
    return None
