"""What a user is told: one line that names the value and the place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from tests.launch import Ended, here


def error_of(call: Callable[[], object], *named: object, kind: type[Exception] = ValueError) -> str:
    """Call what must fail with one line that contains each of ``named``; return that line."""
    with pytest.raises(kind) as caught:
        call()
    told = str(caught.value)
    assert "\n" not in told
    for one in named:
        assert str(one) in told, f"{one!r} is not in {told!r}"
    return told


def refusal_of(*words: object, named: Sequence[object] = ()) -> Ended:
    """Run a command that must end with code 2 and one line that contains each of ``named``."""
    ended = here(*map(str, words))
    assert ended.code == 2, ended
    assert ended.err.startswith("mixdist: ")
    assert ended.err.count("\n") == 1
    for one in named:
        assert str(one) in ended.err, f"{one!r} is not in {ended.err!r}"
    return ended
