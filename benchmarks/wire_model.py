"""What a message and a byte cost on the wire between the ranks, fitted to timed collectives.

t = alpha messages + beta bytes, with alpha and beta not negative, is fitted to all-to-alls and all-reduces of several
sizes; each time counts relative to itself. An all-to-all of W ranks has W - 1 messages, an all-reduce 2 (W - 1), as a
ring's; bytes are those that leave a rank.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from scipy.optimize import nnls
from torch import Tensor
from turns import now

from mixdist.parallel.agreement import gather_json
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import Group, Pending, Wire

FLOATS = (1, 256, 4096, 32768, 262144)
REPEATS = 9


class CountingWire(Wire):
    """Counts messages too: a rank's own, of a step."""

    messages = 0

    def _all_to_all(self, flat: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Pending:
        self.messages += sum(1 for n in sent if n)
        return super()._all_to_all(flat, sent, received, group)

    def start_all_reduce(self, tensor: Tensor, group: Group) -> Pending:
        self.messages += 0 if group is None else 2 * (torch.distributed.get_world_size(group) - 1)
        return super().start_all_reduce(tensor, group)


def fit_wire(mesh: Mesh) -> dict[str, Any]:
    """Time collectives of several sizes and fit t = alpha messages + beta bytes; in one process there is no wire."""
    if mesh.world is None:
        return {"alpha": None, "beta": None, "residual": None, "points": []}
    size = mesh.world_size
    points = []
    for floats in FLOATS:
        flat = torch.zeros(size * floats, device=mesh.device)
        sent = [0 if rank == mesh.rank else floats for rank in range(size)]
        wire = Wire(mesh.device)

        def to_all(flat: Tensor = flat, sent: list[int] = sent, wire: Wire = wire) -> None:
            wire.all_to_all(flat[: sum(sent)], sent, sent, mesh.world).wait()

        def reduce(flat: Tensor = flat, wire: Wire = wire) -> None:
            wire.all_reduce(flat, mesh.world)

        for kind, collective, messages in (("all_to_all", to_all, size - 1), ("all_reduce", reduce, 2 * (size - 1))):
            seconds = time_of(collective, mesh)
            num_bytes = 4 * floats * (size - 1) * (1 if kind == "all_to_all" else 2)
            points.append({"kind": kind, "messages": messages, "bytes": num_bytes, "seconds": seconds})
    return {**fit(points), "points": points}


def time_of(collective: Any, mesh: Mesh) -> float:
    """Median seconds of a collective, of the slowest rank each time."""
    seconds = []
    for repeat in range(REPEATS + 2):
        begin = now(mesh, barrier=True)
        collective()
        slowest = max(gather_json(now(mesh) - begin, mesh.world))
        if repeat >= 2:
            seconds.append(slowest)
    return statistics.median(seconds)


def fit(points: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Least squares for t = alpha messages + beta bytes, neither negative; every point relative to its own time.

    Returns:
        alpha in seconds a message, beta in seconds a byte, and the median of |t - model| / t.
    """
    t = torch.tensor([p["seconds"] for p in points], dtype=torch.float64)
    columns = torch.tensor([[p["messages"], 1e-6 * p["bytes"]] for p in points], dtype=torch.float64) / t[:, None]
    (alpha, beta), _ = nnls(columns.numpy(), torch.ones(len(points), dtype=torch.float64).numpy())
    model = columns @ torch.tensor([alpha, beta], dtype=torch.float64)
    return {"alpha": float(alpha), "beta": float(1e-6 * beta), "residual": (model - 1).abs().median().item()}
