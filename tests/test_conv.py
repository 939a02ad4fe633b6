"""Convolutional nets, VAE and gate: sizes, rows that know nothing of each other, gradients, importance weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from mixdist.experts import VAE, Compute, Expert, ExpertBank
from mixdist.gates import Gate, Softmax
from mixdist.nets import MLP, Conv
from mixdist.nets.conv import ConvDecoder, ConvEncoder
from mixdist.terms import Batch, Field, Spec

SPEC: Spec = {
    "x": Field((3, 9, 6), torch.uint8, scale=1 / 255),
    "grey": Field((1, 8, 8), torch.uint8, scale=1 / 16),
    "flat": Field((6,), torch.float64),
    "real": Field((1, 8, 8), torch.float64),
    "y": Field((), torch.uint8, num_classes=4),
}
SIZES = [(1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 45, 37), (1, 17, 40), (3, 128, 128), (2, 9, 5), (3, 109, 89)]
NETS: list[dict[str, Any]] = [
    {},
    {"residual": True, "activation": "silu"},
    {"norm": "group", "activation": "tanh"},
    {"residual": True, "norm": "group", "activation": "elu"},
]
KERNELS: list[dict[str, Any]] = [{"kernel": 4}, {"kernel": 5, "residual": True}]
VAES: list[dict[str, Any]] = [
    {"likelihood": "bernoulli"},
    {"likelihood": "gaussian", "residual": True},
    {"likelihood": "gaussian", "scale": 0.3, "norm": "group", "field": "grey"},
    {"likelihood": "laplace", "mean": "identity", "beta": 0.5, "free_bits": 0.3, "kl_warmup": 8, "field": "real"},
    {"likelihood": "logistic", "residual": True, "norm": "group", "activation": "silu"},
    {"likelihood": "logistic", "scale": 0.05, "field": "grey"},
    {"likelihood": "bernoulli", "kernel": 4},
]
NUM_SAMPLES = 500
nets, gates = pytest.mark.parametrize("net", NETS + KERNELS), pytest.mark.parametrize("net", NETS)
vaes = pytest.mark.parametrize("options", VAES)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _rows(num_rows: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(3)
    rows = {"id": torch.arange(num_rows), "y": torch.arange(num_rows) % 4, "flat": _random(num_rows, 6)}
    for name, levels in (("x", 256), ("grey", 17)):
        stored = torch.randint(0, levels, (num_rows, *SPEC[name].shape), generator=generator, dtype=torch.uint8)
        rows[name] = SPEC[name].values(stored, torch.float64)
    return {**rows, "real": _random(num_rows, 1, 8, 8)}


def _seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double()


def _vae(options: dict[str, Any], seed: int = 0) -> VAE:
    options = dict(options)
    net = {name: options.pop(name) for name in ("residual", "norm", "activation", "kernel") if name in options}
    expert = _seeded(partial(VAE, SPEC, latent=3, network=Conv([8, 12], **net), **options), seed)
    expert.anneal(4)
    return expert


def _gate(net: dict[str, Any]) -> Softmax:
    return _seeded(partial(Softmax, SPEC, 4, Conv([8, 12], **net), temperature=0.7))


# The two networks.


@nets
@pytest.mark.parametrize("image", SIZES, ids=str)
def test_a_decoder_gives_back_the_size_of_the_image(image: tuple[int, int, int], net: dict[str, Any]) -> None:
    channels, out = [4, 8, 12], (2 * image[0], *image[1:])
    encoder, decoder = ConvEncoder(image, channels, 5, **net), ConvDecoder(5, out, channels, **net)
    with torch.no_grad():
        z = encoder(torch.rand(2, *image))
        assert z.shape == (2, 5)
        assert decoder(z).shape == (2, math.prod(out))
        assert torch.equal(encoder(torch.ones(2, *image)), encoder(torch.ones(2, *image).flatten(1)))


@pytest.mark.parametrize("kernel", [3, 4, 5])
@pytest.mark.parametrize("image", SIZES, ids=str)
def test_the_sizes_of_levels_are_mirrored(image: tuple[int, int, int], kernel: int) -> None:
    channels, sizes = [4, 6, 8], []
    encoder, decoder = ConvEncoder(image, channels, 5, kernel=kernel), ConvDecoder(5, image, channels, kernel=kernel)
    for module in (*encoder.levels, *decoder.levels):
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            module.register_forward_hook(
                lambda _, inputs, output: sizes.append((inputs[0].shape[1:], output.shape[1:]))
            )
    with torch.no_grad():
        decoder(encoder(torch.rand(1, *image)))
    inward, outward = sizes[:3], sizes[3:]
    assert outward == [(b, a) for a, b in reversed(inward)]
    assert [b[1:] for _, b in inward] == [tuple(-(-side // 2**n) for side in image[1:]) for n in (1, 2, 3)]


@pytest.mark.parametrize("kernel", [3, 4, 5])
def test_a_level_of_the_decoder_is_the_transpose_of_the_encoders(kernel: int) -> None:
    # <A x, y> = <x, A' y> with the same weights, so the two are padded alike, whatever the parity of the sides.
    for height in range(2, 41):
        image = (2, height, 42 - height)
        (down,), (up,) = (
            [m for m in net.double().levels if isinstance(m, torch.nn.Conv2d | torch.nn.ConvTranspose2d)]
            for net in (ConvEncoder(image, [3], 1, kernel=kernel), ConvDecoder(1, image, [3], kernel=kernel))
        )
        assert up.weight.shape == down.weight.shape
        up.weight = down.weight
        with torch.no_grad():
            x, y = _random(1, *image), _random(1, 3, -(-height // 2), -(-(42 - height) // 2), seed=1)
            there, back = down(x), up(y)
            assert there.shape == y.shape
            assert back.shape == x.shape
            torch.testing.assert_close((there * y).sum(), (x * back).sum(), rtol=1e-10, atol=1e-10)
            down.weight.fill_(1.0)
            assert (up(torch.ones_like(y)) > 0).all()  # every pixel is seen
    for height, width in (1, 9), (9, 1):
        with pytest.raises(ValueError, match=r"^channels \[3\] have 1 levels, .* give at most 0$"):
            ConvEncoder((2, height, width), [3], 1, kernel=kernel)


def test_the_architecture_of_seed_document_004() -> None:
    vae = VAE({"x": Field((1, 28, 28), torch.uint8, scale=1 / 255)}, 8, Conv([8, 16, 32, 64], kernel=4))
    seen: list[tuple[int, ...]] = []
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            assert module.kernel_size == (4, 4)
            module.register_forward_hook(lambda _, inputs, output: seen.append(tuple(output.shape[1:])))
    assert vae.reconstruct({"x": torch.rand(2, 1, 28, 28)}).shape == (2, 1, 28, 28)
    inward = [(8, 14, 14), (16, 7, 7), (32, 4, 4), (64, 2, 2)]
    assert seen == [*inward, *inward[-2::-1], (1, 28, 28)]


def test_the_deepest_net_halves_to_a_single_pixel() -> None:
    image, channels = (3, 33, 40), [8] * 6
    assert ConvDecoder(2, image, channels)(ConvEncoder(image, channels, 2)(torch.rand(1, *image))).shape == (
        1,
        math.prod(image),
    )
    with pytest.raises(
        ValueError, match=r"^channels .* have 7 levels, but images of 33x40 are 1x1 after 6, .* at most 6"
    ):
        ConvEncoder(image, [8] * 7, 2)


@nets
def test_float32_is_kept_in_scale(net: dict[str, Any]) -> None:
    # Neither dying nor exploding over five levels; the initial weights are to keep a signal's size.
    image, channels = (3, 64, 64), [8, 16, 32, 32, 32]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        z = ConvEncoder(image, channels, 16, **net)(torch.rand(8, *image))
        x = ConvDecoder(16, image, channels, **net)(torch.randn(8, 16))
    assert 0.05 < z.std() < 5
    assert 0.05 < x.std() < 5


@nets
def test_channels_last_is_the_same_function(net: dict[str, Any]) -> None:
    image, channels = (3, 13, 10), [8, 12]
    encoder = _seeded(lambda: ConvEncoder(image, channels, 5, **net))
    decoder = _seeded(lambda: ConvDecoder(5, image, channels, **net))
    x = _random(4, *image)
    results = []
    for memory in (torch.contiguous_format, torch.channels_last):
        for module in (encoder, decoder):
            module.to(memory_format=memory)
            module.zero_grad()
        out = decoder(encoder(x.contiguous(memory_format=memory)))
        (out * _random(*out.shape, seed=1)).sum().backward()
        results.append([out.detach(), *(p.grad.clone() for m in (encoder, decoder) for p in m.parameters())])
    for plain, last in zip(*results, strict=True):
        torch.testing.assert_close(last, plain, rtol=1e-10, atol=1e-12)


# The expert and the gate.


@vaes
def test_a_row_depends_on_no_other(options: dict[str, Any]) -> None:
    expert, rows, eps = _vae(options), _rows(), _random(6, 3)
    whole = expert(rows, eps)
    for chosen in ([4], [5, 0, 2], [3, 1, 4, 5, 0, 2]):
        some = expert({name: column[chosen] for name, column in rows.items()}, eps[chosen])
        for part, field in zip(some, whole, strict=True):
            torch.testing.assert_close(part, field[chosen], rtol=1e-12, atol=1e-12)


@vaes
def test_every_parameter_has_a_gradient(options: dict[str, Any]) -> None:
    expert = _vae(options)
    expert(_rows(), _random(6, 3)).loss_R.sum().backward()
    for name, parameter in expert.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0, name
    assert ("likelihood.log_scale" in dict(expert.named_parameters())) == (
        options["likelihood"] != "bernoulli" and "scale" not in options
    )


@vaes
def test_terms_are_those_of_the_two_networks(options: dict[str, Any]) -> None:
    expert, rows, eps = _vae(options), _rows(), _random(6, 3)
    x, terms = rows[options.get("field", "x")], expert(rows, eps)
    mean, log_var = expert.encoder(x).split(3, dim=1)
    log_px = expert.likelihood.log_prob(x.flatten(1), expert.decoder(mean + (log_var / 2).exp() * eps).flatten(1))
    torch.testing.assert_close(terms.log_px_R, log_px)
    kl_RL = 0.5 * (mean**2 + log_var.exp() - 1 - log_var)
    torch.testing.assert_close(terms.kl_R, kl_RL.sum(1))
    weight = options.get("beta", 1.0) * (4 / options["kl_warmup"] if "kl_warmup" in options else 1.0)
    torch.testing.assert_close(terms.loss_R, weight * kl_RL.clamp(min=options.get("free_bits", 0.0)).sum(1) - log_px)


@vaes
def test_reconstructions_and_samples_are_images(options: dict[str, Any]) -> None:
    expert, shape = _vae(options), SPEC[options.get("field", "x")].shape
    for num_rows in (0, 1, 6):
        rows, z = _rows(num_rows), _random(num_rows, 3)
        assert expert.reconstruct(rows).shape == expert.sample(z).shape == (num_rows, *shape)
    rows = _rows()
    again = expert.sample(expert.encode(rows)[0])
    torch.testing.assert_close(expert.reconstruct(rows), again)
    if options.get("mean") != "identity":
        assert again.min() >= 0
        assert again.max() <= 1


@vaes
def test_importance_weights(options: dict[str, Any]) -> None:
    expert, rows, eps = _vae(options).eval(), _rows(4), _random(4, NUM_SAMPLES, 3)
    with torch.no_grad():
        log_w = expert.log_weights(rows, eps)
        one = expert(rows, eps[:, 7])
    assert log_w.shape == (4, NUM_SAMPLES)
    # With the same noise the two differ by the KL and its estimate from one sample alone.
    mean, log_var = expert.encode(rows)
    z = mean + (0.5 * log_var).exp() * eps[:, 7]
    log_ratio = (Normal(0.0, 1.0).log_prob(z) - Normal(mean, (0.5 * log_var).exp()).log_prob(z)).sum(1)
    torch.testing.assert_close(log_w[:, 7] - log_ratio, one.log_px_R)
    # Their mean over samples is the ELBO, here within five standard errors of both estimates.
    repeated = {name: column.repeat_interleave(NUM_SAMPLES, 0) for name, column in rows.items()}
    with torch.no_grad():
        terms = expert(repeated, _random(4 * NUM_SAMPLES, 3, seed=1))
    elbo = (terms.log_px_R - terms.kl_R).view(4, -1)
    error = ((elbo.var(1) + log_w.var(1)) / NUM_SAMPLES).sqrt()
    assert ((elbo.mean(1) - log_w.mean(1)).abs() < 5 * error + 1e-9).all()
    assert (log_w.logsumexp(1) - math.log(NUM_SAMPLES) >= log_w.mean(1)).all()


@gates
def test_the_gate_is_a_softmax_of_its_network(net: dict[str, Any]) -> None:
    gate, rows = _gate(net), _rows()
    log_resp = gate(rows, None).log_resp_BE
    torch.testing.assert_close(log_resp, (gate.net(rows["x"]) / 0.7).log_softmax(1))
    torch.testing.assert_close(log_resp.exp().sum(1), torch.ones(6).double())
    some = gate({name: column[[4, 1]] for name, column in rows.items()}, None).log_resp_BE
    torch.testing.assert_close(some, log_resp[[4, 1]], rtol=1e-12, atol=1e-12)
    log_resp[:, 1].sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in gate.parameters())
    assert gate.fields == ("x",)
    assert not any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in gate.modules())


@gates
def test_no_rows(net: dict[str, Any]) -> None:
    expert, gate = _vae({"likelihood": "logistic", **net}), _gate(net)
    terms, log_resp = expert(_rows(0), _random(0, 3)), gate(_rows(0), None).log_resp_BE
    assert all(field is not None and field.shape == (0,) for field in terms)
    assert log_resp.shape == (0, 4)
    assert expert.log_weights(_rows(0), _random(0, 5, 3)).shape == (0, 5)
    (terms.loss_R.sum() + log_resp.sum()).backward()
    for module in (expert, gate):
        assert all(p.grad is not None and p.grad.eq(0).all() for p in module.parameters())


def test_a_bank_runs_them_in_a_loop_and_refuses_to_stack() -> None:
    experts: dict[int, Expert] = {e: _vae(VAES[4], seed=e) for e in (1, 3)}
    rows, eps = _rows(), _random(2, 6, 3)
    expected = torch.stack([expert(rows, eps[i]).loss_R for i, expert in enumerate(experts.values())], 1)
    torch.testing.assert_close(
        ExpertBank(experts)(rows, lambda ids, numbers: eps[[e // 2 for e in numbers]]).loss_R, expected
    )
    with pytest.raises(ValueError, match="needs stackable experts, and VAE is not"):
        ExpertBank(experts, "stacked")


@pytest.mark.parametrize("scale", ["learned", 0.05])
def test_the_logistic_is_stacked_in_a_vae_that_stacks(scale: Any) -> None:
    make = partial(VAE, SPEC, latent=3, network=MLP([5]), likelihood="logistic", scale=scale, field="grey")
    banks = [ExpertBank({e: _seeded(make, e) for e in range(3)}, execution) for execution in ("loop", "stacked")]
    rows, eps = _rows(), _random(3, 6, 3)

    def noise(ids: Tensor, numbers: Sequence[int]) -> Tensor:
        return eps[list(numbers)]

    for bank in banks:
        bank(rows, noise).loss_R.sum().backward()
    torch.testing.assert_close(banks[1](rows, noise).loss_R, banks[0](rows, noise).loss_R)
    for name, parameter in banks[0].named_parameters():
        torch.testing.assert_close(banks[1].get_parameter(name).grad, parameter.grad)


def test_the_mass_of_a_pixel_sums_to_one_over_the_levels_of_the_field() -> None:
    for field, num_levels in (("x", 256), ("grey", 17)):
        likelihood = VAE(SPEC, network=Conv([4]), likelihood="logistic", field=field).double().likelihood
        levels = SPEC[field].values(torch.arange(num_levels, dtype=torch.uint8)[:, None], torch.float64)
        for output in (-30.0, -1.0, 0.2, 30.0):
            log_p = likelihood.log_prob(levels, torch.full_like(levels, output))
            assert log_p.logsumexp(0).item() == pytest.approx(0.0, abs=1e-9)


def test_the_stated_numbers_of_parameters() -> None:
    spec = {"x": Field((3, 64, 64), torch.uint8, scale=1 / 255)}
    for channels, latent, millions in ([64, 128, 256, 512], 160, 7.0), ([16, 32, 64, 128], 16, 0.3):
        count = sum(p.numel() for p in VAE(spec, latent, Conv(channels)).parameters())
        assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            partial(VAE, network=Conv(), field="flat"),
            r"network Conv needs images \(channels, height, width\), but rows",
        ),
        (partial(VAE, network=Conv([4] * 4)), r"channels \[4, 4, 4, 4\] have 4 levels, .* 9x6 are 2x1 after 3, "),
        (partial(VAE, network=Conv([])), r"channels \[\] must be at least one number from 1"),
        (partial(VAE, network=Conv([4, 0])), r"channels \[4, 0\] must be at least one number from 1"),
        (partial(VAE, network=Conv([4], kernel=2)), r"kernel \(2\) must be one of \[3, 4, 5\]"),
        (partial(VAE, network=Conv([4], kernel=6)), r"kernel \(6\) must be one of \[3, 4, 5\]"),
        (partial(VAE, likelihood="logistic", field="real"), "VAE's likelihood 'logistic' needs bytes that mean"),
        (partial(Softmax, num_experts=4, network=Conv(), field="flat"), "network Conv needs images"),
        (partial(Softmax, num_experts=4, network=Conv([4] * 5)), r"channels .* give at most 3"),
    ],
)
def test_what_is_refused(make: Callable[[Spec], Expert | Gate], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}") as caught:
        make(SPEC)
    assert "\n" not in str(caught.value)


def test_bfloat16_runs_the_networks_and_not_the_densities() -> None:
    vae = VAE(SPEC, 3, Conv([4]), likelihood="logistic").float()
    rows = {name: column.float() if column.is_floating_point() else column for name, column in _rows().items()}
    eps = _random(1, 6, 3).float()
    losses = []
    for bf16 in (False, True):
        bank = ExpertBank({0: vae}, "loop", Compute(bf16=bf16))
        terms = bank(rows, lambda ids, numbers: eps)
        assert terms.loss_R.dtype == torch.float32
        losses.append(terms.loss_R.detach())
    assert not torch.equal(*losses)
    torch.testing.assert_close(*losses, rtol=2e-2, atol=0.0)


@pytest.mark.parametrize("how", [Compute(channels_last=True), Compute(channels_last=True, micro_batch=4)])
def test_channels_last_changes_nothing_but_the_layout(how: Compute) -> None:
    rows, eps = _rows(), _random(1, 6, 3)
    results = []
    for compute in (Compute(), how):
        bank = ExpertBank({0: _vae(VAES[4])}, "loop", compute)
        loss = bank(rows, lambda ids, numbers: eps[:, ids]).loss_R
        loss.sum().backward()
        results.append([loss.detach(), *(p.grad for p in bank.parameters())])
    for got, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, wanted)
