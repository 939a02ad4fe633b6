"""The product of the modalities' posteriors, and the mixture of the products of all subsets.

Shape letters: B rows on this rank, R rows routed here, M modalities, K proposals (subsets), N those that an expert
scores, S samples, L latent.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from mixdist.arguments import check_arguments
from mixdist.mixtures.multimodal import MakeModality, Multimodal
from mixdist.mixtures.proposals import Proposals, Seen
from mixdist.mixtures.subsets import all_subsets, product, random_subset
from mixdist.noise import Moment, Purpose


class _Products(Multimodal):
    """Base: normal posteriors of subsets of the modalities, by products, and a weighted sum of their ELBOs."""

    def __init__(
        self, expert: list[MakeModality], latent: int, samples: int, beta: float, rescale: bool, learn_prior: bool
    ) -> None:
        super().__init__(expert, latent, "normal", samples, rescale, learn_prior)
        if not 0 <= beta < float("inf"):
            raise ValueError(f"mixture.beta ({beta}) must be a number from 0: give 1 for a bound")
        self.beta = beta

    def losses(self, proposals: Proposals, z: Tensor, score_BMNS: Tensor, present_BM: Tensor) -> Tensor:
        weight_BK = self.weigh(proposals)
        kl_BK = self.prior.kl(proposals.loc_RKL, proposals.scale_RKL).sum(-1)
        slots = proposals.slots_MN
        weight_BMN = weight_BK[:, None] if slots is None else weight_BK[:, slots]
        used_BMN = self.decoded(proposals, present_BM) * weight_BMN
        return self.beta * (weight_BK * kl_BK).sum(1) - (used_BMN * score_BMNS.mean(-1)).sum((1, 2))

    @abstractmethod
    def weigh(self, proposals: Proposals) -> Tensor:
        """Return the weight of each proposal's ELBO, (B, K)."""

    @abstractmethod
    def decoded(self, proposals: Proposals, present_BM: Tensor) -> Tensor:
        """Return which modalities count in the ELBOs, (B, M, N)."""


class PoEMVAE(_Products):
    """Product-of-experts multimodal VAE (Wu and Goodman 2018): q(z|A) prop. to p(z) prod_{m in A} q(z|x_m), normal.

    loss = -ELBO(all) - sum_m ELBO({m}) - sum_i ELBO(A_i), over the modalities that a row has, with

        ELBO(A) = E_q(z|A) sum_{m in A} log p(x_m|z) - beta KL(q(z|A) || p(z)), nats,

    and random subsets A_i keyed by row (their equation 5). Without the terms of single modalities nothing is learnt
    about the others from one alone. With private latents, log p(x_m|z, w_m) + log p(w_m) - log q(w_m|x_m) takes the
    place of log p(x_m|z).

    Args:
        expert: a :class:`mixdist.experts.Modality` for each modality, in a list.
        latent: L.
        samples: S, of each subset.
        unimodal: whether the ELBOs of single modalities count.
        subsets: random subsets for each row.
        beta: weight of the KL.
        rescale: multiplies log p(x_m|z) in training by the numbers of the largest modality over those of m.
        learn_prior: whether the scales of p(z) learn.

    Raises:
        ValueError: no expert, a number out of range.

    Examples:
        >>> from functools import partial
        >>> from mixdist.experts import Modality
        >>> from mixdist.mixtures import PoEMVAE
        >>> PoEMVAE([partial(Modality, field="x0"), partial(Modality, field="x1")], subsets=0).posterior
        'normal'
    """

    def __init__(
        self,
        expert: list[MakeModality],
        latent: int = 20,
        samples: int = 1,
        unimodal: bool = True,
        subsets: int = 1,
        beta: float = 1.0,
        rescale: bool = True,
        learn_prior: bool = False,
    ) -> None:
        check_arguments(PoEMVAE.__init__, locals(), "mixture.")
        super().__init__(expert, latent, samples, beta, rescale, learn_prior)
        if subsets < 0:
            raise ValueError(f"mixture.subsets ({subsets}) must be a whole number from 0")
        self.unimodal, self.subsets = unimodal, subsets

    def propose(self, seen: Seen, at: Moment, held_out: bool = False) -> Proposals:
        present, num, device = seen.present_RM, self.num_experts, seen.ids_R.device
        subsets = 0 if held_out else self.subsets
        members = [present[:, None]]
        if self.unimodal or held_out:
            members.append(torch.diag_embed(present))
        if subsets:
            uniform = at.draw(Purpose.SUBSET).uniform(seen.ids_R, range(subsets), (num,), torch.float64)
            members.append(torch.stack([random_subset(one, present) for one in uniform], dim=1))
        members_RKM = torch.cat(members, dim=1)
        slots = None
        if self.unimodal and not held_out:  # an expert scores of single ones its own alone
            every = torch.arange(members_RKM.shape[1], device=device).expand(num, -1)
            slots = torch.cat([every[:, :1], 1 + every[0, :num, None], every[:, 1 + num :]], dim=1)
        keys = [num, *(range(num) if self.unimodal or held_out else ()), *range(num + 1, num + 1 + subsets)]
        loc, scale = product(seen.loc_RML, seen.scale_RML, members_RKM, self.prior.scale())
        return Proposals(members_RKM, loc, scale, keys, slots)

    @property
    def joint(self) -> list[int]:
        return [0]

    @property
    def single(self) -> list[int]:
        return list(range(1, 1 + self.num_experts))

    @property
    def loss_is(self) -> str:
        terms = f"{'all and single ones' if self.unimodal else 'all'}, {self.subsets} random subsets"
        return f"PoEMVAE's sum of ELBOs: {terms}, beta {self.beta:g}"

    def weigh(self, proposals: Proposals) -> Tensor:
        return proposals.valid_RK.to(self.dtype)

    def decoded(self, proposals: Proposals, present_BM: Tensor) -> Tensor:
        if proposals.slots_MN is None:
            return proposals.members_RKM.transpose(1, 2)
        every = torch.arange(self.num_experts, device=present_BM.device)[:, None]
        return proposals.members_RKM[:, proposals.slots_MN, every]


