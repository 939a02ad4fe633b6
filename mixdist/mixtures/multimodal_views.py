"""Sentences under images, and the latents of modalities in the plane.

Shape letters: N rows, M modalities, T places of a text, L latent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mixdist.data import RankBatch, Samples
from mixdist.data.words import decode
from mixdist.experts import Expert
from mixdist.mixtures.pictures import Captioned, Latents, Picture
from mixdist.mixtures.proposals import Seen
from mixdist.mixtures.samples import from_experts
from mixdist.noise import EVALUATION_PHASE, Moment, Purpose
from mixdist.terms import Batch, Field

if TYPE_CHECKING:
    from mixdist.mixtures.multimodal import Multimodal

NUM_SHOWN, NUM_POINTS, LEAST_POINTS = 6, 200, 10
STEP = 2**20
"""Of the draws: not those of figures and other pictures."""


def is_text(field: Field) -> bool:
    """Return whether a field holds the tokens of a text."""
    return field.num_classes is not None and len(field.shape) == 1 and field.shape[0] > 1


def _is_image(field: Field) -> bool:
    return field.num_classes is None and len(field.shape) == 3 and field.shape[0] in (1, 3)


def sentences(codes_NT: np.ndarray, field: Field) -> list[str]:
    """Return the texts of rows; tokens without words are shown as numbers."""
    return [decode(row, field.words) for row in codes_NT.round().astype(int).tolist()]


@torch.no_grad()
def captioned(mixture: Multimodal, dataset: Samples, seed: int) -> list[Picture]:
    """Return a picture for each pair of an image and a text; every rank calls it.

    Its rows: both as they are, the text made from the image, the image made from the text, and both from one z ~ p(z).
    """
    names, spec = mixture.names, mixture.spec
    pairs = [
        (i, t)
        for i in range(len(names))
        for t in range(len(names))
        if _is_image(spec[names[i]]) and is_text(spec[names[t]])
    ]
    if not pairs:
        return []
    seen, rows = _shown(mixture, dataset, _spread(len(dataset), NUM_SHOWN))
    at, ids = Moment(seed, EVALUATION_PHASE, STEP), seen.ids_R
    eps = at.draw(Purpose.PRIOR).normal(ids, [0], (mixture.latent,), mixture.dtype)[0]
    prior = mixture.prior.draw(eps)

    def show(e: int, expert: Expert) -> dict[str, Tensor]:
        made = {f"from {n}": mixture.decode(e, z, ids, at) for n, z in enumerate(seen.loc_RML.unbind(1))}
        return {name: one.double() for name, one in (made | {"joint": mixture.decode(e, prior, ids, at)}).items()}

    found = from_experts(mixture, show)
    pictures: list[Picture] = []
    for i, t in pairs:
        image, text, field = names[i], names[t], spec[names[t]]
        x = mixture.values(rows, (image,))[image].double().cpu().numpy()
        told = sentences(rows[text].cpu().numpy(), field)
        images = [x, x, found[f"{i}/from {t}"], found[f"{i}/joint"]]
        texts = [told, sentences(found[f"{t}/from {i}"], field), told, sentences(found[f"{t}/joint"], field)]
        titles = ["data", f"{text} from {image}", f"{image} from {text}", "samples"]
        name = "captions.png" if len(pairs) == 1 else f"captions_{image}_{text}.png"
        pictures.append(Captioned(name, images, texts, titles))
    return pictures


@torch.no_grad()
def latents_in_the_plane(mixture: Multimodal, dataset: Samples) -> list[Picture]:
    """Return the locations of q(z|x_m) of some rows by t-SNE, by modality and by label; every rank calls it."""
    seen, rows = _shown(mixture, dataset, torch.arange(min(NUM_POINTS, len(dataset))))
    there_RM = seen.present_RM.cpu().numpy()
    loc = seen.loc_RML.double().cpu().numpy()[there_RM]
    if mixture.context.mesh.rank or len(loc) < LEAST_POINTS or not np.isfinite(loc).all():
        return []
    from sklearn.manifold import TSNE  # slow to import, and needed here alone

    perplexity = min(30.0, (len(loc) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(loc)
    groups = [("by modality", np.nonzero(there_RM)[1], list(mixture.names))]
    if dataset.label is not None:
        class_R = rows[dataset.label].long().cpu().numpy()
        named = list(dataset.class_names) or [str(c) for c in range(dataset.num_classes or 0)]
        groups.append((f"by {dataset.label}", class_R[np.nonzero(there_RM)[0]], named))
    return [Latents("latents.png", points, groups)]


def _spread(num_rows: int, wanted: int) -> Tensor:
    """Return positions far from each other: neighbours may be sentences of one image."""
    return torch.linspace(0, num_rows - 1, min(wanted, num_rows)).long().unique()


def _shown(mixture: Multimodal, dataset: Samples, places: Tensor) -> tuple[Seen, Batch]:
    """Return what every rank knows of rows that all of them read, and the rows as stored."""
    mesh = mixture.context.mesh
    rows = {name: column.to(mesh.device) for name, column in dataset.take(places).items()}
    seen, here = mixture.see(RankBatch(rows, (len(places),) * mesh.world_size))
    return seen.of(here.own), rows
