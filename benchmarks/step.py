"""Seconds of a training step: one process, DDP with every expert replicated, mixdist.

    torchrun --standalone --nproc-per-node 2 benchmarks/step.py --size large

K convolutional VAEs and a convolutional gate on synthetic uint8 colour images, the loss sum_e r_e l_e plus a balance
term, fused Adam, float32. The rivals take turns in the same processes:

    process          rank 0 alone loops over all experts, the whole batch, with one thread
    process+         the same with as many threads as there are ranks; not by default: its idle threads spin for a while
                     and slow down whoever follows, more so where the machine is not ours alone
    ddp              DistributedDataParallel over gate and all experts, a share of the batch on each rank; gradients are
                     views of its buckets, the graph is static, its all-reduces run under the backward pass
    apart            every rank as many experts on as many rows as in mixdist, and no word between ranks: what would be
                     left if dispatch cost nothing, and how much ranks with equal work differ by themselves
    expert-parallel  mixdist's Soft and Native, plain; then with its switches

The balance term of the process rivals and of DDP is over the rows at hand, as their users write it; mixdist's is over
the global batch and costs it a collective. Peers draw noise with torch.randn, mixdist with its row-keyed generator.
mixdist's step includes its checks and totals; every rival reads its loss in every step.

CPU time is summed over ranks, waiting left out: what a step costs, also where other programs share the machine.
Bytes: of the experts' parameters and of the optimiser's state held by a rank (mean over ranks); sent by a rank in a
step (mean over ranks; a reduction of n bytes over W ranks counts 2 (W - 1) / W n, for DDP computed from its
gradients). Waiting (for the last rank) and transfer are shares of separate steps of mixdist in which a barrier stands
before each collective: such steps cannot overlap anything, so prefetch shows as if it did not help. "Usual" is both
together, each collective at its median over steps: what is left without the rare step that holds a rank up. Of "apart",
waiting is the mean over ranks of what each would wait for the slowest at the end of a step: the machine's part.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from rivals import SIZES, ExpertParallel, Problem, Replicated, Rival, num_bytes, on_rank_0
from turns import Figures, figures, ms, now, parser_of, plain, positive, ratio, run, take_turns, tell

from mixdist.parallel.agreement import gather_json
from mixdist.parallel.launch import Launch
from mixdist.parallel.mesh import Mesh

SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_way": {"one_way": True},
    "prefetch": {"prefetch": True},
    "one_way+prefetch": {"one_way": True, "prefetch": True},
    "micro_batch": {"micro_batch": 32},
    "one_way+prefetch+micro_batch": {"one_way": True, "prefetch": True, "micro_batch": 32},
}
OURS = "expert-parallel "
PEERS = ["process", "process+", "ddp", "apart"]


def measure(options: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    """Run the rivals in turns; return what is written. Every rank calls it."""
    problem = Problem(options.size, options.experts, options.batch, options.image, options.balance)
    rivals = make(problem, mesh, options)
    seconds, cpu = take_turns(runs(rivals, mesh), options, mesh)
    by_rival = {name: describe(name, rival, seconds[name], cpu[name], problem, mesh) for name, rival in rivals.items()}
    for name, found in traffic(rivals, mesh, options.timed_steps).items():
        by_rival[name].update(found)
    ratios = compare(seconds, cpu, by_rival)
    show(by_rival, ratios, mesh)
    return {"rivals": by_rival, **ratios}


def read_options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__, turns=7, steps=3)
    parser.add_argument("--size", choices=SIZES, default="small", help="of an expert")
    parser.add_argument("--experts", type=positive, default=Launch.read().world_size, help="K; unset, one a rank")
    parser.add_argument("--batch", type=positive, default=64, help="rows of the global batch")
    parser.add_argument("--image", type=positive, default=64, help="height and width of the images")
    parser.add_argument("--balance", type=float, default=1.0, help="weight of the KL balance term; 0 for none")
    parser.add_argument("--timed-steps", type=int, default=15, help="with barriers: waiting and transfer")
    parser.add_argument("--switches", nargs="*", choices=SWITCHES, default=list(SWITCHES), help="of mixdist")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["process", "ddp", "apart"])
    return parser.parse_args(words)


def make(problem: Problem, mesh: Mesh, options: argparse.Namespace) -> dict[str, Rival | None]:
    """Make the rivals, each with weights of its own; a rank that has no part in one holds None."""
    if problem.batch_size % mesh.world_size:
        raise ValueError(
            f"batch ({problem.batch_size}) must be a multiple of the {mesh.world_size} ranks: DDP averages"
        )
    dataset = problem.data()
    made: dict[str, Rival | None] = {}
    for name in options.peers:
        if name == "ddp":
            made[name] = Replicated(problem, dataset, mesh, mesh.device)
        elif name == "apart":
            rows = problem.batch_size // mesh.placement.num_replicas
            own = replace(problem, num_experts=len(mesh.experts), batch_size=rows)
            made[name] = Replicated(own, dataset, None, mesh.device)
        else:
            made[name] = None if mesh.rank else Replicated(problem, dataset, None, mesh.device)
    for name in options.switches:
        made[OURS + name] = ExpertParallel(problem, dataset, mesh, **SWITCHES[name])
    return made


def runs(rivals: dict[str, Rival | None], mesh: Mesh) -> dict[str, Callable[[int], None]]:
    """What each rank does in a rival's turn."""
    threads = {"process": 1, "process+": mesh.world_size}
    return {
        name: on_rank_0(rival and rival.run, threads[name]) if name in threads else rival.run  # type: ignore[union-attr]
        for name, rival in rivals.items()
    }


