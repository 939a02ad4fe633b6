"""What an expert's optional methods must return, checked before an evaluation uses them.

Shape letters: n rows of the check, S importance samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixdist.experts import Expert
from mixdist.mixtures.contracts import Rows
from mixdist.mixtures.probe import Columns, Probe, check_column, shown
from mixdist.terms import Spec

NUM_SAMPLES = 2
"""S of the check."""


Draws = Callable[[tuple[int, ...]], Tensor]
"""Returns standard normal numbers (n, *shape)."""


def check_abilities(key: str, expert: Expert, rows: Rows, spec: Spec, draw: Draws) -> None:
    """Check the optional methods that an expert has, each on a few rows.

    Args:
        key: of the expert in the config.
        expert: the expert, in evaluation.
        rows: a few.
        spec: of all fields.
        draw: returns noise for the rows.

    Raises:
        Fault: a method breaks its contract.
    """
    field, target, noise = getattr(expert, "field", "x"), str(getattr(expert, "target", "")), expert.noise_shape
    values, shape = rows.of(expert), spec[field].shape if field in spec else None

    def probe(method: str, wanted: tuple[int, ...] | None, *args: Any) -> None:
        if wanted is None or not expert.can(method):
            return

        def read(result: Any, num_rows: int) -> Columns:
            return {"its result": check_column("its result", result, (num_rows, *wanted), "one result for each row")}

        who = f"{key}: {type(expert).__name__}.{method}"
        Probe(who, lambda one, *given: getattr(one, method)(*given), (expert,), read, takes_none=rows.takes_none)(*args)

    probe("reconstruct", shape, values)
    if target in spec:
        classes = spec[target].num_classes
        probe("predict", spec[target].shape if classes is None else (*spec[target].shape, classes), values)
    if noise is None:
        return
    _check_posterior(key, expert, rows)
    probe("log_weights", (NUM_SAMPLES,), values, draw((NUM_SAMPLES, *noise)))
    probe("sample", shape, draw(noise))
    if shape is not None:
        probe("draw", shape, draw(noise), torch.special.ndtr(draw(shape)))


def _check_posterior(key: str, expert: Expert, rows: Rows) -> None:
    """Check that a posterior has a mean and a KL for each row and latent dimension."""
    if not expert.can("posterior"):
        return
    who, size = f"{key}: {type(expert).__name__}.posterior", math.prod(expert.noise_shape or ())
    remedy = "return Posterior(mean, kl), one number of noise_shape each"

    def read(found: Any, num_rows: int) -> Columns:
        if not isinstance(found, tuple) or len(found) != 2:
            raise ValueError(f"returns {shown(found)}, expected mixdist.terms.Posterior: {remedy}")
        named = zip(("mean_RL", "kl_RL"), found, strict=True)
        return {name: check_column(name, value, (num_rows, size), remedy) for name, value in named}

    Probe(who, lambda one, some: one.posterior(some), (expert,), read, takes_none=rows.takes_none)(rows.of(expert))
