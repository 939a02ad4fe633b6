"""What the tables of kvaes.py are made of: problems, models, and how much each model may learn."""

from __future__ import annotations

import argparse
import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mixdist.competition import Competition
from mixdist.config.config import Config
from mixdist.config.options import parse
from mixdist.config.parsing import config_parser, make_config
from mixdist.data.sources.splits import load_splits
from mixdist.experts import Expert
from mixdist.nets import MLP, Conv, Network
from mixdist.terms import Spec

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RATES = ("--train.optimizer.init_args.lr", "--train.schedule.init_args.max_lr")
EPOCHS = ("--train.epochs", "--train.schedule.init_args.total_steps")


@dataclass(frozen=True)
class Problem:
    """A row of a table, or a row for each seed.

    Args:
        name: of its configs, kvaes_NAME_*.yaml.
        title: in the table.
        key: of the widths in a config.
        numbers: the N of the single VAEs.
        base: what stands before N in the list of widths; None for two layers of N.
        seeds: of the runs.
        num_samples: importance samples for each row and expert.
        train_rows: rows of the training set that are evaluated: the first ones.
    """

    name: str
    title: str
    key: str
    numbers: tuple[int, ...]
    base: tuple[int, ...] | None = None
    seeds: tuple[int, ...] = (0,)
    num_samples: int = 50
    train_rows: int = 5000

    def widths(self, number: int) -> list[int]:
        """Return the layers of VAE-N."""
        return [number, number] if self.base is None else [*self.base, number]

    def network(self, number: int) -> Network:
        """Return the network of VAE-N, as the config has it."""
        return MLP(self.widths(number)) if self.base is None else Conv(self.widths(number), kernel=4)

    def columns(self) -> list[str]:
        """Return the names of the models."""
        return ["kVAEs", "bag", *(f"VAE-{number}" for number in self.numbers), "matched"]


NETWORK = "--mixture.expert.init_args.network.init_args"
HIDDEN, CHANNELS = f"{NETWORK}.hidden", f"{NETWORK}.channels"
PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("3modes", "3 modes", HIDDEN, (50, 150), seeds=(0, 1, 2)),
        Problem("5modes", "5 modes", HIDDEN, (50, 150)),
        Problem("9modes", "9 modes", HIDDEN, (50, 150)),
        Problem("mnist", "MNIST", CHANNELS, (64, 512, 1024), base=(8, 16, 32), num_samples=5, train_rows=1000),
    )
}


@dataclass(frozen=True)
class Cell:
    """A run.

    Args:
        name: of its folder.
        problem: name of the row.
        column: name of the model.
        seed: of the run.
        words: for ``mixdist train``.
        config: sha256 of the config file.
        parameters: of all VAEs of the model.
        gradients: sample-gradients, as planned.
        rate: learning rate, the largest where it is scheduled.
    """

    name: str
    problem: str
    column: str
    seed: int
    words: list[str]
    config: str
    parameters: int
    gradients: int
    rate: float


def read(words: Sequence[str]) -> Config:
    """Read a config as ``mixdist train`` does."""
    parser = config_parser()
    return make_config(parser, parse(parser, list(words)))


def sample_gradients(config: Config, num_rows: int, rounds: int | None = None) -> int:
    """Rows that experts learn from in a competition, each as often as it is in a batch of an expert.

    (P e + T E) N, with P = K where all experts pretrain on all rows, else 1; e epochs of pretraining, T rounds of E
    epochs, N rows.

    Args:
        config: of the competition.
        num_rows: N.
        rounds: T; None for all that the rules allow.
    """
    mixture = config.mixture
    assert isinstance(mixture, Competition)
    each = mixture.num_experts if mixture.rules.start == "all" else 1
    pretrain = each * sum(phase.epochs for phase in config.pretrain)
    return (pretrain + (mixture.rules.rounds if rounds is None else rounds) * config.train.epochs) * num_rows


