"""That experts are made as the trained model was that they start from: its weights mean the same only then."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from mixdist.config.parsing import RESOLVED, plain
from mixdist.training import Upcycled

OF_TRAINING = ("beta", "kl_warmup", "free_bits", "first_scale", "samples")
"""Options of this package's experts that decide how they train, not what they are."""


def check_model(parsed: Namespace) -> None:
    """Check the experts of what was parsed against that of the run that ``expert_start`` names, where it is Upcycled.

    Classes are compared, and the options of this package's own; names and shapes of weights are checked when these are
    read. An option that only one of them has, as after an update, is passed over.

    Raises:
        ValueError: one differs.
    """
    own = plain(parsed)["mixture"].get("init_args") or {}
    start = own.get("expert_start") or {}
    if not str(start.get("class_path")).endswith(f".{Upcycled.__name__}"):
        return
    run = Path(start["init_args"]["run"])
    try:
        there = yaml.safe_load((run / RESOLVED).read_bytes())["mixture"]["init_args"]["expert"]
    except (OSError, yaml.YAMLError, LookupError, TypeError):
        return  # what is no run is refused when its checkpoint is read
    for expert in _listed(own.get("expert")):
        differs = _difference("mixture.expert", expert, _listed(there)[0])
        if differs:
            raise ValueError(f"{differs} in {run}, the run that experts start from: give them its options")


def _listed(expert: Any) -> list[Any]:
    return expert if isinstance(expert, list) else [expert]


def _difference(key: str, here: Any, there: Any) -> str | None:
    """Return the first difference of two described values, in words."""
    if not (isinstance(here, Mapping) and isinstance(there, Mapping)):
        return None if here == there else f"{key} ({here}) is {there}"
    if "class_path" in here and here.get("class_path") != there.get("class_path"):
        return f"{key} ({here['class_path']}) is {there.get('class_path')}"
    if not str(here.get("class_path", "mixdist.")).startswith("mixdist."):
        return None
    names = [name for name in here if name in there and name not in OF_TRAINING]
    return next((told for n in names if (told := _difference(f"{key}.{n}", here[n], there[n]))), None)
