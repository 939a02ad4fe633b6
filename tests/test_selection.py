"""Selection by validation rows: it changes nothing that is trained, ends where it should, and goes on after a kill."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mixdist
from mixdist.report.metrics import read_metrics
from mixdist.training.checkpoint import checkpoints_in
from mixdist.training.selection import Found, Select, implied_mode
from tests.errors import error_of, refusal_of
from tests.launch import HARD, changed, here, refused, together, write_config
from tests.test_resume import records as comparable

SOFT = changed(dtype="float64", valid=0.2, train__batch_size=300, train__epochs=7, expert__init_args__kl_warmup=30)
SOFT = changed(SOFT, train__optimizer__init_args__lr=0.3)  # its loss goes up and down
WATCH: dict[str, Any] = {"select__monitor": "loss", "checkpoint": {"keep": 1}}
SLOW = ("experts_s", "discriminators_s", "scoring_s", "moving_s", "homes", "peak_memory_bytes")


def trained(folder: Path, config: Any, out: str, *words: str) -> Path:
    ended = here("train", "--config", write_config(folder / f"{out}.yaml", config), "--out", out, *words)
    assert (ended.code, ended.err) == (0, ""), ended.err
    return folder / out


def watched(run: Path) -> list[dict[str, Any]]:
    """Return the records of evaluations during training."""
    return [record for record in read_metrics(run) if "best_step" in record]


def others(run: Path) -> list[dict[str, Any]]:
    """Return the records of training, without times."""
    return [r for r in comparable(run) if "best_step" not in r]


def newest(run: Path) -> dict[str, torch.Tensor]:
    path = checkpoints_in(run / "checkpoints")[0]
    return {f"{file.name} {k}": t for file in path.glob("*.safetensors") for k, t in load_file(file).items()}


def same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)


def stops_at(values: Sequence[float], patience: int) -> tuple[int, int]:
    """Return which evaluation is the last one under a patience, and which is the best; small is good."""
    best = 0
    for i, value in enumerate(values):
        best = i if value < values[best] * (1 - 1e-9) else best
        if i - best >= patience:
            return i, best
    return len(values) - 1, best


# What is better


@pytest.mark.parametrize(
    ("values", "mode", "delta", "steps", "waited"),
    [
        ([3, 2, 1], "min", 0.0, [0, 1, 2], 0),
        ([3, 2, 1], "max", 0.0, [0, 0, 0], 2),
        ([3, 3, 3], "min", 0.0, [0, 0, 0], 2),
        ([3, 3 - 1e-12, 2], "min", 0.0, [0, 0, 2], 0),  # the last digits differ by layout
        ([-3, -2.95, -2.85], "max", 0.1, [0, 0, 2], 0),
        ([math.nan, 2, math.inf, math.nan, 1], "min", 0.0, [None, 1, 1, 1, 4], 0),
        ([0, 0, -1e-300], "min", 0.0, [0, 0, 2], 0),
    ],
)
def test_an_improvement(values: list[float], mode: Any, delta: float, steps: list[int | None], waited: int) -> None:
    found, told = Found(), []
    for step, value in enumerate(values):
        found = found.after(value, step, mode, delta)
        told.append(found.step)
    assert (told, found.waited) == (steps, waited)


def test_names_say_which_way_is_better() -> None:
    known = {
        "min": ("loss", "nll", "rmse", "rmse_row", "rmse_value", "squared_error"),
        "max": ("elbo", "log_likelihood", "accuracy", "prediction_accuracy", "purity", "nmi", "ari"),
        None: ("routing_entropy", "experts_in_use", "largest_weight", ""),
    }
    for mode, names in known.items():
        assert [implied_mode(name) for name in names] == [mode] * len(names)


# Runs


def test_watching_changes_nothing_that_is_trained(folder: Path) -> None:
    plain = trained(folder, SOFT, "plain", "--mixture.prefetch", "true")
    run = trained(folder, changed(SOFT, **WATCH), "run", "--mixture.prefetch", "true")
    assert others(run) == others(plain)
    assert same(newest(run), newest(plain))
    assert [record["step"] for record in watched(run)] == list(range(4, 29, 4))
    assert {"valid_loss", "valid_elbo", "valid_accuracy"} <= watched(run)[0].keys()


@pytest.mark.parametrize("start", ["split", pytest.param("all", marks=pytest.mark.slow)])
def test_watching_changes_no_round_of_a_competition(start: str, folder: Path) -> None:
    hard = changed(HARD, dtype="float64", valid=0.2, rounds=4, start=start, pretrain=[{"epochs": 1, "batch_size": 30}])
    plain = trained(folder, hard, "plain")
    run = trained(folder, changed(hard, **WATCH), "run")
    assert [{k: v for k, v in r.items() if k not in SLOW} for r in others(run)] == [
        {k: v for k, v in r.items() if k not in SLOW} for r in others(plain)
    ]
    assert same(newest(run), newest(plain))
    scored = [record["step"] for record in others(run) if "round" in record]
    assert [record["step"] for record in watched(run)] == scored


@pytest.fixture(scope="module")
def watching(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A run to its end, and the losses on validation rows after each epoch."""
    folder = tmp_path_factory.mktemp("watching")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run = trained(folder, changed(SOFT, **WATCH), "whole")
    losses = [record["valid_loss"] for record in watched(run)]
    assert losses.index(min(losses)) < len(losses) - 1, "the last epoch is the best: a test of selection needs another"
    return run, losses


