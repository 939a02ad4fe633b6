"""The bananas have the density and the entropy they say, and their samples follow it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm

from mixdist.data import Bananas, Dataset
from mixdist.data.sources.bananas import Modes
from mixdist.terms import Field
from tests.errors import error_of

MODES: tuple[Modes, ...] = (3, 5, 9)
FEW = [pytest.param(modes, marks=[pytest.mark.slow] if modes > 3 else []) for modes in MODES]
"""An integral over five or nine bananas takes seconds."""
NUM_BANANAS = {3: 3, 5: 6, 9: 9}


@pytest.mark.parametrize("separation", [0.0, 20.0, 80.0])
@pytest.mark.parametrize("modes", MODES)
def test_the_density_integrates_to_one(modes: Modes, separation: float) -> None:
    source = Bananas(modes, separation=separation)
    step = 0.25  # original units: a quarter of the standard deviation across a banana
    axes = [torch.arange(-separation - low, separation + high, step).double() for low, high in ((60, 60), (12, 150))]
    grid = torch.cartesian_prod(*axes) / source.unit
    mass = source.log_density(grid).exp().sum().item() * (step / source.unit) ** 2
    assert mass == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("modes", MODES)
def test_rows_follow_the_seeds_formula(modes: Modes) -> None:
    source = Bananas(modes, rows=30000, test_rows=6000, seed=4)
    centres, label = source.components()
    assert len(centres) == len(label) == NUM_BANANAS[modes]
    for part in source.load()[:2]:
        component = part.rows["id"] % len(centres)
        assert torch.equal(part.rows["y"].long(), label[component])
        for c in range(len(centres)):
            x1, x2 = (part.rows["x"][component == c].double() - centres[c]).numpy().T
            straight = x2 - 0.04 * x1**2 + 4
            assert kstest(x1, norm(scale=10).cdf).pvalue > 1e-3
            assert kstest(straight, norm.cdf).pvalue > 1e-3
            assert abs(np.corrcoef(x1, straight)[0, 1]) < 4 / math.sqrt(len(x1))


@pytest.mark.parametrize("modes", MODES)
def test_the_log_density_of_rows_is_by_hand_the_same(modes: Modes) -> None:
    source = Bananas(modes, rows=500, test_rows=1, separation=15.0)
    train = source.load().train
    stored = train.rows["x"].double().numpy()
    density = np.zeros(len(stored))
    for centre in source.components()[0].numpy():
        x1, x2 = (stored - centre).T
        density += norm.pdf(x1, scale=10) * norm.pdf(x2, loc=0.04 * x1**2 - 4) / NUM_BANANAS[modes]
    assert train.log_density_N is not None
    np.testing.assert_allclose(train.log_density_N, np.log(density) + 2 * math.log(source.unit), rtol=0, atol=1e-10)
    float32 = train.spec["x"].values(train.rows["x"], torch.float32)
    np.testing.assert_allclose(source.log_density(float32), train.log_density_N, rtol=0, atol=1e-3)


@pytest.mark.parametrize("separation", [10.0, pytest.param(80.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("modes", FEW)
def test_the_mean_log_density_is_minus_the_entropy(modes: Modes, separation: float) -> None:
    source = Bananas(modes, rows=36000, test_rows=9000, separation=separation, seed=1)
    for part in source.load()[:2]:
        log_p = part.log_density_N
        assert log_p is not None
        error = log_p.std().item() / math.sqrt(len(part))
        assert abs(log_p.mean().item() + source.entropy()) < 4 * error


@pytest.mark.parametrize("modes", FEW)
def test_the_entropy_of_bananas_that_hardly_overlap(modes: Modes) -> None:
    source = Bananas(modes)
    one = math.log(2 * math.pi * math.e * 10) - 2 * math.log(source.unit)
    missing = math.log(NUM_BANANAS[modes]) + one - source.entropy()
    assert 0 <= missing < 2e-4
    assert Bananas(modes, separation=1e3).entropy() + 2 * math.log(Bananas(modes, separation=1e3).unit) == (
        pytest.approx(math.log(NUM_BANANAS[modes]) + math.log(2 * math.pi * math.e * 10), abs=1e-9)
    )


def test_bananas_in_one_place_are_one_banana() -> None:
    source = Bananas(9, separation=0.0)
    assert source.unit == pytest.approx(math.sqrt(133 / 2))
    assert source.entropy() == pytest.approx(math.log(2 * math.pi * math.e * 10) - math.log(133 / 2), abs=1e-9)


@pytest.mark.parametrize("modes", MODES)
def test_values_are_standardised_alike_in_both_directions(modes: Modes) -> None:
    source = Bananas(modes, rows=60000, test_rows=1)
    train = source.load().train
    values = train.spec["x"].values(train.rows["x"], torch.float64)
    assert train.rows["x"].dtype == torch.float32
    assert torch.allclose(values.mean(0), torch.zeros(2, dtype=torch.float64), atol=0.01)
    assert values.square().mean().item() == pytest.approx(1.0, abs=0.02)
    torch.testing.assert_close(values * source.unit, train.rows["x"].double())


@pytest.mark.parametrize("modes", MODES)
def test_modes_are_apart_and_the_twins_are_close(modes: Modes) -> None:
    source = Bananas(modes, separation=50.0)
    centres, label = source.components()
    apart = torch.cdist(centres, centres)[label[:, None] != label]
    assert apart.min().item() == pytest.approx(50.0, rel=0.02 if modes != 5 else 0.1)
    assert label.unique().tolist() == list(range(modes))
    twins = (label[:, None] == label) & ~torch.eye(len(label), dtype=torch.bool)
    assert torch.cdist(centres, centres)[twins].tolist() == ([pytest.approx(50 / 8)] * 2 if modes == 5 else [])


@pytest.mark.parametrize("modes", MODES)
def test_ids_labels_and_repetition(modes: Modes) -> None:
    source = Bananas(modes, rows=901, test_rows=100, seed=2)
    (train, test, _), again = source.load(), source.load().train
    assert torch.equal(torch.cat([train.rows["id"], test.rows["id"]]), torch.arange(1001))
    assert train.label == "y"
    assert train.num_classes == test.num_classes == modes
    assert torch.equal(train.rows["x"], again.rows["x"])
    assert train.fingerprint == again.fingerprint != Bananas(modes, rows=901, seed=3).load()[0].fingerprint
    # More rows are the same rows and more.
    assert torch.equal(Bananas(modes, rows=950, seed=2).load()[0].rows["x"][:901], train.rows["x"])


def test_the_default_size_is_the_seeds() -> None:
    assert (Bananas().rows, Bananas().modes) == (64000, 3)


def _dataset(log_density: torch.Tensor | None) -> Dataset:
    rows = {"id": torch.tensor([7, 8]), "x": torch.zeros(2, 2)}
    return Dataset(rows, {"x": Field((2,), torch.float32)}, log_density_N=log_density)


def test_a_log_density_stands_beside_the_rows() -> None:
    log_density = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    known, unknown = _dataset(log_density), _dataset(None)
    assert known.log_density_N is log_density
    assert known.fingerprint == unknown.fingerprint
    assert known.take(torch.tensor([1])).keys() == {"id", "x"}


@pytest.mark.parametrize(
    ("log_density", "named"),
    [
        (torch.zeros(2), "torch.float32"),
        (torch.zeros(3, dtype=torch.float64), "(3,)"),
        (torch.zeros(2, 1, dtype=torch.float64), "(2, 1)"),
        (torch.tensor([0.0, -math.inf]).double(), "sample 8 (-inf)"),
    ],
)
def test_a_log_density_is_one_finite_number_a_row(log_density: torch.Tensor, named: str) -> None:
    error_of(lambda: _dataset(log_density), "log_density_N", named)
