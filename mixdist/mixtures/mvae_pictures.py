"""A mixture with one decoder in pictures: what each component makes of rows, of others' latents, and of draws.

Shape letters: n rows decoded, N rows encoded, E components, L latent, H features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mixdist.data import RankBatch, Samples
from mixdist.mixtures.figures import class_names
from mixdist.mixtures.pictures import Cloud, Clouds, Matrix, Picture, Rows
from mixdist.mixtures.samples import from_experts
from mixdist.mixtures.study import Evaluation
from mixdist.noise import Moment, Purpose
from mixdist.terms import Batch

if TYPE_CHECKING:
    from mixdist.mixtures.mvae import MVAE

NUM_SHOWN, NUM_PAIRS, NUM_POINTS = 8, 3, 500
"""Rows and samples that are shown, pairs that are interpolated between, and rows whose latents are shown."""
REACH, NUM_WALKED = 3.0, 2
"""How far to each side a latent dimension is traversed, and how many dimensions of each component are."""


@torch.no_grad()
def mvae_pictures(mixture: MVAE, dataset: Samples, evaluation: Evaluation, seed: int) -> list[Picture]:
    """Return figures 2 to 17 of seed document 002, as far as they are of one mixture; every rank calls it.

    Of images: ``components`` (2, 4), ``cross`` (3), ``interpolation`` (6, 7), ``traversals`` (8 to 10) and ``alike``
    (17); of any rows: ``latents`` (11, 13) and ``dependence`` (12).
    """
    shown, several = Shown(mixture, dataset), sum(mixture.masks.on()) > 1
    found: list[Picture] = []
    if len(mixture.shape) == 3 and mixture.shape[0] in (1, 3) and hasattr(mixture.component, "decode"):
        found += [shown.components(), *([shown.cross()] if several else []), shown.interpolation()]
        found += [shown.traversals(), shown.alike(seed)]
    found.append(Clouds("latents.png", shown.clouds(dataset)))
    return [*found, *_dependence(evaluation)]


class Shown:
    """The first rows of a data set and their latents, on every rank.

    Args:
        mixture: its components may be on other ranks.
        dataset: the rows.
    """

    def __init__(self, mixture: MVAE, dataset: Samples) -> None:
        mesh, stored = mixture.context.mesh, dataset.take(torch.arange(min(NUM_POINTS, len(dataset))))
        rows = {name: column.to(mesh.device) for name, column in stored.items()}
        batch = RankBatch(rows, (len(rows["id"]),) * mesh.world_size)  # every rank encodes the same rows
        route = mixture.send(batch)
        latents = mixture.latents(mixture.expert_terms(route, Moment(0)), route)
        self.mixture, self.mean_NEL = mixture, latents.mean_BEL
        self.weight_NE = mixture.mean_weights(latents.a_BE)
        self.on = [e for e, on in enumerate(mixture.masks.on()) if on]
        first = {name: column[:NUM_SHOWN] for name, column in rows.items()}
        self.rows = mixture.values(first, mixture.component.fields)
        self.num = len(self.rows["id"])

    def components(self) -> Rows:
        """Rows, reconstructions by all components, and by each one alone."""
        alone = self._features(dict(enumerate(self.mean_NEL[: self.num].unbind(1))), self.rows)
        made = [self._mixed(alone, self.weight_NE[: self.num]), *map(self._decoded, alone.values())]
        titles = ["originals", "reconstructions", *(f"component {e}: alone" for e in self.on)]
        return Rows("components.png", [self._originals(), *made], titles)

    def cross(self) -> Rows:
        """What sub-decoders make of another encoder's latents, and the shared decoder of that."""
        ways = self._neighbours()
        crossed = self._features({j: self.mean_NEL[: self.num, i] for i, j in ways.items()}, self.rows)
        titles = ["originals", *(f"encoder {i}, sub-decoder {j}" for i, j in ways.items())]
        return Rows("cross.png", [self._originals(), *(self._decoded(crossed[j]) for j in ways.values())], titles)

    def interpolation(self) -> Rows:
        """Between pairs of rows, latents and weights alike; and with each sub-decoder reading another encoder."""
        pairs = min(NUM_PAIRS, self.num // 2)
        first, second = torch.arange(0, 2 * pairs, 2), torch.arange(1, 2 * pairs, 2)
        ways = torch.linspace(0, 1, NUM_SHOWN, dtype=self.mean_NEL.dtype, device=self.mean_NEL.device).repeat(pairs, 1)
        between = [
            torch.lerp(of[first, None], of[second, None], ways.reshape(*ways.shape, *[1] * (of.dim() - 1))).flatten(
                0, 1
            )
            for of in (self.mean_NEL, self.weight_NE)
        ]
        rows = {name: column[first].repeat_interleave(NUM_SHOWN, 0) for name, column in self.rows.items()}
        latents = {"": {e: between[0][:, e] for e in self.on}}
        if len(self.on) > 1:
            latents[", encoders exchanged"] = {j: between[0][:, i] for i, j in self._neighbours().items()}
        images, titles, x = [], [], self._originals()
        for told, z in latents.items():
            made = self._mixed(self._features(z, rows), between[1]).reshape(pairs, NUM_SHOWN, *self.mixture.shape)
            for p in range(pairs):
                images.append(np.concatenate([x[2 * p : 2 * p + 1], made[p], x[2 * p + 1 : 2 * p + 2]]))
                titles.append(f"rows {2 * p} and {2 * p + 1}{told}")
        return Rows("interpolation.png", images, titles)

    def traversals(self) -> Rows:
        """Each component alone, all of z at 0 but one number, of those whose posterior means vary most over rows."""
        size = self.mean_NEL.shape[2]
        dims = self.mean_NEL.var(0, correction=0).argsort(dim=1, descending=True, stable=True)[:, :NUM_WALKED]
        ways = torch.linspace(-REACH, REACH, NUM_SHOWN, dtype=self.mean_NEL.dtype, device=self.mean_NEL.device)
        walks = {e: torch.cat([ways[:, None] * torch.eye(size).to(ways)[d] for d in dims[e].tolist()]) for e in self.on}
        rows = {
            name: column[:1].expand(len(walks[self.on[0]]), *column.shape[1:]) for name, column in self.rows.items()
        }
        images, titles = [], []
        label = getattr(self.mixture.component, "label", None)
        told = f", class {int(self.rows[label][0])}" if label else ""
        for e, feature in self._features(walks, rows).items():
            for d, made in zip(
                dims[e].tolist(), self._decoded(feature).reshape(-1, NUM_SHOWN, *self.mixture.shape), strict=True
            ):
                images.append(made)
                titles.append(f"component {e}: number {d} of z from {-REACH:g} to {REACH:g}{told}")
        return Rows("traversals.png", images, titles)

    def alike(self, seed: int) -> Rows:
        """What each component alone makes of the same draws of z."""
        mixture, ids = self.mixture, torch.arange(self.num, device=self.mean_NEL.device)
        z = Moment(seed).draw(Purpose.PRIOR).normal(ids, [0], mixture.component.noise_shape or (), mixture.dtype)[0]
        made = self._features(dict.fromkeys(self.on, z), self.rows)
        return Rows("alike.png", [*map(self._decoded, made.values())], [f"component {e}: the same z" for e in made])

    def clouds(self, dataset: Samples) -> list[Cloud]:
        """Return posterior means of each component by class, and those of one class by component."""
        mean_ENL, num = self.mean_NEL.transpose(0, 1).float().cpu().numpy(), len(self.mean_NEL)
        class_N, names = np.zeros(num, dtype=np.int64), [""]
        if dataset.label is not None and dataset.num_classes:
            class_N = dataset.take(torch.arange(num), fields=(dataset.label,))[dataset.label].long().numpy()
            names = class_names(dataset)
        found = [
            Cloud(f"component {e}", plane_of(mean_ENL[e]), class_N, names if len(names) > 1 else []) for e in self.on
        ]
        most = int(np.bincount(class_N).argmax())
        own = mean_ENL[self.on][:, class_N == most]
        title = f"class {names[most]}: all components" if len(names) > 1 else "all components"
        groups, labels = np.repeat(self.on, own.shape[1]), [f"component {e}" for e in range(len(mean_ENL))]
        return [*found, Cloud(title, plane_of(own.reshape(-1, own.shape[2])), groups, labels)]

    def _neighbours(self) -> dict[int, int]:
        """Return for each component that is on the next one."""
        return dict(zip(self.on, [*self.on[1:], self.on[0]], strict=True))

    def _features(self, z: Mapping[int, Tensor], rows: Batch) -> dict[int, Tensor]:
        """Return the features (n, H) that the sub-decoders of components that are on make of latents, (n, L) each."""
        wanted = {e: z[e] for e in self.on if e in z}
        found = from_experts(
            self.mixture,
            lambda e, component: {"feature": component.decode(wanted[e], rows)} if e in wanted else {},  # type: ignore[operator]
        )
        return {e: torch.from_numpy(found[f"{e}/feature"]).to(self.mean_NEL) for e in wanted}

    def _mixed(self, features: Mapping[int, Tensor], weight_nE: Tensor) -> np.ndarray:
        return self._decoded(torch.stack([weight_nE[:, e, None] * one for e, one in features.items()]).sum(0))

    def _decoded(self, feature_nH: Tensor) -> np.ndarray:
        return self.mixture.decoder.decode(feature_nH).float().cpu().numpy()

    def _originals(self) -> np.ndarray:
        return self.rows[self.mixture.field].reshape(-1, *self.mixture.shape).float().cpu().numpy()


def plane_of(points_NL: np.ndarray) -> np.ndarray:
    """Return points in the plane, (N, 2): as they are, or their first two principal components."""
    size = points_NL.shape[1]
    if size < 2:
        return np.pad(points_NL, ((0, 0), (0, 2 - size)))
    if size == 2:
        return points_NL
    centred = points_NL - points_NL.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(axes[:2][range(len(axes[:2])), np.abs(axes[:2]).argmax(1)])  # else either sign may come
    found: np.ndarray = np.pad(centred @ (axes[:2] * signs[:, None]).T, ((0, 0), (0, 2 - len(axes[:2]))))
    return found


def _dependence(evaluation: Evaluation) -> list[Picture]:
    """Return the picture of what :class:`mixdist.mixtures.mvae_study.MVAEStudy` has measured, where it has."""
    told = evaluation.protocol.get("dhsic")
    if told is None:
        return []
    pair_EE, floor_EE = (np.array(told[name]) for name in ("pairs", "shuffled"))
    others = ~np.eye(len(pair_EE), dtype=bool)
    floor_E = (floor_EE * others).sum(1) / others.sum(1)
    caption = f"dHSIC of draws of z of {told['rows']} rows, component by component; at the right with shuffled rows"
    return [Matrix("dependence.png", pair_EE, [f"component {e}" for e in told["components"]], floor_E, caption)]
