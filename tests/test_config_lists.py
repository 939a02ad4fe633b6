"""A mistake in an entry of a list is told with the entry's place: a list of experts, of phases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launch import HARD, SMALL, changed, refused, write_config

VAE = "mixdist.experts.VAE"


def vae(**options: Any) -> dict[str, Any]:
    return {"class_path": VAE, "init_args": options}


def mlp(**options: Any) -> dict[str, Any]:
    return {"class_path": "mixdist.nets.MLP", "init_args": options}


ENTRIES: dict[str, tuple[Any, str]] = {
    "unknown key": (
        vae(latnt=3),
        "unknown config key mixture.expert[1].latnt: did you mean latent? mixdist.experts.VAE",
    ),
    "wrong type": (vae(latent="x"), "mixture.expert[1].latent (x) must be a whole number"),
    "wrong word": (vae(likelihood="gausian"), "mixture.expert[1].likelihood (gausian) did you mean gaussian?"),
    "deeper": (vae(network=mlp(hiden=[3])), "mixture.expert[1].network.hiden: did you mean hidden?"),
    "a deeper value": (vae(network=mlp(hidden="a")), "mixture.expert[1].network.hidden (a) must be a list"),
    "no such class": (
        {"class_path": "mixdist.experts.VEA"},
        "mixture.expert[1] (mixdist.experts.VEA) mixdist.experts.VAE",
    ),
    "another base": ({"class_path": "mixdist.gates.Softmax"}, "mixture.expert[1] (mixdist.gates.Softmax) Expert"),
    "a base": ({"class_path": "mixdist.experts.Expert"}, "mixture.expert[1] (mixdist.experts.Expert) subclass"),
    "a word": ("mixdist.experts.VEA", "mixture.expert[1] (mixdist.experts.VEA) mixdist.experts.VAE"),
    "a number": (3, "mixture.expert[1] (3) Expert"),
    "nothing": (None, "mixture.expert[1] (null) Expert"),
    "no class": ({"init_args": {"latent": 3}}, "mixture.expert[1] class_path"),
}
PHASES: dict[str, tuple[Any, str]] = {
    "unknown key": ({"epoch": 2}, "unknown config key pretrain[1].epoch: did you mean epochs?"),
    "wrong type": ({"epochs": "a"}, "pretrain[1].epochs (a) must be a whole number"),
    "deeper": (
        {"objective": {"class_path": "mixdist.mixtures.SoftMinLoss", "init_args": {"temperatur": 3}}},
        "pretrain[1].objective.temperatur: did you mean temperature?",
    ),
    "no such class": ({"objective": "Foo"}, "pretrain[1].objective (Foo) Objective"),
    "a base": (
        {"objective": "mixdist.mixtures.Objective"},
        "pretrain[1].objective (mixdist.mixtures.Objective) subclass",
    ),
    "a number": (3, "pretrain[1] (3) epochs, batch_size"),
}


def of_experts(experts: Any, base: Any = SMALL) -> Any:
    config = changed(base, expert=experts)
    config["mixture"]["init_args"].pop("num_experts")
    return config


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("base", [SMALL, HARD], ids=["Soft", "Competition"])
def test_a_mistake_in_a_list_of_experts_names_the_entry(
    base: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong, words = ENTRIES[name]
    config = write_config(tmp_path / "c.yaml", of_experts([vae(latent=2), wrong, vae()], base))
    refused("train", "--config", config, names=words)


@pytest.mark.parametrize("name", PHASES)
def test_a_mistake_in_a_list_of_phases_names_the_entry(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong, words = PHASES[name]
    config = write_config(tmp_path / "c.yaml", changed(pretrain=[{"epochs": 1}, wrong]))
    refused("train", "--config", config, names=words)


def test_a_list_on_the_command_line_is_that_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path / "c.yaml", of_experts([vae(), vae()]))
    wrong = json.dumps([vae(), vae(latnt=3)])
    for words in (["--mixture.expert", wrong], [f"--mixture.expert={wrong}"]):
        refused("train", "--config", config, *words, names="mixture.expert[1].latnt")


def test_a_mistake_elsewhere_is_told_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where entries of lists could not stand alone: they are no part of it."""
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path / "c.yaml", of_experts([vae(), vae()]))
    refused("train", "--config", config, "--train.epochs", "x", names="train.epochs (x) must be")
    refused("train", "--config", config, "--mixture.expertt", "x", names="mixture.expertt: did you mean expert?")
