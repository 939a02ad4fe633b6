"""Mixtures of modalities in Python: what is given, what rows lack, and what is refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixdist.data import Dataset, RankBatch
from mixdist.evaluation.evaluate import evaluate
from mixdist.experts import Modality
from mixdist.mixtures import MMVAE, WeightedLoss
from mixdist.mixtures.multimodal_shown import MultimodalModel
from mixdist.mixtures.proposals import num_bad
from mixdist.noise import Moment
from tests.launch import mlp, refused, write_config
from tests.parity import Case, make_multimodal, views
from tests.test_mmvae import made

FAMILIES = ["mmvae", "poe", "mopoe"]


class Streamed(Dataset):
    """Rows as they come out of shards: nobody has seen all of them before."""

    in_memory = False


def model_of(family: str) -> tuple[MultimodalModel, dict[str, torch.Tensor]]:
    """Three modalities, of which rows 0 to 2 have all, the first alone, and the last two."""
    data = views(3, True).first(3)
    case = Case(family=family, num_experts=3, gate="dreg-looser", expert="normal", objective="private")
    present = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 1]], dtype=torch.uint8)
    return MultimodalModel(made(make_multimodal(case), data)), {**data.rows, "present": present}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_row_lacks_is_neither_encoded_nor_kept(family: str) -> None:
    model, rows = model_of(family)
    for name, z in model.encode(rows).items():
        there = rows["present"][:, model.names.index(name)].bool()
        assert torch.equal(z.isfinite().all(1), there)
    whole = model.reconstruct(rows)
    for m, name in enumerate(model.names):
        for row in range(3):
            given = [n for n in range(3) if rows["present"][row, n]]
            one = {key: column[row : row + 1] for key, column in rows.items() if key != "present"}
            alone = model.reconstruct({**one, "id": rows["id"][row : row + 1]}, given)[name]
            if m in given:
                torch.testing.assert_close(whole[name][row], alone[0])
    assert torch.equal(model.infer(rows), model.infer(rows, [0, 1, 2]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_without_anything_of_what_is_given_is_refused(family: str) -> None:
    model, rows = model_of(family)
    for given, told in (("x0", "row 2 .*(x0)"), ([1, "x2"], "row 1 .*x1, x2")):
        for act in (model.infer, model.reconstruct):
            with pytest.raises(ValueError, match=told):
                act(rows, given)
        with pytest.raises(ValueError, match=told):
            model.translate(rows, given, "x1")
    with pytest.raises(ValueError, match="row 1 has nothing"):
        model.infer({**rows, "present": rows["present"] * torch.tensor([[1], [0], [1]], dtype=torch.uint8)})


@pytest.mark.parametrize(
    ("value", "told"),
    [(2, "holds 2 for x0 in row 0, expected 1"), (0.5, "holds 0.5 for x0 in row 0"), (-1, "from -1 to 0, expected 0")],
)
def test_present_of_a_model_s_rows_holds_0_and_1_alone(value: float, told: str) -> None:
    model, rows = model_of("mmvae")
    for dtype in (torch.bool, torch.int64, torch.float32):
        torch.testing.assert_close(model.infer({**rows, "present": rows["present"].to(dtype)}), model.infer(rows))
    with pytest.raises(ValueError, match=told):
        model.infer({**rows, "present": rows["present"].to(torch.float64 if value == 0.5 else torch.int64) * value})
    with pytest.raises(ValueError, match=r"'present' has shape \(3, 2\): give N rows as \(N, 3\)"):
        model.infer({**rows, "present": rows["present"][:, :2]})


def test_what_a_model_is_given_is_checked() -> None:
    model, rows = model_of("mmvae")
    rows = {name: column for name, column in rows.items() if name != "present"}
    torch.testing.assert_close(model.infer(rows, "x1"), model.infer(rows, [1]))
    assert model.decode(np.zeros((2, 3)), 0).shape == model.decode([[0, 0, 0]] * 2, 0).shape == (2, 1, 4, 4)
    wrong: list[tuple[Any, str]] = [
        (lambda: model.infer(rows, []), r"given \(\[\]\) names no modality: give some of x0, x1, x2"),
        (lambda: model.translate(rows, None, "x1"), "names no modality"),  # type: ignore[arg-type]
        (lambda: model.infer(rows, "x"), "modality 'x'"),
        (lambda: model.infer({"x0": rows["x0"]}, ["x1"]), "expected x1"),
        (lambda: model.decode(torch.zeros(2, 4), 0), r"z has shape \(2, 4\).*\(N, 3\)"),
        (lambda: model.decode(torch.zeros(3), 0), r"z has shape \(3,\)"),
        (lambda: model.decode(torch.full((1, 3), torch.nan), 0), "finite"),
        (lambda: model.decode("z", 0), "z cannot be made a tensor"),  # type: ignore[arg-type]
        (lambda: model.generate(-1), r"num_samples \(-1\)"),
        (lambda: model.generate(2.5), r"num_samples \(2.5\)"),  # type: ignore[arg-type]
        (lambda: model.generate(1, seed=-1), r"seed \(-1\)"),
        (lambda: model.infer(rows, seed=1.5), r"seed \(1.5\)"),  # type: ignore[arg-type]
    ]
    for act, told in wrong:
        with pytest.raises(ValueError, match=told):
            act()


def test_rows_that_nobody_has_checked_are_refused_by_their_evaluation() -> None:
    data = views(2, True).first(4)
    case = Case(family="mmvae", num_experts=2, gate="dreg-looser", expert="normal", objective="private")
    for present, bad in (([[1, 1], [0, 0], [1, 0], [0, 1]], 1), ([[1, 2], [0, 0], [1, 0], [0, 3]], 3)):
        rows = {**data.rows, "present": torch.tensor(present, dtype=torch.uint8)}
        assert num_bad(rows).item() == bad
        with pytest.raises(ValueError, match=f"'present' says of {bad} of 4 rows"):
            evaluate(made(make_multimodal(case), data), Streamed(rows, data.spec), 4, 0)


def test_a_step_without_a_modality_has_no_mean_of_it() -> None:
    """Nor a gradient: its expert takes a step of zeros."""
    model, rows = model_of("mmvae")
    rows = {**rows, "present": torch.tensor([[1, 0, 1]] * 3, dtype=torch.uint8)}
    mixture = model.mixture
    record = mixture.record(mixture.backward(RankBatch(rows, (3,)), WeightedLoss(), Moment(0)), 3)
    assert mixture.describe([]) == {"num_experts": 3, "modalities": "x0, x1, x2", "posterior": "normal"}
    assert record["present"] == [1.0, 0.0, 1.0]
    assert [value is None for value in record["log_px"]] == [False, True, False]
    assert all(not p.grad.any() for p in mixture.modalities[1].parameters() if p.grad is not None)


HOLED = """
import torch
from mixdist.data import Dataset, Source, Splits
from mixdist.terms import Field


