"""Sweeps: every cell once, whatever ends the command; settings chosen on valid rows; tables over seeds."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from mixdist.cli.sweep import read_plan
from mixdist.files import hold
from mixdist.messages import one_line
from mixdist.sweep import grid, table
from mixdist.sweep.cells import Cells, read_record
from mixdist.sweep.processes import Failed, Processes, Stopped
from mixdist.sweep.sweep import Sweep
from tests.errors import error_of, refusal_of
from tests.launch import HARD, Ended, Started, changed, descendants, here, write_config

BLOBS = {"class_path": "mixdist.data.Blobs", "init_args": {"num_classes": 3, "rows": 80, "test_rows": 20}}
FAST = ["--num_samples", "2", "--jobs", "1"]


class Killed(BaseException):
    """The end of a sweep at a chosen point, which nothing in it catches."""


class Commands:
    """Stands for the commands of a sweep: leaves in runs what they leave, at once, and ends the sweep at a point.

    Figures are a function of what was trained; a rate of 9 fails.
    """

    def __init__(self) -> None:
        self.run: list[str] = []
        self.points, self.end_at = 0, -1
        self.real = False

    def __call__(self, processes: Processes, words: list[str], log: IO[bytes], alone: bool = False) -> None:
        self.run.append(" ".join(words))
        self.point()
        if self.real:
            ended = here(*words)
            if ended.code:
                raise Failed(f"{words[0]}: {one_line(ended.err)}")
        elif words[0] == "evaluate":
            self.evaluate(Path(words[1]), words[3])
        else:
            self.train(words)
        self.point()

    def point(self) -> None:
        self.points += 1
        if self.points == self.end_at:
            raise Killed

    def train(self, words: list[str]) -> None:
        if words[1] == "--resume":
            run = Path(words[2])
            assert (run / "checkpoints" / "step-000000001").exists()
        else:
            run = Path(words[-1])
            run.mkdir()  # it must not be there
            (run / "trained").write_text(" ".join(words[:-1]))
            self.point()
            (run / "checkpoints" / "step-000000001").mkdir(parents=True)
        if "lr=9" in (run / "trained").read_text():
            raise Failed("train: the loss is not finite")
        self.point()

    def evaluate(self, run: Path, split: str) -> None:
        assert (run / "checkpoints" / "step-000000001").exists()
        trained = (run / "trained").read_text()
        chance = random.Random(f"{trained} {split}")
        figures = {"loss": chance.random(), "log_likelihood": chance.random()}
        if "means" in trained:
            figures = {"inertia": chance.random()}
        path = run / ("evaluation.json" if split == "test" else f"evaluation-{split}.json")
        path.write_text(json.dumps({"figures": figures, "protocol": {"data": "x", "rows": 9, "mixture": {}}}))


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Commands:
    """Stand in for the commands of cells, in a folder with configs."""
    found = Commands()
    monkeypatch.setattr(Processes, "run", lambda self, words, log, alone=False: found(self, list(words), log, alone))
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.chdir(tmp_path)
    gaussian = {"expert__init_args__likelihood": "gaussian", "expert__init_args__mean": "identity"}
    write_config(Path("soft.yaml"), changed(data=BLOBS, num_experts=3, **gaussian))
    write_config(Path("hard.yaml"), changed(HARD, data=BLOBS, rounds=1))
    return found


def sweep(*words: str, out: str = "out") -> Ended:
    cut = words.index("--") if "--" in words else len(words)
    return here("sweep", *words[:cut], "--out", out, *FAST, *words[cut:])


def told(out: str = "out") -> tuple[Any, str]:
    """Return the tables of a sweep without seconds."""
    report = json.loads((Path(out) / "table.json").read_text())
    for cell in report["cells"].values():
        del cell["seconds"]
    return report, (Path(out) / "table.md").read_text()


def test_the_table_is_of_what_each_run_was_evaluated_to(commands: Commands) -> None:
    commands.real = True
    ended = sweep("soft.yaml", "hard.yaml", "--seeds", "2", "--figures", "elbo")
    assert ended.code == 0, ended.err
    assert len(commands.run) == 2 * 2 * 2
    report, page = told()
    figures: dict[str, list[dict[str, float]]] = {
        name: [json.loads(Path(f"out/{name}-seed{s}/evaluation.json").read_text())["figures"] for s in range(2)]
        for name in ("soft", "hard")
    }
    for figure in ("elbo", "loss"):
        soft, hard = (np.array([one[figure] for one in figures[name]]) for name in ("soft", "hard"))
        own = report["figures"]["test"][figure]["hard"]
        assert list(own["values"].values()) == hard.tolist()
        assert (own["median"], own["min"], own["max"]) == (np.median(hard), hard.min(), hard.max())
        assert own["mean"] == pytest.approx(hard.mean(), rel=1e-12)
        assert own["standard_error"] == pytest.approx(hard.std(ddof=1) / np.sqrt(2), rel=1e-12)
        apart = own["difference"]
        assert apart["against"] == "soft"
        assert apart["mean"] == pytest.approx((hard - soft).mean(), rel=1e-9)
        assert apart["standard_error"] == pytest.approx((hard - soft).std(ddof=1) / np.sqrt(2), rel=1e-9)
    (line,) = (line for line in page.split("elbo, test rows")[1].split("**")[1].splitlines() if "| hard" in line)
    values = [one["elbo"] for one in figures["hard"]]
    assert float(line.split(" | ")[2]) == pytest.approx(statistics.median(values), abs=5e-4)
    assert "hard" in ended.out
    assert report["cells"]["hard-seed1"]["parameters"]["experts"] > 0


@pytest.mark.parametrize("settings", [[], ["--set", "train.lr=1e-3,0.3"]], ids=["one", "settings"])
def test_a_sweep_that_is_ended_anywhere_goes_on_to_the_same_table(commands: Commands, settings: list[str]) -> None:
    words = ["soft.yaml", *settings, "--seeds", "2", "--split", "test,train", "--out", "x", "--", "--valid", "0.2"]
    _, plan = read_plan(words)

    def go(out: str) -> dict[str, Any]:
        Path(out).mkdir(exist_ok=True)
        done = Sweep(plan, Cells(Path(out), Processes(1, 1), 5, lambda line: None))
        done.run(1)
        report = done.describe(None)
        for cell in report["cells"].values():
            del cell["seconds"]
        return report

    whole, points, number = go("whole"), commands.points, len(commands.run)
    assert points == 4 * sum("--seed" in line for line in commands.run) + 2 * sum(
        "--split" in line for line in commands.run
    )
    for point in range(1, points + 1):
        commands.run.clear()
        commands.points, commands.end_at = 0, point
        with pytest.raises(Killed):
            go(f"cut{point}")
        assert go(f"cut{point}") == whole
        assert len(commands.run) == number + 1  # none is run again but the one that was ended


def test_seconds_of_a_run_that_was_interrupted_are_unknown(commands: Commands) -> None:
    commands.end_at = 3  # behind the first checkpoint of the first run
    with pytest.raises(Killed):
        sweep("soft.yaml", "--seeds", "2")
    assert sweep("soft.yaml", "--seeds", "2").code == 0
    cells = json.loads(Path("out/table.json").read_text())["cells"]
    assert cells["soft-seed0"]["seconds"]["train"] is None
    assert cells["soft-seed1"]["seconds"]["train"] > 0


@pytest.mark.parametrize("text", ["", '{"name"', "[]", "{}", "\0"])
def test_a_damaged_record_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "cell.json").write_text(text)
    error_of(lambda: read_record(tmp_path / "cell.json"), tmp_path / "cell.json", "damaged")


def test_a_setting_is_chosen_on_valid_rows_and_it_alone_sees_test_rows(commands: Commands) -> None:
    commands.real, by = True, ("--select", "elbo")
    ended = sweep("soft.yaml", "--set", "train.lr=1e-3,0.3", "--seeds", "1", *by, "--", "--valid", "0.25")
    assert ended.code == 0, ended.err
    report, page = told()
    means = {}
    for lr in ("1e-3", "0.3"):
        runs = [Path(f"out/soft-train.lr={lr}-seed{s}") for s in range(1)]
        on_valid = [json.loads((run / "evaluation-valid.json").read_text())["figures"] for run in runs]
        means[lr] = statistics.fmean(one["elbo"] for one in on_valid)
    best, other = sorted(means, key=lambda lr: -means[lr])
    assert report["settings"]["soft"]["chosen"] == {"train.lr": best}
    assert [run.parent.name for run in sorted(Path("out").glob("*/evaluation.json"))] == [f"soft-train.lr={best}-seed0"]
    assert not any(f"lr={other}" in line and "--split test" in line for line in commands.run)
    assert "chosen" in page
    assert "lr: 0.3" in Path("out/soft-train.lr=0.3-seed0/config.yaml").read_text()


def test_a_figure_that_no_setting_has_cannot_choose(commands: Commands) -> None:
    words = ["soft.yaml", "--set", "train.lr=1e-3,0.3", "--seeds", "1"]
    ended = sweep(*words, "--select", "nix", "--", "--valid", "0.25")
    assert ended.code == 2
    assert all(word in ended.err for word in ("--select", "nix", "log_likelihood"))
    assert ".log" not in ended.err
    assert sweep(*words, "--select", "log_likelihood", "--", "--valid", "0.25").code == 0


def test_a_mode_that_contradicts_the_figure_of_its_own_choice_chooses_nothing(commands: Commands) -> None:
    words = ["soft.yaml", "--set", "train.lr=1e-3,0.3", "--seeds", "1"]
    ended = sweep(*words, "--mode", "min", "--", "--valid", "0.25")
    assert ended.code == 2
    assert all(word in ended.err for word in ("--mode", "min", "log_likelihood", "large"))
    assert sweep(*words, "--", "--valid", "0.25").code == 0


def test_settings_of_one_row_may_share_their_valid_rows(commands: Commands) -> None:
    assert sweep("soft.yaml", "--set", "valid=20,0.25", "--seeds", "1").code == 0


def test_a_cell_that_fails_leaves_the_others_and_is_tried_again(commands: Commands) -> None:
    words = ["soft.yaml", "broken=soft.yaml --train.optimizer.init_args.lr=9", "--seeds", "2"]
    ended = sweep(*words)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "broken-seed0" in ended.err
    report, page = told()
    assert list(report["failed"]) == ["broken-seed0", "broken-seed1"]
    assert "broken-seed0 failed: train: " in page
    assert list(report["figures"]["test"]["loss"]) == ["soft"]
    commands.run.clear()
    assert sweep(*words).code == 2
    assert all("broken" in line for line in commands.run)
    assert len(commands.run) == 2


def test_a_sweep_may_grow_and_says_what_else_differs(commands: Commands) -> None:
    assert sweep("soft.yaml", "--seeds", "1").code == 0
    commands.run.clear()
    assert sweep("soft.yaml", "hard.yaml", "--seeds", "2").code == 0
    assert len(commands.run) == 2 * 2 * 2 - 2
    commands.run.clear()
    for words, named in (
        (["soft.yaml", "hard.yaml", "--seeds", "1"], ["--seeds 2", "1"]),
        (["soft.yaml", "--seeds", "2"], ["hard"]),
        (["soft.yaml", "hard.yaml", "--seeds", "2", "--", "--train.epochs", "2"], ["train.epochs 1", "2"]),
        (["soft.yaml", "hard.yaml", "--seeds", "2", "--set", "train.lr=0.1"], ["--set", "train.lr"]),
    ):
        before = told()
        refusal_of("sweep", *words[: words.index("--")] if "--" in words else words, "--out", "out", *FAST,
                   *(words[words.index("--") :] if "--" in words else []), named=["out", *named])  # fmt: skip
        assert told() == before
    refusal_of("sweep", "soft.yaml", "--out", "out", "--num_samples", "3", named=["hard", "out"])
    assert commands.run == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("soft.yaml --set train.optimizer.lrr=1,2 -- --valid 0.1", ["train.optimizer", "lrr", "lr"]),
        ("soft.yaml --set train.epochs=two,3 -- --valid 0.1", ["train.epochs", "two", "whole number"]),
        ("soft.yaml --set train.epochs=1,2", ["soft", "valid", "2 settings"]),
        ("soft.yaml --set train.epochs", ["--set", "train.epochs", "KEY=VALUE"]),
        ("soft.yaml --set mixture.hidden=[8],[9] -- --valid 0.1", ["mixture.hidden", "gate", "expert"]),
        ("soft.yaml --set train.epochs=1,1 -- --valid 0.1", ["train.epochs", "twice"]),
        ("soft.yaml --set train.lr=1e-2,0.01 -- --valid 0.1", ["1e-2", "0.01", "twice"]),
        ("soft.yaml --set seed=1,2", ["seed", "--seeds"]),
        ("soft.yaml --set train.lr=[1,2", ["train.lr=[1,2", "brackets"]),
        ("soft.yaml --seeds 0", ["--seeds", "0", "1 or more"]),
        ("soft.yaml --jobs 0", ["--jobs", "0", "1 or more"]),
        ("soft.yaml --ranks 0", ["--ranks", "0", "1 or more"]),
        ("soft.yaml --num_samples 0", ["--num_samples", "0", "1 or more"]),
        ("soft.yaml --seeds two", ["seeds", "two"]),
        ("missing.yaml", ["missing.yaml"]),
        ("soft.yaml soft.yaml", ["soft.yaml", "NAME="]),
        ("'my model=soft.yaml --train.epochs 3'", ["my model=soft.yaml", "NAME", "spaces"]),
        ("soft.yaml --baselines ppca,nix", ["--baselines", "nix", "ppca"]),
        ("soft.yaml --split test,nix", ["--split", "nix", "valid"]),
        ("soft.yaml --split valid", ["soft", "valid"]),
        ("soft.yaml --against hard", ["--against", "hard", "soft"]),
        ("soft.yaml --docs page.md", ["--docs", "page.md"]),
        ("soft.yaml -- --train.epoch 3", ["train.epoch", "epochs"]),
        ("soft.yaml -- --out elsewhere", ["out"]),
        ("soft.yaml -- --seed 3", ["--seed", "--seeds"]),
        ("soft.yaml -- --config hard.yaml", ["--config", "CONFIG"]),
        ("soft.yaml --baselines ppca -- --out=elsewhere", ["--out", "folder"]),
        ("soft.yaml --set train.epochs=1 --set train.epochs=2", ["train.epochs", "--set"]),
        ("soft.yaml --set train.lr=1 --set train.optimizer.lr=2", ["lr", "--set"]),
        ("soft.yaml --set valid=0.1,0.2", ["--set", "soft valid=0.2", "soft valid=0.1", "valid rows"]),
        ("soft.yaml --set data.rows=80,70 -- --valid 0.1", ["--set", "data.rows=70", "valid rows"]),
        ("soft.yaml --set valid=0.1,null", ["soft", "valid", "2 settings"]),
        ("soft.yaml --select loss --mode max", ["--mode", "max", "loss", "small"]),
        ("soft.yaml --select exact_log_likelihood", ["--select", "exact_log_likelihood", "constant"]),
        ("soft.yaml -- --valid 81", ["valid", "81", "80"]),
        ("soft.yaml --nix 3", ["--nix"]),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_run(words: str, named: list[str], commands: Commands) -> None:
    given, _, more = words.partition(" -- ")
    refusal_of("sweep", *shlex.split(given), "--out", "out", *(["--", *more.split()] if more else []), named=named)
    assert not Path("out").exists()
    assert commands.run == []


def test_a_folder_of_something_else_and_one_in_use_are_refused(commands: Commands) -> None:
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    refusal_of("sweep", "soft.yaml", "--out", "full", named=["full"])
    Path("busy").mkdir()
    with hold(Path("busy/.lock")):
        refusal_of("sweep", "soft.yaml", "--out", "busy", named=["busy", os.getpid()])
    assert commands.run == []


def test_rows_without_a_figure_in_common_are_refused_and_kept(commands: Commands) -> None:
    Path("means.yaml").write_text(Path("soft.yaml").read_text())
    words = ["soft.yaml", "means.yaml", "--seeds", "1", "--out", "out", *FAST]
    refusal_of("sweep", *words, named=["soft", "means", "inertia", "loss"])
    assert list(told_cells("out")) == ["soft-seed0", "means-seed0"]
    refusal_of("sweep", *words, "--figures", "loss,nix", named=["nix", "loss", "inertia"])
    assert here("sweep", *words, "--figures", "loss").code == 0


def told_cells(out: str) -> Any:
    return json.loads((Path(out) / "table.json").read_text())["cells"]


def test_values_are_split_at_commas_outside_brackets_and_quotes() -> None:
    assert grid.read_axis("a.b=1e-3, 2").values == ("1e-3", "2")
    assert grid.read_axis("a=[1, 2],{b: [3], c: 'x,y'},'u,v'").values == ("[1, 2]", "{b: [3], c: 'x,y'}", "'u,v'")
    assert grid.read_axis("a,b=1,2") == ("a,b", ("1", "2"))


def test_a_shortened_key_is_the_one_that_it_fits() -> None:
    config = {"train": {"epochs": 1, "optimizer": {"class_path": "x", "init_args": {"lr": 1}}}, "seed": 0}
    assert grid.full_key("train.lr", config) == "train.optimizer.init_args.lr"
    assert grid.full_key("train.optimizer.lr", config) == "train.optimizer.init_args.lr"
    for key in ("train.epochs", "lr", "train.nix", "optimizer.lr", "seed"):
        assert grid.full_key(key, config) == key


def test_names_of_files_differ_where_texts_do() -> None:
    texts = ["a b=[1,2]", "a b=[1;2]", "a b={c: 1}", "a" * 200, "a" * 201, "../../etc", "a/b"]
    names = [grid.file_name(text) for text in texts]
    assert len(set(names)) == len(texts)
    assert all("/" not in name and len(name) < 100 for name in names)


def test_tables_go_between_their_marks_and_need_them() -> None:
    text = "Before.\n<!-- modes -->\nold\n<!-- end of modes -->\nAfter.\n"
    assert table.put(text, "modes", "new \\1") == text.replace("old", "new \\1")
    error_of(lambda: table.put("no marks", "modes", "table"), "<!-- modes -->")


@pytest.mark.parametrize(("values", "error", "shown"), [([0.75], 0.0012, 4), ([492.84], None, 1), ([-55784.0], 31.0, 0),
                                                       ([0.0], None, 3), ([1.0], 0.0, 3)])  # fmt: skip
def test_decimals_show_two_digits_of_the_error(values: list[float], error: float | None, shown: int) -> None:
    assert table.decimals(values, error) == shown


def test_rows_of_other_data_or_meaning_are_not_compared() -> None:
    def record(value: float, data: str, likelihood: str = "density") -> Any:
        protocol = {"data": data, "rows": 9, "likelihood": likelihood}
        return {"figures": {"test": {"loss": value, "nmi": value}}, "protocol": {"test": protocol}}

    rows = {"a": {0: record(1.0, "x")}, "b": {0: record(2.0, "y")}, "c": {0: record(5.0, "y")}}
    rows["d"] = {0: record(7.0, "y", "mass")}
    found = table.describe(rows, "test", None)["loss"]
    # Nor are a density and a mass, but clusters are.
    assert found["d"]["difference"] == {"against": "b", "differs": "likelihood"}
    assert table.describe(rows, "test", None)["nmi"]["d"]["difference"]["mean"] == 5.0
    labels = {name: {0: record(1.0, "y")} for name in "ab"}
    for name, records in labels.items():
        records[0]["protocol"]["test"]["label"] = name
    assert table.describe(labels, "test", None)["nmi"]["b"]["difference"] == {"against": "a", "differs": "label"}
    assert "another likelihood" in table.figure_table(rows, "test", "loss", None).text()
    assert "difference" not in found["a"]
    assert "difference" not in found["b"]
    assert (found["c"]["difference"]["against"], found["c"]["difference"]["mean"]) == ("b", 3.0)
    assert found["c"]["standard_error"] is None


def test_a_cell_waits_for_what_an_earlier_sweep_left_running(tmp_path: Path) -> None:
    processes, lines = Processes(1, 1), list[str]()
    with processes.claim(tmp_path / "cell.log", lines.append) as log:
        left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5); print('end')"], stdout=log)
    with processes.claim(tmp_path / "cell.log", lines.append) as log:
        assert left.wait() == 0
    assert (tmp_path / "cell.log").read_text() == "end\n"
    assert len(lines) == 1
    assert "cell" in lines[0]


def test_the_own_line_of_a_command_that_fails_is_told(tmp_path: Path) -> None:
    processes = Processes(1, 1)
    with processes.claim(tmp_path / "cell.log", print) as log:
        error_of(lambda: processes.run(["nix"], log), "nix: unknown command 'nix'", kind=Failed)
        processes.end()
        with pytest.raises(Stopped):
            processes.run(["nix"], log)


def folder_of(tmp_path: Path) -> list[str]:
    """Write the configs of a sweep whose cells train for some seconds and save often; return its words."""
    data = {**BLOBS, "init_args": {**BLOBS["init_args"], "rows": 600}}
    cells = {"num_experts": 2, "train__epochs": 12, "train__batch_size": 20, "checkpoint": {"every": 20}}
    soft = changed(data=data, execution="loop", **cells)  # auto takes what is faster, and that rounds otherwise
    soft["mixture"]["init_args"]["expert"]["init_args"] |= {"likelihood": "gaussian", "mean": "identity"}
    write_config(tmp_path / "soft.yaml", {**soft, "dtype": "float64"})
    hard = changed(HARD, data=data, rounds=4, train__epochs=2)
    write_config(tmp_path / "hard.yaml", {**hard, "dtype": "float64"})
    return ["mixdist", "sweep", "soft.yaml", "hard.yaml", "--seeds", "2", "--jobs", "2", "--num_samples", "3", "--out"]


@pytest.mark.slow
def test_a_sweep_killed_at_five_seeded_points_ends_in_the_same_table(tmp_path: Path) -> None:
    words, chance = folder_of(tmp_path), random.Random(0)
    begin = time.monotonic()
    with Started([*words, "whole"], tmp_path, {}) as whole:
        assert whole.end().code == 0
    took = time.monotonic() - begin
    for point, victim in enumerate(("sweep", "child", "both", "sweep", "both")):
        with Started([*words, f"cut{point}"], tmp_path, {}) as one:
            time.sleep(chance.uniform(0.1, 0.9) * took)
            kill(one, victim)
            one.end()
        with Started([*words, f"cut{point}"], tmp_path, {}) as one:
            ended = one.end()
        assert ended.code == 0, ended.err
        assert told(str(tmp_path / f"cut{point}")) == told(str(tmp_path / "whole"))


def kill(started: Started, victim: str) -> None:
    """Kill a sweep, one of its commands, or all of them."""
    if started.process.poll() is not None:
        return
    children = descendants(started.process.pid)
    if victim == "both":
        return started.kill()
    if victim == "sweep":
        started.process.kill()
    elif children:
        os.kill(children[-1], signal.SIGKILL)


@pytest.mark.slow
def test_ctrl_c_ends_all_commands_and_says_how_to_go_on(tmp_path: Path) -> None:
    words = folder_of(tmp_path)
    with Started([*words, "out"], tmp_path, {}) as one:
        one.until(lambda: any((tmp_path / "out").glob("*/checkpoints/step-*")))
        children = descendants(one.process.pid)
        os.kill(one.process.pid, signal.SIGINT)
        ended = one.end()
    assert ended.code == 130
    assert "the same command goes on" in ended.err
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


@pytest.mark.slow
def test_cells_on_two_ranks_have_the_figures_of_one(tmp_path: Path) -> None:
    words = folder_of(tmp_path)
    for ranks in ("1", "2"):
        with Started([*words, f"out{ranks}", "--ranks", ranks, "--", "--train.epochs", "1"], tmp_path, {}) as one:
            ended = one.end()
        assert ended.code == 0, ended.err
    one, two = (told(str(tmp_path / f"out{ranks}"))[0]["figures"]["test"]["log_likelihood"] for ranks in "12")
    for name in ("soft", "hard"):
        assert two[name]["mean"] == pytest.approx(one[name]["mean"], rel=1e-9)
