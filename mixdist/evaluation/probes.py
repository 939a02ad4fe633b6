"""Classifiers of latents: how much of the label they show, to a linear classifier and to others.

Shape letters: B rows on this rank, N rows, L latent.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors.numpy import load, save
from torch import Tensor

from mixdist.data import Loader, Samples
from mixdist.mixtures import Evaluation, Mixture
from mixdist.noise import EVALUATION_PHASE
from mixdist.parallel.agreement import agreed, gather_bytes

ProbeName = Literal["logistic", "mlp", "svm", "knn"]
TOLD: dict[ProbeName, str] = {
    "logistic": "multinomial logistic regression, penalty |w|^2 / 2",
    "mlp": "one hidden layer of 128 ReLU units, Adam 0.001, batches of 200, 50 epochs, seed 0",
    "svm": "linear support vector machines, one class against the others, squared hinge, C 1",
    "knn": "5 nearest neighbours",
}
ALL = "all"
"""What all latents of a row side by side are called."""


class Probing(NamedTuple):
    """Which classifiers are fitted to latents, and on how many rows.

    Args:
        kinds: of :data:`TOLD`; None for those that the mixture names itself (``Mixture.probes``).
        num_rows: the most rows that they are fitted on and judged by, each the first of its data set.
    """

    kinds: Sequence[ProbeName] | None = None
    num_rows: int = 10_000


def probed(
    found: Evaluation, mixture: Mixture, train: Samples, probing: Probing, batch_size: int, seed: int
) -> Evaluation:
    """Return an evaluation with the accuracy of classifiers of latents; every rank calls it and gets the same.

    ``probe_K``: of classifier K on all latents of ``Mixture.embed`` side by side; where there are several,
    ``probe_K_NAME``: on those of one name. Latents are centred and divided by one number, so that their mean variance
    is 1. Rows that lack a latent are neither fitted on nor judged.

    Ranks encode their share of the rows, all get all latents, and each fits its share of the classifiers: a classifier
    is fitted once, on the same numbers whatever the layout.

    Args:
        found: of the mixture on some rows, with a label.
        mixture: in evaluation mode.
        train: the rows to fit on, with the same label.
        probing: which classifiers.
        batch_size: of the global batches that are encoded.
        seed: of the run.
    """
    dataset, mesh = found.dataset, mixture.context.mesh
    kinds = [*(mixture.probes if probing.kinds is None else probing.kinds)]
    if not kinds or probing.num_rows < 1 or None in (train.label, dataset.label):
        return found
    latents, label_N = _encoded(mixture, train, probing.num_rows, batch_size, seed)
    if not latents:
        return found
    shown, true_N = _encoded(mixture, dataset, probing.num_rows, batch_size, seed)
    jobs = [(kind, name) for name in latents for kind in kinds][mesh.rank :: mesh.world_size]

    def fitted() -> dict[str, np.ndarray]:
        """Return 1 where this rank's classifiers are right, else 0, by figure; NaN where a row is not judged."""
        return {figure_of(kind, name): _right(kind, latents[name], label_N, shown[name], true_N) for kind, name in jobs}

    own = agreed(fitted, mesh.world)
    columns: dict[str, np.ndarray] = {}
    for part in gather_bytes(save(own), mesh.world):
        columns |= load(part)
    for name in (figure_of(kind, name) for name in latents for kind in kinds):
        column_N = np.full(len(dataset), np.nan)
        column_N[: len(true_N)] = columns[name]
        if (judged := ~np.isnan(column_N)).any():
            found = found.plus(name, column_N, judged)
    told: dict[str, str] = {
        "fitted_on": f"the first {len(label_N)} training rows, centred, their mean variance 1",
        "judged_by": f"the first {len(true_N)} of these rows",
        **{kind: TOLD[kind] for kind in kinds},
    }
    return replace(found, protocol={**found.protocol, "probes": told})


def figure_of(kind: str, name: str) -> str:
    """Return what the accuracy of a classifier is called."""
    return f"probe_{kind}" if name == ALL else f"probe_{kind}_{name}"


