"""VaDE against DMVAE at equal widths: milliseconds a step, interleaved in one process, and epochs to the same bound.

    python benchmarks/gates.py --turns 21 --epochs 30

A step is forward, backward and Adam of a gate alone on a batch of 28x28 rows. The two take turns, after a warm-up; each
figure is a median, the ratio the median of the ratios of neighbouring turns; an epoch is 60,000 rows. DMVAE has the
encoder and decoder of VaDE and, for q(k|x), one more encoder.

With --epochs both learn the spiral of seed document 001 with the same network, with and without an autoencoder and a
mixture of Gaussians as their start, DMVAE by its true bound; shown are the mean bounds on held-out rows by epoch, and
the first epoch at which each reaches the last bound of VaDE without a start.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from turns import positive

from mixdist.data import Spiral
from mixdist.gates import DMVAE, VaDE
from mixdist.gates.latent import LatentGate
from mixdist.nets import MLP
from mixdist.parallel.launch import keep_large_blocks
from mixdist.terms import Field

SPEC, NUM_CLUSTERS, EPOCH_ROWS = {"x": Field((1, 28, 28), torch.uint8, 1 / 255)}, 10, 60_000
PLANE = {"likelihood": "gaussian", "scale": 1.0, "mean": "identity", "spread": 5.0}


def step(gate: LatentGate, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """Do one step on the gate's own loss."""
    assert gate.noise_shape is not None
    optimizer.zero_grad()
    loss = gate({"x": x}, torch.randn(len(x), *gate.noise_shape)).loss_B
    assert loss is not None
    loss.mean().backward()
    optimizer.step()


def timed(options: argparse.Namespace) -> dict[str, Any]:
    """Return milliseconds a step of both, and their ratio."""
    x, seconds = torch.rand(options.rows, 1, 28, 28), {}
    gates = {kind.__name__: kind(SPEC, NUM_CLUSTERS, network=MLP(options.hidden)) for kind in (VaDE, DMVAE)}
    optimizers = {name: torch.optim.Adam(gate.parameters(), fused=True) for name, gate in gates.items()}
    for turn in range(options.turns + 1):
        for name, gate in gates.items():
            begin = time.perf_counter()
            for _ in range(options.steps):
                step(gate, optimizers[name], x)
            if turn:  # the first warms up
                seconds.setdefault(name, []).append((time.perf_counter() - begin) / options.steps)
    ratios = [d / v for v, d in zip(seconds["VaDE"], seconds["DMVAE"], strict=True)]
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "ms": {name: 1000 * one for name, one in medians.items()},
        "s_an_epoch": {name: one * EPOCH_ROWS / options.rows for name, one in medians.items()},
        "DMVAE_over_VaDE": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }


def learnt(kind: type[LatentGate], started: bool, options: argparse.Namespace) -> list[float]:
    """Return the bound on held-out rows, nats a row, after each epoch on the spiral."""
    torch.manual_seed(options.seed)
    relaxed = {"relaxed": False} if kind is DMVAE else {}
    gate = kind({"x": Field((2,), torch.float32)}, 5, latent=2, network=MLP([64, 64]), **PLANE, **relaxed)
    train, test = (part.rows["x"] for part in Spiral(options.points, 2000).load()[:2])
    optimizer, bounds = torch.optim.Adam(gate.parameters(), 2e-3, fused=True), []
    if started:
        gate.enter("autoencoder")
        epoch(gate, optimizer, train)
        gate.requires_grad_(True).enter("joint")
        gate.begins = "mixture"
        gate.start(gate.seen({"x": train}), options.seed)
    for _ in range(options.epochs):
        epoch(gate, optimizer, train)
        with torch.no_grad():
            assert gate.noise_shape is not None
            loss = gate.eval()({"x": test}, torch.randn(len(test), *gate.noise_shape)).loss_B
            bounds.append(-loss.mean().item())
        gate.train()
    return bounds


def epoch(gate: LatentGate, optimizer: torch.optim.Optimizer, rows: Tensor) -> None:
    """Learn from all rows once, in a random order."""
    for batch in rows[torch.randperm(len(rows))].split(250):
        step(gate, optimizer, batch)


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print tables and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=positive, nargs="+", default=[500, 500, 2000], help="of the encoder")
    parser.add_argument("--rows", type=positive, default=100)
    parser.add_argument("--turns", type=positive, default=15, help="turns of each")
    parser.add_argument("--steps", type=positive, default=10, help="steps a turn; the first turn warms up")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--epochs", type=int, default=0, help="on the spiral; 0 leaves it out")
    parser.add_argument("--points", type=positive, default=25_000, help="of the spiral")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    keep_large_blocks()  # this and the next as every command does
    torch.set_flush_denormal(True)
    told: dict[str, Any] = timed(options)
    for name, ms in told["ms"].items():
        print(f"{name}: {ms:.2f} ms a step, {told['s_an_epoch'][name]:.1f} s an epoch")
    ratio = told["DMVAE_over_VaDE"]
    print(f"DMVAE over VaDE: {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})")
    if options.epochs:
        ways = [(kind, started) for kind in (VaDE, DMVAE) for started in (False, True)]
        names = [f"{kind.__name__}{', started' if started else ''}" for kind, started in ways]
        told["bounds"] = {n: learnt(*way, options) for n, way in zip(names, ways, strict=True)}
        goal = told["bounds"]["VaDE"][-1]
        for name, bounds in told["bounds"].items():
            first = next((number + 1 for number, bound in enumerate(bounds) if bound >= goal), None)
            print(f"{name}: bound {bounds[-1]:.3f} after {options.epochs} epochs, {goal:.3f} at epoch {first}")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
