"""Which expert each row begins with, from clusters of rows or of what a model makes of them: the same on every layout.

Shape letters: N rows, L numbers of a point, K clusters (as many as experts).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from mixdist.arguments import check_fields
from mixdist.data import Samples
from mixdist.gates.gaussians import ClusterName, Clusters, fit_clusters, log_joint
from mixdist.mixtures.context import Context
from mixdist.mixtures.expert_start import ExpertStart
from mixdist.mixtures.row_pass import chosen, gathered
from mixdist.nets.centred import Around
from mixdist.noise import Purpose, weights_seed
from mixdist.parallel.agreement import agreed, gather_json
from mixdist.parallel.collectives import OverBatch
from mixdist.terms import Batch


@dataclass(frozen=True)
class ClusterStart(ExpertStart):
    """Experts begin as drawn; a competition's first table, with ``start: clusters``, is of clusters of the rows.

    Where their network is :class:`mixdist.nets.Centred`, its centre is the mean of the expert's cluster.

    K-means++ starts on rank 0, in float64 and one thread; each row then goes to its most probable cluster, so that the
    first table is the same bits on every layout.

    Args:
        clusters: kmeans, each row to the nearest centre; or mixture, to the most probable component of a diagonal
            mixture of Gaussians (EM).
        rows: training rows that clusters are fitted to; of more, so many, chosen by the seed. All rows are assigned.
        field: what of a row is clustered.

    Raises:
        ValueError: no rows.

    Examples:
        >>> from mixdist.competition import Competition, Elbo
        >>> from mixdist.experts import VAE
        >>> from mixdist.mixtures import ClusterStart
        >>> Competition(VAE, 5, expert_start=ClusterStart(), start="clusters", score=Elbo()).rules.start
        'clusters'
    """

    clusters: ClusterName = "kmeans"
    rows: int = 20_000
    field: str = "x"

    def __post_init__(self) -> None:
        check_fields(self, "mixture.expert_start.")
        if self.rows < 1:
            raise ValueError(f"mixture.expert_start.rows ({self.rows}) must be at least 1: give more")

    def start(
        self, context: Context, over_batch: OverBatch, experts: Mapping[int, nn.Module], dataset: Samples
    ) -> None:
        found = {e: [one for one in expert.modules() if isinstance(one, Around)] for e, expert in experts.items()}
        if not any(gather_json(any(found.values()), context.mesh.world)):
            return
        clusters = self._clusters(context, over_batch, context.mesh.placement.num_experts, dataset)

        def begin() -> None:
            for e, centres in found.items():
                for one in centres:
                    try:
                        one.set(clusters.mean_KL[e])
                    except ValueError as error:
                        raise ValueError(f"mixture.expert_start.field ({self.field}), expert {e}: {error}") from None

        agreed(begin, context.mesh.world)

    @torch.no_grad()
    def assign(
        self, context: Context, over_batch: OverBatch, expert: nn.Module, num_experts: int, dataset: Samples
    ) -> np.ndarray:
        clusters = self._clusters(context, over_batch, num_experts, dataset)
        return nearest(context, over_batch, dataset, (self.field,), self._points, clusters)

    def _points(self, rows: Batch) -> Tensor:
        return rows[self.field].double().flatten(1)

    def _clusters(self, context: Context, over_batch: OverBatch, num_clusters: int, dataset: Samples) -> Clusters:
        field = self.field

        def check() -> None:
            if field not in context.spec or context.spec[field].num_classes:
                raise ValueError(
                    f"mixture.expert_start.field ({field}) must be a field of real numbers of the rows, which have "
                    f"{', '.join(context.spec)}: name one"
                )

        agreed(check, context.mesh.world)
        fit = partial(self._fit, num_clusters=num_clusters)
        return clusters_of(context, over_batch, dataset, (field,), self._points, fit, num_clusters, self.rows)

    def _fit(self, points_NL: Tensor, seed: int, num_clusters: int) -> Clusters:
        try:
            return fit_clusters(points_NL, num_clusters, seed, self.clusters)
        except ValueError as error:
            raise ValueError(f"mixture.expert_start (ClusterStart): {error}") from None


def clusters_of(
    context: Context,
    over_batch: OverBatch,
    dataset: Samples,
    fields: Sequence[str],
    point_of: Callable[[Batch], Tensor],
    fit: Callable[[Tensor, int], Clusters],
    num_clusters: int,
    limit: int,
) -> Clusters:
    """Return clusters of the rows, the same on every rank; every rank calls it.

    Args:
        context: this rank's place, and the seed.
        over_batch: collectives.
        dataset: training rows.
        fields: of a row that are read.
        point_of: gives rows' points, (N, L).
        fit: fits K clusters to points, given a seed; on rank 0 alone: closed forms may round otherwise on another
            processor.
        num_clusters: K.
        limit: rows that clusters are fitted to; of more, so many, chosen by the seed.

    Raises:
        Agreed: rows cannot be read or clustered; the same message on every rank.
    """
    mesh, picked = context.mesh, chosen(context.seed, 0, len(dataset), limit)
    points_NL = gathered(context, over_batch, dataset, fields, picked, point_of)
    seed = weights_seed(context.seed, Purpose.START, 3)
    zeros_KL = torch.zeros(num_clusters, points_NL.shape[1], dtype=torch.float64)
    empty = Clusters(zeros_KL[:, 0].clone(), zeros_KL, zeros_KL.clone())
    found = agreed(lambda: fit(points_NL, seed) if mesh.rank == 0 else empty, mesh.world)
    clusters = Clusters(*(one.to(mesh.device) for one in found))
    over_batch.copy_first(clusters)
    return clusters


def nearest(
    context: Context,
    over_batch: OverBatch,
    dataset: Samples,
    fields: Sequence[str],
    point_of: Callable[[Batch], Tensor],
    clusters: Clusters,
) -> np.ndarray:
    """Return the most probable cluster of each row, (N,), on every rank; arguments as for ``clusters_of``."""

    def of(rows: Batch) -> Tensor:
        return log_joint(point_of(rows).double(), clusters).argmax(-1)

    every = torch.arange(len(dataset))
    cluster_N: np.ndarray = gathered(context, over_batch, dataset, fields, every, of).cpu().numpy()
    return cluster_N
