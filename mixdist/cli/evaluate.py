"""The commands about a run that is there: ``mixdist evaluate`` and ``mixdist sample``."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jsonargparse import ArgumentParser, Namespace

from mixdist.cli.ending import report_errors_once
from mixdist.competition.mixture import HardMixture
from mixdist.config.build import Session, build, build_judges, build_mesh, describe
from mixdist.config.config import Config
from mixdist.config.options import parse, plain_parser, values_of
from mixdist.config.parsing import RESOLVED, config_parser, make_config
from mixdist.data import Samples
from mixdist.evaluation.density import check_draws, kernel_density, modelled
from mixdist.evaluation.evaluate import (
    EVALUATION_PHASE,
    Evaluation,
    attribute_names,
    evaluate,
    expert_table,
    stored_units,
)
from mixdist.experts.importance import SAMPLES_AT_ONCE
from mixdist.files import write_file
from mixdist.model import load
from mixdist.noise import Moment, Purpose
from mixdist.parallel.agreement import agree, agreed, gather_json
from mixdist.report.gallery import targets
from mixdist.report.grids import sample_picture, to_uint8
from mixdist.report.metrics import Progress, table
from mixdist.report.plots import scatter_picture
from mixdist.training.checkpoint import CheckpointStore, load_module, read_state

SAMPLED = (
    "z from each expert's q(z|x); log p(x) = log-mean-exp of log p(x, z) - log q(z|x); eps keyed by "
    f"(seed, purpose {Purpose.IMPORTANCE:d}, phase {EVALUATION_PHASE}, step c, sample id, expert), "
    f"{SAMPLES_AT_ONCE} samples a step"
)
SHARES_OF_GATE = "mean responsibilities over the training rows: a density"
SHARES_OF_TABLE = "alpha: each expert's part of the training rows in the table of the last round: a density"
GATE = "q(k|x): weights that have seen x, so no density of x; for supervised experts log p(y|x)"
WINNER = "1 for the expert with the highest score: log p of the winner, no density of x"
KNOWN = "exact_log_likelihood: the source's own log p of the rows' values, the same units as log_likelihood_shares"
EXACT = "nothing: the experts have no importance weights; log p(y|x), where they give one, is exact"


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
    config = make_config(parser, options)
    if not values_of(argv, "--mesh.ep_size"):  # the layout is this command's, not the one that trained
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, ep_size=None))
    mesh = build_mesh(config)
    with report_errors_once(mesh, "look at that rank's own messages, then start the evaluation again"):
        session = build(config, mesh)
        with closing(session):
            check_draws(session.mixture, options.kde)
            assert run is not None
            checkpoint = _restore(config, session, run)
            _evaluate(config, session, options, checkpoint, run)


def evaluate_parser() -> ArgumentParser:
    """Make the parser of ``mixdist evaluate``."""
    parser = config_parser(
        "mixdist evaluate",
        "Evaluate the newest good checkpoint of a run on held-out rows, in one process or under torchrun on any number "
        "of ranks: likelihoods by importance sampling, reconstruction, clustering, routing. The run's own config "
        "holds; dotted options override it, as --data.root for data that was moved. Writes RUN/evaluation.json (for "
        "another split, RUN/evaluation-SPLIT.json). Example: torchrun --standalone --nproc-per-node 2 -m mixdist "
        "evaluate runs/mnist --num_samples 100",
    )
    parser.add_argument("run", type=str, help="the run's directory")
    parser.add_argument("--split", type=Literal["test", "train"], default="test", help="the rows: test or train")
    parser.add_argument("--rows", type=int | None, help="take the first so many rows of the split; unset, all")
    parser.add_argument("--num_samples", type=int, default=100, help="importance samples for each row and expert")
    parser.add_argument(
        "--kde", type=int, default=0, help="samples of the mixture for a kernel density on them, as 10000; 0 for none"
    )
    return parser


def _run_of(argv: Sequence[str]) -> Path | None:
    """Find RUN before parsing, since the run's own config comes first: the one word that no option takes."""
    before = ["", *argv]
    for i, word in enumerate(argv):
        takes = before[i].startswith("-") and "=" not in before[i] and before[i] not in ("-h", "--help")
        if not word.startswith("-") and not takes:
            return Path(word)
    return None