class MoPoE(_Products):
    """Mixture of products of experts (Sutter et al. 2021): q(z|x) = 1/K sum_A q(z|A) over all K = 2^M - 1 subsets.

    q(z|A) prop. to prod_{m in A} q(z|x_m), normal, of the subsets that a row has in full, and (their equation 9, nats)

        loss = -1/K sum_A [E_q(z|A) sum_m log p(x_m|z) - beta KL(q(z|A) || p(z))].

    With private latents, modalities outside of A decode with one from their prior, as in :class:`MMVAE`.

    Args:
        expert: a :class:`mixdist.experts.Modality` for each modality, in a list.
        latent: L.
        samples: S, of each subset.
        beta: weight of the KL.
        rescale: multiplies log p(x_m|z) in training by the numbers of the largest modality over those of m.
        learn_prior: whether the scales of p(z) learn.

    Raises:
        ValueError: no expert, or more than 8; a number out of range.

    Examples:
        >>> from functools import partial
        >>> from mixdist.experts import Modality
        >>> from mixdist.mixtures import MoPoE
        >>> MoPoE([partial(Modality, field=f"x{m}") for m in range(5)]).num_experts
        5
    """

    def __init__(
        self,
        expert: list[MakeModality],
        latent: int = 20,
        samples: int = 1,
        beta: float = 1.0,
        rescale: bool = True,
        learn_prior: bool = False,
    ) -> None:
        check_arguments(MoPoE.__init__, locals(), "mixture.")
        super().__init__(expert, latent, samples, beta, rescale, learn_prior)
        if self.num_experts > MOST:
            raise ValueError(
                f"mixture.expert lists {self.num_experts} modalities, of which MoPoE has 2^M - 1 subsets: give at most "
                f"{MOST}, or take PoEMVAE"
            )

    def propose(self, seen: Seen, at: Moment, held_out: bool = False) -> Proposals:
        subsets = all_subsets(self.num_experts, seen.ids_R.device)
        whole = (seen.present_RM[:, None] | ~subsets).all(-1, keepdim=True)
        members = subsets & whole
        loc, scale = product(seen.loc_RML, seen.scale_RML, members, None)
        return Proposals(members, loc, scale, list(range(len(subsets))))

    @property
    def joint(self) -> list[int]:
        return list(range((1 << self.num_experts) - 1))

    @property
    def single(self) -> list[int]:
        return list(range(self.num_experts))

    def inferred(self, proposals: Proposals) -> Tensor:
        """The largest subset that a row has, the product of all that is given."""
        size = proposals.members_RKM.sum(-1)
        return (size == size.max(1, keepdim=True).values) & proposals.valid_RK

    @property
    def loss_is(self) -> str:
        return f"MoPoE's mean of ELBOs, beta {self.beta:g}"

    def weigh(self, proposals: Proposals) -> Tensor:
        valid = proposals.valid_RK.to(self.dtype)
        return valid / valid.sum(1, keepdim=True).clamp(min=1)

    def decoded(self, proposals: Proposals, present_BM: Tensor) -> Tensor:
        return present_BM[:, :, None]


MOST = 8
"""Modalities of which all subsets are taken."""
