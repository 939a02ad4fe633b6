"""The deep mixture VAE as a gate: a network says the cluster, and the cluster's Gaussian is the prior of z.

Shape letters: B rows on this rank, K clusters (as many as experts), L latent.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mixdist.arguments import check_arguments
from mixdist.gates.gaussians import cluster_kl, fit_diagonal, weighted_clusters
from mixdist.gates.latent import LatentGate
from mixdist.nets.likelihood import LikelihoodName, MeanName, ScaleName
from mixdist.nets.mlp import flat
from mixdist.nets.network import Network
from mixdist.stats import entropy
from mixdist.terms import Batch, Gating, Spec


class DMVAE(LatentGate):
    """DMVAE (seed document 001, section 3): q(k|x) from a network of its own, and a uniform p(k).

    With z = mu + sigma eps and zeta = softmax((log q + G) / t), G standard Gumbel numbers (Jang et al. 2017), the loss
    of a row is

        -log p(x|z) + KL(N(mu, v) || N(zeta^T m, exp(zeta^T log s^2))) + sum_k q_k log q_k + log K,

    nats. It is no bound of -log p(x): ``relaxed: false`` gives one, with sum_k q_k KL(N(mu, v) || N(m_k, s_k^2)) in
    place of the divergence. Responsibilities are q, without a draw.

    Stages: ``autoencoder`` learns encoder and decoder by -log p(x|mu), responsibilities are even; ``classify`` learns
    q(k|x) alone, by an objective of the responsibilities, such as mixdist.mixtures.Information around
    :class:`mixdist.gates.Consistent`; ``joint`` learns everything.

    Args:
        spec: as in :class:`mixdist.gates.latent.LatentGate`; so are num_experts, latent, network, likelihood, scale,
            mean, field, spread and start_rows.
        num_experts: K.
        latent: L.
        network: of encoder and decoder.
        classifier: of q(k|x); unset, as ``network``.
        likelihood: p(x|z).
        scale: of the likelihood.
        mean: of the likelihood.
        field: which field it models.
        spread: standard deviation of the first m_k.
        start: how the prior begins its first joint phase: mixture, by EM on the means of q(z|x); classes, from those
            means weighted by q(k|x); none, as it is.
        start_rows: rows of that start.
        temperature: t.
        relaxed: the loss of the seed document; false, the bound.
        floor: the least scale of the likelihood.

    Raises:
        ValueError: a field that does not suit; a number that is not above 0.

    Examples:
        >>> import torch
        >>> from mixdist.gates import DMVAE
        >>> from mixdist.terms import Field
        >>> gate = DMVAE({"x": Field((1, 8, 8), torch.float32)}, num_experts=3, latent=2)
        >>> gating = gate({"x": torch.zeros(5, 1, 8, 8)}, torch.randn(5, *gate.noise_shape))
        >>> gating.log_resp_BE.shape, gating.loss_B.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    stages = ("autoencoder", "classify", "joint")

    def __init__(
        self,
        spec: Spec,
        num_experts: int,
        latent: int = 10,
        network: Network | None = None,
        classifier: Network | None = None,
        likelihood: LikelihoodName = "bernoulli",
        scale: float | ScaleName = "learned",
        mean: MeanName = "sigmoid",
        field: str = "x",
        spread: float = 1.0,
        start: Literal["none", "mixture", "classes"] = "none",
        start_rows: int = 20_000,
        temperature: float = 0.2,
        relaxed: bool = True,
        floor: float | None = None,
    ) -> None:
        check_arguments(DMVAE.__init__, locals(), "DMVAE's ")
        super().__init__(spec, num_experts, latent, network, likelihood, scale, mean, field, spread, start_rows, floor)
        if not 0 < temperature < math.inf:
            raise ValueError(f"DMVAE's temperature ({temperature}) must be a number above 0: give 0.2 as the text does")
        self.begins, self.temperature, self.relaxed = start, temperature, relaxed
        self.classifier = (self.network if classifier is None else classifier).encoder(self.shape, num_experts)
        self.noise_shape = (latent + (num_experts if relaxed else 0),)

    def log_pi(self) -> Tensor:
        return self.even(self.mean_KL[:1])[0]

    def log_q(self, rows: Batch) -> Tensor:
        """Return log q(k|x), (B, K)."""
        x = flat(rows[self.field], self.shape)
        return torch.log_softmax(self.classifier(x).to(x.dtype), dim=-1)

    def enter(self, stage: str) -> None:
        self.stage = stage
        if stage != "joint":
            self.freeze(*self.prior, *self.variance)
        if stage == "autoencoder":
            self.freeze(self.classifier)
        if stage == "classify":
            self.freeze(self.encoder, self.decoder, self.likelihood)

    def starts_at(self, stage: str) -> bool:
        return self.begins != "none" and stage == "joint"

    def seen(self, rows: Batch) -> Tensor:
        means = super().seen(rows)
        return means if self.begins == "mixture" else torch.cat([means, self.log_q(rows).exp()], dim=1)

    def start(self, seen: Tensor, seed: int) -> None:
        if self.begins == "mixture":
            self.take(fit_diagonal(seen, self.num_clusters, seed))
        else:
            self.take(weighted_clusters(*seen.split([seen.shape[1] - self.num_clusters, self.num_clusters], dim=1)))

    def forward(self, rows: Batch, eps: Tensor | None) -> Gating:
        assert eps is not None
        if self.training and self.stage == "classify":
            return Gating(self.log_q(rows))
        mean, log_var = self.encode(rows)
        if self.training and self.stage == "autoencoder":
            return Gating(self.even(mean), -self.log_px(rows, mean))
        log_q_BK, eps_z, eps_k = self.log_q(rows), eps[:, : mean.shape[1]], eps[:, mean.shape[1] :]
        z = mean + torch.exp(0.5 * log_var) * eps_z
        loss_B = self._divergence(mean, log_var, log_q_BK, eps_k) - self.log_px(rows, z)
        return Gating(log_q_BK, loss_B - entropy(log_q_BK, dim=-1) + math.log(self.num_clusters))

    def log_responsibilities(self, rows: Batch, eps: Tensor | None) -> Tensor:
        if self.training and self.stage == "autoencoder":
            return self.even(rows[self.field].flatten(1))
        return self.log_q(rows)

    def _divergence(self, mean: Tensor, log_var: Tensor, log_q_BK: Tensor, eps_k: Tensor) -> Tensor:
        """Return the divergence of q(z|x) from its prior, (B,) nats."""
        if not self.relaxed:
            return (log_q_BK.exp() * cluster_kl(mean, log_var, self.mean_KL, self.log_var_KL)).sum(-1)
        gumbel = -torch.log(-torch.special.log_ndtr(eps_k))
        zeta_BK = torch.softmax((log_q_BK + gumbel) / self.temperature, dim=-1)
        prior = zeta_BK @ self.mean_KL, zeta_BK @ self.log_var_KL
        return cluster_kl(mean, log_var, *(one.unsqueeze(1) for one in prior))[:, 0]
