"""``mixdist evaluate``: figures of a run on held-out rows."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from mixdist.baselines.model import ABOUT, MODEL, read_about
from mixdist.cli.ending import report_errors_once
from mixdist.cli.judge import judge_rows
from mixdist.config.build import KINDS, Session, build, build_mesh, describe
from mixdist.config.card import card, flat
from mixdist.config.config import Config
from mixdist.config.options import parse, values_of
from mixdist.config.parsing import RESOLVED, config_parser, make_config, plain
from mixdist.data import Samples
from mixdist.evaluation.compare import stem_of
from mixdist.evaluation.density import KernelDensity, check_draws, kernel_density
from mixdist.evaluation.evaluate import evaluate
from mixdist.evaluation.probes import TOLD, Probing
from mixdist.evaluation.protocol import protocol
from mixdist.evaluation.record import record
from mixdist.mixtures import Evaluation
from mixdist.noise import EVALUATION_PHASE, Moment
from mixdist.parallel.agreement import agreed, on_rank_0
from mixdist.parallel.launch import Launch
from mixdist.report.metrics import Progress, table
from mixdist.training.checkpoint import CheckpointStore, load_mixture, read_state
from mixdist.training.selection import choose_checkpoint

FREE = ("execution", "compute", "one_way", "prefetch", "delivery", "placement")
"""Options of a mixture that an evaluation may have otherwise: how it runs."""


def evaluate_run(argv: Sequence[str]) -> None:
    """``mixdist evaluate RUN``: figures on held-out rows, printed and written to RUN/evaluation.json."""
    parser, run = evaluate_parser(), _run_of(argv)
    if run is None and not any(word == "-h" or word.partition("=")[0].endswith("help") for word in argv):
        raise ValueError("evaluate needs a run: name a directory that mixdist train made, as mixdist evaluate RUN")
    if run is not None and not (run / RESOLVED).is_file():
        raise ValueError(f"{run} holds no run ({RESOLVED} is missing): name a directory that mixdist train made")
    options = parse(parser, [*(["--config", str(run / RESOLVED)] if run else []), *argv])
    if options.num_samples < 1:
        raise ValueError(f"--num_samples ({options.num_samples}) must be 1 or more: give 100 for a usual estimate")
    if options.rows is not None and options.rows < 1:
        raise ValueError(f"--rows ({options.rows}) must be 1 or more: leave it out for all rows")
    if options.probe_rows < 1:
        raise ValueError(f"--probe_rows ({options.probe_rows}) must be 1 or more: give --probes none for no probes")
    config = make_config(parser, options, trains=False)
    assert run is not None
    if (run / MODEL).is_file() or ((run / ABOUT).is_file() and read_about(run)["kind"] != "vae"):
        from mixdist.cli.fitted import evaluate_again  # which prints as this module does

        if options.kde:
            raise ValueError(
                f"--kde ({options.kde}) needs samples, and {run} is a baseline, which draws none: leave it out"
            )
        if options.judge:
            raise ValueError(f"--judge ({options.judge}) needs a mixture, and {run} is a baseline: leave it out")
        if options.ema:
            raise ValueError(f"--ema needs a run of train.ema, and {run} is a baseline, which has none: leave it out")
        if Launch.read().rank == 0:  # one process does it all
            evaluate_again(run, config, options.split, options.rows)
        return
    if not values_of(argv, "--mesh.ep_size"):  # the layout is this command's, not the one that trained
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, ep_size=None))
    mesh = build_mesh(config, card("evaluate", options))
    with report_errors_once(mesh, "look at that rank's own messages, then start the evaluation again"):
        session = build(config, mesh, tests=options.split == "test")
        with closing(session):
            agreed(lambda: check_draws(session.mixture, options.kde), mesh.world)
            agreed(lambda: session.split(options.split), mesh.world)
            checkpoint = _restore(config, session, run, options)
            agreed(lambda: _check_own(parser, options, run), mesh.world)
            _evaluate(config, session, options, checkpoint, run)


def evaluate_checkpoint(config: Config, session: Session, given: Mapping[str, Any], run: Path) -> None:
    """Evaluate a run's checkpoint with options of ``mixdist evaluate``, others by default; every rank calls it."""
    options = Namespace(**{name: about["default"] for name, about in OPTIONS.items()} | dict(given))
    checkpoint = _restore(config, session, run, options)
    _evaluate(config, session, options, checkpoint, run)


