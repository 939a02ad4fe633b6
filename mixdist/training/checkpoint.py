"""Checkpoints: complete or absent, each expert under its global number, readable on any layout.

A checkpoint ``step-000001000/`` holds one safetensors file for each expert and one for each shared module (weights as
``model.*``, optimiser state as ``optimizer.*``), ``state.json`` (the position in the run and what the run is), and
``MANIFEST.json`` with size and sha256 of every other file, and of itself. It is written under another name, synced,
voted on by all ranks and renamed; then ``latest`` moves. No pickle anywhere.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mixdist.engines.average import AVERAGE
from mixdist.files import write_file
from mixdist.mixtures import Mixture
from mixdist.parallel.agreement import Agreed, agree, agreed, alike, gather_json, on_rank_0
from mixdist.parallel.mesh import Mesh
from mixdist.terms import Owned, misfit
from mixdist.training.manifest import (
    FORMAT,
    MANIFEST,
    Damaged,
    digest,
    entry,
    file_name,
    missing_or_extra,
    read_manifest,
    verify_file,
)

STATE, LATEST = "state.json", "latest"


class States(Protocol):
    """What has the states of modules' optimisers."""

    def optimizer_state(self, owned: Owned) -> dict[str, Tensor]:
        """Return the optimiser's state of a module: "<parameter>.<key>" to tensor."""


class Optimizers(Protocol):
    """What has the optimisers of modules."""

    def load_optimizer_state(self, owned: Owned, state: dict[str, Tensor]) -> None:
        """Put back what ``States.optimizer_state`` returned."""


class Saved(NamedTuple):
    """What a checkpoint holds of a program.

    Args:
        state: JSON; the same on every rank.
        owned: this rank's modules.
        engine: has their optimisers' states.
        files: other files, as rank 0 has them.
    """

    state: dict[str, Any]
    owned: Sequence[Owned]
    engine: States
    files: Mapping[str, bytes] = {}


