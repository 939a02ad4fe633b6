"""Evaluation of any mixture on held-out rows: every row once, sums over ranks in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from mixdist.data import Loader, Samples
from mixdist.evaluation.probes import Probing, probed
from mixdist.messages import within
from mixdist.mixtures import Evaluation, Mixture, Request, Study
from mixdist.mixtures.inspection import inspect
from mixdist.mixtures.probe import shown
from mixdist.noise import EVALUATION_PHASE, TRIAL_PHASE, Moment
from mixdist.parallel.agreement import gather_bytes
from mixdist.parallel.mesh import Mesh


def evaluate(
    mixture: Mixture,
    dataset: Samples,
    batch_size: int,
    seed: int,
    num_samples: int | None = None,
    shares_from: Samples | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    probing: Probing = Probing(),  # noqa: B008 (a tuple)
    judges_from: Samples | None = None,
) -> Evaluation:
    """Evaluate on every row of a data set once; every rank calls it.

    Noise is keyed by row in a phase of its own, so the result is the same on any layout. Which figures there are is the
    family's choice (:meth:`mixdist.mixtures.Mixture.study`).

    Args:
        mixture: the mixture.
        dataset: held-out rows.
        batch_size: of the global batch.
        seed: of the run.
        num_samples: importance samples for each row and expert; None for no likelihoods.
        shares_from: rows that the mixture's weights are taken from, the training rows; None for ``dataset`` itself.
        on_batch: called with the number of batches done and of all.
        probing: classifiers of latents, fitted on ``shares_from`` where that and ``num_samples`` are given.
        judges_from: rows that classifiers of what is generated are trained on; None for ``shares_from``.

    Raises:
        Agreed: a module or the family breaks its contract.
    """
    mesh, over_batch = mixture.context.mesh, mixture.dispatch.over_batch
    loader = Loader(dataset, batch_size, seed, 0, mesh.rank, mesh.world_size, ordered=True)
    at, first = Moment(seed, EVALUATION_PHASE), loader.batch(0, 0).to(mesh.device)
    with _untrained(mixture):
        with within("evaluation"):
            inspect(mixture, first, loader.ids(0, 0), Moment(seed, TRIAL_PHASE))
        study: Any = mixture.study(dataset, Request(at, batch_size, num_samples, shares_from, judges_from))
        if not isinstance(study, Study):
            kind = type(mixture).__name__
            raise ValueError(
                f"mixture: {kind}.study returns {shown(study)}, expected mixdist.mixtures.Study: return that"
            )
        study.start()
        for index in range(loader.num_batches):
            batch = first if index == 0 else loader.batch(0, index).to(mesh.device)
            study.keep(id=batch.rows["id"])
            if dataset.label is not None and batch.rows[dataset.label].dim() == 1:
                study.keep(label=batch.rows[dataset.label])
            study.add(batch)
            on_batch(index + 1, loader.num_batches)
        sums = {name: over_batch.sum(value.contiguous()).cpu().numpy() for name, value in study.sums.items()}
        found = study.result(sums, _in_order(study.own_columns(), dataset, mesh))
        if num_samples is None or shares_from is None:
            return found
        return probed(found, mixture, shares_from, probing, batch_size, seed)


@contextmanager
def _untrained(mixture: Mixture) -> Iterator[None]:
    """Put all modules in evaluation mode, and then each part of them back as it was: training may go on."""
    modules = [owned.module for owned in mixture.owned()]
    training = {part: part.training for module in modules for part in module.modules()}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, was in training.items():
            part.training = was


def _in_order(own: dict[str, np.ndarray], dataset: Samples, mesh: Mesh) -> dict[str, np.ndarray]:
    """Return all ranks' columns in the data set's order."""
    parts = [load(data) for data in gather_bytes(save(own), mesh.world)]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in own}
    order = np.empty(len(dataset), dtype=np.int64)
    order[np.argsort(dataset.ids.numpy())] = np.argsort(columns["id"])
    return {name: column[order] for name, column in columns.items()}
