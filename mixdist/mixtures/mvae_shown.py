"""A mixture with one decoder in one process.

Shape letters: N rows, E components, L latent, H features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mixdist.experts import Component
from mixdist.mixtures.dirichlet import NUM_UNIFORM, log_weights
from mixdist.mixtures.given import Rowed, draws, whole_number
from mixdist.noise import Moment, Purpose
from mixdist.terms import Batch

if TYPE_CHECKING:
    from mixdist.mixtures.mvae import MVAE


class MVAEModel(Rowed):
    """What ``mixdist.load`` returns of a mixture with one decoder: all of it in one process, in evaluation mode.

    Rows are given as to :class:`mixdist.mixtures.Model`.

    Args:
        mixture: the mixture, its weights loaded.
    """

    def __init__(self, mixture: MVAE) -> None:
        super().__init__(mixture.spec, mixture.dtype)
        self.mixture = mixture
        self.components: dict[int, Component] = dict(mixture.bank.owned())  # type: ignore[arg-type]

    def _encoded(self, given: Tensor | np.ndarray | Batch) -> tuple[Batch, Tensor, Tensor]:
        """Return the rows, the means of q(z|x) (N, E, L), and a (N, E)."""
        named = self.rows(given)
        missing = [name for name in self.mixture.component.fields if name not in named]
        if missing:
            raise ValueError(f"the components need the field {missing[0]!r}: give rows as a dict of fields")
        found = [one.encode(named) for one in self.components.values()]
        return named, torch.stack([one[0] for one in found], 1), torch.stack([one[2] for one in found], 1)

    def _decoded(self, named: Batch, z_NEL: Tensor, weight_NE: Tensor) -> Tensor:
        features = [one.decode(z, named) for one, z in zip(self.components.values(), z_NEL.unbind(1), strict=True)]
        return self.mixture.decoder.decode(torch.einsum("ne,neh->nh", weight_NE, torch.stack(features, 1)))

    @torch.no_grad()
    def latents(self, rows: Tensor | np.ndarray | Batch) -> Tensor:
        """Return the means of q(z_i|x), (N, E, L)."""
        return self._encoded(rows)[1]

    @torch.no_grad()
    def weights(self, rows: Tensor | np.ndarray | Batch) -> Tensor:
        """Return the mean weights of the components, (N, E)."""
        return self.mixture.mean_weights(self._encoded(rows)[2])

    @torch.no_grad()
    def reconstruct(self, rows: Tensor | np.ndarray | Batch, expert: int | None = None) -> Tensor:
        """Reconstruct rows by all components at their mean weights, or by one alone: (N, *shape of x)."""
        named, mean, a = self._encoded(rows)
        weight = self.mixture.mean_weights(a)
        if expert is not None:
            weight = torch.zeros_like(weight)
            weight[:, self._number(expert)] = 1.0
        return self._decoded(named, mean, weight)

    @torch.no_grad()
    def cross(self, rows: Tensor | np.ndarray | Batch, encoder: int, decoder: int) -> Tensor:
        """Decode what one component encodes by another one's sub-decoder: (N, *shape of x) (figure 3)."""
        named, mean, _ = self._encoded(rows)
        feature = self.components[self._number(decoder)].decode(mean[:, self._number(encoder)], named)
        return self.mixture.decoder.decode(feature)

    @torch.no_grad()
    def interpolate(
        self, first: Tensor | np.ndarray | Batch, second: Tensor | np.ndarray | Batch, steps: int = 8, shift: int = 0
    ) -> Tensor:
        """Decode between pairs of rows, latents and weights alike: (steps, N, *shape of x) (equations 33 to 35).

        Args:
            first: rows, whose label counts where components have one.
            second: as many others.
            steps: how many, from the first to the second.
            shift: sub-decoder i reads the latents of encoder i + shift (equation 36).
        """
        if whole_number(steps) < 1:
            raise ValueError(f"steps ({steps!r}) must be a whole number from 1: give how many to decode")
        named, one, a = self._encoded(first)
        _, other, b = self._encoded(second)
        if len(one) != len(other):
            raise ValueError(f"{len(one)} first and {len(other)} second rows make no pairs: give as many of each")
        if isinstance(shift, bool) or not 0 <= whole_number(shift) < len(self.components):
            raise ValueError(f"shift ({shift!r}) must be a whole number from 0 to {len(self.components) - 1}: give one")
        one, other = (z.roll(-whole_number(shift), dims=1) for z in (one, other))
        pairs = self.mixture.mean_weights(a), self.mixture.mean_weights(b)
        ways = torch.linspace(0, 1, steps, dtype=one.dtype)
        return torch.stack([self._decoded(named, torch.lerp(one, other, t), torch.lerp(*pairs, t)) for t in ways])

    @torch.no_grad()
    def sample(self, num_samples: int, seed: int = 0, alike: bool = False, label: int | None = None) -> Tensor:
        """Draw z_i ~ N(0, I) and w ~ Dir(prior), and decode: (num_samples, *shape of x).

        Args:
            num_samples: how many.
            seed: of the draws.
            alike: the same z for all components (figure 17).
            label: the class, of components that read one.
        """
        num_samples, seed = draws(num_samples, seed)
        mixture, ids = self.mixture, torch.arange(num_samples)
        given, name = {"id": ids}, getattr(mixture.component, "label", None)
        if (name is None) != (label is None):
            told = (
                f"is needed, since components read {name!r}: give a class"
                if name
                else "is read by no component: drop it"
            )
            raise ValueError(f"label ({label!r}) {told}")
        if name is not None:
            num_classes = mixture.spec[name].num_classes or 0
            if isinstance(label, bool) or not 0 <= whole_number(label) < num_classes:
                raise ValueError(f"label ({label!r}) must be a class from 0 to {num_classes - 1}: give one")
            given[name] = torch.full((num_samples,), whole_number(label))
        experts, draw = list(range(mixture.num_experts)), Moment(seed).draw(Purpose.PRIOR)
        z_ENL = draw.normal(ids, [0] if alike else experts, mixture.component.noise_shape or (), self.dtype)
        z_NEL = z_ENL.expand(len(experts), -1, -1).transpose(0, 1)
        uniform = Moment(seed).draw(Purpose.MIXING).uniform(ids, experts, (NUM_UNIFORM,), self.dtype).transpose(0, 1)
        prior = torch.full((num_samples, len(experts)), mixture.prior, dtype=self.dtype)
        return self._decoded(given, z_NEL, mixture.mean_weights(log_weights(prior, uniform).exp()))

    def rows_of_samples(self, num_samples: int, seed: int = 0) -> dict[str, Tensor]:
        """Return samples of the mixture by a title: of each class where there is a label, else also with z alike."""
        if name := getattr(self.mixture.component, "label", None):
            classes = range(self.mixture.spec[name].num_classes or 0)
            return {f"class {c}": self.sample(num_samples, seed, label=c) for c in classes}
        return {"samples": self.sample(num_samples, seed), "z alike": self.sample(num_samples, seed, alike=True)}

    def _number(self, expert: int) -> int:
        if isinstance(expert, bool) or whole_number(expert) not in self.components:
            raise ValueError(f"component {expert!r} is not one of the model's: give 0 to {len(self.components) - 1}")
        return whole_number(expert)
