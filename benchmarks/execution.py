"""A rank's experts run one after another against run as one stack: milliseconds a step, interleaved in one process.

    python benchmarks/execution.py --threads 1

Forward, backward and optimiser of ten VAEs (784-128-10) on a batch of 100, as in configs/mnist_moe.yaml. The two ways
take turns, after a warm-up; each figure is a median, the ratio the median of the ratios of neighbouring turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from mixdist.build import keep_large_blocks
from mixdist.experts import VAE, ExpertBank, Noise
from mixdist.terms import Batch, Field

SPEC = {"x": Field((1, 28, 28), torch.uint8, 1 / 255)}


def make(execution: str, num_experts: int) -> tuple[ExpertBank, list[torch.optim.Optimizer]]:
    """Make a bank and its optimisers, one for each expert, as the engine does."""
    torch.manual_seed(0)
    experts = {e: VAE(SPEC, 10, [128], "sigmoid", "gaussian", 0.5) for e in range(num_experts)}
    bank = ExpertBank(experts, execution)  # type: ignore[arg-type]
    return bank, [torch.optim.Adam(expert.parameters(), fused=True) for expert in experts.values()]


def step(bank: ExpertBank, optimizers: list[torch.optim.Optimizer], rows: Batch, noise: Noise) -> float:
    """Do one step; give its seconds."""
    begin = time.perf_counter()
    for parameter in bank.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    bank(rows, noise).loss_R.mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    return time.perf_counter() - begin


def main() -> None:
    """Measure and print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--experts", type=int, default=10)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--turns", type=int, default=15, help="turns of each way")
    parser.add_argument("--steps", type=int, default=20, help="steps a turn; the first turn warms up")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_large_blocks()  # as every command does
    rivals = {execution: make(execution, options.experts) for execution in ("loop", "stacked")}
    rows = {"x": torch.rand(options.rows, 1, 28, 28), "id": torch.arange(options.rows)}
    eps = torch.randn(options.experts, options.rows, 10)
    turns: dict[str, list[float]] = {execution: [] for execution in rivals}
    for turn in range(options.turns + 1):
        for execution, (bank, optimizers) in rivals.items():
            seconds = [
                step(bank, optimizers, rows, lambda ids, experts: eps[list(experts)]) for _ in range(options.steps)
            ]
            if turn:
                turns[execution].append(1000 * statistics.median(seconds))
    ratios = [a / b for a, b in zip(turns["loop"], turns["stacked"], strict=True)]
    for execution, figures in turns.items():
        print(f"{execution:8} {statistics.median(figures):7.2f} ms  ({min(figures):.2f} to {max(figures):.2f})")
    print(f"loop / stacked {statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")
    print(json.dumps({**vars(options), "ms": turns, "ratio": statistics.median(ratios)}))


if __name__ == "__main__":
    main()
