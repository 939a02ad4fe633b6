"""Experts that a gate weighs for each row.

Shape letters: B rows on this rank, R rows routed here, E all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixdist.data import RankBatch, Samples, share
from mixdist.experts import Compute
from mixdist.gates import Gate
from mixdist.mixtures.context import Context
from mixdist.mixtures.declared import made_gate
from mixdist.mixtures.ensemble import Ensemble, Execution, MakeExpert
from mixdist.mixtures.figures import ExpertEvaluation
from mixdist.mixtures.gate_shown import drawn_of_gate, gate_pictures
from mixdist.mixtures.gate_start import check_stages, start_gate
from mixdist.mixtures.mixture import Stage
from mixdist.mixtures.pictures import Picture
from mixdist.mixtures.study import Evaluation
from mixdist.noise import Moment, Purpose, permutation
from mixdist.parallel.route import Route
from mixdist.terms import Batch, Gating, Spec

SHARES_FROM = 1 << 16
"""Training rows that shares are a mean over; where there are more, so many of them, chosen by the seed."""


class Gated(Ensemble):
    """Base of mixtures with a gate, which is replicated on every rank and says how experts weigh for a row.

    Its arguments and errors are those of :class:`mixdist.mixtures.Soft`.
    """

    shares_are = f"mean responsibilities over the training rows ({SHARES_FROM} of them where there are more)"

    def __init__(
        self,
        gate: Callable[[Spec, int], Gate],
        expert: MakeExpert | list[MakeExpert],
        num_experts: int | None = None,
        execution: Execution = "auto",
        compute: Compute = Compute(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(expert, num_experts, execution, compute)
        self.make_gate = gate

    def setup(self, context: Context) -> None:
        super().setup(context)
        self.gate = made_gate(context, self.make_gate, self.num_experts, self.bank.owned())

    def check_stages(self, stages: Mapping[str, Stage], num_rows: int) -> None:
        mute = next((type(one).__name__ for one in self.bank.owned().values() if not one.has_loss), None)
        check_stages(self.gate.model, stages, num_rows, mute, any(p.requires_grad for p in self.bank.parameters()))

    def describe(self, stages: Sequence[Stage]) -> dict[str, Any]:
        named = [stage.stage for stage in stages]
        told: dict[str, Any] = {} if set(named) == {"joint"} else {"stages": named}
        if any(map(self.gate.model.starts_at, named)):
            told["starts"] = self.gate.model.start_options()
        return super().describe(stages) | told

    def enter(self, stage: Stage) -> None:
        self.gate.model.enter(stage.stage)

    def start(self, dataset: Samples, stage: Stage, at: Moment) -> None:
        if self.gate.model.starts_at(stage.stage):
            start_gate(self.context, self.dispatch.over_batch, self.gate.model, dataset, at)

    def gating(self, rows: Batch, at: Moment) -> Gating:
        """Ask the gate about this rank's stored rows."""
        eps = None
        if self.gate.noise_shape is not None:
            eps = at.draw(Purpose.GATE).normal(rows["id"], [0], self.gate.noise_shape, self.dtype)[0]
        return self.gate(self.values(rows, self.gate.fields), eps)

    def choose(self, batch: RankBatch, route: Route, at: Moment) -> Gating:
        """Return the log weights of all experts for each row outside training: what routing leaves out is -inf."""
        return self.weights(batch.rows, at)

    def weights(self, rows: Batch, at: Moment) -> Gating:
        """Return the log weights of all experts for each of this rank's stored rows outside training."""
        return self.gating(rows, at)

    @property
    def decides_by(self) -> tuple[str, ...]:
        return self.gate.fields

    @torch.no_grad()
    def shares(self, dataset: Samples, batch_size: int, at: Moment) -> Tensor:
        """Return the mean weight of ``choose`` of each expert over ``SHARES_FROM`` rows at most, (E,) float64."""
        mesh, size = self.context.mesh, len(dataset)
        positions = torch.arange(size)
        if size > SHARES_FROM:
            positions = permutation(at.seed, at.phase, 1, size)[:SHARES_FROM].sort().values
        sum_E = torch.zeros(self.num_experts, dtype=torch.float64, device=mesh.device)
        for part in positions.split(batch_size):
            own = share(len(part), mesh.rank, mesh.world_size)
            rows = dataset.take(part[own.start : own.stop], fields=self.gate.fields)
            gating = self.weights({name: column.to(mesh.device) for name, column in rows.items()}, at)
            sum_E += gating.log_resp_BE.double().exp().sum(0)
        return self.dispatch.over_batch.sum(sum_E) / len(positions)

    def pictures(self, dataset: Samples, evaluation: Evaluation, seed: int) -> list[Picture]:
        """Return those of the experts, and of a gate that is a model."""
        shown = super().pictures(dataset, evaluation, seed)
        if self.context.mesh.rank:
            return shown
        assert isinstance(evaluation, ExpertEvaluation)
        of_gate = gate_pictures(self, self.gate.model, dataset, evaluation, seed)
        return [*of_gate, *shown] if self.common("has_loss") is False else [*shown, *of_gate]

    def gate_in_process(self) -> Gate:
        return self.gate

    # Samples: of the experts, or of a gate that is a model where they draw none.

    @property
    def drawn_field(self) -> str | None:
        gate = self.gate.model
        if (found := super().drawn_field) or any(facts.draws for facts in self.facts):
            return found
        return str(getattr(gate, "field", "x")) if gate.can("draw") and gate.can("log_pi") else None

    @property
    def drawn_of(self) -> str:
        return "expert" if super().drawn_field else "cluster"

    def draw(self, num_samples: int, evaluation: Evaluation, at: Moment) -> tuple[list[int], np.ndarray]:
        if super().drawn_field:
            return super().draw(num_samples, evaluation, at)
        counts, samples = drawn_of_gate(self.gate.model, num_samples, at, self.spec, self.dtype)
        return counts.tolist(), samples.cpu().numpy()
