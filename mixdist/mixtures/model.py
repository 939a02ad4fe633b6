"""A mixture of experts in one process, for a notebook: what ``mixdist.load`` returns.

Shape letters: N rows, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixdist.experts import Expert
from mixdist.gates import Gate
from mixdist.mixtures.gate_shown import drawn_of_cluster
from mixdist.mixtures.given import Rowed, draws, whole_number
from mixdist.mixtures.routing import responsible
from mixdist.mixtures.samples import drawn
from mixdist.nets.likelihood import Likelihood
from mixdist.noise import EVALUATION_PHASE, Moment, Purpose
from mixdist.terms import Batch, ExpertTerms, Spec


class Model(Rowed):
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
        super().__init__(spec, dtype)
        self.gate, self.experts = gate.eval(), experts
        self.seed, self.class_names = seed, class_names
        for expert in experts.values():
            expert.eval()

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
        terms: ExpertTerms = self._run(one, named, Purpose.POSTERIOR, whole_number(expert))
        return terms

    def _expert(self, number: int) -> Expert:
        if not isinstance(number, bool) and whole_number(number) in self.experts:
            return self.experts[whole_number(number)]
        raise ValueError(f"expert {number!r} is not one of the model's: give 0 to {len(self.experts) - 1}")

    def _able(self, number: int, ability: str, named: Batch) -> Expert:
        one, number = self._expert(number), whole_number(number)
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
        one, expert = self._expert(expert), whole_number(expert)
        num_samples, seed = draws(num_samples, seed)
        if one.latent_shape is None or not one.can("draw" if observed else "sample"):
            name, use = type(one).__name__, "generate" if self.gate.model.can("sample") else "predict"
            raise ValueError(f"expert {expert} ({name}) has no prior to sample from: use {use} of mixdist.load(RUN)")
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
    def generate(self, num_samples: int, cluster: int, seed: int = 0, observed: bool = False) -> Tensor:
        """Draw rows of a cluster of a gate that is a model: (num_samples, *shape of x).

        Args:
            num_samples: how many.
            cluster: its number.
            seed: of the draws; the same numbers of z, observed or not.
            observed: draw from p(x|z), noise and all; otherwise the means of p(x|z).

        Raises:
            ValueError: the gate is no model of rows, or there is no such cluster.
        """
        gate, num_samples, seed = self._model_gate("draw" if observed else "sample"), *draws(num_samples, seed)
        if isinstance(cluster, bool) or whole_number(cluster) not in self.experts:
            raise ValueError(f"cluster ({cluster!r}) must be from 0 to {len(self.experts) - 1}: choose another")
        of, ids = len(self.experts), torch.arange(num_samples)
        return drawn_of_cluster(gate, whole_number(cluster), ids, Moment(seed), of, self.spec, self.dtype, observed)

    def _model_gate(self, ability: str) -> Gate:
        gate = self.gate.model
        if not gate.can(ability):
            raise ValueError(
                f"the gate ({type(gate).__name__}) does not {ability}: take a gate that is a model, as VaDE"
            )
        return gate

    def rows_of_samples(self, num_samples: int, seed: int = 0) -> dict[str, Tensor]:
        """Return samples of each expert, (num_samples, *shape of x), by a title; points in the plane with noise."""
        plane = "x" in self.spec and self.spec["x"].shape == (2,)
        if self.gate.model.can("sample") and not any(one.can("sample") for one in self.experts.values()):
            observed = plane and self.gate.model.can("draw")
            return {f"cluster {e}": self.generate(num_samples, e, seed, observed) for e in self.experts}
        observed = plane and self.experts[0].can("draw")  # a cloud of means in the plane is no density
        return {f"expert {e}": self.sample(num_samples, e, seed, observed) for e in self.experts}
