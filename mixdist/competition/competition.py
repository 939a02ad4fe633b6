"""The family of competitions: a hard mixture, the rules of its rounds, and what runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from mixdist.arguments import check_arguments
from mixdist.competition.mixture import HardMixture
from mixdist.competition.rounds import Rounds
from mixdist.competition.rules import Rules
from mixdist.data import RankBatch, Samples
from mixdist.experts import Compute
from mixdist.mixtures import ExpertStart, MakeExpert, Objective, Stage, WeightedLoss
from mixdist.noise import Moment
from mixdist.terms import Outcome


class Competition(HardMixture):
    """Experts that compete for the samples of a data set in rounds (hard assignment); seed document 004, algorithm 1.

    The phases of ``pretrain`` come first; ``train`` says how experts train in a round: its epochs are passes over the
    expert's own samples, its batch size is the expert's own.

    Args:
        expert: class of mixdist.experts, or your own Expert, for all of them; or a list with one for each expert.
        num_experts: how many experts; with a list, its length.
        compute: how an expert runs its rows.
        expert_start: how experts begin, from training rows; unset, as drawn. Those that are reseeded are drawn.
        **rules: see :class:`mixdist.competition.rules.Rules`.

    Raises:
        ValueError: a rule that makes no sense.

    Examples:
        >>> from mixdist.competition import Competition, Elbo
        >>> from mixdist.experts import Centroid
        >>> kmeans = Competition(Centroid, num_experts=3, rounds=10, score=Elbo())
        >>> kmeans.rules.rounds
        10
    """

    program = Rounds

    def __init__(
        self,
        expert: MakeExpert | list[MakeExpert],
        num_experts: int | None = None,
        compute: Compute = Compute(),  # noqa: B008 (frozen)
        expert_start: ExpertStart | None = None,
        **rules: Any,
    ) -> None:
        check_arguments(Competition.__init__, locals(), "mixture.")
        known = [field.name for field in fields(Rules)]
        if unknown := sorted(set(rules) - set(known)):
            raise ValueError(f"mixture.{unknown[0]} is unknown: a competition takes {', '.join(known)}")
        super().__init__(expert, num_experts, compute, Rules(**rules))
        self.expert_start = expert_start
        self.rules.check()
        if self.rules.start == "clusters" and not (expert_start is not None and expert_start.assigns):
            given = "null" if expert_start is None else type(expert_start).__name__
            raise ValueError(
                f"mixture.start (clusters) needs an expert_start that assigns rows, and mixture.expert_start is "
                f"{given}: set it to mixdist.training.Upcycled, or start to all, split or table"
            )

        if self.rules.starved == "reseed" and expert_start is not None and expert_start.describe():
            raise ValueError(
                "mixture.starved (reseed) gives an expert new weights, and with mixture.expert_start.trains it would "
                "keep most of them as they are drawn: set starved to none or freeze, or leave trains out"
            )

    def start_experts(self, dataset: Samples) -> None:
        """Set the experts' first weights, and the first table where the rules start from clusters."""
        super().start_experts(dataset)
        if self.rules.start == "clusters":
            assert self.expert_start is not None
            like = self.make_expert(self.bank.ids[0])
            over_batch = self.dispatch.over_batch
            self.first_N = self.expert_start.assign(self.context, over_batch, like, self.num_experts, dataset)

    def describe(self, stages: Sequence[Stage]) -> dict[str, Any]:
        """Return what a run goes on with: the number of experts, rules that are part of the run, epochs of a round."""
        kept = {name: getattr(self.rules, name) for name in ("start", "starved", "starved_below", "block")}
        kept["by_shares"] = self.rules.counts_shares
        # Those that are as they were before there was a choice are not named: runs of that time go on.
        later = {"e_steps": 1, "temperature": 0.0, "anneal_rounds": 0}
        kept |= {name: value for name, first in later.items() if (value := getattr(self.rules, name)) != first}
        score = self.rules.score
        told = {"score": type(score).__name__} | {f"score.{name}": value for name, value in score.describe().items()}
        return {**super().describe(stages), **told, **kept, "epochs": stages[-1].epochs}

    def gradients(self, stages: Sequence[Stage]) -> list[float]:
        """Return K e for pretraining on all samples, e on a split; T e for the rounds: a sample has one expert."""
        each = self.num_experts if self.rules.start == "all" else 1
        *pretrain, rounds = (float(stage.epochs) for stage in stages)
        return [*(each * epochs for epochs in pretrain), self.rules.rounds * rounds]

    def schedule_steps(self, stages: Sequence[Stage], num_rows: int) -> list[int]:
        """Return epochs: those of a phase of pretraining, and those of all rounds."""
        *pretrain, rounds = (stage.epochs for stage in stages)
        return [*pretrain, self.rules.rounds * rounds]

    def check(self, stages: Mapping[str, Stage]) -> None:
        """Refuse what a competition cannot do, or would pass over."""
        for name, stage in stages.items():
            objective = stage.objective
            if type(objective) is not WeightedLoss or objective.balance is not None or objective.entropy_bonus:
                kind = type(objective).__name__ + (" with balance or entropy" if objective.linear else "")
                raise ValueError(
                    f"{name}.objective ({kind}) needs all experts' losses of a sample, and in a competition only its "
                    f"own expert sees it: leave the objective out (WeightedLoss), or take mixdist.mixtures.Soft"
                )
            if stage.trains == "gate" or stage.accumulate != 1:
                key, value = ("trains", stage.trains) if stage.trains == "gate" else ("accumulate", stage.accumulate)
                raise ValueError(
                    f"{name}.{key} ({value}) means nothing in a competition: leave it out; to bound memory there is "
                    f"mixture.compute.micro_batch"
                )

    def backward(
        self, batch: RankBatch, objective: Objective, at: Moment, num_parts: int = 1, upcoming: RankBatch | None = None
    ) -> Outcome:
        """Not used: experts train by themselves in :class:`mixdist.competition.rounds.Rounds`."""
        raise AssertionError("experts of a competition train by themselves")
