"""What a family of one's own must be, seen from a backward pass on a few rows that leaves no gradient behind.

Local losses sum to the global loss: so how the rows of a batch lie on the ranks, and in how many micro-batches they
run, changes neither the loss nor a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixdist.data import RankBatch, share
from mixdist.messages import describe_failure
from mixdist.mixtures.guards import guarded
from mixdist.mixtures.held import astray
from mixdist.mixtures.learning import REGISTER
from mixdist.mixtures.mixture import Mixture, Stage
from mixdist.mixtures.probe import COARSE, Fault, check_column, module_state, shown
from mixdist.noise import Moment
from mixdist.parallel.agreement import agreed, gather_json
from mixdist.parallel.wire import LostRank
from mixdist.terms import Batch, Outcome

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Relative differences of gradients, by dtype, that sums in another order do not reach."""
Gradients = dict[str, dict[str, Tensor | None]]


class Result(NamedTuple):
    """What a dry run leaves on this rank: gradients by module and parameter, of frozen ones and others apart."""

    outcome: Outcome
    gradients: Gradients
    frozen: list[str]
    unlisted: list[str]


def check_backward(mixture: Mixture, rows: Batch, at: Moment, stage: Stage) -> None:
    """Check a family's ``backward`` on a few rows; every rank calls it.

    Args:
        mixture: the family.
        rows: the same on every rank.
        at: names the draws.
        stage: the phase of training.

    Raises:
        Agreed: it breaks its contract; the same message on every rank.
    """
    mesh, kind, num_rows = mixture.context.mesh, type(mixture).__name__, len(rows["id"])
    who, num_ranks = f"mixture: {kind}.backward", mesh.world_size
    even = tuple(len(share(num_rows, rank, num_ranks)) for rank in range(num_ranks))
    with _kept(mixture):
        first = agreed(lambda: _run(mixture, rows, even, at, stage, who), mesh.world)
        _check_shapes(who, first.outcome, mesh.world)
        _check_gradients(who, mixture, first)
        if num_ranks == 1:
            other = agreed(lambda: _run(mixture, rows, even, at, stage, who, num_parts=2), mesh.world)
            told = "for num_parts 2 than for 1: the gradient of a batch is the same for any number of micro-batches"
        elif num_rows >= 2 * num_ranks:
            uneven = (num_rows - num_ranks + 1, *[1] * (num_ranks - 1))
            other = agreed(lambda: _run(mixture, rows, uneven, at, stage, who), mesh.world)
            told = f"where {uneven} rows lie on the ranks than where {even} do"
        else:
            return
        agreed(lambda: _check_same(who, mixture, first, other, told), mesh.world)


def check_measure(mixture: Mixture, rows: Batch, at: Moment) -> None:
    """Check a family's ``measure`` on a few rows, of which each rank has a part.

    Raises:
        Fault: it breaks its contract.
    """
    if type(mixture).measure is Mixture.measure:
        return
    mesh, who = mixture.context.mesh, f"mixture: {type(mixture).__name__}.measure"
    counts = tuple(len(share(len(rows["id"]), rank, mesh.world_size)) for rank in range(mesh.world_size))
    with _explained(who), _kept(mixture), torch.no_grad():
        found = mixture.measure(_part(mixture, rows, counts), at)
    if not isinstance(found, Mapping) or not all(isinstance(value, (Tensor, float, int)) for value in found.values()):
        inside = ", ".join(map(shown, found.values())) if isinstance(found, Mapping) else shown(found)
        raise Fault(f"{who} returns {inside}, expected tensors by name: return sums over the batch's rows in a dict")


def _part(mixture: Mixture, rows: Batch, counts: tuple[int, ...]) -> RankBatch:
    """Return this rank's part of a few rows."""
    rank = mixture.context.mesh.rank
    first = sum(counts[:rank])
    return RankBatch({name: column[first : first + counts[rank]] for name, column in rows.items()}, counts)


@contextmanager
def _explained(who: str) -> Iterator[None]:
    """Turn what goes wrong inside into one line, and draws from a global generator too."""
    with guarded() as touched:
        try:
            yield
        except (LostRank, Fault):
            raise
        except Exception as error:
            raise Fault(f"{who} fails ({describe_failure(error)}): fix it") from error
    if touched.changed:
        raise Fault(f"{who} {touched.told}: leave it as it is")
    if touched.drawn_from:
        raise Fault(
            f"{who} {touched.told}, so that results would depend on the layout: draw by at.draw(purpose), "
            f"which is keyed by row"
        )


