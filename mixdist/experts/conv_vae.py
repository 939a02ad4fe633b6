"""The convolutional variational autoencoder as an expert. Shape letters: R rows, L latent, D = channels x pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from mixdist.experts.expert import real_field
from mixdist.experts.likelihood import LikelihoodName, MeanName
from mixdist.experts.vae import Autoencoder
from mixdist.nets.conv import ConvDecoder, ConvEncoder, NormName, image_shape
from mixdist.nets.mlp import ActivationName, flat
from mixdist.terms import Spec


class ConvVAE(Autoencoder):
    """A VAE of images of any size, with convolutional encoder and mirrored decoder; its loss is in ``Autoencoder``.

    Parameters on 3x64x64: 7.0 million with ``channels=[64, 128, 256, 512]`` and ``latent=160``, 0.29 million with
    ``channels=[16, 32, 64, 128]`` and ``latent=16``. Seed document 004, section 8.2, has ``channels=[8, 16, 32, 64]``,
    ``kernel=4`` and ``latent=8``, and batch normalisation, which is not here.

    Args:
        spec: the data set's fields.
        latent: dimensions of z.
        channels: of each level of the encoder, each of which halves both sides; the decoder has them in reverse.
        residual: adds a residual block to each level.
        norm: none or group (GroupNorm; rows stay independent).
        activation: of the hidden layers.
        likelihood: gaussian, laplace, bernoulli, or logistic (pixels stored as levels).
        scale: standard deviation (gaussian), Laplace or logistic scale, or "learned"; without effect on bernoulli.
        mean: sigmoid when x lies in [0, 1], identity otherwise; without effect on bernoulli.
        beta: weight of the KL (Higgins et al. 2017).
        kl_warmup: training steps over which the KL's weight rises linearly from 0; 0 for none.
        free_bits: least KL charged for each latent dimension of each row, nats (Kingma et al. 2016, without the mean
            over the batch, so that rows stay independent).
        field: which field it models.
        kernel: side of the kernels of both networks' levels, 3 to 5; residual blocks have 3.

    Raises:
        ValueError: a field that is missing, holds classes or no images (channels, height, width); images too small
            for so many levels; a width below 1; another kernel; a negative weight; logistic on numbers that are not
            stored as levels on [0, 1].
    """

    def __init__(
        self,
        spec: Spec,
        latent: int = 32,
        channels: Sequence[int] = (32, 64, 128),
        residual: bool = False,
        norm: NormName = "none",
        activation: ActivationName = "relu",
        likelihood: LikelihoodName = "bernoulli",
        scale: float | Literal["learned"] = "learned",
        mean: MeanName = "sigmoid",
        beta: float = 1.0,
        kl_warmup: int = 0,
        free_bits: float = 0.0,
        field: str = "x",
        kernel: int = 3,
    ) -> None:
        described = real_field(spec, field, "ConvVAE")
        image = image_shape(described.shape, "ConvVAE", field)
        if latent < 1:
            raise ValueError(f"ConvVAE's latent ({latent}) must be at least 1: give a number of dimensions")
        encoder = ConvEncoder(image, channels, 2 * latent, residual, norm, activation, kernel)
        decoder = ConvDecoder(latent, image, channels, residual, norm, activation, kernel)
        super().__init__(
            described, encoder, decoder, latent, likelihood, scale, mean, beta, kl_warmup, free_bits, field
        )

    def outputs(self, z: Tensor) -> Tensor:
        return flat(self.decoder(z))
