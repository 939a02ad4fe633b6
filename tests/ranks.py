"""What tests fork: ``python -m tests.ranks`` has imported torch and mixdist, and forks what `tests/forks.py` asks for.

As under torchrun, the environment says who a rank is; when one fails the others are ended, and the exit code is 1.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as main sets it before torch is imported


import mixdist.cli.evaluate  # what takes seconds to import is here before the fork
from mixdist.cli.main import main
from mixdist.cli.train import train_parser
from mixdist.config.options import parse
from mixdist.config.parsing import make_config
from mixdist.parallel.launch import end_with_parent
from tests.forks import Forked, environment
from tests.launch import HANG_S, HARD, SMALL, Ended, write_config
from tests.pool import serve_rank


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def rank(number: int, world_size: int, port: int, argv: list[str], env: Mapping[str, str] = {}) -> int:
    """Run mixdist as one rank; return its exit code."""
    who = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in who.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(env)
    try:
        return main(argv)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run(world_size: int, argv: list[str]) -> int:
    """Fork the ranks and wait for them; return 0, or 1 if one failed."""
    port, left, failed = free_port(), set(), False
    for number in range(world_size):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = rank(number, world_size, port, argv)
            finally:
                os._exit(code)
        left.add(pid)
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status and not failed:
            failed = True
            for other in left:
                with suppress(ProcessLookupError):
                    os.kill(other, signal.SIGTERM)
    return int(failed)


class ByHand(NamedTuple):
    """One rank as a user starts it: what is not given here is as on every rank.

    Args:
        argv: of mixdist.
        env: of the process.
        path: put first where Python looks for modules.
        version: of mixdist, simulated.
        cwd: the working directory.
    """

    argv: Sequence[str]
    env: Mapping[str, str] = {}
    path: str = ""
    version: str = ""
    cwd: str = "."


def by_hand(cases: Mapping[str, Sequence[ByHand]], folder: Path) -> dict[str, list[Ended]]:
    """Run ranks of their own environment each, without a launcher; return how each ended, by case."""
    with (
        tempfile.TemporaryFile("w+") as given,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        json.dump({name: [one._asdict() for one in ranks] for name, ranks in cases.items()}, given)
        for file in (given, out, err):
            file.seek(0)
        forked = Forked("by-hand", [], [file.fileno() for file in (given, out, err)], folder, environment())
        try:
            code = forked.wait(HANG_S)
        finally:
            forked.kill()
            forked.wait()
        for file in (out, err):
            file.seek(0)
        told = out.read()
        assert code == 0, err.read()
    return {name: [Ended(*one) for one in ranks] for name, ranks in json.loads(told).items()}


def _serve_by_hand(at_once: int = 6) -> None:
    """Read cases, fork their ranks, some cases at once; write how they ended."""
    cases = {name: [ByHand(**one) for one in ranks] for name, ranks in json.load(sys.stdin).items()}
    left, ended = dict(cases), {}
    running: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        while left or running:
            while left and len({rank.rpartition(" ")[0] for rank in running.values()}) < at_once:
                name, port = next(iter(left)), free_port()
                for number, one in enumerate(ranks := left.pop(name)):
                    running[_fork(number, len(ranks), port, one, Path(folder, f"{name} {number}"))] = f"{name} {number}"
            pid, status = os.wait()
            ended[running.pop(pid)] = os.waitstatus_to_exitcode(status)

        def end_of(rank: str) -> Ended:
            return Ended(ended[rank], *(Path(folder, f"{rank}.{kind}").read_text() for kind in ("out", "err")))

        print(json.dumps({name: [end_of(f"{name} {i}") for i in range(len(ranks))] for name, ranks in cases.items()}))


def _fork(number: int, world_size: int, port: int, one: ByHand, output: Path) -> int:
    """Start a rank; return its process."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = _alone(number, world_size, port, one, [Path(f"{output}.{kind}") for kind in ("out", "err")])
    finally:
        os._exit(code)


def _alone(number: int, world_size: int, port: int, one: ByHand, files: Sequence[Path]) -> int:
    for descriptor, file in zip((1, 2), files, strict=True):  # C++ prints too
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(one.cwd)
    if one.path:
        sys.path.insert(0, one.path)
    if one.version:
        mixdist.__version__ = one.version  # type: ignore[attr-defined]
    return rank(number, world_size, port, list(one.argv), one.env)


def _pool(number: str, world_size: str, rendezvous: str, authkey: str) -> int:
    """Be a rank of a pool, whose pipe has the place of the standard input."""
    multiprocessing.current_process().authkey = bytes.fromhex(authkey)
    serve_rank(int(number), int(world_size), rendezvous, Connection(os.dup(0)))
    return 0


def _by_hand() -> int:
    _serve_by_hand()
    return 0


KINDS: dict[str, Callable[..., int]] = {
    "mixdist": lambda *argv: main(argv),
    "ranks": lambda ranks, *argv: run(int(ranks), list(argv)),
    "by-hand": _by_hand,
    "pool": _pool,
}


def serve(channel: socket.socket) -> Callable[[], int]:
    """Fork for whoever asks, and tell how forks ended, until nobody asks any more; return what this process then runs.

    It returns in every fork, too.
    """
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, 1 << 20, 8)
        if not message:
            return lambda: 0
        asked = json.loads(message)
        if "warm" in asked:
            importlib.import_module(asked["warm"])
            answer = 0
        elif "wait" in asked:
            answer = os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1])
        elif (answer := os.fork()) == 0:
            channel.close()
            return partial(_become, asked, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        channel.send(str(answer).encode())


def _become(asked: Mapping[str, Any], descriptors: Sequence[int]) -> int:
    """Be the process that was asked for."""
    end_with_parent()
    for place, descriptor in enumerate(descriptors):
        os.dup2(descriptor, place)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.path.insert(0, asked["cwd"])
    return KINDS[asked["kind"]](*asked["words"])


def warm() -> None:
    """Do what ranks would do first: each would take its seconds for imports, and for what the parser keeps of classes.

    A config is made with its optimisers, since the first optimiser imports for most of a second.
    """
    for name in ("matplotlib.pyplot", "sklearn.datasets", "sklearn.metrics", "torch.utils.tensorboard"):
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        for config in (SMALL, HARD):
            parser = train_parser()
            make_config(parser, parse(parser, ["--config", write_config(Path(folder, "config.yaml"), config)]))


def end(work: Callable[[], int]) -> NoReturn:
    """Do the work of a process and end it, without what Python does last.

    That waits for gloo's threads, and to free each object that came with the fork its memory would be copied: seconds.
    """
    code: Any = 1
    try:
        code = work()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # multiprocessing removes its folders
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code or 0))


if __name__ == "__main__":
    warm()
    gc.freeze()  # what is here is never freed: a fork that looked for it would copy its memory
    work = serve(socket.socket(fileno=int(sys.argv[1])))
    sys.modules["__main__"] = ModuleType("__main__")  # else every process that a fork spawns would import this one
    end(work)
