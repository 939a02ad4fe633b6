"""A component of a mixture with one decoder: an encoder and a sub-decoder of one layer.

Shape letters: R rows, E experts (leading, only in a stack), D numbers of a row, L latent, H features, C classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mixdist.arguments import check_arguments
from mixdist.experts.expert import Expert
from mixdist.nets.mlp import ACTIVATIONS, MLP, ActivationName, Affine, flat
from mixdist.nets.network import Network
from mixdist.stats import normal_kl
from mixdist.terms import Batch, ExpertTerms, Posterior, Spec, label_classes, real_field

LEAST_SIGMA, LEAST_WEIGHT = 1e-6, 0.01
"""Added to sigma and to a after their softplus, as the authors of seed document 002 do."""


class Component(Expert):
    """q(z_i|x) = N(mu, sigma^2), a Dirichlet parameter a_i(x) > 0, and the feature s_i = f(W z_i + b).

    Seed document 002, section III-A, equations 2 to 4 and 25: for :class:`mixdist.mixtures.MVAE`, whose shared decoder
    reads the weighted sum of the features. ``loss_R`` is KL(q(z_i|x) || N(0, I)), nats; ``features`` are a_R,
    z_RL, mean_RL, log_var_RL and feature_RH.

    Args:
        spec: the data set's fields.
        latent: L.
        features: H, of the sub-decoder.
        network: of the encoder; unset, an MLP with two hidden layers of 500.
        activation: f.
        label: a class that joins the inputs of encoder and sub-decoder (section V-C), as a one-hot number each; before
            a convolutional encoder as a map each, of ones or zeros. Unset, none.
        field: which field it models.

    Raises:
        ValueError: a field or label that does not suit; no latent dimension or feature.

    Examples:
        >>> import torch
        >>> from mixdist.experts import Component
        >>> from mixdist.terms import Field
        >>> component = Component({"x": Field((1, 8, 8), torch.float32)}, latent=3, features=16)
        >>> component({"x": torch.zeros(5, 1, 8, 8)}, torch.zeros(5, 3)).features["feature_RH"].shape
        torch.Size([5, 16])
    """

    def __init__(
        self,
        spec: Spec,
        latent: int = 50,
        features: int = 500,
        network: Network | None = None,
        activation: ActivationName = "tanh",
        label: str | None = None,
        field: str = "x",
    ) -> None:
        check_arguments(Component.__init__, locals(), "Component's ")
        super().__init__()
        described = real_field(spec, field, "Component")
        for name, value in (("latent", latent), ("features", features)):
            if value < 1:
                raise ValueError(f"Component's {name} ({value}) must be at least 1: give a number of dimensions")
        self.num_classes = 0 if label is None else label_classes(spec, label, "Component")
        network = MLP([500, 500], "elu") if network is None else network
        self.field, self.label, self.shape = field, label, described.shape
        self.fields = (field,) if label is None else (field, label)
        self.noise_shape, self.latent, self.num_features = (latent,), latent, features
        self.stackable = network.stackable and label is None
        # An image gets a map for each class, which a convolution can read anywhere; flat rows a number.
        shape, self.places = described.shape, 1
        if label is not None:
            first, *sides = (described.num_values,) if network.stackable else shape
            shape, self.places = (first + self.num_classes, *sides), math.prod(sides)
        self.encoder = network.encoder(shape, 2 * latent + 1)
        self.sub_decoder = Affine(latent + self.num_classes, features)
        self.activation = ACTIVATIONS[activation]()

    def encode(self, rows: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean and log variance of q(z|x), each (R, L), and a, (R,)."""
        x = self._with_label(flat(rows[self.field], self.shape), rows, self.places)
        mean, raw, weight = self.encoder(x).to(x.dtype).split([self.latent, self.latent, 1], dim=-1)
        log_var = 2.0 * torch.log(F.softplus(raw) + LEAST_SIGMA)
        return mean, log_var, F.softplus(weight[..., 0]) + LEAST_WEIGHT

    def decode(self, z: Tensor, rows: Batch) -> Tensor:
        """Return the feature of z, (R, H)."""
        feature: Tensor = self.activation(self.sub_decoder(self._with_label(z, rows)))
        return feature

    def _with_label(self, x: Tensor, rows: Batch, places: int = 1) -> Tensor:
        """Return flat rows with the one-hot label after them, each of its numbers at as many places."""
        if self.label is None:
            return x
        one_hot = F.one_hot(rows[self.label].long(), self.num_classes).to(x.dtype)
        return torch.cat([x, one_hot.repeat_interleave(places, dim=-1)], dim=-1)

    def forward(self, rows: Batch, eps: Tensor | None) -> ExpertTerms:
        assert eps is not None
        mean, log_var, a = self.encode(rows)
        z = mean + torch.exp(0.5 * log_var) * eps
        told = {"a_R": a, "z_RL": z, "mean_RL": mean, "log_var_RL": log_var, "feature_RH": self.decode(z, rows)}
        return ExpertTerms(normal_kl(mean, log_var).sum(-1), features=told)

    def posterior(self, rows: Batch) -> Posterior:
        mean, log_var, _ = self.encode(rows)
        return Posterior(mean, normal_kl(mean, log_var))