def _restore(config: Config, session: Session, run: Path) -> Path:
    """Put the weights of the run's newest good checkpoint in place, on all ranks or none; give its path.

    Raises:
        Agreed: there is none, or it belongs to other data or to another number of experts.
    """
    mesh = session.mesh
    checkpoint, passed_over = CheckpointStore(run / "checkpoints", mesh).choose()
    for sentence in passed_over if mesh.rank == 0 else ():
        print(f"mixdist: {sentence}; using {checkpoint.name}", file=sys.stderr, flush=True)
    agreed(lambda: _load(config, session, checkpoint), mesh)
    return checkpoint


def _load(config: Config, session: Session, checkpoint: Path) -> None:
    about, here = read_state(checkpoint)["run"], describe(config, session.train)
    remedies = {
        "num_experts": f"evaluate with the run's own {RESOLVED}",
        "data": "point --data at the data that the run was trained on",
        "spec": "read the data as the run did",
    }
    for key, remedy in remedies.items():
        if about.get(key) != here[key]:
            raise ValueError(
                f"checkpoint {checkpoint} was made with {key} {about.get(key)}, here is {here[key]}: {remedy}"
            )
    mixture = session.mixture
    mixture.take_state(read_state(checkpoint))
    if isinstance(mixture, HardMixture):
        judges = build_judges(config, session.train.spec, mixture.bank.ids)
        mixture.receive(mixture.bank.owned(), {e: j.to(session.mesh.device) for e, j in judges.items()})
    for owned in mixture.owned():
        load_module(checkpoint, owned)


