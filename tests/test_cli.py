"""What a user meets at the command line: help, mistakes told in one line, a run and what can be done with it."""

from __future__ import annotations

import dataclasses
import fcntl
import gzip
import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import mixdist
from mixdist.cli.train import train_parser
from mixdist.config.config import CheckpointConfig, Config, DispatchConfig, MeshConfig
from mixdist.data import Blobs, Digits
from mixdist.experts import Compute
from mixdist.training.manifest import MANIFEST
from mixdist.training.phases import Phase
from tests.launch import REMOVED, SMALL, Ended, changed, here, torchrun, write_config


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, which is where a user's own classes are looked for."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def complaint(ended: Ended) -> str:
    """Hold a command that failed against the rule: exit code 2 and one line on stderr; give the line."""
    assert ended.code == 2, ended
    assert ended.out == ""
    assert ended.err.startswith("mixdist: ")
    assert ended.err.count("\n") == 1, ended.err
    assert "Traceback" not in ended.err
    assert "  " not in ended.err
    return ended.err.removeprefix("mixdist: ").strip()


def refused(*words: str) -> str:
    """Run a command that must be refused without leaving a trace; give its complaint."""
    before = sorted(Path().rglob("*"))
    line = complaint(here(*words))
    after = [path for path in sorted(Path().rglob("*")) if "__pycache__" not in path.parts]
    assert after == [path for path in before if "__pycache__" not in path.parts]
    return line


def refused_config(config: Any, *words: str) -> str:
    return refused("train", "--config", write_config(Path("c.yaml"), config), *words)


HIDDEN = "gate__init_args__network__init_args__hidden"
BALANCE = "train__objective__init_args__balance__"
STEP_LR = "torch.optim.lr_scheduler.StepLR"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_expert": 4}, ["unknown config key num_expert:", "did you mean num_experts?", "test_batch_size"]),
        ({"epochs": 4}, ["unknown config key epochs:", "did you mean train.epochs?"]),
        ({"train__epoch": 3}, ["unknown config key train.epoch:", "did you mean epochs?", "train takes", "clip_norm"]),
        ({"mesh__epsize": 3}, ["unknown config key mesh.epsize:", "did you mean ep_size?", "mesh takes"]),
        ({"checkpoint__evry": 3}, ["unknown config key checkpoint.evry:", "did you mean every?"]),
        ({"gate__initargs": {}}, ["unknown config key gate.initargs:", "did you mean init_args?"]),
        (
            {"gate__init_args__network__init_args__hiden": [3]},
            ["key gate.init_args.network.init_args.hiden:", "did you mean hidden?", "mixdist.nets.MLP takes hidden"],
        ),
        (
            {"gate": {"class_path": "mixdist.gates.Softmax", "init_args": {"temprature": 2.0}}},
            [
                "unknown config key gate.init_args.temprature:",
                "did you mean temperature?",
                "Softmax takes network",
            ],
        ),
        (
            {"expert__init_args__zzz": 3},
            ["unknown config key expert.init_args.zzz: remove it", "mixdist.experts.VAE takes latent, network"],
        ),
        (
            {BALANCE + "init_args__wieght": 1.0},
            ["unknown config key train.objective.init_args.balance.init_args.wieght:", "did you mean weight?"],
        ),
        ({"data__init_args__fraction": 1}, ["unknown config key data.init_args.fraction:", "mean test_fraction?"]),
        ({"train__optimizer__init_args__lrate": 1}, ["unknown config key train.optimizer.init_args.lrate:", "Adam"]),
        (
            {"train__schedule": {"class_path": STEP_LR, "init_args": {"step": 3}}},
            ["unknown config key train.schedule.init_args.step:", "did you mean step_size?"],
        ),
        ({"pretrain": [{"epochs": 1}, {"epoch": 2}]}, ["unknown config key pretrain.epoch:", "did you mean epochs?"]),
        (
            {"pretrain": [{"objective": {"class_path": "mixdist.mixtures.WeightedLoss", "init_args": {"b": 3}}}]},
            ["unknown config key pretrain.objective.init_args.b:", "WeightedLoss takes balance"],
        ),
    ],
)
def test_an_unknown_key_is_refused_at_any_depth(changes: dict[str, Any], told: list[str]) -> None:
    line = refused_config(changed(**changes))
    assert all(part in line for part in told), line


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_experts": "four"}, ["num_experts (four) must be a whole number"]),
        ({"num_experts": 4.5}, ["num_experts (4.5) must be a whole number"]),
        ({"dtype": "float16"}, ["dtype (float16) must be float32 or float64: write dtype: float"]),
        ({"train__epochs": "many"}, ["train.epochs (many) must be a whole number: write epochs: 10"]),
        ({"train__trains": "expert"}, ["train.trains (expert) must be both, gate or experts: write trains: experts"]),
        ({"train": 3}, ["line 21: train is a section: write its keys, such as train.epochs, below it"]),
        ({"mesh__ep_size": "two"}, ["mesh.ep_size (two) must be a whole number or null"]),
        ({HIDDEN: 128}, ["network.init_args.hidden (128) must be a list: write hidden: [128, 64]"]),
        ({HIDDEN: [8, "x"]}, ["network.init_args.hidden (x) must be a whole number"]),
        (
            {"gate__init_args__network__init_args__activation": "gelo"},
            ["activation (gelo) must be relu, sigmoid", "write activation: gelu"],
        ),
        ({"expert__init_args__scale": "learnt"}, ["scale (learnt) must be a number or learned: write scale: learned"]),
        (
            {BALANCE + "init_args__weight": "heavy"},
            ["train.objective.init_args.balance.init_args.weight (heavy) must be a number: write weight: 0.1"],
        ),
        ({"train__optimizer__init_args__lr": "fast"}, ["train.optimizer.init_args.lr (fast) must be a number"]),
        ({"train__optimizer__init_args__fused": "si"}, ["train.optimizer.init_args.fused (si) must be true or false"]),
        ({"data__init_args__test_fraction": "some"}, ["data.init_args.test_fraction (some) must be a number"]),
        ({"data": [1]}, ["data ([1]) must have class_path", "choose mixdist.data.Bananas, mixdist.data.Blobs"]),
        ({"pretrain": {"epochs": 2}}, ["pretrain ({'epochs': 2}) must be a list: write pretrain: [{epochs: 1}]"]),
        ({"expert__init_args__beta": None}, ["expert.init_args.beta (null) must have a value: leave it out"]),
        ({HIDDEN: None}, ["gate.init_args.network.init_args.hidden (null) must have a value"]),
        ({"pretrain": [{"epochs": "two"}]}, ["pretrain.epochs (two) must be a whole number"]),
    ],
)
def test_a_wrong_type_is_refused(changes: dict[str, Any], told: list[str]) -> None:
    line = refused_config(changed(**changes))
    assert all(part in line for part in told), line


