"""The figures of a mixture with one decoder.

Shape letters: B rows on this rank, E components.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mixdist.data import RankBatch, Samples
from mixdist.mixtures.dependence import NUM_ROWS, dependence
from mixdist.mixtures.study import KEYS, Evaluation, Request, Study, linearised

if TYPE_CHECKING:
    from mixdist.mixtures.mvae import MVAE


class MVAEStudy(Study):
    """Gathers the figures of :class:`mixdist.mixtures.MVAE`, nats a row.

    - ``loss`` = mean_n of a row's loss as in training, without the terms of the whole batch; ``elbo`` = mean_n of
      log p(x|s) - sum_i KL_i - KL(Dir(a) || prior) at one draw, a lower bound of log p(x) (seed document 002, equation
      8) where masks and penalty are left out.
    - ``rmse_row``, ``rmse_value``: of reconstructions at the means of q(z|x), of the weights and of the masks.
    - ``kl``: sum_i KL_i. ``selected_components``: how many the masks keep. ``components_in_use`` = exp H(mean_n E w_n),
      their effective number.
    - ``dhsic``, ``dhsic_pairs``, ``dhsic_floor``: dHSIC of draws of z, of all components that are on, the mean over
      their pairs, and that with shuffled rows: :func:`mixdist.mixtures.dependence.dependence`, on the first 500 rows.
      The protocol has those of every pair, which ``images/dependence.png`` shows (figure 12).

    Args:
        mixture: the mixture.
        dataset: the rows.
        request: what is asked for.
    """

    def __init__(self, mixture: MVAE, dataset: Samples, request: Request) -> None:
        super().__init__(mixture.measure, dataset, request)
        self.mixture = mixture
        self.z: list[Tensor] = []

    @torch.no_grad()
    def add(self, batch: RankBatch) -> None:
        mixture, at = self.mixture, self.request.at
        route = mixture.send(batch)
        terms = mixture.expert_terms(route, at)
        latents = mixture.latents(terms, route)
        _, loss_B, log_px_B = mixture.rows_of(batch, route, terms, latents, at)
        kl_B = latents.kl_BE.sum(-1)
        prior_B = mixture.prior_kl(latents.a_BE)
        weight_BE = mixture.mean_weights(latents.a_BE)
        x = mixture.values(batch.rows, (mixture.field,))[mixture.field]
        made = mixture.decoder.decode(mixture.summed_at_means(route, weight_BE))
        squared_B = (made - x).double().flatten(1).square().sum(1)
        self.keep(
            loss=loss_B.double(), elbo=(log_px_B - kl_B - prior_B).double(), kl=kl_B.double(), squared_error=squared_B
        )
        self.sum("weight", weight_BE.sum(0))
        if sum(map(len, self.z)) < NUM_ROWS:  # every rank has all of them, in the data set's order
            self.z.append(mixture.dispatch.over_batch.gather(mixture.of_on(latents.z_BEL), batch.counts))
        label = self.dataset.label
        if label:
            self.keep(expert=weight_BE.argmax(-1))

    def result(self, sums: dict[str, np.ndarray], columns: dict[str, np.ndarray]) -> Evaluation:
        found = Evaluation(self.dataset, {}, columns={name: columns[name] for name in KEYS if name in columns})
        for name in ("loss", "elbo", "kl"):
            found = found.plus(name, columns[name])
        value = math.sqrt(columns["squared_error"].mean())
        slope = columns["squared_error"] / (2 * value) if value else columns["squared_error"]
        row = linearised(value, slope)
        found = found.plus("rmse_row", row)
        found = found.plus("rmse_value", row / math.sqrt(self.mixture.spec[self.mixture.field].num_values))
        share_E = sums["weight"] / len(self.dataset)
        in_use = math.exp(-(share_E * np.log(np.maximum(share_E, np.finfo(np.float64).tiny))).sum())
        kept = float(self.mixture.masks.kept().detach().sum())
        figures = found.figures | {"components_in_use": in_use, "selected_components": kept}
        told = [
            f"component {e} has {share:.0%} of the weight: the others hardly count"
            for e, share in enumerate(share_E)
            if len(share_E) > 2 and share > 0.8
        ]
        protocol, z_NEL = {}, torch.cat(self.z)[:NUM_ROWS]
        if z_NEL.shape[1] > 1:
            measured = dependence(z_NEL, self.request.at.seed)
            figures["dhsic"], (figures["dhsic_pairs"], figures["dhsic_floor"]) = measured.whole, measured.pairs
            on = [e for e, is_on in enumerate(self.mixture.masks.on()) if is_on]
            pairs = {"pairs": measured.pair_EE.tolist(), "shuffled": measured.floor_EE.tolist()}
            protocol["dhsic"] = {"rows": len(z_NEL), "components": on, **pairs}
        return Evaluation(self.dataset, figures, told, found.errors, found.columns, protocol)
