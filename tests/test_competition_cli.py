"""What a user meets who lets experts compete: mistakes told in one line, and what can be done with such a run."""

from __future__ import annotations

import copy
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
from tests.launch import REMOVED, ROOT, here, mlp, together, write_config
from tests.test_cli import OWN_DATA, complaint, refused
from tests.test_competition_resume import config_of

DISCRIMINATORS: dict[str, Any] = {
    "class_path": "mixdist.competition.Discriminators",
    "init_args": {
        "network": mlp(8),
        "batch_size": 40,
    },
}
HARD: dict[str, Any] = {
    "data": {
        "class_path": "mixdist.data.Blobs",
        "init_args": {"num_classes": 3, "rows": 120, "test_rows": 30, "spread": 0.2},
    },
    "expert": {
        "class_path": "mixdist.experts.VAE",
        "init_args": {"network": mlp(6), "latent": 2, "likelihood": "gaussian", "mean": "identity"},
    },
    "num_experts": 3,
    "competition": {"rounds": 2, "score": DISCRIMINATORS},
    "train": {"epochs": 1, "batch_size": 30},
}
REGRESSOR = {"class_path": "mixdist.experts.Regressor", "init_args": {"input": "x", "target": "x"}}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changed(**changes: Any) -> dict[str, Any]:
    """Give HARD with other values, as tests/launch.py does."""
    config = copy.deepcopy(HARD)
    for path, value in changes.items():
        *outer, last = path.split("__")
        section = config
        for key in outer:
            section = section.setdefault(key, {})
        if value is REMOVED:
            del section[last]
        else:
            section[last] = value
    return config


def refused_config(**changes: Any) -> str:
    return refused("train", "--config", write_config(Path("c.yaml"), changed(**changes)))


BALANCED = {"init_args": {"balance": {"class_path": "mixdist.mixtures.VarianceBalance"}}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"train__objective": {"class_path": "mixdist.mixtures.MixtureLikelihood"}},
            ["train.objective (MixtureLikelihood) needs all experts' losses of a sample", "leave the objective out"],
        ),
        (
            {"train__objective": {"class_path": "mixdist.mixtures.WeightedLoss", **BALANCED}},
            ["train.objective (WeightedLoss with balance or entropy) needs all experts'"],
        ),
        (
            {"pretrain": [{"objective": {"class_path": "mixdist.mixtures.MixtureLikelihood"}}]},
            ["pretrain[0].objective (MixtureLikelihood) needs all"],
        ),
        ({"gate": {"class_path": "mixdist.gates.Softmax"}}, ["gate is given, but in a competition", "leave gate out"]),
        ({"routing": {"k": 2}}, ["routing is given, but in a competition", "leave routing out"]),
        ({"execution": "stacked"}, ["execution is given, but in a competition"]),
        ({"dispatch__one_way": True}, ["dispatch.one_way is given, but"]),
        ({"dispatch__prefetch": True}, ["dispatch.prefetch is given, but"]),
        ({"train__trains": "gate"}, ["train.trains (gate) means nothing in a competition: leave it out"]),
        ({"train__accumulate": 2}, ["train.accumulate (2) means nothing in a competition", "compute.micro_batch"]),
        ({"competition": REMOVED}, ["needs a gate (soft mixture) or a competition", "has neither: set gate"]),
        ({"competition__rounds": 0}, ["competition.rounds (0) must be at least 1"]),
        ({"competition__block": 0}, ["competition.block (0) must be at least 1"]),
        ({"competition__starved_below": 1.5}, ["competition.starved_below (1.5) must be a share from 0 to 1"]),
        ({"competition__stop_below": -0.1}, ["competition.stop_below (-0.1) must be a share from 0 to 1"]),
        ({"competition__starved": "feed"}, ["competition.starved (feed) must be none, freeze or reseed"]),
        ({"competition__start": "table"}, ["competition.start (table) and competition.table (None) do not fit"]),
        ({"competition__table": "t.npy"}, ["competition.start (all) and competition.table (t.npy) do not fit"]),
        ({"competition__round": 3}, ["unknown config key competition.round:", "did you mean rounds?"]),
        ({"train__epochs": 0}, ["train.epochs (0) must be above 0"]),
        ({"pretrain": [{"epochs": 0}]}, ["pretrain[0].epochs (0) must be above 0"]),
        ({"num_experts": 121}, ["num_experts (121) must be at most the number of training samples (120)"]),
        (
            {"competition__score": {"class_path": "mixdist.competition.LabelOracle", "init_args": {"field": "label"}}},
            ["the score LabelOracle needs the label 'label', but the data has labels ['y']"],
        ),
        (
            {"competition__score": {"class_path": "mixdist.competition.LabelOracle"}, "num_experts": 2},
            ["the score LabelOracle has 3 classes for 2 experts: set num_experts to 3"],
        ),
        (
            {"competition__score__init_args__epoch": 3},
            ["unknown config key competition.score.init_args.epoch:", "did you mean epochs?"],
        ),
        (
            {"competition__score__init_args__network__init_args__hiden": [3]},
            ["unknown config key competition.score.init_args.network.init_args.hiden:", "did you mean hidden?"],
        ),
        ({"competition__score__init_args__batches": 0}, ["Discriminators' batches (0) must be at least 1"]),
        (
            {"competition__score__class_path": "mixdist.competition.Discriminator"},
            ["(mixdist.competition.Discriminator) must be a subclass of Score"],
        ),
        (
            {"competition__score": {"class_path": "mixdist.competition.Score"}},
            ["is the base class of what can stand there"],
        ),
        (
            {"expert": REGRESSOR},
            ["Discriminators need experts that draw, and Regressor does not", "take the score Elbo"],
        ),
        (
            {
                "expert": {"class_path": "mixdist.experts.Centroid"},
                "competition__score": {"class_path": "mixdist.competition.Likelihood"},
            },
            ["the score Likelihood needs importance weights, which Centroid has not: take Elbo"],
        ),
        (
            {"competition__score": {"class_path": "mixdist.competition.Likelihood", "init_args": {"num_samples": 0}}},
            ["Likelihood's num_samples (0) must be at least 1"],
        ),
    ],
)
def test_what_cannot_compete_is_refused(changes: dict[str, Any], told: list[str]) -> None:
    line = refused_config(**changes)
    assert all(part in line for part in told), line


