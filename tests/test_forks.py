"""Forks are processes as tests would start them: what they are given is theirs, and how they end is told."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.forks import Forked, environment
from tests.launch import Forks


def test_a_fork_has_its_own_folder_and_environment_and_files(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import os\n\nprint(os.getcwd(), os.environ['OWN'])\nraise ValueError('seen')\n")
    words = ["mixdist", "train", "--mixture", "mixdist.mixtures.Soft", "--mixture.expert", "own.VAE"]
    told = []
    for own in ("one", "two"):  # what one does to itself is not the next one's
        with Forks(words, tmp_path, {"OWN": own}) as fork:
            told.append(fork.end())
    # Imported more than once, since it failed.
    assert [(ended.code, {*ended.out.splitlines()}) for ended in told] == [
        (2, {f"{tmp_path} {own}"}) for own in ("one", "two")
    ]
    assert all("seen" in ended.err for ended in told)
    assert "OWN" not in os.environ
    assert Path.cwd() != tmp_path


def test_a_fork_is_waited_for_however_many_files_are_open(tmp_path: Path) -> None:
    """select.select would refuse descriptors above 1,023."""
    with ExitStack() as stack:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2000)), hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1100):
            stack.enter_context(open(os.devnull))
        with Forks(["by-hand"], tmp_path, {}) as fork:
            assert fork.end().code == 1


def test_a_fork_can_be_waited_for_and_killed(tmp_path: Path) -> None:
    with Forks(["by-hand"], tmp_path, {}) as fork:  # without input it fails
        assert fork.end().code == 1
        fork.process.kill()
        assert (fork.process.poll(), fork.process.wait()) == (1, 1)
    reading, writing = os.pipe()
    with open(reading), open(writing, "w"):
        waits = Forked("by-hand", [], [reading], tmp_path, environment())
        assert waits.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            waits.wait(0)
        waits.kill()
        assert waits.wait() == -signal.SIGKILL
