"""Ranks forked from one process that has imported torch: ``python -m tests.ranks N ARGUMENTS OF MIXDIST``.

As under torchrun, the environment says who a rank is; when one fails the others are ended, and the exit code is 1.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from contextlib import suppress

import mixdist.cli.train  # noqa: F401 (what takes seconds to import is here before the fork)
from mixdist.cli.main import main


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def rank(number: int, world_size: int, port: int, argv: list[str]) -> int:
    """Run mixdist as one rank; return its exit code."""
    who = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in who.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
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


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), sys.argv[2:]))
