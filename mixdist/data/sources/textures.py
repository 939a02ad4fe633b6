"""Several modalities made of one data set of digits: each modality shows them on a texture of its own.

Shape letters: N rows, R rows read, M modalities, C channels, H height, W width, T side of a texture.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mixdist.arguments import check_arguments
from mixdist.data.dataset import Samples, Source, Splits
from mixdist.data.order import Epoch
from mixdist.data.paired import Paired, check_label, keyed_order, labels_of, members
from mixdist.data.sources.synthetic import require_rows
from mixdist.noise import Draw, Purpose
from mixdist.terms import Batch, Field, Spec, real_field

SIDE, WAVES, HIGHEST = 64, 6, 8
DARK, BRIGHT, CONTRAST = 0.05, 0.6, 0.35
"""Values of a texture: from ``DARK`` or ``BRIGHT`` on, over ``CONTRAST``; none is near grey, its own inverse."""


class Textures(Source):
    """M images of one class a row, each on a texture of its own, as in PolyMNIST: "x0", "x1", ..., and the label.

    In modality m an image with values d shows x = t + d (1 - 2 t): the texture t where d is 0, its inverse where d is
    1. t is a part of texture m, of side ``SIDE`` and periodic, at a place keyed by the image's id. The M images of a
    row are of one class and, where the class has as many, all different. PolyMNIST (Sutter, Daunhawer and Vogt 2021)
    has photographs in place of these textures: figures on it are not those on this.

    Rows are put together when they are read: beside the source's own rows there is an index alone. The id of a row is
    that of its image in modality 0. Test rows are made of test images alone; ``valid`` of a config cuts rows, whose
    images stand in training rows as other modalities.

    Args:
        source: of the images, (1, H, W) with a label, such as ``Idx``.
        modalities: M.
        channels: 3 for colour, 1 for grey.
        seed: of textures, places and pairing; not of the run.

    Raises:
        ValueError: an argument is out of range.

    Examples:
        >>> from mixdist.data import Digits, Textures
        >>> train = Textures(Digits(), modalities=3).load().train
        >>> {name: tuple(column.shape[1:]) for name, column in train.first(4).take(torch.arange(4)).items()}
        {'id': (), 'y': (), 'x0': (3, 8, 8), 'x1': (3, 8, 8), 'x2': (3, 8, 8)}
    """

    def __init__(self, source: Source, modalities: int = 5, channels: int = 3, seed: int = 0) -> None:
        check_arguments(Textures.__init__, locals(), "Textures' ")
        if not isinstance(source, Source):
            raise ValueError(f"source ({source!r}) must be a source of data: give one, such as Digits()")
        require_rows(modalities=modalities)
        if channels not in (1, 3):
            raise ValueError(f"channels ({channels}) must be 1 for grey or 3 for colour")
        self.source, self.modalities, self.channels, self.seed = source, modalities, channels, seed

    def load(self) -> Splits[Paired]:
        """Read the source and pair its rows.

        Raises:
            ValueError: the source has no label, or no images "x" of one channel.
        """
        splits = self.source.load()
        return Splits(*(None if part is None else self._paired(part) for part in splits))  # type: ignore[arg-type]

    def _paired(self, part: Samples) -> Paired:
        label_N = labels_of(part, "Textures")
        assert part.label is not None
        check_label(part.label, [f"x{m}" for m in range(self.modalities)], "Textures")
        parts = tuple(Textured(part, m, self.channels, self.seed) for m in range(self.modalities))
        return Paired(
            parts,
            tuple({f"x{m}": "x"} for m in range(self.modalities)),
            self._index(label_N),
            {"id": part.ids, part.label: label_N.to(part.spec[part.label].dtype)},
            {part.label: part.spec[part.label]},
            part.label,
            part.class_names,
        )

    def _index(self, label_N: Tensor) -> Tensor:
        """Return which image each modality of a row shows: those of a class stand in a keyed circle; m goes on by m."""
        index_NM = torch.empty(len(label_N), self.modalities, dtype=torch.int64)
        for c in label_N.unique().tolist():
            circle = keyed_order(members(label_N, c), self.seed, c)
            for m in range(self.modalities):
                index_NM[circle, m] = circle.roll(-m)
        return index_NM


@dataclass(frozen=True, eq=False)
class Textured(Samples):
    """Images of a data set on one texture; made when they are read.

    Args:
        part_of: the data set, with images "x" uint8 (1, H, W).
        modality: names the texture.
        channels: C, 1 or 3.
        seed: of textures and places.

    Raises:
        ValueError: it has no such images.
    """

    part_of: Samples
    modality: int
    channels: int
    seed: int

    label = None
    class_names = ()
    log_density_N = None
    attribute = None
    attribute_names = ()

    def __post_init__(self) -> None:
        field = real_field(self.part_of.spec, "x", "Textures")
        if len(field.shape) != 3 or field.shape[0] != 1 or field.dtype != torch.uint8 or max(field.shape) > SIDE:
            raise ValueError(
                f"Textures needs images (1, height, width) of bytes, at most {SIDE} wide, and the field 'x' is "
                f"{field.shape} of {field.dtype}: name another source"
            )

    @property
    def spec(self) -> Spec:  # type: ignore[override]
        return {"x": Field((self.channels, *self.part_of.spec["x"].shape[1:]), torch.uint8, scale=1 / 255)}

    @property
    def ids(self) -> Tensor:
        return self.part_of.ids

    @property
    def fingerprint(self) -> str:
        told = f"{self.part_of.fingerprint} texture {self.modality} {self.channels} {self.seed}"
        return hashlib.sha256(told.encode()).hexdigest()

    def start(
        self, index: Tensor, epoch: Epoch | None = None, fields: Sequence[str] | None = None
    ) -> Callable[[], Batch]:
        if fields is not None and "x" not in fields:
            return lambda: {"id": self.ids[index]}
        wait = self.part_of.start(index, epoch, ["x"])

        def finish() -> Batch:
            rows = wait()
            return {"id": rows["id"], "x": self._on_texture(rows["x"], rows["id"])}

        return finish

    @property
    def in_memory(self) -> bool:
        return self.part_of.in_memory

    @property
    def ahead(self) -> int:
        return self.part_of.ahead

    def unreadable(self, rank: int, world_size: int) -> list[tuple[int, str]]:
        return self.part_of.unreadable(rank, world_size)

    def close(self) -> None:
        self.part_of.close()

    def _on_texture(self, stored_R1HW: Tensor, id_R: Tensor) -> Tensor:
        """Return images on their part of the texture, uint8 (R, C, H, W)."""
        d_R1HW, (height, width) = self.part_of.spec["x"].values(stored_R1HW, torch.float32), stored_R1HW.shape[2:]
        draw = Draw(self.seed, Purpose.DATA, step=1)
        place_R2 = (draw.uniform(id_R, [self.modality], (2,), torch.float64)[0] * SIDE).long()
        down_RH = (place_R2[:, :1] + torch.arange(height)) % SIDE
        across_RW = (place_R2[:, 1:] + torch.arange(width)) % SIDE
        whole_CTT = texture(self.modality, self.channels, self.seed)
        flat_RHW = down_RH[:, :, None] * SIDE + across_RW[:, None, :]
        t_CRHW = whole_CTT.flatten(1).index_select(1, flat_RHW.flatten()).unflatten(1, flat_RHW.shape)
        t_RCHW = t_CRHW.transpose(0, 1)  # index_select takes a part of the time of indexing
        return ((t_RCHW + d_R1HW * (1 - 2 * t_RCHW)) * 255).round().to(torch.uint8)


@lru_cache(maxsize=32)
def texture(modality: int, channels: int, seed: int) -> Tensor:
    """Return a periodic texture, float32 (C, T, T): sines along a few directions with keyed whole frequencies.

    It is dark for even modalities and bright for odd ones.
    """
    draw, one = Draw(seed, Purpose.DATA, step=2), torch.tensor([modality])
    chance_K3 = draw.uniform(one, [0], (WAVES, 3), torch.float64)[0, 0]
    colour_CK = draw.normal(one, [1], (3, WAVES), torch.float64)[0, 0, :channels]
    wave_K2 = (chance_K3[:, :2] * (2 * HIGHEST + 1)).floor() - HIGHEST
    axis = 2 * math.pi * torch.arange(SIDE, dtype=torch.float64) / SIDE
    angle_KTT = wave_K2[:, 0, None, None] * axis[:, None] + wave_K2[:, 1, None, None] * axis
    waves_KTT = (angle_KTT + 2 * math.pi * chance_K3[:, 2, None, None]).sin()
    sum_CTT = torch.einsum("ck,ktu->ctu", colour_CK, waves_KTT)
    low, high = sum_CTT.amin((1, 2), keepdim=True), sum_CTT.amax((1, 2), keepdim=True)
    start = BRIGHT if modality % 2 else DARK
    return (start + CONTRAST * (sum_CTT - low) / (high - low).clamp(min=1e-9)).float()
