"""Engines side by side, and ways to carry rows to experts: seconds a step, bytes held, bytes sent.

    torchrun --standalone --nproc-per-node 4 benchmarks/engines.py --experts 2

Engines: K convolutional VAEs and a convolutional gate, as in benchmarks/step.py, trained by each engine in turn in the
same processes: native (plain, sharded, offloaded, both), FSDP, DeepSpeed's ZeRO 0, 1, 2. With more ranks than experts
each expert has replicas: only then is anything of it sharded. Ratios are to the plain engine's turn beside it, with the
95% interval of their median (order statistics). Held are the bytes of all tensors that a rival leaves on a rank between
two steps, most over ranks: parameters, gradients, and all else, which is states, master weights and buffers. Peaks
inside a step are not in it: there DeepSpeed's stages and sharded states have whole gradients. Sent are bytes that leave
a rank in a step, mean over ranks, as the wire counts them (of DeepSpeed by formula), rows and reductions apart.

Ways: benchmarks/layers.py; forward and backward passes alone. The bar is 0.2 of DeepSpeed's bytes. What is dropped,
rows above a capacity, is work not done: mixdist drops nothing.

DeepSpeed is left out, with a line, where it is not installed.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

from layers import DeepSpeedStyle, Ours, TokenStyle
from rivals import SIZES, ExpertParallel, Problem
from torch import Tensor
from turns import figures, interval, ms, parser_of, positive, run, take_turns, tell

import mixdist.engines
from mixdist.engines import FSDP, EngineFactory, Native
from mixdist.parallel.agreement import gather_json
from mixdist.parallel.launch import Launch
from mixdist.parallel.mesh import Mesh

ENGINES: dict[str, EngineFactory] = {
    "plain": Native,
    "sharded": partial(Native, shard="optimizer"),
    "offloaded": partial(Native, offload="optimizer"),
    "sharded+offloaded": partial(Native, shard="optimizer", offload="optimizer"),
    "fsdp": FSDP,
}
STAGES = ("zero 0", "zero 1", "zero 2")
WAYS = ("mixdist", "token", "deepspeed")


def read_options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__, turns=15, steps=3)
    parser.add_argument("--size", choices=SIZES, default="small", help="of an expert")
    parser.add_argument("--experts", type=positive, default=Launch.read().world_size, help="K; unset, one a rank")
    parser.add_argument("--batch", type=positive, default=64, help="rows of the global batch")
    parser.add_argument("--image", type=positive, default=64, help="height and width of the images")
    parser.add_argument("--engines", nargs="*", choices=[*ENGINES, *STAGES], default=[*ENGINES, *STAGES])
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS), help="where ranks have no replicas")
    return parser.parse_args(words)


def measure(options: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    """Run engines, then ways, each in turns; return what is written. Every rank calls it."""
    problem = Problem(options.size, options.experts, options.batch, options.image)
    engines, ways = here(options, mesh)
    result: dict[str, Any] = {}
    if engines:
        result["engines"] = compare_engines(engines, problem, options, mesh)
        show_engines(result["engines"], mesh)
    if ways:
        result["ways"] = {k: compare_ways(k, ways, problem, options, mesh) for k in ("dense", "top-1")}
        show_ways(result["ways"], mesh)
    return result


def here(options: argparse.Namespace, mesh: Mesh) -> tuple[list[str], list[str]]:
    """Return the engines and ways that can be run; rank 0 says what is left out."""
    installed = find_spec("deepspeed") is not None
    engines = [
        name for name in options.engines if name in ENGINES or (installed and hasattr(mixdist.engines, "DeepSpeed"))
    ]
    ways = [name for name in options.ways if installed or name != "deepspeed"]
    why = [f"{name}: deepspeed is not installed" for name in options.engines if name not in engines]
    why += [f"{name}: deepspeed is not installed" for name in options.ways if name not in ways]
    if mesh.placement.num_replicas > 1 or options.experts % mesh.world_size:
        why += [f"{name}: experts that ranks hold alike, and no replicas" for name in ways]
        ways = []
    for line in why if mesh.rank == 0 else ():
        print(f"left out: {line}", flush=True)
    return engines, ways


def compare_engines(
    names: Sequence[str], problem: Problem, options: argparse.Namespace, mesh: Mesh
) -> dict[str, dict[str, Any]]:
    """Train by every engine in turns; every rank calls it."""
    dataset, rivals, held = problem.data(), {}, {}
    for name in names:
        make = ENGINES.get(name) or partial(mixdist.engines.DeepSpeed, zero=int(name[-1]))
        gc.collect()
        before = storages()
        rivals[name] = ExpertParallel(problem, dataset, mesh, engine=make)
        rivals[name].run(2)
        held[name] = bytes_held(rivals[name], before, mesh)
    seconds, cpu = take_turns({name: rival.run for name, rival in rivals.items()}, options, mesh)
    for rival in rivals.values():
        rival.run(1)
    plain = seconds.get("plain", seconds[names[0]])
    return {
        name: {
            "seconds": figures(seconds[name]),
            "to_plain": interval([a / b for a, b in zip(seconds[name], plain, strict=True)]),
            "cpu_to_plain": interval([a / b for a, b in zip(cpu[name], cpu.get("plain", cpu[names[0]]), strict=True)]),
            "held": held[name],
            "sent": {kind: rival.meter[f"{kind}_bytes"] / mesh.world_size for kind in ("wire", "sync")},
            "first_loss": rival.first_loss,
            "turns": seconds[name],
        }
        for name, rival in rivals.items()
    }


def storages() -> dict[int, int]:
    """Return the memory of all tensors of real numbers that Python knows: address to bytes. Rows are whole numbers."""
    found: dict[int, int] = {}
    for tensor in (one for one in gc.get_objects() if issubclass(type(one), Tensor) and one.is_floating_point()):
        for each in (tensor, tensor.grad if tensor.is_leaf else None):
            if each is not None:
                found |= {local.untyped_storage().data_ptr(): local.untyped_storage().nbytes() for local in [own(each)]}
    return found


def own(tensor: Tensor) -> Tensor:
    """Return what this rank has of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]


