"""Schedules that users write: ``anneal`` of gates, experts and objectives."""

from __future__ import annotations

from typing import Any

from mixdist.messages import SharedError, describe_failure
from mixdist.mixtures.probe import Fault
from mixdist.terms import Owned


def anneal(key: str, one: Any, step: int) -> None:
    """Set the schedules of a module or an objective, if it has some, for a step of the phase.

    Raises:
        Fault: it fails.
        SharedError: it does so on every rank, and says why.
    """
    if not hasattr(one, "anneal"):
        return
    try:
        one.anneal(step)
    except SharedError:  # as of an engine, whose values are apart here
        raise
    except Exception as error:
        raise Fault(
            f"{key}: {type(one).__name__}.anneal fails on step {step} ({describe_failure(error)}): take the "
            f"phase's step, from 0, as anneal(self, step), or leave it out"
        ) from error


def anneal_module(owned: Owned, step: int) -> None:
    """Do the same for a module of a mixture."""
    anneal(f"mixture.{'expert' if owned.expert is not None else owned.name}", owned.module, step)
