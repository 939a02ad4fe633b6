"""A mixture of experts in one process, for a notebook: what ``mixdist.load`` returns.

Shape letters: N rows, E experts.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixdist.experts import Expert
from mixdist.gates import Gate
from mixdist.messages import one_line
from mixdist.mixtures.contracts import IN_RANGE
from mixdist.mixtures.gate_shown import samples_of_cluster
from mixdist.mixtures.routing import responsible
from mixdist.mixtures.samples import drawn
from mixdist.nets.likelihood import Likelihood
from mixdist.noise import EVALUATION_PHASE, Moment, Purpose
from mixdist.terms import STORED_INTEGERS, Batch, ExpertTerms, Field, Spec


class Model:
    """Gate and all experts of a run, in evaluation mode on the CPU.

    Rows are given as a tensor or array for the field "x", or as a dict by field, each (N, *shape) or flat (N, D), so
    images as (N, channels, height, width). Whole numbers are stored ones where the field is stored so (pixels from 0 to
    255, of any integer type), and scaled as in training; real numbers are taken as they are.

    Args:
        gate: the gate.
        experts: by global number.
        spec: the fields of rows.
        dtype: of real numbers.
        seed: of the run.
        class_names: of the label, or empty.
    """

    def __init__(
        self, gate: Gate, experts: dict[int, Expert], spec: Spec, dtype: torch.dtype, seed: int, class_names: list[str]
    ) -> None:
        self.gate, self.experts, self.spec, self.dtype = gate.eval(), experts, spec, dtype
        self.seed, self.class_names = seed, class_names
        for expert in experts.values():
            expert.eval()

    def rows(self, given: Tensor | np.ndarray | Batch) -> Batch:
        """Turn what a user gives into rows of numbers.

        Raises:
            ValueError: an unknown field, rows of another shape, or numbers that cannot be this field's.
        """
        named = given if isinstance(given, dict) else {"x": given}
        rows = {name: self._field(name, _tensor(name, values)) for name, values in named.items() if name != "id"}
        lengths = {name: len(column) for name, column in rows.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"rows have fields of lengths {lengths}: give at least one field, all equally long")
        num_rows = next(iter(lengths.values()))
        ids = _tensor("id", named.get("id", torch.arange(num_rows)))
        if ids.shape != (num_rows,) or ids.dtype not in STORED_INTEGERS:
            raise ValueError(
                f"id has shape {tuple(ids.shape)} of {ids.dtype}: give one whole number for each of {num_rows} rows"
            )
        return rows | {"id": ids.long()}

    def _field(self, name: str, values: Tensor) -> Tensor:
        if name not in self.spec:
            raise ValueError(f"field {name!r} is not one of the model's: give {sorted(self.spec)}")
        field = self.spec[name]
        axes = [n for n in values.shape[1:] if n != 1]  # an axis of one place changes no order
        if not values.dim() or axes not in ([n for n in field.shape if n != 1], [field.num_values]):
            wanted = ", ".join(map(str, ("N", *field.shape)))
            last = values.dim() == 4 and values.shape[1:] == (*field.shape[1:], *field.shape[:1])
            raise ValueError(
                f"field {name!r} has shape {tuple(values.shape)}: give N rows as ({wanted})"
                f"{', with numpy.moveaxis(rows, -1, 1)' if last else ''}"
            )
        if values.is_complex() or (field.num_classes is not None and values.is_floating_point()):
            wanted = "whole numbers" if field.num_classes else "real numbers"
            raise ValueError(f"field {name!r} is {values.dtype}, expected {wanted}: convert it")
        values = values.reshape(-1, *field.shape)
        whole = not values.is_floating_point() and (values.dtype != torch.bool or field.dtype == torch.bool)
        stored = field.num_classes is not None or (whole and field.dtype in STORED_INTEGERS)
        numbers = field.values(values, self.dtype) if stored else values.to(self.dtype)
        if values.numel():
            self._check_numbers(name, field, values.double() if stored else numbers, stored)
            if stored and field.num_classes is None:
                self._check_scaled(name, field, values, numbers)
        return numbers

    def _check_scaled(self, name: str, field: Field, stored: Tensor, numbers: Tensor) -> None:
        """Check stored numbers, once they are scaled, against what the likelihoods of the field can model.

        Raises:
            ValueError: they lie beyond it.
        """
        low, high = self._limits(name)
        least, most = (float(end) for end in numbers.aminmax())
        if not (low - IN_RANGE <= least and most <= high + IN_RANGE):
            ends = " to ".join(f"{float(end):g}" for end in stored.double().aminmax())
            first, last = sorted(
                (low - field.offset) / field.scale if math.isfinite(low) else low for low in (low, high)
            )
            raise ValueError(
                f"field {name!r} has whole numbers from {ends}, which the scale {field.scale:g} makes {least:g} to "
                f"{most:g}, expected {low:g} to {high:g}: give them as stored, {first:g} to {last:g}, or scaled"
            )

    def _limits(self, name: str) -> tuple[float, float]:
        """Return the range that the likelihoods of a field can model."""
        limits = [one.limits for one in self._likelihoods(name) if one.limits is not None]
        return max([-math.inf, *(low for low, _ in limits)]), min([math.inf, *(high for _, high in limits)])

    def _check_numbers(self, name: str, field: Field, given: Tensor, stored: bool) -> None:
        """Check numbers of a field against what they can be, as they are stored or as models see them.

        Raises:
            ValueError: they cannot be this field's.
        """
        low, high, remedy = -math.inf, math.inf, "remove what is no number"
        if field.num_classes is not None:
            low, high, remedy = 0.0, field.num_classes - 1.0, "give classes"
        elif field.dtype in STORED_INTEGERS:
            low, high = (0.0, 1.0) if field.dtype == torch.bool else _ends(field.dtype)
            remedy = f"give stored numbers of {field.dtype}"
            if not stored:
                low, high = sorted((low * field.scale + field.offset, high * field.scale + field.offset))
                remedy = f"give them as stored, whole numbers of {field.dtype}, or scaled"
        if not stored:
            ends = self._limits(name)
            low, high = max(low, ends[0]), min(high, ends[1])
        least, most = (float(end) for end in given.aminmax())
        if not (low - IN_RANGE <= least and most <= high + IN_RANGE) or not math.isfinite(most - least):
            raise ValueError(
                f"field {name!r} has numbers from {least:g} to {most:g}, expected {low:g} to {high:g}: {remedy}"
            )

    def _likelihoods(self, name: str) -> Iterator[Likelihood]:
        """Yield the likelihoods of the experts that model a field."""
        for one in self.experts.values():
            if getattr(one, "field", None) == name:
                yield from (m for m in one.modules() if isinstance(m, Likelihood))

    @torch.no_grad()
    def responsibilities(self, rows: Tensor | np.ndarray | Batch) -> Tensor:
        """Return q(e|x), (N, E)."""
        return self._log_responsibilities(self.rows(rows)).exp()

    def _log_responsibilities(self, named: Batch) -> Tensor:
        return self._run(self.gate, named, Purpose.GATE).log_resp_BE

    @staticmethod
    def _require(module: Gate | Expert, named: Batch, spared: str | None = None) -> None:
        for name in module.fields:
            if name not in named and name != spared:
                kind = type(module).__name__
                raise ValueError(
                    f"{kind} needs the field {name!r}, given were {sorted(named)}: give rows as a dict of fields"
                )

    def _run(self, module: Gate | Expert, named: Batch, purpose: Purpose, number: int = 0) -> Any:
        """Run rows with the noise of evaluation: given their ids from training they get that run's figures."""
        self._require(module, named)
        eps = None
        if module.noise_shape is not None:
            draw = Moment(self.seed, EVALUATION_PHASE).draw(purpose)
            eps = draw.normal(named["id"], [number], module.noise_shape, self.dtype)[0]
        return module(named, eps)

    @torch.no_grad()
    def assign(self, rows: Tensor | np.ndarray | Batch) -> Tensor:
        """Return the number of the most responsible expert of each row, (N,)."""
        return responsible(self._log_responsibilities(self.rows(rows)))

    @torch.no_grad()
    def terms(self, rows: Tensor | np.ndarray | Batch, expert: int) -> ExpertTerms:
        """Return an expert's loss, log p(x|z) and KL for each row, nats, with noise keyed by the row's id or place."""
        one, named = self._expert(expert), self.rows(rows)
        terms: ExpertTerms = self._run(one, named, Purpose.POSTERIOR, _index(expert))
        return terms

    def _expert(self, number: int) -> Expert:
        if not isinstance(number, bool) and _index(number) in self.experts:
            return self.experts[_index(number)]
        raise ValueError(f"expert {number!r} is not one of the model's: give 0 to {len(self.experts) - 1}")

    def _able(self, number: int, ability: str, named: Batch) -> Expert:
        one, number = self._expert(number), _index(number)
        if not one.can(ability):
            raise ValueError(f"expert {number} ({type(one).__name__}) does not {ability}: choose another")
        self._require(one, named, getattr(one, "target", None) if ability == "predict" else None)
        return one

    @torch.no_grad()
    def reconstruct(self, rows: Tensor | np.ndarray | Batch, expert: int | None = None) -> Tensor:
        """Reconstruct rows by one expert, or each by its most responsible one, or all by a gate alone.

        Returns:
            (N, *shape of x).
        """
        named, gate = self.rows(rows), self.gate.model
        if expert is not None:
            return self._able(expert, "reconstruct", named).reconstruct(named)
        if gate.can("reconstruct") and not any(one.can("reconstruct") for one in self.experts.values()):
            self._require(gate, named)
            return gate.reconstruct(named)
        fields = {getattr(one, "field", "x") for one in self.experts.values()}
        if len(fields) > 1:
            raise ValueError(f"experts reconstruct different fields ({', '.join(sorted(fields))}): name one expert")
        expert_N = self.assign(named)
        one = self._able(next(iter(self.experts)), "reconstruct", named)
        results = torch.empty_like(named[getattr(one, "field", "x")])
        for e in expert_N.unique().tolist():
            chosen, one = expert_N == e, self._able(e, "reconstruct", named)
            results[chosen] = one.reconstruct({name: column[chosen] for name, column in named.items()})
        return results

    @torch.no_grad()
    def predict(self, rows: Tensor | np.ndarray | Batch) -> Tensor:
        """Return the responsibility-weighted mean of the experts' predictions (supervised mixtures)."""
        named = self.rows(rows)
        each = torch.stack([self._able(e, "predict", named).predict(named) for e in self.experts], dim=1)
        return torch.einsum("ne,ne...->n...", self.responsibilities(named), each)

    @torch.no_grad()
    def sample(self, num_samples: int, expert: int, seed: int = 0, observed: bool = False) -> Tensor:
        """Draw from an expert's prior and decode: (num_samples, *shape of x).

        Args:
            num_samples: how many.
            expert: its number.
            seed: of the draws; the same numbers of the prior, observed or not.
            observed: draw from p(x|z), noise and all, as the density has it; otherwise the means of p(x|z).
        """
        one, expert = self._expert(expert), _index(expert)
        num_samples, seed = _draws(num_samples, seed)
        if one.noise_shape is None or not one.can("draw" if observed else "sample"):
            name = type(one).__name__
            raise ValueError(f"expert {expert} ({name}) has no prior to sample from: use predict of mixdist.load(RUN)")
        return drawn(one, expert, torch.arange(num_samples), Moment(seed), observed, self.spec, self.dtype)

    @torch.no_grad()
    def embed(self, rows: Tensor | np.ndarray | Batch) -> Tensor:
        """Return what a gate that is a model makes of rows: the means of its q(z|x), (N, L).

        Raises:
            ValueError: the gate is no model of rows.
        """
        named = self.rows(rows)
        gate = self._model_gate("embed")
        self._require(gate, named)
        return gate.embed(named)

    @torch.no_grad()
    def generate(self, num_samples: int, cluster: int, seed: int = 0) -> Tensor:
        """Draw rows of a cluster of a gate that is a model, as means of p(x|z): (num_samples, *shape of x).

        Raises:
            ValueError: the gate is no model of rows, or there is no such cluster.
        """
        gate = self._model_gate("sample")
        num_samples, seed = _draws(num_samples, seed)
        if isinstance(cluster, bool) or _index(cluster) not in self.experts:
            raise ValueError(f"cluster ({cluster!r}) must be from 0 to {len(self.experts) - 1}: choose another")
        return samples_of_cluster(gate, _index(cluster), num_samples, Moment(seed), len(self.experts), self.dtype)

    def _model_gate(self, ability: str) -> Gate:
        gate = self.gate.model
        if not gate.can(ability):
            raise ValueError(
                f"the gate ({type(gate).__name__}) does not {ability}: take a gate that is a model, as VaDE"
            )
        return gate

    def rows_of_samples(self, num_samples: int, seed: int = 0) -> dict[str, Tensor]:
        """Return samples of each expert, (num_samples, *shape of x), by a title; points in the plane with noise."""
        if self.gate.model.can("sample") and not any(one.can("sample") for one in self.experts.values()):
            return {f"cluster {e}": self.generate(num_samples, e, seed) for e in self.experts}
        plane = "x" in self.spec and self.spec["x"].shape == (2,)
        observed = plane and self.experts[0].can("draw")  # a cloud of means in the plane is no density
        return {f"expert {e}": self.sample(num_samples, e, seed, observed) for e in self.experts}