OPTIONS: dict[str, dict[str, Any]] = {
    "split": {
        "type": Literal["test", "valid", "train"],
        "default": "test",
        "help": "the rows: test, valid or train",
    },
    "weights": {
        "type": Literal["best", "newest"],
        "default": "best",
        "help": "of the best checkpoint, where the run's select monitors a figure; or of the newest one",
    },
    "ema": {
        "action": "store_true",
        "default": False,
        "help": "take the moving averages of weights of a run that has train.ema",
    },
    "rows": {"type": int | None, "default": None, "help": "take the first so many rows of the split; unset, all"},
    "num_samples": {"type": int, "default": 100, "help": "importance samples for each row and expert"},
    "probes": {
        "type": Literal["family", "all", "none"],
        "default": "family",
        "help": "classifiers of latents by the label: those that the mixture's family has, all, or none",
    },
    "probe_rows": {
        "type": int,
        "default": 10_000,
        "help": "rows that these are fitted on, and are judged by, at most",
    },
    "judge": {
        "type": str | None,
        "default": None,
        "help": "a run, on whose training rows classifiers of what modalities generate are trained; unset, this one's",
    },
    "kde": {
        "type": int,
        "default": 0,
        "help": "samples of the mixture for a kernel density on them, as 10000; 0 for none",
    },
}
"""What ``mixdist evaluate`` takes beside a config."""


def evaluate_parser() -> ArgumentParser:
    """Make the parser of ``mixdist evaluate``."""
    parser = config_parser(
        "mixdist evaluate",
        "Evaluate the best or newest good checkpoint of a run, in one process or under torchrun on any number of "
        "ranks: likelihoods by importance sampling, reconstruction, clustering, routing. The run's own config "
        "holds; dotted options override it, as --data.root for data that was moved. Writes RUN/evaluation.json (for "
        "another split, RUN/evaluation-SPLIT.json; with --ema, RUN/evaluation-ema.json) and beside it the rows (.npz). "
        "Example: torchrun --standalone --nproc-per-node 2 -m mixdist evaluate runs/mnist --num_samples 100",
    )
    parser.add_argument("run", type=str, help="the run's directory")
    for name, about in OPTIONS.items():
        parser.add_argument(f"--{name}", **about)
    return parser


def _run_of(argv: Sequence[str]) -> Path | None:
    """Find RUN before parsing, since the run's own config comes first: the one word that no option takes."""
    before = ["", *argv]
    for i, word in enumerate(argv):
        takes = before[i].startswith("-") and "=" not in before[i] and before[i] not in ("-h", "--help")
        if not word.startswith("-") and not takes:
            return Path(word)
    return None


def _check_own(parser: ArgumentParser, options: Namespace, run: Path) -> None:
    """Check that the mixture is the run's own: its weights in another one have other figures.

    Raises:
        ValueError: an option makes another one of it.
    """
    given = parse(parser, ["--config", str(run / RESOLVED), str(run)])
    own, here = (dict(flat("mixture", plain(one["mixture"]))) for one in (given, options))
    for key in sorted({*own, *here}):
        if own.get(key) != here.get(key) and not key.removeprefix("mixture.").startswith(FREE):
            raise ValueError(
                f"--{key} is {here.get(key)} here and {own.get(key)} in {run}, whose figures would be those of another "
                f"mixture: leave it out, or change {RESOLVED} in a copy of the run"
            )


def _restore(config: Config, session: Session, run: Path, options: Namespace) -> Path:
    """Put the weights of the run's best or newest good checkpoint in place, on all ranks or none; return its path.

    Raises:
        Agreed: there is none, or it belongs to other data or to another number of experts.
    """
    mesh = session.mesh
    checkpoint, passed_over = choose_checkpoint(CheckpointStore(run / "checkpoints", mesh), options.weights)
    for sentence in passed_over if mesh.rank == 0 else ():
        print(f"mixdist: {sentence}; using {checkpoint.name}", file=sys.stderr, flush=True)
    agreed(lambda: _load(config, session, checkpoint, options.ema), mesh.world)
    return checkpoint


def _load(config: Config, session: Session, checkpoint: Path, ema: bool) -> None:
    about, here = (
        {**run, "num_experts": run["mixture"]["num_experts"]}
        for run in (read_state(checkpoint)["run"], describe(config, session.train))
    )
    remedies = {
        "num_experts": f"evaluate with the run's own {RESOLVED}",
        "valid": f"evaluate with the run's own {RESOLVED}",
        "data": "point --data at the data that the run was trained on; a source must give the same rows each time",
        "spec": "read the data as the run did",
    }
    for key, remedy in remedies.items():
        if about.get(key) != here[key]:
            raise ValueError(
                f"checkpoint {checkpoint} was made with {key} {about.get(key)}, here is {here[key]}: {remedy}"
            )
    load_mixture(checkpoint, session.mixture, ema)


