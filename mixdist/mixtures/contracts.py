"""What a gate and an expert must be: shapes, dtypes, ranges, purity.

Each check calls a module on a few rows (:class:`mixdist.mixtures.probe.Probe`), which changes nothing: no gradient, no
buffer, no generator. Shape letters: n rows of the check, E experts, S importance samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixdist.experts import Expert
from mixdist.gates import Gate
from mixdist.mixtures.covered import is_covered
from mixdist.mixtures.learning import check_learns
from mixdist.mixtures.probe import COARSE, Columns, Fault, Probe, check_column, shown
from mixdist.nets import flat
from mixdist.nets.likelihood import Likelihood
from mixdist.terms import Batch, ExpertTerms, Gating

NORMALISED = {torch.float64: 1e-6, torch.float32: 1e-3}
"""By how much log sum_e q(e|x) may differ from 0."""
IN_RANGE = 1e-4
"""By how much a value may lie outside of its range."""
SUM = "sum over all axes but the first"


@dataclass(frozen=True)
class Rows:
    """A few rows of numbers, and what is checked with them.

    Args:
        values: real numbers and classes by field, with "id".
        dtype: of real numbers.
        takes_none: whether a module may be given no rows.
    """

    values: Batch
    dtype: torch.dtype
    takes_none: bool = False

    def of(self, module: Any) -> Batch:
        """Return the rows as a module gets them, with the fields that it reads."""
        return {name: self.values[name] for name in ("id", *dict.fromkeys(module.fields))}


def check_gate(
    key: str, gate: Gate, rows: Rows, eps: Tensor | None, num_experts: int, trains: bool
) -> tuple[Gating, list[Any]]:
    """Check a gate.

    Args:
        key: of the gate in the config.
        gate: the gate, in training or in evaluation.
        rows: a few.
        eps: noise for them.
        num_experts: E.
        trains: whether it is to learn.

    Returns:
        what it says of the rows, and the likelihoods that it uses with the field that each is of.

    Raises:
        Fault: it breaks its contract.
    """
    remedy = "return Gating(torch.log_softmax(logits, dim=1)), with one column for each expert"

    def read(gating: Any, num_rows: int) -> Columns:
        if not isinstance(gating, Gating):
            raise ValueError(f"returns {shown(gating)}, expected mixdist.terms.Gating: {remedy}")
        columns = {"log_resp_BE": check_column("log_resp_BE", gating.log_resp_BE, (num_rows, num_experts), remedy)}
        if gating.loss_B is not None:
            columns["loss_B"] = check_column("loss_B", gating.loss_B, (num_rows,), f"{SUM}, or leave it out")
        return columns

    who = f"{key}: {type(gate).__name__}.forward"
    used: list[tuple[Likelihood, str]] = []

    def call(module: Gate, values: Batch, noise: Tensor | None) -> Any:
        with _watched(who, module, values, used):
            return module(values, noise)

    gating: Gating = Probe(who, call, (gate,), read, rows.dtype, rows.takes_none, is_covered(gate))(rows.of(gate), eps)
    log_resp_BE = gating.log_resp_BE
    _check_normalised(who, log_resp_BE.detach())
    _check_finite(who, "loss_B", gating.loss_B, rows.values["id"])
    if trains:
        outputs = [log_resp_BE] if gating.loss_B is None else [log_resp_BE, gating.loss_B]
        check_learns(key, who, "log_resp_BE", gate, outputs, "experts")
    return gating, list(dict.fromkeys(used))


def _check_normalised(who: str, log_resp_BE: Tensor) -> None:
    """Check that exp of each row sums to 1."""
    total_B = log_resp_BE.double().logsumexp(1)
    if bool(log_resp_BE.isnan().any()):
        raise Fault(f"{who} returns log_resp_BE that is not a number: look at its rows and its network")
    off = total_B.abs() > NORMALISED[log_resp_BE.dtype if log_resp_BE.dtype in NORMALISED else torch.float32]
    if not bool(off.any()):
        return
    row_E = log_resp_BE[off][0].double()
    told = f"log_resp_BE whose exp sums to {row_E.exp().sum():.4g} in a row, expected 1"
    if abs(row_E.sum() - 1) < COARSE and bool((row_E >= 0).all()):
        raise Fault(f"{who} returns probabilities, not their logarithms ({told}): return log_softmax, not softmax")
    raise Fault(f"{who} returns {told}: raw logits need torch.log_softmax(logits, dim=1)")


def _check_finite(who: str, name: str, column: Tensor | None, ids: Tensor, about: str = "") -> None:
    if column is None or bool(column.isfinite().all()):
        return
    bad = int((~column.isfinite()).nonzero()[0, 0])
    value = column.detach()[bad].item()
    raise Fault(f"{who} returns {name} {value} for sample {ids[bad]}{about}: scale the data, or bound what it computes")


def check_expert(
    key: str, expert: Expert, rows: Rows, eps: Tensor | None, trains: bool, reads_features: bool = False
) -> tuple[Tensor, list[Any]]:
    """Check an expert.

    Args:
        key: of the expert in the config.
        expert: the expert, in training or in evaluation.
        rows: a few.
        eps: noise for them.
        trains: whether it is to learn.
        reads_features: whether the family learns by what the expert returns beside its loss.

    Returns:
        its losses (n,), and the likelihoods that it uses with the field that each is of.

    Raises:
        Fault: it breaks its contract.
    """
    remedy = "return ExpertTerms(loss_R), one number a row; " + SUM

    def read(terms: Any, num_rows: int) -> Columns:
        if not isinstance(terms, ExpertTerms):
            raise ValueError(f"returns {shown(terms)}, expected mixdist.terms.ExpertTerms: {remedy}")
        columns = {"loss_R": check_column("loss_R", terms.loss_R, (num_rows,), remedy)}
        for name in ("log_px_R", "kl_R"):
            if getattr(terms, name) is not None:
                columns[name] = check_column(name, getattr(terms, name), (num_rows,), f"{SUM}, or leave it out")
        return columns | _features(terms.features, num_rows)

    who = f"{key}: {type(expert).__name__}.forward"
    used: list[tuple[Likelihood, str]] = []

    def call(module: Expert, values: Batch, noise: Tensor | None) -> Any:
        with _watched(who, module, values, used):
            return module(values, noise)

    terms = Probe(who, call, (expert,), read, rows.dtype, rows.takes_none, is_covered(expert))(rows.of(expert), eps)
    ranges = [f"{n} from {x.min():.4g} to {x.max():.4g}" for n, x in rows.of(expert).items() if x.is_floating_point()]
    _check_finite(who, "loss_R", terms.loss_R, rows.values["id"], f" ({', '.join(ranges)})")
    for name in ("log_px_R", "kl_R"):
        _check_finite(who, name, getattr(terms, name), rows.values["id"])
    if trains:
        # Elsewhere nothing reads features: what only they depend on would not learn.
        outputs = [terms.loss_R, *(terms.features.values() if reads_features else ())]
        check_learns(key, who, "loss_R", expert, outputs, "gate")
    return terms.loss_R.detach(), list(dict.fromkeys(used))


def check_decoder(key: str, decoder: nn.Module, log_prob: Callable[..., Any], rows: Rows, given: Tensor) -> list[Any]:
    """Check a decoder that experts share: ``log_prob(decoder, values, given)`` of a few rows and what is decoded.

    Returns:
        the likelihoods that it uses with the field that each is of.

    Raises:
        Fault: it breaks its contract.
    """
    used: list[tuple[Likelihood, str]] = []

    def read(log_px_R: Any, num_rows: int) -> Columns:
        return {"log p(x)": check_column("log p(x)", log_px_R, (num_rows,), SUM)}

    def call(module: nn.Module, values: Batch, some: Tensor) -> Any:
        with _watched(key, module, values, used):
            return log_prob(module, values, some)

    found = Probe(key, call, (decoder,), read, rows.dtype, rows.takes_none, is_covered(decoder))(rows.values, given)
    _check_finite(key, "log p(x)", found, rows.values["id"])
    return list(dict.fromkeys(used))


def _features(features: Any, num_rows: int) -> dict[str, Tensor]:
    """Return the real ones of an expert's features, once each is seen to have a row for each row."""
    remedy = "return tensors by name, the row axis first, or leave it out"
    if not isinstance(features, Mapping):
        raise ValueError(f"returns features as {shown(features)}, expected a dict: {remedy}")
    columns = {f"features[{name!r}]": value for name, value in features.items()}
    for name, value in columns.items():
        if not isinstance(value, Tensor) or value.is_nested or value.shape[:1] != (num_rows,):
            raise ValueError(f"returns {name} as {shown(value)}, expected a tensor ({num_rows}, ...): {remedy}")
    return {name: value for name, value in columns.items() if value.is_floating_point()}


