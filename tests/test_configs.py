"""Every config is one that can be trained: it is read, and its experts and its gate fit its data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixdist.config.parsing import read_config
from mixdist.experts import Expert
from mixdist.gates import Gate
from mixdist.mixtures import MVAE, Ensemble, Soft
from mixdist.mixtures.multimodal import Multimodal
from mixdist.terms import Field
from tests.launch import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SHAPES = {
    "celeba64": (3, 64, 64),
    "imagenet64": (3, 64, 64),
    "cifar10": (3, 32, 32),
    "mnist": (1, 28, 28),
    "digits": (1, 8, 8),
    "modes": (2,),
    "parabolas": (1,),
    "spiral": (2,),
}
DIGITS, GREY, COLOUR = (Field(shape, torch.uint8, scale=1 / 255) for shape in ((3, 8, 8), (1, 8, 8), (3, 28, 28)))
MODALITIES = {
    "mmvae_digits": {f"x{m}": DIGITS for m in range(3)},
    **{
        f"{kind}_poly{name}": {f"x{m}": field for m in range(5)}
        for name, field, kinds in (
            ("digits", GREY, ("mmvae", "mmvae_private", "mopoe", "poe")),
            ("mnist", COLOUR, ("mmvae", "mopoe", "poe")),
        )
        for kind in kinds
    },
    "mmvae_views": {"pix": Field((1, 16, 15), torch.uint8, scale=1 / 6), "fac": Field((216,), torch.float32)},
    "mmvae_four_views": {
        "pix": Field((1, 16, 15), torch.uint8, scale=1 / 6),
        **{name: Field((size,), torch.float32) for name, size in (("fac", 216), ("fou", 76), ("zer", 47))},
    },
    "mmvae_mnist_svhn": {
        "mnist": Field((1, 28, 28), torch.uint8, scale=1 / 255),
        "svhn": Field((3, 32, 32), torch.uint8, scale=1 / 255),
    },
    "mmvae_captions": {
        "image": Field((3, 64, 64), torch.uint8, scale=1 / 255),
        "text": Field((32,), torch.int16, num_classes=1590),
    },
}
"""Fields of the configs of several modalities."""
REAL, LABEL = Field((1,), torch.float32), Field((), torch.uint8, num_classes=10)


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem not in MODALITIES], ids=lambda path: path.stem)
def test_a_config_is_read_and_its_networks_fit_its_data(path: Path) -> None:
    config = read_config(path)
    (name,) = (name for name in SHAPES if name in path.stem)
    spec = {"x": Field(SHAPES[name], torch.uint8, scale=1 / 255), "y": REAL if name == "parabolas" else LABEL}
    if "moe_spiral" in path.stem or path.stem.startswith(("deepmoe_mnist", "dvmoe_mnist", "gmm_spiral")):
        spec["target"] = REAL
    with torch.device("meta"):  # shapes alone: some networks are large
        rows = {key: f.values(torch.zeros(2, *f.shape, dtype=f.dtype), torch.float32) for key, f in spec.items()}
        rows["id"] = torch.zeros(2, dtype=torch.int64)
        mixture = config.mixture
        assert isinstance(mixture, Ensemble)
        expert = mixture.make_experts[0](spec)
        if mixture.expert_start is not None:
            mixture.expert_start.prepare(expert)
        assert expert(rows, eps_for(expert)).loss_R.shape == (2,)
        if isinstance(mixture, MVAE):
            features = expert(rows, eps_for(expert)).features["feature_RH"]
            decoded = mixture.network.decoder(features.shape[1], spec["x"].shape)(features)
            assert decoded.shape == (2, spec["x"].num_values)
        if isinstance(mixture, Soft):
            gate = mixture.make_gate(spec, mixture.num_experts)
            assert gate(rows, eps_for(gate)).log_resp_BE.shape == (2, mixture.num_experts)


@pytest.mark.parametrize("name", MODALITIES)
def test_the_experts_of_a_config_fit_their_modalities(name: str) -> None:
    mixture, spec = read_config(ROOT / "configs" / f"{name}.yaml").mixture, MODALITIES[name]
    assert isinstance(mixture, Multimodal)
    with torch.device("meta"):
        for make in mixture.make_experts:
            expert = make(spec)
            fields = {n: spec[n] for n in expert.fields}
            rows = {n: f.values(torch.zeros(2, *f.shape, dtype=f.dtype), torch.float32) for n, f in fields.items()}
            assert expert(rows, eps_for(expert)).loss_R.shape == (2,)


def eps_for(module: Expert | Gate) -> torch.Tensor | None:
    return None if module.noise_shape is None else torch.zeros(2, *module.noise_shape)
