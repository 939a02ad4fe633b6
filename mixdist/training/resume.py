"""What a checkpoint and a config must share for a run to go on: otherwise rows would come twice, or never."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHOWN = 16
"""Digits of a hash in a message."""


def check_run(path: Path, state: dict[str, Any], described: Mapping[str, Any]) -> None:
    """Check what a checkpoint says of its run against the config's.

    Args:
        path: of the checkpoint.
        state: its JSON.
        described: the config's; "source" holds options of the data, which only tell why its rows are others.

    Raises:
        ValueError: it belongs to another run.
    """
    as_stored = json.loads(json.dumps(described))  # where tuples are lists
    here, made = ({**run, **run.get("mixture", {}), "mixture": None} for run in (as_stored, state["run"]))
    then, now = made.pop("source", {}), here.pop("source", {})
    for key in {**here, **made} if described else ():
        if made.get(key) == here.get(key):
            continue
        values, own = [str(run.get(key)) for run in (made, here)], "config"
        if key == "data":
            changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
            why = [", ".join(f"{name} {options.get(name)}" for name in changed) for options in (then, now)]
            values = [value[:SHOWN] + f" ({reason})" * bool(reason) for value, reason in zip(values, why, strict=True)]
            own = "rows (the same data, limit, splits and skipped samples)"
        raise ValueError(
            f"checkpoint {path} was made with {key} {values[0]}, the config has {values[1]}: resume with the run's own "
            f"{own}, or start a new run"
        )


def check_progress(path: Path, state: dict[str, Any], optimizer: str, order: str | None) -> None:
    """Check the optimiser of a checkpoint, and the order of the epoch or pass that it is inside of.

    Args:
        path: of the checkpoint.
        state: its JSON.
        optimizer: the config's, as far as its state depends on it.
        order: the digest of that order as the data gives it now; None between epochs.

    Raises:
        ValueError: one is another; the order, though all that the data says of it is the same.
    """
    if optimizer != state["optimizer"]:
        raise ValueError(
            f"checkpoint {path} was made with the optimiser {state['optimizer']}, the config has {optimizer}: resume "
            f"with the run's own optimiser, or start a new run"
        )
    if state.get("order") != order:
        then, now = (str(one)[:SHOWN] for one in (state.get("order"), order))
        raise ValueError(
            f"checkpoint {path} is inside an epoch with the order {then} of rows, which is {now} now: resume with the "
            f"code of ordered that the data had, or start a new run"
        )
