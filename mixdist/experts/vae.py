"""The variational autoencoder as an expert: what all kinds share, and the one of MLPs.

Shape letters: R rows, E experts (leading, only in a stack), D features, L latent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mixdist.experts.expert import Expert, real_field
from mixdist.experts.likelihood import Likelihood, LikelihoodName, MeanName, check_levels
from mixdist.nets.mlp import MLP, ActivationName, flat
from mixdist.stats import normal_kl
from mixdist.terms import Batch, ExpertTerms, Field, Spec


class Autoencoder(Expert):
    """What every VAE is, whatever its two networks (Kingma and Welling 2014).

    loss = -log p(x|z) + w beta sum_l max(KL_l, free_bits), with z = mu + sigma eps, KL_l = KL(q(z_l|x) || N(0, 1))
    analytic, and w rising from 0 to 1 over ``kl_warmup`` training steps. ``kl_R`` is the plain KL, so that
    ``log_px_R - kl_R`` is the ELBO whatever the training weights.

    A kind makes its networks and hands them in, encoder first: ``encoder`` gives mean and log variance (R, 2 L) for
    flat rows (R, D), ``decoder`` the likelihood's outputs for z (R, L), of any shape with D numbers a row.

    Args:
        described: the field, as :func:`mixdist.experts.expert.real_field` gives it.
        encoder: q(z|x).
        decoder: p(x|z).
        latent: L.
        likelihood, scale, mean: as in :class:`mixdist.experts.likelihood.Likelihood`.
        beta, kl_warmup, free_bits, field: as in :class:`VAE`.

    Raises:
        ValueError: a negative weight; a likelihood that does not fit the field.
    """

    def __init__(
        self,
        described: Field,
        encoder: nn.Module,
        decoder: nn.Module,
        latent: int,
        likelihood: LikelihoodName,
        scale: float | Literal["learned"],
        mean: MeanName,
        beta: float,
        kl_warmup: int,
        free_bits: float,
        field: str,
    ) -> None:
        super().__init__()
        kind = type(self).__name__
        for name, value in (("beta", beta), ("kl_warmup", kl_warmup), ("free_bits", free_bits)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{kind}'s {name} ({value}) must be a number from 0: give 0 or more")
        self.field, self.fields, self.noise_shape = field, (field,), (latent,)
        self.shape, self.beta, self.kl_warmup, self.free_bits = described.shape, beta, kl_warmup, free_bits
        self.encoder, self.decoder = encoder, decoder
        num_levels = check_levels(described, field, kind) if likelihood == "logistic" else None
        self.likelihood = Likelihood(likelihood, scale, mean, num_levels)
        self.kl_weight: Tensor
        self.register_buffer("kl_weight", torch.tensor(1.0), persistent=False)

    def anneal(self, step: int) -> None:
        self.kl_weight.fill_(min(1.0, step / self.kl_warmup) if self.kl_warmup else 1.0)

    def encode(self, rows: Batch) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(z|x), each (R, L)."""
        x = flat(rows[self.field], self.shape)
        mean, log_var = self.encoder(x).to(x.dtype).chunk(2, dim=-1)  # networks may run in bfloat16, densities never
        return mean, log_var

    def outputs(self, z: Tensor) -> Tensor:
        """Return what the likelihood reads, (R, D), for z (R, L); with a stack's leading axis where the kind stacks."""
        return self.decoder(z)

    def forward(self, rows: Batch, eps: Tensor | None) -> ExpertTerms:
        assert eps is not None
        mean, log_var = self.encode(rows)
        z = mean + torch.exp(0.5 * log_var) * eps
        x = flat(rows[self.field], self.shape)
        log_px = self.likelihood.log_prob(x, self.outputs(z).to(x.dtype))
        kl_by_dimension = normal_kl(mean, log_var)
        charged = kl_by_dimension.clamp(min=self.free_bits) if self.free_bits else kl_by_dimension
        weight = self.beta * self.kl_weight if self.training else self.beta
        return ExpertTerms(weight * charged.sum(-1) - log_px, log_px, kl_by_dimension.sum(-1))

    def log_weights(self, rows: Batch, eps: Tensor) -> Tensor:
        mean, log_var = self.encode(rows)
        z = mean[:, None] + torch.exp(0.5 * log_var)[:, None] * eps
        # log N(z; 0, 1) - log N(z; mean, var), where the two constants cancel.
        log_ratio = 0.5 * (eps.square() - z.square() + log_var[:, None]).sum(-1)
        num_samples = eps.shape[1]
        x = flat(rows[self.field], self.shape).repeat_interleave(num_samples, dim=0)
        log_px = self.likelihood.log_prob(x, self.outputs(z.flatten(0, 1)).to(x.dtype))
        return log_px.view(-1, num_samples) + log_ratio

    def decode(self, z: Tensor) -> Tensor:
        """Return the mean of p(x|z), (R, *shape of x), for z (R, L)."""
        return self.likelihood.mean(self.outputs(z)).reshape(-1, *self.shape)

    def reconstruct(self, rows: Batch) -> Tensor:
        return self.decode(self.encode(rows)[0])

    def sample(self, eps: Tensor) -> Tensor:
        return self.decode(eps)

    def draw(self, eps: Tensor, uniform: Tensor) -> Tensor:
        output = self.outputs(eps).to(uniform.dtype)
        return self.likelihood.draw(output, flat(uniform, self.shape)).reshape(-1, *self.shape)


class VAE(Autoencoder):
    """A VAE with MLP encoder and decoder; seed document 000's expert. Its loss is in :class:`Autoencoder`.

    Args:
        spec: the data set's fields.
        latent: dimensions of z.
        hidden: widths of the encoder's hidden layers; the decoder has them in reverse.
        activation: of the hidden layers.
        likelihood: gaussian, laplace, bernoulli, or logistic (pixels stored as levels).
        scale: standard deviation (gaussian), Laplace or logistic scale, or "learned"; without effect on bernoulli.
        mean: sigmoid when x lies in [0, 1], identity otherwise; without effect on bernoulli.
        beta: weight of the KL (Higgins et al. 2017).
        kl_warmup: training steps over which the KL's weight rises linearly from 0; 0 for none.
        free_bits: least KL charged for each latent dimension of each row, nats (Kingma et al. 2016, without the mean
            over the batch, so that rows stay independent).
        field: which field it models.

    Raises:
        ValueError: a field that is missing or holds classes; a width below 1; a negative weight; logistic on numbers
            that are not stored as levels on [0, 1].
    """

    stackable = True

    def __init__(
        self,
        spec: Spec,
        latent: int = 10,
        hidden: Sequence[int] = (128,),
        activation: ActivationName = "relu",
        likelihood: LikelihoodName = "bernoulli",
        scale: float | Literal["learned"] = "learned",
        mean: MeanName = "sigmoid",
        beta: float = 1.0,
        kl_warmup: int = 0,
        free_bits: float = 0.0,
        field: str = "x",
    ) -> None:
        described = real_field(spec, field, "VAE")
        encoder = MLP([described.num_values, *hidden, 2 * latent], activation)
        decoder = MLP([latent, *reversed(hidden), described.num_values], activation)
        super().__init__(
            described, encoder, decoder, latent, likelihood, scale, mean, beta, kl_warmup, free_bits, field
        )
