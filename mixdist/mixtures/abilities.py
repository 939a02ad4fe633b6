"""What optional methods of experts and gates must return, checked before an evaluation uses them.

Shape letters: n rows of the check, S importance samples, K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mixdist.experts import Expert
from mixdist.gates import Gate
from mixdist.mixtures.contracts import Rows
from mixdist.mixtures.covered import is_covered
from mixdist.mixtures.probe import COARSE, Columns, Fault, Probe, check_column, shown
from mixdist.terms import Spec

NUM_SAMPLES = 2
"""S of the check."""


Draws = Callable[[tuple[int, ...]], Tensor]
"""Returns standard normal numbers (n, *shape)."""


def check_abilities(
    key: str, expert: Expert, rows: Rows, spec: Spec, draw: Draws, only: Sequence[str] | None = None
) -> None:
    """Check the optional methods that an expert has, each on a few rows.

    Args:
        key: of the expert in the config.
        expert: the expert, in evaluation.
        rows: a few.
        spec: of all fields.
        draw: returns noise for the rows.
        only: methods, the others are not called; None for all.

    Raises:
        Fault: a method breaks its contract.
    """
    field, target, noise = getattr(expert, "field", "x"), str(getattr(expert, "target", "")), expert.latent_shape
    values, shape = rows.of(expert), spec[field].shape if field in spec else None

    def probe(method: str, wanted: tuple[int, ...] | None, *args: Any) -> None:
        if wanted is None or not expert.can(method) or (only is not None and method not in only):
            return

        def read(result: Any, num_rows: int) -> Columns:
            return {"its result": check_column("its result", result, (num_rows, *wanted), "one result for each row")}

        who = f"{key}: {type(expert).__name__}.{method}"

        def call(one: Expert, *given: Any) -> Any:
            return getattr(one, method)(*given)

        Probe(who, call, (expert,), read, None, rows.takes_none, is_covered(expert))(*args)

    probe("reconstruct", shape, values)
    if target in spec:
        classes = spec[target].num_classes
        probe("predict", spec[target].shape if classes is None else (*spec[target].shape, classes), values)
    if noise is None or only is not None:
        return
    _check_posterior(key, expert, rows)
    probe("log_weights", (NUM_SAMPLES,), values, draw((NUM_SAMPLES, *noise)))
    probe("sample", shape, draw(noise))
    if shape is not None:
        probe("draw", shape, draw(noise), torch.special.ndtr(draw(shape)))


def check_gate_abilities(key: str, gate: Gate, rows: Rows, spec: Spec, draw: Draws, num_clusters: int) -> None:
    """Check the optional methods that a gate has; arguments and errors as for ``check_abilities``."""
    field, noise = getattr(gate, "field", "x"), draw((gate.num_drawn,))
    values, shape = rows.of(gate), spec[field].shape if field in spec else None
    cluster = torch.arange(len(noise), device=noise.device) % num_clusters

    def probe(method: str, wanted: tuple[int, ...] | None, *args: Any) -> None:
        if wanted is None or not gate.can(method):
            return

        def read(result: Any, num_rows: int) -> Columns:
            column = check_column("its result", result, (num_rows, *wanted), "one result for each row")
            if bool(column.isnan().any()):
                raise ValueError("returns what is not a number for some rows: look at its network and its scales")
            return {"its result": column}

        who = f"{key}: {type(gate).__name__}.{method}"
        Probe(who, lambda one, *given: getattr(one, method)(*given), (gate,), read, takes_none=rows.takes_none)(*args)

    probe("reconstruct", shape, values)
    probe("embed", None if gate.latent is None else (gate.latent,), values)
    if gate.latent is None:
        probe("log_weights", (1,), values, None)
    else:
        probe("log_weights", (NUM_SAMPLES,), values, draw((NUM_SAMPLES, gate.latent)))
    probe("sample", shape, cluster, noise)
    if shape is not None:
        probe("draw", shape, cluster, noise, torch.special.ndtr(draw(shape)))
    if gate.can("log_pi"):
        _check_log_pi(f"{key}: {type(gate).__name__}.log_pi", gate, num_clusters)


def _check_log_pi(who: str, gate: Gate, num_clusters: int) -> None:
    try:
        log_pi_K = check_column("its result", gate.log_pi(), (num_clusters,), "return one number for each cluster")
    except ValueError as fault:
        raise Fault(f"{who} {fault}") from None
    total = float(log_pi_K.detach().double().exp().sum())
    if not abs(total - 1) < COARSE:
        raise Fault(f"{who} returns logs of weights that sum to {total:.4g}, expected 1: return log_softmax of them")


def _check_posterior(key: str, expert: Expert, rows: Rows) -> None:
    """Check that a posterior has a mean and a KL for each row and latent dimension."""
    if not expert.can("posterior"):
        return
    who, size = f"{key}: {type(expert).__name__}.posterior", math.prod(expert.latent_shape or ())
    remedy = "return Posterior(mean, kl), one number of latent_shape each"

    def read(found: Any, num_rows: int) -> Columns:
        if not isinstance(found, tuple) or len(found) != 2:
            raise ValueError(f"returns {shown(found)}, expected mixdist.terms.Posterior: {remedy}")
        named = zip(("mean_RL", "kl_RL"), found, strict=True)
        return {name: check_column(name, value, (num_rows, size), remedy) for name, value in named}

    Probe(who, lambda one, some: one.posterior(some), (expert,), read, takes_none=rows.takes_none)(rows.of(expert))
