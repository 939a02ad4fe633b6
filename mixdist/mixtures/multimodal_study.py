"""The figures of mixtures of modalities.

Shape letters: B rows on this rank, M modalities, K proposals, J of them the joint posterior's, S samples, L latent.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mixdist.data import RankBatch, Samples
from mixdist.mixtures.bounds import log_densities, log_mixture
from mixdist.mixtures.coherence import Coherence
from mixdist.mixtures.proposals import PRESENT, Here, Proposals, Seen, check_present, num_bad
from mixdist.mixtures.study import KEYS, Evaluation, Request, Study
from mixdist.noise import EVALUATION_PHASE, Moment, Purpose
from mixdist.parallel.agreement import Agreed, agreed

if TYPE_CHECKING:
    from mixdist.mixtures.multimodal import Multimodal

AT_ONCE = 50
"""Samples of all proposals together that a row's likelihoods are estimated from at once."""
BAD = "bad rows"


class MultimodalStudy(Study):
    """Gathers the figures of mixtures of modalities, nats a row; m and n stand for the fields that experts model.

    - ``loss`` = mean_n of a row's loss as in training, without rescaling.

    With importance samples, S of each proposal, q of the joint posterior and q_n of modality n alone:

    - ``elbo``, ``looser``: mean over z ~ q of log w, and over q's parts of log mean_s w, w = p(z) p(x|z) / q(z|x).
    - ``log_joint`` = log mean w, of log p(x_1, ..., x_M): never below ``looser``, which is never below ``elbo``.
    - ``log_single_m``, ``log_synergy_m``, ``log_cross_m_n``: log mean of p(z) p(x_m|z) / r(z) over z ~ r, with r = q_m,
      q, q_n: the table of seed document 003. All three are of log p(x_m), and below it in the mean.
    - ``log_conditional_m_n`` = log mean_s p(x_m|z_s) over z_s ~ q_n: how well n predicts m, of log E_q(z|x_n) p(x_m|z).

    Figures of m are means over the rows that have m (and n).

    Args:
        mixture: the mixture.
        dataset: the rows.
        request: what is asked for.
    """

    def __init__(self, mixture: Multimodal, dataset: Samples, request: Request) -> None:
        super().__init__(mixture.measure, dataset, request)
        self.mixture = mixture
        self.coherence: Coherence | None = None

    @staticmethod
    def protocol(num_samples: int) -> dict[str, Any]:
        """Return how the figures are taken."""
        told = (
            "z from each proposal q(z|A), A a set of modalities; log p = log-mean-exp of weights, p(x_m|z) as it is; "
            f"eps keyed by (seed, purpose {Purpose.IMPORTANCE:d}, phase {EVALUATION_PHASE}, step c from 1, sample id, "
            f"proposal), {AT_ONCE} samples of all proposals a step"
        )
        return {"num_samples": num_samples, "sampled": told}

    def start(self) -> None:
        agreed(lambda: check_present(self.dataset), self.mixture.context.mesh.world)
        train = self.request.shares_from if self.request.judges_from is None else self.request.judges_from
        labelled = train is not None and train.label is not None and self.dataset.label is not None
        if self.request.num_samples and train is not None and labelled:
            self.coherence = Coherence(self.mixture, train, self.request.at)

    @torch.no_grad()
    def add(self, batch: RankBatch) -> None:
        mixture, at = self.mixture, self.request.at
        self.sum(BAD, num_bad(batch.rows))
        seen, here = mixture.see(batch)
        proposals = mixture.propose(seen, at)
        z = mixture.latents(proposals, seen.ids_R, at, Purpose.POSTERIOR, mixture.samples)
        score, own = mixture.scores(seen, here, proposals, z, at), here.own
        loss_B = mixture.losses(proposals.of(own), z[own], score, seen.present_RM[own])
        self.keep(loss=loss_B.double())
        if self.request.num_samples:
            self._likelihoods(seen, here, self.request.num_samples)
        if self.coherence is not None:
            assert self.dataset.label is not None
            self.keep(**self.coherence.columns(seen, here, batch.rows[self.dataset.label]))
            for name, total in self.coherence.sums().items():
                self.sum(name, total)

    def _likelihoods(self, seen: Seen, here: Here, num_samples: int) -> None:
        mixture, found, done = self.mixture, _Sums(), 0
        proposals = mixture.propose(seen, self.request.at, held_out=True)
        present = seen.present_RM[here.own]
        size, step = max(1, AT_ONCE // len(proposals.keys)), 1  # the loss has drawn private latents of step 0
        while done < num_samples:
            count = min(size, num_samples - done)
            at = Moment(self.request.at.seed, self.request.at.phase, step)
            self._add_samples(seen, here, proposals, at, count, found)
            done, step = done + count, step + 1
        columns = self._columns(found, proposals.of(here.own), present, num_samples)
        self.keep(**{name: column.double() for name, column in columns.items()})

    def _add_samples(self, seen: Seen, here: Here, proposals: Proposals, at: Moment, count: int, found: _Sums) -> None:
        """Add log importance weights of a few samples of each proposal."""
        mixture, own = self.mixture, here.own
        z = mixture.latents(proposals, seen.ids_R, at, Purpose.IMPORTANCE, count)
        score_BMKS = mixture.scores(seen, here, proposals, z, at).double()
        z, mine = z[own], proposals.of(own)
        log_p = mixture.prior.log_prob(z).double()
        joint, single = mixture.joint, mixture.single
        log_q_BJJS = log_densities(mixture.kind, z[:, joint], mine.loc_RKL[:, joint], mine.scale_RKL[:, joint]).double()
        log_q = log_mixture(log_q_BJJS, mine.valid_RK[:, joint])
        found.add("joint", log_p[:, joint] + score_BMKS[:, :, joint].sum(1) - log_q)
        prior_ratio = log_p[:, joint] - log_q
        scale, loc = mine.scale_RKL[:, single], mine.loc_RKL[:, single]
        log_own = mixture.kind.log_prob(z[:, single], loc[:, :, None], scale[:, :, None]).sum(-1).double()
        own_ratio = log_p[:, single] - log_own
        for m, name in enumerate(mixture.names):
            found.add(f"log_synergy_{name}", prior_ratio + score_BMKS[:, m, joint])
            cross = score_BMKS[:, m, single]
            for n, other in enumerate(mixture.names):
                key = f"log_single_{name}" if m == n else f"log_cross_{name}_{other}"
                found.add(key, (own_ratio[:, n] + cross[:, n])[:, None])
                if m != n:
                    found.add(f"log_conditional_{name}_{other}", cross[:, n, None])

    def _columns(self, found: _Sums, mine: Proposals, present: Tensor, num_samples: int) -> dict[str, Tensor]:
        """Return a number for each row and figure, NaN where the row does not have its modalities."""
        mixture, columns, log_num = self.mixture, {}, math.log(num_samples)
        joint_BJ = mine.valid_RK[:, mixture.joint]
        num_B = joint_BJ.sum(1).clamp(min=1)
        each_BJ = found.log_sums["joint"] - log_num
        columns["elbo"] = torch.where(joint_BJ, found.sums["joint"] / num_samples, 0.0).sum(1) / num_B
        columns["looser"] = torch.where(joint_BJ, each_BJ, 0.0).sum(1) / num_B
        columns["log_joint"] = torch.logsumexp(each_BJ.masked_fill(~joint_BJ, -math.inf), 1) - num_B.double().log()
        for m, name in enumerate(mixture.names):
            has = present[:, m]
            log_BJ = found.log_sums[f"log_synergy_{name}"] - log_num
            synergy = torch.logsumexp(log_BJ.masked_fill(~joint_BJ, -math.inf), 1) - num_B.double().log()
            columns[f"log_synergy_{name}"] = torch.where(has, synergy, math.nan)
            for n, other in enumerate(mixture.names):
                keys = [f"log_single_{name}"]
                if m != n:
                    keys = [f"log_cross_{name}_{other}", f"log_conditional_{name}_{other}"]
                for key in keys:
                    log_B = found.log_sums[key][:, 0] - log_num
                    columns[key] = torch.where(has & present[:, n], log_B, math.nan)
        return columns

    def result(self, sums: dict[str, np.ndarray], columns: dict[str, np.ndarray]) -> Evaluation:
        if bad := int(sums[BAD]):
            raise Agreed(
                f"field {PRESENT!r} says of {bad} of {len(self.dataset)} rows that they have no modality, or holds a "
                f"number other than 0 and 1: mend these rows, or leave them out"
            )
        found = Evaluation(self.dataset, {}, columns={name: columns[name] for name in KEYS if name in columns})
        for name, column in columns.items():
            rows = ~np.isnan(column) if name not in KEYS else None
            if rows is not None and rows.any():
                found = found.plus(name, column, rows)
        return found if self.coherence is None else self.coherence.added(found, sums)


class _Sums:
    """Sums and log sums of exponentials over samples, (B, J), by name."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.log_sums: dict[str, Tensor] = {}

    def add(self, name: str, log_BJS: Tensor) -> None:
        total, log_total = log_BJS.sum(-1), torch.logsumexp(log_BJS, -1)
        if name in self.sums:
            total, log_total = self.sums[name] + total, torch.logaddexp(self.log_sums[name], log_total)
        self.sums[name], self.log_sums[name] = total, log_total