@contextmanager
def _kept(mixture: Mixture) -> Iterator[None]:
    """Put gradients, buffers and the family's own state back at the end."""
    tensors = [*(p for m in _modules(mixture).values() for p in m.parameters()), *mixture.parts.stack.values()]
    grads = [(tensor, tensor.grad) for tensor in tensors]
    buffers = [(buffer, buffer.clone()) for m in _modules(mixture).values() for buffer in m.buffers()]
    state = mixture.state()
    try:
        yield
    finally:
        for tensor, grad in grads:
            tensor.grad = grad
        with torch.no_grad():
            for buffer, kept in buffers:
                if not torch.equal(buffer, kept):
                    buffer.copy_(kept)
        if mixture.state() != state:
            mixture.load_state(state)


def _modules(mixture: Mixture) -> dict[str, nn.Module]:
    """Return the modules that a family lists, and those that it holds in attributes, dicts and lists."""
    found = {owned.name: owned.module for owned in mixture.owned()}
    for name, value in vars(mixture).items():
        inside: Sequence[Any] = (value,)
        if isinstance(value, (dict, list, tuple)):
            inside = list(value.values()) if isinstance(value, dict) else value
        found |= {f"{name} {i}" if i else name: one for i, one in enumerate(inside) if isinstance(one, nn.Module)}
    return found


def _run(
    mixture: Mixture, rows: Batch, counts: tuple[int, ...], at: Moment, stage: Stage, who: str, num_parts: int = 1
) -> Result:
    """Run ``backward`` on this rank's part of the rows, from no gradients at all."""
    modules, parts, states = _modules(mixture), mixture.parts, {}
    stacked = set(map(id, parts.stack.values()))  # a bank holds them, for the experts whose parameters lie in them
    found = [(path, name, t) for name, module in modules.items() for path, t in astray(module).items()]
    strays = [one for one in found if id(one[2]) not in stacked]
    for _, _, tensor in strays:
        tensor.grad = None
    for name, module in modules.items():
        states[name] = module_state(module)
        for parameter in module.parameters():
            parameter.grad = None
    for tensor in parts.stack.values():
        tensor.grad = None
    with _explained(who):
        outcome = mixture.backward(_part(mixture, rows, counts), stage.objective, at, num_parts)
    for name, module in modules.items():
        if changed := [n for n, mark in module_state(module).items() if states[name].get(n) != mark]:
            raise Fault(
                f"{who} changes {changed[0]} of {name} ({type(module).__name__}): a step may depend on parameters, "
                f"rows and noise alone; treat each row by itself, as nn.LayerNorm and nn.GroupNorm do"
            )
    for path, name, tensor in strays:
        if tensor.grad is not None:
            tensor.grad = None
            raise Fault(f"{who} gives {path} of {name} a gradient, which is no parameter of it, {REGISTER}")
    _read_outcome(who, outcome)
    listed = {id(p) for owned in mixture.owned() for p in owned.module.parameters()}
    held = ((name, p) for name, module in modules.items() for p in module.parameters() if id(p) not in listed)
    unlisted = [name for name, p in held if p.grad is not None]
    gradients: Gradients = {}
    frozen = []
    for place, owned in enumerate(parts.owned()):
        for name, p in owned.module.named_parameters():
            grad = p.grad
            if owned.expert is not None and name in parts.stack:
                whole = parts.stack[name].grad
                grad = None if whole is None else whole[place - len(parts.shared)]
            if p.requires_grad:
                gradients.setdefault(owned.name, {})[name] = grad
            elif grad is not None and bool(grad.any()):
                frozen.append(f"{name} of {owned.name}")
    return Result(outcome, gradients, frozen, unlisted)


def _read_outcome(who: str, outcome: Any) -> None:
    remedy = "return Outcome(loss.detach(), parts), this rank's part of the sum over the global batch"
    if not isinstance(outcome, Outcome):
        raise Fault(f"{who} returns {shown(outcome)}, expected mixdist.terms.Outcome: {remedy}")
    try:
        check_column("loss", outcome.loss, (), remedy)
        for name in ("parts", "sums", "faults"):
            group = getattr(outcome, name)
            if not isinstance(group, Mapping):
                raise ValueError(f"returns {name} as {shown(group)}, expected tensors by name: give a dict")
            for key, value in group.items():
                shape = () if name == "parts" else tuple(getattr(value, "shape", ()))
                check_column(f"{name}[{key!r}]", value, shape, "give a tensor summed over this rank's rows")
    except ValueError as fault:
        raise Fault(f"{who} {fault}") from None


