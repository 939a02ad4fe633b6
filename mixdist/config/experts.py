"""Experts of a config, made to be looked at: what they give, how many parameters they have."""

from __future__ import annotations

from typing import Any

import torch

from mixdist.config.options import explained, plain_parser
from mixdist.experts import Expert
from mixdist.mixtures import MakeExpert
from mixdist.terms import Spec


def num_parameters(described: dict[str, Any], spec: Spec) -> int:
    """Return how many parameters an expert has; arguments and errors as for ``make_expert``."""
    return sum(p.numel() for p in make_expert(described, spec).parameters())


def make_expert(described: dict[str, Any], spec: Spec) -> Expert:
    """Make an expert without memory for its weights, where its class allows that; torch's generator stays as it is.

    Args:
        described: class_path and init_args, as in a config.
        spec: the data set's fields.

    Raises:
        ValueError: the data does not have what it needs.
    """
    parser = plain_parser("expert", "")
    parser.add_argument("--expert", type=MakeExpert)
    with explained(parser), torch.random.fork_rng(devices=[]):
        make = parser.instantiate(parser.parse_object({"expert": described})).expert
        try:
            with torch.device("meta"):
                made: Expert = make(spec)
        except (RuntimeError, NotImplementedError):  # a class that looks at its numbers
            made = make(spec)
    return made
