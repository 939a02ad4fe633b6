"""A round's expert epochs of a competition, by mixdist and by hand; scoring and discriminators apart.

    torchrun --standalone --nproc-per-node 2 benchmarks/hard.py --turns 7

K experts own samples in shares that fall geometrically, the largest ``--skew`` times the smallest. Each trains
``--epochs`` epochs on its own samples. A step of the turns is a round.

hand: a plain loop over batches of a split, one split after another as a job of its own, longest first, each taken by
the rank that is free next. The ranks are the worker processes, started and warm: no interpreter starts within a turn.
The same experts, rows, batch size and fused Adam; ``torch.randperm`` and ``torch.randn``; nothing of mixdist but the
expert itself.
read: mixdist with placement by load; each rank reads the rows of its experts itself.
wire: the same, but rows are read in shares and sent to their owners, once an epoch.
fixed: as read, but experts stay in blocks of their numbers: what placement by load is worth.

Ratios are of seconds over hand's, from a barrier to a barrier. Sent bytes are compared with the minimum: the rows that
an epoch's experts own on ranks that do not hold them, without ids. Discriminators, scores and the move of experts to
their places are timed separately, in rounds of their own after the turns.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rivals import SEED, adam
from rounds import Rounds, Work, seeded, shares, skewed
from torch import nn
from turns import figures, ms, parser_of, plain, positive, ratio, run, take_turns, tell

from mixdist.competition import Assignment
from mixdist.data import Dataset
from mixdist.experts import VAE, Expert
from mixdist.nets import MLP, Conv
from mixdist.noise import Purpose
from mixdist.parallel.agreement import gather_json
from mixdist.parallel.mesh import Mesh
from mixdist.terms import Field, Spec

WAYS: dict[str, dict[str, Any]] = {
    "read": {"delivery": "read", "placement": "load"},
    "wire": {"delivery": "wire", "placement": "load"},
    "fixed": {"delivery": "read", "placement": "fixed"},
}
SIDE, LATENT = 28, 10
EXPERTS: dict[str, Callable[[Spec], Expert]] = {
    "mlp": lambda spec: VAE(spec, LATENT, MLP([256])),
    "conv": lambda spec: VAE(spec, LATENT, Conv([16, 32])),
}
"""784-256-10 with 0.41 million parameters, and two levels of convolutions with 0.06 million."""


def read_options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__, turns=7, steps=1)
    parser.add_argument("--kind", choices=EXPERTS, default="mlp", help="of expert")
    parser.add_argument("--experts", type=positive, default=8, help="K")
    parser.add_argument("--rows", type=positive, default=12000, help="of the training set")
    parser.add_argument("--skew", type=float, default=10.0, help="the largest share over the smallest")
    parser.add_argument("--epochs", type=positive, default=5, help="of the experts in a round")
    parser.add_argument("--batch", type=positive, default=100, help="rows of an expert's batch")
    parser.add_argument("--judge-batches", type=positive, default=40, help="of each discriminator in a round")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["read", "wire"], help="of mixdist")
    options = parser.parse_args(words)
    if not 1 <= options.skew < np.inf:
        parser.error(f"--skew {options.skew:g} must be 1 or more: give 10")
    if shares(options.rows, options.experts, options.skew).min() < 1:
        given = f"--rows {options.rows} with --skew {options.skew:g}"
        parser.error(f"{given} leave one of {options.experts} experts without: give more rows")
    return options


def measure(options: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    """Run the rivals in turns; return what is written. Every rank calls it."""
    dataset = make_data(options.rows)
    table = skewed(dataset, options.experts, options.skew)
    with tempfile.TemporaryDirectory() as folder:
        path = gather_json(folder, mesh.world)[0]
        hand = ByHand(dataset, table, options, mesh, Path(path) / "taken")
        work = Work(EXPERTS[options.kind], None, options.epochs, options.batch, options.judge_batches)
        ours = {name: Rounds(WAYS[name], dataset, table, work, mesh) for name in options.ways}
        moved = {name: rounds.settle() for name, rounds in ours.items()}
        runs: dict[str, Callable[[int], None]] = {"hand": hand.run, **{name: one.run for name, one in ours.items()}}
        seconds, cpu = take_turns(runs, options, mesh)
        gather_json(None, mesh.world)  # rank 0's folder stays until all are done with it
    told: dict[str, dict[str, Any]] = {
        name: {"seconds": figures(seconds[name]), "cpu_seconds": figures(cpu[name]), "turns": seconds[name]}
        for name in seconds
    }
    told["hand"]["first_loss"] = hand.first_loss()
    for name, rounds in ours.items():
        told[name] |= {
            "over_hand": ratio(seconds[name], seconds["hand"]),
            "cpu_over_hand": ratio(cpu[name], cpu["hand"]),
            "first_loss": rounds.first_loss,
            **moved[name],
            **rounds.traffic(),
            **rounds.judge(min(options.turns, 7)),  # seven are enough for what has no rival
        }
    show(told, table, options, mesh)
    return {"counts": table.counts_E.tolist(), "rivals": told}


def make_data(num_rows: int) -> Dataset:
    """Return smooth noise as uint8 images, the same on every rank."""
    coarse = torch.rand(num_rows, 1, 4, 4, generator=torch.Generator().manual_seed(SEED))
    x = nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")
    field = Field((1, SIDE, SIDE), torch.uint8, 1 / 255)
    return Dataset({"id": torch.arange(num_rows), "x": (255 * x).to(torch.uint8)}, {"x": field})


class ByHand:
    """The splits trained by a plain loop, as jobs that the ranks take, longest first.

    Every rank holds all experts, so that it can take any job; which copy trains changes nothing of the work.

    Args:
        dataset: of all samples.
        table: each sample's expert.
        options: of the command line.
        mesh: the ranks.
        path: for the file by which the ranks tell each other what is taken.
    """

    def __init__(
        self, dataset: Dataset, table: Assignment, options: argparse.Namespace, mesh: Mesh, path: Path
    ) -> None:
        self.options, self.world, ids, make = options, mesh.world, range(options.experts), EXPERTS[options.kind]
        self.store = dist.FileStore(str(path), mesh.world_size)
        self.jobs = np.argsort(-table.counts_E, kind="stable").tolist()
        self.splits = [dataset.rows["x"][table.positions(e)].to(mesh.device) for e in ids]
        self.experts = [seeded(make, dataset.spec, Purpose.WEIGHTS, e).to(mesh.device) for e in ids]
        self.optimizers = [adam(expert.parameters()) for expert in self.experts]
        self.rounds = 0
        self.losses: dict[int, float] = {}

    def run(self, rounds: int) -> None:
        """Train for some rounds; a rank that finds no job left waits for the others, as it would for a round's end."""
        for _ in range(rounds):
            self.rounds += 1
            while (place := self.store.add(f"round {self.rounds}", 1) - 1) < len(self.jobs):
                loss = self.train(self.jobs[place])
                if self.rounds == 1:
                    self.losses[self.jobs[place]] = loss
            gather_json(None, self.world)

    def train(self, e: int) -> float:
        """Train an expert on its split for a round's epochs; return the last one's mean loss."""
        expert, optimizer, x = self.experts[e], self.optimizers[e], self.splits[e]
        total = 0.0
        for _ in range(self.options.epochs):
            total = 0.0
            for index in torch.randperm(len(x), device=x.device).split(self.options.batch):
                rows = {"x": x[index].float().mul_(1 / 255)}
                eps = torch.randn(len(index), LATENT, device=x.device)
                optimizer.zero_grad(set_to_none=True)
                loss = expert(rows, eps).loss_R.mean()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(index)
        return total / len(x)

    def first_loss(self) -> float:
        """Return the mean over the experts of the loss in the last epoch of the first round; every rank calls it."""
        losses = [loss for told in gather_json(self.losses, self.world) for loss in told.values()]
        return sum(losses) / len(losses)


def show(told: dict[str, Any], table: Assignment, options: argparse.Namespace, mesh: Mesh) -> None:
    """Print the tables, on rank 0."""
    tell(["samples of each expert"], [[" ".join(map(str, table.counts_E))]], mesh)
    head = ["rival", "ms a round", "over hand", "CPU over hand", "sent kB", "over least", "moving ms"]
    lines = []
    for name, one in told.items():
        line = [name, ms(one["seconds"])]
        if name != "hand":
            over = one["sent_over_least"]
            line += [plain(one["over_hand"]), plain(one["cpu_over_hand"]), f"{one['sent_bytes'] / 1e3:.1f}"]
            line += ["-" if over is None else f"{over:.4f}", f"{1e3 * one['moving_s']:.1f}"]
        lines.append(line + ["-"] * (len(head) - len(line)))
    tell(head, lines, mesh)
    apart = [[name, ms(one["discriminators_s"]), ms(one["scoring_s"])] for name, one in told.items() if name != "hand"]
    tell(["ms a round, apart", f"discriminators, {options.judge_batches} batches each", "scoring"], apart, mesh)


if __name__ == "__main__":
    run(read_options, measure)
