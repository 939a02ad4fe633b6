"""The scoring of a round: discriminators train, every sample is scored by every expert, each goes to the best.

Discriminators and scores see all data. Rows are scored in blocks of fixed size, so that a score does not depend on the
layout; with replicas, each takes some of the blocks. An expert's column of scores is normalised where the expert is;
then each member of the EP group gets the scores of its part of the samples, decides, and tells the others.

Shape letters: N samples, n samples of a member's part, E all experts, e experts on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixdist.competition.delivery import Brought, Reader, bring, prefetched
from mixdist.competition.entrant import Entrant
from mixdist.competition.mixture import HardMixture
from mixdist.competition.table import log_shares, winners
from mixdist.data import Epoch, Samples, share
from mixdist.data.order import digest
from mixdist.noise import DISCRIMINATOR_PHASE, SCORING_PHASE, Moment, Purpose
from mixdist.parallel.agreement import Agreed, agreed, gather_json
from mixdist.parallel.collectives import move
from mixdist.terms import Batch


class Verdict(NamedTuple):
    """What a scoring decides, the same on every rank.

    Args:
        expert_N: each sample's expert: the best, or one drawn by the scores.
        best_N: its score there, nats; None unless requested.
        log_z_E: each expert's normaliser; 0 where the score has none.
        objective: F = -1/N sum_i [log N + s_{c(i)}(x_i)] with the new table c: the empirical loss of seed document
            004's equation 6 and theorem 2 for f = -log (without log N where scores have no normaliser); nats; None
            where infinite. Equation 3's value, sum_j alpha_j KL(P_d^j || P_g_j), is F + H(alpha): the text replaces
            dP_d^j by dP_d = alpha_j dP_d^j between the two. Where scores are log p_j it is -1/N times the
            log-likelihood of rows and table together.
        objective_before: F with the table of the round before; None before the first, and where infinite.
        e_steps: how often the samples were given, with shares taken anew each time.
    """

    expert_N: NDArray[np.integer[Any]]
    best_N: NDArray[np.float64] | None
    log_z_E: Tensor
    objective: float | None
    objective_before: float | None
    e_steps: int


class Scoring:
    """Trains discriminators and scores samples.

    Args:
        mixture: what competes.
        reader: brings rows.
        dataset: the N samples.
        block: rows scored at once.
        fields: that experts, discriminators and score read.
        needs_best: whether every rank learns the winning scores.
    """

    def __init__(
        self,
        mixture: HardMixture,
        reader: Reader,
        dataset: Samples,
        block: int,
        fields: Sequence[str],
        needs_best: bool = False,
    ) -> None:
        self.mixture, self.context, self.mesh = mixture, mixture.context, mixture.context.mesh
        self.reader, self.score = reader, mixture.score_rule
        self.dataset, self.num_samples = dataset, len(dataset)
        self.block, self.fields, self.needs_best = block, fields, needs_best
        self._order: tuple[int, Tensor] | None = None

    def challenge(
        self, entrants: Mapping[int, Entrant], round: int, attempt: Callable[[Callable[[], None]], None]
    ) -> None:
        """Train this rank's discriminators for a round; every rank calls it.

        All have the data in one order, so that a block of rows serves them all.

        Args:
            entrants: this rank's experts.
            round: for the draws.
            attempt: calls a function and keeps its error for later: other ranks wait for the next rows.
        """
        discriminating = self.mixture.discriminating
        assert discriminating is not None
        an_epoch = -(-self.num_samples // discriminating.batch_size)
        num_batches = discriminating.batches or discriminating.epochs * an_epoch
        for entrant in entrants.values():
            entrant.meet(round)
        together = max(1, self.block // discriminating.batch_size)

        def begin(first: int) -> Callable[[], tuple[Brought, list[Tensor]]]:
            numbers = [round * num_batches + n for n in range(first, min(first + together, num_batches))]
            batches = [self._batch(number, an_epoch, discriminating.batch_size) for number in numbers]
            # Those of two passes over the data are augmented as in the first of them.
            epoch = self._epoch(numbers[0] // an_epoch)
            begun = bring(self.reader, self.mesh, lambda member: batches, self.fields, epoch)
            return lambda: (begun(), batches)

        for brought, batches in prefetched(partial(begin, first) for first in range(0, num_batches, together)):
            places = brought.places(batches)
            for entrant in entrants.values():
                attempt(partial(entrant.challenge, brought.rows, places, round))

    def _epoch(self, number: int) -> Epoch:
        """Name a pass of discriminators over the data; passes are numbered through all rounds."""
        return Epoch(self.context.seed, DISCRIMINATOR_PHASE, number)

    def _batch(self, number: int, an_epoch: int, batch_size: int) -> Tensor:
        """Return the positions of a discriminator's batch; batches are numbered through all rounds."""
        epoch, place = divmod(number, an_epoch)
        return self._pass(epoch, batch_size)[place * batch_size : (place + 1) * batch_size]

    def _pass(self, number: int, batch_size: int) -> Tensor:
        """Return all positions in the order of a pass over the data; the last one is kept."""
        if self._order is None or self._order[0] != number:
            everything = torch.arange(self.num_samples)
            self._order = number, self.dataset.ordered(everything, self._epoch(number), batch_size)
        return self._order[1]

    def order_digest(self, round: int) -> str | None:
        """Return the digest of the order of the pass that a round's discriminators begin inside of, or None."""
        discriminating = self.mixture.discriminating
        if discriminating is None:
            return None
        an_epoch = -(-self.num_samples // discriminating.batch_size)
        number = round * (discriminating.batches or discriminating.epochs * an_epoch)
        if number % an_epoch == 0:
            return None
        return digest(self.dataset.ids[self._pass(number // an_epoch, discriminating.batch_size)])

    @torch.no_grad()
    def verdict(
        self, entrants: Mapping[int, Entrant], homes: Sequence[Sequence[int]], round: int, table: Any
    ) -> Verdict:
        """Score every sample and decide.

        Args:
            entrants: this rank's experts.
            homes: each member's experts.
            round: for the draws.
            table: each sample's expert until now, (N,) integers, or None.

        Raises:
            Agreed: a score is not a number; names the expert.
        """
        columns_Ne = self._columns(entrants, round)
        log_z_e = torch.zeros(len(entrants), dtype=torch.float64, device=self.mesh.device)
        if self.score.normalized:
            # Each column by itself: the order in which torch sums one depends on how many stand beside it.
            log_z_e = torch.stack([column_N.contiguous().logsumexp(0) for column_N in columns_Ne.double().unbind(1)])
        scores_Ne = columns_Ne.double() - log_z_e
        bad = scores_Ne.isnan().any(0).tolist()
        gathered = gather_json(list(zip(entrants, bad, log_z_e.tolist(), strict=True)), self.mesh.world)
        by_expert = {e: (is_bad, log_z) for rank in gathered for e, is_bad, log_z in rank}
        for e in sorted(e for e, (is_bad, _) in by_expert.items() if is_bad):
            raise Agreed(
                f"in round {round}: expert {e} gives a sample a score that is not a number: lower learning rates"
            )
        log_z_E = log_z_e.new_tensor([by_expert[e][1] for e in sorted(by_expert)])
        return self._decide(scores_Ne.to(columns_Ne.dtype), homes, log_z_E, table, round)

    def _columns(self, entrants: Mapping[int, Entrant], round: int) -> Tensor:
        """Score all samples by this rank's experts, (N, e), before normalisation."""
        replicas, at = self.mesh.placement.num_replicas, Moment(self.context.seed, SCORING_PHASE + round)
        columns_Ne = torch.zeros(self.num_samples, len(entrants), dtype=self.context.dtype, device=self.mesh.device)

        def begin(first: int) -> Callable[[], tuple[Batch, Tensor]]:
            def wanted(rank: int) -> Tensor:
                start = first + self.mesh.placement.replica_of(rank) * self.block
                return torch.arange(min(start, self.num_samples), min(start + self.block, self.num_samples))

            begun = self.reader.start(wanted, self.fields)
            return lambda: (begun(), wanted(self.mesh.rank))

        for stored, index in prefetched(partial(begin, n) for n in range(0, self.num_samples, self.block * replicas)):
            rows = self.context.values(stored, self.fields)
            for place, (e, entrant) in enumerate(entrants.items() if len(index) else ()):
                column = self.score.column(e, entrant.expert, entrant.discriminator, rows, at, self.context.dtype)
                columns_Ne[index[0] : index[0] + len(index), place] = column
        if replicas > 1:
            # Each sample's score is one replica's number plus zeros: no rounding.
            columns_Ne = self.context.wire.all_reduce(columns_Ne, self.mesh.replica_group)
        return columns_Ne

    def _decide(
        self, scores_Ne: Tensor, homes: Sequence[Sequence[int]], log_z_E: Tensor, table: Any, round: int
    ) -> Verdict:
        """Choose the expert of each sample of this member's part, and learn of the other parts."""
        mesh, num = self.mesh, self.num_samples
        parts = [share(num, p, len(homes)) for p in range(len(homes))]
        scores_nE = self._exchange(scores_Ne, homes, parts).cpu().numpy()
        expert_n, e_steps = self._given(scores_nE, parts[mesh.member], table, round)
        best_n = np.take_along_axis(scores_nE, expert_n[:, None], 1)[:, 0].astype(np.float64)
        sums = [-best_n.sum()]
        if table is not None:
            mine = parts[mesh.member]
            old_n1 = np.asarray(table[mine.start : mine.stop]).astype(np.int64)[:, None]
            sums.append(-np.take_along_axis(scores_nE, old_n1, 1).astype(np.float64).sum())
        log_num = math.log(num) if self.score.normalized else 0.0
        means = [sum(part) / num - log_num for part in zip(*gather_json(sums, mesh.ep_group), strict=True)]
        objective, before = [mean if math.isfinite(mean) else None for mean in [*means, math.inf][:2]]
        kind = np.uint8 if scores_nE.shape[1] <= 256 else np.int16
        expert_N = self._gather(expert_n.astype(kind), parts).astype(np.int64)
        best_N = self._gather(best_n, parts) if self.needs_best else None
        return Verdict(expert_N, best_N, log_z_E, objective, before, e_steps)

    def _given(self, scores_nE: NDArray[Any], part: range, table: Any, round: int) -> tuple[NDArray[np.int64], int]:
        """Return the expert of each sample of a part, and how often samples were given, at most until none moved."""
        rules, num_experts = self.mixture.rules, scores_nE.shape[1]
        scores_nE = scores_nE + self._noise(part, num_experts, round)

        def given(counts_E: NDArray[Any] | None) -> NDArray[np.int64]:
            shares_E = log_shares(counts_E if rules.counts_shares else None, num_experts)
            return agreed(lambda: winners(scores_nE + shares_E), self.mesh.world)

        expert_n = given(None if table is None else np.bincount(table, minlength=num_experts))
        for done in range(1, rules.e_steps):
            counts = gather_json(np.bincount(expert_n, minlength=num_experts).tolist(), self.mesh.ep_group)
            before_n, expert_n = expert_n, given(np.sum(counts, axis=0))
            if not any(gather_json(bool((expert_n != before_n).any()), self.mesh.ep_group)):
                return expert_n, done + 1
        return expert_n, rules.e_steps

    def _noise(self, part: range, num_experts: int, round: int) -> NDArray[np.float64]:
        """Return T times Gumbel noise of samples and experts, (n, E): the best is then a draw from a softmax.

        argmax_j (a_j + T g_j) is j with probability exp(a_j / T) / sum_i exp(a_i / T), g_j = -log(-log u_j).
        """
        temperature = self.mixture.rules.temperature_of(round)
        if not temperature:
            return np.zeros((1, 1))
        draw = Moment(self.context.seed, SCORING_PHASE + round).draw(Purpose.EXPLORATION)
        ids_n = self.dataset.ids[part.start : part.stop]
        u_En = draw.uniform(ids_n, range(num_experts), (1,), torch.float64)[..., 0]
        noise_nE: NDArray[np.float64] = -temperature * (-u_En.log()).log().T.numpy()
        return noise_nE

    def _exchange(self, scores_Ne: Tensor, homes: Sequence[Sequence[int]], parts: Sequence[range]) -> Tensor:
        """Bring all experts' scores of this member's part here, experts ascending: (n, E)."""
        mesh, me = self.mesh, self.mesh.member
        sent = [scores_Ne[part.start : part.stop] for part in parts]
        shapes = [(len(parts[me]), len(experts)) for experts in homes]
        self.context.wire.meter.wire_bytes_min += scores_Ne.nbytes - sent[me].nbytes
        arrived = move(sent, me, shapes, self.context.wire.all_to_all, mesh.ep_group)
        return torch.cat(arrived, dim=1)[:, torch.tensor([e for experts in homes for e in experts]).argsort()]

    def _gather(self, own_n: NDArray[Any], parts: Sequence[range]) -> NDArray[Any]:
        """Put the members' parts of a column together, on every member."""
        sent = [torch.from_numpy(own_n).to(self.mesh.device)] * len(parts)
        shapes = [(len(part),) for part in parts]
        arrived = move(sent, self.mesh.member, shapes, self.context.wire.all_gather, self.mesh.ep_group)
        return torch.cat(arrived).cpu().numpy()