def _evaluate(config: Config, session: Session, options: Namespace, checkpoint: Path, run: Path) -> None:
    rank0 = session.mesh.rank == 0
    path = run / ("evaluation.json" if options.split == "test" else f"evaluation-{options.split}.json")
    error = None
    if rank0 and not os.access(run, os.W_OK):
        error = f"{path} cannot be written: make {run} writable"
    agree(gather_json(error, session.mesh.world)[0], session.mesh.world)
    dataset = session.test if options.split == "test" else session.train
    dataset = dataset if options.rows is None else dataset.first(options.rows)
    batches = -(-len(dataset) // config.test_batch_size)
    with Progress(batches, 0, rank0 and sys.stderr.isatty()) as bar:
        evaluation = evaluate(
            session.mixture,
            dataset,
            config.test_batch_size,
            config.seed,
            targets(session.mixture),
            options.num_samples,
            session.train,
            lambda done, total: bar.write({"step": done}),
        )
    kde = None
    if options.kde:
        assert evaluation.weight_E is not None
        at = Moment(config.seed, EVALUATION_PHASE)
        kde = kernel_density(session.mixture, evaluation.weight_E, dataset, session.train, at, options.kde)
        evaluation = evaluation._replace(figures=evaluation.figures | {"kde_log_likelihood": kde.log_likelihood})
    if rank0:
        how = {**protocol(config, session, options, checkpoint, dataset), "kde": kde and kde.describe()}
        print(summary(evaluation, dataset, "held-out" if options.split == "test" else "training"), flush=True)
        if "log_likelihood_gate" in evaluation.figures:
            drawn = how["num_samples"]
            how_many = f"{drawn} importance sample{'s' if drawn > 1 else ''} for each expert" if drawn else "exact"
            print("log-likelihoods, nats a row:", how_many)
        if kde is not None and kde.at_edge:
            print("kde_log_likelihood is not to be trusted: the best bandwidth lies at the edge of those tried")
        report = _without_nan({"protocol": how, **described(evaluation, dataset)})
        write_file(path, (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
        print(f"run: {run}   checkpoint: {checkpoint.name}   figures: {path}", flush=True)


def protocol(
    config: Config, session: Session, options: Namespace, checkpoint: Path, dataset: Samples
) -> dict[str, Any]:
    """Say, in JSON, how figures were taken: enough to take them again."""
    template = session.mixture.bank.template
    expert, gate, competition = (_plain(options[key]) for key in ("expert", "gate", "competition"))
    hard, field = isinstance(session.mixture, HardMixture), dataset.spec.get(modelled(session.mixture))
    arguments = expert.get("init_args") or {}
    sampled = template.can("log_weights")
    position = read_state(checkpoint)["position"]
    return {
        "mixdist": version("mixdist"),
        "checkpoint": checkpoint.name,
        "step": position["total"],
        "split": options.split,
        "rows": len(dataset),
        "data": dataset.fingerprint,
        "seed": config.seed,
        "dtype": config.dtype,
        "num_samples": options.num_samples if sampled else None,
        "sampled": SAMPLED if sampled else EXACT,
        "weights_of_shares": SHARES_OF_TABLE if hard else SHARES_OF_GATE,
        "weights_of_gate": WINNER if hard else GATE,
        "exact": KNOWN if dataset.log_density_N is not None else None,
        "add_for_stored_units": None if field is None else stored_units(field),
        "likelihood": arguments.get("likelihood"),
        "scale": arguments.get("scale"),
        "expert": expert,
        "gate": gate,
        "competition": competition,
        "routing": asdict(config.routing) if config.routing else "hard" if hard else "dense",
        "bf16": config.compute.bf16,
    }


def described(evaluation: Evaluation, dataset: Samples) -> dict[str, Any]:
    """Return an evaluation as JSON: figures, a record for each expert, findings, what is known of experts' rows."""
    experts = [
        {
            "expert": e,
            "rows": int(rows),
            "mean_responsibility": float(evaluation.share_E[e]),
            "weight": None if evaluation.weight_E is None else float(evaluation.weight_E[e]),
            "on_own_rows": {name: float(means[e]) for name, means in evaluation.on_own.items()},
            "on_all_rows": {name: float(means[e]) for name, means in evaluation.on_all.items()},
        }
        for e, rows in enumerate(evaluation.rows_E)
    ]
    counts, rate_EA, rate_A = (
        None if array is None else array.tolist()
        for array in (evaluation.counts_EC, evaluation.attribute_EA, evaluation.attribute_A)
    )
    return {
        "figures": evaluation.figures,
        "findings": evaluation.findings,
        "experts": experts,
        "label": dataset.label,
        "class_names": list(dataset.class_names),
        "counts_EC": counts,
        "attribute": dataset.attribute,
        "attribute_names": attribute_names(dataset) if dataset.attribute else [],
        "attribute_EA": rate_EA,
        "attribute_A": rate_A,
    }


def _plain(value: Any) -> Any:
    """Turn what was parsed into JSON."""
    if isinstance(value, Namespace):
        return {name: _plain(inner) for name, inner in vars(value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _without_nan(value: Any) -> Any:
    """Put null where a figure is not finite: an expert without rows has no mean."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(evaluation: Evaluation, dataset: Samples, kind: str = "held-out") -> str:
    """Return the table that ends a run: a line for each expert, then the figures and what is amiss with experts."""
    figures = "   ".join(f"{name} {value:.4f}" for name, value in evaluation.figures.items())
    lines = table(*expert_table(evaluation, dataset))
    return "\n".join([lines, f"{len(dataset)} {kind} rows: {figures}", *evaluation.findings])


def sample(argv: Sequence[str]) -> None:
    """``mixdist sample RUN``: a picture with a row of samples for each expert."""
    parser = plain_parser(
        "mixdist sample",
        "Draw from the prior of every expert of a run into a picture: a row of images each (means of p(x|z)), or "
        "points in the plane (with the noise of p(x|z)); in one process, without the data. Example: mixdist sample "
        "runs/digits_moe-1 --num_samples 16",
    )
    parser.add_argument("run", type=str, help="the run's directory")
    parser.add_argument("--out", type=str | None, help="the picture, a PNG file; unset, RUN/images/samples.png")
    parser.add_argument("--num_samples", type=int, default=8, help="samples of each expert, 1 to 1000")
    parser.add_argument("--seed", type=int, default=0, help="of the draws: the same seed, the same samples")
    options = parse(parser, argv)
    if not 1 <= options.num_samples <= 1000:
        raise ValueError(f"--num_samples ({options.num_samples}) must be from 1 to 1000")
    model = load(options.run)
    plane = "x" in model.spec and model.spec["x"].shape == (2,)
    observed = plane and model.experts[0].can("draw")  # a cloud of means in the plane is no density
    samples = [model.sample(options.num_samples, e, options.seed, observed).numpy() for e in model.experts]
    path = Path(options.out or Path(options.run) / "images" / "samples.png")
    if samples[0].shape[1:] == (2,):
        experts = np.repeat(np.arange(len(samples)), options.num_samples)
        scatter_picture(path, np.concatenate(samples), experts, [])
    else:
        sample_picture(path, [to_uint8(images) for images in samples], [f"expert {e}" for e in model.experts])
    print(path)