def bytes_held(rival: ExpertParallel, before: dict[int, int], mesh: Mesh) -> dict[str, int]:
    """Return the bytes of a rival's tensors between two steps, most over ranks of each kind."""
    gc.collect()
    parameters = [own(p) for owned in rival.mixture.parts.owned() for p in owned.module.parameters()]
    grads = [own(p.grad) for o in rival.mixture.parts.owned() for p in o.module.parameters() if p.grad is not None]
    places = [{t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in ts} for ts in (parameters, grads)]
    rest = {at: size for at, size in storages().items() if not any(at in known for known in (before, *places))}
    counted = [sum(part.values()) for part in (*places, rest)]
    most = [max(sizes) for sizes in zip(*gather_json(counted, mesh.world), strict=True)]
    return dict(zip(("parameters", "gradients", "states"), most, strict=True))


def compare_ways(
    routing: str, names: Sequence[str], problem: Problem, options: argparse.Namespace, mesh: Mesh
) -> dict[str, dict[str, Any]]:
    """Carry rows by every way in turns; every rank calls it."""
    dataset, k = problem.data(), 1 if routing == "top-1" else None
    kinds = {"mixdist": Ours, "token": TokenStyle, "deepspeed": DeepSpeedStyle}
    rivals = {name: kinds[name](k, problem, dataset, mesh) for name in names}
    seconds, _ = take_turns({name: rival.run for name, rival in rivals.items()}, options, mesh)
    sent, dropped = {}, {}
    for name, rival in rivals.items():
        rival.run(1)
        each = gather_json([rival.sent(), rival.dropped()], mesh.world)
        sent[name], dropped[name] = (sum(part) / len(part) for part in zip(*each, strict=True))
    first = next(iter(names))
    return {
        name: {
            "bytes": sent[name],
            "dropped": dropped[name],
            "bytes_of_first_over": sent[first] / sent[name] if sent[name] else None,
            "seconds": figures(seconds[name]),
            "to_first": interval([a / b for a, b in zip(seconds[name], seconds[first], strict=True)]),
        }
        for name in names
    }


def show_engines(told: dict[str, dict[str, Any]], mesh: Mesh) -> None:
    """Print the engines, on rank 0."""
    head = ["engine", "ms a step", "to plain", "CPU to plain", "parameters kB", "gradients kB", "states kB"]
    lines = [
        [
            name,
            ms(one["seconds"]),
            *(within(one[key]) for key in ("to_plain", "cpu_to_plain")),
            *(f"{size / 1e3:.0f}" for size in one["held"].values()),
            *(f"{size / 1e3:.0f}" for size in one["sent"].values()),
        ]
        for name, one in told.items()
    ]
    tell([*head, "rows sent kB", "reductions kB"], lines, mesh)


def show_ways(told: dict[str, dict[str, dict[str, Any]]], mesh: Mesh) -> None:
    """Print the ways, on rank 0."""
    lines = [
        [
            routing,
            name,
            f"{one['bytes'] / 1e3:.1f}",
            "-" if one["bytes_of_first_over"] is None else f"{one['bytes_of_first_over']:.4f}",
            f"{100 * one['dropped']:.0f}%",
            ms(one["seconds"]),
            within(one["to_first"]),
        ]
        for routing, ways in told.items()
        for name, one in ways.items()
    ]
    tell(["routing", "way", "sent kB", "mixdist's over it", "dropped", "ms a step", "to mixdist"], lines, mesh)


def within(of: dict[str, float]) -> str:
    """A median with its interval."""
    return f"{of['median']:.3f} [{of['low']:.3f}, {of['high']:.3f}]"


if __name__ == "__main__":
    run(read_options, measure)