def test_the_best_checkpoint_is_kept_and_used(watching: tuple[Path, list[float]], folder: Path) -> None:
    whole, losses = watching
    run = Path(shutil.copytree(whole, folder / "run"))
    best, last = 4 * (1 + losses.index(min(losses))), 4 * len(losses)
    assert watched(run)[-1]["best_step"] == best
    assert [path.name for path in checkpoints_in(run / "checkpoints")] == [f"step-{n:09d}" for n in (last, best)]
    for words, loss, step in (((), min(losses), best), (("--weights", "newest"), losses[-1], last)):
        ended = here("evaluate", "run", "--split", "valid", "--num_samples", "1", *words)
        assert (ended.code, ended.err) == (0, "")
        assert f"step-{step:09d}" in ended.out
        assert f"rows: loss {loss:.4f} " in ended.out
    ended = here("train", "--resume", "run")  # at its end already
    assert f"rows: loss {min(losses):.4f} " in ended.out
    assert f"step-{best:09d} (best loss {min(losses):.4f})" in ended.out
    for word, name in (("best", f"step-{best:09d}"), ("newest", f"step-{last:09d}")):
        weights = mixdist.load(run, word).experts[0].state_dict()  # type: ignore[arg-type]
        kept = load_file(run / "checkpoints" / name / "expert-0000.safetensors")
        assert all(torch.equal(weights[k], kept[f"model.{k}"]) for k in weights)


def test_a_damaged_best_checkpoint_is_passed_over_and_told(watching: tuple[Path, list[float]], folder: Path) -> None:
    whole, losses = watching
    run = Path(shutil.copytree(whole, folder / "run"))
    best = run / "checkpoints" / f"step-{4 * (1 + losses.index(min(losses))):09d}"
    (best / "gate.safetensors").write_bytes(b"")
    ended = here("evaluate", "run", "--num_samples", "1")
    assert ended.code == 0
    assert ended.err.startswith(f"mixdist: the best checkpoint, {best.name}, is damaged (gate.safetensors")
    assert ended.err.endswith(f"; using step-{4 * len(losses):09d}\n")
    shutil.rmtree(best)
    ended = here("evaluate", "run", "--num_samples", "1")
    assert ended.code == 0
    assert f"the best checkpoint, {best.name}, is damaged" in ended.err


