"""Rows of a product of options that hold every combination of the values of two, or three, of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any

import pytest

Row = dict[str, Any]
Options = dict[str, Sequence[Any]]
Possible = Callable[[Row], bool]


def anything(row: Row) -> bool:
    return True


def combined(row: Row, strength: int) -> set[frozenset[tuple[str, Any]]]:
    """Return the combinations of values that a row holds."""
    return {frozenset(some) for some in combinations(row.items(), strength)}


def wanted(options: Options, possible: Possible = anything, strength: int = 2) -> set[frozenset[tuple[str, Any]]]:
    """Return every possible combination of values of so many options."""
    rows = (
        zip(names, values, strict=True)
        for names in combinations(options, strength)
        for values in product(*(options[n] for n in names))
    )
    return {frozenset(row.items()) for row in map(dict, rows) if possible(row)}


def covering(options: Options, possible: Possible = anything, strength: int = 2) -> list[Row]:
    """Choose rows of the product, greedily, until every possible combination is in one of them."""
    rows, missing = [], wanted(options, possible, strength)
    while missing:
        row = dict(sorted(min(missing, key=lambda some: sorted(map(repr, some)))))
        for name in options:
            if name not in row:
                values = [v for v in options[name] if possible({**row, name: v})]
                row[name] = max(values, key=lambda v, n=name: len(missing & combined({**row, n: v}, strength)))  # type: ignore[misc]
        missing -= combined(row, strength)
        rows.append(row)
    return rows


def every_value(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that hold a value that none before them holds: together they hold every value."""
    seen, some = set[tuple[str, Any]](), []
    for row in rows:
        if not row.items() <= seen:
            some.append(row)
            seen |= row.items()
    return some


def marked(rows: Sequence[Row], make: Callable[..., Any], **few: Any) -> list[Any]:
    """Make a case of each row: those that hold every value of every option run by default, the others are slow.

    Those by default take the options ``few``, where there are some, and are slow without them.
    """
    some = every_value(rows)
    slow = [make(**row) for row in rows if few or row not in some]
    return [
        *(pytest.param(case, id=str(case)) for case in (make(**row, **few) for row in some)),
        *(pytest.param(case, id=str(case), marks=pytest.mark.slow) for case in slow),
    ]
