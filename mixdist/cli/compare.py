"""``mixdist compare``: figures of runs with their standard errors, and paired differences to the first run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mixdist.config.options import parse, plain_parser
from mixdist.evaluation.compare import Line, compare, notes, read_evaluation
from mixdist.files import write_file
from mixdist.report.metrics import table


def compare_runs(argv: Sequence[str]) -> None:
    """``mixdist compare RUN RUN ...``: a table, and a JSON file where one is named."""
    parser = plain_parser(
        "mixdist compare",
        "Compare runs that were evaluated on the same rows: a figure of each with its standard error, and its "
        "difference to the first run's, paired by rows, with standard error and 95% interval. Runs of different data, "
        "split, rows or protocol are refused. Example: mixdist compare runs/mnist_moe-1 runs/mnist_moe-gmm-1",
    )
    parser.add_argument(
        "runs", type=str, nargs="+", help="directories of runs and baselines; the first is the reference"
    )
    parser.add_argument("--split", type=Literal["test", "valid", "train"], default="test", help="the rows")
    parser.add_argument(
        "--figure", type=str | None, help="a figure of evaluation.json; unset, log_likelihood if all have it"
    )
    parser.add_argument("--json", type=str | None, help="a file to write the comparison to as well")
    options = parse(parser, argv)
    runs = [read_evaluation(Path(run), options.split) for run in options.runs]
    figure, lines = compare(runs, options.figure)
    protocol = runs[0].protocol
    about = {"figure": figure, "split": options.split, "rows": protocol["rows"], "data": protocol["data"]}
    if options.json:
        told = {**about, "notes": notes(runs), "runs": [line._asdict() for line in lines]}
        try:
            write_file(Path(options.json), (json.dumps(told, indent=2) + "\n").encode())
        except OSError as error:
            raise ValueError(f"--json {options.json} cannot be written ({error.strerror}): name another file") from None
    print(f"{figure} on {protocol['rows']} {options.split} rows")
    headers = ["run", "value", "error", "difference", "its error", "95% interval", "z"]
    print(table(headers, [_cells(line) for line in lines]))
    for note in notes(runs):
        print(note)


def _cells(line: Line) -> list[str]:
    interval = "-" if line.interval is None else f"{line.interval[0]:+.4g} to {line.interval[1]:+.4g}"
    difference = "-" if line.difference is None else f"{line.difference:+.4g}"
    z = "-" if line.z is None else f"{line.z:+.1f}"
    error, own = ("-" if number is None else f"{number:.2g}" for number in (line.difference_error, line.error))
    return [line.run, f"{line.value:.6g}", own, difference, error, interval, z]
