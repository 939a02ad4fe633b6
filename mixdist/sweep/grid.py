"""What a sweep runs: systems, each at its settings, and baselines beside them, all checked before anything is run."""

from __future__ import annotations

import hashlib
import itertools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import Namespace

from mixdist.config.config import Config
from mixdist.config.options import parse
from mixdist.config.parsing import config_parser, make_config, plain

LONGEST_NAME = 80


class System(NamedTuple):
    """A config with dotted options of its own, and its name in tables."""

    name: str
    path: str
    words: tuple[str, ...] = ()


class Axis(NamedTuple):
    """Keys of a config that are set together, as they were given, and the values that they take in turn."""

    keys: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """What is run once for each seed: a system at one setting, or a baseline.

    Args:
        name: in tables.
        folder: first part of the names of its runs.
        system: its system; of a baseline, the one whose data it is given.
        words: ``train ...`` or ``baseline ...``, without seed and folder.
        config: resolved, without the seed.
        setting: values by keys as they were given.
        baseline: its kind; empty for a system.
    """

    name: str
    folder: str
    system: str
    words: tuple[str, ...]
    config: Mapping[str, Any]
    setting: Mapping[str, str] = field(default_factory=dict)
    baseline: str = ""

    @property
    def fitted(self) -> bool:
        """Whether one process fits and evaluates it, whatever the number of ranks."""
        return self.baseline not in ("", "vae")

    def run(self, seed: int) -> str:
        """Return the name of the run of a seed."""
        return f"{self.folder}-seed{seed}"


def read_system(text: str) -> System:
    """Read ``[NAME=]CONFIG [--key value ...]``.

    Raises:
        ValueError: it does not have this form.
    """
    if Path(text).exists():
        return System(Path(text).stem, text)
    named = re.fullmatch(r"(\w[\w.+-]*)=(.*)", text, re.DOTALL)
    name, rest = named.groups() if named else ("", text)
    try:
        path, *words = shlex.split(rest)
        if words and not words[0].startswith("-"):
            raise ValueError("a name with a space, or two files")
    except ValueError:
        raise ValueError(
            f"CONFIG ({text}) must be a file, or in quotes '[NAME=]FILE --key value ...', NAME without spaces: see "
            f"mixdist sweep --help"
        ) from None
    return System(name or Path(path).stem, path, tuple(words))


def read_systems(texts: Sequence[str]) -> list[System]:
    """Read systems, whose names must differ.

    Raises:
        ValueError: one is not a system, or two have one name.
    """
    systems = [read_system(text) for text in texts]
    for number, system in enumerate(systems):
        for other in systems[:number]:
            if other.name == system.name:
                raise ValueError(
                    f"CONFIG {other.path} and {system.path} are both called {system.name}: name one, as "
                    f"NAME={shlex.quote(system.path)}"
                )
    return systems


def read_axis(text: str) -> Axis:
    """Read ``KEY[,KEY]=VALUE,VALUE``.

    Raises:
        ValueError: it does not have this form, a value comes twice, or the key is the seed.
    """
    keys, equals, rest = text.partition("=")
    values = _split(rest)
    if not keys or not equals or values is None or "" in values:
        raise ValueError(
            f"--set ({text}) must be KEY=VALUE,VALUE such as train.optimizer.lr=0.001,0.003; a value with commas "
            f"stands in brackets or quotes"
        )
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ValueError(f"--set ({text}) has the value {twice} twice: keep one of the two")
    if "seed" in keys.split(","):
        raise ValueError(f"--set ({text}) cannot set the seed: every cell is run with the seeds 0 to --seeds - 1")
    return Axis(keys, tuple(values))


def _split(text: str) -> list[str] | None:
    """Split values at commas outside brackets and quotes; None where these do not match."""
    parts, open_brackets, quote = [""], "", ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{":
            open_brackets += letter
        elif letter in "]}":
            if open_brackets[-1:] != {"]": "[", "}": "{"}[letter]:
                return None
            open_brackets = open_brackets[:-1]
        if letter == "," and not open_brackets and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return None if open_brackets or quote else [part.strip() for part in parts]


class Settings(NamedTuple):
    """A system at each of its settings.

    Args:
        config: resolved, without what is set.
        variants: one for each setting.
        made: the config of each.
    """

    config: dict[str, Any]
    variants: list[Variant]
    made: list[Config]


def settings_of(system: System, axes: Sequence[Axis], more: Sequence[str]) -> Settings:
    """Return a system at each of its settings: all combinations of values.

    Args:
        system: the system.
        axes: what is set.
        more: dotted options of every cell, which come after the system's own.

    Raises:
        ValueError: a setting does not parse, two are one, or a key is set twice.
    """
    parser = config_parser("mixdist sweep")
    own = ["--config", system.path, *system.words, *more]
    given = parse(parser, own)
    base = resolved(given)
    keys = [full_key(key, base) for axis in axes for key in axis.keys.split(",")]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"--set sets {twice} twice: give all its values in one --set, as {twice}=VALUE,VALUE")
    found: list[Variant] = []
    made: list[Config] = []
    for values in itertools.product(*(axis.values for axis in axes)):
        setting = {axis.keys: value for axis, value in zip(axes, values, strict=True)}
        pairs = [(key, value) for keys, value in setting.items() for key in keys.split(",")]
        words = [*own, *(f"--{full_key(key, base)}={value}" for key, value in pairs)]
        parsed = parse(parser, words) if pairs else given
        made.append(make_config(parser, parsed))
        name = " ".join([system.name, *(f"{keys}={value}" for keys, value in setting.items())])
        config = resolved(parsed)
        same = next((other.name for other in found if other.config == config), None)
        if same:
            raise ValueError(f"--set gives one setting twice, {same} and {name}: leave one out")
        found.append(Variant(name, file_name(name), system.name, ("train", *words), config, setting))
    return Settings(base, found, made)


def resolved(parsed: Namespace) -> dict[str, Any]:
    """Return a config as JSON, without the seed, which each cell has of its own."""
    return {name: plain(parsed[name]) for name in Config.__dataclass_fields__ if name != "seed"}


def full_key(key: str, config: Mapping[str, Any]) -> str:
    """Return the key of a resolved config that a shortened one stands for; what none fits is left to the parser.

    Levels in the middle may be left out where one key alone fits: ``train.lr`` for ``train.optimizer.init_args.lr``.

    Raises:
        ValueError: several fit.
    """
    known = list(_dotted(config))
    fits = [one for one in known if one.replace(".init_args", "") == key.replace(".init_args", "")]
    fits = fits or [one for one in known if _shortens(key.split("."), one.split("."))]
    if len(fits) > 1:
        raise ValueError(f"--set {key} may be {' or '.join(fits)}: write which")
    return fits[0] if fits else key


def _shortens(short: Sequence[str], long: Sequence[str]) -> bool:
    """Return whether a key is another with levels in the middle left out."""
    inner = iter(long[1:-1])
    ends = (short[0], short[-1]) == (long[0], long[-1])
    return len(short) > 1 and ends and all(part in inner for part in short[1:-1])


def _dotted(section: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for name, value in section.items():
        yield before + name
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{before}{name}.")


def file_name(text: str) -> str:
    """Return a name for files that tells a text; with a checksum where letters had to be replaced."""
    plainly = re.sub(r"[^\w.,=+-]+", "_", text.replace(" ", "-"))
    if plainly == text.replace(" ", "-") and len(plainly) <= LONGEST_NAME:
        return plainly
    return f"{plainly[:LONGEST_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
