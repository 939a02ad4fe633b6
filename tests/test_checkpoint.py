"""A checkpoint is complete or absent, whatever happens while it is written, and damage is always found."""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mixdist.engines import Native
from mixdist.files import write_file
from mixdist.parallel.launch import Launch
from mixdist.parallel.mesh import Mesh, Placement
from mixdist.parallel.wire import Wire
from mixdist.terms import Outcome, Owned, Parts
from mixdist.training.checkpoint import LATEST, STATE, CheckpointStore, Saved, load_module, read_state
from mixdist.training.manifest import MANIFEST, digest

NUM_EXPERTS = 2
FILES = ["MANIFEST.json", "expert-0000.safetensors", "expert-0001.safetensors", "gate.safetensors", "state.json"]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """That files are synced is counted below; how long a disk takes for it is not the matter here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Run:
    """Two experts and a gate that learn something, and their checkpoints."""

    def __init__(self, root: Path, keep: int = 3) -> None:
        mesh = Mesh(Placement.plan(NUM_EXPERTS, 1), Launch(), torch.device("cpu"))
        self.store = CheckpointStore(root, mesh, keep)
        generator = torch.Generator().manual_seed(0)
        modules = [nn.Linear(3, 2, dtype=torch.float64) for _ in range(NUM_EXPERTS + 1)]
        for module in modules:
            module.requires_grad_(False)
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            module.requires_grad_(True)
        parts = Parts({"gate": modules[0]}, dict(enumerate(modules[1:])))
        self.owned = parts.owned()
        self.engine = Native(parts, mesh, Wire(mesh.device), lambda p: torch.optim.Adam(p, lr=0.1))

    def save(self, step: int) -> None:
        """Take an optimiser step and save."""
        self.engine.zero_grad()
        for one in self.owned:
            for parameter in one.module.parameters():
                parameter.grad = torch.full_like(parameter, step)
        zero = torch.zeros(1, dtype=torch.float64)
        self.engine.step(Outcome(zero, {}), step)
        self.store.save(step, Saved({"position": {"total": step}}, self.owned, self.engine))

    def tensors(self) -> dict[str, Tensor]:
        weights = {f"{o.name}.{k}": v.clone() for o in self.owned for k, v in o.module.state_dict().items()}
        states = {f"{o.name}.{k}": v.clone() for o in self.owned for k, v in self.engine.optimizer_state(o).items()}
        return weights | states

    def steps(self) -> list[str]:
        return [path.name for path in self.store.found()]


def chosen(run: Run) -> int:
    """Choose, and hold what was chosen against its own state."""
    path, _ = run.store.choose()
    step = int(path.name.removeprefix("step-"))
    assert read_state(path) == {"position": {"total": step}}
    assert sorted(p.name for p in path.iterdir()) == FILES
    return step


def latest(run: Run) -> str:
    return (run.store.root / LATEST).read_text().strip()


def test_weights_and_optimiser_come_back_bit_for_bit(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    run.save(2)
    kept = run.tensors()
    run.save(3)
    for one in run.owned:
        load_module(tmp_path / "step-000000002", one, run.engine)
    assert all(torch.equal(value, kept[name]) for name, value in run.tensors().items())
    assert len(kept) == 3 * 2 * (1 + 3)  # weights, and step and two moments of each


def test_files_are_plain_and_an_expert_travels_alone(tmp_path: Path) -> None:
    run = Run(tmp_path / "checkpoints")
    run.save(1)
    path = run.store.root / "step-000000001"
    assert sorted(p.name for p in path.iterdir()) == FILES
    assert not any(p.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04") for p in path.iterdir())  # no zip, no pickle

    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest.keys() == {"format", "num_experts", "files", "sha256"}
    assert (manifest["format"], manifest["num_experts"]) == (2, NUM_EXPERTS)
    assert sorted([*manifest["files"], MANIFEST]) == FILES
    for name, entry in manifest["files"].items():
        assert entry.keys() == {"bytes", "sha256"}
        assert entry["bytes"] == (path / name).stat().st_size
        assert len(entry["sha256"]) == 64

    shutil.copy(path / "expert-0001.safetensors", tmp_path / "alone.safetensors")
    tensors = load_file(tmp_path / "alone.safetensors")
    expert = run.owned[2].module
    assert torch.equal(tensors["model.weight"], expert.weight)
    assert tensors.keys() >= {"model.bias", "optimizer.weight.exp_avg", "optimizer.bias.exp_avg_sq"}


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=2)
    (tmp_path / "step-000000000.doomed").mkdir()  # left by a crash
    (tmp_path / "step-000000000.partial").mkdir()
    for step in (8, 9, 10, 11):
        run.save(step)
    assert sorted(p.name for p in tmp_path.iterdir()) == [LATEST, "step-000000010", "step-000000011"]
    assert latest(run) == "step-000000011"


def test_damaged_ones_do_not_push_out_what_follows(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=2)
    for step in (10, 20):
        run.save(step)
    run.store.keep = 1
    (tmp_path / "step-000000020" / "gate.safetensors").write_bytes(b"damaged")
    path, passed_over = run.store.choose()
    assert path.name == "step-000000010"
    assert len(passed_over) == 1
    run.store.set_aside_after(path)
    run.save(15)
    assert run.steps() == ["step-000000015"]
    assert (tmp_path / "step-000000020.damaged").is_dir()


class Crash(BaseException):
    """The process is gone: nothing catches it."""


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


class Breaking:
    """Replaces a function of the operating system by one that fails the n-th time; counts the calls."""

    def __init__(self, target: Callable[..., Any], number: int, error: Callable[[], BaseException]) -> None:
        self.target, self.left, self.error = target, number, error

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error()
        return self.target(*given, **named)


class Writing(Breaking):
    """An open whose n-th file for writing takes half of what is written."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        file = self.target(*given, **named)
        if "w" in "".join(map(str, given[1:2])):
            self.left -= 1
            if self.left == 0:

                def write(data: bytes) -> None:
                    with file:
                        file.write(data[: len(data) // 2])
                    raise self.error()

                half = MagicMock()  # as a context manager it lets errors through
                half.__exit__.return_value = None
                half.__enter__.return_value.write = write
                return half
        return file


STAGES = {"write": Writing, "fsync": Breaking, "replace": Breaking, "rename": Breaking, "mkdir": Breaking}


def break_stage(patch: pytest.MonkeyPatch, stage: str, number: int, error: Callable[[], BaseException]) -> Breaking:
    if stage == "write":
        broken: Breaking = Writing(builtins.open, number, error)
        patch.setattr("mixdist.files.open", broken, raising=False)
    else:
        broken = STAGES[stage](getattr(os, stage), number, error)
        patch.setattr(os, stage, broken)
    return broken


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the same step again"])
@pytest.mark.parametrize("error", [full, Crash], ids=["disk full", "killed"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_save_that_breaks_anywhere_leaves_the_older_ones(
    stage: str, error: Callable[[], BaseException], again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broke = 0
    for number in range(1, 30):
        root = tmp_path / str(number)
        run = Run(root)
        run.save(1)
        run.save(2)
        step = 2 if again else 3
        with monkeypatch.context() as patch:
            broken = break_stage(patch, stage, number, error)
            told = ""
            try:
                run.save(step)
            except ValueError as one:
                told = str(one)
            except Crash:
                assert error is Crash
        if broken.left > 0:  # the save has fewer such calls
            break
        broke += 1
        if error is full:
            assert told.startswith(f"checkpoint step-{step:09d} could not be written ([Errno 28] No space left"), told
            assert "\n" not in told
            assert not list(root.glob("*.partial")), "the space is not given back"
        good = chosen(run)
        assert good in ((1, 2) if again else (2, 3))
        assert (root / "step-000000001").exists()
        if error is full:
            assert (root / latest(run)).is_dir()
            assert run.steps()[-2:] == ["step-000000002", "step-000000001"]
        run.save(4)  # whatever is left does not stand in the way
        assert chosen(run) == 4
        assert latest(run) == "step-000000004"
        assert all(path.name == LATEST or path.name.removeprefix("step-").isdigit() for path in root.iterdir())
    assert broke >= {"write": 6, "fsync": 8, "replace": 6, "rename": 1, "mkdir": 1}[stage]


@pytest.mark.parametrize("name", FILES)
def test_every_cut_and_every_flipped_byte_is_found(name: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    run.save(2)
    path = tmp_path / "step-000000002" / name
    whole = path.read_bytes()
    for length in {0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:length])
        assert chosen(run) == 1, f"cut to {length}"
    every = range(len(whole)) if len(whole) < 400 or name == MANIFEST else range(0, len(whole), 7)
    for place in every:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        assert chosen(run) == 1, f"flipped byte {place}"
    path.write_bytes(whole + b" ")
    if name != MANIFEST:  # a blank behind JSON changes nothing that it says
        assert chosen(run) == 1
    path.write_bytes(whole)
    assert chosen(run) == 2


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest as someone would who knows how its checksum is made."""
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    manifest["sha256"] = digest(manifest)
    write_file(path / MANIFEST, json.dumps(manifest).encode())


@pytest.mark.parametrize("name", ["../state.json", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\nb"])
def test_a_manifest_names_only_files_beside_it(name: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    run.save(2)
    rewrite_manifest(tmp_path / "step-000000002", lambda m: m["files"].update({name: m["files"]["state.json"]}))
    path, passed_over = run.store.choose()
    assert path.name == "step-000000001"
    assert passed_over == [
        f"checkpoint step-000000002 is damaged ({MANIFEST} has an entry that no checkpoint has: {name!r})"
    ]


@pytest.mark.parametrize("files", [None, [], {"gate.safetensors": 3}, {"gate.safetensors": {"bytes": 3}}])
def test_a_manifest_of_another_shape_is_damage(files: Any, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    rewrite_manifest(tmp_path / "step-000000001", lambda m: m.update(files=files))
    with pytest.raises(ValueError, match=r"holds no good checkpoint: .* start the run anew"):
        run.store.choose()


def test_another_versions_checkpoint_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    rewrite_manifest(tmp_path / "step-000000001", lambda m: m.update(format=1))
    with pytest.raises(ValueError, match="has format 1, expected 2: use the version that wrote it"):
        run.store.choose()


def test_a_module_of_another_shape_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    other = Owned("expert 1", nn.Linear(3, 5, dtype=torch.float64), 1)
    with pytest.raises(ValueError, match=r"does not fit the config's expert 1: bias has shape \(2,\), expected \(5,\)"):
        load_module(tmp_path / "step-000000001", other)
    (tmp_path / "step-000000001" / STATE).unlink()
    with pytest.raises(ValueError, match=r"damaged \(state.json cannot be read: No such file or directory\)"):
        run.store.choose()