def _ends(dtype: torch.dtype) -> tuple[float, float]:
    """Return the least and the largest number of an integer type."""
    info = torch.iinfo(dtype)
    return float(info.min), float(info.max)


def _draws(num_samples: Any, seed: Any) -> tuple[int, int]:
    """Return how many samples are to be drawn, and the seed.

    Raises:
        ValueError: one is no whole number, or out of range.
    """
    if _index(num_samples) < 0:
        raise ValueError(f"num_samples ({num_samples!r}) must be a whole number from 0: give how many to draw")
    if not 0 <= _index(seed) < 2**64:
        raise ValueError(f"seed ({seed!r}) must be a whole number from 0 to 2**64 - 1: choose another")
    return _index(num_samples), _index(seed)


def _index(number: Any) -> int:
    """Return a whole number of any type; -1 for what is none."""
    try:
        return operator.index(number)
    except (TypeError, ValueError, RuntimeError):
        return -1


def _tensor(name: str, values: Any) -> Tensor:
    try:
        if isinstance(values, np.ma.MaskedArray):
            raise TypeError("a masked array")
        found = torch.as_tensor(values)
        if found.is_nested or found.layout != torch.strided:
            raise TypeError("a nested tensor" if found.is_nested else f"layout {found.layout}")
        return found.to("cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"field {name!r} cannot be made a tensor ({one_line(str(error))}): give a dense tensor or an array"
        ) from error
