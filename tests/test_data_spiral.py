"""The spiral of seed document 001, and affine targets over data with classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mixdist.data import AffineTargets, Blobs, Digits, Source, Spiral, Splits


def test_arms_go_outwards_and_around() -> None:
    train, test, valid = Spiral(rows=500, test_rows=50, noise=0.0).load()
    assert valid is None
    assert (len(train), len(test), train.label, train.num_classes) == (500, 50, "arm", 5)
    assert torch.equal(torch.cat([train.ids, test.ids]), torch.arange(550))
    for part, each in ((train, 100), (test, 10)):
        x, arm = part.rows["x"].double(), part.rows["arm"]
        assert arm.bincount().tolist() == [each] * 5
        radius, angle = x.norm(dim=1), torch.atan2(x[:, 0], x[:, 1])
        for j in range(5):
            own = radius[arm == j]
            torch.testing.assert_close(own, torch.linspace(2.5, 10, each).double(), rtol=1e-6, atol=1e-6)
            turned = torch.linspace(1.25 * j, 1.25 * (j + 1), each).double()
            off = (angle[arm == j] - turned + math.pi) % (2 * math.pi) - math.pi
            assert off.abs().max() < 1e-5


def test_noise_is_on_the_angle() -> None:
    still, noisy = (Spiral(rows=5000, noise=noise).load().train.rows["x"].double() for noise in (0.0, 0.05))
    torch.testing.assert_close(still.norm(dim=1), noisy.norm(dim=1), rtol=1e-5, atol=1e-5)
    turned = torch.atan2(*noisy.T) - torch.atan2(*still.T)
    turned = (turned + math.pi) % (2 * math.pi) - math.pi
    assert abs(turned.std() - 0.05) < 0.003


@pytest.mark.parametrize(("source", "label"), [(Spiral(300, 60), "arm"), (Digits(), "y")], ids=["spiral", "digits"])
def test_one_affine_map_for_each_class_fits_exactly(source: Source, label: str) -> None:
    train, test, _ = AffineTargets(source, outputs=3, seed=4).load()
    assert train.spec["target"].shape == (3,)
    assert train.label == label
    maps = [solved(part, part.rows[label] == 1) for part in (train, test)]
    assert maps[0][1] < 1e-8
    assert solved(train, torch.ones(len(train), dtype=torch.bool))[1] > 1.0  # no single map does
    if label == "arm":
        np.testing.assert_allclose(maps[0][0], maps[1][0], rtol=1e-3)  # the same one in both splits


def test_one_map_for_all_is_linear() -> None:
    train = AffineTargets(Spiral(300, 60), per_class=False).load().train
    assert solved(train, torch.ones(300, dtype=torch.bool))[1] < 1e-8


def solved(part: Any, chosen: torch.Tensor) -> tuple[np.ndarray, float]:
    """Return the affine map of least squares over some rows, and its mean squared error."""
    x = part.spec["x"].values(part.rows["x"], torch.float64).flatten(1)[chosen].numpy()
    design = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    target = part.rows["target"].double()[chosen].numpy()
    weights = np.linalg.lstsq(design, target, rcond=None)[0]
    return weights, float(((design @ weights - target) ** 2).mean())


class Streamed(Source):
    """A source whose rows are not in memory."""

    def load(self) -> Splits:
        return Splits(*(object() for _ in range(2)))  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Spiral(rows=0), ["rows (0)"]),
        (lambda: Spiral(noise=-1.0), ["noise (-1.0)"]),
        (lambda: AffineTargets(Spiral(), outputs=0), ["outputs (0)"]),
        (lambda: AffineTargets(Spiral(10, 5), label="y").load(), ["AffineTargets", "'y'", "arm"]),
        (lambda: AffineTargets(Blobs(), field="z").load(), ["AffineTargets", "'z'"]),
        (lambda: AffineTargets(AffineTargets(Spiral(10, 5))).load(), ["AffineTargets", "target"]),
        (lambda: AffineTargets(Streamed()).load(), ["Streamed", "memory"]),
    ],
)
def test_arguments_that_do_not_fit_are_refused(make: Callable[[], Any], named: list[str]) -> None:
    with pytest.raises(ValueError, match=r"must|needs|memory|has a field") as refused:
        make()
    text = str(refused.value)
    assert "\n" not in text
    assert all(part in text for part in named), text
