"""Discriminators: at their optimum the log ratio of two densities, for each row on its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from mixdist.competition.discriminators import Discriminator, discriminator_loss
from mixdist.nets import MLP, Conv
from mixdist.terms import Field, Spec

SPEC: Spec = {
    "x": Field((2,), torch.float64),
    "image": Field((2, 9, 7), torch.uint8, scale=1 / 255),
    "label": Field((), torch.int64, num_classes=4),
}
KINDS: list[Callable[..., Discriminator]] = [
    Discriminator,
    partial(Discriminator, network=MLP([]), field="image"),
    partial(Discriminator, network=MLP([7, 5], "tanh"), field="image"),
    partial(Discriminator, network=Conv(), field="image"),
    partial(Discriminator, network=Conv([8, 16], norm="group", activation="silu"), field="image"),
]
kinds = pytest.mark.parametrize("kind", KINDS)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _make(kind: Callable[..., Discriminator], seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(SPEC).double()


def _rows(discriminator: Discriminator, num_rows: int) -> Tensor:
    (field,) = discriminator.fields
    return _random(num_rows, *SPEC[field].shape)


@kinds
def test_one_logit_a_row_that_depends_on_no_other(kind: Callable[..., Discriminator]) -> None:
    discriminator = _make(kind)
    x = _rows(discriminator, 11)
    logits = discriminator(x)
    assert logits.shape == (11,)
    assert logits.std() > 0
    for size in (1, 4, 11):
        torch.testing.assert_close(torch.cat([discriminator(p) for p in x.split(size)]), logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(discriminator(x.flip(0)), logits.flip(0), rtol=0, atol=1e-12)


@kinds
def test_gradients_reach_every_parameter_and_no_rows_give_none(kind: Callable[..., Discriminator]) -> None:
    discriminator = _make(kind)
    losses = discriminator_loss(*discriminator(_rows(discriminator, 12)).split([5, 7]))
    assert [loss.shape for loss in losses] == [(5,), (7,)]
    (losses[0].mean() + losses[1].mean()).backward()
    for name, parameter in discriminator.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    discriminator.zero_grad()
    discriminator(_rows(discriminator, 0)).sum().backward()
    assert all(p.grad.eq(0).all() for p in discriminator.parameters())


def test_the_loss_is_the_cross_entropy_of_data_against_samples() -> None:
    data, samples = 3 * _random(50), 3 * _random(40, seed=1)
    of_data, of_samples = discriminator_loss(data, samples)
    torch.testing.assert_close(of_data, -data.sigmoid().log(), rtol=1e-12, atol=0)
    torch.testing.assert_close(of_samples, -(1 - samples.sigmoid()).log(), rtol=1e-10, atol=0)
    far = torch.tensor([-1e4, 1e4]).double()
    assert [loss.tolist() for loss in discriminator_loss(far, far)] == [[1e4, 0.0], [0.0, 1e4]]


def test_the_loss_is_least_at_the_log_ratio_of_densities() -> None:
    # Both distributions over five points are known, so the two means are exact sums.
    p, q = _random(5).softmax(0), _random(5, seed=1).softmax(0)

    def loss(logits: Tensor) -> Tensor:
        of_data, of_samples = discriminator_loss(logits, logits)
        return p @ of_data + q @ of_samples

    best = (p.log() - q.log()).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(best), best)
    torch.testing.assert_close(gradient, torch.zeros(5).double(), rtol=0, atol=1e-15)
    mean = (p + q) / 2
    jensen_shannon = 0.5 * (p @ (p / mean).log() + q @ (q / mean).log())
    assert loss(best).item() == pytest.approx(2 * (math.log(2) - jensen_shannon.item()), rel=1e-12)
    assert all(loss(best) < loss(best + 0.1 * _random(5, seed=seed)) for seed in range(2, 6))


def test_a_trained_one_is_near_the_log_ratio_of_two_gaussians() -> None:
    data = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    expert = MultivariateNormal(torch.tensor([1.0, -0.5]).double(), torch.diag(torch.tensor([1.5, 0.8]).double()))
    generator = torch.Generator().manual_seed(0)

    def sample(of: MultivariateNormal, num_rows: int) -> Tensor:
        return of.mean + torch.randn(num_rows, 2, generator=generator, dtype=torch.float64) @ of.scale_tril.T

    discriminator = _make(partial(Discriminator, network=MLP([32], "silu")))
    steps = torch.optim.Adam(discriminator.parameters(), lr=0.01)
    for step in range(600):
        steps.param_groups[0]["lr"] = 0.01 * (1 - step / 600)
        steps.zero_grad()
        of_data, of_samples = discriminator_loss(discriminator(sample(data, 512)), discriminator(sample(expert, 512)))
        (of_data.mean() + of_samples.mean()).backward()
        steps.step()
    x = torch.cat([sample(data, 1000), sample(expert, 1000)])
    with torch.no_grad():
        error = discriminator(x) - (data.log_prob(x) - expert.log_prob(x))
    assert error.square().mean().sqrt() < 0.15
    assert error.mean().abs() < 0.1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (partial(Discriminator, field="z"), r"Discriminator needs the field 'z', but the data has \["),
        (partial(Discriminator, field="label"), "Discriminator needs real numbers, but the field 'label' holds"),
        (partial(Discriminator, network=MLP([5, 0])), r"layer widths \[2, 5, 0, 1\] must all be at least 1"),
        (partial(Discriminator, network=Conv()), r"network Conv needs images \(channels, height, width\), but rows"),
    ],
)
def test_what_is_refused(make: Callable[[Spec], Discriminator], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}") as caught:
        make(SPEC)
    assert "\n" not in str(caught.value)
