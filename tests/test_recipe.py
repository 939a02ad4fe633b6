"""How images get into shards: with their own bytes where they are plain, else with their own pixels."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mixdist.data.formats import Raw
from mixdist.data.images import Unreadable, decode
from mixdist.data.prepare.recipe import Encoding, Recipe
from tests.errors import error_of
from tests.sources import picture

AS_IS = [("JPEG", {}, "jpg"), ("PNG", {}, "png"), ("WEBP", {"lossless": True}, "webp")]


def _pixels(data: bytes, mode: str = "RGB") -> np.ndarray:
    """Pixels (C, H, W) by Pillow alone."""
    with Image.open(io.BytesIO(data)) as image:
        return np.atleast_3d(np.asarray(image.convert(mode))).transpose(2, 0, 1)


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _png(recipe: Recipe, raw: Raw) -> bytes:
    """Apply a recipe that must make a new PNG."""
    extension, image = recipe.apply(raw)
    assert extension == "png"
    return image


@pytest.mark.parametrize(("kind", "options", "extension"), AS_IS)
@pytest.mark.parametrize("encode", ["png", "jpg", "webp"])
def test_a_plain_image_keeps_its_bytes(kind: str, options: dict[str, Any], extension: str, encode: Encoding) -> None:
    data = picture(1, kind=kind, **options)
    assert Recipe(encode=encode).apply(data) == (extension, data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_grey_is_plain_where_grey_is_asked_for(kind: str) -> None:
    data = picture(1, mode="L", kind=kind)
    assert Recipe(channels=1).apply(data)[1] == data
    image = _png(Recipe(channels=3), data)
    np.testing.assert_array_equal(_pixels(image), np.repeat(_pixels(data, "L"), 3, axis=0))


def test_colour_becomes_grey() -> None:
    data = picture(1, kind="PNG")
    image = _png(Recipe(channels=1), data)
    with Image.open(io.BytesIO(image)) as opened:
        assert opened.mode == "L"
    np.testing.assert_array_equal(_pixels(image, "L"), _pixels(data, "L"))


@pytest.mark.parametrize(("kind", "mode"), [("BMP", "RGB"), ("GIF", "L"), ("TIFF", "RGB"), ("JPEG", "CMYK")])
def test_other_formats_and_modes_are_converted_without_loss(kind: str, mode: str) -> None:
    data = picture(2, mode=mode, kind=kind)
    np.testing.assert_array_equal(_pixels(_png(Recipe(), data)), _pixels(data))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_put_on_white(mode: str) -> None:
    data = picture(4, mode=mode, kind="PNG")
    layers = _pixels(data, "RGBA").astype(float)
    alpha = layers[3] / 255
    wanted = layers[:3] * alpha + 255 * (1 - alpha)
    for channels in (1, 3):
        image = _png(Recipe(channels=channels), data)
        grey = (np.array([0.299, 0.587, 0.114])[:, None, None] * wanted).sum(0, keepdims=True)
        found = _pixels(image, "RGB" if channels == 3 else "L")
        np.testing.assert_allclose(found, wanted if channels == 3 else grey, atol=1.5)


def test_a_palette_with_a_transparent_colour() -> None:
    image = Image.new("P", (10, 10), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((3, 2), 0)
    found = _pixels(Recipe().apply(_saved(image, "PNG", transparency=1))[1])
    assert found[:, 2, 3].tolist() == [255, 0, 0]
    assert (np.delete(found.reshape(3, -1), 23, axis=1) == 255).all()


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (2, lambda a: a[:, :, ::-1]),
        (3, lambda a: a[:, ::-1, ::-1]),
        (4, lambda a: a[:, ::-1]),
        (5, lambda a: a.transpose(0, 2, 1)),
        (6, lambda a: np.rot90(a, -1, (1, 2))),
        (7, lambda a: a[:, ::-1, ::-1].transpose(0, 2, 1)),
        (8, lambda a: np.rot90(a, 1, (1, 2))),
    ],
)
def test_images_are_set_upright(orientation: int, turn: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = picture(5, exif=exif)
    np.testing.assert_array_equal(_pixels(_png(Recipe(), data)), turn(_pixels(data)))
    exif[0x0112] = 1
    upright = picture(5, exif=exif)
    assert Recipe().apply(upright) == ("jpg", upright)


def test_sixteen_bits_become_eight() -> None:
    values = np.arange(100, dtype=np.uint16).reshape(10, 10) * 650
    found = _pixels(Recipe(channels=1).apply(_saved(Image.fromarray(values), "PNG"))[1], "L")
    np.testing.assert_array_equal(found[0], values >> 8)


def test_arrays_are_stored_as_they_are() -> None:
    random = np.random.default_rng(0)
    for shape in ((3, 9, 11), (1, 9, 11)):
        pixels = random.integers(0, 256, shape, dtype=np.uint8)
        image = _png(Recipe(channels=shape[0]), pixels)
        np.testing.assert_array_equal(_pixels(image, "RGB" if shape[0] == 3 else "L"), pixels)
        np.testing.assert_array_equal(decode(image, shape[0]), pixels)
    grey = random.integers(0, 256, (1, 9, 11), dtype=np.uint8)
    np.testing.assert_array_equal(decode(Recipe().apply(grey)[1], 3), np.repeat(grey, 3, axis=0))


@pytest.mark.parametrize(("size", "crop"), [(8, None), (8, 12), (None, 12), (40, None)])
def test_what_is_fitted_is_what_reading_would_fit(size: int | None, crop: int | None) -> None:
    data = picture(6, (30, 21))
    recipe = Recipe(size=size, crop=crop)
    found = _pixels(_png(recipe, data))
    np.testing.assert_array_equal(found, decode(data, 3, size, crop))
    assert found.shape == recipe.shape(None)


def test_a_crop_is_the_middle() -> None:
    data = picture(7, (31, 20), kind="PNG")
    np.testing.assert_array_equal(_pixels(Recipe(crop=10).apply(data)[1]), _pixels(data)[:, 5:15, 10:20])


@pytest.mark.parametrize(("encode", "kind"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_how_converted_images_are_written(encode: Encoding, kind: str) -> None:
    data = picture(8, (40, 40))
    extension, image = Recipe(size=20, encode=encode).apply(data)
    assert extension == encode
    with Image.open(io.BytesIO(image)) as opened:
        assert opened.format == kind
    assert np.abs(_pixels(image).astype(int) - decode(data, 3, 20).astype(int)).mean() < (1 if encode == "png" else 6)
    assert Recipe(size=20, encode=encode).apply(data) == (extension, image)


def test_nothing_of_the_old_file_is_left_in_a_converted_one() -> None:
    data = picture(9, exif=Image.Exif(), icc_profile=b"profile" * 20, comment=b"secret", dpi=(72, 72))
    with Image.open(io.BytesIO(Recipe(size=10).apply(data)[1])) as opened:
        assert opened.info == {}


def _bomb() -> bytes:
    header = _saved(Image.new("1", (8, 8)), "BMP")
    return header[:18] + (60_000).to_bytes(4, "little") * 2 + header[26:]


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", ()),
        (b"no image at all", ("JPEG, PNG, WEBP, BMP, GIF, TIFF",)),
        (picture(1)[:-30], ()),
        (picture(1, kind="PNG")[:-30], ()),
        (picture(1, (7, 40)), ("7 x 40", "min-side", 8)),
        (_saved(Image.new("1", (8000, 8000)), "PNG"), ("8000 x 8000", 50_000_000)),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n", ("JPEG",)),
        (_bomb(), (50_000_000,)),  # neither decoded nor warned of
        (picture(1, (9, 9)), ("9 x 9", "crop", 15)),
    ],
)
def test_what_cannot_be_used(data: bytes, named: tuple[object, ...]) -> None:
    for recipe in (Recipe(crop=15), Recipe(size=10, crop=15)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            told = error_of(lambda recipe=recipe: recipe.apply(data), *named, kind=Unreadable)
        assert " at 0x" not in told


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_damage_never_ends_in_another_error(kind: str) -> None:
    random = np.random.default_rng(0)
    whole = picture(10, mode="L" if kind == "GIF" else "RGB", kind=kind)
    for _ in range(150):
        damaged = bytearray(whole)
        for place in random.integers(0, min(len(whole), 200), 4):
            damaged[place] = random.integers(256)
        for recipe in (Recipe(), Recipe(size=8)):
            told = []
            for _ in range(2):
                try:
                    told.append(repr(recipe.apply(bytes(damaged))))
                except Unreadable as error:
                    told.append(str(error))
            assert told[0] == told[1]
            assert "\n" not in told[0]


@pytest.mark.parametrize(("name", "value"), [("size", 0), ("crop", -1), ("min_side", 5000), ("channels", 4)])
def test_senseless_numbers(name: str, value: int) -> None:
    error_of(lambda: Recipe(**{name: value}), f"--{name.replace('_', '-')} ({value})")  # type: ignore[arg-type]


def test_the_shape_is_known_where_it_can_be() -> None:
    assert Recipe().shape(None) is None
    assert Recipe().shape((3, 32, 30)) == (3, 32, 30)
    assert Recipe(channels=1).shape((3, 32, 30)) == (1, 32, 30)
    assert Recipe(crop=20).shape((3, 32, 30)) == (3, 20, 20)
    assert Recipe(size=64, crop=20).shape(None) == (3, 64, 64)
    error_of(lambda: Recipe(crop=31).shape((3, 32, 30)), "--crop (31)", "32 x 30")
    error_of(lambda: Recipe(min_side=31).shape((3, 32, 30)), "--min-side (31)", "32 x 30")
