"""Weak and strong scaling over ranks of a mixture's step, or a competition's round, and what a model of the wire says.

    torchrun --standalone --nproc-per-node 2 benchmarks/scaling.py --csv scaling.csv      # one size; appends its rows
    python benchmarks/scaling.py --csv scaling.csv --sweep 1,2,4 --plot scaling.png       # starts torchrun for each
    torchrun --nnodes 4 --nproc-per-node 8 ... benchmarks/scaling.py --csv scaling.csv    # on each node; rank 0 writes
    python benchmarks/scaling.py --routing hard --csv hard.csv --sweep 1,2,4              # rounds of a competition

strong: ``--experts`` experts and ``--batch`` rows on any number of ranks; efficiency t_1 / (W t_W).
weak: ``--experts-a-rank`` experts for each rank; ``--batch`` rows where every expert sees every row, and that many for
each rank where top-2 routing chooses, so that a rank's experts see as many pairs of row and expert at any size (as long
as top-2 has experts to choose from); efficiency t_1 / t_W.
Both against the smallest number of ranks that the CSV has for the same mode and problem.

hard: a step is the ``--epochs`` epochs of all experts in a round, each on its own samples in batches of ``--batch``.
The split stays: ``--rows`` samples in all (strong) or for each rank (weak), shared out evenly or, with ``--skew``, in
parts that fall geometrically, the largest that many times the smallest. Discriminators and scores are timed apart, in
rounds of their own. All efficiencies are of work a second and rank: a discriminator has ``--judge-batches`` batches; to
score, every expert sees every sample, so that in weak mode a rank's work grows with the ranks.

The wire's messages and bytes are fitted in the same run (``wire_model.py``). From those of a step the model predicts
the share of communication; what is measured stands beside it as waiting and transfer, in steps of their own with a
barrier before each collective.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rivals import SIZES, ExpertParallel, Problem
from rounds import Rounds, Work, skewed
from turns import figures, meet, now, parser_of, positive, refuse, take_turns, tell, write
from wire_model import CountingWire, fit_wire

from mixdist.experts import VAE
from mixdist.mixtures.routing import TopK
from mixdist.nets import Conv
from mixdist.parallel.agreement import gather_json
from mixdist.parallel.launch import Launch
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import Wire

SAME = ("mode", "routing", "size", "image", "experts_key", "batch_key", "device", "round")
COLUMNS = (
    *("mode", "routing", "size", "image", "device", "experts_key", "batch_key", "ranks", "experts", "batch"),
    *("seconds_median", "seconds_min", "seconds_max", "rows_per_s", "efficiency", "wire_bytes", "sync_bytes"),
    *("waiting", "transfer", "messages", "alpha", "beta", "fit_residual", "predicted_share", "round"),
    *(f"{part}_{figure}" for part in ("discriminators", "scoring") for figure in ("s", "efficiency")),
)
"""experts_key and batch_key: the options that do not change with the ranks; bytes and messages of a rank and a step.

