"""Arguments given in Python, held against their annotations: what a parser does for a config."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from numbers import Integral, Real
from os import PathLike
from typing import Any, Literal, cast

from torch import nn

_PLAIN: dict[Any, tuple[Any, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: ((str, PathLike), "text"),
}
_SHOWN, _CALLABLE = 40, "a class or a function"


def check_arguments(function: Callable[..., Any], given: Mapping[str, Any], key: str = "") -> None:
    """Check the arguments of a function by its annotations; what an annotation does not say is not checked.

    Args:
        function: such as ``Soft.__init__``.
        given: its arguments by name, such as ``locals()`` on its first line.
        key: stands before each name in messages, such as "mixture.".

    Raises:
        ValueError: an argument is of another type, or none of the words that it may be.

    Examples:
        >>> from mixdist.arguments import check_arguments
        >>> def f(rows: int, order: Literal["full", "blocks"] = "full") -> None: ...
        >>> check_arguments(f, {"rows": 2, "order": "full"})
        >>> check_arguments(f, {"rows": 2.5}, "data.")
        Traceback (most recent call last):
        ...
        ValueError: data.rows (2.5) must be a whole number: give one
    """
    for name, hint in _hints(function).items():
        if name in given and name != "return":
            check_argument(f"{key}{name}", given[name], hint)


def check_fields(one: Any, key: str = "", but: Sequence[str] = ()) -> None:
    """Check the fields of a dataclass, but for some, by their annotations.

    Other arguments and errors are those of ``check_arguments``.
    """
    hints = _hints(cast(Hashable, type(one)))
    for field in fields(one):
        if field.init and field.name in hints and field.name not in but:
            check_argument(f"{key}{field.name}", getattr(one, field.name), hints[field.name])


def check_argument(key: str, value: Any, hint: Any) -> None:
    """Check one argument.

    Raises:
        ValueError: it does not fit.
    """
    wanted = _wanted(hint, value)
    if wanted is not None:
        made = isinstance(value, nn.Module) and _CALLABLE in wanted
        remedy = "give its class, or a function that makes one" if made else "give one"
        raise ValueError(f"{key} ({_shown(value)}) must be {wanted}: {remedy}")


@lru_cache
def _hints(owner: Hashable) -> dict[str, Any]:
    """Return annotations; none where a name in them is not known at run time."""
    try:
        return typing.get_type_hints(owner)  # of a function or a class
    except (NameError, TypeError, AttributeError):
        return {}


def _wanted(hint: Any, value: Any) -> str | None:
    """Return what should stand in a value's place; None where it fits."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        found = [_wanted(one, value) for one in inner]
        return None if None in found else " or ".join(dict.fromkeys(filter(None, found)))
    if origin is Literal:
        words = list(map(str, inner))
        return None if value in inner else " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    if hint in (None, type(None)):
        return None if value is None else "None"
    if hint is bool:
        return None if isinstance(value, bool) else "True or False"
    if hint in _PLAIN:
        kind, told = _PLAIN[hint]
        return told if isinstance(value, bool) or not isinstance(value, kind) else None
    if origin is Callable:
        return None if callable(value) and not isinstance(value, nn.Module) else _CALLABLE
    if origin is tuple:  # a parser gives lists
        return None if isinstance(value, Sequence) and not isinstance(value, str) else "a tuple"
    if origin in (list, Sequence):
        entries = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
        found = [_wanted(inner[0], one) for one in value] if entries else ["anything"]
        bad = next(filter(None, found), None)
        return None if bad is None else f"a list, each entry {_wanted(inner[0], object()) or 'of one kind'}"
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        bad = next(filter(None, (_wanted(inner[1], one) for one in value.values())), None)
        return None if bad is None else f"a dict, each value {bad}"
    return _wanted_instance(origin or hint, value)


def _wanted_instance(kind: Any, value: Any) -> str | None:
    if kind is Any or not inspect.isclass(kind) or getattr(kind, "_is_protocol", False) or isinstance(value, kind):
        return None
    wanted = _with_article(kind.__name__)
    return f"{wanted}, an object and not a class" if inspect.isclass(value) else wanted


def _with_article(name: str) -> str:
    return f"a{'n' if name[0] in 'AEIOU' else ''} {name}"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value)
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return f"the class {value.__name__}" if inspect.isclass(value) else _with_article(type(value).__name__)
