"""Classifiers of latents: what they see, of which rows, and that nothing else changes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mixdist
from mixdist.data import Dataset, Digits, RankBatch
from mixdist.evaluation.probes import TOLD, Probing, probed
from mixdist.experts import VAE
from mixdist.gates import Uniform, VaDE
from mixdist.mixtures import Evaluation, Soft
from mixdist.nets import MLP
from mixdist.parallel.launch import Launch
from mixdist.parallel.mesh import Mesh, Placement
from mixdist.terms import Field
from tests.launch import changed, here, together, write_config
from tests.test_figures import ready
from tests.test_mvae import config_of, masks

CLASSES = 3


def rows(first: int, num: int = 60) -> Dataset:
    """Rows of which x shows the class in one place, and nothing in the others."""
    ids = torch.arange(first, first + num)
    x = torch.randn(num, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(first))
    x[:, 0] = 10.0 * (ids % CLASSES) + 0.1 * x[:, 0]
    spec = {"x": Field((4,), torch.float64), "label": Field((), torch.uint8, num_classes=CLASSES)}
    return Dataset({"id": ids, "x": x, "label": (ids % CLASSES).to(torch.uint8)}, spec, "label")


class Shows:
    """A mixture that shows places of x."""

    probes = ("logistic",)

    def __init__(self, **places: list[int]) -> None:
        mesh = Mesh(Placement.plan(1, 1, 1), Launch(0, 1), torch.device("cpu"), 60.0)
        self.context, self.places = SimpleNamespace(mesh=mesh), places

    def embed(self, batch: RankBatch) -> dict[str, Tensor]:
        return {name: batch.rows["x"][:, some] for name, some in self.places.items()}


def figures(mixture: Any, train: Dataset, test: Dataset, **probing: Any) -> Evaluation:
    return probed(Evaluation(test, {"loss": 1.0}), mixture, train, Probing(**probing), 16, 0)


@pytest.mark.parametrize("kind", TOLD)
def test_what_latents_show_is_seen_and_nothing_else(kind: Any) -> None:
    found = figures(Shows(first=[0], last=[2, 3]), rows(0, 200), rows(1000), kinds=[kind])
    assert found.figures["loss"] == 1.0
    assert found.figures[f"probe_{kind}"] > 0.9
    assert found.figures[f"probe_{kind}_first"] == 1.0
    assert found.figures[f"probe_{kind}_last"] < 0.6
    assert found.columns[f"probe_{kind}_first"].tolist() == [1.0] * 60


def test_a_mixture_says_which_probes_it_has_and_one_latent_is_all() -> None:
    test = rows(1000)
    found = figures(Shows(z=[0]), rows(0), test)
    assert set(found.figures) == {"loss", "probe_logistic"}
    assert figures(Shows(), rows(0), test).figures == {"loss": 1.0}
    assert figures(Shows(z=[0]), rows(0), test, kinds=[]).figures == {"loss": 1.0}


def test_rows_beyond_the_bound_are_neither_fitted_on_nor_judged() -> None:
    train, test = rows(0), rows(1000)
    train.rows["x"][20:, 0], test.rows["x"][20:] = 0.0, torch.nan
    found = figures(Shows(z=[0]), train, test, num_rows=20)
    assert found.figures["probe_logistic"] == 1.0
    assert np.isnan(found.columns["probe_logistic"]).tolist() == [False] * 20 + [True] * 40
    assert "the first 20 training rows" in found.protocol["probes"]["fitted_on"]


def test_rows_without_a_latent_are_left_out() -> None:
    train, test = rows(0), rows(1000)
    train.rows["x"][::2, 0], test.rows["x"][1::2, 0] = torch.nan, torch.nan
    found = figures(Shows(a=[0], b=[1]), train, test)
    lacks = [False, True] * 30
    assert np.isnan(found.columns["probe_logistic_a"]).tolist() == lacks
    assert np.isnan(found.columns["probe_logistic"]).tolist() == lacks
    assert not np.isnan(found.columns["probe_logistic_b"]).any()
    train.rows["x"][:, 0] = torch.nan  # no row to fit on
    assert set(figures(Shows(a=[0], b=[1]), train, test).figures) == {"loss", "probe_logistic_b"}


def test_latents_that_are_not_finite_are_told() -> None:
    train, test = rows(0), rows(1000)
    train.rows["x"][3, 0] = torch.inf
    with pytest.raises(ValueError, match="--probes none"):
        figures(Shows(z=[0]), train, test)


def test_latents_are_a_vector_a_row() -> None:
    mixture = Shows(z=[0])
    mixture.embed = lambda batch: {"z": batch.rows["x"][:-1]}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"Shows.embed returns 'z' of shape \(15, 4\), expected \(16, L\)"):
        figures(mixture, rows(0), rows(1000))


@pytest.mark.parametrize("make_gate", [Uniform, functools.partial(VaDE, latent=2, network=MLP([5]))])
def test_experts_and_gates_with_latents_show_them(make_gate: Any) -> None:
    data = rows(0)
    expert = functools.partial(VAE, latent=2, network=MLP([5]), likelihood="gaussian", mean="identity")
    mixture = ready(Soft(make_gate, expert, 3), data.spec)
    batch = RankBatch(data.take(torch.arange(7)), (7,))
    found = mixture.embed(batch)
    values = mixture.values(batch.rows, ("x",))
    for e, one in mixture.bank.owned().items():  # type: ignore[attr-defined]
        torch.testing.assert_close(found[str(e)], one.posterior(values).mean_RL)
    assert list(found) == ["0", "1", "2"] + (["gate"] if make_gate is not Uniform else [])
    if make_gate is not Uniform:
        torch.testing.assert_close(found["gate"], mixture.gate.embed(values))  # type: ignore[attr-defined]


def test_the_command_gives_what_loaded_latents_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a mixture with one decoder on two ranks; a component that is off has none; and no other figure changes."""
    from sklearn.linear_model import LogisticRegression

    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path, masks=masks(rates="each"))
    assert here("train", "--config", config, "--out", "run").code == 0
    words = ("evaluate", "run", "--rows", "100", "--probe_rows", "300")
    assert here(*words, "--probes", "none").code == 0
    plain = json.loads(Path("run/evaluation.json").read_text())["figures"]
    ended = together(*words, ranks=2, folder=tmp_path)
    assert ended.code == 0, ended.err
    found = json.loads(Path("run/evaluation.json").read_text())
    names = {f"probe_{kind}{of}" for kind in TOLD for of in ("", "_0", "_1", "_2")}
    assert set(found["figures"]) == {*plain, *names}
    assert {name: found["figures"][name] for name in plain} == pytest.approx(plain, rel=1e-10)
    model, splits = mixdist.load("run"), Digits().load()
    train, test = (split.take(torch.arange(n)) for split, n in ((splits.train, 300), (splits.test, 100)))
    z, shown = (model.latents(some["x"]).flatten(1).numpy() for some in (train, test))
    size = np.sqrt(z.var(0).mean())
    fit = LogisticRegression(max_iter=2000).fit((z - z.mean(0)) / size, train["y"])
    assert found["figures"]["probe_logistic"] == fit.score((shown - z.mean(0)) / size, test["y"])


def test_soft_mixtures_are_probed_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert here("train", "--config", write_config(tmp_path / "config.yaml", changed()), "--out", "run").code == 0
    words = ("evaluate", "run", "--rows", "30", "--num_samples", "1", "--probe_rows", "100")
    for more, wanted in (((), False), (("--probes", "all"), True)):
        ended = here(*words, *more)
        assert ended.code == 0, ended.err
        assert ("probe_knn_3" in json.loads(Path("run/evaluation.json").read_text())["figures"]) == wanted
    assert "probe_rows (0)" in here(*words[:2], "--probe_rows", "0").err
