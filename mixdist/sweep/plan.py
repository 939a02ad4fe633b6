"""The whole of a sweep: its variants, seeds and splits; and how it may differ from what its folder holds already."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace

from mixdist.config.config import Config
from mixdist.data.sources.splits import load_splits
from mixdist.files import write_file
from mixdist.sweep.grid import Axis, Settings, System, Variant, file_name, read_axis, read_systems, settings_of

FILE = "sweep.json"

GIVEN = {
    "--seed": "every one is run with the seeds 0 to --seeds - 1",
    "--config": "name it as CONFIG, before the options",
    "--out": "each has its own folder in that of the sweep",
}
"""Options of a cell that a sweep gives itself, and what to do instead."""


@dataclass(frozen=True)
class Plan:
    """What is run and told.

    Args:
        configs: of the systems, resolved, without what ``axes`` set.
        systems: by name, each at its settings.
        baselines: beside them.
        axes: what is set.
        seeds: their number; they are 0 and up.
        splits: whose rows the table is of.
        num_samples: importance samples of evaluations.
        select: the figure on valid rows by which a setting is chosen; None for the first of the family's.
        mode: whether it is to be small or large; None for what its name implies.
    """

    configs: Mapping[str, Mapping[str, Any]]
    systems: Mapping[str, Sequence[Variant]]
    baselines: Sequence[Variant]
    axes: Sequence[Axis]
    seeds: int
    splits: Sequence[str]
    num_samples: int
    select: str | None
    mode: Literal["min", "max"] | None = None

    def variants(self) -> list[Variant]:
        """Return all that is run."""
        return [*(one for variants in self.systems.values() for one in variants), *self.baselines]

    @property
    def rows(self) -> list[str]:
        """The names of the table's rows."""
        return [*self.systems, *(one.name for one in self.baselines)]

    def chooses(self, variant: Variant) -> bool:
        """Return whether a variant is one of several settings, of which valid rows choose one."""
        return not variant.baseline and len(self.systems[variant.system]) > 1

    def describe(self) -> dict[str, Any]:
        """Return, as JSON, what a folder's cells depend on."""
        return {
            "systems": {name: dict(leaves(config)) for name, config in self.configs.items()},
            "set": {axis.keys: list(axis.values) for axis in self.axes},
            "baselines": [one.folder for one in self.baselines],
            "seeds": self.seeds,
            "split": list(self.splits),
            "num_samples": self.num_samples,
        }

    def check_folder(self, folder: Path) -> None:
        """Check what a folder holds: nothing, or a sweep of which this one is the same or more.

        Raises:
            ValueError: it holds something else, which is named.
        """
        path = folder / FILE
        if not path.exists():
            if folder.exists() and (not folder.is_dir() or any(p.name != ".lock" for p in folder.iterdir())):
                raise ValueError(f"--out {folder} holds something else than a sweep: name a new or an empty folder")
            return
        try:
            held = json.loads(path.read_bytes())
            found = next(differences(held, self.describe()), None)
        except (ValueError, TypeError, AttributeError, KeyError):
            raise ValueError(f"{path} is damaged: name another --out") from None
        if found:
            raise ValueError(
                f"--out {folder} holds a sweep with {found}: name another --out; only configs, values of --set, "
                f"baselines, seeds and splits may be added to a sweep"
            )

    def write(self, folder: Path) -> None:
        """Say in the folder what it holds."""
        write_file(folder / FILE, (json.dumps(self.describe(), indent=2) + "\n").encode())


