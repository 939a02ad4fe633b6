"""What a user meets at the command line: help, mistakes told in one line, a run and what can be done with it."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
import shutil
import socket
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
from mixdist.config.config import CheckpointConfig, Config, MeshConfig
from mixdist.data import Blobs, Digits
from mixdist.training.manifest import MANIFEST
from mixdist.training.phases import Phase
from mixdist.training.selection import Select
from tests.launch import SMALL, changed, complaint, here, refused, together, torchrun, write_config
from tests.test_refusals import OWN_ROWS


def test_a_loss_that_is_not_finite_names_the_expert(folder: Path) -> None:
    config = write_config(folder / "c.yaml", changed(train__optimizer__init_args__lr=1e30))
    line = complaint(here("train", "--config", config, "--out", "run"))
    assert line.startswith("step 2: the loss of expert 0 is not finite")


def test_a_mistake_on_all_ranks_is_told_once_before_what_torchrun_tells(folder: Path) -> None:
    config = write_config(folder / "c.yaml", changed(train__epoch=3))
    ended = torchrun("train", "--config", config, ranks=2, folder=folder)
    assert ended.code == 1  # torchrun's own
    assert ended.err.count("mixdist: ") == 1
    assert ended.err.index("mixdist: unknown config key train.epoch") < ended.err.index("exitcode")
    assert "Traceback (most recent call last):\n  File" not in ended.err.partition("torch/distributed")[0]
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RUN_ID", "CROSS_RANK"])
def test_a_command_without_its_run_is_told_once_under_a_launcher(folder: Path, variable: str) -> None:
    """Of torchrun, of DeepSpeed. Ranks started by hand have terminals of their own, and each tells."""
    ended = together("evaluate", ranks=2, folder=folder, **{variable: "0"})
    assert ended.code == 1
    assert ended.err == (
        "mixdist: evaluate needs a run: name a directory that mixdist train made, as mixdist evaluate RUN\n"
    )


def test_a_mistake_on_one_rank_is_told_once(folder: Path) -> None:
    (folder / "own_rows.py").write_text(OWN_ROWS)
    config = changed(data={"class_path": "own_rows.Rows", "init_args": {"fails_on": 1}})
    ended = together("train", "--config", write_config(folder / "c.yaml", config), ranks=2, folder=folder)
    assert ended.code == 1  # its launcher's own
    assert ended.err.startswith(
        "mixdist: rank 1: the disk of this rank has no rows: mount it (Rows.load; own_rows.py line "
    )
    assert ended.err.count("mixdist: ") == 1
    assert "Traceback (most recent call last):\n  File" not in ended.err
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
    sections = {"train": Phase, "mesh": MeshConfig, "checkpoint": CheckpointConfig, "select": Select}
    for section, kind in sections.items():
        keys += [f"{section}.{field.name}" for field in dataclasses.fields(kind)]
    missing = [key for key in [*keys, "config", "out", "resume"] if f"--{key} " not in text]
    assert not missing
    assert "Path to a configuration file" not in text
    assert "Callable[" not in text
    assert "default: Unset" not in text
    assert "mixdist.gates.Gate," not in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "usage: mixdist COMMAND"),
        (["--help"], "usage: mixdist COMMAND"),
        (["train", "--help"], "passes over the training rows"),
        (["train", "--mixture.help", "mixdist.mixtures.Soft"], "--mixture.compute.micro_batch"),
        (["train", "--mixture.help", "mixdist.competition.Competition"], "--mixture.starved_below"),
        (["evaluate", "--help"], "importance samples for each row and expert"),
        (["sample", "--help"], "usage: mixdist sample"),
    ],
)
def test_help_tells(words: list[str], told: str) -> None:
    ended = here(*words)
    assert (ended.code, ended.err) == (0, "")
    assert told in ended.out
    assert "default: Unset" not in ended.out


@pytest.mark.parametrize(
    ("option", "kind", "taken"),
    [
        ("--engine", "mixdist.engines.FSDP", ["offload", "unit_bytes"]),
        ("--train.schedule", "torch.optim.lr_scheduler.StepLR", ["step_size", "gamma", "last_epoch"]),
        ("--train.optimizer", "torch.optim.Rprop", ["lr", "etas", "step_sizes"]),
    ],
)
def test_help_on_a_class_lists_what_a_config_may_give(option: str, kind: str, taken: list[str]) -> None:
    ended = here("train", f"{option}.help", kind)
    assert (ended.code, ended.err) == (0, "")
    listed = re.findall(rf"^  {re.escape(option)}\.(\w+) ", ended.out, re.MULTILINE)
    assert listed[: len(taken)] == taken
    assert not {"parts", "mesh", "wire", "optimizer", "schedule", "clip_norm", "params"} & set(listed)


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
        own_gate = {"class_path": "own_parts.Noisy", "init_args": {"spread": 0.2}}
        config = changed(config, gate=own_gate, expert={"class_path": "own_parts.Narrow", "init_args": {"width": 6}})
    ended = here("train", "--config", write_config(folder / "c.yaml", config), "--out", "run")
    assert (ended.code, ended.err) == (0, "")

    model = mixdist.load("run")
    test = Digits().load().test
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train once; tests work on copies."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        trained(folder, changed(train__epochs=2))
    return folder


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ("train --config c.yaml --out run", "--out run --resume"),
        ("train --resume run --out other", "--out other --resume run"),
        ("train --resume run --seed 7", "seed 0 7"),
        ("train --resume run --mixture.expert.latent 3", "expert 0"),
        ("train --resume run --train.optimizer torch.optim.RMSprop --train.epochs 9", "Adam RMSprop"),
        ("train --resume run --data.test_fraction 0.3 --train.epochs 9", "data"),
        ("train --resume run --train.epochs 1", "2 train.epochs 1"),
        ("evaluate run --num_samples 0", "--num_samples (0)"),
        ("evaluate run --num_samples many", "num_samples (many)"),
        ("evaluate run --rows 0", "--rows (0)"),
        ("evaluate run --split held-out", "split (held-out) test train"),
        ("evaluate run --samples 3", "--samples"),
        ("evaluate run --mixture.num_experts 5", "num_experts 4 5"),
        ("evaluate run --data.scale 3", "data scale"),
        ("evaluate run --mixture.expert.latent 3", "expert 0"),
        ("evaluate run other", "other"),
        ("sample run --out c.yaml/samples.png", "c.yaml"),
    ],
)
def test_what_does_not_fit_a_run_is_refused(argv: str, names: str, finished: Path, folder: Path) -> None:
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    refused(*argv.split(), names=names)


def test_a_run_without_a_checkpoint_is_begun_anew(finished: Path, folder: Path) -> None:
    shutil.copytree(finished, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("step-*"))
    refused("train", "--config", "c.yaml", "--out", "run", names="--out run checkpoint remove")
    refused("train", "--resume", "run", names="run/checkpoints")


@pytest.mark.parametrize("damage", ["lacks", "unknown", "cut"])
def test_a_checkpoint_without_its_experts_is_refused(damage: str, finished: Path, folder: Path) -> None:
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    for checkpoint in Path("run/checkpoints").glob("step-*"):
        name = {"lacks": "expert-0002.safetensors", "unknown": "expert-0004.safetensors", "cut": "state.json"}[damage]
        path = checkpoint / name
        if damage == "lacks":
            path.unlink()
        else:
            path.write_bytes(b"" if damage == "unknown" else path.read_bytes()[:-1])
    for argv in (["train", "--resume", "run"], ["sample", "run"]):
        refused(*argv, names=name)


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


def test_two_processes_do_not_write_one_run(folder: Path) -> None:
    run = trained(folder)
    who = f"{os.getpid()} on {socket.gethostname()}"  # the run that has ended was this process
    with open(run / ".lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused("train", "--resume", "run", names=f"run ({who})")
