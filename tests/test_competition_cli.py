"""What a user meets who lets experts compete: mistakes told in one line, and what can be done with such a run."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mixdist
from mixdist.competition.table import Assignment
from mixdist.data import Blobs
from tests.launch import HARD, ROOT, changed, complaint, here, refused, together, write_config
from tests.test_competition_resume import config_of


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Tables.

TRAIN = Blobs(num_classes=3, rows=120, test_rows=30, spread=0.2).load()[0]


def write_table(table: Assignment) -> Path:
    path = Path("table.npy")
    path.write_bytes(table.to_bytes())
    path.with_suffix(".json").write_text(json.dumps(table.describe()))
    return path


def even(num_samples: int = 120, num_experts: int = 3, data: str = TRAIN.fingerprint) -> Assignment:
    return Assignment.uniform(num_samples, num_experts, data, 0)


def alter(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def zipped() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=even().expert_N)
    return file.getvalue()


def rewrite(table: np.ndarray, pickled: bool = False) -> None:
    np.save("table.npy", table, allow_pickle=pickled)


DAMAGES: dict[str, Callable[[], Any]] = {
    "fingerprint": lambda: write_table(even(data="0" * 64)),
    "experts": lambda: write_table(even(num_experts=4)),
    "samples": lambda: write_table(even(num_samples=119)),
    "other": lambda: rewrite(even().expert_N[::-1].copy()),
    "bit": lambda: alter(Path("table.npy"), lambda b: b[:-1] + bytes([b[-1] ^ 1])),
    "cut": lambda: alter(Path("table.npy"), lambda b: b[:-7]),
    "empty": lambda: alter(Path("table.npy"), lambda b: b""),
    "open brackets": lambda: alter(Path("table.npy"), lambda b: b.replace(b")", b"(", 1)),
    "more rows than memory": lambda: alter(
        Path("table.npy"), lambda b: b.replace(b"(120,)", b"(9" + b"0" * 14 + b",)", 1)
    ),
    "pickle": lambda: rewrite(np.array([{}] * 120, dtype=object), pickled=True),
    "zip": lambda: Path("table.npy").write_bytes(zipped()),
    "signed": lambda: rewrite(even().expert_N.astype(np.int8)),  # the bytes, and so the checksum, are the same
    "alone": lambda: Path("table.json").unlink(),
    "cut json": lambda: Path("table.json").write_text("{"),
    "list": lambda: Path("table.json").write_text("[]"),
    "absent": lambda: Path("table.npy").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_table_that_does_not_belong_is_refused(damage: Callable[[], Any]) -> None:
    write_table(even())
    damage()
    config = changed(HARD, start="table", table="table.npy")
    refused("train", "--config", write_config(Path("c.yaml"), config), names="table.npy")


def test_a_run_goes_on_without_the_table_that_it_started_from(folder: Path) -> None:
    path = write_table(even())
    config = changed(HARD, start="table", table="table.npy", rounds=1)
    assert here("train", "--config", write_config(folder / "c.yaml", config), "--out", "run").code == 0
    path.unlink()
    ended = here("train", "--resume", "run", "--mixture.rounds", "2")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("round 2: ")


# What goes wrong in a round.

SICK = '''
"""An expert that falls ill in its fourth step, on one rank."""
import os
import torch
from mixdist.experts import VAE
from mixdist.nets import MLP
from mixdist.nets.mlp import FeedForward


class Sick(VAE):
    def anneal(self, step):
        super().anneal(step)
        if step == 3 and os.environ.get("RANK", "1") == "1":
            with torch.no_grad():
                for parameter in self.decoder.parameters():
                    parameter.fill_(float("nan"))


class Judge(FeedForward):
    """Fails when it has seen its first batch, on one rank."""

    def forward(self, x):
        logit = super().forward(x)
        return logit * float("nan") if self.training and os.environ.get("RANK", "1") == "1" else logit


class Judges(MLP):
    def encoder(self, shape, num_outputs):
        return Judge([*shape, *self.hidden, num_outputs])
'''
ILL = {"expert__class_path": "sick.Sick", "pretrain": [{"epochs": 1}], "train__batch_size": 5}
JUDGE = {"class_path": "sick.Judges", "init_args": {"hidden": [4]}}


def test_an_expert_that_is_not_finite_is_named(folder: Path) -> None:
    (folder / "sick.py").write_text(SICK)
    config = write_config(folder / "c.yaml", changed(HARD, **ILL))
    ended = here("train", "--config", config, "--out", "run")
    assert [line.partition(":")[0] for line in ended.out.splitlines()] == ["round 0"]
    line = complaint(ended._replace(out=""))
    assert line.startswith("in round 1: the loss of expert 0 ")
    assert "is not finite in its step 4" in line
    assert [json.loads(text)["step"] for text in (folder / "run/metrics.jsonl").read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("sick", ["expert", "discriminator"])
def test_one_rank_that_is_not_finite_ends_all(sick: str, folder: Path) -> None:
    (folder / "sick.py").write_text(SICK)
    changes: dict[str, Any] = {"delivery": "wire", "mesh": {"timeout_s": 60.0}, "block": 40}
    changes |= ILL if sick == "expert" else {"score__init_args__network": JUDGE}
    config = write_config(folder / "c.yaml", changed(HARD, **changes))
    ended = together("train", "--config", config, "--out", "run", ranks=2, folder=folder)
    assert ended.code == 1  # torchrun's own
    told = [line for line in ended.err.splitlines() if line.startswith("mixdist: ")]
    where = "in round 1" if sick == "expert" else "in round 0"
    assert len(told) == 1, ended.err
    assert re.match(rf"mixdist: {where}: the loss of {sick} [012] is not finite in its step ", told[0])
    assert "does not answer" not in ended.err


def test_a_score_that_is_no_number_names_the_expert(folder: Path) -> None:
    (folder / "odd.py").write_text(
        "import torch\nfrom mixdist.competition.scores import Random\n\n\nclass Odd(Random):\n    normalized = True\n\n"
        "    def column(self, e, *rest):\n        value = torch.inf if e == 1 else 0.0\n"
        "        return super().column(e, *rest) + value\n"
    )
    config = write_config(folder / "c.yaml", changed(HARD, score="odd.Odd"))
    line = complaint(here("train", "--config", config, "--out", "run"))
    assert line == "in round 0: expert 1 gives a sample a score that is not a number: lower learning rates"


# What can be done with a run.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train once, K = 4; tests work on copies."""
    made = tmp_path_factory.mktemp("hard")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        ended = here("train", "--config", config_of(made), "--out", "run")
    assert (ended.code, ended.err) == (0, "")
    return made