@torch.no_grad()
def _encoded(
    mixture: Mixture, rows: Samples, num_rows: int, batch_size: int, seed: int
) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
    """Return latents by name (N, L) and the label (N,) of the first rows, on every rank; empty without latents."""
    mesh, parts, label = mixture.context.mesh, [], rows.label
    assert label is not None
    loader = Loader(rows, batch_size, seed, EVALUATION_PHASE, mesh.rank, mesh.world_size, ordered=True)
    num_rows = min(num_rows, len(rows))
    for index in range(-(-num_rows // batch_size)):
        batch = loader.batch(0, index).to(mesh.device)
        own = {f"z {name}": _checked(mixture, name, z, batch.size) for name, z in mixture.embed(batch).items()}
        if not own or batch.rows[label].dim() != 1:
            return {}, np.zeros(0)
        own["label"] = batch.rows[label].long()
        parts.append({name: column.contiguous().cpu().numpy() for name, column in own.items()})
    # Batch by batch, and in each rank by rank, rows are in the data set's order.
    every = [_split(load(data), len(parts)) for data in gather_bytes(_packed(parts), mesh.world)]
    whole = {
        name: np.concatenate([every[rank][i][name] for i in range(len(parts)) for rank in range(mesh.world_size)])
        for name in parts[0]
    }
    label_N, latents = whole.pop("label")[:num_rows], {n.removeprefix("z "): z[:num_rows] for n, z in whole.items()}
    return ({ALL: np.concatenate(list(latents.values()), 1)} | (latents if len(latents) > 1 else {})), label_N


def _checked(mixture: Mixture, name: str, z: Tensor, num_rows: int) -> Tensor:
    """Return latents as float64, once they are seen to be one vector a row.

    Raises:
        ValueError: they are not.
    """
    if z.dim() != 2 or len(z) != num_rows:
        kind = type(mixture).__name__
        raise ValueError(
            f"{kind}.embed returns {name!r} of shape {tuple(z.shape)}, expected ({num_rows}, L): return a vector for "
            f"each row"
        )
    return z.double()


def _packed(parts: Sequence[Mapping[str, np.ndarray]]) -> bytes:
    return save({f"{i} {name}": column for i, part in enumerate(parts) for name, column in part.items()})


def _split(packed: Mapping[str, np.ndarray], num_parts: int) -> list[dict[str, np.ndarray]]:
    found: list[dict[str, np.ndarray]] = [{} for _ in range(num_parts)]
    for key, column in packed.items():
        index, name = key.split(" ", 1)
        found[int(index)][name] = column
    return found


def _right(
    kind: ProbeName, z_NL: np.ndarray, label_N: np.ndarray, shown_NL: np.ndarray, true_N: np.ndarray
) -> np.ndarray:
    """Return 1 where a classifier is right about the rows that are shown, else 0: (N,); NaN where there is none."""
    from sklearn.exceptions import ConvergenceWarning  # slow to import, and needed here alone

    there_N, judged_N = ~np.isnan(z_NL).any(1), ~np.isnan(shown_NL).any(1)
    right_N = np.full(len(true_N), np.nan)
    if len(np.unique(label_N[there_N])) < 2 or not judged_N.any():
        return right_N
    if not np.isfinite(z_NL[there_N]).all() or not np.isfinite(shown_NL[judged_N]).all():
        raise ValueError("latents are not finite, and probes cannot be fitted to them: give --probes none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # so many epochs, and no more
        fit = _made(kind, there_N.sum()).fit(_scaled(z_NL[there_N], z_NL[there_N]), label_N[there_N])
    right_N[judged_N] = fit.predict(_scaled(shown_NL[judged_N], z_NL[there_N])) == true_N[judged_N]
    return right_N


def _scaled(z_NL: np.ndarray, of_NL: np.ndarray) -> np.ndarray:
    """Return latents less the mean of some, over one number, the root of these ones' mean variance.

    Dimensions that the posterior leaves at the prior stay small beside those that say something.
    """
    found: np.ndarray = (z_NL - of_NL.mean(0)) / max(float(np.sqrt(of_NL.var(0).mean())), 1e-12)
    return found


def _made(kind: ProbeName, num_rows: int) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.neural_network import MLPClassifier
    from sklearn.svm import LinearSVC

    makes: dict[ProbeName, Callable[[], Any]] = {
        "logistic": lambda: LogisticRegression(max_iter=2000),
        "mlp": lambda: MLPClassifier((128,), batch_size=min(200, num_rows), max_iter=50, random_state=0),
        "svm": lambda: LinearSVC(dual=False),
        "knn": lambda: KNeighborsClassifier(min(5, num_rows)),
    }
    return makes[kind]()
