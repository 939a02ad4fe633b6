"""The tables of kVAEs: baselines learn from as much as the mixture; the command makes every cell and keeps it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixdist.config.parsing import read_config
from tests.launch import ROOT
from tests.test_benchmarks import load

cells, kvaes, tables = load("cells"), load("kvaes"), load("tables")
MIXTURES = sorted((ROOT / "configs").glob("kvaes_*_small.yaml"))
QUICK = ["--data.init_args.rows", "120", "--data.init_args.test_rows", "30", "--train.batch_size", "50"]
QUICK += ["--pretrain", "[]", "--mixture.rounds", "1", "--train.epochs", "1", "--valid", "null"]


@pytest.mark.parametrize("path", MIXTURES, ids=lambda path: path.stem)
@pytest.mark.parametrize("kind", ["bag", "vae"])
def test_baselines_have_the_mixture_s_data_batches_and_sample_gradients(path: Path, kind: str) -> None:
    mixture, baseline = read_config(path), read_config(Path(str(path).replace("_small", f"_{kind}")))
    assert vars(baseline.data) == vars(mixture.data)
    assert baseline.mixture.num_experts == (mixture.mixture.num_experts if kind == "bag" else 1)
    assert baseline.train.batch_size == mixture.train.batch_size
    assert cells.sample_gradients(baseline, 60000) == cells.sample_gradients(mixture, 60000)


def test_sample_gradients_count_a_row_once_for_each_expert_that_sees_it(tmp_path: Path) -> None:
    words = ["--config", str(ROOT / "configs" / "kvaes_3modes_small.yaml"), "--pretrain.epochs", "2"]
    words += ["--mixture.rounds", "4", "--train.epochs", "5"]
    # All 3 experts pretrain on all 100 rows; in rounds each row has one expert.
    assert cells.sample_gradients(cells.read(words), 100) == (3 * 2 + 4 * 5) * 100
    assert cells.sample_gradients(cells.read(words), 100, rounds=1) == (3 * 2 + 5) * 100
    assert cells.sample_gradients(cells.read([*words, "--mixture.start", "split"]), 100) == (2 + 4 * 5) * 100


@pytest.mark.parametrize(("wanted", "width"), [(0, 1), (100, 10), (109, 10), (112, 11), (64 * 64, 64)])
def test_the_matching_width_has_the_nearest_count(wanted: int, width: int) -> None:
    square: Callable[[int], int] = lambda w: w * w  # noqa: E731
    assert cells.matching(wanted, square) == width


def test_a_matched_vae_has_the_mixture_s_parameters_to_two_per_cent() -> None:
    options = argparse.Namespace(data_root=Path("none"), more=QUICK[:4])
    planned = {cell.column: cell for cell in cells.plan(cells.PROBLEMS["9modes"], options)}
    assert list(planned) == ["kVAEs", "bag", "VAE-50", "VAE-150", "matched"]
    assert planned["bag"].parameters == planned["kVAEs"].parameters
    assert abs(planned["matched"].parameters / planned["kVAEs"].parameters - 1) < 0.02
    assert planned["VAE-50"].parameters < planned["VAE-150"].parameters < planned["matched"].parameters


def test_a_baseline_that_may_learn_less_is_refused() -> None:
    options = argparse.Namespace(
        data_root=Path("none"), more=["--data.init_args.rows", "90", "--train.epochs", "3", *QUICK[-2:]]
    )
    # 2 x 3 + 15 x 3 epochs against 3.
    with pytest.raises(ValueError, match=r"kvaes_3modes_bag.yaml has 270 .* 4590: give 51 epochs in all"):
        cells.plan(cells.PROBLEMS["3modes"], options)


@pytest.mark.slow
def test_the_command_makes_every_cell_once_and_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--out {tmp_path / 'out'} --only 5modes --jobs 1 --num-samples 2".split()
    kvaes.main([*words, "--", *QUICK])
    assert capsys.readouterr().out.count(" nats, ") == 5
    told = json.loads((tmp_path / "out" / "kvaes.json").read_text())["cells"]
    assert [cell["column"] for cell in told] == ["kVAEs", "bag", "VAE-50", "VAE-150", "matched"]
    assert {cell["done"] for cell in told} == {cell["gradients"] for cell in told} == {120}
    text = (tmp_path / "out" / "kvaes.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| 5 modes |"))
    for cell, shown in zip(told, line.split(" | ")[2:], strict=False):
        of = [cell["figures"][split]["log_likelihood"] for split in ("train", "test")]
        assert shown == f"{of[0]:.3f} / {of[1]:.3f}"
    # What is finished is read, not made again; another config under the same name is refused.
    logs = sorted((tmp_path / "out").glob("*.log"))
    before = [log.read_text() for log in logs]
    kvaes.main([*words, "--", *QUICK])
    assert [log.read_text() for log in logs] == before
    with pytest.raises(SystemExit) as ended:
        kvaes.main([*words, "--", *QUICK, "--train.clip_norm", "1.0"])
    assert ended.value.code == 2
    assert "is of another config" in capsys.readouterr().err


def test_some_models_alone_are_run_and_told_without_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_all(chosen: list[Any], options: argparse.Namespace, splits: tuple[str, ...]) -> list[dict[str, Any]]:
        return [{**vars(cell), "done": cell.gradients, "seconds": {"train": 1.0, "evaluate": 2.0}} for cell in chosen]

    monkeypatch.setattr(kvaes, "run_all", run_all)
    words = f"--out {tmp_path} --only 5modes --columns VAE-50,matched -- {' '.join(QUICK)}".split()
    kvaes.main(words)
    told = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(" | ")[0] for line in told] == ["| 5modes-VAE-50-0", "| 5modes-matched-0"]
    assert not list(tmp_path.iterdir())
    known = [argparse.Namespace(column=column) for column in ("kVAEs", "bag", "VAE-50", "bag")]
    with pytest.raises(ValueError, match="--columns VAE-64 must be some of kVAEs,bag,VAE-50"):
        kvaes.only(known, ["bag", "VAE-64"])


def test_units_of_stored_rows_move_a_line_by_a_constant() -> None:
    def known(column: str, value: float) -> dict[str, Any]:
        figures = {"log_likelihood": value, "exact_log_likelihood": 1.0, "nmi": 0.5}
        split = {"train": figures, "test": {**figures, "log_likelihood": value - 1}}
        return {"problem": "9modes", "column": column, "seed": 0, "figures": split, "add_for_stored_units": -7.0}

    problem = cells.PROBLEMS["9modes"]
    lines = tables.likelihoods([problem], [known(c, i) for i, c in enumerate(problem.columns())]).splitlines()
    assert lines[2].split(" | ")[1:4] == ["1.000 / 1.000", "0.000 / -1.000", "1.000 / 0.000"]
    assert lines[3].split(" | ")[1:4] == ["-6.000 / -6.000", "-7.000 / -8.000", "-6.000 / -7.000"]
    assert lines[2].endswith("| 0.500 / 0.500 |")


def test_tables_go_between_their_marks_and_need_them() -> None:
    text = "Before.\n<!-- modes -->\nold\n<!-- end of modes -->\nAfter.\n"
    assert tables.put(text, {"modes": "new"}) == text.replace("old", "new")
    with pytest.raises(ValueError, match="<!-- modes -->"):
        tables.put("no marks", {"modes": "table"})


def test_tuning_takes_each_baseline_at_each_rate_with_a_share_of_its_epochs() -> None:
    options = argparse.Namespace(data_root=Path("none"), more=QUICK[:4])
    planned = cells.plan(cells.PROBLEMS["3modes"], options)
    found = cells.tuning(planned, 0.5, ["0.001", "0.01"])
    assert [cell.column for cell in found] == [c for c in ("bag", "VAE-50", "VAE-150", "matched") for _ in range(2)]
    assert kvaes.rates("0.1,0.2,0.1") == ["0.1", "0.2"]
    for cell in found:
        config = cells.read(cell.words)
        assert cell.seed == 0
        assert (cells.learning_rate(config), config.train.epochs) == (cell.rate, 78)
        schedule = config.train.schedule(config.train.optimizer([torch.nn.Parameter(torch.zeros(1))]))
        assert schedule.total_steps == 78
        assert schedule.optimizer.param_groups[0]["max_lr"] == cell.rate


@pytest.mark.parametrize(
    ("words", "named"),
    [
        *((f"--tune {share}", ("--tune", share)) for share in ("nan", "0", "1.5")),
        *((f"--tune 0.5 --rates {rates}", ("--rates", rates)) for rates in ("0.1,nix", "nan")),
        ("--only nix", ("--only", "nix", "3modes,5modes,9modes,mnist")),
        *((f"--docs {page}", ("--docs" if page == "absent.md" else page,)) for page in ("absent.md", "marks.md")),
        *((f"--docs marks.md {more}", ("--docs marks.md",)) for more in ("--only 3modes", "-- --seed 1")),
    ],
)
def test_options_that_cannot_be_are_refused_before_an_hour_is_spent(
    words: str,
    named: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("marks.md").write_text("no marks")
    with pytest.raises(SystemExit) as ended:
        kvaes.main(["--out", "out", *words.split()])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert all(name in error for name in named)
    assert not Path("out").exists()


@pytest.mark.parametrize("text", ["", '{"name"', "[]", "\0"])
def test_a_damaged_cell_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "5modes-bag-0.json").write_text(text)
    with pytest.raises(ValueError, match=r"5modes-bag-0\.json is damaged: remove it"):
        kvaes.kept(tmp_path / "5modes-bag-0.json")


def test_a_cell_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    options = kvaes.read_options(["--out", str(tmp_path), "--num-samples", "2", "--", *QUICK])
    cell = next(c for c in cells.plan(cells.PROBLEMS["5modes"], options) if c.column == "bag")
    left = tmp_path / cell.name / "checkpoints" / "step-000000001.partial"
    left.mkdir(parents=True)
    known = kvaes.finish(cell, options, ("test",))
    assert known["seconds"]["train"] > 0
    assert not left.exists()
    # Evaluation was interrupted: nobody knows any more how long the cell took.
    path = tmp_path / f"{cell.name}.json"
    path.write_text(
        json.dumps({k: v for k, v in known.items() if k in ("name", "num_samples", *vars(cell), "train_rows")})
    )
    again = kvaes.finish(cell, options, ("test",))
    assert again["figures"] == known["figures"]
    assert again["seconds"]["train"] is None
