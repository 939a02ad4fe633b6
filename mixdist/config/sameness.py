"""That every rank has the same rows, and the same weights at the start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from mixdist.data import Samples, Source
from mixdist.mixtures import Mixture
from mixdist.parallel.agreement import Agreed, alike, gather_json
from mixdist.parallel.mesh import Mesh


def check_rows(splits: Mapping[str, Samples], source: Source, mesh: Mesh) -> None:
    """Check that every rank has the same rows; where they were read from is shown with what differs.

    Raises:
        Agreed: a rank has others.
    """
    named: dict[str, Any] = {}
    for kind, samples in splits.items():
        named[f"number of {kind} rows"] = len(samples)
        named[f"fields of the {kind} rows"] = {n: str(field) for n, field in samples.spec.items()}
        named[f"labels of the {kind} rows"] = [samples.label, list(samples.class_names)]
        named[f"sha256 of the {kind} rows"] = samples.fingerprint[:16]
    texts = {name: value for name, value in getattr(source, "__dict__", {}).items() if isinstance(value, str)}
    alike(named, mesh.world, ", ".join(f"data.{name} {value}" for name, value in texts.items()))


def check_weights(mixture: Mixture, mesh: Mesh) -> None:
    """Check that replicas begin with the same weights, up to rounding: processors may draw them by other instructions.

    Raises:
        Agreed: a rank has others, or of another shape.
    """
    own = {}
    for owned in mixture.owned():
        for name, value in owned.module.state_dict().items():
            norm = float(torch.linalg.vector_norm(value.detach().double()))
            own[f"{owned.name} {name}"] = [list(value.shape), str(value.dtype), norm]
    first: dict[str, tuple[int, Any]] = {}
    for rank, weights in enumerate(gather_json(own, mesh.world)):
        for name, (*kind, norm) in weights.items():
            holder, (*expected, known) = first.setdefault(name, (rank, [*kind, norm]))
            same = math.isclose(norm, known, rel_tol=1e-4, abs_tol=1e-30) or (math.isnan(norm) and math.isnan(known))
            if kind != expected or not same:
                raise Agreed(
                    f"the initial weights of {name} on rank {rank} ({kind[0]}, {kind[1]}, norm {norm:.6g}) differ from "
                    f"those on rank {holder} ({expected[0]}, {expected[1]}, norm {known:.6g}): a class of your own "
                    f"must draw them from torch's global generator, and depend on nothing that differs by rank"
                )


def check_attributes(mixture: Mixture, mesh: Mesh) -> None:
    """Check that modules have the same numbers and words on every rank, as one read from the environment may not be.

    Compared are shared modules, replicas of an expert and, where one class makes all of them, different experts.

    Raises:
        Agreed: a rank has others.
    """
    own = [[owned.name, owned.expert is not None, _attributes(owned.module)] for owned in mixture.owned()]
    first: dict[str, tuple[int, Any]] = {}
    for rank, modules in enumerate(gather_json(own, mesh.world)):
        for name, is_expert, attributes in modules:
            label = "the experts" if is_expert and getattr(mixture, "alike", False) else name
            for key, value in attributes.items():
                holder, known = first.setdefault(f"{key} of {label}", (rank, value))
                if value != known and rank != holder:
                    raise Agreed(
                        f"{key} of {name} on rank {rank} ({value}) differs from that on rank {holder} ({known}): "
                        f"nothing that a class of your own reads, such as an environment variable, may differ by rank"
                    )


def _attributes(module: torch.nn.Module) -> dict[str, str]:
    """Return what a module and those inside it hold beside tensors: numbers and words, as text."""
    found = {}
    for at, inner in module.named_modules():
        for name, value in vars(inner).items():
            if isinstance(value, (bool, int, float, str)):
                found[f"{at}.{name}".lstrip(".")] = repr(value)
    return found
