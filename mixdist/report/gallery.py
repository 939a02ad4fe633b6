"""The pictures of a run: owners of experts reconstruct, sample and predict; rank 0 draws.

Shape letters: N rows shown, G points of a grid, E experts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load, save

from mixdist.data import Samples
from mixdist.evaluation.density import apportioned, modelled, samples_of
from mixdist.evaluation.evaluate import Evaluation, attribute_names, stands_out
from mixdist.mixtures import Ensemble
from mixdist.noise import Moment, Purpose, permutation
from mixdist.parallel.agreement import gather_bytes
from mixdist.report.grids import Panel, experts_picture, mixture_picture, to_uint8
from mixdist.report.metrics import Record, read_metrics
from mixdist.report.plots import (
    attributes_picture,
    contingency_picture,
    curves_picture,
    scatter_picture,
    training_picture,
)
from mixdist.report.rounds import rounds_picture

NUM_SAMPLES, NUM_POINTS = 8, 300
"""Samples of an expert that are shown: images, points in the plane."""

MOST_CLASSES = 100
"""With more classes there is no picture of experts against them: it could not be read."""

NUM_WHOLE = 100
"""Samples of the whole mixture, images."""


def draw(mixture: Ensemble, dataset: Samples, evaluation: Evaluation, run: Path, seed: int) -> Path | None:
    """Draw what the experts learned into ``run/images``; every rank calls it.

    Args:
        mixture: the trained mixture.
        dataset: held-out rows.
        evaluation: of the mixture on that data set.
        run: the run's directory.
        seed: of the run.

    Returns:
        the path of the main picture on rank 0; None on other ranks or where nothing can be drawn.
    """
    mesh = mixture.dispatch.mesh
    shown, whole = samples(mixture, dataset, evaluation, seed)
    own: dict[str, np.ndarray] = {}
    if mesh.leads:
        for e in mixture.bank.ids:
            arrays = show(mixture, e, dataset, evaluation.first(e))
            own |= {f"{e}/{name}": array for name, array in arrays.items()}
    for data in gather_bytes(save(own), mesh.world):
        shown |= load(data)
    if mesh.rank:
        return None
    images = run / "images"
    _records(images, read_metrics(run))
    if whole is not None:
        mixture_picture(images / "mixture.png", to_uint8(whole))
    known = _against_what_is_known(images, dataset, evaluation)
    return _experts(images / "experts.png", dataset, evaluation, shown) or known


def show(mixture: Ensemble, e: int, dataset: Samples, positions: list[int]) -> dict[str, np.ndarray]:
    """Let an expert of this rank show what it can: reconstructions of rows, or its curve over a grid."""
    expert, device = mixture.bank.owned()[e], mixture.dispatch.mesh.device
    shown: dict[str, torch.Tensor] = {}
    expert.eval()
    with torch.no_grad():
        if expert.can("reconstruct"):
            stored = dataset.take(torch.tensor(positions, dtype=torch.int64))
            rows = mixture.values({name: column.to(device) for name, column in stored.items()}, expert.fields)
            shown["reconstructions"] = expert.reconstruct(rows)
        if expert.can("predict") and is_curve(dataset) and expert.fields == ("x", "y"):
            shown["curve"] = expert.predict({"x": torch.as_tensor(grid(dataset)).to(device, mixture.dtype)})
    expert.train()
    return {name: tensor.float().cpu().numpy() for name, tensor in shown.items()}


def targets(mixture: Ensemble) -> str | None:
    """Name the field that the experts predict, or None where they predict nothing."""
    template = mixture.bank.template
    return getattr(template, "target", None) if template.can("predict") else None


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


def samples(
    mixture: Ensemble, dataset: Samples, evaluation: Evaluation, seed: int
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Draw x from every expert and, where x is an image, from the whole mixture; every rank calls it.

    Images are means of p(x|z); points in the plane, which stand for a density, are drawn from p(x|z) where experts can.
    The weights of the mixture are alpha in a hard one, and mean responsibilities on held-out rows in a soft one.

    Returns:
        "e/samples" for each expert e, (n, *shape of x), and the mixture's, in no order of experts, or None; nothing for
        experts that do not sample x.
    """
    template = mixture.bank.template
    if modelled(mixture) != "x" or template.noise_shape is None or not template.can("sample"):
        return {}, None
    plane, image = is_plane(dataset), is_image(dataset)
    share_E = mixture.density_weights(torch.from_numpy(evaluation.share_E)).cpu().numpy()
    whole_E, shown = apportioned(share_E, NUM_WHOLE if image else 0), NUM_POINTS if plane else NUM_SAMPLES
    observed = plane and template.can("draw")
    found = samples_of(mixture, np.maximum(whole_E, shown), Moment(seed), observed)
    by_expert = {f"{e}/samples": drawn[:shown] for e, drawn in found.items()}
    if not image:
        return by_expert, None
    whole = np.concatenate([found[e][:count] for e, count in enumerate(whole_E.tolist())])
    return by_expert, whole[permutation(seed, 0, 0, NUM_WHOLE, purpose=Purpose.PRIOR).numpy()]


