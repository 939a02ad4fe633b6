"""Weak and strong scaling of a soft mixture over ranks, and what a model of the wire says of it.

    torchrun --standalone --nproc-per-node 2 benchmarks/scaling.py --csv scaling.csv      # one size; appends its rows
    python benchmarks/scaling.py --csv scaling.csv --sweep 1,2,4 --plot scaling.png       # starts torchrun for each
    torchrun --nnodes 4 --nproc-per-node 8 ... benchmarks/scaling.py --csv scaling.csv    # on each node; rank 0 writes

strong: ``--experts`` experts and ``--batch`` rows on any number of ranks; efficiency t_1 / (W t_W).
weak: ``--experts-a-rank`` experts for each rank; ``--batch`` rows where every expert sees every row, and that many for
each rank where top-2 routing chooses, so that a rank's experts see as many pairs of row and expert at any size (as long
as top-2 has experts to choose from); efficiency t_1 / t_W.
Both against the smallest number of ranks that the CSV has for the same mode and problem.

The wire: t = alpha messages + beta bytes is fitted, with alpha and beta not negative, to all-to-alls and all-reduces of
several sizes, timed in the same run; each time counts relative to itself. An all-to-all of W ranks has W - 1 messages,
an all-reduce 2 (W - 1), as a ring's; bytes are those that leave a rank. From the messages and bytes of a step the model
predicts the share of communication; what is measured stands beside it as waiting and transfer, in steps of their own
with a barrier before each collective.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rivals import SIZES, ExpertParallel, Problem
from scipy.optimize import nnls
from torch import Tensor
from turns import figures, meet, now, parser_of, positive, take_turns, tell, write

from mixdist.mesh import Launch, Mesh
from mixdist.routing import TopK
from mixdist.wire import Group, Pending, Wire, gather_json

SAME = ("mode", "routing", "size", "image", "experts_key", "batch_key", "device")
COLUMNS = (
    *("mode", "routing", "size", "image", "device", "experts_key", "batch_key", "ranks", "experts", "batch"),
    *("seconds_median", "seconds_min", "seconds_max", "rows_per_s", "efficiency", "wire_bytes", "sync_bytes"),
    *("waiting", "transfer", "messages", "alpha", "beta", "fit_residual", "predicted_share"),
)
"""experts_key and batch_key: the options that do not change with the ranks; bytes and messages of a rank and a step."""

FLOATS = (1, 256, 4096, 32768, 262144)
REPEATS, TIMED_STEPS = 9, 5


class CountingWire(Wire):
    """Counts messages too: a rank's own, of a step."""

    messages = 0

    def _all_to_all(self, flat: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Pending:
        self.messages += sum(1 for n in sent if n)
        return super()._all_to_all(flat, sent, received, group)

    def start_all_reduce(self, tensor: Tensor, group: Group) -> Pending:
        self.messages += 0 if group is None else 2 * (torch.distributed.get_world_size(group) - 1)
        return super().start_all_reduce(tensor, group)


def main(words: Sequence[str] | None = None) -> None:
    """Measure one size under torchrun, or sweep over sizes."""
    words = sys.argv[1:] if words is None else words
    options = read_options(words)
    rows = sweep(options, words) if options.sweep else measure(options)
    if rows and options.plot:
        plot(read(options.csv) if options.csv else rows, options.plot)


def read_options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__, turns=7, steps=3)
    parser.add_argument("--modes", nargs="+", choices=["weak", "strong"], default=["weak", "strong"])
    parser.add_argument("--routing", choices=["soft", "top2"], default="soft")
    parser.add_argument("--size", choices=SIZES, default="small", help="of an expert")
    parser.add_argument("--experts", type=positive, default=4, help="K, strong")
    parser.add_argument("--experts-a-rank", type=positive, default=2, help="weak")
    parser.add_argument(
        "--batch", type=positive, default=64, help="rows of the global batch; weak with top2: for each rank"
    )
    parser.add_argument("--image", type=positive, default=64, help="height and width of the images")
    parser.add_argument("--csv", type=Path, help="appended to")
    parser.add_argument("--plot", type=Path, help="PNG of seconds and efficiency; needs matplotlib")
    parser.add_argument("--sweep", help="numbers of ranks, as 1,2,4: starts torchrun for each on this machine")
    options = parser.parse_args(words)
    if options.plot:
        pyplot()  # a missing library is told before anything is measured
    return options