def describe(
    name: str, rival: Rival | None, seconds: list[float], cpu: list[float], problem: Problem, mesh: Mesh
) -> dict[str, Any]:
    """Say of a rival what was measured and what it holds and sends; every rank calls it."""
    held = gather_json(rival and rival.bytes_held(), mesh.world)
    held = [h for h in held if h]
    told: dict[str, Any] = {
        "seconds": figures(seconds),
        "rows_per_s": figures([problem.batch_size / s for s in seconds]),
        "turns": seconds,
        "cpu_seconds": figures(cpu),
        "first_loss": mean(gather_json(rival and rival.first_loss, mesh.world)),
        "expert_bytes": mean([h["experts"] for h in held]),
        "optimizer_bytes": mean([h["optimizer"] for h in held]),
        "wire_bytes": 0,
        "wire_bytes_min": 0,
        "sync_bytes": 0,
    }
    if name == "ddp":
        assert isinstance(rival, Replicated)
        told["sync_bytes"] = 2 * (mesh.world_size - 1) * num_bytes(rival.model.parameters()) // mesh.world_size
    return told


def traffic(rivals: dict[str, Rival | None], mesh: Mesh, timed_steps: int) -> dict[str, dict[str, Any]]:
    """Return shares of waiting and transfer, in separate steps in which the rivals take turns; and bytes of a step."""
    told: dict[str, dict[str, Any]] = {}
    shares: dict[str, dict[str, list[float]]] = {}
    collective_times: dict[str, list[list[float]]] = {}
    for _ in range(timed_steps):
        for name, rival in rivals.items():
            if rival is None or not (isinstance(rival, ExpertParallel) or name == "apart"):
                continue
            begin = now(mesh, barrier=True)
            rival.step(timed=True)
            all_took = gather_json(now(mesh) - begin, mesh.world)
            seconds = {"waiting": mean([max(all_took) - took for took in all_took]), "transfer": 0.0}
            if isinstance(rival, ExpertParallel):
                meter = rival.wire.meter
                seconds = {key: mean(gather_json(getattr(meter, key + "_s"), mesh.world)) for key in seconds}
                counts = ("wire_bytes", "wire_bytes_min", "sync_bytes")
                told[name] = {key: mean(gather_json(getattr(meter, key), mesh.world)) for key in counts}
                collective_times.setdefault(name, []).append(
                    spell_shares(gather_json(meter.collective_times, mesh.world), max(all_took))
                )
            for key, value in (seconds | {"together": sum(seconds.values())}).items():
                shares.setdefault(name, {}).setdefault(key, []).append(value / max(all_took))
    for name, of in collective_times.items():
        told[name]["usual"] = sum(median(spell) for spell in zip(*of, strict=True))
    return {name: told.get(name, {}) | {key: figures(of) for key, of in own.items()} for name, own in shares.items()}


