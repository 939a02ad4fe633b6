"""What the benchmarks share: rivals that take turns on all ranks, medians of ratios, how figures are printed."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from mixdist.parallel.agreement import gather_json
from mixdist.parallel.launch import Launch, keep_large_blocks
from mixdist.parallel.mesh import Mesh, Placement, choose_device
from mixdist.report.metrics import table

Figures = dict[str, float]
"""Median, least and most of what turns measured."""


def positive(text: str) -> int:
    """Read a whole number from 1, for argparse.

    Raises:
        ValueError: it is none.
    """
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def parser_of(description: str | None, turns: int, steps: int) -> argparse.ArgumentParser:
    """Make a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=positive, default=turns, help="turns of each rival; medians are of these")
    parser.add_argument(
        "--steps", type=positive, default=steps, help="steps of a turn; one more before them is not timed"
    )
    parser.add_argument("--warm-up", type=int, default=1, help="turns of each rival before those that count")
    parser.add_argument("--threads", type=positive, default=1, help="of each rank")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--out", type=Path, help="file for the JSON; unset, it is the last line of the output")
    return parser


def refuse(message: object) -> NoReturn:
    """End with the code of a mistake that the user can mend, and say which."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def meet(num_experts: int, options: argparse.Namespace) -> Mesh:
    """Find this rank's place, as every command does; several EP groups where there are more ranks than experts.

    Ranks that cannot share the experts, or have no such device, end with code 2; rank 0 says why.
    """
    torch.set_num_threads(options.threads)
    keep_large_blocks()  # this and the next as every command does
    torch.set_flush_denormal(True)
    launch = Launch.read()
    try:
        if launch.world_size > num_experts and launch.world_size % num_experts:
            raise ValueError(
                f"{launch.world_size} ranks cannot share {num_experts} experts: start at most {num_experts}, or a "
                f"multiple of {num_experts}"
            )
        placement, device = Placement.plan(num_experts, launch.world_size), choose_device(options.device, launch)
    except ValueError as error:
        if launch.rank:
            raise SystemExit(2) from None
        refuse(error)
    return Mesh(placement, launch, device, timeout_s=300.0)


def take_turns(
    rivals: Mapping[str, Callable[[int], Any]], options: argparse.Namespace, mesh: Mesh
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return each rival's seconds a step in each turn, those of the slowest rank, and CPU seconds a step of all ranks.

    The second say what a step costs where other programs take part of the machine; waiting is not in them.

    A rival is called with the number of steps to do; every rank calls it. Before each turn all ranks meet and the rival
    does one step that is not timed. The order goes round, so that none is always behind the same other.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    cpu: dict[str, list[float]] = {name: [] for name in rivals}
    names = list(rivals)
    for turn in range(-options.warm_up, options.turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            rivals[name](1)
            begin, busy = now(mesh, barrier=True), time.process_time()
            rivals[name](options.steps)
            took, worked = now(mesh) - begin, time.process_time() - busy
            all_took, all_worked = zip(*gather_json([took, worked], mesh.world), strict=True)
            if turn >= 0:
                seconds[name].append(max(all_took) / options.steps)
                cpu[name].append(sum(all_worked) / options.steps)
    return seconds, cpu


def now(mesh: Mesh, barrier: bool = False) -> float:
    """The time in seconds, once the device is done and, if asked, all ranks have met."""
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)
    if barrier and mesh.world is not None:
        # Not dist.barrier: ranks leave that of gloo one after another.
        dist.all_reduce(torch.zeros(1, device=mesh.device), group=mesh.world)
    return time.perf_counter()


def figures(values: Sequence[float]) -> Figures:
    """Median and spread."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(a: Sequence[float], b: Sequence[float]) -> Figures:
    """Median and spread of the ratios a / b of neighbouring turns: what slows the machine down hits both."""
    return figures([x / y for x, y in zip(a, b, strict=True)])


def interval(values: Sequence[float], level: float = 0.95) -> Figures:
    """Median, with its confidence interval: the order statistics that cover it at ``level``, whatever the distribution.

    P(x_(i) <= median <= x_(n+1-i)) = 1 - 2 P(Binomial(n, 1/2) < i); below 6 values least and most cover less than 0.95.
    """
    ordered, n = sorted(values), len(values)
    outside, first = 0.0, 0
    while first < (n - 1) // 2 and 1 - 2 * (outside + math.comb(n, first) / 2**n) >= level:
        outside += math.comb(n, first) / 2**n
        first += 1
    first = max(first - 1, 0)
    return {"median": statistics.median(ordered), "low": ordered[first], "high": ordered[n - 1 - first]}


def ms(of: Figures) -> str:
    """Seconds as "median (least to most)" in milliseconds."""
    return f"{1000 * of['median']:.1f} ({1000 * of['min']:.1f} to {1000 * of['max']:.1f})"


def plain(of: Figures) -> str:
    """A ratio as "median (least to most)"."""
    return f"{of['median']:.3f} ({of['min']:.3f} to {of['max']:.3f})"


def tell(headers: Sequence[str], lines: Sequence[Sequence[object]], mesh: Mesh) -> None:
    """Print a table, on rank 0."""
    if mesh.rank == 0:
        print(table(headers, lines), flush=True)


def run(
    read_options: Callable[[], argparse.Namespace], measure: Callable[[argparse.Namespace, Mesh], Mapping[str, Any]]
) -> None:
    """Run a benchmark from its command line: measure, which every rank does; rank 0 prints tables and JSON."""
    options = read_options()
    mesh = meet(options.experts, options)
    write(measure(options, mesh), options, mesh)
    mesh.close()


def write(result: Mapping[str, Any], options: argparse.Namespace, mesh: Mesh) -> None:
    """Write the JSON, on rank 0: to the file asked for, else as the last line."""
    if mesh.rank:
        return
    chosen = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
    about = {"options": chosen, "ranks": mesh.world_size, "cores": os.cpu_count(), "torch": torch.__version__}
    text = json.dumps({**about, **result})
    if options.out is None:
        print(text, flush=True)
    else:
        options.out.write_text(text + "\n")
