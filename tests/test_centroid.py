"""The centroid: an exact density, the exact M-step, and with hard assignments scikit-learn's k-means."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import Tensor
from torch.distributions import Normal

from mixdist.experts import Centroid, ExpertBank
from mixdist.terms import Batch, Field, Spec

SPEC: Spec = {
    "x": Field((5,), torch.float64),
    "image": Field((2, 3, 2), torch.uint8, scale=1 / 255),
    "far": Field((4000,), torch.float64, offset=-7.0),
    "label": Field((), torch.int64, num_classes=4),
}
DIGITS: Spec = {"x": Field((1, 8, 8), torch.float64)}
scales = pytest.mark.parametrize("scale", [1.0, 0.3, 2.0])


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _rows(num_rows: int = 7) -> Batch:
    return {"id": torch.arange(num_rows), "x": _random(num_rows, 5), "image": _random(num_rows, 2, 3, 2).sigmoid()}


def _make(seed: int = 0, **options: Any) -> Centroid:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Centroid(SPEC, **options).double()


@scales
@pytest.mark.parametrize("field", ["x", "image"])
def test_the_density_is_exact(field: str, scale: float) -> None:
    expert, rows = _make(scale=scale, field=field), _rows()
    terms = expert(rows, None)
    expected = Normal(expert.mean, scale).log_prob(rows[field].flatten(1)).sum(1)
    torch.testing.assert_close(terms.log_px_R, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(terms.loss_R, -terms.log_px_R)
    assert terms.kl_R is None
    assert not expert.can("log_weights")
    assert torch.equal(expert(rows, _random(7, *expert.noise_shape)).loss_R, terms.loss_R)


@scales
def test_the_distance_is_of_differences(scale: float) -> None:
    # |x|^2 - 2 x m + |m|^2 would lose everything here.
    expert = _make(scale=scale)
    with torch.no_grad():
        expert.mean.fill_(1e8)
        x = torch.tensor([[1e8] * 5, [1e8 + 1] * 5], dtype=torch.float64)
        near = expert({"id": torch.arange(2), "x": x}, None).loss_R
    assert (near[1] - near[0]).item() == pytest.approx(5 / (2 * scale**2), rel=1e-12)


@scales
def test_one_step_on_all_rows_is_the_mean(scale: float) -> None:
    expert, rows = _make(scale=scale), _rows()
    step = torch.optim.SGD(expert.parameters(), lr=scale**2)
    before = expert.mean.detach().clone()
    expert(rows, None).loss_R.mean().backward()
    torch.testing.assert_close(expert.mean.grad, (before - rows["x"].mean(0)) / scale**2, rtol=1e-13, atol=1e-14)
    step.step()
    torch.testing.assert_close(expert.mean[0], rows["x"].mean(0), rtol=1e-13, atol=1e-14)
    assert [name for name, _ in expert.named_parameters()] == ["mean"]
    assert expert.mean.numel() == 5


@scales
@pytest.mark.parametrize("field", ["x", "image"])
def test_samples_and_reconstructions(field: str, scale: float) -> None:
    expert, shape = _make(scale=scale, field=field), SPEC[field].shape
    eps = _random(6, *expert.noise_shape)
    assert expert.can("sample")
    assert expert.can("draw")
    x = expert.sample(eps)
    assert x.shape == (6, *shape)
    assert torch.equal(expert.draw(eps, torch.full((6, *shape), 0.5).double()), x)
    torch.testing.assert_close(Normal(expert.mean, scale).cdf(x.flatten(1)), Normal(0.0, 1.0).cdf(eps))
    for num_rows in (0, 1, 7):
        with torch.no_grad():
            again = expert.reconstruct(_rows(num_rows))
        assert not again.requires_grad
        assert again.shape == (num_rows, *shape)
        assert torch.equal(again.flatten(1), expert.mean.expand(num_rows, -1))
        assert expert.sample(eps[:0]).shape == (0, *shape)


def test_no_rows() -> None:
    expert = _make()
    terms = expert(_rows(0), None)
    assert terms.loss_R.shape == (0,)
    terms.loss_R.sum().backward()
    assert expert.mean.grad is not None
    assert expert.mean.grad.eq(0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_a_stack_is_its_experts(masked: bool) -> None:
    mask = _random(7, 3, seed=3) < 0.3 if masked else None
    results = []
    for execution in ("loop", "stacked"):
        bank = ExpertBank({e: _make(seed=e, scale=0.7) for e in (1, 4, 6)}, execution)
        losses = bank(_rows(), None, mask).loss_R
        (losses * _random(7, 3, seed=1)).sum().backward()
        results.append([losses.detach(), *(p.grad for p in bank.parameters())])
    for stacked, alone in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(stacked, alone, rtol=1e-12, atol=1e-13)


def test_centres_start_about_the_middle_of_the_values() -> None:
    first, second = _make(0, field="far").mean, _make(1, field="far").mean
    assert not torch.equal(first, second)
    assert (first.mean() + 7).abs() < 5 * 0.1 / math.sqrt(4000)
    assert first.std().item() == pytest.approx(0.1, rel=0.1)
    assert (torch.cat([_make(seed, field="image").mean for seed in range(100)]).mean() - 0.5).abs() < 0.02


@pytest.mark.parametrize("num_clusters", [3, 10])
def test_rounds_are_the_iterations_of_lloyd(num_clusters: int) -> None:
    # Centres near samples, so that none is empty; not at them: pixels are whole numbers, some rows would be as far from
    # one centre as from another, and scikit-learn breaks such ties by its rounding.
    x = torch.from_numpy(load_digits().data)
    chosen = np.random.default_rng(0).choice(len(x), num_clusters, replace=False)
    centres = x[torch.from_numpy(chosen)] + 0.01 * _random(num_clusters, 64)
    experts = [Centroid(DIGITS).double() for _ in range(num_clusters)]
    for expert, centre in zip(experts, centres, strict=True):
        expert.mean.data.copy_(centre)
    rows, moved = {"id": torch.arange(len(x)), "x": x.view(-1, 1, 8, 8)}, []
    for num_rounds in range(1, 11):
        with torch.no_grad():
            owner = torch.stack([-expert(rows, None).loss_R for expert in experts], 1).argmax(1)
        for e, expert in enumerate(experts):
            own = {name: column[owner == e] for name, column in rows.items()}
            assert len(own["id"]), f"cluster {e} is empty in round {num_rounds}: choose other centres"
            step = torch.optim.SGD(expert.parameters(), lr=1.0)
            expert(own, None).loss_R.mean().backward()
            step.step()
            expert.zero_grad()
        means = torch.cat([expert.mean.detach() for expert in experts])
        judge = KMeans(num_clusters, init=centres, n_init=1, algorithm="lloyd", tol=0, max_iter=num_rounds).fit(x)
        torch.testing.assert_close(means, torch.from_numpy(judge.cluster_centers_), rtol=0, atol=1e-8)
        moved.append(judge.n_iter_)
    assert moved == list(range(1, 11))  # it had not converged, so each round was a test


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (partial(Centroid, field="z"), "Centroid needs the field 'z', but the data has"),
        (partial(Centroid, field="label"), "Centroid needs real numbers, but the field 'label' holds 4 classes"),
        (partial(Centroid, scale=0.0), r"Centroid's scale \(0.0\) must be a positive number"),
        (partial(Centroid, scale=math.nan), r"Centroid's scale \(nan\) must be a positive number"),
    ],
)
def test_what_is_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}") as caught:
        make(SPEC)
    assert "\n" not in str(caught.value)