def _evaluate(config: Config, session: Session, options: Namespace, checkpoint: Path, run: Path) -> None:
    path = run / f"{stem_of(options.split, options.ema)}.json"
    on_rank_0(lambda: _check_writable(path), session.mesh)
    dataset = session.split(options.split)
    dataset = dataset if options.rows is None else dataset.first(options.rows)
    batches, rank0 = -(-len(dataset) // config.test_batch_size), session.mesh.rank == 0
    with (
        judge_rows(evaluate_parser(), options.judge, session, dataset) as judges,
        closing(Progress(batches, 0, rank0 and sys.stderr.isatty())) as bar,
    ):
        evaluation = evaluate(
            session.mixture,
            dataset,
            config.test_batch_size,
            config.seed,
            options.num_samples,
            session.train,
            lambda done, total: bar.write({"step": done}),
            Probing({"family": None, "all": [*TOLD], "none": []}[options.probes], options.probe_rows),
            judges,
        )
    kde = None
    if options.kde:
        at = Moment(config.seed, EVALUATION_PHASE)
        kde = kernel_density(session.mixture, evaluation, session.train, at, options.kde)
        evaluation = evaluation.plus("kde_log_likelihood", kde.log_density_N, kde.reported)
    if rank0:
        how = _how(config, session, options, checkpoint, dataset) | {"kde": kde and kde.describe()}
        how |= {"baseline": read_about(run)} if (run / ABOUT).is_file() else {}
        _report(evaluation, how, kde, run, path)


def _check_writable(path: Path) -> None:
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: make {path.parent} writable")


def _how(config: Config, session: Session, options: Namespace, checkpoint: Path, dataset: Samples) -> dict[str, Any]:
    """Return, as JSON, how figures were taken: enough to take them again."""
    about = {"step": read_state(checkpoint)["position"]["total"], "split": options.split}
    about |= {"ema": config.train.ema} if options.ema else {}
    run = {"seed": config.seed, "dtype": config.dtype, "mixture": plain(options["mixture"])}
    return {"checkpoint": checkpoint.name, **about, **protocol(session.mixture, dataset, options.num_samples), **run}


def _report(evaluation: Evaluation, how: dict[str, Any], kde: KernelDensity | None, run: Path, path: Path) -> None:
    """Print the figures and write them to the run."""
    print(summary(evaluation, how["split"]), flush=True)
    if "log_likelihood" in evaluation.figures:
        drawn = how["num_samples"]
        how_many = f"{drawn} importance sample{'s' if drawn > 1 else ''} of each expert" if drawn else "exact"
        print(f"log_likelihood: {how_many}; weights: {evaluation.protocol['weights']}")
    if kde is not None and kde.at_edge:
        print("kde_log_likelihood is not to be trusted: the best bandwidth lies at the edge of those tried")
    record(evaluation, how, path)
    print(f"run: {run}   checkpoint: {how['checkpoint']}   figures: {path}", flush=True)


def summary(evaluation: Evaluation, split: str = "test") -> str:
    """Return what ends a run: the family's table, the figures with their standard errors, and what is amiss."""
    figures = figures_of(evaluation, f"{len(evaluation.dataset)} {KINDS[split]} rows")
    headers, lines = evaluation.table()
    above = [table(headers, lines)] if headers else []
    likelihood, name = evaluation.protocol.get("likelihood"), evaluation.protocol.get("likelihood_of")
    name = f"{name}, {drawn}," if (drawn := evaluation.protocol.get("drawn_as")) else name
    units = {
        "density": f"likelihoods are log densities of {name} as the model sees it, nats a row",
        "mass": f"likelihoods are log probabilities of {name}, nats a row",
        "neither": f"likelihoods are neither densities nor probabilities: {name} has values off their mass's levels",
        "unknown": "likelihoods may be densities or probabilities: the experts do not say which (log_px_is)",
    }
    told = [units[likelihood]] if likelihood in units else []
    if kind := evaluation.protocol.get("gate_likelihood"):
        told.append(
            f"gate_log_likelihood is of {evaluation.protocol.get('gate_models')}, which the gate models ({kind})"
        )
    return "\n".join([*above, figures, *told, *evaluation.findings])


def figures_of(evaluation: Evaluation, what: str) -> str:
    """Return the figures with their standard errors, after what they are of."""
    shown = [_with_error(name, value, evaluation.errors) for name, value in evaluation.figures.items()]
    # A figure stays on one line: NUL, which is no space, holds its words together until the lines are made.
    joined = f"{what}: " + "   ".join(one.replace(" ", "\0") for one in shown)
    return textwrap.fill(joined, 120, subsequent_indent="  ", break_on_hyphens=False).replace("\0", " ")


def _with_error(name: str, value: float, errors: dict[str, float]) -> str:
    error = errors.get(name, math.nan)
    return f"{name} {value:.4f}" + ("" if math.isnan(error) else f" +- {error:.2g}")