def sweep(options: argparse.Namespace, words: Sequence[str]) -> list[dict[str, Any]]:
    """Start torchrun once for each number of ranks; give all rows."""
    passed, rows = list(words), []
    for name in ("--sweep", "--plot", "--out"):
        while any(word.split("=")[0] == name for word in passed):
            at = next(i for i, word in enumerate(passed) if word.split("=")[0] == name)
            del passed[at : at + (1 if "=" in passed[at] else 2)]
    for ranks in options.sweep.split(","):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, __file__]
        ended = subprocess.run([*command, *passed], stdout=subprocess.PIPE, text=True, check=True)
        *shown, last = ended.stdout.strip().splitlines()
        print("\n".join(shown), flush=True)
        rows += json.loads(last)["rows"]
    if options.csv is None:  # else each launch knew of those before it
        set_efficiency(rows)
    text = json.dumps({"rows": rows})
    if options.out:
        options.out.write_text(text + "\n")
    else:
        print(text)
    return rows


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all modes at this number of ranks; rank 0 gives their rows, and appends them to the CSV."""
    problems = {mode: problem_of(mode, options) for mode in options.modes}
    meshes = {mode: meet(problem.num_experts, options) for mode, problem in problems.items()}
    mesh = meshes[options.modes[0]]
    fit = fit_wire(mesh)
    rows = [row_of(mode, problem, fit, meshes[mode], options) for mode, problem in problems.items()]
    if mesh.rank == 0:
        append(rows, options.csv)
    head = ["mode", "ranks", "experts", "batch", "ms", "rows/s", "efficiency", "waiting", "transfer", "predicted"]
    tell(head, [shown(row) for row in rows], mesh)
    if fit["alpha"] is not None:
        fitted = [f"{1e6 * fit['alpha']:.1f} µs", f"{1e9 * fit['beta']:.3f} ns", f"{100 * fit['residual']:.0f}%"]
        tell(["alpha, a message", "beta, a byte", "median residual"], [fitted], mesh)
    write({"rows": rows, "fit": fit}, options, mesh)
    for each in meshes.values():
        each.close()
    return rows if mesh.rank == 0 else []


def problem_of(mode: str, options: argparse.Namespace) -> Problem:
    """What is trained at this number of ranks."""
    ranks = Launch.read().world_size
    weak = mode == "weak"
    experts = options.experts_a_rank * ranks if weak else options.experts
    batch = options.batch * (ranks if weak and options.routing == "top2" else 1)
    return Problem(options.size, experts, batch, options.image)


def row_of(mode: str, problem: Problem, fit: dict[str, Any], mesh: Mesh, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one mode: a row of the CSV. Every rank calls it."""
    wire = CountingWire(mesh.device)
    soft = options.routing == "soft"  # whose rows may be sent ahead; both have the gradients sent ahead
    routing = None if soft else TopK(2)
    rival = ExpertParallel(problem, problem.data(), mesh, one_way=True, prefetch=soft, routing=routing, wire=wire)
    seconds = figures(take_turns({"ours": rival.run}, options, mesh)[0]["ours"])
    shares: dict[str, list[float]] = {"waiting": [], "transfer": []}
    for _ in range(TIMED_STEPS):
        wire.messages, begin = 0, now(mesh, barrier=True)
        rival.step(timed=True)
        took = now(mesh) - begin
        shares["waiting"].append(wire.meter.waiting_s / took)
        shares["transfer"].append(wire.meter.transfer_s / took)
    own = [wire.meter.wire_bytes, wire.meter.sync_bytes, wire.messages, *map(statistics.median, shares.values())]
    means = [statistics.mean(values) for values in zip(*gather_json(own, mesh.world), strict=True)]
    wire_bytes, sync_bytes, messages, waiting, transfer = means
    alpha, beta = fit["alpha"] or 0.0, fit["beta"] or 0.0
    predicted = (alpha * messages + beta * (wire_bytes + sync_bytes)) / seconds["median"]
    row = {
        "mode": mode,
        "routing": options.routing,
        "size": options.size,
        "image": options.image,
        "device": mesh.device.type,
        "batch_key": options.batch,
        "experts_key": options.experts_a_rank if mode == "weak" else options.experts,
        "ranks": mesh.world_size,
        "experts": problem.num_experts,
        "batch": problem.batch_size,
        **{f"seconds_{name}": value for name, value in seconds.items()},
        "rows_per_s": problem.batch_size / seconds["median"],
        "wire_bytes": wire_bytes,
        "sync_bytes": sync_bytes,
        "waiting": waiting,
        "transfer": transfer,
        "messages": messages,
        "alpha": fit["alpha"],
        "beta": fit["beta"],
        "fit_residual": fit["residual"],
        "predicted_share": predicted,
    }
    set_efficiency([row], (read(options.csv) if options.csv else []) if mesh.rank == 0 else [])
    return row


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


