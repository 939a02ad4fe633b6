"""Variational deep embedding as a gate: a VAE whose prior is a mixture of Gaussians.

Shape letters: B rows on this rank, K clusters (as many as experts), L latent, S samples.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mixdist.arguments import check_arguments
from mixdist.gates.gaussians import Clusters, cluster_kl, fit_diagonal, log_joint
from mixdist.gates.latent import LatentGate
from mixdist.nets.likelihood import LikelihoodName, MeanName, ScaleName
from mixdist.nets.network import Network
from mixdist.stats import entropy
from mixdist.terms import Batch, Gating, Spec


class VaDE(LatentGate):
    """VaDE (Jiang et al. 2017; seed document 001, sections 2.1 and 5): clusters are the components of p(z).

    With z = mu + sigma eps and g_k(z) = softmax_k(log pi_k + log N(z; m_k, s_k^2)), the loss of a row is

        -log p(x|z) + sum_k g_k KL(N(mu, v) || N(m_k, s_k^2)) + sum_k g_k log(g_k / pi_k),

    the negative ELBO with q(k|x) = g_k(z), nats; its gradient goes through g. Responsibilities are g. Outside training
    they are taken at mu, as published, or averaged over ``test_samples`` draws of z (section 5.1).

    Stages: ``autoencoder`` learns encoder and decoder by -log p(x|mu), responsibilities are even; ``classify`` learns
    encoder and prior by an objective of the responsibilities at mu, such as mixdist.mixtures.Information around
    :class:`mixdist.gates.Consistent`; ``joint`` learns everything.

    Args:
        spec: as in :class:`mixdist.gates.latent.LatentGate`; so are num_experts, latent, network, likelihood, scale,
            mean, field, spread and start_rows.
        num_experts: K.
        latent: L.
        network: of encoder and decoder.
        likelihood: p(x|z).
        scale: of the likelihood.
        mean: of the likelihood.
        field: which field it models.
        spread: standard deviation of the first m_k.
        start: how the prior begins its first joint phase: mixture, by EM on the means of q(z|x); none, as it is.
        start_rows: rows of that start.
        test_samples: draws of z for the responsibilities of a row outside training; 0 for its mean.
        floor: the least scale of the likelihood.

    Raises:
        ValueError: a field that does not suit; a number that is not above 0.

    Examples:
        >>> import torch
        >>> from mixdist.gates import VaDE
        >>> from mixdist.terms import Field
        >>> gate = VaDE({"x": Field((1, 8, 8), torch.float32)}, num_experts=3, latent=2)
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
        likelihood: LikelihoodName = "bernoulli",
        scale: float | ScaleName = "learned",
        mean: MeanName = "sigmoid",
        field: str = "x",
        spread: float = 1.0,
        start: Literal["none", "mixture"] = "none",
        start_rows: int = 20_000,
        test_samples: int = 0,
        floor: float | None = None,
    ) -> None:
        check_arguments(VaDE.__init__, locals(), "VaDE's ")
        super().__init__(spec, num_experts, latent, network, likelihood, scale, mean, field, spread, start_rows, floor)
        if test_samples < 0:
            raise ValueError(f"VaDE's test_samples ({test_samples}) must be 0 or more: give 0 for the mean of z")
        self.begins, self.test_samples = start, test_samples
        self.noise_shape = (max(test_samples, 1), latent)
        self.logits_K = nn.Parameter(torch.zeros(num_experts))

    def log_pi(self) -> Tensor:
        return torch.log_softmax(self.logits_K, dim=0)

    def enter(self, stage: str) -> None:
        self.stage = stage
        if stage == "autoencoder":
            self.freeze(self.logits_K, *self.prior, *self.variance)
        if stage == "classify":
            self.freeze(self.decoder, self.likelihood, *self.variance)

    def starts_at(self, stage: str) -> bool:
        return self.begins != "none" and stage == "joint"

    def start(self, seen: Tensor, seed: int) -> None:
        found = fit_diagonal(seen, self.num_clusters, seed)
        self.take(found)
        with torch.no_grad():
            self.logits_K.copy_(found.log_pi_K)

    def forward(self, rows: Batch, eps: Tensor | None) -> Gating:
        assert eps is not None
        mean, log_var = self.encode(rows)
        if self.training and self.stage == "autoencoder":
            return Gating(self.even(mean), -self.log_px(rows, mean))
        if self.training and self.stage == "classify":
            return Gating(self._log_g(mean))
        z = mean + torch.exp(0.5 * log_var) * eps[:, 0]
        clusters = self.clusters()
        log_g_BK = self._log_g(z, clusters)
        kl_BK = cluster_kl(mean, log_var, self.mean_KL, self.log_var_KL) - clusters.log_pi_K
        loss_B = (log_g_BK.exp() * kl_BK).sum(-1) - entropy(log_g_BK, dim=-1) - self.log_px(rows, z)
        return Gating(log_g_BK if self.training else self._tested(mean, log_var, eps), loss_B)

    def log_responsibilities(self, rows: Batch, eps: Tensor | None) -> Tensor:
        assert eps is not None
        mean, log_var = self.encode(rows)
        if not self.training:
            return self._tested(mean, log_var, eps)
        if self.stage == "autoencoder":
            return self.even(mean)
        return self._log_g(mean if self.stage == "classify" else mean + torch.exp(0.5 * log_var) * eps[:, 0])

    def _log_g(self, z: Tensor, clusters: Clusters | None = None) -> Tensor:
        return torch.log_softmax(log_joint(z, self.clusters() if clusters is None else clusters), dim=-1)

    def _tested(self, mean: Tensor, log_var: Tensor, eps: Tensor) -> Tensor:
        """Return the log responsibilities of rows outside training, (B, K)."""
        if not self.test_samples:
            return self._log_g(mean)
        log_g_BSK = self._log_g(mean[:, None] + torch.exp(0.5 * log_var)[:, None] * eps)
        return torch.log_softmax(log_g_BSK.logsumexp(1), dim=-1)
