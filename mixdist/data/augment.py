"""Random flips and shifts of images, keyed by row. Shape letters: R rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from mixdist.arguments import check_fields
from mixdist.data.order import Epoch
from mixdist.noise import Draw, Purpose


@dataclass(frozen=True)
class Augment:
    """Random flips and shifts of training images: a function of (seed, phase, epoch, id), on any layout.

    Args:
        flip: mirrors half of the images from left to right.
        shift: moves an image by up to this many pixels, vertically and horizontally; edges are mirrored.

    Examples:
        >>> import torch
        >>> from mixdist.data import Augment, Epoch
        >>> images, ids = torch.arange(2 * 16, dtype=torch.uint8).reshape(2, 1, 4, 4), torch.tensor([5, 6])
        >>> augment = Augment(flip=True, shift=1)
        >>> torch.equal(augment(images, ids, Epoch(0))[1:], augment(images[1:], ids[1:], Epoch(0)))  # keyed by row
        True
    """

    flip: bool = False
    shift: int = 0

    def __post_init__(self) -> None:
        check_fields(self, "augment.")
        if self.shift < 0:
            raise ValueError(f"augment.shift ({self.shift}) must be at least 0: give a number of pixels, 0 for none")

    def check(self, shape: tuple[int, ...]) -> None:
        """Check the augmentation against the shape of a row.

        Raises:
            ValueError: rows are not images, or not larger than the shift.
        """
        if (self.flip or self.shift) and (len(shape) != 3 or self.shift >= min(shape[1:])):
            raise ValueError(
                f"augment (flip {self.flip}, shift {self.shift}) needs images larger than the shift, and rows have the "
                f"shape {shape}: leave it out or lower the shift"
            )

    def __call__(self, images: Tensor, ids_R: Tensor, epoch: Epoch) -> Tensor:
        """Return augmented images (R, C, H, W) of the same type; the ids are the keys of their draws."""
        if not len(images) or not (self.flip or self.shift):
            return images
        draw = Draw(epoch.seed, Purpose.AUGMENT, epoch.phase, epoch.number)
        chance_R3 = draw.uniform(ids_R, [0], (3,), torch.float64)[0]
        if self.flip:
            flipped = chance_R3[:, 0] < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        if self.shift:
            height, width = images.shape[2:]
            wide = _mirrored(images, self.shift)
            offset_R2 = (chance_R3[:, 1:] * (2 * self.shift + 1)).long()
            down = offset_R2[:, 0, None, None, None] + torch.arange(height)[None, None, :, None]
            across = offset_R2[:, 1, None, None, None] + torch.arange(width)[None, None, None, :]
            row = torch.arange(len(images))[:, None, None, None]
            images = wide[row, torch.arange(images.shape[1])[None, :, None, None], down, across]
        return images


def _mirrored(images: Tensor, by: int) -> Tensor:
    # torch mirrors real numbers only; float32 represents every byte exactly.
    return pad(images.float(), (by, by, by, by), mode="reflect").to(images.dtype)