def grid(dataset: Samples, num_points: int = 200) -> np.ndarray:
    """Return evenly spaced x over the range of the data: (G, 1)."""
    x = numbers(dataset, "x")
    return np.linspace(x.min(), x.max(), num_points)[:, None]


def class_names(dataset: Samples) -> list[str]:
    """Name the classes of the label, by number where they have no names."""
    return list(dataset.class_names) or [str(c) for c in range(dataset.num_classes or 0)]


def _records(images: Path, records: list[Record]) -> None:
    if records:
        training_picture(images / "training.png", records)
    if any(record.get("round") is not None for record in records):
        rounds_picture(images / "rounds.png", records)


def _against_what_is_known(images: Path, dataset: Samples, evaluation: Evaluation) -> Path | None:
    """Draw experts against labels and attributes; give the path of the first picture, or None without any."""
    drawn = []
    if evaluation.counts_EC is not None and evaluation.counts_EC.shape[1] <= MOST_CLASSES:
        drawn.append(images / "labels.png")
        contingency_picture(drawn[-1], evaluation.counts_EC, class_names(dataset))
    if evaluation.attribute_EA is not None and len(evaluation.rows_E) > 1:
        assert evaluation.attribute_A is not None
        drawn.append(images / "attributes.png")
        names = [name.replace("_", " ") for name in attribute_names(dataset)]
        attributes_picture(drawn[-1], evaluation.attribute_EA, evaluation.attribute_A, evaluation.rows_E, names)
    return drawn[0] if drawn else None


def _experts(path: Path, dataset: Samples, evaluation: Evaluation, shown: dict[str, np.ndarray]) -> Path | None:
    experts = range(len(evaluation.rows_E))
    field = dataset.spec.get("x")
    if field is None:
        return None
    expert_N = evaluation.expert_N
    if is_image(dataset) and "0/reconstructions" in shown:
        experts_picture(path, [_panel(e, dataset, evaluation, shown) for e in experts])
    elif is_curve(dataset) and "0/curve" in shown:
        curves = np.stack([shown[f"{e}/curve"].reshape(-1) for e in experts])
        curves_picture(
            path,
            numbers(dataset, "x").reshape(-1),
            numbers(dataset, "y").reshape(-1),
            expert_N,
            grid(dataset).reshape(-1),
            curves,
        )
    elif is_plane(dataset):
        scatter_picture(
            path, numbers(dataset, "x"), expert_N, [shown[f"{e}/samples"] for e in experts if f"{e}/samples" in shown]
        )
    else:
        return None
    return path


def numbers(dataset: Samples, name: str, positions: list[int] | None = None) -> np.ndarray:
    """Return a field's numbers, of some rows or all."""
    index = torch.arange(len(dataset)) if positions is None else torch.tensor(positions, dtype=torch.int64)
    return dataset.spec[name].values(dataset.take(index, fields=(name,))[name], torch.float64).numpy()


def _panel(e: int, dataset: Samples, evaluation: Evaluation, shown: dict[str, np.ndarray]) -> Panel:
    rows, title = int(evaluation.rows_E[e]), f"expert {e}: "
    if evaluation.counts_EC is not None and rows:
        title += f"mostly {class_names(dataset)[int(evaluation.counts_EC[e].argmax())]}, "
    elif marked := stands_out(evaluation, dataset, e).replace("_", " "):
        title += f"{marked}, "
    title += f"{rows} rows"
    originals = numbers(dataset, "x", evaluation.first(e))
    samples = shown.get(f"{e}/samples", np.zeros((0, *originals.shape[1:])))
    return Panel(e, title, to_uint8(originals), to_uint8(shown[f"{e}/reconstructions"]), to_uint8(samples))