NETWORK = "competition__score__init_args__network"
PARABOLAS = {"data": {"class_path": "mixdist.data.Parabolas"}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({f"{NETWORK}__class_path": "mixdist.nets.Conv", f"{NETWORK}__init_args": {}}, "images"),
        ({f"{NETWORK}__init_args__hidden": [0]}, "[2, 0, 1]"),
        (
            {**PARABOLAS, "competition__score__init_args__reads": "y"},
            "Discriminators' reads (y) must be the field that VAE samples: set it to x",
        ),
        (
            {"competition__score__init_args__optimizer": {"class_path": "torch.optim.LBFGS"}},
            "competition.score.init_args.optimizer cannot be used (",
        ),
        ({"competition__score": "weighing.Weighing"}, "competition.score (Weighing) needs the field 'w', but the data"),
    ],
    ids=["conv", "width", "field", "optimizer", "score"],
)
def test_what_only_scoring_needs_is_tried_before_training(changes: dict[str, Any], told: str, folder: Path) -> None:
    (folder / "weighing.py").write_text(
        'from mixdist.competition.scores import Random\n\n\nclass Weighing(Random):\n    fields = ("w",)\n'
    )
    assert told in refused_config(pretrain=[{"epochs": 1}], **changes)


def test_an_oracle_needs_labels(folder: Path) -> None:
    (folder / "own_rows.py").write_text(OWN_DATA)
    oracle = {"class_path": "mixdist.competition.LabelOracle"}
    line = refused_config(data={"class_path": "own_rows.Rows"}, competition__score=oracle)
    assert line == ("the score LabelOracle needs the label 'y', but the data has no labels: choose another score")


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


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda: write_table(even(data="0" * 64)), "belongs to the data set 0000000000000000, but the training set is"),
        (lambda: write_table(even(num_experts=4)), "has 4 experts, but num_experts is 3"),
        (lambda: write_table(even(num_samples=119)), "does not hold an expert from 0 to 2 for each of 120 samples"),
        (lambda: rewrite(even().expert_N[::-1].copy()), "differs from its checksum: take another"),
        (lambda: alter(Path("table.npy"), lambda b: b[:-1] + bytes([b[-1] ^ 1])), "differs from its checksum"),
        (lambda: alter(Path("table.npy"), lambda b: b[:-7]), "is no .npy file ("),
        (lambda: alter(Path("table.npy"), lambda b: b""), "is no .npy file ("),
        # A header whose brackets never close, and one that claims more rows than any memory has.
        (lambda: alter(Path("table.npy"), lambda b: b.replace(b")", b"(", 1)), "is no .npy file ("),
        (lambda: alter(Path("table.npy"), lambda b: b.replace(b"(120,)", b"(9" + b"0" * 14 + b",)", 1)), "is no .npy"),
        (lambda: rewrite(np.array([{}] * 120, dtype=object), pickled=True), "is no .npy file (Object arrays cannot"),
        (lambda: Path("table.npy").write_bytes(zipped()), "is no .npy file ("),
        (lambda: Path("table.json").unlink(), "cannot be read with its .json beside it ("),
        (lambda: Path("table.json").write_text("{"), "cannot be read with its .json beside it ("),
        (lambda: Path("table.json").write_text("[]"), "has beside it no .json that tells of it"),
        (lambda: Path("table.npy").unlink(), "cannot be read with its .json beside it ("),
    ],
    ids=[
        "fingerprint",
        "experts",
        "samples",
        "other",
        "bit",
        "cut",
        "empty",
        "brackets",
        "rows",
        "pickle",
        "zip",
        "alone",
        "json",
        "list",
        "absent",
    ],
)
def test_a_table_that_does_not_belong_is_refused(damage: Callable[[], Any], told: str) -> None:
    write_table(even())
    damage()
    assert told in refused_config(competition__start="table", competition__table="table.npy")