OWN = "a file of your own must lie in the working directory"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"gate__class_path": "mixdist.gates.SoftMax"}, ["gate names the class", "mean mixdist.gates.Softmax?", OWN]),
        ({"gate__class_path": "mixdist.gate.Softmax"}, ["gate names the class", "mean mixdist.gates.Softmax?", OWN]),
        ({"expert": "Vae"}, ["expert names the class Vae, which", "did you mean mixdist.experts.VAE?", OWN]),
        ({"data": "nowhere.Mnist"}, ["data names the class nowhere.Mnist", "choose mixdist.data.Bananas", OWN]),
        ({"train__optimizer__class_path": "torch.optim.Nope"}, ["train.optimizer names", "as torch.optim.Adam", OWN]),
        (
            {BALANCE + "class_path": "mixdist.mixtures.Nope"},
            ["train.objective.init_args.balance names the class", "choose mixdist.mixtures.KLBalance", OWN],
        ),
        ({"gate": {"class_path": "broken_import.Mine"}}, ["gate names broken_import.Mine, whose import failed", "nix"]),
        ({"gate": {"class_path": "broken_syntax.Mine"}}, ["broken_syntax.py line 1", "is not Python"]),
        (
            {"expert": {"class_path": "mixdist.gates.Softmax"}},
            ["expert (mixdist.gates.Softmax) must be a subclass of Expert: choose mixdist.experts.Centroid"],
        ),
        ({"gate": {"class_path": "mixdist.experts.VAE"}}, ["gate (mixdist.experts.VAE) must be a subclass of Gate"]),
        ({"data": {"class_path": "mixdist.experts.VAE"}}, ["data (mixdist.experts.VAE) must be a subclass of Source"]),
        ({"gate": {"class_path": "os.getcwd"}}, ["gate (os.getcwd) must be a class: choose mixdist.gates"]),
        ({"gate": {"class_path": "mixdist.gates.Gate"}}, ["gate (mixdist.gates.Gate) is the base class"]),
        ({"gate": {"init_args": {"field": "x"}}}, ["gate has init_args (field) but no class_path: choose"]),
        ({"gate": REMOVED}, ["a config needs a gate (soft mixture) or a competition", "set gate, such as"]),
        ({"num_experts": REMOVED}, ["the config lacks num_experts: add it"]),
        (
            {"data": {"class_path": "mixdist.data.Idx"}},
            ["the config lacks data.init_args.root, without which mixdist.data.Idx cannot be made: add it"],
        ),
        (
            {"train__schedule": {"class_path": STEP_LR}},
            [f"the config lacks train.schedule.init_args.step_size, without which {STEP_LR} cannot be made"],
        ),
    ],
)
def test_a_class_that_cannot_be_is_refused(changes: dict[str, Any], told: list[str]) -> None:
    Path("broken_import.py").write_text("import nix_of_that_name\nclass Mine: ...\n")
    Path("broken_syntax.py").write_text("class Mine(:\n")
    line = refused_config(changed(**changes))
    assert all(part in line for part in told), line


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_experts": 0}, "num_experts (0) must be"),
        ({"seed": -1}, "seed (-1) must be from 0 to 2**64 - 1"),
        ({"log_every": 0}, "log_every (0) must be"),
        ({"train__epochs": 0}, "train.epochs (0) must be"),
        ({"train__clip_norm": float("nan")}, "train.clip_norm (nan) must be"),
        ({"pretrain": [{"batch_size": -1}]}, "pretrain[0].batch_size (-1) must be"),
        ({"checkpoint": {"keep": 0}}, "checkpoint.keep (0) must be"),
        ({"data__init_args__test_fraction": 3.0}, "test_fraction (3.0) must be between 0 and 1: set it to 0.2"),
        ({"expert__init_args__beta": -1.0}, "beta (-1.0) must"),
        ({"gate__init_args__temperature": 0.0}, "Softmax's temperature (0.0) must be positive: give 1"),
        ({BALANCE + "init_args__weight": -1.0}, "VarianceBalance's weight (-1.0) must be 0 or more"),
        (
            {"train__optimizer__init_args__lr": -1.0},
            "train.optimizer cannot be used (Invalid learning rate: -1.0): change its init_args",
        ),
        (
            {"train__optimizer": {"class_path": "torch.optim.LBFGS"}},
            "'closure'): change its init_args, or choose one that works element by element, such as torch.optim.Adam",
        ),
        (
            {"train__schedule": {"class_path": "torch.optim.lr_scheduler.ReduceLROnPlateau"}},
            "train.schedule cannot be used",
        ),
        (
            # 10 steps, the first of them of warm-up: torch divides by 1 - 1.
            {
                "train__schedule": {
                    "class_path": "torch.optim.lr_scheduler.OneCycleLR",
                    "init_args": {"max_lr": 0.1, "total_steps": 10, "pct_start": 0.1},
                }
            },
            "train.schedule cannot be used (float division by zero): change its init_args",
        ),
        ({"mesh__ep_size": 3}, "with ep_size 3: ep_size must divide the world size"),
        ({"routing": {"k": 0}}, "TopK's k (0) must be at least 1"),
        ({"routing": {"k": 9}}, "routing.k (9) must be at most num_experts"),
        ({"routing": {"capacity_factor": -1.0}}, "TopK's capacity_factor (-1.0) must be a positive number"),
        ({"routing": {"k": 2}, "dispatch": {"prefetch": True}}, "dispatch.prefetch (true) needs dense routing"),
        (
            {"dispatch": {"one_way": True}, "train__objective": {"class_path": "mixdist.mixtures.MixtureLikelihood"}},
            "dispatch.one_way (true) needs an objective linear in the experts' losses, and train.objective is",
        ),
        ({"execution": "stacked", "compute": {"recompute": True}}, "compute.recompute (True) needs experts in a loop"),
        ({"compute": {"micro_batch": 0}}, "compute.micro_batch (0) must be at least 1"),
        (
            {"mesh__device": "cuda"},
            "mesh.device (cuda) needs a CUDA device and none is here: set mesh.device to cpu or auto",
        ),
    ],
)
def test_a_value_out_of_range_is_refused(changes: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert told in refused_config(changed(**changes))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"num_experts: [1, 2\ngate: {\n", "--config f.yaml line 2 column 5 is not YAML"),
        (b"train:\n\tepochs: 3\n", "--config f.yaml line 2 column 1 is not YAML (found character '\\t'"),
        (b"\xff\xfe\x00", "--config f.yaml is not text"),
        (b"- 1\n- 2\n", "--config f.yaml has no keys"),
        (b"num_experts: 3\nseed: 1\nnum_experts: 4\n", "--config f.yaml line 3 has the key num_experts once more"),
        (b"# nothing\n", "--config f.yaml has no keys: expected lines such as num_experts: 10"),
    ],
)
def test_a_file_that_is_no_config_is_refused(text: bytes, told: str) -> None:
    Path("f.yaml").write_bytes(text)
    assert told in refused("train", "--config", "f.yaml")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train"], "the config lacks data, expert, num_experts: add them, or begin with --config"),
        (["train", "--config", "none.yaml"], "--config none.yaml cannot be read (No such file or directory)"),
        (["train", "--config", "."], "--config . cannot be read (Is a directory)"),
        (["train", "--config"], "--config has no value"),
        (["train", "--resume"], "--resume has no value"),
        (["train", "c.yaml"], "unexpected word c.yaml: write --config c.yaml"),
        (["train", "--config", "c.yaml", "--epochs", "3"], "unknown option --epochs: did you mean --train.epochs?"),
        (["train", "--gate.help"], "--gate.help needs a class: choose mixdist.gates."),
        (["train", "--gate.help", "Nope"], "--gate.help Nope names no class that can be found: choose mixdist.gates."),
        (["train", "--config", "c.yaml", "--train.epoch", "3"], "option --train.epoch: did you mean --train.epochs?"),
        (["train", "--config", "c.yaml", "--num_exp", "3"], "option --num_exp: did you mean --num_experts?"),
        (["train", "--config", "c.yaml", "--gate.init_args.feild", "3"], "gate.init_args.feild: did you mean field?"),
        (["train", "--config", "c.yaml", "--train.epochs=x"], "train.epochs (x) must be a whole number"),
        (["train", "--config", "c.yaml", "--train", "3"], "train"),
        (["train", "--resume", "runs/none"], "--resume runs/none is no run (config.yaml is missing): name a directory"),
        (["train", "--config", "c.yaml", "--out", "c.yaml"], "the run's directory cannot be made"),
        (["sample"], "mixdist sample needs RUN: see mixdist sample --help"),
        (["sample", "runs/none"], "runs/none holds no run (config.yaml is missing): name a directory"),
        (["sample", "runs/none", "--num_samples", "0"], "num_samples (0) must be from 1 to 1000"),
        (["sample", "runs/none", "--num_samples", "x"], "num_samples (x) must be a whole number"),
        (
            ["tarin"],
            "unknown command 'tarin': expected train, evaluate, sample, prepare, index, verify; see mixdist --help",
        ),
    ],
)
def test_a_word_that_does_not_fit_is_refused(words: list[str], told: str) -> None:
    write_config(Path("c.yaml"), SMALL)
    assert told in refused(*words)


