"""That gradients reach what is said to train, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixdist.mixtures.held import astray, held
from mixdist.mixtures.probe import Fault, reached

REGISTER = (
    "so that it neither trains nor is saved: keep modules in nn.ModuleList or nn.ModuleDict and a tensor as "
    "nn.Parameter, or freeze it by requires_grad_(False)"
)


def check_learns(key: str, who: str, name: str, module: nn.Module, outputs: Sequence[Tensor], other: str) -> None:
    """Check that gradients of a module's outputs reach all of it that is said to train, and nothing beside it.

    Args:
        key: of the module in the config.
        who: the method.
        name: of the output.
        module: the module.
        outputs: of the method, with their graphs.
        other: what may train in its place.

    Raises:
        Fault: they do not.
    """
    parameters, kind = dict(module.named_parameters()), type(module).__name__
    learn = {n: p for n, p in parameters.items() if p.requires_grad}
    if parameters and not learn:
        raise Fault(
            f"{key}: {kind} is to train, but none of its {len(parameters)} parameters requires a gradient "
            f"({next(iter(parameters))}, ...): leave some free, make them buffers, or set trains to {other}"
        )
    graphs = [one for one in outputs if one.requires_grad]
    if learn and not graphs:
        raise Fault(
            f"{who} returns {name} without a graph, so that no parameter of {kind} learns: compute it from the "
            f"parameters without detach, item, no_grad or rounding"
        )
    leaves = reached(graphs)
    _check_astray(who, name, module, leaves)
    missing = {n: p for n, p in learn.items() if id(p) not in leaves}
    missing = _without_gradient(missing, graphs) if missing else {}
    if missing:
        raise Fault(
            f"{who} returns {name} that does not depend on the parameter {next(iter(missing))} of {kind}, which is to "
            f"train: use it, remove it, or freeze it by requires_grad_(False)"
        )


def _check_astray(who: str, name: str, module: nn.Module, leaves: Mapping[int, Tensor]) -> None:
    """Check that a graph leads to no tensor that the module uses without having it as a parameter.

    What a method makes for itself, as inputs that a gradient is taken with respect to, is no such tensor.
    """
    own = {id(p) for p in module.parameters()}
    others = {place: leaf for place, leaf in leaves.items() if place not in own}
    if not others:
        return
    known = [path for path, tensor in astray(module).items() if id(tensor) in others]
    known += [
        f"a parameter {tuple(leaf.shape)} from elsewhere" for leaf in others.values() if isinstance(leaf, nn.Parameter)
    ]
    if known:
        raise Fault(
            f"{who} returns {name} that depends on {known[0]}, which requires a gradient and is no parameter of "
            f"{type(module).__name__}, {REGISTER}"
        )


def check_none_learn(key: str, one: Any, owner: str) -> None:
    """Check that what no optimiser has, has nothing that is to learn.

    Args:
        key: of it in the config.
        one: an objective, a balance term, a score.
        owner: what has parameters that train.

    Raises:
        Fault: it has a parameter, or a tensor that requires a gradient.
    """
    named = dict(one.named_parameters()) if isinstance(one, nn.Module) else {}
    for name, value in (*named.items(), *held(one)):
        if isinstance(value, Tensor) and value.requires_grad:
            raise Fault(
                f"{key}: {type(one).__name__} has {name}, which requires a gradient, and no optimiser has it: make it "
                f"a number or freeze it by requires_grad_(False); what is to learn belongs to {owner}"
            )


def _without_gradient(parameters: dict[str, nn.Parameter], outputs: Sequence[Tensor]) -> dict[str, nn.Parameter]:
    """Return the parameters that a backward pass leaves without gradient: what recomputes hides some from its graph."""
    kept = {one: one.grad for one in (*parameters.values(), *reached(outputs).values())}
    for one in kept:
        one.grad = None
    torch.autograd.backward([one.masked_fill(~one.isfinite(), 0.0).sum() for one in outputs], retain_graph=True)
    found = {name: one for name, one in parameters.items() if one.grad is None}
    for one, grad in kept.items():
        one.grad = grad
    return found
