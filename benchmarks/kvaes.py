"""The two tables of seed document 004, section 8: kVAEs against bags and single VAEs, training and test likelihoods.

    python benchmarks/kvaes.py --out runs/kvaes --data-root data/mnist --jobs 2

A cell is a run of `mixdist train` and its `mixdist evaluate` on both splits, with one thread; `--jobs` cells at once,
the longest first. Finished cells are kept in DIR: after an interruption the same command goes on. It writes
DIR/kvaes.md and DIR/kvaes.json; with `--docs FILE` it puts the tables between FILE's marks. `--columns VAE-64,VAE-512`
runs these models alone and prints their figures instead of the tables, which need every cell.

    kVAEs     the mixture: configs/kvaes_*_small.yaml
    bag       as many VAEs, each on a random part of the rows for good: configs/kvaes_*_bag.yaml
    VAE-N     one VAE on all rows: configs/kvaes_*_vae.yaml; N is the width of both hidden layers, or the filters of the
              last convolutional layer
    matched   VAE-N with the N that gives it as many parameters as all VAEs of the mixture together have

Every baseline has the mixture's likelihood, latent dimensions and batch size, and as many sample-gradients (a row in a
batch of an expert counts once): else the command refuses. `--tune SHARE` prints, instead of the tables, training
likelihoods after that part of the epochs for each of `--rates`; the best stand in the configs. What stands after `--`
goes to every `mixdist train`: `-- --data.init_args.rows 300 --pretrain [] --mixture.rounds 1 --train.epochs 1`
tries all of it in seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cells import PROBLEMS, Cell, plan, read, sample_gradients, tuning
from tables import costs, likelihoods, pair, put, shown_seconds, tuned
from turns import positive, refuse

from mixdist.cli.main import main as mixdist
from mixdist.parallel.launch import end_with_parent
from mixdist.training.checkpoint import checkpoints_in


def finish(cell: Cell, options: argparse.Namespace, splits: Sequence[str] = ("test", "train")) -> dict[str, Any]:
    """Run a cell, or go on with it, or read it where it is finished; return what is known of it.

    Raises:
        ValueError: the folder holds a run of another config under this name, or a command fails.
    """
    folder: Path = options.out
    told, run = folder / f"{cell.name}.json", folder / cell.name
    problem = PROBLEMS[cell.problem]
    num_samples, train_rows = options.num_samples or problem.num_samples, options.train_rows or problem.train_rows
    about = {**asdict(cell), "train_rows": train_rows, "num_samples": num_samples}
    if told.exists():
        known = kept(told)
        if {name: known.get(name) for name in about} != about:
            raise ValueError(
                f"{told} is of another config or other options: name another --out, or remove it and {run}"
            )
        if "figures" in known:
            return known
    replace_text(told, json.dumps(about))
    resumed = bool(checkpoints_in(run / "checkpoints"))
    if not resumed:
        shutil.rmtree(run, ignore_errors=True)
    begin = time.monotonic()
    words = ["--resume", str(run)] if resumed else [*cell.words, "--out", str(run)]
    command(["train", *words], folder / f"{cell.name}.log")
    trained = time.monotonic()
    figures, protocol = {}, {}
    for split in splits:
        words = ["--split", split, "--num_samples", str(num_samples)]
        words += ["--rows", str(train_rows)] if split == "train" else []
        command(["evaluate", str(run), *words], folder / f"{cell.name}.log")
        written = json.loads((run / ("evaluation.json" if split == "test" else f"evaluation-{split}.json")).read_text())
        figures[split], protocol = written["figures"], written["protocol"]
    # Of a cell that was interrupted nobody knows how long it took.
    seconds = {"train": None if resumed else trained - begin, "evaluate": time.monotonic() - trained}
    likelihood = protocol["mixture"]["init_args"]["expert"]["init_args"]["likelihood"]
    units = None if likelihood == "bernoulli" else protocol.get("add_for_stored_units")
    known = {**about, "done": done(run), "figures": figures, "add_for_stored_units": units, "seconds": seconds}
    replace_text(told, json.dumps(known, indent=2))
    return known


def kept(path: Path) -> dict[str, Any]:
    """Read what is known of a cell.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        known = json.loads(path.read_bytes())
    except ValueError:
        known = None
    if not isinstance(known, dict):
        raise ValueError(f"{path} is damaged: remove it, and the same command goes on")
    return known


def replace_text(path: Path, text: str) -> None:
    """Write a file that is there in whole or, after an interruption, as it was."""
    aside = path.with_suffix(".partial")
    aside.write_text(text)
    aside.replace(path)


