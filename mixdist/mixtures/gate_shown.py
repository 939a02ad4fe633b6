"""What a gate that is a model is shown by: its clusters' rows, reconstructions and samples, and its latents.

Shape letters: n rows shown, L latent, S samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mixdist.data import Samples
from mixdist.gates import Gate
from mixdist.mixtures.figures import ExpertEvaluation, class_names
from mixdist.mixtures.pictures import Latents, Panel, Panels, Picture, Plane
from mixdist.mixtures.samples import DRAWN_AT_ONCE, apportioned
from mixdist.noise import Moment, Purpose
from mixdist.terms import Spec

if TYPE_CHECKING:
    from mixdist.mixtures.ensemble import Ensemble

NUM_LATENTS, NUM_IMAGES, NUM_POINTS = 2000, 8, 300
"""Rows whose latents are shown; samples of a cluster that are: images, points in the plane."""


def drawn_of_cluster(
    gate: Gate, cluster: int, ids: Tensor, at: Moment, of: int, spec: Spec, dtype: torch.dtype, observed: bool = False
) -> Tensor:
    """Draw a cluster's samples of the given numbers, each a function of (seed, phase, its number, cluster) alone.

    Args:
        gate: a model of rows.
        cluster: its number.
        ids: the samples' numbers, (S,).
        at: names the draws; its step is not used.
        of: how many clusters there are. Draws are those of an expert ``of + cluster``, of which there is none.
        spec: of the data.
        dtype: of the samples.
        observed: draw from p(x|z), where there are latents; otherwise the means of p(x|z).

    Returns:
        (S, *shape of x).
    """
    at, clusters = Moment(at.seed, at.phase), torch.full_like(ids, cluster)
    eps = at.draw(Purpose.PRIOR).normal(ids, [of + cluster], (gate.num_drawn,), dtype)[0]
    if not observed:
        return gate.sample(clusters, eps)
    shape = spec[getattr(gate, "field", "x")].shape
    return gate.draw(clusters, eps, at.draw(Purpose.OBSERVATION).uniform(ids, [of + cluster], shape, dtype)[0])


@torch.no_grad()
def drawn_of_gate(gate: Gate, num_samples: int, at: Moment, spec: Spec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Draw S samples x ~ p(x) of a gate that is a model, S pi_k of each cluster, rounded as ``apportioned`` has it.

    Returns:
        how many of each cluster (K,), and the samples (S, *shape of x), in the order of clusters.
    """
    device, training = next(gate.parameters()).device, gate.training
    counts_K = apportioned(gate.log_pi().double().exp().cpu().numpy(), num_samples)
    gate.eval()
    drawn = [
        drawn_of_cluster(gate, cluster, ids, at, len(counts_K), spec, dtype, observed=True)
        for cluster, count in enumerate(counts_K.tolist())
        for ids in torch.arange(count, device=device).split(DRAWN_AT_ONCE)
    ]
    gate.train(training)
    return torch.from_numpy(counts_K), torch.cat(drawn)


@torch.no_grad()
def gate_pictures(
    mixture: Ensemble, gate: Gate, dataset: Samples, evaluation: ExpertEvaluation, seed: int
) -> list[Picture]:
    """Return a picture of the gate's clusters and one of its latents, where it has some; called on rank 0 alone."""
    if not gate.can("sample"):
        return []
    gate.eval()
    clusters = _clusters(mixture, gate, dataset, evaluation, seed)
    latents = [] if gate.latent is None else [_latents(mixture, gate, dataset, evaluation, seed)]
    gate.train()
    return [*([clusters] if clusters else []), *latents]


def _clusters(
    mixture: Ensemble, gate: Gate, dataset: Samples, evaluation: ExpertEvaluation, seed: int
) -> Picture | None:
    field, experts = getattr(gate, "field", "x"), range(mixture.num_experts)
    shape = dataset.spec[field].shape
    image, plane = len(shape) == 3 and shape[0] in (1, 3), shape == (2,)
    if not image and not plane:
        return None
    num, at = NUM_IMAGES if image else NUM_POINTS, Moment(seed)
    ids, of = torch.arange(num, device=mixture.context.mesh.device), mixture.num_experts
    observed = plane and gate.can("draw")  # a cloud of means in the plane is no density
    samples = [
        drawn_of_cluster(gate, e, ids, at, of, mixture.spec, mixture.dtype, observed).float().cpu().numpy()
        for e in experts
    ]
    if plane:
        points = _values(mixture, dataset, field, torch.arange(len(dataset))).cpu().numpy()
        return Plane("gate.png", points, evaluation.expert_N, samples, "cluster")
    panels = []
    for e in experts:
        rows = _values(mixture, dataset, field, torch.tensor(evaluation.first(e), dtype=torch.int64))
        made = (
            gate.reconstruct({field: rows}).float().cpu().numpy() if gate.can("reconstruct") else rows[:0].cpu().numpy()
        )
        panels.append(Panel(e, _title(e, dataset, evaluation), rows.float().cpu().numpy(), made, samples[e]))
    return Panels("gate.png", panels)


def _title(e: int, dataset: Samples, evaluation: ExpertEvaluation) -> str:
    rows, took = int(evaluation.rows_E[e]), ""
    if evaluation.counts_EC is not None and rows:
        took = f"mostly {class_names(dataset)[int(evaluation.counts_EC[e].argmax())]}, "
    return f"cluster {e}: {took}{rows} rows"


def _values(mixture: Ensemble, dataset: Samples, field: str, positions: Tensor) -> Tensor:
    stored = dataset.take(positions, fields=(field,))[field].to(mixture.context.mesh.device)
    return dataset.spec[field].values(stored, mixture.dtype)


def _latents(mixture: Ensemble, gate: Gate, dataset: Samples, evaluation: ExpertEvaluation, seed: int) -> Picture:
    """Return the means of q(z|x) of the first rows in the plane: as they are, or by t-SNE where L is not 2."""
    field, positions = getattr(gate, "field", "x"), torch.arange(min(len(dataset), NUM_LATENTS))
    points_nL = gate.embed({field: _values(mixture, dataset, field, positions)}).double().cpu().numpy()
    expert_n = evaluation.expert_N[: len(positions)]
    groups = [("by cluster", expert_n, [f"cluster {e}" for e in range(mixture.num_experts)])]
    if dataset.label:
        label_n = dataset.take(positions, fields=(dataset.label,))[dataset.label].long().numpy()
        groups.append((f"by {dataset.label}", label_n, class_names(dataset)))
    return Latents("latent.png", in_the_plane(points_nL, seed), groups)


def in_the_plane(points_nL: np.ndarray, seed: int) -> np.ndarray:
    """Return points in the plane, (n, 2): two dimensions as they are, one beside zeros, more by t-SNE.

    So are points that all lie in one place or are not finite: t-SNE cannot part them.

    t-SNE (van der Maaten and Hinton 2008) is scikit-learn's, from principal components, with perplexity 30 or, of fewer
    than 90 points, a third of them.
    """
    num, size = points_nL.shape
    if size <= 2 or num < 4 or not np.isfinite(points_nL).all() or not np.ptp(points_nL, axis=0).any():
        return np.pad(points_nL, ((0, 0), (0, max(0, 2 - size))))[:, :2]
    from sklearn.manifold import TSNE

    shown: np.ndarray = TSNE(perplexity=min(30.0, num / 3), init="pca", random_state=seed % 2**32).fit_transform(
        points_nL
    )
    return shown