@pytest.mark.parametrize(
    ("num_experts", "world_size", "told"),
    [
        (4, 6, "4 experts cannot be placed on 6 ranks one replica after another: set mesh.ep_size to 1, 2 or 3, or "),
        (2, 3, "2 experts cannot be placed on 3 ranks one replica after another: set mesh.ep_size to 1, or start at"),
    ],
)
def test_a_layout_that_does_not_fit_lists_those_that_do(
    num_experts: int, world_size: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    assert told in refused_config(changed(num_experts=num_experts))


def idx_folder(folder: Path) -> dict[str, Any]:
    """Write eight images of 2x2 pixels and their labels twice; give the data section of a config."""
    for name, packed in (("train", False), ("t10k", True)):
        images = struct.pack(">4B3I", 0, 0, 8, 3, 8, 2, 2) + bytes(range(32))
        labels = struct.pack(">4BI", 0, 0, 8, 1, 8) + bytes(range(8))
        for kind, content in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            path = folder / f"{name}-{kind}"
            if packed:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)
    return {"class_path": "mixdist.data.Idx", "init_args": {"root": str(folder)}}


def remove(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()


def truncate(folder: Path) -> None:
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-5])


def swap(folder: Path) -> None:
    (folder / "train-labels-idx1-ubyte").write_bytes(b"GIF89a")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (remove, "has no file 't10k-labels-idx1-ubyte' or 't10k-labels-idx1-ubyte.gz': put one of them there"),
        (truncate, "train-images-idx3-ubyte' is truncated: expected 48 bytes, found 43: fetch the file again"),
        (swap, "train-labels-idx1-ubyte' begins with 0x47494638, expected 0x00000801 for labels in idx format"),
    ],
)
def test_a_damaged_data_file_is_refused(damage: Any, told: str, folder: Path) -> None:
    data = idx_folder(folder)
    damage(folder)
    assert told in refused_config(changed(data=data))