def done(run: Path) -> int:
    """Count the rows that experts learned from: fewer than planned where the competition stopped early."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if "counts" in record][-1]
    config = read(["--config", str(run / "config.yaml")])
    return sample_gradients(config, sum(last["counts"]), last["round"])


def command(words: Sequence[str], log: Path) -> None:
    """Run a mixdist command, with its output in a log.

    Raises:
        ValueError: it fails.
    """
    with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
        code = mixdist(words)
    if code:
        raise ValueError(f"mixdist {' '.join(words)} ended with code {code}: see the end of {log}")


def run_all(cells: Sequence[Cell], options: argparse.Namespace, splits: Sequence[str]) -> list[dict[str, Any]]:
    """Run cells, the longest first; report those that failed at the end."""
    order = sorted(cells, key=lambda cell: -cell.gradients * cell.parameters)
    # Workers import torch once and run cell after cell: a start takes seconds, and there are some ninety commands.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, begin) as pool:
        futures = {pool.submit(finish, cell, options, splits): cell.name for cell in order}
        try:
            errors = [error for future in as_completed(futures) if (error := _tell(futures[future], future))]
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    if errors:
        raise ValueError("\n".join(errors))
    by_name = {future.result()["name"]: future.result() for future in futures}
    return [by_name[cell.name] for cell in cells]


def begin() -> None:
    """Prepare a worker: one thread; it ends with its parent, and leaves messages about Ctrl-C to the command."""
    torch.set_num_threads(1)
    end_with_parent()
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def _tell(name: str, future: Future[dict[str, Any]]) -> str | None:
    """Print that a cell is done; return what went wrong."""
    error = future.exception()
    if error is not None:
        return f"{name}: {error if isinstance(error, ValueError) else repr(error)}"
    known = future.result()
    seconds = " + ".join(map(shown_seconds, known["seconds"].values()))
    print(f"{name}: {pair(known, 3)} nats, {seconds} s", flush=True)
    return None


def only(cells: Sequence[Cell], columns: Sequence[str]) -> list[Cell]:
    """Return the cells of some models.

    Raises:
        ValueError: no cell has such a model.
    """
    known = list(dict.fromkeys(cell.column for cell in cells))
    for column in columns:
        if column not in known:
            raise ValueError(f"--columns {column} must be some of {','.join(known)}")
    return [cell for cell in cells if cell.column in columns]


def read_options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of runs and tables")
    parser.add_argument("--only", default=",".join(PROBLEMS), help="rows: some of %(default)s")
    parser.add_argument("--columns", help="models: these alone, and no tables")
    parser.add_argument("--jobs", type=positive, default=2, help="cells at once, a process with one thread each")
    parser.add_argument("--data-root", type=Path, default=Path("data/mnist"), help="folder with MNIST's files")
    parser.add_argument("--num-samples", type=positive, help="importance samples; unset, 50, of digits 5")
    parser.add_argument("--train-rows", type=positive, help="training rows evaluated; unset, 5000, of digits 1000")
    parser.add_argument("--docs", type=Path, help="Markdown file whose tables are replaced: by the whole ones alone")
    parser.add_argument(
        "--tune", type=tuning_share, metavar="SHARE", help="search learning rates with this part of the epochs"
    )
    parser.add_argument("--rates", type=rates, default="0.0003,0.001,0.003", help="learning rates of --tune")
    words = list(sys.argv[1:] if words is None else words)
    cut = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:cut])
    options.more = words[cut + 1 :]
    for name in options.only.split(","):
        if name not in PROBLEMS:
            parser.error(f"--only {name} must be some of {','.join(PROBLEMS)}")
    if options.docs:
        check_docs(parser, options)
    return options


def check_docs(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse a file that cannot take the tables before an hour is spent on them, and tables that are not whole."""
    part = options.columns is not None or options.tune or set(options.only.split(",")) != set(PROBLEMS)
    if part or options.more:
        parser.error(f"--docs {options.docs} needs all cells: leave out --only, --columns, --tune and all after --")
    try:
        put(options.docs.read_text(), dict.fromkeys(("modes", "mnist", "costs"), ""))
    except (OSError, ValueError) as error:
        parser.error(f"--docs {options.docs} cannot take the tables: {error}")


def tuning_share(text: str) -> float:
    """Read a part of the epochs, above 0 and at most 1.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    with suppress(ValueError):
        if 0 < (value := float(text)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} must be above 0 and at most 1, such as 0.3")


def rates(text: str) -> list[str]:
    """Read learning rates, as they were written.

    Raises:
        argparse.ArgumentTypeError: one is no positive number.
    """
    found = list(dict.fromkeys(text.split(",")))
    with suppress(ValueError):
        if all(0 < float(rate) < math.inf for rate in found):
            return found
    raise argparse.ArgumentTypeError(f"{text!r} must be positive numbers with commas between, such as 0.001,0.003")


def main(words: Sequence[str] | None = None) -> None:
    """Make the tables, or tune."""
    options = read_options(words)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"--out {options.out} cannot be made ({error.strerror}): name another folder")
    try:
        problems = [PROBLEMS[name] for name in options.only.split(",")]
        cells = [cell for problem in problems for cell in plan(problem, options)]
        if options.columns is not None:
            cells = only(cells, options.columns.split(","))
        if options.tune:
            tries = tuning(cells, options.tune, options.rates)
            if not tries:
                raise ValueError(f"--columns {options.columns} leaves nothing to tune: kVAEs are tuned by hand")
            print(tuned(run_all(tries, options, ("train",))))
            return
        found = run_all(cells, options, ("test", "train"))
        if options.columns is not None:
            print(costs(found))
            return
        groups = {
            "modes": [p for p in problems if p.base is None],
            "mnist": [p for p in problems if p.base is not None],
        }
        tables = {name: likelihoods(group, found) for name, group in groups.items() if group} | {"costs": costs(found)}
        (options.out / "kvaes.md").write_text("\n\n".join(tables.values()) + "\n")
        (options.out / "kvaes.json").write_text(json.dumps({"cells": found}, indent=2) + "\n")
        print("\n\n".join(tables.values()))
        if options.docs:
            options.docs.write_text(put(options.docs.read_text(), tables))
    except ValueError as error:
        refuse(error)
    except KeyboardInterrupt:
        raise SystemExit("interrupted: the same command goes on") from None


if __name__ == "__main__":
    main()
