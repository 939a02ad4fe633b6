"""Coherence, probes and pictures of modalities: mixtures whose answers are known."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mixdist.cli.evaluate import evaluate_parser
from mixdist.cli.judge import judge_rows
from mixdist.config.build import Session
from mixdist.data import Dataset, Digits
from mixdist.data.words import SPECIAL, encode
from mixdist.evaluation.evaluate import evaluate
from mixdist.experts import Modality
from mixdist.mixtures import MMVAE, Context, Evaluation, MoPoE, PoEMVAE, pictures
from mixdist.mixtures.coherence import MOST, given_sets
from mixdist.mixtures.judges import Judges
from mixdist.mixtures.multimodal import Multimodal
from mixdist.nets import MLP, Text
from mixdist.parallel.agreement import Agreed
from mixdist.parallel.wire import Wire
from mixdist.report.gallery import draw_picture
from mixdist.terms import Field
from tests.launch import changed, write_config
from tests.parity import mesh_of

NUM, CLASSES = 90, 3
KINDS = {"mmvae": functools.partial(MMVAE, samples=2), "poe": PoEMVAE, "mopoe": MoPoE}
WORDS = (*SPECIAL, "red", "green", "blue", "bird")


def rows(first: int, modalities: int, absent: bool = False, num: int = NUM) -> Dataset:
    """Each modality shows the class one-hot, with a little noise."""
    ids = torch.arange(first, first + num)
    label = ids % CLASSES
    generator = torch.Generator().manual_seed(first)
    spec: dict[str, Field] = {"label": Field((), torch.uint8, num_classes=CLASSES)}
    columns = {"id": ids, "label": label.byte()}
    for m in range(modalities):
        noise = 0.05 * torch.randn(num, CLASSES, generator=generator)
        columns[f"x{m}"], spec[f"x{m}"] = torch.eye(CLASSES)[label] + noise, Field((CLASSES,), torch.float32)
    if absent:
        there = torch.ones(num, modalities, dtype=torch.uint8)
        there[::4, 0] = 0
        columns["present"], spec["present"] = there, Field((modalities,), torch.uint8)
    return Dataset(columns, spec, "label")


def made(kind: str, data: Dataset, modalities: int, seed: int = 0) -> Multimodal:
    own: dict[str, Any] = {"network": MLP([]), "likelihood": "gaussian", "scale": 0.1, "mean": "identity"}
    mixture = KINDS[kind](
        [functools.partial(Modality, field=f"x{m}", **own) for m in range(modalities)], latent=CLASSES
    )
    mesh = mesh_of(modalities, 1, 1)
    mixture.setup(Context(seed, torch.float64, data.spec, mesh, Wire(mesh.device)))
    return mixture


@torch.no_grad()
def knowing(mixture: Multimodal, turned: tuple[int, ...] = ()) -> Multimodal:
    """Make z what is seen, 20 times, and what is decoded z; modalities in ``turned`` decode the next class."""
    own = torch.eye(CLASSES, dtype=torch.float64)
    for e, expert in mixture.modalities.items():
        encoder, decoder = (net.layers[0] for net in (expert.encoder, expert.decoder))
        encoder.weight.copy_(torch.cat([20 * own, 0 * own], dim=1))  # weights are (inputs, outputs)
        decoder.weight.copy_(own.roll(1, dims=1) if e in turned else own)
        encoder.bias.zero_()
        decoder.bias.zero_()
    return mixture


def test_sets_of_given_modalities() -> None:
    assert given_sets(2) == [(0,), (1,)]
    assert [len(given_sets(num)) for num in range(2, MOST + 1)] == [2**num - 2 for num in range(2, MOST + 1)]
    assert {len(one) for one in given_sets(MOST + 1)} == {1, MOST}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_known_is_coherent(kind: str) -> None:
    train, test = rows(0, 3), rows(1000, 3)
    found = evaluate(knowing(made(kind, train, 3)), test, 40, 0, 4, train)
    told = {name: value for name, value in found.figures.items() if "coherence" in name and "joint" not in name}
    assert set(told) == {f"coherence_x{n}_to_x{m}" for n in range(3) for m in range(3) if n != m} | {
        "coherence_given_1",
        "coherence_given_2",
    }
    assert min(told.values()) > 0.99
    assert all(found.figures[f"{n}_x{m}"] > 0.99 for n in ("classifier_accuracy", "probe_logistic") for m in range(3))
    by_given = found.protocol["coherence_by_given"]
    assert len(by_given) == 6 + 3
    assert by_given["x0+x2 -> x1"] > 0.99
    assert found.figures["coherence_joint"] > 0.7  # one decoder for all; far from rows classifiers differ
    assert found.errors["coherence_joint"] < 0.005


def test_a_modality_that_says_something_else_is_seen() -> None:
    train, test = rows(0, 3), rows(1000, 3)
    found = evaluate(knowing(made("mmvae", train, 3), turned=(2,)), test, 40, 0, 4, train).figures
    assert found["coherence_x0_to_x1"] > 0.99
    assert max(found["coherence_x0_to_x2"], found["coherence_x1_to_x2"]) < 0.01
    assert found["coherence_x2_to_x0"] > 0.99
    assert found["coherence_given_1"] == pytest.approx(4 / 6, abs=0.01)
    assert found["coherence_given_2"] == pytest.approx(2 / 3, abs=0.01)
    assert found["coherence_joint"] < 0.05
    assert found["probe_logistic_x2"] > 0.99


def test_absent_modalities_are_neither_given_nor_counted() -> None:
    train, test = rows(0, 2, absent=True), rows(1000, 2, absent=True)
    found = evaluate(knowing(made("mmvae", train, 2)), test, 40, 0, 4, train)
    lacks = ~test.rows["present"][:, 0].bool().numpy()
    for name in ("coherence_x0_to_x1", "classifier_accuracy_x0", "probe_logistic_x0"):
        assert np.array_equal(np.isnan(found.columns[name]), lacks)
    assert np.isfinite(found.columns["coherence_x1_to_x0"]).all()  # it can be made, and judged by the label
    assert found.figures["coherence_given_1"] > 0.99


def test_what_no_training_row_has_is_not_judged() -> None:
    """Without a classifier there is no accuracy that a figure could be read against."""
    train, test = rows(0, 3, absent=True), rows(1000, 3, absent=True)
    train.rows["present"][:, 0] = 0
    found = evaluate(made("mmvae", train, 3), test, 40, 0, 4, train)
    judged = {name for name in found.figures if name.startswith(("coherence", "probe", "classifier"))}
    assert judged == {f"{name}_x{m}" for name in ("probe_logistic", "classifier_accuracy") for m in (1, 2)} | {
        f"coherence_x{n}_to_x{m}" for n in range(3) for m in (1, 2) if n != m
    } | {"coherence_given_1", "coherence_given_2"}
    assert not any(key.endswith("-> x0") for key in found.protocol["coherence_by_given"])


def test_judging_changes_no_other_figure_and_is_asked_for_by_samples() -> None:
    train, test = rows(0, 2), rows(1000, 2)
    mixture = made("mmvae", train, 2)
    state = torch.get_rng_state()
    with_them, without = (evaluate(mixture, test, 40, 0, 4, given).figures for given in (train, None))
    assert torch.equal(state, torch.get_rng_state())
    assert {name: with_them[name] for name in without} == without
    assert not any("coherence" in name for name in evaluate(mixture, test, 40, 0, None, train).figures)


def test_judges_depend_on_the_training_rows_alone() -> None:
    train, other = rows(0, 2), rows(500, 2)
    x = torch.randn(200, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    judges = [Judges(made("mmvae", train, 2, seed), data) for seed, data in ((0, train), (7, train), (0, other))]
    outputs = [one.networks[1](x) for one in judges]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert judges[0].predict(1, torch.eye(CLASSES, dtype=torch.float64)).tolist() == [0, 1, 2]


def test_runs_on_unlike_rows_may_be_judged_alike() -> None:
    """Classifiers of other rows change what they judge, and no other figure."""
    few, many, test = rows(0, 2, num=5), rows(500, 2), rows(1000, 2)
    few.rows["x1"].zero_()  # nothing to learn from
    mixture = made("mmvae", few, 2)
    own, alike, there = (
        evaluate(mixture, test, 40, 0, 4, train, judges_from=judges)
        for train, judges in ((few, None), (few, many), (many, None))
    )
    judged = {name for name in own.figures if name.startswith(("coherence", "classifier"))}
    assert {name: alike.figures[name] for name in judged} == {name: there.figures[name] for name in judged}
    assert alike.figures["classifier_accuracy_x1"] > 0.9 > own.figures["classifier_accuracy_x1"]
    rest = own.figures.keys() - judged
    assert {name: alike.figures[name] for name in rest} == {name: own.figures[name] for name in rest}
    assert alike.protocol["classifiers_trained_on"] == {"rows": NUM, "fingerprint": many.fingerprint}


@pytest.mark.parametrize(
    ("judged", "made_of", "evaluated", "names"),
    [
        (True, None, "test", ["gone", "config.yaml"]),
        (False, {}, "test", ["other", "Soft"]),
        (True, {}, "train", ["other", "sample 0"]),
        (True, {"data": "mixdist.data.Bananas"}, "test", ["other", "'x'"]),
    ],
)
def test_judges_that_do_not_suit_are_refused(
    judged: bool, made_of: dict[str, Any] | None, evaluated: str, names: list[str], tmp_path: Path
) -> None:
    if made_of is not None:
        (tmp_path / "other").mkdir()
        write_config(tmp_path / "other" / "config.yaml", changed(**made_of))
    judge = str(tmp_path / ("gone" if made_of is None else "other"))
    digits, mixture = Digits().load(), type("Soft", (), {"judged": judged})()
    session = Session(mesh_of(1, 1, 1), digits.train, digits.test, mixture)
    with (
        pytest.raises(Agreed, match=r"^--judge ") as refused,
        judge_rows(evaluate_parser(), judge, session, getattr(digits, evaluated)),
    ):
        pass
    assert all(name in str(refused.value) for name in names), refused.value


def test_judges_are_the_other_run_s_training_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those that can be read, and are closed at the end."""
    closed: list[int] = []
    write_config(tmp_path / "config.yaml", changed())
    mixture: Any = SimpleNamespace(judged=True)
    digits = Digits().load()
    session = Session(mesh_of(1, 1, 1), digits.train, digits.test, mixture)
    monkeypatch.setattr(Dataset, "unreadable", lambda self, rank, ranks: [(0, "torn")])
    monkeypatch.setattr(Dataset, "without", lambda self, samples: self.first(len(self) - len(samples)), raising=False)
    monkeypatch.setattr(Dataset, "close", lambda self: closed.append(len(self)))
    with judge_rows(evaluate_parser(), str(tmp_path), session, digits.test) as found:
        assert found is not None
        assert found.fingerprint == digits.train.first(len(found)).fingerprint
        assert len(found) == len(digits.train) - 1
        assert not closed
    assert closed == [len(found), len(digits.test)]
    with judge_rows(evaluate_parser(), None, session, digits.test) as none:
        assert none is None