OWN_DATA = '''
"""Sources as a user would write them."""
import os
import socket
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
        parts = [Dataset({"id": torch.arange(12) + first, "x": x}, spec) for first in (0, 12)]
        return parts[0], parts[1]
'''


def test_labels_are_not_invented(folder: Path) -> None:
    (folder / "own_rows.py").write_text(OWN_DATA)
    oracle = {"class_path": "mixdist.gates.LabelOracle"}
    line = refused_config(changed(data={"class_path": "own_rows.Rows"}, gate=oracle))
    assert line == "LabelOracle needs the label 'y', but the data has no labels: choose another gate or data"


def test_a_row_that_is_not_finite_is_named(folder: Path) -> None:
    (folder / "own_rows.py").write_text(OWN_DATA)
    data = {"class_path": "own_rows.Rows", "init_args": {"bad": float("inf")}}
    line = refused_config(changed(data=data))
    assert line == "field 'x' of sample 7 holds inf, expected a finite number: fix or remove this sample."


def test_a_loss_that_is_not_finite_names_the_expert(folder: Path) -> None:
    config = write_config(folder / "c.yaml", changed(train__optimizer__init_args__lr=1e30))
    line = complaint(here("train", "--config", config, "--out", "run"))
    assert line.startswith("step 2: the loss of expert 0 is not finite for ")
    assert line.endswith("lower the learning rate, set clip_norm, or look at the rows of this step")