def leaves(section: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a config and their values."""
    for name, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{before}{name}.")
        else:
            yield before + name, value


def differences(held: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was in a sweep and is not in another, as ``seeds 5, here is 3``."""
    for name, config in held["systems"].items():
        if name not in new["systems"]:
            yield f"the config {name}, which is not given here"
            continue
        own = new["systems"][name]
        for key in dict.fromkeys([*config, *own]):
            if shown(own, key) != shown(config, key):
                yield f"{key} {shown(config, key)} for {name}, here is {shown(own, key)}"
    if list(held["set"]) != list(new["set"]):
        yield f"--set of {' and '.join(held['set']) or 'nothing'}, here is {' and '.join(new['set']) or 'nothing'}"
    lists = {f"--set {keys}": (values, new["set"][keys]) for keys, values in held["set"].items() if keys in new["set"]}
    lists |= {f"--{name}": (held[name], new[name]) for name in ("baselines", "split")}
    for name, (before, now) in lists.items():
        if not set(before) <= set(now):
            yield f"{name} {','.join(before)}, here is {','.join(now) or 'none'}"
    if held["seeds"] > new["seeds"]:
        yield f"--seeds {held['seeds']}, here is {new['seeds']}"
    if held["num_samples"] != new["num_samples"]:
        yield f"--num_samples {held['num_samples']}, here is {new['num_samples']}"


def shown(config: Mapping[str, Any], key: str) -> str:
    """Return the value of a dotted key."""
    return json.dumps(config[key]) if key in config else "nothing"


def make_plan(options: Namespace, more: Sequence[str], check: Callable[[Sequence[str]], None]) -> Plan:
    """Make a plan of what a command line asks for.

    Args:
        options: of ``mixdist sweep``.
        more: dotted options of every cell.
        check: raises ValueError where the words of a ``mixdist baseline`` do not parse.

    Raises:
        ValueError: something of it cannot be run.
    """
    systems, axes = read_systems(options["configs"]), [read_axis(text) for text in options["set"]]
    kinds = read_baselines(options["baselines"])
    for word in (*more, *(word for words in (*(system.words for system in systems), *kinds) for word in words)):
        if (option := word.partition("=")[0]) in GIVEN:
            raise ValueError(f"{option} cannot be given to a cell: {GIVEN[option]}")
    settings = {system.name: settings_of(system, axes, more) for system in systems}
    splits = options["split"].split(",")
    check_data(settings, "valid" in splits)
    plan = Plan(
        {name: one.config for name, one in settings.items()},
        {name: one.variants for name, one in settings.items()},
        baselines(kinds, systems, settings, more, check),
        axes,
        options["seeds"],
        splits,
        options["num_samples"],
        options["select"],
        options["mode"],
    )
    runs = [one.folder for one in plan.variants()]
    for name in (*plan.rows, *runs):
        if max(plan.rows.count(name), runs.count(name)) > 1:
            raise ValueError(f"two rows of the table are called {name}: name one, as NAME=CONFIG, or leave one out")
    return plan


def check_data(settings: Mapping[str, Settings], wanted: bool) -> None:
    """Load the data of systems, each once: better now than in every cell; check that there are rows to choose by.

    Args:
        settings: by the names of systems.
        wanted: whether all are evaluated on valid rows.

    Raises:
        ValueError: the data cannot be loaded, has no valid rows where they are read, or has other ones at a setting.
    """
    known: dict[str, str | None] = {}
    for name, one in settings.items():
        number, first = len(one.variants), one.variants[0]
        for variant, made in zip(one.variants, one.made, strict=True):
            key = data_of(variant.config)
            if key not in known:
                known[key] = valid_rows(made)
            if (number > 1 or wanted) and known[key] is None:
                why = f"choose one of {number} settings" if number > 1 else "evaluate (--split)"
                raise ValueError(f"{name} has no valid rows to {why}: set valid, such as -- --valid 0.1")
            if known[key] != known[data_of(first.config)]:
                raise ValueError(
                    f"--set gives {variant.name} other valid rows than {first.name}, and they are to choose one of the "
                    f"two: make systems of them, as 'NAME=CONFIG --key value'"
                )


def valid_rows(config: Config) -> str | None:
    """Return a hash of the validation rows; None where there are none."""
    splits = load_splits(config.data, config.valid)
    try:
        return None if splits.valid is None else splits.valid.fingerprint
    finally:
        for samples in filter(None, splits):
            samples.close()


def data_of(config: Mapping[str, Any]) -> str:
    """Return what decides the rows of a config."""
    return json.dumps([config["data"], config["valid"]])


def baselines(
    kinds: Sequence[Sequence[str]],
    systems: Sequence[System],
    settings: Mapping[str, Settings],
    more: Sequence[str],
    check: Callable[[Sequence[str]], None],
) -> list[Variant]:
    """Return baselines, each once for each data set: they are given the config of the first system that has it.

    Raises:
        ValueError: a kind is unknown, or its options do not parse.
    """
    first: dict[str, System] = {}
    for system in systems:
        first.setdefault(data_of(settings[system.name].config), system)
    found = []
    for words in kinds:
        for system in first.values():
            label = " ".join(words).replace("--", "")
            name = label if len(first) == 1 else f"{label} ({system.name})"
            given = [words[0], "--config", system.path, *system.words, *more, *words[1:]]
            check(given)
            folder, config = file_name(f"{system.name}+{label}"), settings[system.name].config
            found.append(Variant(name, folder, system.name, ("baseline", *given), config, baseline=words[0]))
    return found


def read_baselines(texts: Sequence[str]) -> list[list[str]]:
    """Read ``KIND,KIND`` or ``KIND --option value ...``.

    Raises:
        ValueError: a quote is not closed, or there is no kind.
    """
    found: list[list[str]] = []
    for text in texts:
        try:
            parts = [text] if " " in text.strip() else text.split(",")
            found += [shlex.split(part) for part in parts]
        except ValueError:
            found.append([])
        if not all(found):
            raise ValueError(f"--baselines ({text}) must be KIND,KIND or in quotes 'KIND --option value ...'")
    return found
