"""``mixdist baseline``: models that a mixture is compared with, fitted to the data of its config."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from jsonargparse import ArgumentParser, Namespace

from mixdist.baselines.clusters import Covariance, fit_gmm, fit_kmeans
from mixdist.baselines.model import ABOUT, FEW, MODEL, Choice, Grid, choose_settings
from mixdist.baselines.ppca import fit_ppca
from mixdist.baselines.rows import Rows
from mixdist.cli.alone import train_alone
from mixdist.cli.fitted import about_of, evaluate_fitted, level_of, one_process, rows_of
from mixdist.cli.train import check_unused, new_directory
from mixdist.config.build import load_data
from mixdist.config.config import Config
from mixdist.config.options import parse, values_of
from mixdist.config.parsing import RESOLVED, config_parser, dump, make_config
from mixdist.files import write_file
from mixdist.parallel.launch import Launch

N = TypeVar("N", int, float)
PPCA_TRIED = [2**i for i in range(9)]
FLOORS_TRIED = [1e-2, 1e-4, 1e-6]
"""Numbers of components and floors of the variance that are tried where none are given."""

KINDS = {
    "ppca": "probabilistic principal component analysis: a Gaussian with --components directions and one noise",
    "gmm": "a mixture of --components Gaussians",
    "kmeans": "k-means: --clusters centres, compared with the label",
    "vae": "one expert of the config alone, of an expert's or the mixture's size, trained for either's budget",
}
USAGE = """usage: mixdist baseline KIND --config CONFIG [options]

kinds:
{kinds}