@pytest.mark.parametrize("patience", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_training_ends_early_and_goes_on_after_a_kill_as_if_nothing_had_been(
    patience: int, watching: tuple[Path, list[float]], folder: Path
) -> None:
    whole, losses = watching
    last, best = (4 * (1 + i) for i in stops_at(losses, patience))
    config = changed(SOFT, **WATCH | {"select__patience": patience, "checkpoint": {"every": 1, "keep": 100}})
    run = trained(folder, config, "early")
    assert watched(run) == watched(whole)[: last // 4]
    assert watched(run)[-1]["best_step"] == best
    assert last < 4 * len(losses)
    for kept in (4, last - 1, last):
        again = Path(shutil.copytree(run, folder / f"from-{kept}"))
        for path in checkpoints_in(again / "checkpoints"):
            if int(path.name.removeprefix("step-")) > kept:
                shutil.rmtree(path)
        ended = here("train", "--resume", again.name)
        assert (ended.code, ended.err) == (0, "")
        assert f"(best loss {losses[best // 4 - 1]:.4f}, ended early)" in ended.out
        assert comparable(again) == comparable(run)
        assert same(newest(again), newest(run))
    # More patience goes on from there.
    assert here("train", "--resume", "early", "--select.patience", "100").code == 0
    assert watched(run) == watched(whole)


@pytest.mark.slow
def test_two_ranks_decide_as_one_process(watching: tuple[Path, list[float]], folder: Path) -> None:
    whole, losses = watching
    config = write_config(folder / "c.yaml", changed(SOFT, **WATCH, select__patience=2))
    ended = together("train", "--config", config, "--out", "two", ranks=2, folder=folder)
    assert ended.code == 0, ended.err
    mine, theirs = watched(folder / "two"), watched(whole)[: stops_at(losses, 2)[0] + 1]
    assert [record["best_step"] for record in mine] == [record["best_step"] for record in theirs]
    assert [record["valid_loss"] for record in mine] == pytest.approx([r["valid_loss"] for r in theirs], rel=1e-8)


@pytest.mark.slow
def test_a_competition_ends_early_on_any_layout_and_goes_on(folder: Path) -> None:
    hard = changed(HARD, dtype="float64", valid=0.2, rounds=9, starved="reseed", starved_below=0.5)
    hard = changed(hard, train__optimizer={"class_path": "torch.optim.Adam", "init_args": {"lr": 0.3}})
    config = changed(hard, **WATCH | {"select__patience": 2, "checkpoint": {"every": 1, "keep": 100}})
    run = trained(folder, config, "one")
    losses = [record["valid_loss"] for record in watched(run)]
    assert stops_at(losses, 2)[0] == len(losses) - 1 < 9
    two = together("train", "--config", "one.yaml", "--out", "two", ranks=2, folder=folder)
    assert two.code == 0, two.err
    steps = [[record["best_step"] for record in watched(r)] for r in (run, folder / "two")]
    assert steps[0] == steps[1]
    assert losses == pytest.approx([record["valid_loss"] for record in watched(folder / "two")], rel=1e-8)
    for path in checkpoints_in(run / "checkpoints")[3:4]:
        again = Path(shutil.copytree(run, folder / f"from-{path.name}"))
        for later in checkpoints_in(again / "checkpoints"):
            if later.name > path.name:
                shutil.rmtree(later)
        assert here("train", "--resume", again.name).code == 0
        assert watched(again) == watched(run)
        assert same(newest(again), newest(run))


def test_every_second_epoch_and_more_of_them(folder: Path) -> None:
    config = changed(SOFT, **WATCH, select__every=2)
    long = trained(folder, config, "long", "--train.epochs", "4")
    assert [record["step"] for record in watched(long)] == [8, 16]
    short = trained(folder, config, "short", "--train.epochs", "3")
    assert [record["step"] for record in watched(short)] == [8]
    assert here("train", "--resume", "short", "--train.epochs", "4").code == 0
    assert comparable(short) == comparable(long)


def test_likelihoods_may_be_monitored(folder: Path) -> None:
    named = "log_likelihood"
    how = {"select__monitor": named, "select__mode": "max", "select__num_samples": 3}
    run = trained(folder, changed(SOFT, valid=40, train__epochs=1, **how), "run")
    (record,) = watched(run)
    ended = here("evaluate", "run", "--split", "valid", "--num_samples", "3")
    assert f"{named} {record[f'valid_{named}']:.4f}" in ended.out


# Refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"select": {"monitor": "loss"}}, "select.monitor (loss) valid"),
        ({"select": {"patience": 3}, "valid": 0.1}, "select.patience (3) select.monitor"),
        ({"select": {"every": 2}, "valid": 0.1}, "select.every (2) select.monitor"),
        ({"select": {"monitor": "loss", "patience": 0}, "valid": 0.1}, "select.patience (0)"),
        ({"select": {"monitor": "loss", "every": 0}, "valid": 0.1}, "select.every (0)"),
        ({"select": {"monitor": "loss", "num_samples": 0}, "valid": 0.1}, "select.num_samples (0)"),
        ({"select": {"monitor": "loss", "min_delta": -0.1}, "valid": 0.1}, "select.min_delta (-0.1)"),
        ({"select": {"monitor": "loss", "mode": "up"}, "valid": 0.1}, "select.mode up min max"),
        ({"select": {"monitor": "losses", "mode": "min"}, "valid": 0.1}, "select.monitor (losses) loss"),
        ({"select": {"monitor": "log_likelihood"}, "valid": 0.1}, "select.monitor (log_likelihood) select.num_samples"),
        ({"select": {"monitor": "routing_entropy"}, "valid": 0.1}, "select.monitor (routing_entropy) select.mode"),
        ({"select": {"monitor": "loss", "mode": "max"}, "valid": 0.1}, "select.mode (max) loss small"),
        ({"select": {"monitor": "nmi", "mode": "min"}, "valid": 0.1}, "select.mode (min) nmi large"),
        ({"select": {"monitor": "exact_log_likelihood"}, "valid": 0.1}, "select.monitor exact_log_likelihood constant"),
        ({"select": {"montior": "loss"}, "valid": 0.1}, "montior monitor"),
    ],
)
def test_a_selection_that_cannot_be_is_refused_before_training(
    changes: dict[str, Any], words: str, folder: Path
) -> None:
    config = changed(SOFT, **{"valid": None, **changes})
    refused("train", "--config", write_config(folder / "c.yaml", config), names=words)


def test_a_figure_that_a_competition_has_not_is_told_before_its_first_round(folder: Path) -> None:
    for named in ("nll", "log_likelihood"):
        config = changed(HARD, valid=0.1, select={"monitor": named})
        refused("train", "--config", write_config(folder / "c.yaml", config), names=f"select.monitor ({named}) loss")


@pytest.mark.slow
def test_another_figure_is_another_run(folder: Path) -> None:
    run = trained(folder, changed(SOFT, **WATCH, train__epochs=1), "run")
    for key, value, was in (("monitor", "elbo", "loss"), ("num_samples", "2", "None")):
        refusal_of("train", "--resume", run.name, f"--select.{key}", value, named=(f"select.{key} {was}", value))
    assert here("train", "--resume", run.name, "--select.monitor", "null", "--train.epochs", "2").code == 0
    assert here("train", "--resume", run.name, "--select.monitor", "elbo", "--train.epochs", "3").code == 0
    assert [record["step"] for record in watched(run)] == [4, 12]
    refused("evaluate", run.name, "--weights", "oldest", names="weights oldest best newest")


def test_defaults_say_nothing_is_watched() -> None:
    Select().check()
    error_of(Select(min_delta=math.inf).check, "select.min_delta (inf)")