def test_a_run_goes_on_without_the_table_that_it_started_from(folder: Path) -> None:
    path = write_table(even())
    config = changed(competition__start="table", competition__table="table.npy", competition__rounds=1)
    assert here("train", "--config", write_config(folder / "c.yaml", config), "--out", "run").code == 0
    path.unlink()
    ended = here("train", "--resume", "run", "--competition.rounds", "2")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("round 2: ")


def test_signed_numbers_are_no_table() -> None:
    path = write_table(even())
    signed = even().expert_N.astype(np.int8)
    rewrite(signed)
    about = json.loads(path.with_suffix(".json").read_text())  # the bytes, and so the checksum, are the same
    assert about["sha256"] == even().describe()["sha256"]
    line = refused_config(competition__start="table", competition__table="table.npy")
    assert "does not hold an expert from 0 to 2" in line


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
    config = write_config(folder / "c.yaml", changed(**ILL))
    ended = here("train", "--config", config, "--out", "run")
    assert [line.partition(":")[0] for line in ended.out.splitlines()] == ["round 0"]
    line = complaint(ended._replace(out=""))
    assert line.startswith("round 1: the loss of expert 0 ")
    assert "is not finite in its step 4: no parameter of it was changed; lower the learning rate" in line
    assert [json.loads(text)["step"] for text in (folder / "run/metrics.jsonl").read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("sick", ["expert", "discriminator"])
def test_one_rank_that_is_not_finite_ends_all(sick: str, folder: Path) -> None:
    (folder / "sick.py").write_text(SICK)
    changes: dict[str, Any] = {"competition__delivery": "wire", "mesh": {"timeout_s": 60.0}, "competition__block": 40}
    changes |= ILL if sick == "expert" else {"competition__score__init_args__network": JUDGE}
    config = write_config(folder / "c.yaml", changed(**changes))
    ended = together("train", "--config", config, "--out", "run", ranks=2, folder=folder)
    assert ended.code == 1  # torchrun's own
    told = [line for line in ended.err.splitlines() if line.startswith("mixdist: ")]
    where = "round 1" if sick == "expert" else "round 0"
    assert len(told) == 1, ended.err
    assert re.match(rf"mixdist: {where}: the loss of {sick} [012] is not finite in its step ", told[0])
    assert "does not answer" not in ended.err


def test_a_score_that_is_no_number_names_the_expert(folder: Path) -> None:
    (folder / "odd.py").write_text(
        "import torch\nfrom mixdist.competition.scores import Random\n\n\nclass Odd(Random):\n    normalized = True\n\n"
        "    def column(self, e, *rest):\n        value = torch.inf if e == 1 else 0.0\n"
        "        return super().column(e, *rest) + value\n"
    )
    line = complaint(
        here(
            "train", "--config", write_config(folder / "c.yaml", changed(competition__score="odd.Odd")), "--out", "run"
        )
    )
    assert line == "round 0: expert 1 gives a sample a score that is not a number: lower learning rates"


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


def test_a_run_has_its_tables_and_pictures(run: Path) -> None:
    files = {path.name for path in (run / "assignments").iterdir()}
    assert files == {f"round-{i:04d}.{kind}" for i in range(4) for kind in ("npy", "json")}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records[2:]:
        table = np.load(run / "assignments" / f"round-{record['round']:04d}.npy", allow_pickle=False)
        assert np.bincount(table, minlength=4).tolist() == record["counts"]
        assert table.dtype == np.uint8
    assert (run / "images" / "experts.png").exists()
    explained = (ROOT / "docs" / "competition.md").read_text().partition("has a line for each epoch of pretraining")[2]
    assert all(f"`{key}`" in explained for record in records for key in record)


def test_a_run_is_loaded_without_its_data(run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(run.parent)
    model = mixdist.load(run)
    train, _ = Blobs(num_classes=3, rows=240, test_rows=40, spread=0.2).load()
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
    assert told["protocol"]["gate"] is None
    assert told["figures"]["routing_entropy"] == 0
    # The winner's likelihood is at least its share of the mixture's, and the mixture's is a density.
    own, shares = told["figures"]["log_likelihood_gate"], told["figures"]["log_likelihood_shares"]
    assert shares >= own + np.log(max(counts) / 240) - 5
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
        assert two["figures"][name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_a_run_before_its_first_scores_is_no_mixture(command: str, run: Path) -> None:
    for path in run.glob("checkpoints/step-*"):
        if path.name > "step-000000001":
            shutil.rmtree(path)
    ended = here(command, str(run))
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert "is from before the first scores: no mixture yet: continue training" in ended.err


@pytest.mark.parametrize("start", ["split", "table"])
def test_a_first_split_is_no_mixture_yet(start: str, folder: Path) -> None:
    write_table(even())
    rules = {"competition__start": start, "competition__table": "table.npy" if start == "table" else None}
    config = changed(checkpoint={"every": 1, "keep": 9}, **rules)
    assert here("train", "--config", write_config(folder / "c.yaml", config), "--out", "run").code == 0
    shutil.rmtree(folder / "run" / "checkpoints" / "step-000000004")
    assert here("evaluate", "run", "--num_samples", "2").code == 0  # inside the second round
    for step in (2, 3):
        shutil.rmtree(folder / "run" / "checkpoints" / f"step-{step:09d}")
    assert "no mixture yet" in complaint(here("evaluate", "run"))


SGD: dict[str, Any] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}}


def test_pretraining_may_have_another_optimiser_and_a_changed_one_is_told(folder: Path) -> None:
    config = changed(pretrain=[{"epochs": 1}], train={"epochs": 1, "batch_size": 30, "optimizer": SGD})
    for words in (["--config", write_config(Path("c.yaml"), config), "--out", "run"], ["--resume", "run"]):
        assert here("train", *words).code == 0
    told = refused("train", "--resume", "run", "--train.optimizer", "torch.optim.Adam", "--competition.rounds", "3")
    assert "was made with the optimiser SGD, the config has Adam: resume with the run's own" in told


def test_a_run_that_stopped_goes_on_when_its_rule_is_lowered(folder: Path) -> None:
    config = write_config(Path("c.yaml"), changed(competition__stop_below=1.0, competition__rounds=4))
    assert here("train", "--config", config, "--out", "run").code == 0
    tables = lambda: len(list(Path("run/assignments").glob("*.npy")))  # noqa: E731
    stopped = tables()
    assert stopped < 4
    assert here("train", "--resume", "run").code == 0
    assert tables() == stopped
    assert here("train", "--resume", "run", "--competition.stop_below", "0").code == 0
    assert tables() == stopped + 4 - int(sorted(Path("run/assignments").glob("*.npy"))[stopped - 1].stem[-4:])


def test_a_bag_s_split_is_for_good_whoever_starves(folder: Path) -> None:
    few = np.zeros(120, dtype=np.int64)
    few[:3] = 1
    few[3:50] = 2
    write_table(Assignment.of(few, 3, TRAIN.fingerprint))
    rules = {"start": "table", "table": "table.npy", "starved": "reseed", "starved_below": 0.5, "rounds": 2}
    config = changed(competition={**rules, "score": {"class_path": "mixdist.competition.Fixed"}})
    assert here("train", "--config", write_config(Path("c.yaml"), config), "--out", "run").code == 0
    last = sorted(Path("run/assignments").glob("*.npy"))
    assert all(np.array_equal(np.load(path), few) for path in last)
