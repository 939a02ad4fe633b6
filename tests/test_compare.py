"""Differences of runs are paired by rows, with the standard error of their mean; what cannot be compared is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from mixdist.evaluation.compare import NORMAL_95, Judged, compare, differing, paired
from mixdist.files import read_arrays
from tests.errors import error_of
from tests.launch import changed, here, refused, write_config

RNG = np.random.default_rng(0)
PROTOCOL = {"split": "test", "data": "a" * 64, "rows": 500, "likelihood": "density", "num_samples": 100}


def write(run: Path, columns: dict[str, Any], stem: str = "evaluation", **protocol: Any) -> Path:
    """Write what an evaluation leaves of a run."""
    run.mkdir(exist_ok=True)
    numbers = {name: np.asarray(column) for name, column in columns.items()}
    figures = {name: float(np.nanmean(column)) for name, column in numbers.items() if name != "id"}
    errors = {name: float(numbers[name].std(ddof=1) / math.sqrt(len(numbers[name]))) for name in figures}
    told = {"protocol": {**PROTOCOL, "rows": len(numbers["id"]), **protocol}, "figures": figures, "errors": errors}
    (run / f"{stem}.json").write_text(json.dumps(told))
    np.savez(run / f"{stem}.npz", **numbers)
    return run


@pytest.fixture
def runs(folder: Path) -> tuple[Path, Path]:
    """Two runs on the same rows, whose figures go together, in other orders."""
    ids, base = np.arange(500), RNG.normal(-50, 20, 500)
    order = RNG.permutation(500)
    one = write(Path("one"), {"id": ids, "log_likelihood": base, "accuracy": (base > -60).astype(float)})
    better = base + RNG.normal(1, 3, 500)
    two = write(
        Path("two"),
        {"id": ids[order], "log_likelihood": better[order], "accuracy": (better > -60)[order].astype(float)},
    )
    return one, two


def test_the_error_of_a_difference_is_that_of_resampled_rows() -> None:
    for make in (lambda: RNG.normal(size=400), lambda: RNG.exponential(size=400) ** 2, lambda: RNG.integers(0, 2, 400)):
        base, other = make(), make()
        one = base + 0.3 * other
        mean, error = paired(one, base)
        places = RNG.integers(0, 400, (10_000, 400))
        bootstrap = (one - base)[places].mean(1).std(ddof=1)
        assert mean == pytest.approx((one - base).mean())
        assert error == pytest.approx(bootstrap, rel=0.05)


def test_runs_are_paired_by_id(runs: tuple[Path, Path]) -> None:
    ended = here("compare", "one", "two", "one", "--json", "told.json")
    assert (ended.code, ended.err) == (0, "")
    told = json.loads(Path("told.json").read_text())
    first, second, again = told["runs"]
    assert told["figure"] == "log_likelihood"
    assert first["difference"] is None
    assert second["difference"] == pytest.approx(second["value"] - first["value"])
    assert second["difference_error"] == pytest.approx(3 / math.sqrt(500), rel=0.1)
    assert second["difference_error"] < 0.2 * first["error"]
    assert second["interval"] == pytest.approx(
        [second["difference"] + s * NORMAL_95 * second["difference_error"] for s in (-1, 1)]
    )
    assert second["z"] == pytest.approx(second["difference"] / second["difference_error"])
    assert (again["difference"], again["difference_error"], again["z"]) == (0, 0, None)
    assert pytest.approx(norm.ppf(0.975), abs=1e-15) == NORMAL_95
    lines = ended.out.splitlines()
    assert lines[0] == "log_likelihood on 500 test rows"
    assert [line.split()[0] for line in lines[3:]] == ["one", "two", "one"]
    assert "accuracy on 500 test rows" in here("compare", "one", "two", "--figure", "accuracy").out


def test_rows_without_a_number_are_left_out_of_both() -> None:
    one, other = np.array([1.0, 2.0, math.nan, 4.0]), np.array([0.0, math.nan, 5.0, 1.0])
    assert paired(one, other) == (2.0, 1.0)
    assert all(map(math.isnan, paired(one[:0], other[:0])))
    assert math.isnan(paired(one[:1], other[:1])[1])


def test_a_figure_without_a_column_has_no_paired_error() -> None:
    ids = np.arange(3)
    runs = [
        Judged(name, PROTOCOL, {"experts_in_use": value}, {}, {"id": ids}) for name, value in (("a", 2.0), ("b", 3.0))
    ]
    _, (_, line) = compare(runs)
    assert (line.difference, line.difference_error) == (1.0, None)


@pytest.mark.parametrize(
    ("protocol", "named"),
    [
        ({"data": "b" * 64}, ["data", "bbbbbbbbbbbb", "aaaaaaaaaaaa"]),
        ({"num_samples": 50}, ["num_samples", "50", "100"]),
        ({"likelihood": "mass"}, ["likelihood", "mass", "density"]),
        ({"add_for_stored_units": -3.0}, ["add_for_stored_units", "-3.0"]),
        ({"split": "valid"}, ["split", "valid"]),
    ],
)
def test_runs_of_unlike_protocols_are_refused(
    runs: tuple[Path, Path], protocol: dict[str, Any], named: list[str]
) -> None:
    ids = np.arange(500)
    write(Path("other"), {"id": ids, "log_likelihood": RNG.normal(size=500), "accuracy": ids % 2}, **protocol)
    refused("compare", "one", "other", names=" ".join(["one", "other", *named]))
    of_likelihoods = not {"data", "split"} & protocol.keys()
    assert here("compare", "one", "other", "--figure", "accuracy").code == (0 if of_likelihoods else 2)


@pytest.mark.parametrize(
    ("figure", "key", "theirs"),
    [
        ("accuracy", "label", "b"),
        ("ari", "label", None),
        ("rmse_value", "reconstructs", "t"),
        ("rmse_row", "reconstructs_scale", 0.5),
        ("prediction_rmse", "predicts", "t"),
        ("prediction_error", "predicts_scale", 0.5),
        ("unexplained_variance", "predicts", "t"),
    ],
)
def test_figures_of_another_label_or_field_are_refused(figure: str, key: str, theirs: Any, folder: Path) -> None:
    columns = {"id": np.arange(9), figure: RNG.normal(size=9), "kl": RNG.normal(size=9)}
    write(Path("one"), columns, **{key: "x"})
    write(Path("other"), columns, **{key: theirs})
    refused("compare", "one", "other", "--figure", figure, names=f"{figure} other one {key} {theirs} x")
    assert here("compare", "one", "other", "--figure", "kl").code == 0
    write(Path("other"), columns)  # of a family that does not say
    assert here("compare", "one", "other", "--figure", figure).code == 0


def test_a_run_and_a_baseline_say_which_label_and_field_their_figures_are_of(folder: Path) -> None:
    config = write_config(Path("c.yaml"), changed())
    told = []
    for run, words in (("run", ("train",)), ("baseline", ("baseline", "ppca", "--components", "1"))):
        assert here(*words, "--config", config, "--out", run).code == 0
    assert here("evaluate", "run", "--num_samples", "1").code == 0
    for run in ("run", "baseline"):
        told.append(json.loads(Path(run, "evaluation.json").read_bytes())["protocol"])
    for key, value in {"label": "y", "reconstructs": "x", "reconstructs_scale": 1 / 16}.items():
        assert [one[key] for one in told] == [value, value]


@pytest.mark.parametrize(
    ("figure", "sampled"),
    [
        ("log_likelihood", True),
        ("conditional_log_likelihood", True),
        ("gate_log_likelihood", True),
        *((name, False) for name in ("elbo", "expert_elbo", "loss", "gate_loss", "exact_log_likelihood")),
    ],
)
def test_the_number_of_samples_matters_to_figures_that_take_them(figure: str, sampled: bool, folder: Path) -> None:
    columns = {"id": np.arange(9), figure: RNG.normal(size=9)}
    write(Path("one"), columns)
    write(Path("other"), columns, num_samples=7)
    assert here("compare", "one", "other", "--figure", figure).code == (2 if sampled else 0)


def test_an_exact_likelihood_is_compared_with_a_sampled_one(runs: tuple[Path, Path]) -> None:
    write(Path("exact"), {"id": np.arange(500), "log_likelihood": RNG.normal(size=500)}, num_samples=None)
    assert here("compare", "one", "exact").code == here("compare", "exact", "two").code == 0


@pytest.mark.parametrize(("key", "values"), [("dtype", ("float32", "float64")), ("mixdist", ("0.1", "0.2"))])
def test_what_has_a_part_in_a_difference_is_noted(key: str, values: tuple[str, str], folder: Path) -> None:
    """One line, which names every run; no refusal: a baseline's exact density is float64, a run's usually float32."""
    columns = {"id": np.arange(9), "log_likelihood": RNG.normal(size=9)}
    for run, value in zip(("one", "two", "three"), (*values, values[0]), strict=True):
        write(folder / run, columns, **{key: value})
    ended = here("compare", "one", "two", "three", "--json", "told.json")
    assert (ended.code, ended.err) == (0, "")
    noted = [line for line in ended.out.splitlines() if line.startswith("note: ")]
    assert len(noted) == 1
    assert noted[0].startswith(f"note: {key} is {values[0]} in one, three and {values[1]} in two: ")
    assert json.loads(Path("told.json").read_text())["notes"] == noted
    assert "note" not in here("compare", "one", "three").out


def test_other_rows_are_refused(runs: tuple[Path, Path]) -> None:
    write(Path("fewer"), {"id": np.arange(400), "log_likelihood": np.zeros(400)})
    refused("compare", "one", "fewer", names="rows 400 500 --rows")
    write(Path("others"), {"id": np.arange(500) + 1, "log_likelihood": np.zeros(500)})
    refused("compare", "one", "others", names="others one rows")


def test_what_cannot_be_read_is_refused(runs: tuple[Path, Path]) -> None:
    refused("compare", "one", names="two or more")
    refused("compare", names="RUNS")
    refused("compare", "one", "nowhere", names="nowhere mixdist")
    refused(
        "compare", "one", "two", "--split", "valid", names="evaluation-valid.json mixdist evaluate one --split valid"
    )
    refused("compare", "one", "two", "--figure", "nmi", names="nmi log_likelihood accuracy")
    refused("compare", "one", "two", "--json", "nowhere/told.json", names="nowhere")
    Path("unevaluated").mkdir()
    refused("compare", "unevaluated", "one", names="unevaluated evaluation.json mixdist evaluate")
    whole = {path: path.read_bytes() for path in Path("two").iterdir()}
    for name, data in (
        ("evaluation.json", b"{"),
        ("evaluation.json", b"[]"),
        ("evaluation.npz", b"no"),
        ("evaluation.npz", b""),
    ):
        Path("two", name).write_bytes(data)
        refused("compare", "one", "two", names=f"two/{name[:10]} mixdist evaluate two")
        for path, kept in whole.items():
            path.write_bytes(kept)
    data = whole[Path("two/evaluation.npz")]
    Path("two/evaluation.npz").write_bytes(data[: len(data) // 2])
    refused("compare", "one", "two", names="mixdist evaluate two")
    write(Path("two"), {"id": np.arange(500), "log_likelihood": np.zeros(500)})
    Path("two/evaluation.npz").write_bytes(data)
    refused("compare", "one", "two", names="log_likelihood 0.0")
    np.savez(Path("two/evaluation.npz"), id=np.array([object()], dtype=object), allow_pickle=True)
    refused("compare", "one", "two", names="mixdist evaluate two")


@pytest.mark.parametrize(
    ("section", "value", "names"),
    [
        ("errors", None, "errors"),
        ("protocol", [1], "protocol"),
        ("protocol", {"split": "test", "rows": 500}, "protocol data"),
        ("figures", {"log_likelihood": "high"}, "log_likelihood 'high'"),
        ("figures", {"log_likelihood": math.nan}, "log_likelihood nan"),
        ("figures", {"log_likelihood": True}, "log_likelihood True"),
        ("errors", {"log_likelihood": "0.3"}, "log_likelihood '0.3'"),
    ],
)
def test_an_evaluation_of_another_form_is_refused(
    section: str, value: Any, names: str, runs: tuple[Path, Path]
) -> None:
    path = Path("two/evaluation.json")
    path.write_text(json.dumps({**json.loads(path.read_bytes()), section: value}))
    refused("compare", "one", "two", names=f"two/evaluation.json {names} mixdist evaluate two")


@pytest.mark.parametrize("place", range(10, 1500, 213))
def test_bytes_that_changed_are_told(place: int, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "rows.npz", id=np.arange(300), figure=RNG.normal(size=300))
    data = bytearray((tmp_path / "rows.npz").read_bytes())
    data[place : place + 20] = bytes(255 - byte for byte in data[place : place + 20])
    (tmp_path / "rows.npz").write_bytes(data)
    error_of(lambda: read_arrays(tmp_path / "rows.npz"), "rows.npz", "damaged")


def test_figures_of_modalities_are_compared_where_they_mean_the_same() -> None:
    one = {"split": "test", "data": "d", "rows": 4, "num_samples": 5, "loss_is": "a bound"}
    for figure in ("log_joint", "looser", "log_cross_a_b"):
        assert differing(one, one | {"num_samples": 50}, figure) == "num_samples"
    assert differing(one, one | {"num_samples": 50}, "coherence_joint") is None
    assert differing(one, one | {"loss_is": "a sum"}, "loss") == "loss_is"
    assert differing(one, one | {"loss_is": "a sum"}, "log_joint") is None
