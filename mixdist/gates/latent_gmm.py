"""A mixture of Gaussians over the latents of a trained encoder as a gate.

Shape letters: B rows on this rank, K clusters (as many as experts), L latent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from mixdist.arguments import check_arguments
from mixdist.gates.gate import Gate
from mixdist.gates.gaussians import ClusterName, Clusters, fit_clusters, log_joint
from mixdist.gates.latent import check_enough
from mixdist.nets.mlp import MLP, flat
from mixdist.nets.network import Network
from mixdist.stats import Warmup, annealed, temperatures
from mixdist.terms import Batch, Gating, Spec, misfit, real_field


class LatentGMM(Gate):
    """q(k|x) = softmax_k((log pi_k + log N(mu(x); m_k, S_k)) / t), mu(x) the mean of a trained VAE's q(z|x).

    The encoder is that of the one model that :class:`mixdist.training.Upcycled` starts all experts from. It stays as it
    is, or learns along; the clusters learn like any gate, in phases that train it. They start before the first step,
    from the latents of training rows: k-means, as equal weights and one variance for all, or EM for diagonal S_k.

    Args:
        spec: the data set's fields.
        num_experts: K.
        latent: L, as of the model.
        network: as of the model; unset, as a VAE's.
        field: which field it reads.
        start: kmeans or mixture.
        start_rows: training rows that the clusters start from; of more, so many, chosen by the seed.
        temperature: t; above 1 softer, below 1 harder.
        final_temperature: t after ``anneal_steps``, to which it goes geometrically; evaluation has this one at any
            step. Unset, ``temperature`` stays.
        anneal_steps: training steps of a phase over which t gets there, or a :class:`mixdist.stats.Warmup`, as
            ``{epochs: 5}``.
        learns: clusters alone, or the encoder too (all).

    Raises:
        ValueError: a field that does not suit; a number that is not above 0.

    Examples:
        >>> import torch
        >>> from mixdist.gates import LatentGMM
        >>> from mixdist.terms import Field
        >>> gate = LatentGMM({"x": Field((1, 8, 8), torch.float32)}, num_experts=3, latent=2)
        >>> gate({"x": torch.zeros(5, 1, 8, 8)}, None).log_resp_BE.shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        spec: Spec,
        num_experts: int,
        latent: int = 10,
        network: Network | None = None,
        field: str = "x",
        start: ClusterName = "mixture",
        start_rows: int = 20_000,
        temperature: float = 1.0,
        learns: Literal["clusters", "all"] = "clusters",
        final_temperature: float | None = None,
        anneal_steps: int | Warmup = 0,
    ) -> None:
        check_arguments(LatentGMM.__init__, locals(), "LatentGMM's ")
        super().__init__()
        self.shape = real_field(spec, field, "LatentGMM").shape
        self.temperatures = temperatures("LatentGMM", temperature, final_temperature, anneal_steps)
        for name, value in (("latent", latent), ("start_rows", start_rows)):
            if not 0 < value < math.inf:
                raise ValueError(f"LatentGMM's {name} ({value}) must be a number above 0: give one")
        self.field, self.fields, self.num_latents, self.num_clusters = field, (field,), latent, num_experts
        self.begins, self.start_rows, self.trained = start, start_rows, False
        self.temperature, self.anneal_steps = temperature, anneal_steps
        self.encoder = (MLP([128]) if network is None else network).encoder(self.shape, 2 * latent)
        self.encoder.requires_grad_(learns == "all")
        self.logits_K = nn.Parameter(torch.zeros(num_experts))
        self.mean_KL = nn.Parameter(torch.randn(num_experts, latent))
        self.log_var_KL = nn.Parameter(torch.zeros(num_experts, latent))

    def seen(self, rows: Batch) -> Tensor:
        x = flat(rows[self.field], self.shape)
        mean: Tensor = self.encoder(x).to(x.dtype)[..., : self.num_latents]
        return mean

    def clusters(self) -> Clusters:
        """Return the mixture in the latents."""
        return Clusters(torch.log_softmax(self.logits_K, dim=0), self.mean_KL, self.log_var_KL)

    def anneal(self, step: int) -> None:
        self.temperature = annealed(step, self.anneal_steps, *self.temperatures)

    def forward(self, rows: Batch, eps: Tensor | None) -> Gating:
        temperature = self.temperature if self.training else self.temperatures[1]
        return Gating(torch.log_softmax(log_joint(self.seen(rows), self.clusters()) / temperature, dim=-1))

    def take_model(self, tensors: Mapping[str, Tensor]) -> None:
        own = {f"encoder.{name}": value for name, value in self.encoder.state_dict().items()}
        given = {name: value for name, value in tensors.items() if name.startswith("encoder.")}
        wrong = misfit(given, own)
        if wrong:
            raise ValueError(f"the model's encoder is another: {wrong}; give the gate the model's latent and network")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(given[name])
        self.trained = True

    def starts_at(self, stage: str) -> bool:
        return True

    def check_start(self, num_rows: int) -> None:
        check_enough(self, min(num_rows, self.start_rows), self.num_clusters)

    @torch.no_grad()
    def start(self, seen: Tensor, seed: int) -> None:
        if not self.trained:
            raise ValueError(
                "its encoder is not trained: set mixture.expert_start to mixdist.training.Upcycled, which gives it a "
                "trained model's"
            )
        found = fit_clusters(seen, self.num_clusters, seed, self.begins)
        self.logits_K.copy_(found.log_pi_K)
        self.mean_KL.copy_(found.mean_KL)
        self.log_var_KL.copy_(found.log_var_KL)