# Pictures


def birds(first: int, num: int = 24) -> Dataset:
    """Images of one colour, and a sentence that names it."""
    ids = torch.arange(first, first + num)
    image = torch.zeros(num, 3, 8, 8, dtype=torch.uint8)
    image[torch.arange(num), ids % 3] = 255
    text = encode([f"{('red', 'green', 'blue')[c]} bird" for c in (ids % 3).tolist()], WORDS, 5).short()
    spec = {
        "image": Field((3, 8, 8), torch.uint8, 1 / 255),
        "text": Field((5,), torch.int16, num_classes=len(WORDS), words=WORDS),
        "y": Field((), torch.uint8, num_classes=3),
    }
    return Dataset({"id": ids, "image": image, "text": text, "y": (ids % 3).byte()}, spec, "y", ("r", "g", "b"))


def test_sentences_stand_under_images_and_latents_in_the_plane(tmp_path: Path) -> None:
    data = birds(0)
    text = functools.partial(Modality, field="text", likelihood="categorical", padding=0, network=Text(4, [4]))
    mixture = MMVAE([functools.partial(Modality, field="image", network=MLP([4])), text], latent=2, samples=1)
    mesh = mesh_of(2, 1, 1)
    mixture.setup(Context(0, torch.float32, data.spec, mesh, Wire(mesh.device)))
    shown = {one.name: one for one in mixture.pictures(data, Evaluation(data, {}), 0)}
    captions, plane = shown["captions.png"], shown["latents.png"]
    assert isinstance(captions, pictures.Captioned)
    assert captions.titles == ["data", "text from image", "image from text", "samples"]
    assert captions.texts[0] == captions.texts[2]
    assert captions.texts[0][0] == "red bird"
    assert np.array_equal(captions.images[0], captions.images[1])
    assert all(block.shape[1:] == (3, 8, 8) for block in captions.images)
    assert isinstance(plane, pictures.Latents)
    assert plane.points.shape == (2 * len(data), 2)
    assert [title for title, _, _ in plane.groups] == ["by modality", "by y"]
    assert np.bincount(plane.groups[0][1]).tolist() == [24, 24]
    assert plane.groups[1][2] == ["r", "g", "b"]
    for one in (captions, plane):
        assert draw_picture(tmp_path, one).stat().st_size > 1000
