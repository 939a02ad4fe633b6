"""Experts behind a dispatch, whatever decides who is responsible for a row.

Shape letters: B rows on this rank, R rows routed here, E all experts, e experts on this rank.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mixdist.data import RankBatch, Samples
from mixdist.experts import Compute, Expert, ExpertBank, Noise, time_executions
from mixdist.gates import Gate
from mixdist.mixtures import evidence, samples
from mixdist.mixtures.context import Context
from mixdist.mixtures.declared import check_apart, check_declared, check_made_alike, is_small
from mixdist.mixtures.expert_study import ExpertStudy
from mixdist.mixtures.facts import Facts
from mixdist.mixtures.figures import ExpertEvaluation
from mixdist.mixtures.members import inspect_both, inspect_experts, inspect_gate, inspect_stack
from mixdist.mixtures.mixture import Mixture, Outputs, Stage
from mixdist.mixtures.model import Model
from mixdist.mixtures.pictures import Picture
from mixdist.mixtures.posteriors import embedded
from mixdist.mixtures.probe import Fault, shown
from mixdist.mixtures.scores import Scores
from mixdist.mixtures.shown import expert_pictures
from mixdist.mixtures.study import Evaluation, Request, Study
from mixdist.noise import TRIAL_PHASE, Moment, Purpose
from mixdist.parallel.agreement import agreed, gather_json
from mixdist.parallel.route import Route
from mixdist.terms import Batch, ExpertTerms, Gating, Spec

MakeExpert = Callable[[Spec], Expert]
Execution = Literal["auto", "loop", "stacked"]


class Ensemble(Mixture):
    """Base of soft and hard mixtures: rows reach experts, and each row has weights over experts.

    Its arguments are those of :class:`mixdist.mixtures.Soft`.

    Attributes:
        shares_are: what ``shares`` returns, in words.
        reads_features: whether experts learn by their ``features`` too.

    Raises:
        ValueError: a number of experts that does not fit the list; a stack with options that are for a loop.
    """

    bank: ExpertBank
    twin: Expert | None
    shares_are: ClassVar[str]
    reads_features: ClassVar[bool] = False
    embed = embedded

    def __init__(
        self,
        expert: MakeExpert | list[MakeExpert],
        num_experts: int | None = None,
        execution: Execution = "auto",
        compute: Compute = Compute(),  # noqa: B008 (frozen)
    ) -> None:
        self.alike = not isinstance(expert, Sequence)
        self.make_experts = list(expert) if isinstance(expert, Sequence) else [expert] * (num_experts or 0)
        self.num_experts, self.execution, self.compute = len(self.make_experts), execution, compute
        if not self.num_experts or num_experts not in (None, self.num_experts):
            wanted = "give 1 or more" if self.alike else f"leave it out and list 1 or more (here {self.num_experts})"
            given = "null" if num_experts is None else num_experts
            raise ValueError(f"mixture.num_experts ({given}) must be the number of experts: {wanted}")
        for key in ("micro_batch", "recompute", "compile"):
            value = getattr(compute, key)
            if execution == "stacked" and value:
                raise ValueError(
                    f"mixture.compute.{key} ({value}) needs experts in a loop, and mixture.execution is stacked: set "
                    f"that to loop or auto"
                )

    def setup(self, context: Context) -> None:
        super().setup(context)
        self.spec, self.dtype = context.spec, context.dtype
        if self.compute.bf16 and self.dtype == torch.float64:  # autocast leaves it as it is
            raise ValueError(
                "mixture.compute.bf16 (true) does nothing for float64: set dtype to float32, or leave bf16 out"
            )
        experts = {e: self.make_expert(e) for e in context.mesh.experts}
        for e, expert in experts.items():
            check_declared(self.key_of(e), expert, Expert, self.spec)
        check_apart({f"expert {e}": expert for e, expert in experts.items()})
        self.twin = self._twin(experts)
        self.bank = ExpertBank(experts, "loop" if self.execution == "auto" else self.execution, self.compute)

    def make_expert(self, e: int, round: int = 0) -> Expert:
        """Return an expert with the initial weights of its number (and round of a competition)."""
        make = self.make_experts[e]
        expert = self.context.make(lambda: make(self.spec), Purpose.WEIGHTS, e, round, self.key_of(e))
        if self.expert_start is not None:
            self.expert_start.prepare(expert)
        return expert

    def key_of(self, e: int) -> str:
        """Return the key of an expert in a config."""
        return "mixture.expert" if self.alike else f"mixture.expert[{e}]"

    def _twin(self, experts: Mapping[int, Expert]) -> Expert | None:
        """Make one of the experts once more, to see that its weights are its number's; return it.

        Where one class makes all, it is the first of all on every rank; None where it would be large.
        """
        e = 0 if self.alike else next(iter(experts))
        if not is_small(next(iter(experts.values()))):
            return None
        twin = self.make_expert(e)
        check_apart({"expert made once more": twin, **{f"expert {n}": one for n, one in experts.items()}})
        if e in experts:
            check_made_alike(self.key_of(e), experts[e], twin)
        return twin

    def tune(self, dataset: Samples, stage: Stage) -> None:
        """Time a loop and a stack where execution is auto, and go on with the one that is faster on rank 0.

        Rows are as many as an expert sees in a micro-batch of the phase, the first ones of the data set.
        """
        bank, mesh, how = self.bank, self.context.mesh, self.compute
        if self.execution != "auto" or not self.alike or self.num_experts == 1:
            return
        if how.micro_batch or how.recompute or how.compile or not all(gather_json(bank.can_stack, mesh.world)):
            return  # what a stack cannot do
        seen = stage.batch_size / mesh.placement.num_replicas / stage.accumulate * self.part_of_rows
        stored = dataset.take(torch.arange(min(len(dataset), max(1, round(seen)))))
        rows = self.values({name: column.to(mesh.device) for name, column in stored.items()}, bank.fields)
        at, few = Moment(self.context.seed, TRIAL_PHASE), {name: column[:8] for name, column in stored.items()}
        agreed(lambda: inspect_both(self, few, at, stage), mesh.world)
        bank.timed = time_executions(bank.owned(), rows, self.noise(at), how)
        if gather_json(min(bank.timed, key=lambda way: bank.timed[way]), mesh.world)[0] == "stacked":
            bank.stack_up()

    def inspect(self, rows: Batch, batch: RankBatch, at: Moment, stage: Stage | None = None) -> Outputs:
        """Check the experts, and the gate where the family has one."""
        return self.inspect_members(rows, batch, at, stage)[2]

    def inspect_members(
        self, rows: Batch, batch: RankBatch, at: Moment, stage: Stage | None
    ) -> tuple[Tensor, Gating | None, Outputs]:
        """Check experts and gate; return the losses of an expert (n,), what the gate says of the rows, and outputs."""
        losses, outputs = inspect_experts(self, self.bank.owned(), rows, batch.rows, at, stage)
        inspect_stack(self, self.bank, rows, at, losses)
        gate = getattr(self, "gate", None)
        if not isinstance(gate, Gate):
            return losses, None, outputs
        gating, who = inspect_gate(self, gate, rows, batch.rows, at, stage), f"mixture.gate: {type(gate).__name__}"
        outputs[f"{who}.forward"] = gating.log_resp_BE.exp()
        if gating.loss_B is not None:
            outputs[f"{who}.forward (loss_B)"] = gating.loss_B
        return losses, gating, outputs

    def choices(self) -> dict[str, tuple[Any, str]]:
        """Return the execution that ``tune`` chose, and the times of both."""
        if self.execution != "auto":
            return {}
        timed = ", ".join(f"{way} {1000 * seconds:.2f} ms" for way, seconds in self.bank.timed.items())
        return {"execution": (self.bank.execution, f"{timed} a pass" if timed else "")}

    @property
    def part_of_rows(self) -> float:
        """The part of a batch's rows that an expert sees on average."""
        return 1.0

    def gradients(self, stages: Sequence[Stage]) -> list[float]:
        return [spent * self.part_of_rows for spent in super().gradients(stages)]

    # What decides

    @abstractmethod
    def choose(self, batch: RankBatch, route: Route, at: Moment) -> Gating:
        """Return the log weights of all experts for each of this rank's rows outside training."""

    @property
    @abstractmethod
    def decides_by(self) -> tuple[str, ...]:
        """The fields that ``choose`` reads."""

    @abstractmethod
    def shares(self, dataset: Samples, batch_size: int, at: Moment) -> Tensor:
        """Return each expert's part of a data set, (E,) float64: the weights of the mixture as a density of x."""

    @abstractmethod
    def gate_in_process(self) -> Gate:
        """Return what decides, as a gate that sees all experts, of a mixture in one process."""

    def density_weights(self, share_E: np.ndarray) -> np.ndarray:
        """Return the weights of the mixture as a density of x, given the mean responsibilities, (E,)."""
        return share_E

    # Rows through experts

    @cached_property
    def facts(self) -> list[Facts]:
        """What is known of every expert; where they differ every rank must ask for it together, the first time."""
        own = {e: Facts.of(expert) for e, expert in self.bank.owned().items()}
        if self.alike:
            return [next(iter(own.values()))] * self.num_experts
        told = {e: fact for part in gather_json(own, self.context.mesh.ep_group) for e, fact in part.items()}
        return [Facts(tuple(told[str(e)][0]), *told[str(e)][1:]) for e in range(self.num_experts)]

    def common(self, ability: str) -> Any:
        """Return the fact that all experts share, as ``common("predicts")``; None where they differ."""
        found = {getattr(facts, ability) for facts in self.facts}
        return found.pop() if len(found) == 1 else None

    @property
    def one_density(self) -> bool:
        """Whether all experts give p of one field, of one kind: only then do their likelihoods make a mixture's."""
        kinds = {(f.predicts or f.samples or f.reconstructs, f.predicts, f.log_px_is, f.levels) for f in self.facts}
        return len(kinds) == 1

    @property
    def reads_target(self) -> bool:
        """Whether what decides about a row reads what experts predict: its weights then make no p(y|x)."""
        return self.common("predicts") in self.decides_by

    @property
    def modelled(self) -> str:
        """The field whose density the experts give: the one they predict, or the one they generate."""
        return str(self.common("predicts") or self.common("samples") or self.common("reconstructs") or "x")

    @property
    def extra_fields(self) -> tuple[str, ...]:
        """Fields that travel to every expert beside those that it reads."""
        return ()

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that travel to this rank."""
        return tuple(dict.fromkeys((*self.bank.fields, *self.extra_fields)))

    @property
    def fields_P(self) -> Sequence[str] | Sequence[Sequence[str]]:
        """The fields that travel to each member of the EP group: those that its experts read."""
        if self.alike:
            return self.fields
        return [
            tuple(dict.fromkeys([name for e in experts for name in self.facts[e].fields] + list(self.extra_fields)))
            for experts in self.dispatch.experts
        ]

    def send(self, batch: RankBatch) -> Route:
        """Start sending this rank's rows to all experts."""
        return self.dispatch.send(batch.rows, self.fields_P, batch.counts)

    def values(self, rows: Batch, fields: Sequence[str]) -> Batch:
        """Turn the named stored fields into numbers; the id stays."""
        return self.context.values(rows, fields)

    def noise(self, at: Moment) -> Noise:
        """Return the draws of the experts' posteriors at a moment."""
        draw = at.draw(Purpose.POSTERIOR)
        return lambda ids, experts, shape, of_T=None: draw.normal(ids, experts, shape, self.dtype, of_T=of_T)

    def expert_terms(self, route: Route, at: Moment) -> ExpertTerms:
        """Run this rank's experts on the rows that arrive: fields (R, e, ...)."""
        rows = self.values(route.rows(), self.bank.fields)
        return self.bank(rows, self.noise(at), route.mask_Re, route.seen_e)

    @torch.no_grad()
    def score(self, batch: RankBatch, route: Route, at: Moment) -> Scores:
        """Return who is responsible for rows and what all experts make of them, without training or capacity.

        Every rank calls it, with the route that ``send`` returned for the batch.
        """
        found: Any = self.choose(batch, route, at)
        if not isinstance(found, Gating):
            kind = type(self).__name__
            raise Fault(f"mixture: {kind}.choose returns {shown(found)}, expected mixdist.terms.Gating: return that")
        return self._score(found.log_resp_BE, route, at)._replace(gate_loss_B=found.loss_B)

    def _score(self, log_weights_BE: Tensor, route: Route, at: Moment) -> Scores:
        terms = self.expert_terms(route, at)
        assert terms.loss_R is not None
        losses_BE = self.dispatch.combine(terms.loss_R, route)
        if terms.log_px_R is None and self.alike:
            return Scores(log_weights_BE, losses_BE, None, None)
        # Where experts differ, those of other ranks may have what those here have not.
        absent = torch.full_like(terms.loss_R, torch.nan)
        log_px = absent if terms.log_px_R is None else terms.log_px_R
        if terms.kl_R is None and self.alike:
            log_px_BE = self.dispatch.combine(log_px, route)
            return Scores(log_weights_BE, losses_BE, log_px_BE, log_px_BE)
        kl = absent if terms.kl_R is None else terms.kl_R
        elbo_BE = self.dispatch.combine(log_px - (kl if self.alike else kl.nan_to_num(0.0)), route)
        exact_BE = None if self.alike else self.dispatch.combine(log_px.masked_fill(~kl.isnan(), torch.nan), route)
        return Scores(log_weights_BE, losses_BE, elbo_BE, exact_BE)

    @torch.no_grad()
    def predict(self, scores: Scores, route: Route) -> Tensor:
        """Return the mean of the experts' predictions under the weights of ``score``, (B, *shape of the target)."""
        rows = self.values(route.rows(), self.bank.fields)
        predictions = torch.stack([expert.predict(rows) for expert in self.bank.owned().values()], dim=1)
        return self.dispatch.combine_sum(predictions, scores.log_resp_BE.exp(), route)

    # Results

    def diagnose(self, batch: RankBatch) -> dict[str, Any]:
        """Return the pairs of experts that are duplicates on a batch."""
        pairs = evidence.duplicate_pairs(self, batch)
        return {"duplicate_experts": [f"experts {i} and {j}" for i, j in pairs]}

    def study(self, dataset: Samples, request: Request) -> Study:
        return ExpertStudy(self, dataset, request)

    def pictures(self, dataset: Samples, evaluation: Evaluation, seed: int) -> list[Picture]:
        return expert_pictures(self, dataset, evaluation, seed)

    def model(self, class_names: Sequence[str]) -> Model:
        gate, experts, seed = self.gate_in_process(), self.bank.owned(), self.context.seed
        return Model(gate, experts, self.spec, self.dtype, seed, list(class_names))

    def protocol(self, num_samples: int) -> dict[str, Any]:
        gate = getattr(self, "gate", None)
        sampled = any(facts.weighs for facts in self.facts) or (gate is not None and gate.model.latent is not None)
        told = evidence.SAMPLED if sampled else evidence.EXACT
        return {"num_samples": num_samples if sampled else None, "sampled": told}

    @property
    def drawn_field(self) -> str | None:
        found: str | None = self.common("draws")
        return found

    def draw(self, num_samples: int, evaluation: Evaluation, at: Moment) -> tuple[list[int], np.ndarray]:
        """Draw S samples x ~ sum_e alpha_e p_e(x), S alpha_e of each expert, rounded as ``apportioned`` has it."""
        assert isinstance(evaluation, ExpertEvaluation)
        assert evaluation.weight_E is not None
        counts_E = samples.apportioned(evaluation.weight_E, num_samples)
        return counts_E.tolist(), np.concatenate(list(samples.samples_of(self, counts_E, at, observed=True).values()))
