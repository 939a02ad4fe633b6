"""The rules of a competition of experts for the samples of a data set."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from mixdist.arguments import check_fields
from mixdist.competition.delivery import Delivery
from mixdist.competition.scores import Discriminators, Score
from mixdist.competition.table import StarvedRule


def _discriminators() -> dict[str, object]:
    return {"class_path": "mixdist.competition.Discriminators"}


@dataclass(frozen=True)
class Rules:
    """Rounds of {each expert trains on its samples; experts score all samples; each sample goes to the best}.

    Seed document 004, algorithm 1. The phases of ``pretrain`` come first; ``train`` says how experts train in a round:
    its epochs are passes over the expert's own samples, its batch size is the expert's own.

    Args:
        rounds: how many.
        start: pretraining is on all samples, each expert on its own order of them, and the first scores make the first
            split (all); or on a random split, which is the first (split); or on a given table, which is (table); or on
            the clusters of ``expert_start``, which are (clusters).
        table: an assignment's .npy file of another run on the same data, with its .json beside it; for start table.
        score: class of mixdist.competition, or your own Score.
        by_shares: a sample goes to argmax_j alpha_j p_j(x), with alpha the shares of the table before, which lowers
            equation 3's sum, F + H(alpha); with the score Likelihood it is classification EM (Celeux and Govaert 1992).
            Without, it goes to argmax_j p_j(x) (theorem 2), which lowers F. Unset, as the score has it: with, for ELBOs
            and likelihoods that are not normalised, so that tables ascend the mixture's log-likelihood; else without.
        e_steps: how often a scoring gives the samples, at most, with shares taken anew each time and scores as they
            are: no expert trains between. Each lowers F + H(alpha); it ends where no sample moves.
        temperature: T of the first scoring. A sample goes to expert j with probability softmax_j((log alpha_j +
            s_j(x)) / T), drawn by the row and the round, so that experts of like score share rows: classification
            annealing EM (Celeux and Govaert 1992), with T = 1 stochastic EM. 0: to the best.
        anneal_rounds: rounds over which T falls linearly to 0; with fewer rounds in all, the last table is a draw.
        starved: what happens to an expert with few samples: nothing; freeze, it does not train until it wins more;
            reseed, it gets new weights and an even share of the samples whose best score is worst.
        starved_below: few is less than this part of an even share.
        stop_below: the competition ends early when a round moves less than this part of the samples.
        delivery: an expert's rank reads its samples itself (read), or each rank reads a share of the data and sends
            rows on, once an epoch (wire); the run is the same.
        placement: fixed, experts in blocks of their numbers; or load, by their samples, the longest first, where the
            time saved in a round is more than moving them takes.
        block: rows that are scored, and brought to discriminators, at once; part of the run, since the last digits of
            a score depend on it.
    """

    rounds: int = 20
    start: Literal["all", "split", "table", "clusters"] = "all"
    table: str | None = None
    score: Score = field(default_factory=_discriminators)  # type: ignore[assignment]
    by_shares: bool | None = None
    e_steps: int = 1
    temperature: float = 0.0
    anneal_rounds: int = 0
    starved: StarvedRule = "none"
    starved_below: float = 0.1
    stop_below: float = 0.0
    delivery: Delivery = "read"
    placement: Literal["fixed", "load"] = "load"
    block: int = 2000

    def __post_init__(self) -> None:
        if isinstance(self.score, dict):  # the default, of which a parser makes one; in Python nobody did
            object.__setattr__(self, "score", Discriminators())
        check_fields(self, "mixture.")
        for name in ("rounds", "block", "e_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"mixture.{name} ({getattr(self, name)}) must be at least 1: give 1 or more")
        for name in ("starved_below", "stop_below"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"mixture.{name} ({getattr(self, name)}) must be between 0 and 1")
        if (self.start == "table") != (self.table is not None):
            raise ValueError(
                f"mixture.start ({self.start}) and mixture.table ({self.table}) do not fit: give both to start "
                f"from a table, or neither"
            )
        for name in ("temperature", "anneal_rounds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"mixture.{name} ({getattr(self, name)}) must be a number from 0: give 0 for none")
        if bool(self.temperature) != bool(self.anneal_rounds):
            raise ValueError(
                f"mixture.temperature ({self.temperature}) and mixture.anneal_rounds ({self.anneal_rounds}) belong "
                f"together: give both, or neither"
            )

    @property
    def counts_shares(self) -> bool:
        """Whether shares count when samples are given."""
        return self.score.by_shares if self.by_shares is None else self.by_shares

    def temperature_of(self, round: int) -> float:
        """Return T of the scoring that ends a round, max(0, 1 - round / anneal_rounds) of the first; 0 for the best."""
        return self.temperature * max(0.0, 1 - round / self.anneal_rounds) if self.anneal_rounds else 0.0

    def check(self) -> None:
        """Refuse rules that would be passed over.

        Raises:
            ValueError: they need another score, or shares.
        """
        kind = type(self.score).__name__
        if self.e_steps > 1 and not self.counts_shares:
            raise ValueError(
                f"mixture.e_steps ({self.e_steps}) changes nothing where shares do not count, as with {kind}: set "
                f"by_shares to true, or e_steps to 1"
            )
        if self.temperature and self.score.keeps:
            raise ValueError(
                f"mixture.temperature ({self.temperature}) means nothing with {kind}, which keeps the table: "
                f"leave it out"
            )
