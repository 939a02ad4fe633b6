"""Mixtures of modalities in pictures and in one process.

Shape letters: N rows, M modalities, L latent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mixdist.data import RankBatch, Samples
from mixdist.experts import Modality
from mixdist.mixtures.given import Rowed, dense, draws, whole_number
from mixdist.mixtures.pictures import Picture, Rows
from mixdist.mixtures.proposals import PRESENT, Seen
from mixdist.mixtures.samples import from_experts
from mixdist.nets.likelihood import Likelihood
from mixdist.noise import EVALUATION_PHASE, Moment, Purpose
from mixdist.terms import Batch

if TYPE_CHECKING:
    from mixdist.mixtures.multimodal import Multimodal, Seen

NUM_SHOWN = 8
"""Rows and samples that are shown."""
NUM_TRAVERSED, REACH = 10, 5.0
"""Dimensions that are traversed, and how many scales of the prior to each side."""


@torch.no_grad()
def multimodal_pictures(mixture: Multimodal, dataset: Samples, seed: int) -> list[Picture]:
    """Return samples of all modalities side by side, each decoded from each, and traversals; every rank calls it.

    Only images are shown.
    """
    shapes = [mixture.spec[name].shape for name in mixture.names]
    images = [m for m, shape in enumerate(shapes) if len(shape) == 3 and shape[0] in (1, 3)]
    if not images:
        return []
    at, device = Moment(seed, EVALUATION_PHASE), mixture.context.mesh.device
    ranks = mixture.context.mesh.world_size
    stored = dataset.take(_shown_rows(mixture, dataset))
    rows = {name: column.to(device) for name, column in stored.items()}
    seen, here = mixture.see(RankBatch(rows, (len(rows["id"]),) * ranks))  # every rank shows the same rows
    seen = seen.of(here.own)
    loc_RML = mixture.alone(seen, at)
    z_0 = loc_RML[0, int(seen.present_RM[0].to(torch.uint8).argmax())]
    walks = _traversals(mixture, z_0)
    ids = torch.arange(NUM_SHOWN, device=device)
    prior = mixture.prior.draw(at.draw(Purpose.PRIOR).normal(ids, [0], (mixture.latent,), mixture.dtype)[0])

    def show(e: int, expert: Modality) -> dict[str, Tensor]:
        if e not in images:
            return {}
        named = {f"from {n}": mixture.decode(e, z, seen.ids_R, at) for n, z in enumerate(loc_RML.unbind(1))}
        loc, _ = here.private[e]
        named[f"from {e}"] = expert.decode(torch.cat([loc_RML[:, e], loc[here.own]], dim=1))
        named["joint"] = mixture.decode(e, prior, ids, at)
        walked = mixture.decode(e, walks.flatten(0, 1), torch.zeros_like(ids[:1]).expand(walks.shape[:2].numel()), at)
        return {name: made.float() for name, made in (named | {"walk": walked}).items()}

    found = from_experts(mixture, show)  # type: ignore[arg-type]
    names, x = mixture.names, mixture.values(rows, [mixture.names[m] for m in images])
    joint = Rows("joint.png", [found[f"{m}/joint"] for m in images], [f"{names[m]}: samples" for m in images])
    crossed, titles = [], []
    for m in images:
        crossed += [x[names[m]].float().cpu().numpy(), *(found[f"{m}/from {n}"] for n in range(len(names)))]
        titles += [f"{names[m]}: originals", *(f"{names[m]}: from {other}" for other in names)]
    walked = {m: found[f"{m}/walk"].reshape(*walks.shape[:2], *shapes[m]) for m in images}
    return [Rows("reconstructions.png", crossed, titles), joint, _traversed(walked, names)]


def _shown_rows(mixture: Multimodal, dataset: Samples) -> Tensor:
    """Return the positions of the first rows that have all modalities, or of the first where too few have."""
    first = torch.arange(min(len(dataset), 50 * NUM_SHOWN))
    for name in mixture.extra_fields:
        whole = dataset.take(first, fields=(name,))[name].bool().all(1)
        first = torch.cat([first[whole], first[~whole]])
    return first[:NUM_SHOWN].sort().values


def _traversals(mixture: Multimodal, z_L: Tensor) -> Tensor:
    """Return z with one dimension after another moved from -5 to 5 scales of the prior: (L, steps, L)."""
    ways = torch.linspace(-REACH, REACH, NUM_SHOWN, dtype=z_L.dtype, device=z_L.device)
    moved = z_L.repeat(mixture.latent, NUM_SHOWN, 1)
    scales = mixture.prior.scale()
    for d in range(mixture.latent):
        moved[d, :, d] = ways * scales[d]
    return moved


def _traversed(walked: dict[int, np.ndarray], names: Sequence[str]) -> Rows:
    """Order dimensions by the part of all movement that is the first image's, largest first; show those that move."""
    moves = np.stack([np.abs(np.diff(one, axis=1)).mean(axis=(1, 2, 3, 4)) for one in walked.values()])
    kept = np.argsort(-moves.sum(0), kind="stable")[:NUM_TRAVERSED]
    part = moves[0, kept] / np.maximum(moves[:, kept].sum(0), np.finfo(np.float64).tiny)
    order = kept[np.argsort(-part, kind="stable")]
    images, titles = [], []
    for d in order:
        for (m, one), move in zip(walked.items(), moves[:, d], strict=True):
            images.append(one[d])
            titles.append(f"dimension {d}: {names[m]} moves {move:.3f}")
    return Rows("traversals.png", images, titles)