def test_a_mistake_on_all_ranks_is_told_once(folder: Path) -> None:
    config = write_config(folder / "c.yaml", changed(train__epoch=3))
    ended = torchrun("train", "--config", config, ranks=2, folder=folder)
    assert ended.code == 1  # torchrun's own
    assert ended.err.count("mixdist: ") == 1
    assert ended.err.index("mixdist: unknown config key train.epoch:") < ended.err.index("exitcode")
    assert "Traceback (most recent call last):\n  File" not in ended.err.partition("torch/distributed")[0]
    assert [path.name for path in folder.iterdir()] == ["c.yaml"]


def test_a_mistake_on_one_rank_is_told_once_by_rank_0(folder: Path) -> None:
    (folder / "own_rows.py").write_text(OWN_DATA)
    data = {"class_path": "own_rows.Rows", "init_args": {"fails_on": 1}}
    config = write_config(folder / "c.yaml", changed(data=data))
    ended = torchrun("train", "--config", config, ranks=2, folder=folder)
    assert ended.code == 1
    assert ended.err.count("mixdist: ") == 1
    told = ended.err.index("mixdist: rank 1: the disk of this rank has no rows: mount it\n")
    assert told < ended.err.index("exitcode")
    assert not (folder / "runs").exists()


# Help.


