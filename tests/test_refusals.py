"""What a user's mistakes meet: exit code 2, one line that names the key and the value, and nothing left behind.

What a line says besides is not compared: messages may be reworded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mixdist.config.config import Config
from mixdist.config.options import parse
from mixdist.config.parsing import config_parser
from tests.errors import error_of
from tests.launch import HARD, REMOVED, SMALL, refused, write_config

LR = "torch.optim.lr_scheduler"
OWN_ROWS = '''
"""A source as a user would write it."""
import os
import torch
from mixdist.data import Dataset, Source
from mixdist.terms import Field


class Rows(Source):
    """Twelve rows of two numbers, without labels; one may not be a number, or one rank may not find them."""

    def __init__(self, bad: float = 0.0, fails_on: int = -1) -> None:
        self.bad, self.fails_on = bad, fails_on

    def load(self):
        if int(os.environ.get("RANK", "0")) == self.fails_on:
            raise ValueError("the disk of this rank has no rows: mount it")
        x = torch.arange(24.0).reshape(12, 2) / 24
        x[7, 1] = self.bad
        spec = {"x": Field((2,), torch.float32)}
        return tuple(Dataset({"id": torch.arange(12) + first, "x": x}, spec) for first in (0, 12))
'''
OWN_FILES = {
    "broken_import.py": "import nix_of_that_name\nclass Mine: ...\n",
    "broken_syntax.py": "class Mine(:\n",
    "weighing.py": "from mixdist.competition import Random\n\n\nclass Weighing(Random):\n    fields = ('w',)\n",
    "own_rows.py": OWN_ROWS,
    "flow.yaml": "num_experts: [1, 2\ngate: {\n",
    "tab.yaml": "train:\n\tepochs: 3\n",
    "list.yaml": "- 1\n- 2\n",
    "twice.yaml": "num_experts: 3\nseed: 1\nnum_experts: 4\n",
    "nothing.yaml": "# nothing\n",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with a user's own classes, without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, text in OWN_FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    write_config(tmp_path / "c.yaml", SMALL)
    return tmp_path


def placed(path: str) -> tuple[str, ...]:
    """Return the way to a key of a config; what is no key of its own is the mixture's."""
    keys = path.split(".")
    return tuple(keys if keys[0] in Config.__dataclass_fields__ else ["mixture", "init_args", *keys])


def of(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, **({"init_args": init_args} if init_args else {})}