@pytest.fixture
def run(trained: Path, folder: Path) -> Path:
    return Path(shutil.copytree(trained, folder / "copy") / "run")


def test_a_run_has_its_tables(run: Path) -> None:
    files = {path.name for path in (run / "assignments").iterdir()}
    assert files == {f"round-{i:04d}.{kind}" for i in range(4) for kind in ("npy", "json")}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records[2:]:
        table = np.load(run / "assignments" / f"round-{record['round']:04d}.npy", allow_pickle=False)
        assert np.bincount(table, minlength=4).tolist() == record["counts"]
        assert table.dtype == np.uint8
    explained = (ROOT / "docs" / "competition.md").read_text().partition("has a line for each epoch of pretraining")[2]
    assert all(f"`{key}`" in explained for record in records for key in record)


def test_a_run_is_loaded_without_its_data(run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(run.parent)
    model = mixdist.load(run)
    train = Blobs(num_classes=3, rows=240, test_rows=40, spread=0.2).load().train
    table = np.load(run / "assignments" / "round-0003.npy", allow_pickle=False)
    # Scores of discriminators have no noise: the training set goes where the last round put it.
    assert torch.equal(model.assign(train.rows["x"]), torch.from_numpy(table.astype(np.int64)))
    responsible = model.responsibilities(train.rows["x"][:9])
    assert responsible.shape == (9, 4)
    assert torch.equal(responsible, torch.nn.functional.one_hot(torch.from_numpy(table[:9]).long(), 4).double())
    means, drawn = model.sample(5, 2), model.sample(5, 2, observed=True)
    assert means.shape == drawn.shape == (5, 2)
    assert (means != drawn).all()
    assert model.reconstruct(train.rows["x"][:9]).shape == (9, 2)
    with pytest.raises(ValueError, match="field 'x' has shape"):
        model.assign(torch.zeros(3, 5))


def test_a_run_is_evaluated_and_sampled(run: Path) -> None:
    ended = here("evaluate", str(run), "--num_samples", "20")
    assert (ended.code, ended.err) == (0, "")
    told = json.loads((run / "evaluation.json").read_text())
    counts = json.loads((run / "assignments" / "round-0003.json").read_text())["counts"]
    assert told["protocol"]["mixture"]["init_args"]["rounds"] == 3
    assert told["figures"]["routing_entropy"] == 0
    # The mixture has at least the winners' likelihoods times their shares.
    own = [(expert["rows"], expert["on_own_rows"]["log_likelihood"], expert["weight"]) for expert in told["experts"]]
    assert [weight for _, _, weight in own] == pytest.approx([count / 240 for count in counts])
    won = sum(rows * (log_px + np.log(weight)) for rows, log_px, weight in own if rows) / 40
    assert told["figures"]["elbo"] - 0.5 < won <= told["figures"]["log_likelihood"]
    ended = here("sample", str(run))
    assert (ended.code, ended.err) == (0, "")
    assert (run / "images" / "samples.png").exists()


def test_evaluation_is_the_same_on_two_ranks(run: Path) -> None:
    assert here("evaluate", str(run), "--num_samples", "20").code == 0
    one = json.loads((run / "evaluation.json").read_text())
    ended = together("evaluate", "run", "--num_samples", "20", ranks=2, folder=run.parent)
    assert ended.code == 0, ended.err
    two = json.loads((run / "evaluation.json").read_text())
    assert two["counts_EC"] == one["counts_EC"]
    for name, value in one["figures"].items():
        assert two["figures"][name] == pytest.approx(value, rel=1e-12, abs=1e-12), name


@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_a_run_before_its_first_scores_is_no_mixture(command: str, run: Path) -> None:
    for path in run.glob("checkpoints/step-*"):
        if path.name > "step-000000001":
            shutil.rmtree(path)
    refused(command, str(run), names="checkpoint scores")


@pytest.mark.parametrize("start", ["split", "table"])
def test_a_first_split_is_no_mixture_yet(start: str, folder: Path) -> None:
    write_table(even())
    rules = {"start": start, "table": "table.npy" if start == "table" else None}
    config = changed(HARD, checkpoint={"every": 1, "keep": 9}, **rules)
    assert here("train", "--config", write_config(folder / "c.yaml", config), "--out", "run").code == 0
    shutil.rmtree(folder / "run" / "checkpoints" / "step-000000004")
    assert here("evaluate", "run", "--num_samples", "2").code == 0  # inside the second round
    for step in (2, 3):
        shutil.rmtree(folder / "run" / "checkpoints" / f"step-{step:09d}")
    refused("evaluate", "run", names="checkpoint scores")


SGD: dict[str, Any] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}}