def set_efficiency(rows: Sequence[dict[str, Any]], earlier: Sequence[dict[str, Any]] = ()) -> None:
    """Set each row's efficiency against the row of fewest ranks of the same problem."""
    for row in rows:
        alike = [r for r in (*earlier, *rows) if all(str(r[name]) == str(row[name]) for name in SAME)]
        first = min(alike, key=lambda r: int(r["ranks"]))
        gain = float(first["seconds_median"]) / row["seconds_median"]
        row["efficiency"] = gain * (int(first["ranks"]) / row["ranks"] if row["mode"] == "strong" else 1.0)


def append(rows: Sequence[dict[str, Any]], path: Path | None) -> None:
    """Append rows to the CSV, with a header where it is new."""
    if path is None:
        return
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, Any]]:
    """Read the CSV; no rows where it is not there yet."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def shown(row: dict[str, Any]) -> list[object]:
    """A row of the table."""
    per_cent = [f"{100 * row[name]:.1f}%" for name in ("waiting", "transfer", "predicted_share")]
    told = [f"{1000 * row['seconds_median']:.1f}", f"{row['rows_per_s']:.1f}", f"{row['efficiency']:.2f}"]
    return [*(row[name] for name in ("mode", "ranks", "experts", "batch")), *told, *per_cent]


def seen_by(row: dict[str, Any]) -> int:
    """Experts that see a row."""
    return int(row["experts"]) if row["routing"] == "soft" else min(2, int(row["experts"]))


def pyplot() -> Any:
    """Give matplotlib's pyplot for files."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib: install it, or leave --plot out") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw pairs of row and expert a second, and efficiency, over ranks; a line for each mode and problem."""
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for problem in dict.fromkeys(tuple(str(row[name]) for name in SAME) for row in rows):
        mine = [row for row in rows if tuple(str(row[name]) for name in SAME) == problem]
        mine.sort(key=lambda row: int(row["ranks"]))
        ranks = [int(row["ranks"]) for row in mine]
        label = " ".join(problem[:3])
        pairs = [float(row["rows_per_s"]) * seen_by(row) for row in mine]
        efficiency = [float(row["efficiency"]) for row in mine]
        for axis, name, values in zip(axes, ("(row, expert)/s", "efficiency"), (pairs, efficiency), strict=True):
            axis.plot(ranks, values, marker="o", label=label)
            axis.set(xlabel="ranks", ylabel=name)
    for axis in axes:
        axis.set_xticks(sorted({int(row["ranks"]) for row in rows}))
        axis.set_ylim(bottom=0)
    axes[0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
