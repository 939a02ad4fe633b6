"""Nothing hangs: a rank that dies or stops ends the others, with its name, within the timeout (contract 7)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.launch import HANG_S, ROOT, Forks, Started, descendants
from tests.launch import start as start_torchrun

CONFIG = ROOT / "configs" / "digits_moe.yaml"
SLOW = pytest.mark.slow
TIMEOUT_S = 60


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def start(rank: int, port: str, folder: Path, *own: str) -> Started:
    """Start one rank of three by hand, without a launcher that would end the others itself."""
    env = {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = [
        "--log_every=1",
        "--pretrain=[]",
        "--mixture.num_experts=3",
        f"--mesh.timeout_s={TIMEOUT_S}",
        "--out=run",
        *own,
    ]
    return Forks(["mixdist", "train", f"--config={CONFIG}", *words], folder, env)


@pytest.mark.parametrize(
    ("sent", "lost"),
    [(signal.SIGKILL, 1), pytest.param(signal.SIGKILL, 2, marks=SLOW), pytest.param(signal.SIGSTOP, 1, marks=SLOW)],
    ids=str,
)
def test_a_lost_rank_is_named_and_nobody_waits_for_it(tmp_path: Path, sent: signal.Signals, lost: int) -> None:
    lose_a_rank(tmp_path, sent, lost)


def lose_a_rank(tmp_path: Path, sent: signal.Signals, lost: int, *words: str) -> None:
    """Start three ranks, send one a signal, and check how the others end."""
    port, metrics = free_port(), tmp_path / "run" / "metrics.jsonl"
    with ExitStack() as stack:
        ranks = [stack.enter_context(start(rank, port, tmp_path, *words)) for rank in range(3)]
        deadline = time.monotonic() + HANG_S
        while not (metrics.exists() and metrics.read_text().count("\n") > 5):
            assert time.monotonic() < deadline, "the run did not begin"
            assert all(rank.process.poll() is None for rank in ranks), [rank.text() for rank in ranks]
            time.sleep(0.1)
        os.kill(ranks[lost].process.pid, sent)
        begin = time.monotonic()
        ends = [rank.end() for i, rank in enumerate(ranks) if i != lost]
        # A killed rank's connections close, so nobody waits for the timeout; a stopped one's stay open.
        assert time.monotonic() - begin < (TIMEOUT_S + 60 if sent == signal.SIGSTOP else TIMEOUT_S)
        assert [end.code for end in ends] == [1, 1]
        told = "".join(end.err for end in ends)
        (line,) = [line for line in told.splitlines() if line.startswith("mixdist: ")]
        assert line.startswith(f"mixdist: rank {lost} does not answer")
        assert "--resume" in line
        assert "Traceback" not in told


def test_ranks_end_with_their_torchrun(tmp_path: Path) -> None:
    metrics = tmp_path / "run" / "metrics.jsonl"
    words = ("train", "--config", str(CONFIG), "--log_every=1", "--pretrain=[]", "--train.epochs=5000", "--out=run")
    with start_torchrun(*words, ranks=2, folder=tmp_path) as run:
        run.until(lambda: metrics.exists() and metrics.stat().st_size > 0)
        ranks = descendants(run.process.pid)
        assert len(ranks) >= 2
        run.process.kill()
        run.process.wait()
        check_ended(*ranks)


def alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def check_ended(*pids: int) -> None:
    """Check that processes end soon."""
    deadline = time.monotonic() + HANG_S
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, f"processes {pids} go on without the one that started them"
        time.sleep(0.05)


def test_a_worker_ends_with_the_process_that_started_it() -> None:
    worker = (
        "import time; from mixdist.parallel.launch import end_with_parent as e; e(); print(flush=True); time.sleep(99)"
    )
    parent = f"""
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", {worker!r}], stdout=subprocess.PIPE)
worker.stdout.readline()
print(worker.pid, flush=True)
worker.wait()
"""
    started = subprocess.Popen(
        [sys.executable, "-c", parent], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    assert started.stdout is not None
    with started.stdout as told:
        pid = int(told.readline())
    assert alive(pid)
    started.kill()
    started.wait()
    check_ended(pid)
