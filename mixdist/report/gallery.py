"""The pictures of a run: a family says what is shown, rank 0 draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixdist.data import Samples
from mixdist.mixtures import Evaluation, Mixture, pictures
from mixdist.report import components, grids, plots
from mixdist.report.metrics import read_metrics
from mixdist.report.rounds import rounds_picture

DRAWN_BY: dict[type[pictures.Picture], Callable[..., None]] = {
    pictures.Latents: plots.latents_picture,
    pictures.Matrix: components.matrix_picture,
    pictures.Clouds: components.clouds_picture,
    pictures.Panels: grids.experts_picture,
    pictures.Mosaic: grids.mixture_picture,
    pictures.Rows: grids.sample_picture,
    pictures.Captioned: grids.captioned_picture,
    pictures.Plane: plots.scatter_picture,
    pictures.Curves: plots.curves_picture,
    pictures.Contingency: plots.contingency_picture,
    pictures.Attributes: plots.attributes_picture,
}


def draw(mixture: Mixture, dataset: Samples, evaluation: Evaluation, run: Path, seed: int) -> Path | None:
    """Draw a trained mixture and its training into ``run/images``; every rank calls it.

    Args:
        mixture: the trained mixture.
        dataset: held-out rows.
        evaluation: of the mixture on that data set.
        run: the run's directory.
        seed: of the run.

    Returns:
        the path of the main picture on rank 0; None on other ranks or where the family shows nothing.
    """
    shown: Any = mixture.pictures(dataset, evaluation, seed)
    if not isinstance(shown, list) or not all(type(picture) in DRAWN_BY for picture in shown):
        kind = type(mixture).__name__
        raise ValueError(f"mixture: {kind}.pictures returns no list of mixdist.mixtures.pictures: return [] for none")
    if mixture.context.mesh.rank:
        return None
    images, records = run / "images", read_metrics(run)
    if records:
        plots.training_picture(images / "training.png", records)
    if any(record.get("drop_rate") and any(record["drop_rate"]) for record in records):
        components.masks_picture(images / "masks.png", records)
    if any(record.get("round") is not None for record in records):
        rounds_picture(images / "rounds.png", records)
    paths = [draw_picture(images, picture) for picture in shown]
    return paths[0] if paths else None


def draw_picture(folder: Path, picture: pictures.Picture) -> Path:
    """Draw one picture into a PNG file of its name in a folder; return its path."""
    name, *arrays = picture
    path = (folder / str(name)).with_suffix(".png")
    DRAWN_BY[type(picture)](path, *arrays)
    return path


def samples_picture(path: Path, rows: dict[str, Any]) -> None:
    """Draw samples by title, each (n, *shape of x): points in the plane as a scatter, others as rows of images."""
    import numpy as np

    drawn = [np.asarray(samples) for samples in rows.values()]
    if drawn[0].shape[1:] == (2,):
        owner = np.repeat(np.arange(len(drawn)), [len(samples) for samples in drawn])
        plots.scatter_picture(path, np.concatenate(drawn), owner, [])
    else:
        grids.sample_picture(path, drawn, list(rows))
