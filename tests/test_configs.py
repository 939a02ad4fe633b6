"""Every config is one that can be trained; the small ones of image data are their full ones in less time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mixdist.competition.scores import Discriminators
from mixdist.config.config import Config
from mixdist.config.parsing import read_config
from mixdist.data import Shards
from mixdist.terms import Field, Spec
from tests.launch import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SMALL = [path for path in CONFIGS if path.stem.startswith(("celeba", "imagenet", "cifar")) and "_small" in path.stem]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def spec_of(path: Path) -> Spec:
    side = 32 if "cifar10" in path.name else 64
    return {"x": Field((3, side, side), torch.uint8, scale=1 / 255), "y": Field((), torch.uint8, num_classes=10)}


def parts_of(config: Config, spec: Spec) -> dict[str, Any]:
    """Make what a run of the config would train."""
    parts: dict[str, Any] = {"expert": config.expert(spec)}
    if config.gate is not None:
        parts["gate"] = config.gate(spec, config.num_experts)
    if config.competition is not None and isinstance(config.competition.score, Discriminators):
        parts["judge"] = config.competition.score.network(spec)
    return parts


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_read_and_told_in_the_readme(path: Path) -> None:
    config = read_config(path)
    assert (config.gate is None) != (config.competition is None)
    if path.stem.startswith(("celeba64", "imagenet64", "cifar10")):
        assert f"`{path.stem}`" in README


def test_image_data_has_a_soft_and_a_hard_config_in_full_and_small() -> None:
    names = {f"{data}_{kind}_small" for data in ("celeba64", "imagenet64", "cifar10") for kind in ("moe", "kvaes")}
    assert {path.stem for path in SMALL} == names


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_a_small_config_is_its_full_one_with_fewer_widths_and_epochs(path: Path) -> None:
    small, full = (read_config(p) for p in (path, path.with_name(path.name.replace("_small", ""))))
    spec, (one, other) = spec_of(path), (parts_of(config, spec_of(path)) for config in (small, full))
    assert {name: type(part) for name, part in one.items()} == {name: type(part) for name, part in other.items()}
    for name, part in one.items():
        assert sum(p.numel() for p in part.parameters()) < sum(p.numel() for p in other[name].parameters())
    # Seed 002, section V-B: five convolutions of 3x3, 256 latent dimensions.
    for parts in (one, other):
        convolutions = [m for m in parts["expert"].encoder.modules() if isinstance(m, torch.nn.Conv2d)]
        assert [m.kernel_size for m in convolutions] == [(3, 3)] * 5
        assert parts["expert"].noise_shape == (256,)
        assert parts["expert"].beta == 1
    assert one["expert"].likelihood.name == other["expert"].likelihood.name
    assert isinstance(small.data, Shards)
    assert isinstance(full.data, Shards)
    assert (small.data.root, small.data.workers) == (full.data.root, 0)
    assert spec.keys() >= set(one["expert"].fields)


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_a_schedule_ends_with_the_last_step(path: Path) -> None:
    config = read_config(path)
    schedule = config.train.schedule
    if schedule is None:
        return
    made = schedule(torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))]))
    rows = 7000 if "celeba" in path.name else 10000
    assert made.T_max == config.train.epochs * -(-rows // config.train.batch_size)