@contextmanager
def _watched(who: str, module: nn.Module, values: Batch, used: list[tuple[Likelihood, str]]) -> Iterator[None]:
    """Check what the likelihoods of a gate or an expert are given and return, and note the field that each is of."""
    found = [m for m in module.modules() if isinstance(m, Likelihood)]
    for one in found:
        one.__dict__["log_prob"] = _checked(who, one, one.log_prob, values, used)
    try:
        yield
    finally:
        for one in found:
            del one.__dict__["log_prob"]


def _checked(
    who: str, likelihood: Likelihood, log_prob: Callable[..., Any], values: Batch, used: list[tuple[Likelihood, str]]
) -> Callable[..., Any]:
    """Return ``log_prob`` with checks."""

    def checked(x: Tensor, output: Tensor) -> Any:
        result, expected = log_prob(x, output), torch.broadcast_shapes(x.shape[:-1], output.shape[:-1])
        if not isinstance(result, Tensor) or result.shape != expected:
            raise Fault(
                f"{who} calls {type(likelihood).__name__}.log_prob, which returns {shown(result)}, expected a tensor "
                f"{tuple(expected)}, one number a row: sum over features, as .sum(-1)"
            )
        field = next((n for n, v in values.items() if x.numel() and torch.equal(flat(v).to(x), x)), "")
        if field:
            used.append((likelihood, field))
        check_range(who, likelihood, field or "x", x)
        return result

    return checked


def check_range(who: str, likelihood: Likelihood, field: str, x: Tensor) -> None:
    """Check values against what a likelihood can model.

    Raises:
        Fault: some lie outside.
    """
    if likelihood.limits is None or not x.numel():
        return
    (low, high), (least, most) = likelihood.limits, (float(end) for end in x.aminmax())
    if not (least >= low - IN_RANGE and most <= high + IN_RANGE):
        kind = f"{likelihood.name}{'' if 'bernoulli' in likelihood.name else ' with mean sigmoid'}"
        raise Fault(
            f"{who} gives {type(likelihood).__name__}.log_prob ({kind}) the field {field!r} with values from "
            f"{least:.6g} to {most:.6g}, expected {low:g} to {high:g}: give the Field in the source a scale (and "
            f"offset) that bring its values there, or choose likelihood gaussian with mean identity"
        )
