"""The mixture of the modalities' posteriors.

Shape letters: B rows on this rank, R rows routed here, M modalities, N = M proposals, S samples, L latent.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mixdist.arguments import check_arguments
from mixdist.experts.location_scale import PosteriorName
from mixdist.mixtures.bounds import (
    DoublyReparametrised,
    Weights,
    log_densities,
    log_mixture,
    looser,
    responsibility_slope,
    through,
    tighter,
)
from mixdist.mixtures.multimodal import MakeModality, Multimodal
from mixdist.mixtures.proposals import Proposals, Seen
from mixdist.noise import Moment

GradientName = Literal["iwae", "stl", "dreg"]


class MMVAE(Multimodal):
    """Mixture-of-experts multimodal VAE of seed document 003 (Shi et al. 2019): q(z|x) = 1/M sum_m q(z|x_m).

    For a row with modalities x_1 to x_M, with z_ns ~ q(z|x_n) for s to S, nats:

        w_ns = p(z_ns) prod_m p(x_m|z_ns) / q(z_ns|x),
        loss = -1/M sum_n log 1/S sum_s w_ns (``objective: looser``, as the seed has it),
        loss = -log 1/(M S) sum_ns w_ns (``tighter``).

    Modalities that a row lacks are left out of every sum and product over m and n.

    With private latents (of :class:`mixdist.experts.Modality`), w_ns has besides the factor p(w_n) / q(w_n|x_n) of a
    private w_n ~ q(w_n|x_n), and other modalities decode z_ns with one from their prior (Palumbo et al. 2023, equation
    4, with the prior for r): its mean over n is an unbiased estimate of p(x), as without.

    Gradients by the parameters of q: ``iwae``, as autograd has it; ``stl`` without the score of q (Roeder et al. 2017),
    which is what the authors' "dreg" computes, biased for S > 1; ``dreg``, doubly reparametrised: unbiased, and of the
    least variance of the three (:class:`mixdist.mixtures.bounds.DoublyReparametrised`).

    Args:
        expert: a :class:`mixdist.experts.Modality` for each modality, in a list.
        latent: L.
        posterior: of q(z|x_m) and p(z), laplace or normal.
        samples: S, of each modality.
        objective: looser or tighter.
        gradient: iwae, stl or dreg.
        rescale: multiplies log p(x_m|z) in training by the numbers of the largest modality over those of m.
        learn_prior: whether the scales of p(z) learn.

    Raises:
        ValueError: no expert, a number out of range.

    Examples:
        >>> from functools import partial
        >>> from mixdist.experts import Modality
        >>> from mixdist.mixtures import MMVAE
        >>> MMVAE([partial(Modality, field="x0"), partial(Modality, field="x1")], samples=30).num_experts
        2
    """

    def __init__(
        self,
        expert: list[MakeModality],
        latent: int = 20,
        posterior: PosteriorName = "laplace",
        samples: int = 30,
        objective: Literal["looser", "tighter"] = "looser",
        gradient: GradientName = "dreg",
        rescale: bool = True,
        learn_prior: bool = True,
    ) -> None:
        check_arguments(MMVAE.__init__, locals(), "mixture.")
        super().__init__(expert, latent, posterior, samples, rescale, learn_prior)
        self.objective, self.gradient = objective, gradient
        self.pathwise, self.detaches = gradient == "dreg", gradient != "iwae"

    def propose(self, seen: Seen, at: Moment, held_out: bool = False) -> Proposals:
        members = torch.diag_embed(seen.present_RM)
        return Proposals(members, seen.loc_RML, seen.scale_RML, list(range(self.num_experts)))

    @property
    def joint(self) -> list[int]:
        return list(range(self.num_experts))

    @property
    def single(self) -> list[int]:
        return list(range(self.num_experts))

    def _log_q(self, proposals: Proposals, z: Tensor) -> Tensor:
        """Return log q_j(z_ns), (B, J, N, S), of the parameters as numbers where the gradient leaves them out."""
        loc, scale = proposals.loc_RKL, proposals.scale_RKL
        if self.detaches:
            loc, scale = loc.detach(), scale.detach()
        return log_densities(self.kind, z, loc, scale)

    def _log_weights(self, proposals: Proposals, z: Tensor, score: Tensor) -> Tensor:
        log_q = log_mixture(self._log_q(proposals, z), proposals.valid_RK)
        return self.prior.log_prob(z) + score.sum(1) - log_q

    @property
    def loss_is(self) -> str:
        return f"MMVAE's {self.objective} bound, {self.samples} samples"

    def losses(self, proposals: Proposals, z: Tensor, score_BMNS: Tensor, present_BM: Tensor) -> Tensor:
        bound = looser if self.objective == "looser" else tighter
        return -bound(self._log_weights(proposals, z, score_BMNS), proposals.valid_RK)

    # The doubly reparametrised gradient: every rank that makes z weighs the gradient that arrives there.

    def factor(self, seen: Seen, total: int) -> Tensor:
        count_R = seen.present_RM.sum(1).clamp(min=1).to(self.dtype)
        return 1.0 / (total * (count_R if self.objective == "looser" else torch.ones_like(count_R)))

    def lift(self, seen: Seen, z: Tensor, weights: Weights) -> Tensor:
        resp = self._responsibilities(seen, z)
        return DoublyReparametrised.apply(z, seen.loc_RML, seen.scale_RML, resp, weights)

    @torch.no_grad()
    def _responsibilities(self, seen: Seen, z: Tensor) -> Tensor:
        """Return r_j(z_ns), (B, J, N, S): q_j over the sum of those present."""
        log_q = log_densities(self.kind, z, seen.loc_RML, seen.scale_RML)
        some = seen.present_RM | ~seen.present_RM.any(1, keepdim=True)
        return torch.softmax(log_q.masked_fill(~some[..., None, None], -math.inf), dim=1)

    def differentiate(self, seen: Seen, proposals: Proposals, z: Tensor, score: Tensor, total: int) -> Tensor:
        if not self.pathwise:
            return super().differentiate(seen, proposals, z, score, total)
        weights, loc, scale = Weights(), seen.loc_RML, seen.scale_RML
        log_w = self._log_weights(proposals, self.lift(seen, z, weights), score)
        valid = proposals.valid_RK
        loss = -(looser if self.objective == "looser" else tighter)(log_w, valid).sum() / total
        with torch.no_grad():
            masked = log_w.masked_fill(~valid[..., None], -math.inf)
            whole = torch.softmax(masked.flatten(1), 1).view_as(masked)
            each = torch.where(valid[..., None], torch.softmax(log_w, -1), 0.0)
            weights.value_BNS = each if self.objective == "looser" else whole
            resp = self._responsibilities(seen, z)
            slope = responsibility_slope(self.kind, z, loc, scale, resp)
            scaled = -weights.value_BNS * self.factor(seen, total)[:, None, None]
            of_loc, of_scale = through(resp, scaled[..., None] * slope, z, loc, scale)
        torch.autograd.backward([loss, loc, scale], [torch.ones_like(loss), of_loc, of_scale])
        return loss.detach()
