"""A rank's experts run one after another against run as one stack: milliseconds a step, interleaved in one process.

    python benchmarks/execution.py --threads 1 --kind mlp

Forward, backward and optimiser of ten VAEs (784-128-10; or convolutional ones, 16 and 32 channels, which cannot be
stacked) on a batch of 100, as in configs/mnist_moe.yaml. The two ways take turns, after a warm-up; each figure is a
median, the ratio the median of the ratios of neighbouring turns. The auto line says which way mixdist's own timing
takes (execution: auto), made here on the same rows before the turns, and that way's time over the better one's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import torch
from turns import positive

from mixdist.engines import Native
from mixdist.experts import VAE, Compute, Expert, ExpertBank, Noise, time_executions
from mixdist.nets import MLP, Conv
from mixdist.parallel.launch import Launch, keep_large_blocks
from mixdist.parallel.mesh import Mesh, Placement
from mixdist.parallel.wire import Wire
from mixdist.terms import Batch, Field, Parts

SPEC = {"x": Field((1, 28, 28), torch.uint8, 1 / 255)}


def make_experts(kind: str, num_experts: int) -> dict[int, Expert]:
    """Make the experts."""
    torch.manual_seed(0)
    if kind == "conv":
        return {e: VAE(SPEC, 10, Conv([16, 32]), likelihood="gaussian", scale=0.5) for e in range(num_experts)}
    return {e: VAE(SPEC, 10, MLP([128], "sigmoid"), "gaussian", 0.5) for e in range(num_experts)}


def make(execution: str, kind: str, num_experts: int) -> tuple[ExpertBank, Native]:
    """Make a bank, and the engine with its optimisers: one for each expert, or one for the stack."""
    bank = ExpertBank(make_experts(kind, num_experts), execution)  # type: ignore[arg-type]
    mesh = Mesh(Placement.plan(num_experts, 1), Launch(), torch.device("cpu"))
    parts = Parts({}, dict(bank.owned()), bank.stack)
    return bank, Native(parts, mesh, Wire(mesh.device), lambda p: torch.optim.Adam(p, fused=True))


def step(bank: ExpertBank, engine: Native, rows: Batch, noise: Noise) -> float:
    """Do one step; return its seconds."""
    begin = time.perf_counter()
    engine.zero_grad()
    bank(rows, noise).loss_R.mean().backward()
    engine.collect()
    for optimizer in engine.optimizers.values():
        optimizer.step()
    return time.perf_counter() - begin


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--kind", choices=["mlp", "conv"], default="mlp", help="of expert")
    parser.add_argument("--experts", type=positive, default=10)
    parser.add_argument("--rows", type=positive, default=100)
    parser.add_argument("--turns", type=positive, default=15, help="turns of each way")
    parser.add_argument("--steps", type=positive, default=20, help="steps a turn; the first turn warms up")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    keep_large_blocks()  # this and the next as every command does
    torch.set_flush_denormal(True)
    rows = {"x": torch.rand(options.rows, 1, 28, 28), "id": torch.arange(options.rows)}
    eps = torch.randn(options.experts, options.rows, 10)

    def noise(ids: torch.Tensor, experts: Sequence[int], shape: tuple[int, ...]) -> torch.Tensor:
        return eps[list(experts)]

    timed = time_executions(make_experts(options.kind, options.experts), rows, noise, Compute())
    auto = min(timed, key=lambda way: timed[way])
    rivals = {execution: make(execution, options.kind, options.experts) for execution in timed}
    turns: dict[str, list[float]] = {execution: [] for execution in rivals}
    for turn in range(options.turns + 1):
        for execution, (bank, engine) in rivals.items():
            seconds = [step(bank, engine, rows, noise) for _ in range(options.steps)]
            if turn:
                turns[execution].append(1000 * statistics.median(seconds))
    tell(turns, auto, options)


def tell(turns: dict[str, list[float]], auto: str, options: argparse.Namespace) -> None:
    """Print a table and a line of JSON."""
    for execution, figures in turns.items():
        print(f"{execution:8} {statistics.median(figures):7.2f} ms  ({min(figures):.2f} to {max(figures):.2f})")
    result: dict[str, object] = {"auto": auto}
    if "stacked" in turns:
        ratios = [a / b for a, b in zip(turns["loop"], turns["stacked"], strict=True)]
        print(f"loop / stacked {statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")
        result["ratio"] = statistics.median(ratios)
    # Of neighbouring turns, too; the better way is the one whose ratio to the other is below 1.
    over = [statistics.median(a / b for a, b in zip(turns[auto], other, strict=True)) for other in turns.values()]
    result["auto_over_better"] = max(over)
    print(f"auto     takes {auto}: {max(over):.2f} times the better one")
    print(json.dumps({**vars(options), "ms": turns, **result}))


if __name__ == "__main__":
    main()
