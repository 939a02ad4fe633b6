"""What gates, experts and scores say of themselves, and that modules are apart from each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mixdist.experts import Expert
from mixdist.gates import Gate
from mixdist.mixtures.context import Context
from mixdist.mixtures.probe import Fault
from mixdist.noise import Purpose
from mixdist.terms import Spec

MADE_TWICE = 1 << 22
"""Parameters up to which a module is made twice, to see that it is the same: a tenth of a second."""


def check_fields(key: str, module: Any, spec: Spec) -> None:
    """Check the ``fields`` that a gate, expert or score reads against those of the data.

    Raises:
        ValueError: a field is missing, or fields, noise_shape or latent_shape are of another type.
    """
    kind, fields = type(module).__name__, module.fields
    if not isinstance(fields, (tuple, list)) or not all(isinstance(name, str) for name in fields):
        raise ValueError(f"{key}: {kind}.fields ({fields!r}) must be a tuple of names: give ('x',) for one field")
    for name in ("noise_shape", "latent_shape"):
        shape = getattr(module, name, None)
        if shape is not None and not (isinstance(shape, tuple) and all(isinstance(n, int) and n >= 0 for n in shape)):
            raise ValueError(f"{key}: {kind}.{name} ({shape!r}) must be None or a tuple of numbers, such as (4,)")
    for name in module.fields:
        if name not in spec:
            raise ValueError(
                f"{key} ({type(module).__name__}) needs the field {name!r}, but the data has {', '.join(spec)}: "
                f"change one"
            )


def check_declared(key: str, module: Gate | Expert, base: type[Gate] | type[Expert], spec: Spec) -> None:
    """Check the class of a gate or an expert, and what it says of itself.

    Raises:
        Fault: it is of another class, or says what cannot be.
    """
    kind = type(module).__name__
    if not isinstance(module, base):
        raise Fault(f"{key}: {kind} is no {base.__name__}: subclass mixdist.{base.__name__.lower()}s.{base.__name__}")
    check_fields(key, module, spec)
    for name in ("field", "target"):
        value = getattr(module, name, None)
        if value is not None and not (isinstance(value, str) and value in spec):
            raise Fault(
                f"{key}: {kind}.{name} ({value!r}) is no field of the data, which has {', '.join(spec)}: change it"
            )
    if isinstance(module, Gate):
        stages = module.stages
        if not isinstance(stages, tuple) or not stages or not all(isinstance(stage, str) for stage in stages):
            raise Fault(f"{key}: {kind}.stages ({stages!r}) must be a tuple of names: give ('joint',) for one stage")
    whole = {"latent": 1, "num_drawn": 0} if isinstance(module, Gate) else {"levels": 2}
    if module.log_px_is not in ("density", "mass", None):
        raise Fault(f"{key}: {kind}.log_px_is ({module.log_px_is!r}) must be 'density', 'mass' or None")
    for name, least in whole.items():
        value = getattr(module, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise Fault(f"{key}: {kind}.{name} ({value!r}) must be a whole number from {least}, or None")
    for name in ("stackable", "has_loss"):
        if not isinstance(value := getattr(module, name, True), bool):
            raise Fault(f"{key}: {kind}.{name} ({value!r}) must be True or False")


def check_apart(modules: Mapping[str, nn.Module]) -> None:
    """Check that modules, by name, share no parameter that learns: each would move it by an optimiser of its own.

    Raises:
        Fault: two share one; names both.
    """
    owners: dict[int, tuple[str, str]] = {}
    for owner, module in modules.items():
        for name, parameter in module.named_parameters():
            places = {id(parameter), parameter.untyped_storage().data_ptr() if parameter.numel() else id(parameter)}
            for place in places if parameter.requires_grad else ():
                first, other = owners.setdefault(place, (owner, name))
                if first != owner:
                    raise Fault(
                        f"{_named(owner, module)} and {_named(first, modules[first])} share a parameter ({name} of the "
                        f"one is {other} of the other), and each is to train by itself: make it in __init__, anew for "
                        f"each, or freeze it by requires_grad_(False)"
                    )


def _named(owner: str, module: nn.Module) -> str:
    return f"{owner} ({type(module).__name__})"


def is_small(module: nn.Module) -> bool:
    """Return whether a module may be made twice."""
    return sum(p.numel() for p in module.parameters()) <= MADE_TWICE


def check_made_alike(key: str, module: nn.Module, again: nn.Module) -> None:
    """Check that a module made twice with one seed has the same weights, in parameters of its own.

    Raises:
        Fault: it has others, or the same object.
    """
    kind = type(module).__name__
    check_apart({key: module, f"{key} made once more": again})
    others = again.state_dict()
    for name, value in module.state_dict().items():
        other = others.get(name)
        if other is None or other.shape != value.shape or not torch.equal(value.nan_to_num(), other.nan_to_num()):
            raise Fault(
                f"{key}: {kind}.__init__ makes another {name} when it is called again with the same seed, so that the "
                f"run would be no function of its seed: draw weights from torch's global generator, as torch.randn does"
            )


def made_gate(
    context: Context, make: Callable[[Spec, int], Gate], num_experts: int, experts: Mapping[int, Expert]
) -> Gate:
    """Return a new gate, once it is seen to be its own and a function of the seed.

    Raises:
        Fault: it is not.
    """
    key, gate = "mixture.gate", _gate(context, make, num_experts)
    check_declared(key, gate, Gate, context.spec)
    for e, expert in experts.items():  # in a stack they lie side by side
        check_apart({"gate": gate, f"expert {e}": expert})
    if is_small(gate):
        check_made_alike(key, gate, _gate(context, make, num_experts))
    return gate


def _gate(context: Context, make: Callable[[Spec, int], Gate], num_experts: int) -> Gate:
    return context.make(lambda: make(context.spec, num_experts), Purpose.GATE, key="mixture.gate")
