"""A trained mixture on one process, for a notebook: ``mixdist.load(run)``.

Shape letters: N rows, E experts.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mixdist.build import DTYPES, build_experts, build_gate, read_spec
from mixdist.checkpoint import CheckpointStore, load_module, read_state
from mixdist.experts import Expert
from mixdist.gates import Gate
from mixdist.mesh import Launch, Mesh, Placement
from mixdist.mixtures import Owned
from mixdist.noise import Draw, Purpose
from mixdist.parsing import RESOLVED, read_config
from mixdist.routing import responsible
from mixdist.terms import Batch, ExpertTerms, Spec


class Model:
    """Gate and all experts of a run, in evaluation mode on the CPU.

    Rows are given as a tensor or array for the field "x", or as a dict by field; numbers of a field's stored type
    (uint8 pixels) are scaled as in training, others are taken as they are.

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
            ValueError: an unknown field, or rows of another shape.
        """
        named = given if isinstance(given, dict) else {"x": given}
        rows: Batch = {}
        for name, values in named.items():
            if name != "id":
                rows[name] = self._field(name, torch.as_tensor(values))
        first = next(iter(rows.values()))
        rows["id"] = torch.as_tensor(named.get("id", torch.arange(len(first))))
        return rows

    def _field(self, name: str, values: Tensor) -> Tensor:
        if name not in self.spec:
            raise ValueError(f"field {name!r} is not one of the model's: give {sorted(self.spec)}")
        field = self.spec[name]
        if values[0:1].numel() != field.num_values or values.dim() == 0:
            raise ValueError(f"field {name!r} has rows of shape {tuple(values.shape[1:])}: give rows of {field.shape}")
        values = values.reshape(-1, *field.shape)
        as_stored = field.num_classes is not None or (values.dtype == field.dtype and not values.is_floating_point())
        return field.values(values, self.dtype) if as_stored else values.to(self.dtype)

    @torch.no_grad()
    def responsibilities(self, rows: Tensor | np.ndarray | Batch) -> Tensor:
        """Give q(e|x), (N, E)."""
        named = self.rows(rows)
        eps = None
        if self.gate.noise_shape is not None:
            eps = Draw(self.seed, Purpose.GATE).normal(named["id"], [0], self.gate.noise_shape, self.dtype)[0]
        return self.gate(named, eps).log_resp_BE.exp()

    def assign(self, rows: Tensor | np.ndarray | Batch) -> Tensor:
        """Give the number of the most responsible expert of each row, (N,)."""
        return responsible(self.responsibilities(rows))

    @torch.no_grad()
    def terms(self, rows: Tensor | np.ndarray | Batch, expert: int) -> ExpertTerms:
        """Give an expert's loss, log p(x|z) and KL for each row, nats, with noise keyed by the row's id or place."""
        named, one = self.rows(rows), self.experts[expert]
        eps = None
        if one.noise_shape is not None:
            eps = Draw(self.seed, Purpose.POSTERIOR).normal(named["id"], [expert], one.noise_shape, self.dtype)[0]
        return one(named, eps)

    @torch.no_grad()
    def reconstruct(self, rows: Tensor | np.ndarray | Batch, expert: int | None = None) -> Tensor:
        """Reconstruct rows by one expert, or each by its most responsible one: (N, *shape of x)."""
        named = self.rows(rows)
        if expert is not None:
            return self.experts[expert].reconstruct(named)
        expert_N = self.assign(named)
        results = torch.empty_like(named["x"])
        for e in expert_N.unique().tolist():
            chosen = expert_N == e
            results[chosen] = self.experts[e].reconstruct({name: column[chosen] for name, column in named.items()})
        return results

    @torch.no_grad()
    def predict(self, rows: Tensor | np.ndarray | Batch) -> Tensor:
        """Give the responsibility-weighted mean of the experts' predictions (supervised mixtures)."""
        named = self.rows(rows)
        each = torch.stack([expert.predict(named) for expert in self.experts.values()], dim=1)
        return torch.einsum("ne,ne...->n...", self.responsibilities(named), each)

    @torch.no_grad()
    def sample(self, num_samples: int, expert: int, seed: int = 0) -> Tensor:
        """Draw from an expert's prior and decode: means of p(x|z), (num_samples, *shape of x)."""
        one = self.experts[expert]
        if one.noise_shape is None:
            raise ValueError(f"expert {expert} ({type(one).__name__}) has no prior to sample from: use predict")
        eps = Draw(seed, Purpose.PRIOR).normal(torch.arange(num_samples), [expert], one.noise_shape, self.dtype)
        return one.sample(eps[0])


def load(run: str | PathLike[str]) -> Model:
    """Make the model of a run's newest good checkpoint; neither the data nor the ranks that trained it are needed.

    Raises:
        ValueError: the directory holds no run, or no good checkpoint.
    """
    directory = Path(run)
    if not (directory / RESOLVED).is_file():
        raise ValueError(f"{directory} holds no run ({RESOLVED} is missing): name a directory that mixdist train made")
    config = read_config(directory / RESOLVED)
    mesh = Mesh(Placement.plan(config.num_experts, 1), Launch(), torch.device("cpu"))
    path, _ = CheckpointStore(directory / "checkpoints", mesh).choose()
    about = read_state(path)["run"]
    spec = read_spec(about["spec"])
    gate, experts = build_gate(config, spec), build_experts(config, spec, range(config.num_experts))
    load_module(path, Owned("gate", gate))
    for e, expert in experts.items():
        load_module(path, Owned(f"expert {e}", expert, e))
    return Model(gate, experts, spec, DTYPES[config.dtype], config.seed, about["class_names"])
