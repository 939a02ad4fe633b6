"""Whether what is generated is of the class of what it was generated from, and whether the modalities agree.

Shape letters: B rows on this rank, R rows routed here, M modalities, e those of this rank, G sets of given modalities,
L shared latent.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mixdist.data import Samples
from mixdist.experts import Expert
from mixdist.mixtures.judges import AT_ONCE, TOLD, Judges
from mixdist.mixtures.proposals import Here, Seen
from mixdist.mixtures.samples import from_experts
from mixdist.mixtures.study import Evaluation
from mixdist.noise import Moment, Purpose

if TYPE_CHECKING:
    from mixdist.mixtures.multimodal import Multimodal

MOST = 6
"""Modalities of which every set is given; of more, single ones and all but one."""
NUM_PRIOR = 10_000
FIRST_STEP = 2**19
"""Of the draws: one for each set, and one for prior samples; likelihoods have those from 0 on."""


def given_sets(num: int) -> list[tuple[int, ...]]:
    """Return the sets of modalities that others are generated from, the smaller ones first.

    Examples:
        >>> from mixdist.mixtures.coherence import given_sets
        >>> given_sets(3)
        [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]
    """
    sizes = range(1, num) if num <= MOST else (1, num - 1)
    return [chosen for size in sizes for chosen in combinations(range(num), size)]


class Coherence:
    """Gathers coherence (Shi et al. 2019, section 4.2; by the number of views given as Sutter et al. 2021).

    - ``classifier_accuracy_m``: of the classifier of modality m on the real x_m of these rows: what limits the others.
    - ``coherence_n_to_m``: part of the rows of which x_m, the mean of p(x_m|z) at one z ~ q(z|x_n), is of their class.
    - ``coherence_given_k``: the same of z ~ q(z|x_A), the mean over all sets A of k modalities and all m not in A.
    - ``coherence_joint``: part of prior samples z of which all modalities are of one class.

    Args:
        mixture: in evaluation mode.
        train: training rows, with a label; classifiers are trained on them.
        at: names the draws.
    """

    def __init__(self, mixture: Multimodal, train: Samples, at: Moment) -> None:
        self.mixture, self.at = mixture, at
        self.sets = given_sets(mixture.num_experts)
        self.judges = Judges(mixture, train)
        self.rows = {"rows": len(train), "fingerprint": train.fingerprint}
        self.joint = self._joint()

    @torch.no_grad()
    def columns(self, seen: Seen, here: Here, label_B: Tensor) -> dict[str, Tensor]:
        """Return, by the figure, a number for each of this rank's rows, (B,), NaN where it lacks a modality."""
        right_BMG = self._right(seen, here, label_B.long())
        names = self.mixture.names
        real_BM, cross_BMG = right_BMG[:, :, -1], right_BMG[:, :, :-1]
        found = {f"classifier_accuracy_{name}": real_BM[:, m] for m, name in enumerate(names)}
        for g, given in enumerate(self.sets):
            if len(given) == 1:
                others = [m for m in range(len(names)) if m not in given]
                found |= {f"coherence_{names[given[0]]}_to_{names[m]}": cross_BMG[:, m, g] for m in others}
        for size in sorted({len(given) for given in self.sets}):
            chosen = [g for g, given in enumerate(self.sets) if len(given) == size]
            found[f"coherence_given_{size}"] = cross_BMG[:, :, chosen].flatten(1).nanmean(1)
        self.last_BMG = cross_BMG
        return found

    def sums(self) -> dict[str, Tensor]:
        """Return sums over this rank's rows of the last batch, (M, G): rows that are right, and all that count."""
        return {"coherent": self.last_BMG.nansum(0), "generated": self.last_BMG.isfinite().double().sum(0)}

    def added(self, found: Evaluation, sums: dict[str, np.ndarray]) -> Evaluation:
        """Return an evaluation with the joint figure, and in its protocol how all were taken and every set's figure."""
        by_set, names = {}, self.mixture.names
        for g, given in enumerate(self.sets):
            for m in range(len(names)):
                if m not in given and sums["generated"][m, g]:
                    key = f"{'+'.join(names[n] for n in given)} -> {names[m]}"
                    by_set[key] = float(sums["coherent"][m, g] / sums["generated"][m, g])
        figures, errors = dict(found.figures), dict(found.errors)
        if self.joint is not None:
            figures["coherence_joint"] = self.joint
            errors["coherence_joint"] = math.sqrt(self.joint * (1 - self.joint) / NUM_PRIOR)
        told = f"means of p(x_m|z), z ~ q(z|x_A) once a row and A, {NUM_PRIOR} of z ~ p(z), judged by the classifiers"
        about = {
            "coherence": told,
            "classifiers": TOLD,
            "classifiers_trained_on": self.rows,
            "coherence_by_given": by_set,
        }
        return replace(found, figures=figures, errors=errors, protocol={**found.protocol, **about})

    def _right(self, seen: Seen, here: Here, label_B: Tensor) -> Tensor:
        """Return 1 where what is made is of the row's class, else 0, float64 (B, M, G + 1), NaN where it is not made.

        The last place is the real x_m. What no classifier can judge is not counted either.
        """
        mixture, num = self.mixture, self.mixture.num_experts
        predicted: dict[int, list[Tensor]] = {e: [] for e in mixture.modalities}
        possible = []
        for g, given in enumerate(self.sets):
            chosen_M = torch.zeros(num, dtype=torch.bool, device=seen.ids_R.device)
            chosen_M[list(given)] = True
            possible.append(((seen.present_RM | ~chosen_M).all(1)[:, None] & ~chosen_M)[here.own])
            at = Moment(self.at.seed, self.at.phase, FIRST_STEP + g)
            z = mixture.infer(seen._replace(present_RM=seen.present_RM & chosen_M), at)
            for e, own in predicted.items():
                own.append(torch.zeros_like(seen.ids_R) if e in given else self._made(e, z, seen.ids_R, at))
        for e, own in predicted.items():
            own.append(self.judges.predict(e, here.rows[mixture.modalities[e].field]))
        possible.append(seen.present_RM[here.own])
        class_ReG = torch.stack([torch.stack(own, dim=1) for own in predicted.values()], dim=1)
        class_BMG = mixture.dispatch.combine(class_ReG.to(mixture.dtype), here.route).round().long()
        right_BMG = (class_BMG == label_B[:, None, None]).double()
        return torch.where(torch.stack(possible, dim=2) & (class_BMG >= 0), right_BMG, math.nan)

    def _made(self, e: int, z: Tensor, ids: Tensor, at: Moment) -> Tensor:
        """Return the class of what an expert here makes of latents, (R,)."""
        return self.judges.predict(e, self.mixture.decode(e, z, ids, at))

    @torch.no_grad()
    def _joint(self) -> float | None:
        """Return the part of prior samples of which all modalities are of one class; None where one has no judge."""
        mixture, at = self.mixture, Moment(self.at.seed, self.at.phase, FIRST_STEP + len(self.sets))

        ids = torch.arange(NUM_PRIOR, device=mixture.context.mesh.device)
        z = mixture.prior.draw(at.draw(Purpose.PRIOR).normal(ids, [0], (mixture.latent,), mixture.dtype)[0])

        def judged(e: int, expert: Expert) -> dict[str, Tensor]:
            parts = zip(z.split(AT_ONCE), ids.split(AT_ONCE), strict=True)
            return {"class": torch.cat([self._made(e, some, numbers, at) for some, numbers in parts])}

        every = from_experts(mixture, judged)
        class_MN = np.stack([every[f"{e}/class"] for e in range(mixture.num_experts)])
        return None if (class_MN < 0).any() else float((class_MN == class_MN[0]).all(0).mean())