def entries(node: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every key of a config, through its sections and lists."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, inner in inside:
        if isinstance(key, str):
            yield (*at, key)
        yield from entries(inner, (*at, key))


def put(config: Any, at: tuple[Any, ...], value: Any, name: str | None = None) -> Any:
    """Return a config with another value, or another name, for one key."""
    config = copy.deepcopy(config)
    section = config
    for key in at[:-1]:
        section = section.setdefault(key, {}) if isinstance(section, dict) else section[key]
    if name is not None:
        section[name] = section.pop(at[-1])
    elif value is REMOVED:
        del section[at[-1]]
    else:
        section[at[-1]] = value
    return config


def refused_config(config: Any, names: str = "") -> str:
    return refused("train", "--config", write_config(Path("changed.yaml"), config), names=names)


def altered(config: Any, changes: dict[str, Any]) -> Any:
    """Return a config with other values by dotted keys."""
    for path, value in changes.items():
        config = put(config, placed(path), value)
    return config


SOFT = altered(
    SMALL,
    {
        "routing.k": 2,
        "compute.bf16": False,
        "mesh.device": "cpu",
        "checkpoint.keep": 2,
        "pretrain": [{"epochs": 1}],
        "train.schedule": of(f"{LR}.StepLR", step_size=3),
    },
)
EVERY_KEY = [(config, at) for config in (SOFT, HARD) for at in entries(config)]


def ways(*but: str) -> Any:
    """Return every key of both configs as test cases."""
    kept = [(config, at) for config, at in EVERY_KEY if at[-1] not in but]
    return pytest.mark.parametrize(("config", "at"), kept, ids=[".".join(map(str, at)) for _, at in kept])


@ways()
def test_a_misspelt_key_is_refused_at_any_depth(config: Any, at: tuple[Any, ...]) -> None:
    right = at[-1]
    wrong = right[1] + right[0] + right[2:] if len(right) > 1 else right + "z"
    line = refused_config(put(config, at, None, wrong), right)
    assert wrong in line or right in ("data", "expert", "num_experts")  # which are lacking


@ways()
def test_a_value_of_the_wrong_type_is_refused_at_any_depth(config: Any, at: tuple[Any, ...]) -> None:
    line = refused_config(put(config, at, "nonsense"), "nonsense")
    assert any(key in line for key in [key for key in at if isinstance(key, str)][-2:])  # for a class, its owner's


@ways("balance", "schedule", "routing", "network")  # which may be null
def test_null_is_refused_where_something_must_be(config: Any, at: tuple[Any, ...]) -> None:
    refused_config(put(config, at, None), at[-1])


@pytest.mark.parametrize("form", [("{}", "null"), ("{}=null",)])
def test_null_on_the_command_line_is_that_of_a_file(form: tuple[str, ...], tmp_path: Path) -> None:
    parser = config_parser()
    config = write_config(tmp_path / "c.yaml", altered(HARD, {"score.init_args.batches": 3, "compute.micro_batch": 7}))

    def parsed(*options: str) -> Any:
        words = [word.format(option) for option in options for word in form]
        return parse(parser, ["--config", config, *words, "--mixture.rounds", "3"]).mixture.init_args

    before = parsed()
    assert (before.score.init_args.batches, before.compute.micro_batch) == (3, 7)
    for score_key in ("--mixture.score.batches", "--mixture.init_args.score.init_args.batches"):
        after = parsed(score_key, "--mixture.compute.micro_batch")
        assert (after.score.init_args.batches, after.compute.micro_batch, after.rounds) == (None, None, 3)
        after.score.init_args.batches, after.compute.micro_batch = 3, 7
        assert after == before
    error_of(lambda: parsed("--mixture.score.epochs"), "mixture.score.epochs (null)", "whole number such as 10")
    error_of(lambda: parsed("--mixture.score.nix"), "unknown config key mixture.score.nix", "batches")


def test_a_key_in_the_wrong_section_is_told_its_own() -> None:
    refused_config({**SOFT, "epochs": 4}, "epochs train.epochs")


ORACLE, LIKELIHOOD = of("mixdist.competition.LabelOracle"), of("mixdist.competition.Likelihood")
MIXTURE_LIKELIHOOD = of("mixdist.mixtures.SoftMinLoss")
NETWORK = "score.init_args.network"
MEANINGLESS: list[tuple[Any, dict[str, Any], str]] = [
    # a class that cannot be
    (SOFT, {"gate.class_path": "mixdist.gates.SoftMax"}, "gate mixdist.gates.SoftMax mixdist.gates.Softmax"),
    (SOFT, {"gate.class_path": "mixdist.gate.Softmax"}, "gate mixdist.gate.Softmax mixdist.gates.Softmax"),
    (SOFT, {"expert": "Vae"}, "expert Vae mixdist.experts.VAE"),
    (SOFT, {"data": "nowhere.Digit"}, "data nowhere.Digit mixdist.data.Digits"),
    (SOFT, {"train.optimizer.class_path": "torch.optim.Adan"}, "train.optimizer torch.optim.Adan torch.optim.Adam"),
    (SOFT, {"gate": of("broken_import.Mine")}, "gate broken_import.Mine nix_of_that_name"),
    (SOFT, {"gate": of("broken_syntax.Mine")}, "broken_syntax.py 1"),
    (SOFT, {"expert": of("mixdist.gates.Softmax")}, "expert mixdist.gates.Softmax Expert mixdist.experts.VAE"),
    (SOFT, {"data": of("mixdist.experts.VAE")}, "data mixdist.experts.VAE Source mixdist.data.Digits"),
    (SOFT, {"gate": of("os.getcwd")}, "gate os.getcwd Gate mixdist.gates.Softmax"),
    (SOFT, {"gate": of("mixdist.gates.Gate")}, "gate mixdist.gates.Gate mixdist.gates.VaDE"),
    (SOFT, {"gate": {"init_args": {"field": "x"}}}, "gate class_path field"),
    (SOFT, {"data": of("mixdist.data.Idx")}, "data.root mixdist.data.Idx"),
    (SOFT, {"train.schedule": of(f"{LR}.StepLR")}, "train.schedule.step_size"),
    (HARD, {"score.class_path": "mixdist.competition.Discriminator"}, "score Discriminator Score"),
    (HARD, {"score": of("mixdist.competition.Score")}, "score mixdist.competition.Score"),
    # a key that is not there, or means nothing
    (SOFT, {"gate": REMOVED}, "gate"),
    (SOFT, {"pretrain": [{"epochs": 1}, {"eepochs": 2}]}, "eepochs"),
    (SOFT, {"num_experts": REMOVED}, "num_experts"),
    (HARD, {"gate": of("mixdist.gates.Softmax")}, "gate"),
    (HARD, {"train.trains": "gate"}, "train.trains gate competition"),
    (HARD, {"train.accumulate": 2}, "train.accumulate 2 competition"),
    (HARD, {"train.objective": MIXTURE_LIKELIHOOD}, "train.objective SoftMinLoss"),
    (HARD, {"pretrain": [{"objective": MIXTURE_LIKELIHOOD}]}, "pretrain[0].objective SoftMinLoss"),
    (HARD, {"train.objective": SOFT["train"]["objective"]}, "train.objective WeightedLoss balance"),
    # a number out of range
    (SOFT, {"num_experts": 0}, "num_experts (0)"),
    (SOFT, {"num_experts": 4.5}, "num_experts (4.5)"),
    (SOFT, {"seed": -1}, "seed (-1)"),
    (SOFT, {"log_every": 0}, "log_every (0)"),
    (SOFT, {"train.epochs": 0}, "train.epochs (0)"),
    (SOFT, {"train.clip_norm": float("nan")}, "train.clip_norm (nan)"),
    (SOFT, {"pretrain": [{"batch_size": -1}]}, "pretrain[0].batch_size (-1)"),
    (SOFT, {"checkpoint.keep": 0}, "checkpoint.keep (0)"),
    (SOFT, {"data.init_args.test_fraction": 3.0}, "test_fraction (3.0)"),
    (SOFT, {"gate.init_args.network.init_args.hidden": [8, "x"]}, "hidden x"),
    (SOFT, {"gate.init_args.temperature": 0.0}, "temperature (0.0)"),
    (SOFT, {"expert.init_args.beta": -1.0}, "beta (-1.0)"),
    (SOFT, {"train.objective.init_args.balance.init_args.weight": -1.0}, "weight (-1.0)"),
    (SOFT, {"train.optimizer.init_args.lr": -1.0}, "train.optimizer -1.0"),
    (SOFT, {"mesh.ep_size": 3}, "ep_size 3"),
    (SOFT, {"mesh.device": "cuda"}, "mesh.device (cuda)"),
    (SOFT, {"routing.k": 0}, "k (0)"),
    (SOFT, {"routing.k": 9}, "k (9) num_experts"),
    (SOFT, {"routing.capacity_factor": -1.0}, "capacity_factor (-1.0)"),
    (SOFT, {"compute.micro_batch": 0}, "micro_batch (0)"),
    (HARD, {"num_experts": 121}, "num_experts (121) 120"),
    (HARD, {"train.epochs": 0}, "train.epochs (0)"),
    (HARD, {"rounds": 0}, "rounds (0)"),
    (HARD, {"e_steps": 0}, "e_steps (0)"),
    (HARD, {"e_steps": 3}, "e_steps (3) Discriminators by_shares"),
    (HARD, {"temperature": -1.0}, "temperature (-1.0)"),
    (HARD, {"temperature": 1.0}, "temperature (1.0) anneal_rounds (0)"),
    (HARD, {"temperature": 1.0, "anneal_rounds": -1}, "anneal_rounds (-1)"),
    (
        HARD,
        {"temperature": 1.0, "anneal_rounds": 1, "score": of("mixdist.competition.Fixed")},
        "temperature (1.0) Fixed",
    ),
    (SOFT, {"train.objective": of("mixdist.mixtures.SoftMinLoss", final_temperature=2.0)}, "final_temperature (2.0)"),
    (HARD, {"block": 0}, "block (0)"),
    (HARD, {"starved_below": 1.5}, "starved_below (1.5)"),
    (HARD, {"stop_below": -0.1}, "stop_below (-0.1)"),
    (HARD, {"starved": "feed"}, "starved (feed)"),
    (HARD, {"score.init_args.batches": 0}, "batches (0)"),
    (HARD, {"score": of("mixdist.competition.Likelihood", num_samples=0)}, "num_samples (0)"),
    # what does not go together
    (SOFT, {"routing.k": 2, "prefetch": True}, "prefetch (true)"),
    (
        SOFT,
        {"one_way": True, "train.objective": MIXTURE_LIKELIHOOD},
        "one_way (true) train.objective SoftMinLoss",
    ),
    (SOFT, {"execution": "stacked", "compute.recompute": True}, "recompute (True) execution stacked"),
    (HARD, {"start": "table"}, "start (table)"),
    (HARD, {"table": "t.npy"}, "table (t.npy)"),
    # what does not work element by element, needs a metric, is too short, or trains nothing
    (SOFT, {"train.optimizer": of("torch.optim.LBFGS")}, "train.optimizer"),
    (SOFT, {"train.schedule": of(f"{LR}.ReduceLROnPlateau")}, "train.schedule"),
    (
        SOFT,
        {"train.schedule": of(f"{LR}.OneCycleLR", max_lr=0.1, total_steps=10, pct_start=0.1)},
        "train.schedule",
    ),  # torch divides by 1 - 1 after warm-up
    (SOFT, {"train.schedule": of(f"{LR}.OneCycleLR", max_lr=0.1, total_steps=2)}, "train.schedule 2"),
    (SMALL, {"gate": of("mixdist.gates.Uniform"), "train.trains": "gate"}, "gate trains"),
    # data without what is asked of it
    (SOFT, {"data": of("own_rows.Rows"), "gate": of("mixdist.gates.LabelOracle")}, "'y' LabelOracle"),
    (SOFT, {"data": of("own_rows.Rows", bad=float("inf"))}, "'x' 7 inf"),
    (SOFT, {"data": of("mixdist.data.Idx", root="nowhere")}, "nowhere"),
    (SOFT, {"expert.init_args.field": "pixels"}, "'pixels' VAE"),
    (HARD, {"data": of("own_rows.Rows"), "score": ORACLE}, "'y' LabelOracle"),
    (HARD, {"score": of("mixdist.competition.LabelOracle", field="label")}, "'label' ['y'] LabelOracle"),
    (HARD, {"score": ORACLE, "num_experts": 2}, "num_experts 2 3 LabelOracle"),
    (HARD, {"expert": of("mixdist.experts.Regressor", input="x", target="x")}, "Regressor"),
    (HARD, {"expert": of("mixdist.experts.Centroid"), "score": LIKELIHOOD}, "Centroid Likelihood"),
    # what only scoring needs
    (HARD, {NETWORK: of("mixdist.nets.Conv")}, "images"),
    (HARD, {f"{NETWORK}.init_args.hidden": [0]}, "[2, 0, 1]"),
    (HARD, {"data": of("mixdist.data.Parabolas"), "score.init_args.reads": "y"}, "(y) x VAE"),
    (HARD, {"score.init_args.optimizer": of("torch.optim.LBFGS")}, "score optimizer"),
    (HARD, {"score": "weighing.Weighing"}, "score Weighing 'w'"),
]


@pytest.mark.parametrize(("config", "changes", "words"), MEANINGLESS, ids=[words for *_, words in MEANINGLESS])
def test_what_makes_no_sense_is_refused_before_training(config: Any, changes: dict[str, Any], words: str) -> None:
    refused_config(altered(config, changes), words)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("tarin", "tarin train"),
        ("train", "data --config"),
        ("train --config none.yaml", "none.yaml"),
        ("train --config .", "--config ."),
        ("train --config", "--config"),
        ("train --resume", "--resume"),
        ("train --resume runs/none", "--resume runs/none"),
        ("train c.yaml", "c.yaml --config"),
        ("train --config c.yaml --epochs 3", "--epochs --train.epochs"),
        ("train --config c.yaml --train.epoch 3", "--train.epoch --train.epochs"),
        ("train --config c.yaml --log_evry 3", "--log_evry --log_every"),
        ("train --config c.yaml --data.init_args.test_fractoin 3", "data.test_fractoin test_fraction"),
        ("train --config c.yaml --train.epochs=x", "train.epochs x"),
        ("train --config c.yaml --train 3", "train 3"),
        ("train --config c.yaml --out c.yaml", "c.yaml --out"),
        ("train --data.help Nope", "data Nope"),
        ("train --config flow.yaml", "flow.yaml 2"),
        ("train --config tab.yaml", "tab.yaml 2"),
        ("train --config list.yaml", "list.yaml"),
        ("train --config twice.yaml", "twice.yaml 3 num_experts"),
        ("train --config nothing.yaml", "nothing.yaml"),
        ("train --config binary.yaml", "binary.yaml"),
        ("sample", "sample RUN"),
        ("sample runs/none", "runs/none"),
        ("sample runs/none --num_samples 0", "num_samples (0)"),
        ("sample runs/none --num_samples x", "num_samples (x)"),
        ("evaluate", "evaluate RUN"),
        ("evaluate --num_samples 3", "evaluate RUN"),
        ("evaluate runs/none", "runs/none"),
        ("evaluate --num_samples 3 runs/none", "runs/none"),
        ("prepare", "prepare"),
        ("prepare celebb data", "celebb celeba"),
        ("index", "index"),
        ("index nowhere", "nowhere"),
        ("verify", "verify"),
        ("verify nowhere", "nowhere"),
    ],
)
def test_a_command_that_cannot_be_is_refused(argv: str, words: str) -> None:
    refused(*argv.split(), names=words)


@pytest.mark.parametrize(
    ("num_experts", "world_size", "words"), [(4, 6, "4 6 ep_size 1, 2 or 3"), (2, 3, "2 3 ep_size 1")]
)
def test_a_layout_that_does_not_fit_lists_those_that_do(
    num_experts: int, world_size: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    refused_config(altered(SMALL, {"num_experts": num_experts}), words)