def spell_shares(by_rank: Sequence[Sequence[tuple[float, float]]], took: float) -> list[float]:
    """Waiting and transfer together of each collective of a step, as a share of the step; mean over ranks."""
    return [mean([sum(spell) for spell in ranks]) / took for ranks in zip(*by_rank, strict=True)]


def compare(seconds: dict[str, list[float]], cpu: dict[str, list[float]], by_rival: dict[str, Any]) -> dict[str, Any]:
    """Hold mixdist against its peers: rows/s over theirs, rows a CPU second over theirs, bytes held over DDP's."""
    ours = [name for name in seconds if name.startswith(OURS)]
    peers = [name for name in seconds if not name.startswith(OURS)]
    speed = {peer: {name: ratio(seconds[peer], seconds[name]) for name in ours} for peer in peers}
    thrift = {peer: {name: ratio(cpu[peer], cpu[name]) for name in ours} for peer in peers}
    result: dict[str, Any] = {"rows_per_s_over": speed, "rows_per_cpu_s_over": thrift}
    if ours and "ddp" in peers:
        held = {name: by_rival[name]["expert_bytes"] + by_rival[name]["optimizer_bytes"] for name in ("ddp", ours[0])}
        result["held_over_ddp"] = held[ours[0]] / held["ddp"]
    return result


def show(by_rival: dict[str, Any], ratios: dict[str, Any], mesh: Mesh) -> None:
    """Print the tables, on rank 0."""
    head = [
        "rival",
        "ms a step",
        "CPU ms",
        "rows/s",
        "expert MB",
        "optimizer MB",
        "wire kB",
        "sync kB",
        "waiting",
        "transfer",
        "usual",
    ]
    lines = [
        [
            name,
            ms(told["seconds"]),
            f"{1000 * told['cpu_seconds']['median']:.1f}",
            f"{told['rows_per_s']['median']:.1f}",
            *(f"{told[key] / 1e6:.2f}" for key in ("expert_bytes", "optimizer_bytes")),
            *(f"{told[key] / 1e3:.1f}" for key in ("wire_bytes", "sync_bytes")),
            *(share(told.get(key)) for key in ("waiting", "transfer")),
            f"{100 * told['usual']:.1f}%" if "usual" in told else "-",
        ]
        for name, told in by_rival.items()
    ]
    tell(head, lines, mesh)
    for key, title in (("rows_per_s_over", "rows/s over"), ("rows_per_cpu_s_over", "rows a CPU second over")):
        over = ratios[key]
        names = list(next(iter(over.values()), ()))
        tell([title, *over], [[name, *(plain(over[peer][name]) for peer in over)] for name in names], mesh)
    if "held_over_ddp" in ratios:
        tell(["expert and optimizer bytes of a rank over DDP's"], [[f"{ratios['held_over_ddp']:.3f}"]], mesh)


def share(of: Figures | None) -> str:
    """A share as per cent."""
    return "-" if of is None else f"{100 * of['median']:.1f}%"


def mean(values: list[Any]) -> Any:
    """The mean of those that are there."""
    there = [v for v in values if v is not None]
    return sum(there) / len(there)


if __name__ == "__main__":
    run(read_options, measure)
