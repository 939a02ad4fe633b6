"""What experts are shown by: reconstructions, samples, curves, and experts against labels and attributes.

Shape letters: G points of a grid, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from mixdist.data import Samples
from mixdist.experts import Expert
from mixdist.mixtures.figures import ExpertEvaluation, attribute_names, class_names
from mixdist.mixtures.pictures import Attributes, Contingency, Curves, Mosaic, Panel, Panels, Picture, Plane
from mixdist.mixtures.samples import apportioned, from_experts, samples_of
from mixdist.mixtures.study import Evaluation
from mixdist.noise import Moment, Purpose, permutation

if TYPE_CHECKING:
    from mixdist.mixtures.ensemble import Ensemble

NUM_SAMPLES, NUM_POINTS = 8, 300
"""Samples of an expert that are shown: images, points in the plane."""

MOST_CLASSES = 100
"""With more classes there is no picture of experts against them: it could not be read."""

NUM_WHOLE = 100
"""Samples of the whole mixture, images."""


def expert_pictures(mixture: Ensemble, dataset: Samples, evaluation: Evaluation, seed: int) -> list[Picture]:
    """Return what experts reconstruct, sample and predict, drawn where they live; every rank calls it.

    Args:
        mixture: the trained mixture.
        dataset: held-out rows.
        evaluation: of the mixture on that data set.
        seed: of the run.
    """
    assert isinstance(evaluation, ExpertEvaluation)
    shown, whole = _samples(mixture, dataset, evaluation, seed)
    shown |= from_experts(mixture, lambda e, expert: _show(mixture, expert, dataset, evaluation.first(e)))
    main = _main_picture(dataset, evaluation, shown)
    mosaic = [] if whole is None else [Mosaic("mixture.png", whole)]
    return [*([main] if main else []), *_against_what_is_known(dataset, evaluation), *mosaic]


def _show(mixture: Ensemble, expert: Expert, dataset: Samples, positions: list[int]) -> dict[str, torch.Tensor]:
    """Return what an expert can show: reconstructions of rows, or its curve over a grid."""
    shown, device = {}, mixture.context.mesh.device
    if mixture.common("reconstructs") == "x":
        stored = dataset.take(torch.tensor(positions, dtype=torch.int64))
        rows = mixture.values({name: column.to(device) for name, column in stored.items()}, expert.fields)
        shown["reconstructions"] = expert.reconstruct(rows).float()
    if mixture.common("predicts") == "y" and is_curve(dataset) and expert.fields == ("x", "y"):
        shown["curve"] = expert.predict({"x": torch.as_tensor(_grid(dataset)).to(device, mixture.dtype)}).float()
    return shown


def is_curve(dataset: Samples) -> bool:
    """Return whether the data is one number y for one number x."""
    spec = dataset.spec
    real = [n for n in ("x", "y") if n in spec and spec[n].num_classes is None and spec[n].num_values == 1]
    return len(real) == 2


def is_plane(dataset: Samples) -> bool:
    """Return whether x is a point in the plane."""
    return "x" in dataset.spec and dataset.spec["x"].shape == (2,)


def is_image(dataset: Samples) -> bool:
    """Return whether x is a grey or coloured image."""
    shape = dataset.spec["x"].shape if "x" in dataset.spec else ()
    return len(shape) == 3 and shape[0] in (1, 3)


def _samples(
    mixture: Ensemble, dataset: Samples, evaluation: ExpertEvaluation, seed: int
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Draw x from every expert and, where x is an image, from the whole mixture.

    Images are means of p(x|z); points in the plane, which stand for a density, are drawn from p(x|z) where experts can.

    Returns:
        "e/samples" for each expert e, (n, *shape of x), and the mixture's, in no order of experts, or None; nothing for
        experts that do not sample x.
    """
    if mixture.modelled != "x" or mixture.common("samples") != "x":
        return {}, None
    plane, image = is_plane(dataset), is_image(dataset)
    share_E = mixture.density_weights(evaluation.share_E)
    whole_E, num = apportioned(share_E, NUM_WHOLE if image else 0), NUM_POINTS if plane else NUM_SAMPLES
    observed = plane and mixture.common("draws") == "x"
    found = samples_of(mixture, np.maximum(whole_E, num), Moment(seed), observed)
    by_expert = {f"{e}/samples": drawn[:num] for e, drawn in found.items()}
    if not image:
        return by_expert, None
    whole = np.concatenate([found[e][:count] for e, count in enumerate(whole_E.tolist())])
    return by_expert, whole[permutation(seed, 0, 0, NUM_WHOLE, purpose=Purpose.MOSAIC).numpy()]


