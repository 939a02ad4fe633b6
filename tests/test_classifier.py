"""Classifying experts: against torch's cross entropy, as a stack, and as a mixture of probabilities."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import mixdist
from mixdist.cli.main import main
from mixdist.data import Digits
from mixdist.experts import Classifier, ExpertBank
from mixdist.mixtures.objectives import MixtureLikelihood
from mixdist.nets import MLP
from mixdist.terms import Batch, Field, Spec

SPEC: Spec = {
    "x": Field((2, 3), torch.float64),
    "y": Field((), torch.uint8, num_classes=4),
    "pair": Field((2,), torch.uint8, num_classes=4),
}
OPTIONS: list[dict[str, Any]] = [{}, {"network": MLP([5, 4], "tanh")}]
options = pytest.mark.parametrize("given", OPTIONS)


def _rows(num_rows: int = 7) -> Batch:
    x = torch.randn(num_rows, 2, 3, generator=torch.Generator().manual_seed(num_rows), dtype=torch.float64)
    return {"id": torch.arange(num_rows), "x": x, "y": torch.arange(num_rows) % 4}


def _make(given: dict[str, Any], seed: int = 0) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(SPEC, **given).double()


@options
def test_the_loss_is_the_cross_entropy(given: dict[str, Any]) -> None:
    expert, rows = _make(given), _rows()
    terms, logits = expert(rows, None), expert.net(rows["x"].flatten(1))
    torch.testing.assert_close(terms.loss_R, F.cross_entropy(logits, rows["y"], reduction="none"))
    assert terms.log_px_R is not None
    assert torch.equal(terms.log_px_R, -terms.loss_R)
    assert terms.kl_R is None
    assert torch.equal(expert({**rows, "y": rows["y"].to(torch.uint8)}, None).loss_R, terms.loss_R)  # as stored


@options
def test_predictions_are_the_probabilities_of_classes(given: dict[str, Any]) -> None:
    expert, rows = _make(given), _rows()
    p = expert.predict({"x": rows["x"]})  # the label is not needed
    assert p.shape == (7, 4)
    torch.testing.assert_close(p.sum(1), torch.ones(7).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(p[torch.arange(7), rows["y"]].log(), -expert(rows, None).loss_R)


@options
def test_a_stack_is_the_loop(given: dict[str, Any]) -> None:
    banks = [ExpertBank({e: _make(given, seed=e) for e in (1, 4, 6)}, execution) for execution in ("loop", "stacked")]
    weights = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for bank in banks:
        (bank(_rows(), None).loss_R * weights).sum().backward()
    loop, stacked = (bank(_rows(), None) for bank in banks)
    assert stacked.loss_R.shape == (7, 3)
    torch.testing.assert_close(stacked.loss_R, loop.loss_R, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(stacked.log_px_R, loop.log_px_R, rtol=1e-12, atol=1e-13)
    for name, parameter in banks[0].named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(banks[1].get_parameter(name).grad, parameter.grad, rtol=1e-12, atol=1e-13)


def test_the_weighted_mean_of_predictions_is_the_mixture_of_the_likelihood_objective() -> None:
    # -log sum_k q(k|x) p(y|x, k), once from the experts' losses and once from their predictions.
    experts, rows = [_make(OPTIONS[1], seed=e) for e in range(3)], _rows()
    q = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).softmax(1)
    losses = torch.stack([expert(rows, None).loss_R for expert in experts], 1)
    mixed = torch.einsum("re,rec->rc", q, torch.stack([expert.predict(rows) for expert in experts], 1))
    torch.testing.assert_close(MixtureLikelihood().rows(q.log(), losses), -mixed[torch.arange(7), rows["y"]].log())


@options
def test_no_rows(given: dict[str, Any]) -> None:
    expert = _make(given)
    loss = expert(_rows(0), None).loss_R
    loss.sum().backward()
    assert loss.shape == (0,)
    assert expert.predict(_rows(0)).shape == (0, 4)
    assert all(p.grad is not None and p.grad.eq(0).all() for p in expert.parameters())


def test_a_run_ends_with_the_likelihood_of_its_weighted_mean(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = Path(__file__).parents[1] / "configs" / "digits_moe_supervised.yaml"
    run = tmp_path / "run"
    assert main(["train", "--config", str(config), "--train.epochs", "2", "--out", str(run)]) == 0
    bound = float(re.search(r"\bbound\s+(-?[0-9.]+)", capsys.readouterr().out)[1])
    rows = Digits().load()[1].rows
    p = mixdist.load(run).predict(rows["x"])
    assert p.shape == (359, 10)
    torch.testing.assert_close(p.sum(1), torch.ones(359))
    assert p.gather(1, rows["y"].long()[:, None]).log().mean().item() == pytest.approx(bound, abs=1e-4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"target": "x"}, r"Classifier needs the label 'x', but the data has labels \['y'\]: set its target"),
        ({"target": "pair"}, "Classifier needs the label 'pair'"),
        ({"target": "z"}, "Classifier needs the label 'z'"),
        ({"input": "y"}, "Classifier needs real numbers, but the field 'y' holds 4 classes"),
        ({"network": MLP([0])}, r"layer widths \[6, 0, 4\] must all be at least 1"),
    ],
)
def test_what_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}") as caught:
        Classifier(SPEC, **given)
    assert "\n" not in str(caught.value)