class Holed(Source):
    def load(self):
        spec = {f"x{m}": Field((4,), torch.float32) for m in range(2)} | {"present": Field((2,), torch.uint8)}
        parts = []
        for ids in (torch.arange(40), torch.arange(40, 60)):
            present = torch.ones(len(ids), 2, dtype=torch.uint8)
            present[ids == 47] = 0
            views = {f"x{m}": (ids[:, None] * torch.ones(4)).sin() for m in range(2)}
            parts.append(Dataset({"id": ids, "present": present, **views}, spec))
        return Splits(*parts)
"""


@pytest.mark.parametrize(
    ("fields", "names"),
    [(("x0", "x1"), "test sample 47 'present'"), (("x0", "x0"), "mixture.expert[1] mixture.expert[0] 'x0'")],
)
@pytest.mark.parametrize("engine", ["Native", "FSDP"])
def test_rows_and_experts_are_checked_before_training(
    engine: str, fields: tuple[str, str], names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the engine, and whatever the split: a run that cannot be evaluated at its end does not begin."""
    monkeypatch.chdir(tmp_path)
    Path("holed_tests.py").write_text(HOLED)
    experts = [
        {"class_path": "mixdist.experts.Modality", "init_args": {"field": field, "network": mlp(8)}} for field in fields
    ]
    config = {
        "data": {"class_path": "holed_tests.Holed"},
        "mixture": {"class_path": "mixdist.mixtures.MMVAE", "init_args": {"expert": experts}},
        "engine": {"class_path": f"mixdist.engines.{engine}"},
        "train": {"epochs": 1, "batch_size": 20},
    }
    refused("train", "--config", write_config(tmp_path / "config.yaml", config), names=names)


def test_an_expert_that_cannot_be_made_is_named() -> None:
    data = views(2, False).first(4)
    for own, told in (({"scale": 0.0}, "scale"), ({"field": "x9"}, "'x9'"), ({"private": -1}, "private")):
        experts = [functools.partial(Modality, field="x0"), functools.partial(Modality, **{"field": "x1", **own})]
        with pytest.raises(ValueError, match=rf"^mixture\.expert\[1\]: .*{told}"):
            made(MMVAE(experts), data)
    for wrong in ([], functools.partial(Modality, field="x0")):
        with pytest.raises(ValueError, match=r"mixture\.expert \(.*\) must be a list"):
            MMVAE(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scale \('pixel'\) must be a number or learned"):
        Modality(data.spec, field="x0", scale="pixel")  # type: ignore[arg-type]