def num_parameters(config: Config, spec: Spec, **other: Network) -> int:
    """Return the parameters of all experts together, with another network than the config's where one is given."""
    mixture = config.mixture
    assert isinstance(mixture, Competition)
    make: Callable[..., Expert] = mixture.make_experts[0]
    with torch.device("meta"):  # shapes without memory: the search for a width looks at very wide ones
        expert = make(spec, **other)
    return mixture.num_experts * sum(p.numel() for p in expert.parameters())


def learning_rate(config: Config) -> float:
    """Return the optimiser's own learning rate in the main phase."""
    rate: float = config.train.optimizer([torch.nn.Parameter(torch.zeros(1))]).defaults["lr"]
    return rate


def matching(wanted: int, count: Callable[[int], int]) -> int:
    """Return the width from 1 whose count, which grows with it, is nearest to ``wanted``."""
    high = 1 + bisect_left(range(1, 2**20), wanted, key=count)
    return min((max(high - 1, 1), high), key=lambda width: (abs(count(width) - wanted), width))


def matched(problem: Problem, mixture: Config, single: Config, spec: Spec) -> list[int]:
    """Return the layers of the one VAE with as many parameters as the mixture's VAEs together."""
    count = lambda width: num_parameters(single, spec, network=problem.network(width))  # noqa: E731
    return problem.widths(matching(num_parameters(mixture, spec), count))


def plan(problem: Problem, options: argparse.Namespace) -> list[Cell]:
    """List a problem's runs.

    Raises:
        ValueError: a baseline would have fewer sample-gradients than the mixture, or another batch size.
    """
    more = [*(["--data.init_args.root", str(options.data_root)] if problem.name == "mnist" else []), *options.more]
    files = {kind: CONFIGS / f"kvaes_{problem.name}_{kind}.yaml" for kind in ("small", "bag", "vae")}
    mixture = read(["--config", str(files["small"]), *more])
    train = load_splits(mixture.data, mixture.valid).train
    layers = {f"VAE-{number}": problem.widths(number) for number in problem.numbers}
    layers["matched"] = matched(problem, mixture, read(["--config", str(files["vae"]), *more]), train.spec)
    cells = []
    for column in problem.columns():
        kind = {"kVAEs": "small", "bag": "bag"}.get(column, "vae")
        own = [problem.key, json.dumps(layers[column])] if column in layers else []
        words = ["--config", str(files[kind]), *own, *more]
        config = read(words)
        about = num_parameters(config, train.spec), sample_gradients(config, len(train)), learning_rate(config)
        _check_fair(files[kind], config, mixture, len(train))
        digest = hashlib.sha256(files[kind].read_bytes()).hexdigest()
        for seed in problem.seeds:
            name = f"{problem.name}-{column}-{seed}"
            cells.append(Cell(name, problem.name, column, seed, [*words, "--seed", str(seed)], digest, *about))
    return cells


def _check_fair(path: Path, config: Config, mixture: Config, num_rows: int) -> None:
    got, wanted = (sample_gradients(one, num_rows) for one in (config, mixture))
    if got < wanted:
        raise ValueError(
            f"{path.name} has {got} sample-gradients, the mixture {wanted}: give {-(-wanted // num_rows)} epochs in all"
        )
    if config.train.batch_size != mixture.train.batch_size:
        raise ValueError(
            f"{path.name} has batch_size {config.train.batch_size}, the mixture {mixture.train.batch_size}: set it so"
        )


def tuning(cells: Sequence[Cell], share: float, rates: Sequence[str]) -> list[Cell]:
    """Return each baseline, first seed alone, with each learning rate and a share of its epochs."""
    found = []
    for cell in cells:
        if cell.column == "kVAEs" or cell.seed != 0:
            continue
        train = read(cell.words).train
        epochs, keys = max(1, round(share * train.epochs)), slice(2 if train.schedule else 1)
        for rate in rates:
            own = [*((key, rate) for key in RATES[keys]), *((key, str(epochs)) for key in EPOCHS[keys])]
            words = [*cell.words, *(word for pair in own for word in pair)]
            about = cell.config, cell.parameters, max(1, round(share * cell.gradients)), float(rate)
            found.append(Cell(f"tune-{cell.name}-{rate}", cell.problem, cell.column, 0, words, *about))
    return found