mixdist baseline KIND --help lists the options of a kind. For example:
  mixdist baseline gmm --config configs/digits_moe.yaml --components 10""".format(
    kinds="\n".join(f"  {kind:<7} {what}" for kind, what in KINDS.items())
)


def baseline(argv: Sequence[str]) -> None:
    """``mixdist baseline KIND``: fit to the training rows, choose on the validation rows, evaluate on the test rows."""
    if not argv:
        raise ValueError(f"baseline needs a kind: {', '.join(KINDS)}; see mixdist baseline --help")
    kind = argv[0]
    if kind in ("-h", "--help"):
        print(USAGE)
        return
    if kind not in KINDS:
        raise ValueError(f"unknown baseline {kind!r}: expected {', '.join(KINDS)}; see mixdist baseline --help")
    parser = baseline_parser(kind)
    given = values_of(argv, "--on")
    first = ["--config", str(Path(given[-1]) / RESOLVED)] if given and not values_of(argv, "--config") else []
    if first and not Path(first[1]).is_file():
        raise ValueError(f"--on {given[-1]} is no run ({RESOLVED} is missing): name a directory of mixdist train")
    parsed = parse(parser, [*first, *argv[1:]])
    config = make_config(parser, parsed)
    stem = f"{Path(str(parsed.config[-1])).stem if parsed.config else 'run'}-{kind}"
    if kind == "vae":
        train_alone(parser, parsed, config, stem)
    elif Launch.read().rank == 0:  # one process does it all
        fit(kind, parsed, config, stem)


def _about(kind: str) -> str:
    example = {"ppca": "--components 4,16,64 --valid 0.1", "gmm": "--components 10", "kmeans": "--clusters 10"}
    return (
        f"Fit a baseline to the training rows of a config: {KINDS[kind]}. Settings are chosen on the validation rows. "
        "It is left in a directory like a run's, with evaluation.json for the test rows; mixdist evaluate takes other "
        "splits, and mixdist compare compares it with runs. Every key of the config is an option as well. Example: "
        f"mixdist baseline {kind} --config configs/digits_moe.yaml "
        + example.get(kind, "--size mixture --budget mixture")
    )


def baseline_parser(kind: str) -> ArgumentParser:
    """Make the parser of a kind: the keys of a config, and its own options."""
    parser = config_parser(f"mixdist baseline {kind}", _about(kind))
    parser.add_argument("--out", type=str | None, help="the directory that is made; unset, a new one under runs/")
    if kind == "vae":
        extent = Literal["expert", "mixture"]
        parser.add_argument("--size", type=extent, default="expert", help="as many parameters as: expert, mixture")
        parser.add_argument(
            "--budget", type=extent, default="expert", help="as many sample-gradients as: expert, mixture"
        )
        parser.add_argument("--expert", type=int, default=0, help="which of a list of experts")
        parser.add_argument("--num_samples", type=int, default=100, help="importance samples for each row")
        return parser
    parser.add_argument("--rows", type=int | None, help="fit the first so many training rows; unset, all")
    parser.add_argument("--field", type=str | None, help="the field that is modelled; unset, x, or the only real one")
    if kind == "ppca":
        parser.add_argument(
            "--components",
            type=str | None,
            help=f"M, or several as 4,16,64, which validation rows choose from; unset, 1, 2, 4 to {PPCA_TRIED[-1]}",
        )
    if kind == "gmm":
        parser.add_argument("--components", type=str | None, help="K, or several as 10,30; unset, as many as experts")
        parser.add_argument("--covariance", type=Covariance, default="full", help="full, diag, tied or spherical")
        parser.add_argument(
            "--min_variance",
            type=str | None,
            help="added to each variance, as a part of the values' mean variance, or several as 1e-4,1e-2; unset, "
            f"{', '.join(f'{part:g}' for part in FLOORS_TRIED)}",
        )
        parser.add_argument("--max_iter", type=int, default=200, help="iterations of a fit at most")
    if kind == "kmeans":
        parser.add_argument("--clusters", type=int | None, help="K; unset, as many as experts")
    if kind != "kmeans":
        parser.add_argument(
            "--likelihood",
            type=Literal["density", "mass"] | None,
            help="density of values, or mass of their levels as a lower bound; unset, as the config's experts have it",
        )
    if kind != "ppca":
        parser.add_argument("--on", type=str | None, help="a run: fit the latents of its VAE, instead of values")
        parser.add_argument("--expert", type=int | None, help="of that run, the expert whose latents are fitted")
    return parser


def fit(kind: str, parsed: Namespace, config: Config, stem: str) -> None:
    """Fit a baseline, leave it in a directory of its own, and evaluate it on validation and test rows.

    Raises:
        ValueError: it cannot be fitted to this data, or the directory holds a run.
    """
    if parsed.rows is not None and parsed.rows < 1:
        raise ValueError(f"--rows ({parsed.rows}) must be 1 or more: leave it out for all training rows")
    if parsed.out:
        check_unused(Path(parsed.out))
    with closing(load_data(config, one_process())) as data:
        about = about_of(kind, parsed, config, data.train)
        rows = rows_of(about, data.train.spec)
        train = data.train if parsed.rows is None else data.train.first(parsed.rows)
        begin = time.monotonic()
        valid = None if data.valid is None else rows(data.valid)
        choice = FITS[kind](rows(train), valid, parsed, config, level_of(about, data.train.spec))
        about |= {
            "train_rows": len(train),
            "settings": choice.best.settings,
            "chosen_on": choice.chosen_on,
            "tried": choice.tried,
            "findings": list(choice.best.findings),
            "parameters": choice.best.model.num_parameters,
            "seconds": time.monotonic() - begin,
        }
        model = choice.best.model.to_bytes()
        about["sha256"] = hashlib.sha256(model).hexdigest()
        run = new_directory(parsed.out, stem)
        with _whole_or_nothing(run):
            write_file(run / MODEL, model)
            write_file(run / ABOUT, (json.dumps(about, indent=2) + "\n").encode())
            for split, dataset in (("valid", data.valid), ("test", data.test)):
                if dataset is not None:
                    evaluate_fitted(run, about, choice.best.model, rows(dataset), split)
            write_file(run / RESOLVED, dump(parsed).encode())  # which makes it a run


@contextmanager
def _whole_or_nothing(run: Path) -> Iterator[None]:
    """Remove what is written to a directory meanwhile, where this ends early.

    Raises:
        ValueError: something cannot be written.
    """
    before = set(run.iterdir())
    try:
        yield
    except BaseException as error:
        for path in set(run.iterdir()) - before:
            path.unlink()
        with suppress(OSError):
            run.rmdir()
        if isinstance(error, OSError):
            raise ValueError(
                f"the baseline cannot be written to {run} ({error}): make room there, or name another directory with "
                f"--out"
            ) from None
        raise


def _ppca(train: Rows, valid: Rows | None, parsed: Namespace, config: Config, level: float | None) -> Choice:
    most = min(len(train) // FEW, next(train.batches())[1].shape[1] - 1)
    grid: Grid = {"components": [num for num in PPCA_TRIED if num <= most] or [1]}
    if parsed.components is not None:
        grid["components"] = several("components", parsed.components, int, 1, valid)
    return choose_settings(partial(fit_ppca, level=level), train, valid, grid)


def _gmm(train: Rows, valid: Rows | None, parsed: Namespace, config: Config, level: float | None) -> Choice:
    grid: Grid = {"components": [config.mixture.num_experts], "min_variance": FLOORS_TRIED}
    for name, kind, least in (("components", int, 1), ("min_variance", float, 0.0)):
        if parsed[name] is not None:
            grid[name] = several(name, parsed[name], kind, least, valid)
    if parsed.max_iter < 1:
        raise ValueError(f"--max_iter ({parsed.max_iter}) must be 1 or more: give 200")
    options = {"covariance": parsed.covariance, "seed": config.seed, "max_iter": parsed.max_iter, "level": level}
    return choose_settings(partial(fit_gmm, **options), train, valid, grid)


def _kmeans(train: Rows, valid: Rows | None, parsed: Namespace, config: Config, level: float | None) -> Choice:
    clusters = config.mixture.num_experts if parsed.clusters is None else parsed.clusters
    if clusters < 1:
        raise ValueError(f"--clusters ({clusters}) must be 1 or more: give the number of centres")
    return fit_kmeans(train, clusters, config.seed)


Fit = Callable[[Rows, Rows | None, Namespace, Config, float | None], Choice]
FITS: dict[str, Fit] = {"ppca": _ppca, "gmm": _gmm, "kmeans": _kmeans}


def several(name: str, text: str, kind: type[N], least: N, valid: Rows | None) -> list[N]:
    """Return the numbers of an option: one, or several with commas between, which validation rows choose from.

    Raises:
        ValueError: they are no such numbers, or there are several and no validation rows.
    """
    try:
        found = [kind(part) for part in text.strip("[] ").split(",")]
        good = all(math.isfinite(one) and one >= least for one in found)
    except ValueError:
        good = False
    if not good:
        raise ValueError(
            f"--{name} ({text}) must be a number from {least:g}, or several with commas between: correct it"
        )
    if len(found) > 1 and valid is None:
        raise ValueError(
            f"--{name} ({text}) has several values, and there are no validation rows to choose by: set valid, as "
            f"--valid 0.1, or give one"
        )
    return list(dict.fromkeys(found))
