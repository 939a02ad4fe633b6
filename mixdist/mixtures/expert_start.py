"""How experts begin: the same weights on every layout, worked out of training rows on rank 0 and sent to all.

Shape letters: N rows, D numbers of a row, M latent dimensions, K clusters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import nn

from mixdist.arguments import check_fields
from mixdist.data import Samples
from mixdist.experts import Expert
from mixdist.mixtures.context import Context
from mixdist.nets.principal import LinearGaussian, Spectrum, of_rows
from mixdist.noise import Purpose, permutation, weights_seed
from mixdist.parallel.agreement import agreed, gather_json
from mixdist.parallel.collectives import OverBatch

CHUNK = 500
"""Rows that are read at once."""

AXES = 32
"""Principal coordinates that rows are clustered by, at most."""

STARTS = 10
"""Of k-means, of which the best is taken."""


class ExpertStart(ABC):
    """Base of starts: subclass it, and set the parameters of experts in ``start``.

    Examples:
        >>> import torch
        >>> from mixdist.mixtures import ExpertStart
        >>> class Zero(ExpertStart):
        ...     def start(self, context, over_batch, experts, dataset):
        ...         for expert in experts.values():
        ...             for parameter in expert.parameters():
        ...                 torch.nn.init.zeros_(parameter)
    """

    @abstractmethod
    def start(
        self, context: Context, over_batch: OverBatch, experts: Mapping[int, nn.Module], dataset: Samples
    ) -> None:
        """Set the first parameters of this rank's experts, in place; every rank calls it.

        Args:
            context: this rank's place, and the seed.
            over_batch: collectives.
            experts: by their numbers.
            dataset: training rows.

        Raises:
            Agreed: experts cannot begin so; the same message on every rank.
        """

    def prepare(self, expert: Expert) -> None:  # noqa: B027
        """Freeze what an expert keeps as it begins, by ``requires_grad_(False)``, before it has these weights.

        Called for every expert that is made: on any rank, in a run that goes on, to evaluate.

        Raises:
            ValueError: an expert has no such part.
        """

    def describe(self) -> dict[str, Any]:
        """Return, as JSON, what must be the same for a checkpoint to be resumed."""
        return {}

    def told(self, expert: nn.Module) -> str:
        """Return what a user is told of an expert before the first step, in words; may be empty."""
        return ""

    def start_shared(self, context: Context, shared: Mapping[str, nn.Module]) -> None:  # noqa: B027
        """Set the first parameters of modules that every rank has, such as the gate, in place; every rank calls it.

        Raises:
            Agreed: they cannot begin so; the same message on every rank.
        """

    def assign(
        self, context: Context, over_batch: OverBatch, expert: nn.Module, num_experts: int, dataset: Samples
    ) -> np.ndarray:
        """Return the expert that each training row begins with, (N,), the same on every rank; every rank calls it.

        Args:
            context: this rank's place, and the seed.
            over_batch: collectives.
            expert: one like those of the mixture, which may be changed.
            num_experts: K.
            dataset: training rows.

        Raises:
            Agreed: rows cannot be shared out so; the same message on every rank.
        """
        raise NotImplementedError(f"{type(self).__name__} assigns no rows")

    @property
    def assigns(self) -> bool:
        """Whether this class implements ``assign``."""
        return type(self).assign is not ExpertStart.assign


@dataclass(frozen=True)
class PCAStart(ExpertStart):
    """VAEs with linear paths begin as probabilistic PCA (Tipping and Bishop 1999) of the rows, or of a cluster of them.

    With :class:`mixdist.nets.LinearPaths`, a gaussian likelihood and mean identity, decoder mu + W z, q(z|x) and scale
    are those of :class:`mixdist.nets.principal.LinearGaussian`, whose posterior a VAE can express: with ``scales: one``
    the ELBO at step 0 is PPCA's exact density. PCA is exact, in float64 and one thread; its axes have fixed signs.

    Rank 0 reads the rows and holds them in float64: 8 N D bytes, and as many again for clusters.

    Args:
        rows: training rows that it is made from; of more, so many, chosen by the seed.
        clusters: one, all experts begin alike, from all rows; own, each begins from a cluster of its own, by keyed
            k-means on the first 32 principal coordinates of the rows.
        scales: one, all scales begin at PPCA's s; each, a scale begins at what W leaves of the variance of its numbers
            (:meth:`mixdist.nets.principal.LinearGaussian.value_noise`): the rows' mean ELBO is then at least PPCA's.

    Raises:
        ValueError: fewer than 2 rows.

    Examples:
        >>> from mixdist.mixtures import PCAStart
        >>> PCAStart(rows=7000, clusters="own").scales
        'one'
    """

    rows: int = 10_000
    clusters: Literal["one", "own"] = "one"
    scales: Literal["one", "each"] = "one"

    def __post_init__(self) -> None:
        check_fields(self, "mixture.expert_start.")
        if self.rows < 2:
            raise ValueError(f"mixture.expert_start.rows ({self.rows}) must be at least 2: give more")

    @torch.no_grad()
    def start(
        self, context: Context, over_batch: OverBatch, experts: Mapping[int, nn.Module], dataset: Samples
    ) -> None:
        mesh, num_rows = context.mesh, min(self.rows, len(dataset))
        own = agreed(lambda: {e: self._asked(context, e, one, num_rows) for e, one in experts.items()}, mesh.world)
        asked = {int(e): found for part in gather_json(own, mesh.world) for e, found in part.items()}
        asked = dict(sorted(asked.items()))  # what replicas say twice is the same
        fields, latents = list(dict.fromkeys(field for field, _ in asked.values())), [m for _, m in asked.values()]
        if len(fields) > 1:
            agreed(lambda: _refuse(f"experts model other fields ({', '.join(fields)}): give them one"), mesh.world)
        # Its experts may be on other ranks, so rank 0 works out all.
        models = agreed(lambda: self._models(context, dataset, fields[0], latents) if not mesh.rank else [], mesh.world)
        size, each = context.spec[fields[0]].num_values, self.scales == "each"
        alike = [[e for e, one in enumerate(latents) if one == latent] for latent in dict.fromkeys(latents)]
        for members in alike if self.clusters == "one" else [[e] for e in asked]:
            model = models[members[0]] if models else LinearGaussian.empty(size, latents[members[0]])
            model = LinearGaussian(*(one.to(mesh.device) for one in model))
            over_batch.copy_first(model)
            agreed(partial(_begin, {e: experts[e] for e in members if e in experts}, model, each), mesh.world)

    def _asked(self, context: Context, e: int, expert: nn.Module, num_rows: int) -> tuple[str, int]:
        """Return the field that an expert models, and its latent dimensions."""
        assert isinstance(expert, Expert)
        try:
            latent = expert.check_linear()
        except ValueError as error:
            _refuse(f"expert {e}: {error}")
        field = str(getattr(expert, "field", "x"))
        size = context.spec[field].num_values
        for limit, what in ((num_rows, "its rows"), (size, "numbers in a row")):
            if latent >= limit:
                _refuse(f"expert {e}: latent ({latent}) must be below the number of {what} ({limit}): give fewer")
        return field, latent

    def _models(self, context: Context, dataset: Samples, field: str, latents: list[int]) -> list[LinearGaussian]:
        """Return what each expert begins as."""
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1):  # sums are split otherwise on other numbers of threads
            x_ND = self._read(context, dataset, field)
            if self.clusters == "one":
                return _models_of(x_ND, latents, "the rows")
            cluster_N = _clustered(x_ND, len(latents), weights_seed(context.seed, Purpose.START, 2) % 2**32)
            parts = [x_ND[cluster_N == e] for e in range(len(latents))]
            del x_ND
            return [
                _models_of(part, [latent], f"the {len(part)} rows of cluster {e}")[0]
                for e, (part, latent) in enumerate(zip(parts, latents, strict=True))
            ]

    def _read(self, context: Context, dataset: Samples, field: str) -> np.ndarray:
        size, described = len(dataset), context.spec[field]
        positions = torch.arange(size)
        if size > self.rows:
            chosen = permutation(context.seed, 0, 1, size, purpose=Purpose.START)[: self.rows]
            positions = chosen.sort().values
        x_ND = np.empty((len(positions), described.num_values))
        for start in range(0, len(positions), CHUNK):
            stored = dataset.take(positions[start : start + CHUNK], fields=(field,))[field]
            x_ND[start : start + CHUNK] = described.values(stored, torch.float64).reshape(len(stored), -1).numpy()
        if not np.isfinite(x_ND).all():
            _refuse(f"the field {field!r} holds numbers that are not finite: fix or remove those rows")
        return x_ND


def _refuse(why: str) -> NoReturn:
    raise ValueError(f"mixture.expert_start (PCAStart): {why}")


def _begin(experts: Mapping[int, nn.Module], model: LinearGaussian, each: bool) -> None:
    for e, expert in experts.items():
        assert isinstance(expert, Expert)
        try:
            expert.begin_linear(model, each)
        except ValueError as error:
            _refuse(f"expert {e}: {error}")


def _models_of(x_ND: np.ndarray, latents: list[int], what: str) -> list[LinearGaussian]:
    """Return PPCA of rows, which are centred in place, for each number of dimensions.

    Raises:
        ValueError: too few rows for so many dimensions, or nothing is left for the noise.
    """
    most = max(latents)
    if most >= len(x_ND):
        _refuse(f"latent ({most}) must be below the number of {what}: lower it, or set clusters to one")
    spectrum = _spectrum(x_ND, most)
    made = {}
    for latent in dict.fromkeys(latents):
        if spectrum.noise(latent) <= spectrum.least_noise:
            _refuse(f"latent ({latent}) leaves no noise in {what}, which lie in so many dimensions: lower it")
        made[latent] = LinearGaussian.of(spectrum, latent)
    return [made[latent] for latent in latents]


def _spectrum(x_ND: np.ndarray, num_components: int) -> Spectrum:
    mean_D = x_ND.mean(0)
    x_ND -= mean_D
    return of_rows(x_ND, mean_D, num_components)


def _clustered(x_ND: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """Return each row's cluster, (N,), by k-means on the first principal coordinates; the rows stay as they are."""
    from sklearn.cluster import KMeans

    if num_clusters > len(x_ND):
        _refuse(f"{num_clusters} experts cannot each have a cluster of {len(x_ND)} rows: give more rows")
    centred_ND = x_ND.copy()
    found = _spectrum(centred_ND, min(AXES, *x_ND.shape))
    cluster_N: np.ndarray = KMeans(num_clusters, n_init=STARTS, random_state=seed).fit_predict(
        centred_ND @ found.directions_DM
    )
    return cluster_N
