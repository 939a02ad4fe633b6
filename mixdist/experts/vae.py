"""The variational autoencoder as an expert.

Shape letters: R rows, E experts (leading, only in a stack), D features, L latent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixdist.arguments import check_arguments
from mixdist.experts.expert import Expert
from mixdist.nets.centred import Around
from mixdist.nets.likelihood import Likelihood, LikelihoodName, MeanName, ScaleName, check_levels
from mixdist.nets.linear import Paths
from mixdist.nets.mlp import MLP, flat
from mixdist.nets.network import Network
from mixdist.nets.principal import LinearGaussian
from mixdist.stats import Warmup, check_steps, normal_kl, ramp
from mixdist.terms import Batch, ExpertTerms, Posterior, Spec, real_field


class VAE(Expert):
    """A variational autoencoder (Kingma and Welling 2014): a network makes its encoder and decoder.

    loss = -log p(x|z) + w beta sum_l max(KL_l, free_bits), with z = mu + sigma eps, KL_l = KL(q(z_l|x) || N(0, 1))
    analytic, and w rising from 0 to 1 over ``kl_warmup``, so that z is used before it costs. ``kl_R`` is the plain KL,
    so that ``log_px_R - kl_R`` is the ELBO whatever the training weights.

    With ``samples: S`` above 1 the bound is that of importance-weighted autoencoders (Burda et al. 2016, equation 8),
    which is tighter: loss = -log 1/S sum_s exp(log p(x|z_s) + w beta (log p(z_s) - log q(z_s|x))). ``log_px_R`` is then
    a mean over s.

    With ``MLP([128], "sigmoid")`` it is seed document 000's expert; with ``Conv([8, 16, 32, 64], kernel=4)`` and
    ``latent=8`` that of seed document 004, section 8.2, but for its batch normalisation. Parameters on 3x64x64: 7.0
    million with ``Conv([64, 128, 256, 512])`` and ``latent=160``, 0.29 million with ``Conv([16, 32, 64, 128])`` and
    ``latent=16``.

    Args:
        spec: the data set's fields.
        latent: dimensions of z.
        network: of encoder and decoder; unset, an MLP with one hidden layer of 128.
        likelihood: gaussian and laplace, densities; bernoulli, a mass over 0 and 1 (of grey values a cross-entropy);
            continuous_bernoulli, a density on [0, 1]; logistic, a mass over stored levels:
            :class:`mixdist.nets.likelihood.Likelihood`.
        scale: standard deviation (gaussian), Laplace or logistic scale: a number; learned, one for all; channel or
            pixel, learned for each channel, or for each number of a row; or decoder, which gives one for each number
            from z. Without effect on bernoulli and continuous_bernoulli.
        mean: sigmoid when x lies in [0, 1], identity otherwise; without effect on those two.
        beta: weight of the KL (Higgins et al. 2017).
        kl_warmup: training steps over which the KL's weight rises linearly from 0; or a :class:`mixdist.stats.Warmup`,
            as ``{epochs: 5}``, or ``{epochs: 20, cycles: 4, rise: 0.5}`` for a cyclical one; 0 for none.
        free_bits: least KL charged for each latent dimension of each row, nats (Kingma et al. 2016, without the mean
            over the batch, so that rows stay independent).
        field: which field it models.
        floor: the least scale: :class:`mixdist.nets.likelihood.Likelihood`; unset, 0.001 for channel, pixel and
            decoder, none for learned.
        first_scale: where a scale that is not fixed begins, in units of x; unset, about 1, for logistic 0.1. A small
            one makes reconstructions count from the start, so that z is used.
        components: of a mixture of logistics for each number, such as 10; needs logistic with scale decoder.
        samples: S, of z for each row; decoders cost as many times as much.

    Raises:
        ValueError: a field that is missing, holds classes or does not suit the network; no latent dimension or sample;
            free_bits beside several samples; a negative weight; a scale or floor that is not positive; logistic on
            numbers that are not stored as levels on [0, 1].

    Examples:
        >>> import torch
        >>> from mixdist.experts import VAE
        >>> from mixdist.nets import Conv
        >>> from mixdist.terms import Field
        >>> expert = VAE({"x": Field((1, 28, 28), torch.uint8, 1 / 255)}, latent=8, network=Conv([8, 16]))
        >>> expert({"x": torch.zeros(5, 1, 28, 28)}, torch.zeros(5, 8)).loss_R.shape
        torch.Size([5])
        >>> expert.sample(torch.zeros(3, 8)).shape
        torch.Size([3, 1, 28, 28])
    """

    def __init__(
        self,
        spec: Spec,
        latent: int = 10,
        network: Network | None = None,
        likelihood: LikelihoodName = "bernoulli",
        scale: float | ScaleName = "learned",
        mean: MeanName = "sigmoid",
        beta: float = 1.0,
        kl_warmup: int | Warmup = 0,
        free_bits: float = 0.0,
        field: str = "x",
        floor: float | None = None,
        first_scale: float | None = None,
        components: int = 1,
        samples: int = 1,
    ) -> None:
        check_arguments(VAE.__init__, locals(), "VAE's ")
        super().__init__()
        described = real_field(spec, field, "VAE")
        if latent < 1:
            raise ValueError(f"VAE's latent ({latent}) must be at least 1: give a number of dimensions")
        if samples < 1 or (samples > 1 and free_bits):
            raise ValueError(
                f"VAE's samples ({samples}) must be 1, or more where free_bits ({free_bits}) is 0: give 1 or 5, say"
            )
        check_steps("VAE's kl_warmup", kl_warmup)
        for name, value in (("beta", beta), ("free_bits", free_bits)):
            if not 0 <= value < math.inf:
                raise ValueError(f"VAE's {name} ({value}) must be a number from 0: give 0 or more")
        network = MLP([128]) if network is None else network
        self.field, self.fields, self.latent, self.samples = field, (field,), latent, samples
        self.noise_shape = (latent,)
        if samples > 1:
            self.noise_shape, self.latent_shape = (samples, latent), (latent,)
        self.shape, self.stackable = described.shape, network.stackable
        self.beta, self.kl_warmup, self.free_bits = beta, kl_warmup, free_bits
        num_levels = check_levels(described, field, "VAE") if likelihood == "logistic" else None
        made = Likelihood(likelihood, scale, mean, num_levels, floor, self.shape, first_scale, components)
        self.encoder = network.encoder(self.shape, 2 * latent)
        self.decoder, self.likelihood = network.decoder(latent, self.shape, made.num_maps), made
        if isinstance(self.decoder, Around) and (mean != "identity" or "bernoulli" in likelihood or components > 1):
            raise ValueError(
                f"VAE's network (Centred) adds its centre to means, which the likelihood {likelihood} with mean {mean} "
                f"and components {components} does not take as they are: take gaussian, mean identity, one component"
            )
        self.log_px_is, self.levels = self.likelihood.is_a, self.likelihood.levels
        self.kl_weight: Tensor
        self.register_buffer("kl_weight", torch.tensor(1.0), persistent=False)

    def anneal(self, step: int) -> None:
        self.kl_weight.fill_(ramp(step, self.kl_warmup))

    def check_linear(self) -> int:
        likelihood = self.likelihood
        if not (isinstance(self.encoder, Paths) and isinstance(self.decoder, Paths)):
            raise ValueError("VAE's network has no linear paths: take mixdist.nets.LinearPaths around it")
        if (likelihood.name, likelihood.mean_name) != ("gaussian", "identity"):
            raise ValueError(
                f"VAE's likelihood ({likelihood.name}) with mean {likelihood.mean_name} is no linear model: take "
                f"gaussian with mean identity"
            )
        if not isinstance(likelihood.scale, str):
            raise ValueError(
                f"VAE's scale ({likelihood.scale}) is fixed, and the linear model has its own: set it to learned, "
                f"channel, pixel or decoder"
            )
        return self.latent

    @torch.no_grad()
    def begin_linear(self, model: LinearGaussian, each: bool) -> None:
        self.check_linear()
        assert isinstance(self.encoder, Paths)
        assert isinstance(self.decoder, Paths)
        floor, (weight_DM, bias_M, log_var_M) = self.likelihood.floor or 0.0, model.encoder()
        inward_D2M = torch.cat([weight_DM, torch.zeros_like(weight_DM)], dim=1)
        self.encoder.set_linear(inward_D2M, torch.cat([bias_M, log_var_M]))
        scale_D = model.noise.sqrt().expand(len(model.mean_D))
        if each:  # a number that does not vary at all begins where its scale can still fall
            scale_D = model.value_noise().sqrt().clamp(min=2 * floor)
        raw_D = self.likelihood.set_scales(scale_D)
        weight_MD, bias_D = model.decoder()
        if self.likelihood.num_maps == 2:
            weight_MD, bias_D = torch.cat([weight_MD, torch.zeros_like(weight_MD)], dim=1), torch.cat([bias_D, raw_D])
        self.decoder.set_linear(weight_MD, bias_D)

    def encode(self, rows: Batch) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(z|x), each (R, L)."""
        x = flat(rows[self.field], self.shape)
        mean, log_var = self.encoder(x).to(x.dtype).chunk(2, dim=-1)  # networks may run in bfloat16, densities never
        return mean, log_var

    def forward(self, rows: Batch, eps: Tensor | None) -> ExpertTerms:
        assert eps is not None
        mean, log_var = self.encode(rows)
        kl_by_dimension = normal_kl(mean, log_var)
        weight = self.beta * self.kl_weight if self.training else self.beta
        if self.samples > 1:
            log_px_S, log_ratio_S = self._weigh(rows, mean, log_var, eps)
            bound = torch.logsumexp(log_px_S + weight * log_ratio_S, dim=-1) - math.log(self.samples)
            return ExpertTerms(-bound, log_px_S.mean(-1), kl_by_dimension.sum(-1))
        z = mean + torch.exp(0.5 * log_var) * eps
        x = flat(rows[self.field], self.shape)
        log_px = self.likelihood.log_prob(x, self.decoder(z).to(x.dtype))
        charged = kl_by_dimension.clamp(min=self.free_bits) if self.free_bits else kl_by_dimension
        return ExpertTerms(weight * charged.sum(-1) - log_px, log_px, kl_by_dimension.sum(-1))

    def posterior(self, rows: Batch) -> Posterior:
        mean, log_var = self.encode(rows)
        return Posterior(mean, normal_kl(mean, log_var))

    def log_weights(self, rows: Batch, eps: Tensor) -> Tensor:
        log_px_S, log_ratio_S = self._weigh(rows, *self.encode(rows), eps)
        return log_px_S + log_ratio_S

    def _weigh(self, rows: Batch, mean: Tensor, log_var: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(x|z) and log p(z) - log q(z|x) of each draw of z, (R, S) each, given eps (R, S, L)."""
        mean, log_var = mean.unsqueeze(-2), log_var.unsqueeze(-2)
        z = mean + torch.exp(0.5 * log_var) * eps
        # log N(z; 0, 1) - log N(z; mean, var), where the two constants cancel.
        log_ratio = 0.5 * (eps.square() - z.square() + log_var).sum(-1)
        x = flat(rows[self.field], self.shape).repeat_interleave(eps.shape[-2], dim=-2)
        log_px = self.likelihood.log_prob(x, self.decoder(z.flatten(-3, -2)).to(x.dtype))
        return log_px.unflatten(-1, eps.shape[-3:-1]), log_ratio

    def decode(self, z: Tensor) -> Tensor:
        """Return the mean of p(x|z), (R, *shape of x), for z (R, L)."""
        return self.likelihood.mean(self.decoder(z)).reshape(-1, *self.shape)

    def reconstruct(self, rows: Batch) -> Tensor:
        return self.decode(self.encode(rows)[0])

    def sample(self, eps: Tensor) -> Tensor:
        return self.decode(eps)

    def draw(self, eps: Tensor, uniform: Tensor) -> Tensor:
        output = self.decoder(eps).to(uniform.dtype)
        return self.likelihood.draw(output, flat(uniform, self.shape)).reshape(-1, *self.shape)
