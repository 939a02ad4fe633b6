"""Networks: plain formulas, sizes, mirrored convolutions, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixdist.nets import MLP, Conv, Deconv, Network
from mixdist.nets.mlp import Affine
from tests.test_experts import close, random

SIZES = [(1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 45, 37), (1, 17, 40), (3, 128, 128), (2, 9, 5), (3, 109, 89)]
CONVS: list[dict[str, Any]] = [
    {},
    {"residual": True, "activation": "silu"},
    {"norm": "group", "activation": "tanh"},
    {"residual": True, "norm": "group", "activation": "elu"},
    {"kernel": 4},
    {"kernel": 5, "residual": True},
]
convs = pytest.mark.parametrize("options", CONVS)
NETWORKS = [MLP([]), MLP([5, 4], "tanh"), MLP(), *(Conv([4, 8, 12], **options) for options in CONVS)]


DEEPEST = (3, 33, 40), Conv([8] * 6)  # halves to a single pixel


@pytest.mark.parametrize(("shape", "network"), [*product(SIZES, NETWORKS), DEEPEST])
def test_rows_in_and_rows_out(shape: tuple[int, int, int], network: Network) -> None:
    num_values = math.prod(shape)
    encoder, decoder = network.encoder(shape, 5), network.decoder(5, shape, num_maps=2)
    with torch.no_grad():
        assert encoder(torch.rand(2, num_values)).shape == (2, 5)
        assert decoder(torch.rand(2, 5)).shape == (2, 2 * num_values)
        assert encoder(torch.rand(0, num_values)).shape == (0, 5)
        assert decoder(torch.rand(0, 5)).shape == (0, 2 * num_values)


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
def test_an_mlp_is_affine_maps_with_an_activation_between_them(activation: Any) -> None:
    network, x = MLP([5, 4], activation), random(7, 6)
    encoder, decoder = network.encoder((2, 3), 3).double(), network.decoder(3, (2, 3)).double()
    for module, rows in ((encoder, x), (decoder, x[:, :3])):
        affine = [layer for layer in module.layers if isinstance(layer, Affine)]
        for layer in affine:
            nn.init.normal_(layer.bias)
        expected: Tensor = rows
        for layer in affine[:-1]:
            expected = getattr(torch, activation)(expected @ layer.weight + layer.bias)
        close(module(rows), expected @ affine[-1].weight + affine[-1].bias)
    inward, outward = ([p.numel() for p in m.parameters() if p.dim() == 1] for m in (encoder, decoder))
    assert (inward, outward) == ([5, 4, 3], [4, 5, 6])  # the decoder mirrors the encoder


@pytest.mark.parametrize("kernel", [3, 4, 5])
@pytest.mark.parametrize("image", SIZES, ids=str)
def test_the_sizes_of_levels_are_mirrored(image: tuple[int, int, int], kernel: int) -> None:
    network, sizes = Conv([4, 6, 8], kernel=kernel), []
    encoder, decoder = network.encoder(image, 5), network.decoder(5, image)
    for module in (*encoder.levels, *decoder.levels):
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            module.register_forward_hook(
                lambda _, inputs, output: sizes.append((inputs[0].shape[1:], output.shape[1:]))
            )
    with torch.no_grad():
        decoder(encoder(torch.rand(1, math.prod(image))))
    inward, outward = sizes[:3], sizes[3:]
    assert outward == [(b, a) for a, b in reversed(inward)]
    assert [b[1:] for _, b in inward] == [tuple(-(-side // 2**n) for side in image[1:]) for n in (1, 2, 3)]


@pytest.mark.parametrize("kernel", [3, 4, 5])
def test_a_level_of_the_decoder_is_the_transpose_of_the_encoders(kernel: int) -> None:
    # <A x, y> = <x, A' y> with the same weights, so the two are padded alike, whatever the parity of the sides.
    network = Conv([3], kernel=kernel)
    for height in range(2, 41):
        image = (2, height, 42 - height)
        (down,), (up,) = (
            [m for m in net.double().levels if isinstance(m, torch.nn.Conv2d | torch.nn.ConvTranspose2d)]
            for net in (network.encoder(image, 1), network.decoder(1, image))
        )
        assert up.weight.shape == down.weight.shape
        up.weight = down.weight
        with torch.no_grad():
            x, y = random(1, *image), random(1, 3, -(-height // 2), -(-(42 - height) // 2), seed=1)
            there, back = down(x), up(y)
            assert there.shape == y.shape
            assert back.shape == x.shape
            torch.testing.assert_close((there * y).sum(), (x * back).sum(), rtol=1e-10, atol=1e-10)
            down.weight.fill_(1.0)
            assert (up(torch.ones_like(y)) > 0).all()  # every pixel is seen


@convs
def test_float32_is_kept_in_scale(options: dict[str, Any]) -> None:
    # Neither dying nor exploding over five levels; the initial weights are to keep a signal's size.
    shape, network = (3, 64, 64), Conv([8, 16, 32, 32, 32], **options)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        z = network.encoder(shape, 16)(torch.rand(8, *shape).flatten(1))
        x = network.decoder(16, shape)(torch.randn(8, 16))
    assert 0.05 < z.std() < 5
    assert 0.05 < x.std() < 5


@convs
def test_channels_last_is_the_same_function(options: dict[str, Any]) -> None:
    shape, network, x = (3, 13, 10), Conv([8, 12], **options), random(4, 3, 13, 10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        both = nn.Sequential(network.encoder(shape, 5), network.decoder(5, shape)).double()
    results = []
    for memory in (torch.contiguous_format, torch.channels_last):
        both.to(memory_format=memory).zero_grad()  # type: ignore[call-overload]
        out = both(x.contiguous(memory_format=memory))
        (out * random(*out.shape, seed=1)).sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in both.parameters() if p.grad is not None)])
    for plain, last in zip(*results, strict=True):
        close(last, plain, rtol=1e-10)


@pytest.mark.parametrize(
    ("network", "shape", "named"),
    [
        (MLP([3, 0]), (6,), ["layer widths", "0", "hidden"]),
        (Conv(), (6,), ["images", "(6,)", "MLP"]),
        (Conv([4] * 4), (3, 9, 6), ["channels [4, 4, 4, 4] have 4 levels", "9x6 are 2x1 after 3", "at most 3"]),
        (Conv([8] * 7), (3, 33, 40), ["have 7 levels", "33x40 are 1x1 after 6", "at most 6"]),
        (Conv([3]), (2, 1, 9), ["1 levels", "at most 0"]),
        (Conv([3]), (2, 9, 1), ["1 levels", "at most 0"]),
        (Conv([]), (3, 9, 6), ["channels []"]),
        (Conv([4, 0]), (3, 9, 6), ["channels [4, 0]"]),
        (Conv([4], kernel=2), (3, 9, 6), ["kernel (2)", "[3, 4, 5]"]),
        (Conv([4], kernel=6), (3, 9, 6), ["kernel (6)", "[3, 4, 5]"]),
        (Conv([1] * 4, norm="group"), (1, 9, 9), ["norm 'group'", "single value"]),
    ],
)
def test_what_is_refused_is_named_in_one_line(network: Network, shape: tuple[int, ...], named: list[str]) -> None:
    for make in (partial(network.encoder, shape, 2), partial(network.decoder, 2, shape)):
        with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
            make()
        assert all(part in str(caught.value) for part in named)


DECONV_SIZES = [
    ((4, 8, 8), (3, 64, 64), 6, [1, 1, 2, 1, 2, 1, 2]),
    ((4, 8, 8), (3, 32, 32), 6, [1, 1, 1, 2, 1, 1, 2]),
    ((4, 7, 7), (1, 28, 28), 1, [2, 2]),
    ((4, 5, 3), (2, 33, 20), 2, [2, 2, 2]),
    ((4, 6, 5), (1, 6, 5), 0, [1]),
]


@pytest.mark.parametrize("norm", ["none", "group"])
@pytest.mark.parametrize(("feature", "image", "hidden", "strides"), DECONV_SIZES)
def test_a_feature_map_becomes_an_image(
    feature: tuple[int, int, int], image: tuple[int, int, int], hidden: int, strides: list[int], norm: Any
) -> None:
    """Each layer is the transpose of a convolution, and doublings are spread over the layers."""
    decoder = Deconv(feature, [8] * hidden, norm).decoder(math.prod(feature), image, num_maps=2)
    convs = [layer for layer in decoder.modules() if isinstance(layer, nn.ConvTranspose2d)]
    assert [layer.stride[0] for layer in convs] == strides
    assert sum(isinstance(layer, nn.ReLU) for layer in decoder.modules()) == hidden
    x = random(3, math.prod(feature)).float()
    with torch.no_grad():
        assert decoder(x).shape == (3, 2 * math.prod(image))
        assert decoder(x[:0]).shape == (0, 2 * math.prod(image))
        torch.testing.assert_close(decoder(x)[1:2], decoder(x[1:2]), rtol=1e-4, atol=1e-5)


def test_a_deconvolution_keeps_the_scale_of_a_signal() -> None:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        decoder = Deconv((16, 8, 8), [16] * 6).decoder(16 * 64, (3, 64, 64))
        assert 0.2 < decoder(torch.randn(4, 16 * 64)).std() < 5


@pytest.mark.parametrize(
    ("make", "shape", "named"),
    [
        (Deconv, (6,), ["Deconv needs images", "(6,)"]),
        (partial(Deconv, (4, 8, 8)), (3, 32, 32), ["feature [4, 8, 8] has 256 numbers", "500 come in", "features to"]),
        (partial(Deconv, (5, 10, 10)), (1, 28, 28), ["[5, 10, 10]", "28x28", "7x7"]),
        (partial(Deconv, (500, 1, 1), [4]), (3, 32, 32), ["channels [4]", "5 doublings", "at least 4"]),
        (partial(Deconv, (4, 8)), (3, 32, 32), ["feature [4, 8]", "[256, 8, 8]"]),
        (partial(Deconv, (500, 1, 1), [4, 0]), (3, 2, 2), ["channels [4, 0]"]),
    ],
)
def test_a_feature_map_that_does_not_fit_is_named_in_one_line(
    make: Callable[..., Deconv], shape: tuple[int, ...], named: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        make().decoder(500, shape)
    assert all(part in str(caught.value) for part in named)
    with pytest.raises(ValueError, match="Conv for an encoder"):
        Deconv().encoder((3, 32, 32), 4)
