"""How an image of a source becomes an image in a shard.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from mixdist.data.formats import Raw
from mixdist.data.images import DAMAGED, SOURCE_FORMATS, Unreadable, fit, guarded, is_plain, open_image, plain

Encoding = Literal["png", "jpg", "webp"]

_ENCODINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": ("PNG", {}),
    "jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    "webp": ("WEBP", {"quality": 95}),
}
_KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG with others after it


@dataclass(frozen=True)
class Recipe:
    """What is done to every image.

    Args:
        channels: C, 1 for grey or 3 for RGB.
        size: side of the square that images are brought to; None keeps their sizes.
        crop: side of the square in the middle that is kept; None keeps the largest with ``size``, else all.
        encode: how images are written that cannot stay as they are.
        min_side: images with a smaller side are set aside, pixels.

    Raises:
        ValueError: a number that makes no sense.
    """

    channels: int = 3
    size: int | None = None
    crop: int | None = None
    encode: Encoding = "png"
    min_side: int = 8

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"--channels ({self.channels}) must be 1 for grey or 3 for RGB")
        for name, value in (("size", self.size), ("crop", self.crop), ("min-side", self.min_side)):
            if value is not None and not 1 <= value <= 4096:
                raise ValueError(f"--{name} ({value}) must be from 1 to 4096 pixels")

    def shape(self, image: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
        """Return the shape (C, H, W) that every image has afterwards, where it is known.

        Args:
            image: the shape that every image of the source has, or None.

        Raises:
            ValueError: every image is smaller than what is asked for.
        """
        if image is not None:
            for name, value in (("crop", self.crop), ("min-side", self.min_side)):
                if value is not None and value > min(image[1:]):
                    raise ValueError(
                        f"--{name} ({value}) is more than the {image[1]} x {image[2]} pixels of every image of the "
                        "source: make it smaller"
                    )
        side = self.size or self.crop
        if side is not None:
            return self.channels, side, side
        return None if image is None else (self.channels, *image[1:])

    @guarded(DAMAGED)
    def apply(self, raw: Raw) -> tuple[str, bytes]:
        """Return an image's extension and bytes.

        An encoded image keeps its bytes if it is a JPEG, PNG or WebP of the right mode, upright, and no size is asked
        for; it is decoded all the same, to see that it can be.

        Raises:
            Unreadable: it cannot be used; the reason is the same every time.
        """
        if not isinstance(raw, bytes):
            image = Image.fromarray(raw[0] if len(raw) == 1 else raw.transpose(1, 2, 0).copy())
            return self.encode, self._encoded(plain(image, self.channels))
        image = open_image(raw, SOURCE_FORMATS)
        if min(image.size) < self.min_side:
            raise Unreadable(f"it has {image.width} x {image.height} pixels, fewer than min-side ({self.min_side})")
        kept = _KEPT.get(image.format or "")
        if kept and is_plain(image, self.channels) and self.size is None and self.crop is None:
            plain(image, self.channels)
            return kept, raw
        return self.encode, self._encoded(plain(image, self.channels))

    def _encoded(self, image: Image.Image) -> bytes:
        image = fit(image, self.size, self.crop)
        image.info.clear()  # colour profiles and comments belong to the image as it was
        stream = io.BytesIO()
        kind, options = _ENCODINGS[self.encode]
        image.save(stream, kind, **options)
        return stream.getvalue()


@dataclass(frozen=True)
class AsTheyAre:
    """The recipe of rows: nothing is done to them."""

    def shape(self, image: tuple[int, int, int] | None) -> None:
        """Return that nothing is known of images."""

    def apply(self, raw: Raw) -> tuple[str, bytes]:
        """Return a row's extension and bytes."""
        assert isinstance(raw, bytes)
        return "npy", raw
