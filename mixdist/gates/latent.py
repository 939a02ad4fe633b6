"""What gates with a latent space share: encoder, decoder, and Gaussian clusters as the prior of z.

Shape letters: B rows on this rank, K clusters (as many as experts), L latent, S samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mixdist.gates.gate import Gate
from mixdist.gates.gaussians import Clusters, log_joint
from mixdist.nets.likelihood import Likelihood, LikelihoodName, MeanName, ScaleName, check_levels
from mixdist.nets.mlp import MLP, flat
from mixdist.nets.network import Network
from mixdist.terms import Batch, Spec, real_field

BELOW = 2.0
"""After a start, log v of q(z|x) lies so far below the mean log variance of the clusters: else posteriors would swallow
them."""


class LatentGate(Gate):
    """Base of gates that are VAEs with clusters: p(z) = sum_k pi_k N(z; m_k, s_k^2), q(z|x) = N(mu(x), v(x)).

    Subclasses say what a row's loss and responsibilities are. log v = a + b * net(x), with a and b for each latent
    dimension: 0 and 1 at first; a start sets a below the clusters' own log variances and b to 0, so that posteriors
    begin narrow and alike.

    Args:
        spec: the data set's fields.
        num_experts: K.
        latent: L.
        network: of encoder and decoder; unset, an MLP with 500, 500 and 2000 hidden units.
        likelihood: p(x|z), as of :class:`mixdist.experts.VAE`.
        scale: of the likelihood, a number, learned, channel, pixel or decoder.
        mean: sigmoid when x lies in [0, 1], identity otherwise.
        field: which field it models.
        spread: standard deviation of the first m_k, drawn from a normal distribution.
        start_rows: training rows that a start is made from; of more, so many, chosen by the seed.
        floor: the least scale of the likelihood, as of the VAE.

    Raises:
        ValueError: a field that does not suit; a number that is not above 0.
    """

    def __init__(
        self,
        spec: Spec,
        num_experts: int,
        latent: int,
        network: Network | None,
        likelihood: LikelihoodName,
        scale: float | ScaleName,
        mean: MeanName,
        field: str,
        spread: float,
        start_rows: int,
        floor: float | None = None,
    ) -> None:
        super().__init__()
        kind = type(self).__name__
        described = real_field(spec, field, kind)
        for name, value in (("latent", latent), ("start_rows", start_rows), ("spread", spread)):
            if not 0 < value < math.inf:
                raise ValueError(f"{kind}'s {name} ({value}) must be a number above 0: give one")
        self.network = MLP([500, 500, 2000]) if network is None else network
        self.field, self.fields, self.shape = field, (field,), described.shape
        self.latent = self.num_drawn = latent
        self.num_clusters, self.start_rows, self.stage = num_experts, start_rows, self.stages[-1]
        num_levels = check_levels(described, field, kind) if likelihood == "logistic" else None
        made = Likelihood(likelihood, scale, mean, num_levels, floor, self.shape)
        self.encoder = self.network.encoder(self.shape, 2 * latent)
        self.decoder, self.likelihood = self.network.decoder(latent, self.shape, made.num_maps), made
        self.log_px_is = self.likelihood.is_a
        self.log_var_offset_L = nn.Parameter(torch.zeros(latent))
        self.log_var_gain_L = nn.Parameter(torch.ones(latent))
        self.mean_KL = nn.Parameter(spread * torch.randn(num_experts, latent))
        self.log_var_KL = nn.Parameter(torch.zeros(num_experts, latent))

    def clusters(self) -> Clusters:
        """Return the prior of z."""
        return Clusters(self.log_pi(), self.mean_KL, self.log_var_KL)

    def encode(self, rows: Batch) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(z|x), each (B, L)."""
        x = flat(rows[self.field], self.shape)
        mean, log_var = self.encoder(x).to(x.dtype).chunk(2, dim=-1)
        return mean, self.log_var_offset_L + self.log_var_gain_L * log_var

    def log_px(self, rows: Batch, z: Tensor) -> Tensor:
        """Return log p(x|z), (B,) nats."""
        x = flat(rows[self.field], self.shape)
        return self.likelihood.log_prob(x, self.decoder(z).to(x.dtype))

    def even(self, like: Tensor) -> Tensor:
        """Return equal log responsibilities, (B, K), for as many rows as a tensor has."""
        return like.new_full((len(like), self.num_clusters), -math.log(self.num_clusters))

    def freeze(self, *parts: nn.Module | nn.Parameter) -> None:
        """Freeze parts for a phase."""
        for part in parts:
            part.requires_grad_(False)

    @property
    def prior(self) -> list[nn.Parameter]:
        """The parameters of the prior of z."""
        return [self.mean_KL, self.log_var_KL]

    @property
    def variance(self) -> list[nn.Parameter]:
        """The parameters of log v beside the network."""
        return [self.log_var_offset_L, self.log_var_gain_L]

    def check_start(self, num_rows: int) -> None:
        check_enough(self, min(num_rows, self.start_rows), self.num_clusters)

    def seen(self, rows: Batch) -> Tensor:
        return self.encode(rows)[0]

    @torch.no_grad()
    def take(self, found: Clusters) -> None:
        """Take clusters as the prior, and begin with narrow posteriors."""
        self.mean_KL.copy_(found.mean_KL)
        self.log_var_KL.copy_(found.log_var_KL)
        self.log_var_offset_L.copy_((found.log_pi_K.exp()[:, None] * found.log_var_KL).sum(0) - BELOW)
        self.log_var_gain_L.zero_()

    def embed(self, rows: Batch) -> Tensor:
        return self.encode(rows)[0]

    def decode(self, z: Tensor) -> Tensor:
        """Return the mean of p(x|z), (B, *shape of x)."""
        return self.likelihood.mean(self.decoder(z)).reshape(-1, *self.shape)

    def reconstruct(self, rows: Batch) -> Tensor:
        return self.decode(self.embed(rows))

    def of_cluster(self, cluster: Tensor, eps: Tensor) -> Tensor:
        """Return z of clusters (S,), (S, L), from standard normal numbers."""
        return self.mean_KL[cluster] + torch.exp(0.5 * self.log_var_KL[cluster]) * eps

    def sample(self, cluster: Tensor, eps: Tensor) -> Tensor:
        return self.decode(self.of_cluster(cluster, eps))

    def draw(self, cluster: Tensor, eps: Tensor, uniform: Tensor) -> Tensor:
        output = self.decoder(self.of_cluster(cluster, eps)).to(uniform.dtype)
        return self.likelihood.draw(output, flat(uniform, self.shape)).reshape(-1, *self.shape)

    def log_weights(self, rows: Batch, eps: Tensor | None) -> Tensor:
        assert eps is not None
        mean, log_var = (one[:, None] for one in self.encode(rows))
        z = mean + torch.exp(0.5 * log_var) * eps
        # log q(z|x) without the constant, which log_joint has once.
        log_q = -0.5 * (eps.square() + log_var + math.log(2.0 * math.pi)).sum(-1)
        num_samples = eps.shape[1]
        many = {self.field: flat(rows[self.field], self.shape).repeat_interleave(num_samples, dim=0)}
        log_px = self.likelihood.log_prob(many[self.field], self.decoder(z.flatten(0, 1)).to(z.dtype))
        return log_px.view(-1, num_samples) + log_joint(z, self.clusters()).logsumexp(-1) - log_q


def check_enough(gate: Gate, num_rows: int, num_clusters: int) -> None:
    """Check that a start has a row for each cluster.

    Raises:
        ValueError: it has not.
    """
    if num_rows < num_clusters:
        raise ValueError(
            f"{type(gate).__name__}'s start has {num_rows} training rows (start_rows and the data decide) for "
            f"{num_clusters} clusters: give it a row for each at least, or set start to none"
        )