class MultimodalModel(Rowed):
    """What ``mixdist.load`` returns of a mixture of modalities: all of it in one process, in evaluation mode.

    Rows are given as a dict by field, as to :class:`mixdist.mixtures.Model`, with those modalities that are known. A
    modality is named by its field or its expert's number.

    Args:
        mixture: the mixture, its weights loaded.
    """

    def __init__(self, mixture: Multimodal) -> None:
        super().__init__(mixture.spec, mixture.dtype)
        self.mixture, self.names = mixture, mixture.names
        for expert in mixture.modalities.values():
            expert.eval()

    def _likelihoods(self, name: str) -> Iterator[Likelihood]:
        if name in self.names:
            yield self.mixture.modalities[self.names.index(name)].likelihood

    def _number(self, modality: str | int) -> int:
        if modality in self.names:
            return self.names.index(str(modality))
        if not isinstance(modality, (str, bool)) and 0 <= whole_number(modality) < len(self.names):
            return whole_number(modality)
        raise ValueError(
            f"modality {modality!r} is not one of the model's: give one of {', '.join(self.names)}, or its number"
        )

    def _given(self, named: Batch, given: str | int | Sequence[str | int] | None) -> list[int]:
        """Return the numbers of the modalities that are given, by default all that rows have."""
        if given is None:
            numbers = [m for m, name in enumerate(self.names) if name in named]
            missing = [] if numbers else [", ".join(self.names)]
        else:
            one = isinstance(given, str) or not isinstance(given, Iterable)
            listed: list[Any] = [given] if one else list(given)  # type: ignore[arg-type]
            numbers = [self._number(name) for name in listed]
            missing = [self.names[m] for m in numbers if self.names[m] not in named]
            if not numbers:
                raise ValueError(f"given ({given!r}) names no modality: give some of {', '.join(self.names)}")
        if missing:
            raise ValueError(
                f"rows have the fields {sorted(named)}, expected {missing[0]}: give rows as a dict of fields"
            )
        return numbers

    def _seen(
        self, named: Batch, given: str | int | Sequence[str | int] | None, some: bool = True
    ) -> tuple[Seen, dict[int, Tensor]]:
        """Encode what is given, and return the locations of its private latents; the others have no part.

        Raises:
            ValueError: rows are not what they should be; with ``some``, one has nothing of what is given.
        """
        numbers, mixture = self._given(named, given), self.mixture
        size = (len(named["id"]), len(self.names))
        loc = torch.zeros(*size, mixture.latent, dtype=self.dtype)
        scale, present, private = torch.ones_like(loc), torch.zeros(size, dtype=torch.bool), {}
        for m in numbers:
            of_loc, of_scale = mixture.modalities[m].encode(named)
            loc[:, m], scale[:, m] = of_loc[:, : mixture.latent], of_scale[:, : mixture.latent]
            present[:, m], private[m] = True, of_loc[:, mixture.latent :]
        if PRESENT in named:
            present = present & self._present(named[PRESENT])
        lacking = (~present.any(1)).nonzero()
        if some and len(lacking):
            told = ", ".join(self.names[m] for m in numbers)
            raise ValueError(
                f"field {PRESENT!r} says that row {int(lacking[0])} has nothing of what is given ({told}): leave such "
                f"rows out, or give more"
            )
        return Seen(named["id"], present, loc, scale), private

    def _present(self, numbers: Tensor) -> Tensor:
        """Return what rows are said to have, bool (N, M)."""
        field = self.spec[PRESENT]
        there = numbers == field.values(torch.ones((), dtype=field.dtype), self.dtype)
        other = ~(there | (numbers == field.values(torch.zeros((), dtype=field.dtype), self.dtype)))
        if bool(other.any()):
            row, m = other.nonzero()[0].tolist()
            raise ValueError(
                f"field {PRESENT!r} holds {numbers[row, m].item():g} for {self.names[m]} in row {row}, expected 1 for "
                f"what the row has and 0 for what it has not: mend this row"
            )
        return there

    @torch.no_grad()
    def encode(self, rows: Batch) -> dict[str, Tensor]:
        """Return the location of q(z|x_m) for each modality given, by its field, (N, L); NaN where a row lacks it."""
        seen, private = self._seen(self.rows(rows), None, some=False)
        loc = self.mixture.alone(seen, Moment(0, EVALUATION_PHASE))
        loc = torch.where(seen.present_RM[..., None], loc, math.nan)
        return {self.names[m]: loc[:, m] for m in private}

    @torch.no_grad()
    def infer(
        self, rows: Batch, given: str | int | Sequence[str | int] | None = None, drawn: bool = False, seed: int = 0
    ) -> Tensor:
        """Return z of rows from some modalities, by default all that they have: (N, L).

        Of a mixture of posteriors each row takes one, keyed by its id or place; z is its location, or ``drawn``.

        Raises:
            ValueError: an unknown modality, a field that is missing, or a row that has nothing of what is given.
        """
        _, seed = draws(0, seed)
        return self.mixture.infer(self._seen(self.rows(rows), given)[0], Moment(seed, EVALUATION_PHASE), drawn)

    @torch.no_grad()
    def decode(self, z: Tensor | np.ndarray, modality: str | int, seed: int = 0) -> Tensor:
        """Return the mean of p(x_m|z), (N, *shape of x_m), of texts the likeliest words; private latents are drawn.

        Raises:
            ValueError: z is not (N, L) of finite numbers, or the modality is unknown.
        """
        e, (_, seed) = self._number(modality), draws(0, seed)
        z = dense("z", z)
        if z.dim() != 2 or z.shape[1] != self.mixture.latent or z.is_complex() or not bool(z.isfinite().all()):
            told = f"shape {tuple(z.shape)} of {z.dtype}"
            raise ValueError(f"z has {told}: give finite numbers (N, {self.mixture.latent}), as infer returns them")
        return self.mixture.decode(e, z.to(self.dtype), torch.arange(len(z)), Moment(seed, EVALUATION_PHASE))

    @torch.no_grad()
    def translate(
        self,
        rows: Batch,
        source: str | int | Sequence[str | int],
        target: str | int,
        drawn: bool = False,
        seed: int = 0,
    ) -> Tensor:
        """Return one modality made from another, or from several: (N, *shape of the target)."""
        self._number(target)
        return self.decode(self.infer(rows, [] if source is None else source, drawn, seed), target, seed)

    @torch.no_grad()
    def reconstruct(self, rows: Batch, given: str | int | Sequence[str | int] | None = None) -> dict[str, Tensor]:
        """Return all modalities made from those given, by field; what a row has keeps its private latents."""
        seen, private = self._seen(self.rows(rows), given)
        z, made = self.mixture.infer(seen, Moment(0, EVALUATION_PHASE), drawn=False), {}
        for m, name in enumerate(self.names):
            made[name] = self.decode(z, name)
            if m in private:
                own = self.mixture.modalities[m].decode(torch.cat([z, private[m]], dim=1))
                there = seen.present_RM[:, m].view(-1, *[1] * (own.dim() - 1))
                made[name] = torch.where(there, own, made[name])
        return made

    @torch.no_grad()
    def generate(self, num_samples: int, seed: int = 0) -> dict[str, Tensor]:
        """Draw z ~ p(z) and return the means of all modalities, by field: row i of each is of the same z."""
        num_samples, seed = draws(num_samples, seed)
        draw, latent = Moment(seed, EVALUATION_PHASE).draw(Purpose.PRIOR), (self.mixture.latent,)
        z = self.mixture.prior.draw(draw.normal(torch.arange(num_samples), [0], latent, self.dtype)[0])
        return {name: self.decode(z, name, seed) for name in self.names}

    def rows_of_samples(self, num_samples: int, seed: int = 0) -> dict[str, Tensor]:
        """Return samples by modality; where there are images, of them alone."""
        samples = self.generate(num_samples, seed)
        images = {name: made for name, made in samples.items() if made.dim() == 4 and made.shape[1] in (1, 3)}
        return images or samples
