"""Mixtures of discretised logistics: masses of levels, against scipy's distribution functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import logistic
from torch import Tensor

from mixdist.experts import VAE
from mixdist.nets import MLP, Conv
from mixdist.nets.likelihood import Likelihood
from mixdist.terms import Field

K, D = 3, 5


def made(components: int = K, **more: Any) -> Likelihood:
    return Likelihood("logistic", "decoder", "sigmoid", shape=(D,), components=components, **more).double()


def outputs(num_rows: int = 4, maps: int = 3 * K) -> Tensor:
    return 1.5 * torch.randn(num_rows, maps * D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def masses(one: Likelihood, output: Tensor, levels: int = 256) -> Tensor:
    """The mass of every level, (levels, R, D), each number by itself."""
    maps = output.unflatten(-1, (one.num_maps, D)).transpose(-1, -2).reshape(-1, one.num_maps)
    x = (torch.arange(levels, dtype=torch.float64) / (levels - 1))[:, None, None].expand(-1, len(maps), 1)
    return torch.stack([one.log_prob(level, maps) for level in x]).exp().reshape(levels, len(output), D)


@pytest.mark.parametrize("floor", [None, 0.05])
def test_masses_are_scipy_s_and_sum_to_one(floor: float | None) -> None:
    one, output = made(floor=floor), outputs()
    mass = masses(one, output)
    torch.testing.assert_close(mass.sum(0), torch.ones(4, D).double())
    location, raw, logits = (part.unflatten(-1, (K, D)) for part in output.chunk(3, dim=-1))
    scale = 0.1 * raw.exp() + (0.001 if floor is None else floor)
    edges = torch.cat([torch.tensor([-torch.inf]), torch.arange(255) + 0.5, torch.tensor([torch.inf])]).double() / 255
    below = logistic.cdf(edges[:, None, None, None].numpy(), location.sigmoid().numpy(), scale.numpy())
    wanted = (logits.softmax(1) * torch.from_numpy(below).diff(dim=0)).sum(2)
    torch.testing.assert_close(mass, wanted, rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(one.mean(output), (logits.softmax(1) * location.sigmoid()).sum(1))


def test_alike_components_are_one() -> None:
    single, output = outputs(maps=2), []
    for part in single.chunk(2, dim=-1):
        output += [part] * K
    output += [torch.randn(4, D).double() for _ in range(K)]
    x = torch.randint(256, (4, D)).double() / 255
    torch.testing.assert_close(made().log_prob(x, torch.cat(output, -1)), made(1).log_prob(x, single))


def test_draws_have_their_masses() -> None:
    """Of evenly spread numbers as many fall to a level as its mass says, up to one at each end of a part."""
    one, count = made(num_levels=16), 20_000
    output = outputs(1)
    mass = masses(one, output, 16)[:, 0]
    u = ((torch.arange(count).double() + 0.5) / count)[:, None].expand(-1, D)
    x = one.draw(output.expand(count, -1), u)
    for level in range(16):
        part = (x * 15).round().eq(level).double().mean(0)
        assert (part - mass[level]).abs().max() <= 2 * K / count


def test_gradients_and_a_vae() -> None:
    x = torch.tensor([[0.0, 1.0, 7 / 255, 0.5 - 0.5 / 255, 1.0]]).double()
    assert torch.autograd.gradcheck(lambda output: made().log_prob(x, output), outputs(1).requires_grad_())
    spec = {"x": Field((1, 8, 8), torch.uint8, 1 / 255)}
    for network in (MLP([9]), Conv([4])):
        expert = VAE(spec, 2, network, "logistic", "decoder", components=K)
        rows = {"id": torch.arange(3), "x": torch.randint(256, (3, 1, 8, 8)) / 255}
        terms = expert(rows, torch.randn(3, 2))
        assert terms.log_px_R is not None
        assert (terms.log_px_R < 0).all()
        assert expert.log_weights(rows, torch.randn(3, 6, 2)).shape == (3, 6)
        drawn = expert.draw(torch.randn(3, 2), torch.rand(3, 1, 8, 8)) * 255
        torch.testing.assert_close(drawn, drawn.round(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "scale", "components"),
    [("logistic", "learned", 2), ("gaussian", "decoder", 2), ("logistic", "decoder", 0)],
)
def test_what_has_no_components_is_refused(name: Any, scale: Any, components: int) -> None:
    with pytest.raises(ValueError, match=rf"components \({components}\).* with {scale}"):
        Likelihood(name, scale, "sigmoid", shape=(D,), components=components)


def test_stacked_outputs_are_each_by_itself() -> None:
    x, one = torch.randint(256, (4, D)).double() / 255, made()
    stacked = torch.stack([outputs(), 0.3 * outputs()])
    torch.testing.assert_close(one.log_prob(x, stacked), torch.stack([one.log_prob(x, output) for output in stacked]))
    assert one.mean(stacked).shape == (2, 4, D)