def _grid(dataset: Samples, num_points: int = 200) -> np.ndarray:
    """Return evenly spaced x over the range of the data: (G, 1)."""
    x = _numbers(dataset, "x")
    return np.linspace(x.min(), x.max(), num_points)[:, None]


def _numbers(dataset: Samples, name: str, positions: list[int] | None = None) -> np.ndarray:
    """Return a field's numbers, of some rows or all."""
    index = torch.as_tensor(range(len(dataset)) if positions is None else positions, dtype=torch.int64)
    return dataset.spec[name].values(dataset.take(index, fields=(name,))[name], torch.float64).numpy()


def _against_what_is_known(dataset: Samples, evaluation: ExpertEvaluation) -> list[Picture]:
    """Return experts against labels and against attributes, where the data set has them."""
    drawn: list[Picture] = []
    if evaluation.counts_EC is not None and evaluation.counts_EC.shape[1] <= MOST_CLASSES:
        drawn.append(Contingency("labels.png", evaluation.counts_EC, class_names(dataset)))
    if evaluation.attribute_EA is not None and len(evaluation.rows_E) > 1:
        assert evaluation.attribute_A is not None
        names = [name.replace("_", " ") for name in attribute_names(dataset)]
        rates = evaluation.attribute_EA, evaluation.attribute_A
        drawn.append(Attributes("attributes.png", *rates, evaluation.rows_E, names))
    return drawn


def _main_picture(dataset: Samples, evaluation: ExpertEvaluation, shown: dict[str, np.ndarray]) -> Picture | None:
    """Return experts by their images, their curves or their points, whichever fits the data."""
    experts, name, expert_N = range(len(evaluation.rows_E)), "experts.png", evaluation.expert_N
    if is_image(dataset) and "0/reconstructions" in shown:
        return Panels(name, [_panel(e, dataset, evaluation, shown) for e in experts])
    if is_curve(dataset) and "0/curve" in shown:
        curve_EG = np.stack([shown[f"{e}/curve"].reshape(-1) for e in experts])
        x_N, y_N = (_numbers(dataset, field).reshape(-1) for field in ("x", "y"))
        return Curves(name, x_N, y_N, expert_N, _grid(dataset).reshape(-1), curve_EG)
    if is_plane(dataset):
        samples = [shown[f"{e}/samples"] for e in experts if f"{e}/samples" in shown]
        return Plane(name, _numbers(dataset, "x"), expert_N, samples)
    return None


def _panel(e: int, dataset: Samples, evaluation: ExpertEvaluation, shown: dict[str, np.ndarray]) -> Panel:
    rows, title = int(evaluation.rows_E[e]), f"expert {e}: "
    if evaluation.counts_EC is not None and rows:
        title += f"mostly {class_names(dataset)[int(evaluation.counts_EC[e].argmax())]}, "
    elif marked := evaluation.stands_out(e).replace("_", " "):
        title += f"{marked}, "
    originals = _numbers(dataset, "x", evaluation.first(e))
    samples = shown.get(f"{e}/samples", np.zeros((0, *originals.shape[1:])))
    return Panel(e, f"{title}{rows} rows", originals, shown[f"{e}/reconstructions"], samples)
