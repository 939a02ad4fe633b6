"""Engines of experts that train alone, as a competition's do: seconds a step, bytes of states, bytes sent.

    torchrun --standalone --nproc-per-node 2 benchmarks/alone.py

For each width H a VAE of 784-H-20-H-784, of which every rank has a replica, is trained by ``mixdist.engines.Solo`` as
Native makes it: plain, sharded, offloaded, both. All take turns in the same processes, from the same weights, on the
same rows. Ratios are to the plain engine's turn beside it, with the 95% interval of their median (order statistics).
States are most over ranks; sent are bytes a step that leave a rank, mean over ranks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from rivals import adam
from torch import nn
from turns import figures, interval, ms, parser_of, positive, run, take_turns, tell

from mixdist.engines import Native
from mixdist.engines.solo import Solo, solo_of
from mixdist.experts import VAE
from mixdist.nets import MLP
from mixdist.parallel.agreement import gather_json
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import Wire
from mixdist.terms import Field, Spec

WAYS: dict[str, dict[str, str]] = {
    "plain": {},
    "sharded": {"shard": "optimizer"},
    "offloaded": {"offload": "optimizer"},
    "sharded+offloaded": {"shard": "optimizer", "offload": "optimizer"},
}
SPEC: Spec = {"x": Field((784,), torch.float32)}
LATENT = 20


def read_options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__, turns=31, steps=5)
    parser.add_argument("--hidden", type=positive, nargs="+", default=[32, 400, 1500], help="H")
    parser.add_argument("--batch", type=positive, default=50, help="rows of the batch of all replicas")
    parser.set_defaults(experts=1)
    return parser.parse_args(words)


class Alone:
    """A replica of a VAE with its engine.

    Args:
        way: a key of WAYS.
        hidden: H.
        batch: rows of all replicas.
        mesh: this rank's place.
    """

    def __init__(self, way: str, hidden: int, batch: int, mesh: Mesh) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = VAE(SPEC, LATENT, MLP([hidden])).to(mesh.device)
        self.wire, self.batch = Wire(mesh.device), batch
        make = solo_of(partial(Native, **WAYS[way]))
        self.engine: Solo = make("expert 0", self.module, mesh.replica_group, self.wire, adam)
        draw = torch.Generator().manual_seed(mesh.rank)
        rows = len(range(mesh.rank, batch, mesh.world_size))
        self.x = torch.rand(rows, 784, generator=draw).to(mesh.device)
        self.eps = torch.randn(rows, LATENT, generator=draw).to(mesh.device)
        self.loss = 0.0

    def run(self, steps: int) -> None:
        """Train for some steps."""
        for _ in range(steps):
            self.wire.meter.reset()
            self.engine.zero_grad()
            loss = self.module({"x": self.x}, self.eps).loss_R.sum() / self.batch
            loss.backward()
            self.loss = self.engine.step(loss)

    def told(self) -> list[int]:
        """Return the bytes of states here, and those that a step sends."""
        states = [t for state in self.engine.optimizer.state.values() for t in state.values()]
        return [sum(t.numel() * t.element_size() for t in states), self.wire.meter.sync_bytes]


def measure(options: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    """Train every size by every way in turns; return what is written. Every rank calls it."""
    result = {str(hidden): compare(hidden, options, mesh) for hidden in options.hidden}
    lines = [
        [
            hidden,
            name,
            ms(one["seconds"]),
            *("{median:.2f} [{low:.2f}, {high:.2f}]".format(**one[key]) for key in ("to_plain", "cpu_to_plain")),
            *(f"{one[key] / 1e3:.0f}" for key in ("states", "sent")),
        ]
        for hidden, ways in result.items()
        for name, one in ways.items()
    ]
    tell(["H", "engine", "ms a step", "to plain", "CPU to plain", "states kB", "sent kB"], lines, mesh)
    return result


def compare(hidden: int, options: argparse.Namespace, mesh: Mesh) -> dict[str, dict[str, Any]]:
    """Train one size by every way in turns; every rank calls it."""
    rivals = {way: Alone(way, hidden, options.batch, mesh) for way in WAYS}
    seconds, cpu = take_turns({way: rival.run for way, rival in rivals.items()}, options, mesh)
    found = {}
    for way, rival in rivals.items():
        states, sent = zip(*gather_json(rival.told(), mesh.world), strict=True)
        found[way] = {
            "seconds": figures(seconds[way]),
            "to_plain": interval([a / b for a, b in zip(seconds[way], seconds["plain"], strict=True)]),
            "cpu_to_plain": interval([a / b for a, b in zip(cpu[way], cpu["plain"], strict=True)]),
            "states": max(states),
            "sent": sum(sent) / mesh.world_size,
            "last_loss": rival.loss,
        }
    return found


if __name__ == "__main__":
    run(read_options, measure)
