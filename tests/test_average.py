"""Averages of weights: a plain loop's, on any engine and layout, and training does not know of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import mixdist
from mixdist.engines.average import averaged
from mixdist.parallel.wire import Wire
from mixdist.training.phases import Phase
from mixdist.training.trainer import Trainer
from tests.launch import HARD, changed, here, refused, together, write_config
from tests.parity import Case, data, make_mixture, make_objective, mesh_of

DECAY = 0.8


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def newest(run: Path) -> dict[str, Tensor]:
    last = run / "checkpoints" / (run / "checkpoints/latest").read_text().strip()
    return {f"{path.stem} {k}": v for path in last.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize("execution", ["loop", "stacked"])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_it_is_a_plain_loop_s_and_training_does_not_know_of_it(execution: str, optimizer: Any) -> None:
    """In float64, over two epochs; the last is saved after some steps."""
    runs: dict[float | None, list[dict[str, Tensor]]] = {None: [], DECAY: []}
    for decay, weights in runs.items():
        case = Case(execution=execution)
        mixture = make_mixture(case, mesh_of(case.num_experts, 1, 1), Wire(torch.device("cpu")))
        phase = Phase(2, 16, objective=make_objective(case), optimizer=lambda p: optimizer(p, 0.05), ema=decay)
        trainer = Trainer(mixture, data(), [phase])
        for _ in range(5):
            trainer.advance()
            named = [(f"{o.name}.{n}", p) for o in mixture.owned() for n, p in o.module.named_parameters()]
            weights.append({name: p.detach().clone() for name, p in named})
    assert all(torch.equal(a[n], b[n]) for a, b in zip(*runs.values(), strict=True) for n in a)
    saved = trainer.save()
    for owned in saved.owned:
        state = saved.engine.optimizer_state(owned)
        for name, _ in owned.module.named_parameters():
            first, *rest = (step[f"{owned.name}.{name}"] for step in runs[DECAY])
            expected = first
            for weight in rest:
                expected = DECAY * expected + (1 - DECAY) * weight
            torch.testing.assert_close(state[f"{name}.ema"], expected, rtol=1e-14, atol=1e-15)


def test_it_is_torch_s_own() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3).double()
    judge = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))  # type: ignore[no-untyped-call]
    optimizer = averaged(lambda p: torch.optim.SGD(p, 0.3, momentum=0.9), DECAY, model.parameters())
    for _ in range(7):
        optimizer.zero_grad()
        model(torch.randn(4, 5).double()).square().sum().backward()
        optimizer.step()
        judge.update_parameters(model)
    for mine, theirs in zip(model.parameters(), judge.module.parameters(), strict=True):
        torch.testing.assert_close(optimizer.state[mine]["ema"], theirs.detach(), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("config", [changed(train__epochs=2), HARD], ids=["soft", "competition"])
def test_it_is_evaluated_beside_and_loaded(config: dict[str, Any], folder: Path) -> None:
    written = write_config(folder / "c.yaml", config)
    ended = here("train", "--config", written, "--out", "run", "--train.ema", str(DECAY), "--train.optimizer.lr", "0.1")
    assert ended.code == 0, ended
    assert f"averages of weights (ema {DECAY}), " in ended.out
    beside = {}
    for words in ([], ["--ema"]):
        assert here("evaluate", "run", "--num_samples", "2", *words).code == 0
        beside[bool(words)] = json.loads((folder / f"run/evaluation{'-ema' * bool(words)}.json").read_text())
    assert (beside[True]["protocol"]["ema"], beside[False]["protocol"].get("ema")) == (DECAY, None)
    assert beside[True]["figures"]["loss"] != beside[False]["figures"]["loss"]
    printed = next(line for line in ended.out.splitlines() if line.startswith("averages of weights"))
    assert f"loss {beside[True]['figures']['loss']:.4f}" in printed
    found = newest(folder / "run")
    for ema, kind in ((False, "model.{}"), (True, "optimizer.{}.ema")):
        model = mixdist.load(folder / "run", ema=ema)
        for e, expert in model.experts.items():
            for name, parameter in expert.named_parameters():
                assert torch.equal(parameter, found[f"expert-{e:04d} {kind.format(name)}"])


def test_layouts_have_the_same_averages(folder: Path) -> None:
    written = write_config(folder / "c.yaml", changed(dtype="float64", train__epochs=2, train__ema=DECAY))
    for ranks in (1, 2, 4):
        ended = together("train", "--config", written, "--out", f"run{ranks}", ranks=ranks, folder=folder)
        assert ended.code == 0, ended
    one, two, four = (newest(folder / f"run{ranks}") for ranks in (1, 2, 4))
    averages = [name for name in one if name.endswith(".ema")]
    assert len(averages) > 8
    for name in averages:
        for other in (two, four):
            assert (other[name] - one[name]).abs().max() <= 1e-10 * one[name].abs().max(), name


@pytest.mark.parametrize("decay", ["0", "1", "1.5", "-0.1"])
def test_decays_that_make_no_sense_are_refused(decay: str, folder: Path) -> None:
    written = write_config(folder / "c.yaml", changed())
    refused("train", "--config", written, "--train.ema", decay, names="train.ema above 0 and below 1")


def test_runs_without_averages_have_none(folder: Path) -> None:
    assert here("train", "--config", write_config(folder / "c.yaml", changed()), "--out", "run").code == 0
    refused("evaluate", "run", "--ema", names="no averages train.ema")
    with pytest.raises(ValueError, match="no averages of weights"):
        mixdist.load("run", ema=True)
    refused("train", "--resume", "run", "--train.epochs", "2", "--train.ema", "0.9", names="optimiser Adam ema")


def test_what_is_no_optimiser_of_torch_is_refused() -> None:
    with pytest.raises(ValueError, match="needs an optimiser of torch"):
        averaged(lambda parameters: object(), 0.9, [torch.zeros(1)])  # type: ignore[arg-type, return-value]
