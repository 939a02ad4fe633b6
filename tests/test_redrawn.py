"""Dequantised and binarised rows: keyed by row, the same on every layout, and what their likelihoods mean."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import roots_legendre
from scipy.stats import norm
from torch import Tensor

import mixdist
from mixdist.data import Binarised, Blobs, Dataset, Dequantised, Digits, Epoch, Loader, Samples, Source, Splits
from mixdist.data.fields import describe_spec, read_spec
from mixdist.data.redrawn import Dequantise, Redrawn
from mixdist.mixtures.evidence import bits_per_dim
from mixdist.report.metrics import read_metrics
from mixdist.terms import Field
from tests.launch import HARD, changed, here, mlp, refused, together, write_config

SOURCES: dict[str, Source] = {
    "dequantised": Dequantised(Digits()),
    "static": Binarised(Digits()),
    "dynamic": Binarised(Digits(), "dynamic"),
    "threshold": Binarised(Digits(), "threshold"),
}
EPOCHS = [None, Epoch(0), Epoch(0, number=1), Epoch(0, phase=1), Epoch(1)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def x_of(samples: Samples, epoch: Epoch | None = None, index: Tensor | None = None) -> Tensor:
    index = torch.arange(len(samples)) if index is None else index
    return samples.spec["x"].values(samples.take(index, epoch)["x"], torch.float64)


@pytest.mark.parametrize("name", SOURCES)
def test_draws_are_keyed_by_row(name: str) -> None:
    train, test, _ = SOURCES[name].load()
    some = torch.tensor([700, 3, 3, 12])
    for epoch in EPOCHS:
        assert torch.equal(x_of(train, epoch, some), x_of(train, epoch)[some])
    part = train.part(torch.arange(100, 200))
    assert torch.equal(x_of(part, EPOCHS[1]), x_of(train, EPOCHS[1])[100:200])
    drawn = [x_of(train, epoch) for epoch in EPOCHS]
    anew = name in ("dequantised", "dynamic")
    assert all(torch.equal(a, b) != anew for i, a in enumerate(drawn) for b in drawn[:i])
    assert train.fingerprint != test.fingerprint
    assert train.label == "y"
    assert train.take(some, fields=["y"]).keys() == {"id", "y"}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_read_what_one_process_reads(name: str, world: int) -> None:
    train = SOURCES[name].load().train
    whole = Loader(train, 50, 3).batch(1, 2).rows["x"]
    parts = [Loader(train, 50, 3, rank=rank, world_size=world).batch(1, 2).rows["x"] for rank in range(world)]
    assert torch.equal(torch.cat(parts), whole)


def test_levels_and_probabilities_are_those_of_the_rows() -> None:
    plain = Digits().load().train
    p, k = x_of(plain), plain.take(torch.arange(len(plain)))["x"].double()
    spread = x_of(SOURCES["dequantised"].load().train, Epoch(0)) * 17
    assert torch.equal(spread.floor().clamp(max=16), k)
    inside = (spread - k).flatten()
    assert abs(inside.mean() - 0.5) < 5 / math.sqrt(12 * len(inside))
    assert torch.equal(x_of(SOURCES["threshold"].load().train), (p >= 0.5).double())
    ones = sum(x_of(SOURCES["dynamic"].load().train, Epoch(0, number=n)) for n in range(50)) / 50
    assert (ones[p == 0] == 0).all()
    assert (ones[p == 1] == 1).all()
    inner = (p > 0) & (p < 1)
    z = ((ones - p) / (p * (1 - p) / 50).sqrt())[inner]
    assert abs(z.mean()) < 5 / math.sqrt(len(z))
    assert z.square().mean().item() == pytest.approx(1.0, abs=0.03)


def test_the_density_of_dequantised_values_bounds_the_mass() -> None:
    """Of a Gaussian, whose integral over a level is the mass, by quadrature over u; and 8 bits of a flat density."""
    field = Dequantise(0).field(Field((1,), torch.uint8, 1 / 255), "x")
    bits = bits_per_dim(field, "density")
    assert bits is not None
    u, weight = roots_legendre(40)
    x = (np.arange(256)[:, None] + 0.5 + 0.5 * u) / 256
    for mean, scale in ((0.3, 0.2), (0.5, 0.01), (0.9, 0.003)):
        bound = (bits[0] * norm.logpdf(x, mean, scale) + bits[1]) @ weight / 2
        edges = norm(mean, scale).logsf(np.arange(257) / 256), norm(mean, scale).logcdf(np.arange(257) / 256)
        below = np.arange(256) / 256 < mean  # the tail that is precise
        with np.errstate(divide="ignore", invalid="ignore"):
            from_below = edges[1][1:] + np.log1p(-np.exp(edges[1][:-1] - edges[1][1:]))
            from_above = edges[0][:-1] + np.log1p(-np.exp(edges[0][1:] - edges[0][:-1]))
        mass = -np.where(below, from_below, from_above) / math.log(2)
        seen = np.isfinite(mass)
        assert seen.sum() > 100
        assert (bound[seen] >= mass[seen] - 1e-9).all()
        near = np.abs(np.arange(256) / 256 - mean) < 2 * scale
        if scale > 0.1:  # a level is narrow beside it
            np.testing.assert_allclose(bound[near], mass[near], atol=1e-3)
    assert bits[1] == 8.0
    assert bits_per_dim(field, "mass", 256) == (bits[0], 0.0)
    assert bits[0] * -math.log(256) == pytest.approx(8.0)  # a mass of equal levels
    assert [bits_per_dim(Field((1,), torch.float32), kind) for kind in ("density", None)] == [None, None]
    assert bits_per_dim(Field((1,), torch.uint8), "mass", 2) is None


GAUSSIAN = {"likelihood": "gaussian", "network": mlp(8), "latent": 2}


def over(made: str, source: str = "mixdist.data.Digits", **more: Any) -> dict[str, Any]:
    return {"class_path": f"mixdist.data.{made}", "init_args": {"source": {"class_path": source}, **more}}


def test_a_run_says_how_its_rows_were_drawn(folder: Path) -> None:
    expert = {"class_path": "mixdist.experts.VAE", "init_args": GAUSSIAN}
    config = write_config(folder / "c.yaml", changed(data=over("Dequantised"), expert=expert, valid=0.2))
    assert here("train", "--config", config, "--out", "run").code == 0
    told = []
    for ranks in (1, 2):
        words = ("evaluate", "run", "--num_samples", "3")
        ended = here(*words) if ranks == 1 else together(*words, ranks=2, folder=folder)
        assert ended.code == 0, ended
        assert "log densities of x, dequantised (seed 0), as the model sees it" in ended.out
        told.append(json.loads((folder / "run/evaluation.json").read_text()))
    assert told[0]["figures"] == pytest.approx(told[1]["figures"], rel=1e-5)
    figures, protocol = told[0]["figures"], told[0]["protocol"]
    assert protocol["drawn"] == {"x": "dequantised (seed 0)"}
    assert protocol["add_for_stored_units"] == pytest.approx(-64 * math.log(17))
    in_bits = -(figures["log_likelihood"] + protocol["add_for_stored_units"]) / (64 * math.log(2))
    assert figures["bits_per_dim"] == pytest.approx(in_bits)
    assert told[0]["errors"]["bits_per_dim"] == pytest.approx(told[0]["errors"]["log_likelihood"] / 64 / math.log(2))
    model = mixdist.load("run")
    levels = Digits().load().test.take(torch.arange(5))["x"]
    torch.testing.assert_close(model.rows(levels)["x"], (levels.float() + 0.5) / 17)
    refused("evaluate", "run", "--data.seed", "1", names="data that the run was trained on")


@pytest.mark.parametrize("delivery", ["read", "wire"])
def test_a_competition_on_new_draws_is_the_same_on_every_layout(delivery: str, folder: Path) -> None:
    config = changed(HARD, data=over("Binarised", kind="dynamic"), dtype="float64", train__epochs=2)
    config["mixture"]["init_args"] |= {
        "expert": {"class_path": "mixdist.experts.VAE", "init_args": {"network": mlp(8), "latent": 2}},
        "delivery": delivery,
        "score": {"class_path": "mixdist.competition.Elbo"},
    }
    written = write_config(folder / "c.yaml", config)
    for ranks in (1, 2):
        ended = together("train", "--config", written, "--out", f"run{ranks}", ranks=ranks, folder=folder)
        assert ended.code == 0, ended
    one, two = (read_metrics(folder / f"run{ranks}")[-1] for ranks in (1, 2))
    assert one["objective"] == pytest.approx(two["objective"], rel=1e-10)
    assert one["counts"] == two["counts"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (over("Binarised", "mixdist.data.Blobs"), "field 'x' of sample holds expected 0 to 1"),
        (over("Dequantised", "mixdist.data.Blobs"), "Dequantised bytes 'x' torch.float32"),
        (over("Dequantised", field="y"), "'y' holds 10 classes"),
        (over("Binarised", field="z"), "Binarised field 'z'"),
        (over("Binarised", kind="fixed"), "kind fixed static"),
        (over("Dequantised", seed=-1), "seed of Dequantised (-1)"),
    ],
)
def test_what_cannot_be_drawn_is_refused(data: dict[str, Any], words: str, folder: Path) -> None:
    refused("train", "--config", write_config(folder / "c.yaml", changed(data=data)), names=words)


def test_a_level_beyond_the_last_is_refused_by_its_sample() -> None:
    rows = {"id": torch.tensor([4, 9]), "x": torch.tensor([[3], [17]], dtype=torch.uint8)}
    data = Redrawn(Dataset(rows, {"x": Field((1,), torch.uint8, 1 / 16)}), "x", Dequantise(0))
    with pytest.raises(ValueError, match=r"field 'x' of sample 9 holds 17, expected 0 to 16"):
        data.check()
    with pytest.raises(ValueError, match="must be a Source"):
        Dequantised(Splits(data, data))  # type: ignore[arg-type]


def test_a_spec_says_how_rows_were_drawn_and_others_are_as_before() -> None:
    spec = SOURCES["dynamic"].load().train.spec
    assert read_spec(describe_spec(spec)) == dict(spec)
    assert not any("drawn" in field for field in describe_spec(Blobs().load().train.spec).values())