@pytest.mark.slow
def test_pretraining_may_have_another_optimiser_and_a_changed_one_is_told(folder: Path) -> None:
    config = changed(HARD, pretrain=[{"epochs": 1}], train={"epochs": 1, "batch_size": 30, "optimizer": SGD})
    for words in (["--config", write_config(Path("c.yaml"), config), "--out", "run"], ["--resume", "run"]):
        assert here("train", *words).code == 0
    other = ("--train.optimizer", "torch.optim.Adam", "--mixture.rounds", "3")
    refused("train", "--resume", "run", *other, names="SGD Adam")


def test_a_run_that_stopped_goes_on_when_its_rule_is_lowered(folder: Path) -> None:
    config = write_config(Path("c.yaml"), changed(HARD, stop_below=1.0, rounds=4))
    assert here("train", "--config", config, "--out", "run").code == 0
    tables = lambda: len(list(Path("run/assignments").glob("*.npy")))  # noqa: E731
    stopped = tables()
    assert stopped < 4
    assert here("train", "--resume", "run").code == 0
    assert tables() == stopped
    assert here("train", "--resume", "run", "--mixture.stop_below", "0").code == 0
    assert tables() == stopped + 4 - int(sorted(Path("run/assignments").glob("*.npy"))[stopped - 1].stem[-4:])


def test_a_bag_s_split_is_for_good_whoever_starves(folder: Path) -> None:
    few = np.zeros(120, dtype=np.int64)
    few[:3] = 1
    few[3:50] = 2
    write_table(Assignment.of(few, 3, TRAIN.fingerprint))
    rules = {"start": "table", "table": "table.npy", "starved": "reseed", "starved_below": 0.5, "rounds": 2}
    config = changed(HARD, **rules, score={"class_path": "mixdist.competition.Fixed"})
    assert here("train", "--config", write_config(Path("c.yaml"), config), "--out", "run").code == 0
    last = sorted(Path("run/assignments").glob("*.npy"))
    assert all(np.array_equal(np.load(path), few) for path in last)