def _check_shapes(who: str, outcome: Outcome, world: Any) -> None:
    """Check that every rank returns the same names and shapes: they are summed over ranks."""
    groups = {name: getattr(outcome, name) for name in ("parts", "sums", "faults")}
    own = {f"{group}[{key!r}]": list(value.shape) for group, one in groups.items() for key, value in one.items()}
    everyone = gather_json(list(own.items()), world)

    def check() -> None:
        for rank, other in enumerate(everyone):
            for mine, theirs in zip(everyone[0] + [None] * len(other), other + [None] * len(everyone[0]), strict=False):
                if mine != theirs:
                    raise Fault(
                        f"{who} returns {_pair(theirs)} on rank {rank} and {_pair(mine)} on rank 0: return the same "
                        f"names, in one order, and shapes on every rank, also on one without rows"
                    )

    agreed(check, world)


def _pair(one: Any) -> str:
    return "nothing more" if one is None else f"{one[0]} of shape {tuple(one[1])}"


def _check_gradients(who: str, mixture: Mixture, result: Result) -> None:
    """Check that gradients reach what is said to train, and nothing else."""
    world = mixture.context.mesh.world
    own = {name: [[n for n, g in grads.items() if g is None], len(grads)] for name, grads in result.gradients.items()}
    missing: dict[str, tuple[set[str], int]] = {}
    for rank in gather_json(own, world):
        for name, (names, number) in rank.items():
            missing[name] = set(names) & missing.get(name, (set(names), 0))[0], number

    def check() -> None:
        if result.frozen:
            raise Fault(f"{who} gives {result.frozen[0]} a gradient, which is frozen here: leave it alone")
        if result.unlisted:
            raise Fault(
                f"{who} gives {result.unlisted[0]} a gradient, but parts does not list it, so that it neither trains "
                f"nor is saved: name it in parts"
            )
        if missing and all(len(names) == number for names, number in missing.values()):
            raise Fault(f"{who} leaves no gradient: call backward() on the loss, computed from the parameters")
        for name, (names, number) in missing.items():
            without_rows = len(names) == number and name.startswith("expert ")
            if names and not without_rows:
                raise Fault(
                    f"{who} leaves the parameter {min(names)} of {name} without a gradient, and it is to train: use "
                    f"it, remove it, or freeze it by requires_grad_(False)"
                )

    agreed(check, world)


def _check_same(who: str, mixture: Mixture, one: Result, other: Result, told: str) -> None:
    """Check that two ways to run the same rows have one loss and one gradient, summed over ranks."""
    mesh, over_batch = mixture.context.mesh, mixture.dispatch.over_batch
    remedy = (
        "return this rank's part of a sum over the global batch: divide by batch.total, take statistics of the batch "
        "by dispatch.over_batch, and share what every rank computes in full"
    )
    losses = over_batch.sum(torch.stack([one.outcome.loss, other.outcome.loss]).detach().double())
    found = [("the loss", losses[:1], losses[1:])]
    for name, grads in one.gradients.items():
        like = dict(next(o.module for o in mixture.parts.owned() if o.name == name).named_parameters())
        group = mesh.replica_group if name.startswith("expert ") else mesh.world
        first, second = (
            mixture.context.wire.all_reduce(_flat(like, some), group) for some in (grads, other.gradients[name])
        )
        found.append((f"the gradient of {name}", first, second))
    tolerance = TOLERANCE[mixture.context.dtype]
    largest = max(float(first.abs().max()) for _, first, _ in found[1:])
    for name, first, second in found:
        scale = max(float(first.abs().max()), COARSE * largest)
        if float((first - second).abs().max()) > tolerance * scale:
            ratio = float(second.double().norm() / first.double().norm().clamp(min=1e-30))
            raise Fault(f"{who} makes {name} {ratio:.4g} times as large {told}: {remedy}")


def _flat(parameters: Mapping[str, Tensor], grads: Mapping[str, Tensor | None]) -> Tensor:
    """Return gradients side by side, in float64, zeros where there is none."""
    found = [torch.zeros_like(parameters[n]) if g is None else g for n, g in grads.items()]
    return torch.cat([g.detach().reshape(-1).double() for g in found])