def directory_name(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step-{step:09d}"


def checkpoints_in(root: Path) -> list[Path]:
    """List the complete checkpoints in a folder, the newest first; none where there is no folder."""
    return sorted((p for p in root.glob("step-*") if p.name.removeprefix("step-").isdigit()), reverse=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class CheckpointStore:
    """The checkpoints of one run, seen by every rank.

    Args:
        root: the folder ``checkpoints/`` of a run, on a file system that all ranks share.
        mesh: this rank's place.
        keep: how many of the newest to keep.
    """

    def __init__(self, root: Path, mesh: Mesh, keep: int = 3) -> None:
        self.root, self.mesh, self.keep = root, mesh, keep

    def save(self, step: int, saved: Saved, best: int | None = None) -> None:
        """Write the checkpoint of ``step``; every rank calls it.

        Args:
            step: done in the run.
            saved: what it holds.
            best: the step whose checkpoint stays, however old it is; None for none.

        Raises:
            ValueError: some rank could not write; no checkpoint of this step exists then, older ones are untouched.
        """
        final = self.root / directory_name(step)
        aside = self.root / (directory_name(step) + ".partial")
        entries: dict[str, Any] = {}
        try:
            self._together(final, lambda: self._begin(aside))
            own = self._together(final, lambda: self._write_own(aside, saved))
            entries = {name: entry for part in gather_json(own, self.mesh.world) for name, entry in part.items()}
            self._together(final, lambda: self._commit(aside, final, entries))
        except ValueError:
            if self.mesh.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise
        if self.mesh.rank == 0:
            self._prune("" if best is None else directory_name(best))

    def _together(self, final: Path, act: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        """Do one stage of saving on every rank, and fail on every rank if one does."""

        def attempt() -> dict[str, Any] | None:
            try:
                return act()
            except (OSError, SafetensorError) as mistake:
                raise ValueError(
                    f"checkpoint {final.name} could not be written ({mistake}); those before it are untouched: free "
                    f"space or make {self.root} writable, then go on with --resume"
                ) from None

        return agreed(attempt, self.mesh.world)

    def _begin(self, aside: Path) -> None:
        if self.mesh.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

    def _write_own(self, aside: Path, saved: Saved) -> dict[str, Any]:
        """Write the files that this rank speaks for; return their entries in the manifest."""
        written: dict[str, Any] = {}
        for one in saved.owned:
            if self.mesh.speaks_for(one.expert):
                path = aside / file_name(one.name, one.expert)
                write_file(path, save(_tensors(one, saved.engine)))
                written[path.name] = entry(path)
        if self.mesh.rank == 0:
            for name, data in {STATE: json.dumps(saved.state, indent=2).encode(), **saved.files}.items():
                write_file(aside / name, data)
                written[name] = entry(aside / name)
        return written

    def _commit(self, aside: Path, final: Path, entries: dict[str, Any]) -> None:
        if self.mesh.rank:
            return
        manifest = {"format": FORMAT, "num_experts": self.mesh.placement.num_experts, "files": entries}
        manifest["sha256"] = digest(manifest)
        write_file(aside / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True).encode())
        _sync_directory(aside)
        doomed = _doomed(final)
        if final.exists():  # the same step once more, after a resume
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(final, doomed)
        try:
            os.rename(aside, final)
        except OSError:
            if doomed.exists():
                os.rename(doomed, final)
            raise
        _sync_directory(self.root)
        write_file(self.root / LATEST, (final.name + "\n").encode())

    def _prune(self, best: str) -> None:
        """Remove all but the newest and the best, and what crashes left; what cannot be removed stays for once more."""
        for left in [*self.root.glob("step-*.doomed"), *self.root.glob("step-*.partial")]:
            shutil.rmtree(left, ignore_errors=True)
        for old in [path for path in self.found()[self.keep :] if path.name != best]:
            with suppress(OSError):
                os.rename(old, _doomed(old))
            shutil.rmtree(_doomed(old), ignore_errors=True)

    def found(self) -> list[Path]:
        """Return the checkpoints under their final names, newest first."""
        return checkpoints_in(self.root)

    def choose(self) -> tuple[Path, list[str]]:
        """Return the newest good checkpoint and a sentence for each damaged one passed over; every rank calls it.

        Raises:
            Agreed: there is none, none is good, or one lacks an expert or has one too many (named).
        """
        candidates = gather_json([p.name for p in self.found()], self.mesh.world)[0]
        if not candidates:
            raise Agreed(f"{self.root} holds no checkpoint: name another run, or remove this one and start it anew")
        passed_over: list[str] = []
        for name in candidates:
            damage = self.damage(self.root / name)
            if damage is None:
                manifest = read_manifest(self.root / name)
                alike({f"checkpoint {name}": manifest["sha256"]}, self.mesh.world, str(self.root.absolute()))
                return self.root / name, passed_over
            passed_over.append(f"checkpoint {name} is damaged ({damage})")
        raise Agreed(f"{self.root} holds no good checkpoint: {'; '.join(passed_over)}; start the run anew")

    def damage(self, path: Path) -> str | None:
        """Return what is wrong with a checkpoint, or None; every rank calls it and checks a share of the files.

        Raises:
            Agreed: it lacks an expert or has one too many (named).
        """
        damage, fatal = self._verify(path)
        agree(fatal, self.mesh.world)
        return next((found for found in gather_json(damage, self.mesh.world) if found), None)

    def set_aside_after(self, chosen: Path) -> None:
        """Rename the checkpoints newer than the one a run goes on from, so that they never count as its newest."""

        def rename() -> None:
            for newer in self.found():
                if newer.name > chosen.name:
                    shutil.rmtree(damaged := newer.with_name(newer.name + ".damaged"), ignore_errors=True)
                    os.rename(newer, damaged)

        on_rank_0(rename, self.mesh)

    def _verify(self, path: Path) -> tuple[str | None, str | None]:
        """Check this rank's share of a checkpoint's files: (damage, what cannot be passed over)."""
        try:
            manifest = read_manifest(path)
            missing_or_extra(path, manifest)
            names = sorted(manifest["files"])[self.mesh.rank :: self.mesh.world_size]
            for name in names:
                verify_file(path, name, manifest)
        except Damaged as damage:
            return str(damage), None
        except ValueError as error:
            return None, str(error)
        return None, None


def _doomed(path: Path) -> Path:
    """Name what a checkpoint becomes before it is removed, so that it never stands half under its final name."""
    return path.with_name(path.name + ".doomed")


def _tensors(owned: Owned, engine: States) -> dict[str, Tensor]:
    model = {f"model.{k}": v for k, v in owned.module.state_dict().items()}
    optimizer = {f"optimizer.{k}": v for k, v in engine.optimizer_state(owned).items()}
    # A stack's parameters are views of one storage; safetensors wants each tensor by itself.
    return {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in (model | optimizer).items()
    }


def read_state(path: Path) -> dict[str, Any]:
    """Read the JSON part of a checkpoint."""
    state: dict[str, Any] = json.loads((path / STATE).read_bytes())
    return state


def load_mixture(path: Path, mixture: Mixture, ema: bool = False) -> None:
    """Put the weights and the state of a trained mixture in place, without optimisers.

    Args:
        path: of the checkpoint.
        mixture: with its modules.
        ema: take the averages of weights; what was not stepped is as it is.

    Raises:
        ValueError: there is no mixture yet in that checkpoint, it has no averages, or a file does not fit.
    """
    state = read_state(path)
    if ema and AVERAGE not in state.get("optimizer", "").split():
        raise ValueError(
            f"checkpoint {path} has no averages of weights: leave ema out, or train a run with train.ema, such as 0.999"
        )
    mixture.load_state(state["mixture"])
    for owned in mixture.owned():
        load_module(path, owned, ema=ema)


def load_module(path: Path, owned: Owned, engine: Optimizers | None = None, ema: bool = False) -> None:
    """Put a module's weights and, given an engine, its optimiser's state in place.

    With ``ema`` each parameter becomes its average, where it has one.

    Raises:
        ValueError: the file holds other parameters than the module has.
    """
    name, own = path / file_name(owned.name, owned.expert), owned.module.state_dict()
    tensors = read_tensors(name)
    model = tensors_of("model", tensors)
    if ema:
        model = {key: tensors.get(f"optimizer.{key}.{AVERAGE}", weight) for key, weight in model.items()}
    wrong = misfit(model, own)
    if wrong:
        raise ValueError(f"{name} does not fit the config's {owned.name}: {wrong}; take the run's own config")
    with torch.no_grad():
        for key, value in model.items():
            own[key].copy_(value)
    if engine is not None:
        engine.load_optimizer_state(owned, tensors_of("optimizer", tensors))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of a checkpoint.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}): use another checkpoint") from None


def tensors_of(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of a module's tensors that are its weights (model), or its optimiser's state (optimizer)."""
    start = f"{kind}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
