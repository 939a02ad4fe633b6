"""Start mixdist for tests: in this process, or in other processes that are killed when they hang."""

from __future__ import annotations

import copy
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mixdist.cli.main import main
from mixdist.config.config import Config
from tests.forks import ROOT as ROOT
from tests.forks import Forked, environment

HANG_S = 300.0
"""A limit for work of seconds: far more than a busy machine needs for it, so that only a hang reaches it."""


def mlp(*hidden: int) -> dict[str, Any]:
    """Return the network of a config."""
    return {"class_path": "mixdist.nets.MLP", "init_args": {"hidden": list(hidden)}}


SMALL: dict[str, Any] = {
    "data": {"class_path": "mixdist.data.Digits"},
    "mixture": {
        "class_path": "mixdist.mixtures.Soft",
        "init_args": {
            "num_experts": 4,
            "gate": {"class_path": "mixdist.gates.Softmax", "init_args": {"network": mlp(8)}},
            "expert": {"class_path": "mixdist.experts.VAE", "init_args": {"network": mlp(8), "latent": 2}},
        },
    },
    "train": {
        "epochs": 1,
        "batch_size": 500,
        "objective": {
            "class_path": "mixdist.mixtures.WeightedLoss",
            "init_args": {"balance": {"class_path": "mixdist.mixtures.VarianceBalance", "init_args": {"weight": 0.1}}},
        },
        "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.001}},
    },
    "log_every": 1,
}
"""A config of a run that takes three steps."""
HARD: dict[str, Any] = {
    "data": {
        "class_path": "mixdist.data.Blobs",
        "init_args": {"num_classes": 3, "rows": 120, "test_rows": 30, "spread": 0.2},
    },
    "mixture": {
        "class_path": "mixdist.competition.Competition",
        "init_args": {
            "expert": {
                "class_path": "mixdist.experts.VAE",
                "init_args": {"network": mlp(6), "latent": 2, "likelihood": "gaussian", "mean": "identity"},
            },
            "num_experts": 3,
            "rounds": 2,
            "score": {
                "class_path": "mixdist.competition.Discriminators",
                "init_args": {"network": mlp(8), "batch_size": 40},
            },
        },
    },
    "train": {"epochs": 1, "batch_size": 30},
}
"""A config of a competition of two rounds."""

REMOVED = object()


def changed(base: dict[str, Any] = SMALL, /, **changes: Any) -> dict[str, Any]:
    """Return a config with other values: ``changed(train__epochs=3)``; REMOVED takes a key away.

    What is no key of a config is the mixture's: ``changed(expert__init_args__latent=3)``.
    """
    config = copy.deepcopy(base)
    for path, value in changes.items():
        *outer, last = path.split("__")
        own = [*outer, last][0] in Config.__dataclass_fields__
        section = config if own else config["mixture"]["init_args"]
        for key in outer:
            section = section.setdefault(key, {})
        if value is REMOVED:
            del section[last]
        else:
            section[last] = value
    return config


def write_config(path: Path, config: Any) -> str:
    """Write a YAML file; return its path as an argument. Runs are drawn where the config says so: it takes longest."""
    if isinstance(config, dict):
        config = {"pictures": False, **config}
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return str(path)


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def here(*words: str) -> Ended:
    """Run a command in this process."""
    out, err, path = io.StringIO(), io.StringIO(), list(sys.path)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main(words)
    except SystemExit as end:  # argparse's way to end with help
        code = int(end.code or 0)
    finally:
        sys.path[:] = path
    return Ended(code, out.getvalue(), err.getvalue())


class Started:
    """A module run in processes of its own, its output in files; a ``with`` block ends whatever is left of it."""

    def __init__(self, words: Sequence[str], folder: Path, env: dict[str, str]) -> None:
        self.out, self.err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = self.begin(words, folder, environment(**env))

    def begin(self, words: Sequence[str], folder: Path, env: dict[str, str]) -> subprocess.Popen[bytes] | Forked:
        command, files = [sys.executable, "-m", *words], {"stdout": self.out, "stderr": self.err}
        return subprocess.Popen(command, cwd=folder, env=env, start_new_session=True, **files)

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()
        self.out.close()
        self.err.close()

    def kill(self) -> None:
        """End the process and all it started with SIGKILL, as a machine that loses power would."""
        family = [self.process.pid, *descendants(self.process.pid)]
        for pid in family:  # torchrun first: it would report, and its workers have groups of their own
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def text(self) -> tuple[str, str]:
        """What it has printed so far."""
        for file in (self.out, self.err):
            file.seek(0)
        return self.out.read(), self.err.read()

    def end(self, timeout_s: float = HANG_S) -> Ended:
        """Wait for its end; fail with its output where it takes too long."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"did not end within {timeout_s} s\n" + "\n".join(self.text())) from None
        return Ended(code, *self.text())

    def until(self, condition: Callable[[], bool], timeout_s: float = HANG_S) -> None:
        """Wait until something holds while it runs; fail with its output where it ends before or takes too long."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError("ended or took too long\n" + "\n".join(self.text()))
            time.sleep(0.05)


class Forks(Started):
    """The same, forked from a process that has imported torch; the words are a kind of `tests/ranks.py` and its own."""

    def begin(self, words: Sequence[str], folder: Path, env: dict[str, str]) -> Forked:
        with open(os.devnull) as nothing:
            files = [file.fileno() for file in (nothing, self.out, self.err)]
            return Forked(words[0], words[1:], files, folder, env)


def start(*words: str, ranks: int, folder: Path, **env: str) -> Started:
    """Start a command under torchrun in a folder."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "mixdist"]
    return Started([*torchrun, *words], folder, env)


def torchrun(*words: str, ranks: int, folder: Path, **env: str) -> Ended:
    """Run a command under torchrun in a folder to its end."""
    with start(*words, ranks=ranks, folder=folder, **env) as started:
        return started.end()


def begin(*words: str, ranks: int, folder: Path, **env: str) -> Started:
    """Start a command on ranks in a folder, as under torchrun but in less time."""
    return Forks(["ranks", str(ranks), *words], folder, env)


def together(*words: str, ranks: int, folder: Path, **env: str) -> Ended:
    """Run a command on ranks to its end, as under torchrun but in less time."""
    with begin(*words, ranks=ranks, folder=folder, **env) as started:
        return started.end()


def descendants(pid: int) -> list[int]:
    """Return the processes that a process has started, and those that they have started."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):  # it ended meanwhile
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found[1:]


def complaint(ended: Ended) -> str:
    """Check a command that failed against the rule, exit code 2 and one line on stderr; return the line."""
    assert (ended.code, ended.out) == (2, ""), ended
    assert ended.err.startswith("mixdist: ")
    assert ended.err.count("\n") == 1, ended.err
    assert not re.search(r"Traceback|Namespace\(|<class '|Subtypes|  ", ended.err), ended.err
    return ended.err.removeprefix("mixdist: ").strip()


def refused(*argv: str, names: str = "") -> str:
    """Run a command that must be refused, name these words, and leave the working directory as it was."""
    before = _files()
    line = complaint(here(*argv))
    assert _files() == before
    assert [word for word in names.split() if word not in line] == [], line
    return line


def _files() -> dict[Path, bytes]:
    kept = [path for path in Path().rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path: path.read_bytes() for path in kept}
