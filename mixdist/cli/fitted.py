"""Fitted baselines as runs: what they leave in a directory, and their figures on the rows of a split."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from mixdist.baselines.clusters import GaussianMixture, KMeans
from mixdist.baselines.model import ABOUT, MODEL, Baseline, evaluate_baseline, read_about, repeatable
from mixdist.baselines.ppca import PPCA
from mixdist.baselines.rows import Rows, dequantised, values_of
from mixdist.baselines.single import expert_of
from mixdist.cli.evaluate import summary
from mixdist.config.build import load_data
from mixdist.config.config import Config
from mixdist.config.experts import make_expert
from mixdist.config.parsing import plain
from mixdist.data import Samples
from mixdist.evaluation.compare import stem_of
from mixdist.evaluation.protocol import about_rows
from mixdist.evaluation.record import record
from mixdist.experts import Expert
from mixdist.mixtures.evidence import bits_per_dim, stored_units
from mixdist.mixtures.expert_study import unit_of
from mixdist.model import load
from mixdist.parallel.launch import Launch
from mixdist.parallel.mesh import Mesh, Placement
from mixdist.terms import Batch, Spec, real_field
from mixdist.training.checkpoint import checkpoints_in, read_state

MODELS: dict[str, type[Baseline]] = {"ppca": PPCA, "gmm": GaussianMixture, "kmeans": KMeans}

BOUND = "values spread evenly over their levels: in expectation a lower bound on the log of a mass"

About = Mapping[str, Any]
"""What a fitted baseline is, as JSON: kind, field, likelihood, on, expert, seed, and how it was chosen."""


def one_process() -> Mesh:
    """Return the place of a process that works alone, whatever started it."""
    return Mesh(Placement.plan(1, 1), Launch(), torch.device("cpu"))


def rows_of(about: About, spec: Spec) -> Callable[[Samples], Rows]:
    """Return what makes a data set the rows of a baseline: values of a field, spread levels, or a VAE's latents.

    Raises:
        ValueError: the run with the VAE cannot be loaded, or was trained on other fields.
    """
    name, field = about["field"], spec[about["field"]]
    if about["on"]:
        values = latents(Path(about["on"]), about["expert"], spec, about["data"])
    elif about["likelihood"] == "mass" and about["kind"] == "gmm":
        values = dequantised(field, name, about["seed"])
    else:
        values = values_of(field, name)
    return lambda dataset: Rows(dataset, values)


def about_of(kind: str, parsed: Namespace, config: Config, train: Samples) -> dict[str, Any]:
    """Return what a baseline is to be fitted to.

    Raises:
        ValueError: the data has no such field, or no label where clusters are all there is; an option of no use.
    """
    name = field_name(parsed.field, train.spec, kind)
    on, likelihood = parsed.get("on"), parsed.get("likelihood")
    for option in ("field", "likelihood") if on else ("expert",):
        if parsed.get(option) is not None:
            raise ValueError(
                f"--{option} ({parsed[option]}) has no use {'with' if on else 'without'} --on: "
                f"{'latents' if on else 'values'} are fitted; leave it out"
            )
    if (on or kind == "kmeans") and train.label is None:
        what = "latents of a run are" if on else "kmeans is"
        raise ValueError(f"{what} compared with a label, and the data has none: take gmm or ppca on values")
    if on:
        likelihood = None
    elif kind != "kmeans":
        likelihood = likelihood or likelihood_of(parsed, train.spec, name)
    about = {"kind": kind, "field": name, "likelihood": likelihood, "on": on, "expert": parsed.get("expert")}
    level_of(about, train.spec)
    return {**about, "seed": config.seed, "data": train.fingerprint}


def field_name(given: str | None, spec: Spec, kind: str) -> str:
    """Return the field that a baseline models: the one given, x, or the only one of real numbers.

    Raises:
        ValueError: there is none, several, or it holds classes.
    """
    real = [name for name, field in spec.items() if field.num_classes is None]
    if given is None and "x" not in real and len(real) != 1:
        listed = f"fields {', '.join(real)}: name one with --field" if real else "none: it cannot be fitted to labels"
        raise ValueError(f"{kind} needs a field of real numbers, and the data has {listed}")
    name = given or ("x" if "x" in real else real[0])
    real_field(spec, name, f"--field of {kind}")
    return name


def likelihood_of(config: Namespace, spec: Spec, name: str) -> str:
    """Return what the experts of a config give of a field: a mass of its stored levels, or a density."""
    try:
        expert = make_expert(expert_of({"mixture": plain(config.mixture)}, 0), spec)
    except ValueError:  # a family without experts of that kind
        return "density"
    field, levels = spec[name], expert.levels
    if expert.log_px_is != "mass" or field.dtype.is_floating_point or levels is None:
        return "density"
    return "mass" if round(1 / abs(field.scale)) + 1 == levels else "density"


def level_of(about: About, spec: Spec) -> float | None:
    """Return the width of a level, where a mass of levels is modelled; None for a density.

    Raises:
        ValueError: the field is not stored as levels.
    """
    if about["likelihood"] != "mass":
        return None
    field = spec[about["field"]]
    if field.dtype.is_floating_point:
        raise ValueError(
            f"--likelihood mass needs values stored as levels (whole numbers), and the field {about['field']!r} is "
            f"stored as {field.dtype}: leave it out for a density"
        )
    return abs(field.scale)


def latents(run: Path, number: int | None, spec: Spec, data: str) -> Callable[[Batch], torch.Tensor]:
    """Return what turns stored rows into the means of an expert's posterior.

    Args:
        run: that trained the expert.
        number: of the expert; None where the run has one.
        spec: the fields of the data.
        data: fingerprint of the training rows, which must be those of the run.

    Raises:
        ValueError: the run was trained on other data, or its experts are several, or none has such a posterior.
    """
    if not checkpoints_in(run / "checkpoints"):
        raise ValueError(f"--on {run} has no trained experts: name a run of mixdist train or of mixdist baseline vae")
    model = load(run)
    trained_on = read_state(checkpoints_in(run / "checkpoints")[0])["run"]["data"]
    if trained_on != data:
        raise ValueError(
            f"--on {run} was trained on data {trained_on}, here is {data}: leave --config out, or give its own"
        )
    experts: dict[int, Expert] = getattr(model, "experts", {})
    able = [e for e, expert in experts.items() if expert.can("posterior")]
    if not able:
        raise ValueError(f"--on {run} has no expert with a posterior, such as mixdist.experts.VAE: name another run")
    if number is None and len(able) > 1:
        raise ValueError(f"--on {run} has {len(able)} experts: name one with --expert, of {', '.join(map(str, able))}")
    number = able[0] if number is None else number
    if number not in able:
        raise ValueError(f"--expert ({number}) is none of the experts of {run}: choose {', '.join(map(str, able))}")
    expert = experts[number]

    @torch.no_grad()
    def encode(rows: Batch) -> torch.Tensor:
        values = {name: spec[name].values(rows[name], model.dtype) for name in expert.fields}
        return expert.posterior({"id": rows["id"], **values}).mean_RL

    return encode


def evaluate_fitted(run: Path, about: About, model: Baseline, rows: Rows, split: str) -> None:
    """Print the figures of a fitted model on the rows of a split, and write them to its directory."""
    spec, name = rows.dataset.spec, about["field"]
    evaluation = evaluate_baseline(model, rows, None if about["on"] else spec[name].num_values)
    told: dict[str, Any] = {"likelihood": about["likelihood"] if "log_likelihood" in evaluation.figures else None}
    if "rmse_row" in evaluation.figures:
        told |= unit_of("reconstructs", name, spec)
    if told["likelihood"] == "density":
        told |= {"likelihood_of": name, "add_for_stored_units": stored_units(spec[name])}
    elif told["likelihood"] == "mass":
        told |= {"likelihood_of": name, "levels": round(1 / abs(spec[name].scale)) + 1}
    if bits := told["likelihood"] and bits_per_dim(spec[name], told["likelihood"], told.get("levels")):
        evaluation = evaluation.plus("bits_per_dim", bits[0] * evaluation.columns["log_likelihood"] + bits[1])
    told |= {"drawn_as": spec[name].drawn} if spec[name].drawn else {}
    how = {
        **about_rows(rows.dataset),
        "split": split,
        "sampled": BOUND if about["likelihood"] == "mass" else "nothing: log p is exact",
        "seed": about["seed"],
        "dtype": "float64",
        "baseline": repeatable(about),
    }
    evaluation = dataclasses.replace(evaluation, findings=list(about["findings"]), protocol=told)
    path = run / f"{stem_of(split)}.json"
    print(summary(evaluation, split), flush=True)
    record(evaluation, how, path)
    print(f"baseline: {run}   {in_words(about)}   figures: {path}", flush=True)


def in_words(about: About) -> str:
    """Return kind and settings of a baseline, and what chose them."""
    settings = ", ".join(f"{name} {value}" for name, value in about["settings"].items())
    chosen = f", the best of {len(about['tried'])} on {about['chosen_on']}" if about["tried"] else ""
    return f"{about['kind']}: {settings}{chosen}"


def evaluate_again(run: Path, config: Config, split: str, num_rows: int | None) -> None:
    """Evaluate a fitted baseline on a split: ``mixdist evaluate`` of its directory.

    Raises:
        ValueError: a file is damaged, the data is not what it was fitted to, or has no such rows.
    """
    about = read_about(run)
    with closing(load_data(config, one_process())) as data:
        if data.train.fingerprint != about["data"]:
            raise ValueError(
                f"{run} was fitted to data {about['data']}, here is {data.train.fingerprint}: point --data at the data "
                f"that it was fitted to"
            )
        dataset = data.split(split)
        dataset = dataset if num_rows is None else dataset.first(num_rows)
        if about["kind"] not in MODELS or about["field"] not in dataset.spec:
            raise ValueError(f"{run / ABOUT} is damaged: make the baseline again")
        model = MODELS[about["kind"]].read(run / MODEL, about["sha256"])
        evaluate_fitted(run, about, model, rows_of(about, dataset.spec)(dataset), split)
