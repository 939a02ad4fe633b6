"""One expert in place of a mixture, as a config: of an expert's size or the mixture's, trained for either's budget.

Configs here are what a YAML file holds: dicts, lists, numbers.
"""

from __future__ import annotations

import copy
import inspect
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Literal

Described = dict[str, Any]
"""A class in a config: class_path and init_args."""

Extent = Literal["expert", "mixture"]


def expert_of(config: dict[str, Any], number: int) -> Described:
    """Return the expert of a config's mixture, or of its list of experts the one of a number.

    Raises:
        ValueError: the family takes no experts, or there is none of that number.
    """
    mixture = config["mixture"]
    experts = mixture.get("init_args", {}).get("expert")
    if not experts:
        raise ValueError(
            f"mixture ({mixture['class_path']}) has no argument expert, so there is no expert to train alone: give a "
            f"config whose mixture.init_args has one"
        )
    listed = experts if isinstance(experts, list) else [experts]
    if not 0 <= number < len(listed):
        raise ValueError(f"--expert ({number}) must be a place in the list mixture.expert: give 0 to {len(listed) - 1}")
    found: Described = listed[number]
    return found


def epochs_for(gradients: Sequence[float], num_experts: int, budget: Extent) -> list[int]:
    """Return, for each phase, the epochs in which one expert gets as many sample-gradients as a budget has, rounded up.

    Args:
        gradients: what a phase of the mixture spends on each training row, all experts together.
        num_experts: E.
        budget: the whole mixture's, or the E-th part of it.
    """
    parts = num_experts if budget == "expert" else 1
    return [math.ceil(round(spent / parts, 9)) for spent in gradients]


def alone(
    config: dict[str, Any], expert: Described, epochs: Sequence[int], lengths: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Return the config of one expert: the phases in which the mixture's experts learn, each with its own epochs.

    Data, likelihood, batch sizes, optimisers and schedules stay; the objective becomes the expert's loss. A schedule is
    stretched from the steps that it had to those of the new phase.

    Args:
        config: of the mixture.
        expert: the one expert.
        epochs: of each phase; a phase of 0, in which the gate alone learns, is left out.
        lengths: steps of each phase's schedule in the mixture, and now.

    Raises:
        ValueError: no phase is left.
    """
    phases = []
    for phase, number, (before, now) in zip([*config["pretrain"], config["train"]], epochs, lengths, strict=True):
        if number:
            kept = {name: value for name, value in phase.items() if name not in ("objective", "trains")}
            schedule = phase.get("schedule")
            if schedule is not None and before != now:
                arguments = {"schedule": schedule, "steps": before, "over": now}
                schedule = {"class_path": "mixdist.training.phases.Stretched", "init_args": arguments}
            phases.append({**kept, "epochs": number, "schedule": schedule})
    if not phases:
        raise ValueError("no phase of the config trains its experts: set train.trains to both or experts")
    own = config["mixture"]["init_args"]
    mixture = {"gate": {"class_path": "mixdist.gates.Uniform"}, "expert": expert, "num_experts": 1}
    mixture |= {name: own[name] for name in ("compute", "expert_start") if own.get(name)}
    return {
        **config,
        "mixture": {"class_path": "mixdist.mixtures.Soft", "init_args": mixture},
        "pretrain": phases[:-1],
        "train": phases[-1],
        "mesh": {**config["mesh"], "ep_size": None},
    }


def widened(expert: Described, wanted: int, count: Callable[[Described], int]) -> Described:
    """Return the expert whose number of parameters is nearest to the one wanted, all its widths scaled alike.

    Widths are the arguments that the classes in the config name as ``widths``.

    Args:
        expert: with the widths of the config.
        wanted: number of parameters.
        count: returns the number of parameters of an expert.

    Raises:
        ValueError: no class of the expert names widths.
    """
    base = max((_most(width) for section in _sections(expert) for width in _widths(section).values()), default=0)
    if not base:
        raise ValueError(
            f"--size mixture needs an expert whose widths can grow, and none of {expert['class_path']} are known: "
            f"write its network out in the config, as mixdist.nets.MLP with hidden, or name the widths in your class "
            f"(widths = ('hidden',)); or set --size expert"
        )
    by_width = lambda width: count(_scaled(expert, width / base))  # noqa: E731
    high = base
    while by_width(high) < wanted and high < 2**24:
        high *= 2
    found = bisect_left(range(1, high), wanted, key=by_width) + 1
    nearest = min((max(found - 1, 1), found), key=lambda width: abs(by_width(width) - wanted))
    return _scaled(expert, nearest / base)


def _sections(described: Any) -> list[Described]:
    """Return a described class and those inside it."""
    if not isinstance(described, dict) or "class_path" not in described:
        return []
    inner = [one for value in (described.get("init_args") or {}).values() for one in _sections(value)]
    return [described, *inner]


def _widths(section: Described) -> dict[str, Any]:
    """Return the arguments of a class that are widths: numbers, or lists of numbers."""
    module, _, name = section["class_path"].rpartition(".")
    made = getattr(import_module(module), name)
    defaults = inspect.signature(made).parameters
    given = section.get("init_args") or {}
    return {name: given.get(name, defaults[name].default) for name in getattr(made, "widths", ())}


def _most(width: Any) -> int:
    return int(width) if isinstance(width, (int, float)) else max(map(int, width), default=0)


def _scaled(expert: Described, factor: float) -> Described:
    """Return a copy with every width times a factor, rounded, at least 1."""
    changed = copy.deepcopy(expert)
    scale = lambda width: max(1, round(width * factor))  # noqa: E731
    for section in _sections(changed):
        for name, width in _widths(section).items():
            several = not isinstance(width, (int, float))
            section["init_args"] = section.get("init_args") or {}
            section["init_args"][name] = [scale(one) for one in width] if several else scale(width)
    return changed