round: what else a competition's round is, in words; it and the last four are empty for a soft mixture.
"""

JUDGE = Conv([16, 32])
"""Network of a discriminator."""

TIMED_STEPS = 5


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
    parser.add_argument("--routing", choices=["soft", "top2", "hard"], default="soft")
    parser.add_argument("--size", choices=SIZES, default="small", help="of an expert")
    parser.add_argument("--experts", type=positive, default=4, help="K, strong")
    parser.add_argument("--experts-a-rank", type=positive, default=2, help="weak")
    parser.add_argument(
        "--batch", type=positive, default=64, help="rows of the global batch; weak with top2: for each rank"
    )
    parser.add_argument("--image", type=positive, default=64, help="height and width of the images")
    parser.add_argument("--rows", type=positive, default=4096, help="hard: samples; weak: for each rank")
    parser.add_argument("--epochs", type=positive, default=1, help="hard: of the experts in a round")
    parser.add_argument("--skew", type=float, default=1.0, help="hard: the largest share over the smallest")
    parser.add_argument("--delivery", choices=["read", "wire"], default="read", help="hard: of samples to their owners")
    parser.add_argument("--judge-batches", type=positive, default=10, help="hard: of each discriminator in a round")
    parser.add_argument("--csv", type=Path, help="appended to")
    parser.add_argument("--plot", type=Path, help="PNG of seconds and efficiency; needs matplotlib")
    parser.add_argument("--sweep", help="numbers of ranks, as 1,2,4: starts torchrun for each on this machine")
    options = parser.parse_args(words)
    least = max(options.experts, options.experts_a_rank)
    if options.routing == "hard" and options.rows < least:
        parser.error(f"--rows {options.rows} must be at least {least}, a sample for each expert: give more")
    if options.csv and options.csv.exists() and options.csv.read_text().splitlines()[:1] != [",".join(COLUMNS)]:
        parser.error(f"--csv {options.csv} has not the columns of this version: name another file")
    if options.plot:
        pyplot()  # a missing library is told before anything is measured
    return options


def sweep(options: argparse.Namespace, words: Sequence[str]) -> list[dict[str, Any]]:
    """Start torchrun once for each number of ranks; return all rows."""
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
    if options.routing == "hard":
        tell(["mode", "discriminators, ms", "efficiency", "scoring, ms", "efficiency"], [apart(r) for r in rows], mesh)
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


def soft(problem: Problem, mesh: Mesh, wire: Wire, options: argparse.Namespace) -> ExpertParallel:
    """Make a soft mixture, dense or by top-2; gradients of the losses are sent ahead, and rows where they may be."""
    dense = options.routing == "soft"
    routing = None if dense else TopK(2)
    return ExpertParallel(problem, problem.data(), mesh, one_way=True, prefetch=dense, routing=routing, wire=wire)


def hard(mode: str, problem: Problem, mesh: Mesh, wire: Wire, options: argparse.Namespace) -> Rounds:
    """Make a competition, and run two rounds: experts are then where they stay."""
    num_rows = options.rows * (mesh.world_size if mode == "weak" else 1)
    dataset = replace(problem, batch_size=num_rows, num_batches=1).data()
    work = Work(
        lambda spec: VAE(spec, **SIZES[options.size]),
        JUDGE,
        options.epochs,
        options.batch,
        options.judge_batches,
    )
    way = {"delivery": options.delivery, "placement": "load"}
    rounds = Rounds(way, dataset, skewed(dataset, problem.num_experts, options.skew), work, mesh, wire)
    rounds.settle()
    return rounds


def row_of(mode: str, problem: Problem, fit: dict[str, Any], mesh: Mesh, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one mode: a row of the CSV. Every rank calls it."""
    wire = CountingWire(mesh.device)
    if options.routing == "hard":
        rounds = hard(mode, problem, mesh, wire, options)
        run, seen = rounds.run, len(rounds.dataset) * options.epochs
    else:
        rival = soft(problem, mesh, wire, options)
        run, seen = rival.run, problem.batch_size
    seconds = figures(take_turns({"ours": run}, options, mesh)[0]["ours"])

    def timed() -> None:
        """Do a step with a barrier before each collective."""
        if options.routing != "hard":
            rival.step(timed=True)
            return
        wire.meter.reset(timed=True)
        rounds.run(1)

    wired = traffic(timed, wire, mesh)
    alpha, beta = fit["alpha"] or 0.0, fit["beta"] or 0.0
    num_bytes = wired["wire_bytes"] + wired["sync_bytes"]
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
        "rows_per_s": seen / seconds["median"],
        **wired,
        "alpha": fit["alpha"],
        "beta": fit["beta"],
        "fit_residual": fit["residual"],
        "predicted_share": (alpha * wired["messages"] + beta * num_bytes) / seconds["median"],
        "round": "",
    }
    if options.routing == "hard":
        told = (options.rows, options.epochs, f"{options.skew:g}", options.delivery, options.judge_batches)
        row["round"] = "{} rows; {} epochs; skew {}; {}; {} batches".format(*told)
        row |= {name: of["median"] for name, of in rounds.judge(min(options.turns, 7)).items()}
    set_efficiency([row], (read(options.csv) if options.csv else []) if mesh.rank == 0 else [])
    return row


def traffic(step: Callable[[], None], wire: CountingWire, mesh: Mesh) -> dict[str, float]:
    """Return a step's bytes, messages, and shares of waiting and transfer: means over the ranks, of medians."""
    shares: dict[str, list[float]] = {"waiting": [], "transfer": []}
    for _ in range(TIMED_STEPS):
        wire.messages, begin = 0, now(mesh, barrier=True)
        step()
        took = now(mesh) - begin
        shares["waiting"].append(wire.meter.waiting_s / took)
        shares["transfer"].append(wire.meter.transfer_s / took)
    own = [wire.meter.wire_bytes, wire.meter.sync_bytes, wire.messages, *map(statistics.median, shares.values())]
    means = [statistics.mean(values) for values in zip(*gather_json(own, mesh.world), strict=True)]
    return dict(zip(("wire_bytes", "sync_bytes", "messages", "waiting", "transfer"), means, strict=True))


def set_efficiency(rows: Sequence[dict[str, Any]], earlier: Sequence[dict[str, Any]] = ()) -> None:
    """Set each row's efficiency against the row of fewest ranks of the same problem: work a second and rank."""
    for row in rows:
        alike = [r for r in (*earlier, *rows) if all(str(r[name]) == str(row[name]) for name in SAME)]
        first = min(alike, key=lambda r: int(r["ranks"]))
        fewer = int(first["ranks"]) / row["ranks"]
        weak = row["mode"] == "weak"
        # In weak mode a rank's work stays, but for scoring: its experts see the samples of all ranks.
        work = {"efficiency": 1.0, "discriminators_efficiency": 1.0, "scoring_efficiency": 1 / fewer}
        times = {"efficiency": "seconds_median", "discriminators_efficiency": "discriminators_s"}
        times["scoring_efficiency"] = "scoring_s"
        for name, time in times.items():
            if time in row:
                row[name] = float(first[time]) / row[time] * (work[name] if weak else fewer)


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


def apart(row: dict[str, Any]) -> list[object]:
    """A row of the table of what is timed apart in a competition."""
    told: list[object] = [row["mode"]]
    for part in ("discriminators", "scoring"):
        told += [f"{1000 * row[f'{part}_s']:.1f}", f"{row[f'{part}_efficiency']:.2f}"]
    return told


def seen_by(row: dict[str, Any]) -> int:
    """Experts that see a row."""
    return min({"soft": int(row["experts"]), "top2": 2, "hard": 1}[row["routing"]], int(row["experts"]))


def pyplot() -> Any:
    """Return matplotlib's pyplot for files."""
    try:
        import matplotlib
    except ImportError:
        refuse("--plot needs matplotlib: install it, or leave --plot out")
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
