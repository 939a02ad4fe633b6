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
goes to every `mixdist train`: `-- --data.init_args.rows 300 --pretrain [] --competition.rounds 1 --train.epochs 1`
tries all of it in seconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cells import PROBLEMS, Cell, Problem, plan, read, sample_gradients, tuning
from turns import positive

from mixdist.cli import main as mixdist
from mixdist.metrics import table
from mixdist.process import end_with_parent


def finish(cell: Cell, options: argparse.Namespace, splits: Sequence[str] = ("test", "train")) -> dict[str, Any]:
    """Run a cell, or go on with it, or read it where it is finished; give what is known of it.

    Raises:
        ValueError: the folder holds a run of another config under this name, or a command fails.
    """
    folder: Path = options.out
    told, run = folder / f"{cell.name}.json", folder / cell.name
    problem = PROBLEMS[cell.problem]
    num_samples, train_rows = options.num_samples or problem.num_samples, options.train_rows or problem.train_rows
    about = {**asdict(cell), "train_rows": train_rows, "num_samples": num_samples}
    if told.exists():
        known: dict[str, Any] = json.loads(told.read_text())
        if {name: known[name] for name in about} != about:
            raise ValueError(
                f"{told} is of another config or other options: name another --out, or remove it and {run}"
            )
        if "figures" in known:
            return known
    told.write_text(json.dumps(about))
    if not (run / "checkpoints").exists():
        shutil.rmtree(run, ignore_errors=True)
    begin = time.monotonic()
    again = ["--resume", str(run)] if run.exists() else [*cell.words, "--out", str(run)]
    command(["train", *again], folder / f"{cell.name}.log")
    trained = time.monotonic()
    figures, protocol = {}, {}
    for split in splits:
        words = ["--split", split, "--num_samples", str(num_samples)]
        words += ["--rows", str(train_rows)] if split == "train" else []
        command(["evaluate", str(run), *words], folder / f"{cell.name}.log")
        written = json.loads((run / ("evaluation.json" if split == "test" else f"evaluation-{split}.json")).read_text())
        figures[split], protocol = written["figures"], written["protocol"]
    seconds = {"train": trained - begin, "evaluate": time.monotonic() - trained}
    units = None if protocol["likelihood"] == "bernoulli" else protocol["add_for_stored_units"]
    known = {**about, "done": done(run), "figures": figures, "add_for_stored_units": units, "seconds": seconds}
    told.write_text(json.dumps(known, indent=2))
    return known


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
    """Run cells, the longest first; what fails is told at the end, when the others are done."""
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
    """Make a worker ready: one thread, and no life of its own."""
    torch.set_num_threads(1)
    end_with_parent()


def _tell(name: str, future: Future[dict[str, Any]]) -> str | None:
    """Print that a cell is done; give what went wrong."""
    error = future.exception()
    if error is not None:
        return f"{name}: {error if isinstance(error, ValueError) else repr(error)}"
    known = future.result()
    seconds = " + ".join(f"{s:.0f}" for s in known["seconds"].values())
    print(f"{name}: {_pair(known, 3)} nats, {seconds} s", flush=True)
    return None


def _pair(known: Mapping[str, Any], digits: int, name: str = "log_likelihood_shares", add: float = 0.0) -> str:
    """Training and test figure."""
    of = [known["figures"][split][name] + add for split in ("train", "test") if split in known["figures"]]
    return " / ".join(f"{value:.{digits}f}" for value in of)


def likelihoods(problems: Sequence[Problem], found: Sequence[Mapping[str, Any]]) -> str:
    """Give the table of likelihoods of problems with the same columns."""
    columns, lines, names = problems[0].columns(), [], [problem.name for problem in problems]
    found = [known for known in found if known["problem"] in names]
    exact = any("exact_log_likelihood" in known["figures"]["test"] for known in found)
    digits = 3 if exact else 2
    for problem in problems:
        for seed in problem.seeds:
            own = {k["column"]: k for k in found if (k["problem"], k["seed"]) == (problem.name, seed)}
            first, title = own["kVAEs"], problem.title + (f", seed {seed}" if len(problem.seeds) > 1 else "")
            bar, nmi = "exact_log_likelihood", _pair(first, 3, "nmi")
            units = [(title, 0.0), ("in units of rows as stored", first["add_for_stored_units"])]
            for name, add in units:
                if add is not None:
                    known = [_pair(first, digits, bar, add)] if exact else []
                    lines.append([name, *known, *(_pair(own[c], digits, add=add) for c in columns), "" if add else nmi])
    return markdown(["train / test", *(["exact density"] if exact else []), *columns, "NMI of kVAEs"], lines)


def costs(found: Sequence[Mapping[str, Any]]) -> str:
    """Give the table of what cells took."""
    lines = []
    for known in found:
        counts = [f"{known[name]:,}" for name in ("parameters", "done")]
        lines.append([known["name"], *counts, f"{known['rate']:g}", *(f"{s:.0f}" for s in known["seconds"].values())])
    headers = ["cell", "parameters", "sample-gradients", "learning rate", "s of training", "s of evaluation"]
    return markdown(headers, lines)


def markdown(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Give a Markdown table."""
    rows = [headers, ["---"] * len(headers), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def tuned(found: Sequence[Mapping[str, Any]]) -> str:
    """Give training likelihoods over learning rates, the best of each model marked."""
    rates = sorted({known["rate"] for known in found})
    lines = []
    for name in dict.fromkeys((known["problem"], known["column"]) for known in found):
        own = {
            k["rate"]: k["figures"]["train"]["log_likelihood_shares"]
            for k in found
            if (k["problem"], k["column"]) == name
        }
        best = max(own, key=lambda rate: own[rate])
        lines.append([*name, *(f"{own[rate]:.3f}{'*' if rate == best else ''}" for rate in rates)])
    return table(["problem", "model", *(f"{rate:g}" for rate in rates)], lines)


def put(text: str, tables: Mapping[str, str]) -> str:
    """Put tables between their marks, ``<!-- NAME -->`` and ``<!-- end of NAME -->``.

    Raises:
        ValueError: a mark is missing.
    """
    for name, inner in tables.items():
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        if not between.search(text):
            raise ValueError(f"the marks <!-- {name} --> and <!-- end of {name} --> are missing: add them")
        text = between.sub(lambda found, inner=inner: f"{found[1]}{inner}\n{found[2]}", text)  # type: ignore[misc]
    return text


def only(cells: Sequence[Cell], columns: Sequence[str]) -> list[Cell]:
    """Give the cells of some models.

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
    parser.add_argument("--docs", type=Path, help="Markdown file whose tables are replaced")
    parser.add_argument(
        "--tune", type=float, metavar="SHARE", help="search learning rates with this part of the epochs"
    )
    parser.add_argument("--rates", default="0.0003,0.001,0.003", help="learning rates of --tune")
    words = list(sys.argv[1:] if words is None else words)
    cut = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:cut])
    options.more = words[cut + 1 :]
    for name in options.only.split(","):
        if name not in PROBLEMS:
            parser.error(f"--only {name} must be some of {','.join(PROBLEMS)}")
    return options


def main(words: Sequence[str] | None = None) -> None:
    """Make the tables, or tune."""
    options = read_options(words)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        problems = [PROBLEMS[name] for name in options.only.split(",")]
        cells = [cell for problem in problems for cell in plan(problem, options)]
        if options.columns:
            cells = only(cells, options.columns.split(","))
        if options.tune:
            print(tuned(run_all(tuning(cells, options.tune, options.rates.split(",")), options, ("train",))))
            return
        found = run_all(cells, options, ("test", "train"))
        if options.columns:
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
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
