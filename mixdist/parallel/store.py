"""The rendezvous store: one server that every rank reaches before there is any process group."""

from __future__ import annotations

import os
import socket
import threading
import time
from datetime import timedelta

from torch.distributed import TCPStore

from mixdist.messages import one_line
from mixdist.parallel.launch import Launch

RESOLVE_S = 20.0
"""Seconds for which MASTER_ADDR may not resolve: a name service may learn of rank 0 only when it runs."""
POLL_S = 0.05


def connect(launch: Launch, limit_s: float) -> TCPStore:
    """Return the store at MASTER_ADDR and MASTER_PORT: torchrun's own, else rank 0 is its server.

    What torch would report with warnings and C++ frames is tried beforehand.

    Args:
        launch: this rank.
        limit_s: seconds for which nothing may answer there; another rank may start later.

    Raises:
        ValueError: the variables are missing or wrong, the port is taken, or nothing answers.
    """
    address, port = _place()
    serves = launch.rank == 0 and not is_agents()
    if serves:
        _resolve(address, time.monotonic() + min(RESOLVE_S, limit_s))
        _check_free(port)
    else:
        _reach(address, port, limit_s)
    made: list[TCPStore | RuntimeError] = []
    thread = threading.Thread(
        target=lambda: made.append(_open(address, port, serves, limit_s)), daemon=True, name="mixdist-store"
    )
    thread.start()
    thread.join(limit_s)  # torch waits without end for the answer of a program that is no store
    if made and isinstance(made[0], TCPStore):
        return made[0]
    told = one_line(str(made[0])) if made else f"it has not answered as one within mesh.timeout_s ({limit_s:g})"
    raise ValueError(
        f"what listens at MASTER_ADDR:MASTER_PORT ({address}:{port}) is no rank 0 ({told}): choose another MASTER_PORT "
        f"on every rank"
    )


def _open(address: str, port: int, serves: bool, limit_s: float) -> TCPStore | RuntimeError:
    """Return the store, or why there is none."""
    try:
        return TCPStore(
            # The server listens on all interfaces. It may not reach itself by the name that others know it by.
            "127.0.0.1" if serves else address,
            port,
            is_master=serves,
            timeout=timedelta(seconds=limit_s),
            wait_for_workers=False,
            use_libuv=os.environ.get("USE_LIBUV", "1") == "1",  # as torch's own rendezvous
        )
    except RuntimeError as error:
        return error


def is_agents() -> bool:
    """Return whether torchrun keeps the store, in a process that outlives its ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _place() -> tuple[str, int]:
    """Read where the ranks meet."""
    address, port = (os.environ.get(name, "").strip() for name in ("MASTER_ADDR", "MASTER_PORT"))
    if not address or not port:
        missing = " and ".join(n for n, given in (("MASTER_ADDR", address), ("MASTER_PORT", port)) if not given)
        raise ValueError(
            f"{missing} must be set where there are several ranks: start with torchrun, or export the address of rank "
            f"0 and a free port on it, as in launch/slurm.sbatch"
        )
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"MASTER_PORT ({port}) must be a whole number from 1 to 65535: give every rank the same one")
    return address, int(port)


def _resolve(address: str, deadline: float) -> None:
    """Wait until the name has an address."""
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                told = one_line(str(getattr(error, "strerror", None) or error))
                raise ValueError(
                    f"MASTER_ADDR ({address}) cannot be resolved ({told}): give the address of the host of rank 0"
                ) from None
        time.sleep(POLL_S)


def _check_free(port: int) -> None:
    """Check that this process may serve at a port."""
    dual = socket.has_dualstack_ipv6()  # as torch's server, which takes IPv6 and IPv4 where it can
    with socket.socket(socket.AF_INET6 if dual else socket.AF_INET) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if dual:
            tried.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            tried.bind(("", port))
        except OSError as error:
            raise ValueError(
                f"MASTER_PORT ({port}) cannot be used on this host ({error.strerror}): another program has it, or "
                f"another process is rank 0 too; choose another on every rank, and give each a RANK of its own"
            ) from None


def _reach(address: str, port: int, limit_s: float) -> None:
    """Wait until something listens there."""
    begin = time.monotonic()
    _resolve(address, begin + min(RESOLVE_S, limit_s))
    while True:
        try:
            socket.create_connection((address, port), timeout=max(1.0, min(5.0, limit_s))).close()
            return
        except OSError as error:
            if time.monotonic() > begin + limit_s:
                told = error.strerror or one_line(str(error))
                raise ValueError(
                    f"rank 0 does not answer at MASTER_ADDR:MASTER_PORT ({address}:{port}) within mesh.timeout_s "
                    f"({limit_s:g}): {told}; start rank 0 there, and give every rank the same address and port"
                ) from None
        time.sleep(POLL_S)
