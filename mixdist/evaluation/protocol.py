"""How figures were taken: enough to take them again."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from mixdist.data import Samples
from mixdist.mixtures import Mixture
from mixdist.mixtures.probe import check_json

KNOWN = "exact_log_likelihood: the source's own log density of the rows' values, as models see them"


def protocol(mixture: Mixture, dataset: Samples, num_samples: int) -> dict[str, Any]:
    """Return, as JSON, what was evaluated on and how.

    Args:
        mixture: the family says how its figures are taken.
        dataset: the rows.
        num_samples: importance samples for each row and expert that were asked for.
    """
    own = check_json(f"mixture: {type(mixture).__name__}.protocol", mixture.protocol(num_samples))
    return {**about_rows(dataset), **own}


def about_rows(dataset: Samples) -> dict[str, Any]:
    """Return, as JSON, what was evaluated on, whatever the model."""
    return {
        "mixdist": version("mixdist"),
        "rows": len(dataset),
        "data": dataset.fingerprint,
        "label": dataset.label,
        "num_samples": None,
        **({"drawn": drawn} if (drawn := {n: f.drawn for n, f in dataset.spec.items() if f.drawn}) else {}),
        "exact": KNOWN if dataset.log_density_N is not None else None,
    }