@pytest.mark.parametrize("module", ["cli.main", "cli.prepare", "cli.shards", "data.workers", "data.shards.reader"])
def test_what_needs_no_torch_does_not_import_it(module: str) -> None:
    heavy = "torch", "scipy", "sklearn", "matplotlib"
    asked = f"import sys, mixdist.{module}; print(*sorted({set(heavy)} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_every_key_is_in_the_help() -> None:
    text = " ".join(train_parser().format_help().split())
    keys = [field.name for field in dataclasses.fields(Config)]
    sections = {"train": Phase, "mesh": MeshConfig, "checkpoint": CheckpointConfig, "dispatch": DispatchConfig}
    sections["compute"] = Compute
    for section, kind in sections.items():
        keys += [f"{section}.{field.name}" for field in dataclasses.fields(kind)]
    missing = [key for key in [*keys, "config", "out", "resume"] if f"--{key} " not in text]
    assert not missing
    assert "Path to a configuration file" not in text
    assert "Callable[" not in text
    assert "mixdist.gates.Gate," not in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "usage: mixdist COMMAND"),
        (["--help"], "usage: mixdist COMMAND"),
        (["train", "--help"], "passes over the training rows"),
        (["train", "--expert.help", "mixdist.experts.VAE"], "standard deviation (gaussian)"),
        (["sample", "--help"], "usage: mixdist sample"),
    ],
)
def test_help_tells(words: list[str], told: str) -> None:
    ended = here(*words)
    assert (ended.code, ended.err) == (0, "")
    assert told in ended.out


# A run and what can be done with it.

OWN_PARTS = '''
"""A gate and an expert as a user would write them."""
import torch
from mixdist.experts import VAE
from mixdist.nets import MLP
from mixdist.gates import Gate
from mixdist.terms import Gating


class Noisy(Gate):
    """A softmax of a linear map with a little noise, which must be the same in training and after loading."""

    noise_shape = (2,)

    def __init__(self, spec, num_experts: int, spread: float = 0.1) -> None:
        super().__init__()
        self.spread = spread
        self.net = torch.nn.Linear(spec["x"].num_values + 2, num_experts)

    def forward(self, rows, eps):
        x = torch.cat([rows["x"].flatten(1), self.spread * eps], dim=1)
        return Gating(torch.log_softmax(self.net(x), dim=1))


class Narrow(VAE):
    """A VAE of one latent dimension."""

    def __init__(self, spec, width: int = 8) -> None:
        super().__init__(spec, latent=1, network=MLP([width]))
'''


