"""Decodes images into rows of pixels. Formats are an allow-list, sizes are checked before anything is decoded.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mixdist.messages import one_line

Decoder = Literal["pillow", "simplejpeg"]

MAX_PIXELS = 50_000_000
FORMATS = ("JPEG", "PNG", "WEBP")
SOURCE_FORMATS = (*FORMATS, "BMP", "GIF", "TIFF")
DAMAGED = "it is truncated or damaged"
_ORIENTATION = 0x0112
_MODES = {1: "L", 3: "RGB"}


class Unreadable(ValueError):
    """An image that cannot be used; the message is the reason, without its name."""


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Raise one error for the many that Pillow's plugins raise on damaged files, and ignore its warnings.

    Damaged EXIF data does not matter, and the number of pixels is checked here.

    Args:
        what: the reason, before Pillow's own words.

    Raises:
        Unreadable: something failed, except for lack of memory, which says nothing about the image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (Unreadable, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise Unreadable(f"it has more than {MAX_PIXELS} pixels") from None
    except Exception as error:
        # Without what differs from run to run, such as addresses in memory.
        why = re.sub(r"cannot identify image file.*| <[^>]* at 0x[0-9a-f]+>", "", one_line(str(error)))
        raise Unreadable(f"{what} ({why})" if why else what) from None


def open_image(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Read an image's header.

    Args:
        data: the file's bytes.
        formats: that are allowed, by Pillow's names.

    Raises:
        Unreadable: it is empty, no image of these formats, or has more than 50 million pixels.
    """
    if not data:
        raise Unreadable("it is empty")
    with guarded(f"it is no {', '.join(formats)} image"):
        image = Image.open(io.BytesIO(data), formats=formats)
    width, height = image.size
    if width * height > MAX_PIXELS or not width * height:
        raise Unreadable(f"it has {width} x {height} pixels, expected from 1 to {MAX_PIXELS}")
    return image


@guarded(DAMAGED)
def is_plain(image: Image.Image, channels: int) -> bool:
    """Return whether an image's pixels are those of its file: of the right mode and upright."""
    return image.mode == _MODES[channels] and image.getexif().get(_ORIENTATION, 1) == 1


@guarded(DAMAGED)
def plain(image: Image.Image, channels: int) -> Image.Image:
    """Decode an image to grey or RGB, upright; what is transparent is put on white.

    Raises:
        Unreadable: it is truncated or damaged.
    """
    mode = _MODES[channels]
    if image.mode != mode or image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
        if image.mode == "P" or image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            image.alpha_composite(rgba)
        if image.mode.startswith("I;16") or image.mode == "I":
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        image = image.convert(mode)
    image.load()
    return image


def fit(image: Image.Image, size: int | None, crop: int | None) -> Image.Image:
    """Crop the middle of an image and resize it.

    Args:
        image: the image.
        size: side of the result, which is square; None keeps the size.
        crop: side of the square in the middle that is kept; None keeps the largest square where there is a size,
            else all.

    Raises:
        Unreadable: it is smaller than ``crop``.
    """
    if size is None and crop is None:
        return image
    side = crop or min(image.size)
    if side > min(image.size):
        raise Unreadable(f"it has {image.width} x {image.height} pixels, fewer than crop ({side})")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if size is not None and size != side:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return image


def decode(
    data: bytes,
    channels: int,
    size: int | None = None,
    crop: int | None = None,
    decoder: Decoder = "pillow",
    formats: tuple[str, ...] = FORMATS,
) -> NDArray[np.uint8]:
    """Decode an image, uint8 (C, H, W).

    Args:
        data: the file's bytes.
        channels: C, 1 or 3.
        size: see :func:`fit`.
        crop: see :func:`fit`.
        decoder: simplejpeg takes plain JPEGs, Pillow all else.
        formats: that are allowed, by Pillow's names.

    Raises:
        Unreadable: it cannot be decoded.
    """
    image = open_image(data, formats)
    if decoder == "simplejpeg" and image.format == "JPEG" and is_plain(image, channels):
        image = _decode_jpeg(data, channels)
    else:
        image = plain(image, channels)
    return np.ascontiguousarray(np.atleast_3d(np.asarray(fit(image, size, crop))).transpose(2, 0, 1))


def _decode_jpeg(data: bytes, channels: int) -> Image.Image:
    import simplejpeg  # an extra, imported where it is used

    with guarded(DAMAGED):
        array_HWC = simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
    return Image.fromarray(array_HWC if channels == 3 else array_HWC[:, :, 0])
