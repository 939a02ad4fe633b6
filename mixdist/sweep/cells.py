"""A cell of a sweep, one run of a variant with a seed: made, gone on with after any interruption, or read."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from safetensors import safe_open

from mixdist.baselines.model import ABOUT, read_about, repeatable
from mixdist.evaluation.compare import stem_of
from mixdist.files import write_file
from mixdist.sweep.grid import Variant
from mixdist.sweep.processes import Processes
from mixdist.training.checkpoint import checkpoints_in

Record = dict[str, Any]
"""What is known of a cell, as JSON: name, system, setting, seed, seconds, parameters, and by split figures, errors and
protocol. It is written whole after training and after each evaluation."""


@dataclass(frozen=True)
class Cells:
    """The cells in a sweep's folder: of each a run ``NAME/``, a record ``NAME.json`` and the output ``NAME.log``.

    Args:
        folder: of the sweep.
        processes: run the commands.
        num_samples: importance samples of evaluations.
        tell: receives lines for the console.
    """

    folder: Path
    processes: Processes
    num_samples: int
    tell: Callable[[str], None]

    def finish(self, variant: Variant, seed: int, splits: Sequence[str]) -> Record:
        """Do what is left to do for a cell; return its record.

        A run with a checkpoint goes on from it, one without begins anew; a split that was evaluated is not evaluated
        again.

        Raises:
            Failed: a command failed.
            Stopped: the sweep ends.
            ValueError: the record is damaged.
        """
        name = variant.run(seed)
        path = self.folder / f"{name}.json"
        with self.processes.claim(self.folder / f"{name}.log", self.tell) as log:
            record = read_record(path)
            if not record or not (set(splits) <= record["figures"].keys() or (self.folder / name).is_dir()):
                record = self._train(variant, seed, log)
                write_record(path, record)
            for split in splits:
                if split not in record["figures"]:
                    self._evaluate(variant, split, record, log)
                    write_record(path, record)
        return record

    def _train(self, variant: Variant, seed: int, log: IO[bytes]) -> Record:
        run = self.folder / variant.run(seed)
        resumed = bool(checkpoints_in(run / "checkpoints"))
        if not resumed:
            shutil.rmtree(run, ignore_errors=True)
        begin = time.monotonic()
        words = [*variant.words, "--seed", str(seed), "--out", str(run)]
        self.processes.run(["train", "--resume", str(run)] if resumed else words, log, variant.fitted)
        # Of a run that was interrupted nobody knows how long it took.
        seconds: dict[str, Any] = {"train": None if resumed else time.monotonic() - begin, "evaluate": {}}
        about = {"system": variant.system, "setting": dict(variant.setting), "baseline": read_baseline(run)}
        known = {"parameters": count_parameters(run), "seconds": seconds}
        return {"name": run.name, **about, "seed": seed, **known, "figures": {}, "errors": {}, "protocol": {}}

    def _evaluate(self, variant: Variant, split: str, record: Record, log: IO[bytes]) -> None:
        run = self.folder / record["name"]
        begin = time.monotonic()
        words = ["evaluate", str(run), "--split", split, "--num_samples", str(self.num_samples)]
        self.processes.run(words, log, variant.fitted)
        record["seconds"]["evaluate"][split] = time.monotonic() - begin
        told = json.loads((run / f"{stem_of(split)}.json").read_bytes())
        record["figures"][split] = {name: value for name, value in told["figures"].items() if value is not None}
        record["errors"][split] = told.get("errors", {})
        kept = {name: value for name, value in told["protocol"].items() if name not in ("mixture", "baseline")}
        record["protocol"][split] = kept


def read_record(path: Path) -> Record:
    """Read what is known of a cell; empty where nothing is.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_bytes())
        if all(isinstance(record[key], dict) for key in ("figures", "errors", "protocol", "seconds")):
            return dict(record)
    except (ValueError, KeyError, TypeError, OSError):
        pass
    raise ValueError(f"{path} is damaged: remove it, and the same command goes on")


def read_baseline(run: Path) -> dict[str, Any] | None:
    """Return what a baseline says of itself; None for another run."""
    return repeatable(read_about(run)) if (run / ABOUT).is_file() else None


def write_record(path: Path, record: Record) -> None:
    """Write what is known of a cell, whole or not at all."""
    write_file(path, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())


def count_parameters(run: Path) -> dict[str, int] | None:
    """Return how many parameters the experts of a run have together, and all else in a checkpoint, such as a gate.

    None where there is neither a checkpoint nor a baseline.
    """
    for checkpoint in checkpoints_in(run / "checkpoints")[:1]:
        counts = {"experts": 0, "others": 0}
        for path in sorted(checkpoint.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith("model.")]  # noqa: SIM118
                sizes = [math.prod(file.get_slice(name).get_shape()) for name in names]
            counts["experts" if path.name.startswith("expert-") else "others"] += sum(sizes)
        return counts
    about = read_baseline(run)
    return about and {"experts": about["parameters"], "others": 0}