@pytest.mark.parametrize("own", [False, True], ids=["of the package", "of one's own"])
def test_a_run_is_loaded_as_it_ended(own: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(train__epochs=2)
    if own:
        (folder / "own_parts.py").write_text(OWN_PARTS)
        monkeypatch.syspath_prepend(folder)
        config["gate"] = {"class_path": "own_parts.Noisy", "init_args": {"spread": 0.2}}
        config["expert"] = {"class_path": "own_parts.Narrow", "init_args": {"width": 6}}
    ended = here("train", "--config", write_config(folder / "c.yaml", config), "--out", "run")
    assert (ended.code, ended.err) == (0, "")

    model = mixdist.load("run")
    _, test = Digits().load()
    rows = {"x": test.rows["x"], "id": test.rows["id"]}
    resp = model.responsibilities(rows)
    assert resp.shape == (len(test), 4)
    torch.testing.assert_close(resp.sum(1), torch.ones(len(test)))
    counts = np.zeros((4, 10), dtype=int)
    np.add.at(counts, (model.assign(rows).numpy(), test.rows["y"].numpy()), 1)
    printed = [int(line.split()[1]) for line in ended.out.splitlines()[2:6]]
    assert counts.sum(1).tolist() == printed
    losses = torch.stack([model.terms(rows, e).loss_R for e in range(4)], dim=1)
    figures = dict(zip(*[iter(ended.out.partition("rows: ")[2].split())] * 2, strict=False))
    assert float(figures["loss"]) == pytest.approx((resp * losses).sum(1).mean().item(), abs=2e-4)

    assert model.reconstruct(rows).shape == (len(test), 1, 8, 8)
    assert model.reconstruct(rows, 2).shape == (len(test), 1, 8, 8)
    assert model.sample(5, 3).shape == (5, 1, 8, 8)
    assert torch.equal(model.sample(5, 3), model.sample(5, 3))
    assert not torch.equal(model.sample(5, 3), model.sample(5, 3, seed=1))

    sampled = here("sample", "run", "--num_samples", "3")
    assert (sampled.code, sampled.out.strip(), sampled.err) == (0, str(Path("run/images/samples.png")), "")
    assert Path("run/images/samples.png").read_bytes().startswith(b"\x89PNG")


def test_help_for_a_class_needs_the_types_of_its_arguments(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "untyped_parts.py").write_text(OWN_PARTS)
    monkeypatch.syspath_prepend(folder)
    line = refused("train", "--gate.help", "untyped_parts.Noisy")
    assert "untyped_parts.Noisy has an argument without a type, spec: write one" in line


def test_a_picture_that_cannot_be_written_is_told(folder: Path) -> None:
    trained(folder)
    line = refused("sample", "run", "--out", "c.yaml/samples.png")
    assert "Not a directory" in line or "File exists" in line
    assert line.endswith(": fix it and try again")


def trained(folder: Path, config: Any = SMALL, out: str = "run") -> Path:
    ended = here("train", "--config", write_config(folder / "c.yaml", config), "--out", out)
    assert (ended.code, ended.err) == (0, "")
    return folder / out


def test_what_a_model_takes(folder: Path) -> None:
    model = mixdist.load(trained(folder))
    images, _ = load_digits(return_X_y=True)
    as_stored = torch.from_numpy(images).to(torch.uint8)
    as_numbers = images / 16  # float64, flat: shaped and converted
    torch.testing.assert_close(model.responsibilities(as_stored), model.responsibilities(as_numbers))
    assert model.responsibilities(as_stored[:0]).shape == (0, 4)
    for rows, told in (
        (as_stored[:, :60], r"field 'x' has shape \(1797, 60\): give N rows as \(N, 1, 8, 8\)"),
        (torch.tensor(1.0), r"field 'x' has shape \(\): give N rows"),
        ({"z": as_stored}, r"field 'z' is not one of the model's: give \['x', 'y'\]"),
        ({}, "give at least one field"),
        ({"x": as_stored, "id": torch.arange(3)}, r"id has shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=told):
            model.responsibilities(rows)
    with pytest.raises(ValueError, match="expert 7 is not one of the model's: give 0 to 3"):
        model.sample(1, 7)


def test_a_run_is_not_written_over(folder: Path) -> None:
    run = trained(folder)
    line = refused("train", "--config", "c.yaml", "--out", "run")
    assert line == "--out run holds a run already: go on with --resume run, or name another directory"
    shutil.copytree(run, run.with_name("begun"), ignore=shutil.ignore_patterns("step-*"))
    line = refused("train", "--config", "c.yaml", "--out", "begun")
    told = "it has no checkpoint yet, so remove begun and start it again, or name another directory"
    assert line == f"--out begun holds a run already: {told}"
    line = refused("train", "--resume", "run", "--out", "other")
    assert line == "--out other differs from --resume run: a run goes on in its own directory"
    for path in run.glob("checkpoints/step-*/*"):
        path.unlink()
    for path in run.glob("checkpoints/step-*"):
        path.rmdir()
    line = refused("train", "--resume", "run")
    assert line == "run/checkpoints holds no checkpoint: name another run, or remove this one and start it anew"


def test_another_config_does_not_resume(folder: Path) -> None:
    trained(folder)
    line = refused("train", "--resume", "run", "--seed", "7")
    assert "was made with seed 0, the config has 7: resume with the run's own config, or start a new run" in line
    assert "expert 0" in refused("train", "--resume", "run", "--expert.init_args.latent", "3")


def expert_missing(checkpoint: Path) -> None:
    (checkpoint / "expert-0002.safetensors").unlink()


def expert_too_many(checkpoint: Path) -> None:
    (checkpoint / "expert-0004.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (expert_missing, "lacks expert 2 (expert-0002.safetensors): put the file back, or remove the whole checkpoint"),
        (expert_too_many, "has expert-0004.safetensors, but only 4 experts: remove that file"),
    ],
)
def test_a_checkpoint_without_its_experts_is_refused(damage: Any, told: str, folder: Path) -> None:
    damage(trained(folder) / "checkpoints" / "step-000000003")
    for words in (["train", "--resume", "run"], ["sample", "run"]):
        assert told in refused(*words)


@pytest.mark.parametrize("name", ["expert-0001.safetensors", "gate.safetensors", "state.json", MANIFEST])
def test_a_damaged_checkpoint_is_passed_over_and_told(name: str, folder: Path) -> None:
    trained(folder, changed(checkpoint={"every": 1}))
    path = folder / "run" / "checkpoints" / "step-000000003" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    whole = {p.name: p.read_bytes() for p in path.parent.iterdir() if p.name not in (name, MANIFEST)}

    ended = here("train", "--resume", "run")
    assert ended.code == 0
    assert ended.err.startswith(f"mixdist: checkpoint step-000000003 is damaged ({name} ")
    assert ended.err.endswith("; going back to step-000000002\n")
    again = {p.name: p.read_bytes() for p in path.parent.iterdir() if p.name in whole}
    assert again == whole  # the lost step, done once more
    assert (folder / "run/checkpoints/latest").read_text() == "step-000000003\n"


def test_nothing_is_resumed_from_ruins(folder: Path) -> None:
    run = trained(folder)
    for path in run.glob("checkpoints/*/state.json"):
        path.write_bytes(path.read_bytes()[:-1])
    for words in (["train", "--resume", "run"], ["sample", "run"]):
        line = refused(*words)
        assert "holds no good checkpoint: checkpoint step-000000003 is damaged (state.json has " in line
        assert line.endswith("start the run anew")


def test_data_without_images_gives_no_picture_of_samples(folder: Path) -> None:
    data = {"class_path": "mixdist.data.Blobs", "init_args": {"rows": 60, "test_rows": 20}}
    expert = {"class_path": "mixdist.experts.VAE", "init_args": {"likelihood": "gaussian", "mean": "identity"}}
    trained(folder, changed(data=data, expert=expert))
    model = mixdist.load("run")
    assert model.sample(4, 0).shape == (4, 2)
    assert model.assign(Blobs(rows=60).load()[0].rows["x"]).shape == (60,)
    assert here("sample", "run").code == 0  # a scatter plot
    data["init_args"]["num_features"] = 3
    trained(folder, changed(data=data, expert=expert), out="cube")
    assert "cannot be shown" in refused("sample", "cube")


def test_another_optimiser_is_refused_on_resume(folder: Path) -> None:
    trained(folder)
    before = (folder / "run" / "config.yaml").read_bytes()
    line = refused("train", "--resume", "run", "--train.optimizer", "torch.optim.RMSprop", "--train.epochs", "9")
    assert "was made with the optimiser Adam, the config has RMSprop" in line
    assert (folder / "run" / "config.yaml").read_bytes() == before


def test_another_data_set_is_refused_on_resume(folder: Path) -> None:
    data = {"class_path": "mixdist.data.Blobs", "init_args": {"rows": 60, "test_rows": 20}}
    expert = {"class_path": "mixdist.experts.VAE", "init_args": {"likelihood": "gaussian", "mean": "identity"}}
    trained(folder, changed(data=data, expert=expert))
    assert "was made with data " in refused("train", "--resume", "run", "--data.seed", "77", "--train.epochs", "9")


def test_a_run_cannot_end_before_where_it_is(folder: Path) -> None:
    trained(folder, changed(train={**SMALL["train"], "epochs": 3}))
    assert "is at epoch 3, but train.epochs is 2: give 3 or more" in refused(
        "train", "--resume", "run", "--train.epochs", "2"
    )


def test_two_processes_do_not_write_one_run(folder: Path) -> None:
    run = trained(folder)
    who = f"{os.getpid()} on {socket.gethostname()}"  # the run that has ended was this process
    with open(run / ".lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        told = refused("train", "--resume", "run")
    assert told == f"run is being written by another process ({who}): wait for it, or end it"


def test_a_schedule_that_is_too_short_is_refused_before_training(folder: Path) -> None:
    schedule = {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 0.1, "total_steps": 2}}
    config = changed(train={**SMALL["train"], "schedule": schedule})
    line = refused("train", "--config", write_config(folder / "c.yaml", config), "--out", "short")
    assert line.startswith("train.schedule cannot run for the 3 steps of its phase (")
    assert line.endswith("The specified number of total steps is 2): change its init_args")
    assert not (folder / "short").exists()


def test_a_phase_that_trains_nothing_is_refused(folder: Path) -> None:
    config = changed(gate={"class_path": "mixdist.gates.Uniform"}, train={**SMALL["train"], "trains": "gate"})
    line = refused("train", "--config", write_config(folder / "c.yaml", config), "--out", "idle")
    assert line == "phase 0 trains gate, which has no parameters: set trains to both"


def test_an_expert_that_needs_another_field_is_refused(folder: Path) -> None:
    expert = {"class_path": "mixdist.experts.VAE", "init_args": {"field": "pixels"}}
    config = changed(expert=expert)
    line = refused("train", "--config", write_config(folder / "c.yaml", config), "--out", "wrong")
    assert "VAE needs the field 'pixels', but the data has ['x', 'y']" in line
