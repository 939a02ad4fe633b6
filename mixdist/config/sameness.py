"""That every rank has the same rows, and the same weights at the start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mixdist.data import Samples, Source
from mixdist.mixtures import Mixture
from mixdist.mixtures.held import as_text, held, marks
from mixdist.parallel.agreement import Agreed, alike, gather_json
from mixdist.parallel.mesh import Mesh
from mixdist.terms import Owned


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
    """Check that modules begin with the same weights, up to rounding: processors may draw them by other instructions.

    Compared are shared modules, replicas of an expert and, where one class makes all, one that every rank has made
    once more; tensors beside weights too.

    Raises:
        Agreed: a rank has others, or of another shape.
    """
    own = {}
    for owned in _modules(mixture):
        for name, value in _tensors(owned.module).items():
            own[f"{owned.name} {name}"] = [list(value.shape), str(value.dtype), *marks(value)]
    first: dict[str, tuple[int, Any]] = {}
    for rank, weights in enumerate(gather_json(own, mesh.world)):
        for name, (*kind, norm, mark) in weights.items():
            holder, (*expected, known, known_mark) = first.setdefault(name, (rank, [*kind, norm, mark]))
            same = abs(norm - known) <= 1e-4 * known + 1e-30 and abs(mark - known_mark) <= 1e-3 * known + 1e-30
            if kind != expected or not same:
                raise Agreed(
                    f"the initial weights of {name} on rank {rank} ({kind[0]}, {kind[1]}, norm {norm:.6g}) differ from "
                    f"those on rank {holder} ({expected[0]}, {expected[1]}, norm {known:.6g}): a class of your own "
                    f"must draw them from torch's global generator, and depend on nothing that differs by rank"
                )


def _modules(mixture: Mixture) -> list[Owned]:
    """Return all modules of this rank, and the expert that every rank has made to compare."""
    twin = getattr(mixture, "twin", None)
    others = [] if twin is None or not getattr(mixture, "alike", False) else [Owned("expert 0", twin, 0)]
    return [one for one in mixture.owned() if not others or one.name != "expert 0"] + others


def _tensors(module: torch.nn.Module) -> dict[str, Any]:
    """Return weights, and tensors and arrays that a module holds beside them."""
    beside = {name: value for name, value in held(module) if isinstance(value, (torch.Tensor, np.ndarray))}
    return {**module.state_dict(), **{name: torch.as_tensor(value) for name, value in beside.items()}}


def check_attributes(mixture: Mixture, mesh: Mesh) -> None:
    """Check that modules have the same numbers and words on every rank, as one read from the environment may not be.

    Compared are shared modules, replicas of an expert and, where one class makes all of them, different experts; and
    the score of a competition.

    Raises:
        Agreed: a rank has others.
    """
    own = [[owned.name, owned.expert is not None, _attributes(owned.module)] for owned in mixture.owned()]
    if (score := getattr(mixture, "score_rule", None)) is not None:
        own.append(["the score", False, _attributes(score)])
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


def _attributes(one: Any) -> dict[str, str]:
    """Return what an object and the modules inside it hold beside tensors: numbers, words and lists of these."""
    return {name: as_text(value) for name, value in held(one) if not isinstance(value, (torch.Tensor, np.ndarray))}
