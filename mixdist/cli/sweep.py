"""``mixdist sweep``: many runs and one table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from mixdist.config.options import parse, plain_parser
from mixdist.files import hold, write_file
from mixdist.messages import counted
from mixdist.parallel.launch import Launch
from mixdist.sweep.cells import Cells
from mixdist.sweep.plan import Plan, make_plan
from mixdist.sweep.processes import Processes
from mixdist.sweep.sweep import Sweep
from mixdist.sweep.table import Table, cost_table, put
from mixdist.training.selection import check_choice

SPLITS = ("test", "valid", "train")


def sweep(argv: Sequence[str]) -> None:
    """``mixdist sweep CONFIG ... --seeds N --set KEY=VALUE,VALUE --out DIR``: run all cells, tell the table."""
    options, plan = read_plan(argv)
    folder = Path(options.out)
    plan.check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be made ({error}): name another folder") from None
    with hold(folder / ".lock"):
        plan.write(folder)
        processes = Processes(options.jobs, options.ranks)
        done = Sweep(plan, Cells(folder, processes, options.num_samples, lambda line: print(line, flush=True)))
        try:
            done.run(options.jobs)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"finished cells are kept in {folder}; the same command goes on") from None
        _conclude(done, options, folder)


def read_plan(argv: Sequence[str]) -> tuple[Namespace, Plan]:
    """Read and check the command line; nothing is written.

    Raises:
        ValueError: something cannot be run.
    """
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    options, more = parse(sweep_parser(), words[:cut]), words[cut + 1 :]
    if Launch.read().world_size > 1:
        raise ValueError("mixdist sweep starts its ranks itself: start it alone, with --ranks N")
    if not options.out:
        raise ValueError("sweep needs a folder for its runs and tables: name a new one, as --out runs/sweep")
    for name in ("seeds", "jobs", "ranks", "num_samples"):
        if options[name] < 1:
            raise ValueError(f"--{name} ({options[name]}) must be 1 or more")
    splits = options.split.split(",")
    if not set(splits) <= set(SPLITS) or len(set(splits)) < len(splits):
        raise ValueError(f"--split {options.split} must be some of {', '.join(SPLITS)}, with commas between")
    if options.select is not None:
        check_choice(options.select, options.mode, "--select", "--mode")
    plan = make_plan(options, more, check_baseline)
    if options.against is not None and options.against not in plan.rows:
        raise ValueError(f"--against {options.against} is no row of the table: choose one of {', '.join(plan.rows)}")
    if options.docs is not None:
        _put(Path(options.docs), dict.fromkeys(_marks(options), ""))
    return options, plan


def check_baseline(words: Sequence[str]) -> None:
    """Check the words of a ``mixdist baseline``.

    Raises:
        ValueError: the kind is unknown, or an option.
    """
    from mixdist.cli.baseline import KINDS, baseline_parser  # with scikit-learn

    if words[0] not in KINDS:
        raise ValueError(f"--baselines ({words[0]}) must be of {', '.join(KINDS)}: see mixdist baseline --help")
    parse(baseline_parser(words[0]), words[1:])


def sweep_parser() -> ArgumentParser:
    """Make the parser of ``mixdist sweep``."""
    parser = plain_parser(
        "mixdist sweep",
        "Train and evaluate every config at every setting with every seed, in parallel on this machine, and put the "
        "figures into one table: over seeds, with differences seed by seed. A finished cell is kept: whatever ends "
        "this command, the same command goes on, and with more configs, values, seeds, baselines or splits it "
        "adds to its table. Of several settings the best on valid rows is chosen; it alone is evaluated on test rows. "
        "Example: mixdist sweep configs/digits_moe.yaml --set train.lr=0.001,0.003 --seeds 5 --baselines ppca,gmm "
        "--out runs/digits --jobs 2 -- --valid 0.1 --train.epochs 5",
    )
    parser.add_argument(
        "configs",
        type=str,
        nargs="+",
        help="a YAML file, or in quotes '[NAME=]FILE --key value ...'",
    )
    parser.add_argument("--out", type=str | None, help="the folder of all runs and the tables, always needed")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each cell: 0 to one less")
    parser.add_argument(
        "--set", type=str, action="append", default=[], help="KEY=VALUE,VALUE: values to choose from; may be repeated"
    )
    parser.add_argument(
        "--baselines",
        type=str,
        action="append",
        default=[],
        help="kinds of mixdist baseline with commas between, or in quotes one kind with options; may be repeated",
    )
    parser.add_argument("--jobs", type=int, default=1, help="cells at once; each has its part of the cores")
    parser.add_argument("--ranks", type=int, default=1, help="processes a cell; above 1, torchrun starts them")
    parser.add_argument("--num_samples", type=int, default=100, help="importance samples for each row and expert")
    parser.add_argument("--split", type=str, default="test", help="rows that the table is of: test, valid, train")
    parser.add_argument("--select", type=str | None, help="the figure on valid rows that chooses a setting")
    parser.add_argument(
        "--mode",
        type=Literal["min", "max"] | None,
        help="whether that is to be small or large; unset, as its name implies",
    )
    parser.add_argument("--figures", type=str | None, help="figures to show, with commas between; the JSON has all")
    parser.add_argument("--against", type=str | None, help="the row that others are compared with; unset, the first")
    parser.add_argument("--docs", type=str | None, help="a Markdown page that takes the tables between its marks")
    return parser


def _conclude(done: Sweep, options: Namespace, folder: Path) -> None:
    """Write and print the tables; say what failed.

    Raises:
        ValueError: a cell failed, or there is nothing to compare.
    """
    report = json.dumps(done.describe(options.against), indent=2, allow_nan=False) + "\n"
    write_file(folder / "table.json", report.encode())
    tables = done.tables(options.figures and options.figures.split(","), options.against)
    costs = cost_table(done.rows, done.gradients())
    failures = [f"{name} failed: {why}" for name, why in done.failed.items()]
    pages = {"table": markdown(tables, failures), "costs": markdown([costs], [])}
    for name, page in pages.items():
        write_file(folder / f"{name}.md", f"{page}\n".encode())
    print("\n\n".join(["", *(table.text() for table in (*tables, costs))]))
    print(f"\ntables: {folder / 'table.md'}, {folder / 'table.json'}", flush=True)
    unchosen = next((name for name in done.failed if name in done.chosen), None)
    if unchosen and len(done.failed) == 1:  # where cells failed, they are the cause
        raise ValueError(f"no setting of {unchosen} was chosen: {done.failed[unchosen]}")
    if done.failed:
        number, (name, why) = len(done.failed), next(iter(done.failed.items()))
        raise ValueError(
            f"{counted(number, 'cell')} failed, such as {name} ({why}): see {folder / name}.log; the same "
            f"command tries again"
        )
    if options.docs is not None:
        _put(Path(options.docs), dict(zip(_marks(options), pages.values(), strict=True)))


def markdown(tables: Sequence[Table], failures: Sequence[str]) -> str:
    """Return tables as a page, with a list of what failed."""
    return "\n\n".join([*(table.markdown() for table in tables), *(f"- {line}" for line in failures)])


def _marks(options: Namespace) -> tuple[str, str]:
    name = Path(options.out).resolve().name
    return name, f"{name} costs"


def _put(page: Path, tables: dict[str, str]) -> None:
    """Put tables into a page.

    Raises:
        ValueError: the page cannot be read, or a mark is missing.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--docs {page} cannot be read ({error}): name a Markdown page") from None
    try:
        for name, inner in tables.items():
            text = put(text, name, inner)
    except ValueError as error:
        raise ValueError(f"--docs {page} cannot take the tables: {error}") from None
    if any(tables.values()):
        write_file(page, text.encode())
