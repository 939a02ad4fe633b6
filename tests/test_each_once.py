"""Each id once: whatever a run is resumed with inside an epoch or a pass is refused by its key, or reads each row once.

Tables have what a resume can change, by key; what they leave out is named with the reason.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mixdist.competition import Discriminators
from mixdist.competition.entrant import Entrant
from mixdist.competition.rules import Rules
from mixdist.config.config import Config
from mixdist.data import Shards
from mixdist.mixtures import Soft
from mixdist.training.phases import Phase
from tests.launch import HARD, changed, here, mlp, write_config
from tests.tars import make_shards

NUM_ROWS, BATCH, STOP = 44, 10, 2
STEPS = -(-NUM_ROWS // BATCH)  # of an epoch

# Words that change one key, and what the refusal names; None where the run goes on. All those are changed at once.
Table = dict[str, tuple[str, str | None]]
ROWS: Table = {
    "data.order": ("full", "data.order blocks full"),
    "data.block": ("3", "data.block 5 3"),
    "data.window": ("1", "data.window 2 1"),
    "data.limit": ("30", "limit None 30"),
    "data.train": ("test", "train test"),
    "data.holdout": ("0.1", "holdout"),
    "data.size": ("4", "size None 4"),
    "data.crop": ("4", "crop None 4"),
    "data.channels": ("1", "channels None 1"),
    "data.label": ("none", "label auto none"),
    "data.root": ("moved", None),
    "data.test": ("train", None),
    "data.workers": ("1", None),
    "data.ahead": ("5", None),
    "data.on_error": ("skip", None),
    "data.max_skipped": ("0.5", None),
    "data.augment": ("{flip: true, shift: 1}", None),
}
RUN: Table = {
    "seed": ("1", "seed 0 1"),
    "dtype": ("float64", "dtype float32 float64"),
    "valid": ("0.2", "valid None 0.2"),
    "pretrain": ("[{epochs: 1, batch_size: 20}]", "batch_sizes"),
    "train.batch_size": ("11", "batch_sizes 10 11"),
    "mixture.num_experts": ("2", "num_experts 3 2"),
    "train.epochs": ("3", None),
    "train.accumulate": ("3", None),
    "train.trains": ("experts", None),
    "train.stage": ("autoencoder", "train.stage autoencoder"),
    "train.objective": ("mixdist.mixtures.SoftMinLoss", None),
    "train.optimizer": ("{class_path: torch.optim.Adam, init_args: {lr: 0.1}}", None),
    "train.schedule": ("{class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 2}}", None),
    "train.clip_norm": ("0.1", None),
    "train.ema": ("0.9", "Adam ema"),
    "mixture.prefetch": ("true", None),
    "checkpoint.every": ("3", None),
    "log_every": ("3", None),
    "test_batch_size": ("7", None),
    "pictures": ("true", None),
}
ROUNDS: Table = {
    "mixture.score.batch_size": ("30", "score.batch_size 50 30"),
    "mixture.score.batches": ("1", "score.batches 2 1"),
    "mixture.score": ("mixdist.competition.Elbo", "score Discriminators Elbo"),
    "mixture.start": ("split", "start all split"),
    "mixture.by_shares": ("true", "by_shares False True"),
    "mixture.temperature": ("1.5", "temperature 1.0 1.5"),
    "mixture.anneal_rounds": ("1", "anneal_rounds 2 1"),
    "mixture.e_steps": ("2", "e_steps (2) by_shares"),
    "mixture.starved": ("freeze", "starved none freeze"),
    "mixture.starved_below": ("0.5", "starved_below 0.1 0.5"),
    "mixture.block": ("60", "block 2000 60"),
    "train.epochs": ("3", "epochs 2 3"),
    "train.batch_size": ("31", "batch_sizes 30 31"),
    "mixture.rounds": ("5", None),
    "mixture.stop_below": ("0.0001", None),
    "mixture.delivery": ("wire", None),
    "mixture.placement": ("fixed", None),
    "mixture.score.fresh": ("true", None),
    "mixture.score.observe": ("false", None),
    "train.optimizer.lr": ("0.1", None),
}


def test_the_tables_have_every_option() -> None:
    # engine and mesh: the same run; select: looks on
    sections = {"data", "mixture", "train", "checkpoint", "engine", "mesh", "select"}
    in_run = {key.split(".")[0] for key in RUN} | sections
    assert {field.name for field in dataclasses.fields(Config)} <= in_run
    assert {field.name for field in dataclasses.fields(Phase)} <= {k.removeprefix("train.") for k in RUN}
    # decoder: one of two libraries that decode the same images; cache: of shards from an address
    rows = {key.removeprefix("data.") for key in ROWS}
    assert set(inspect.signature(Shards).parameters) <= rows | {"decoder", "cache"}
    own = {key.removeprefix("mixture.") for key in ROUNDS}
    assert {field.name for field in dataclasses.fields(Rules)} <= own | {"table"}  # read at the start alone
    score = {key.removeprefix("score.") for key in own}
    assert set(inspect.signature(Discriminators).parameters) <= score | {"epochs", "network", "optimizer", "reads"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Work in a folder with shards, and leave out what ends a run: figures and pictures."""
    folder = tmp_path_factory.mktemp("once")
    make_shards(folder / "shards")
    shutil.copytree(folder / "shards", folder / "moved")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("mixdist.cli.train._conclude", lambda *_: None)
        yield folder


def until(run: str, step: int) -> str:
    """Copy a run and take away all checkpoints after one, as if it had been killed before the next."""
    again = Path(run + "-again")
    shutil.rmtree(again, ignore_errors=True)
    shutil.copytree(run, again)
    for path in again.glob("checkpoints/step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return str(again)


def flat(parts: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(parts))


def assert_refused(words: list[str], names: str) -> None:
    ended = here(*words)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1), ended
    assert [name for name in names.split() if name not in ended.err] == [], ended.err


# Steps on global batches


def steps_of(*words: str) -> list[list[int]]:
    """Train; return the ids of each step."""
    steps: list[list[int]] = []
    plain = Soft.backward

    def backward(self: Soft, batch: Any, *rest: Any) -> Any:
        steps.append(batch.rows["id"].tolist())
        return plain(self, batch, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Soft, "backward", backward)
        ended = here("train", *words)
    assert (ended.code, ended.err) == (0, "")
    return steps


def soft_config(data: dict[str, Any]) -> dict[str, Any]:
    config = changed(num_experts=3, train__epochs=2, train__batch_size=BATCH, checkpoint={"every": 1, "keep": 100})
    return config | {"data": data}


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[list[int]]:
    """The steps of a run on shards that nothing interrupts."""
    data = {"class_path": "mixdist.data.Shards", "init_args": {"root": "shards", "workers": 0, "block": 5, "window": 2}}
    return steps_of("--config", write_config(folder / "soft.yaml", soft_config(data)), "--out", "soft")


def free(table: Table) -> list[str]:
    return flat([f"--{key}", value] for key, (value, names) in table.items() if names is None)


@pytest.mark.parametrize("key", [key for key, (_, names) in (ROWS | RUN).items() if names is not None])
def test_inside_an_epoch_what_decides_it_is_refused(key: str, whole: list[list[int]]) -> None:
    value, names = (ROWS | RUN)[key]
    assert_refused(["train", "--resume", until("soft", STOP), f"--{key}", value], str(names))


@pytest.mark.parametrize("table", [ROWS, RUN], ids=["rows", "run"])
def test_inside_an_epoch_each_row_comes_once(table: Table, whole: list[list[int]]) -> None:
    steps = whole[:STOP] + steps_of("--resume", until("soft", STOP), *free(table))
    epochs = [sorted(flat(steps[first : first + STEPS])) for first in range(0, len(steps), STEPS)]
    assert epochs == [list(range(NUM_ROWS))] * (3 if table is RUN else 2)


OWN = '''
"""A source of one's own, whose rows come by the remainder of their place; only one class tells what decides that."""
import os
import torch
from mixdist.data import Dataset, Source, Splits
from mixdist.terms import Field


class Stepping(Dataset):
    step = 1

    def ordered(self, positions, epoch, batch_size):
        return positions[torch.argsort(positions % self.step, stable=True)]


class Turning(Stepping):
    """Its rows stand elsewhere, and what it says of them is the same."""
    fingerprint = "the same rows"


class Telling(Stepping):
    @property
    def order_options(self):
        return {"step": self.step}


class Rows(Source):
    def __init__(self, step: int, kind: str) -> None:
        self.step, self.kind = step, globals()[kind]

    def load(self):
        x = torch.arange(60.0)[:, None].sin()
        made = []
        for ids in (torch.arange(44), torch.arange(44, 60)):
            if self.kind is Turning:
                ids = ids.roll(self.step)
            one = self.kind({"id": ids, "x": x[ids]}, {"x": Field((1,), torch.float32)})
            object.__setattr__(one, "step", 1 if self.kind is Turning else self.step)
            made.append(one)
        return Splits(*made)
'''


@pytest.mark.parametrize("kind", ["Telling", "Stepping", "Turning"])
def test_an_order_of_ones_own(kind: str, folder: Path) -> None:
    """One that tells its options is refused by their names, one that does not by the order itself, or of its ids."""
    (folder / "stepping.py").write_text(OWN)
    data = {"class_path": "stepping.Rows", "init_args": {"step": 7, "kind": kind}}
    config = soft_config(data)
    config["mixture"]["init_args"]["expert"]["init_args"] |= {"likelihood": "gaussian", "mean": "identity"}
    run = f"own-{kind}"
    steps = steps_of("--config", write_config(folder / "own.yaml", config), "--out", run)
    for stop in (STOP, STEPS):
        other = ["train", "--resume", until(run, stop), "--data.step", "5"]
        if kind == "Telling":
            assert_refused(other, "data.step 7 5")
        elif stop == STOP:
            assert_refused(other, "step-000000002 order")
        else:  # between two epochs nothing is lost
            steps = steps[:stop] + steps_of(*other[1:])
            assert [sorted(flat(steps[e : e + STEPS])) for e in (0, STEPS)] == [list(range(NUM_ROWS))] * 2


def test_options_that_are_no_json_are_refused(folder: Path) -> None:
    (folder / "lying.py").write_text(OWN.replace('{"step": self.step}', '{"step": torch.tensor(1)}'))
    config = soft_config({"class_path": "lying.Rows", "init_args": {"step": 7, "kind": "Telling"}})
    assert_refused(
        ["train", "--config", write_config(folder / "lying.yaml", config)], "Telling.order_options tensor(1)"
    )


# Rounds of a competition


Seen = dict[str, list[list[int]]]


def rounds_of(*words: str) -> Seen:
    """Train a competition; return the ids of each expert's epochs and of the batches of the first discriminator."""
    seen: Seen = {}
    train, challenge = Entrant.train, Entrant.challenge

    def trained(self: Entrant, rows: Any, batches: Any, *more: Any) -> None:
        batches = list(batches)
        places = torch.cat([places for places, _ in batches]) if batches else torch.zeros(0, dtype=torch.int64)
        seen.setdefault(f"expert {self.number}", []).append(rows["id"][places].tolist())
        train(self, rows, batches, *more)

    def challenged(self: Entrant, rows: Any, batches: Any, round: int) -> None:
        batches = list(batches)
        if self.number == 0:
            seen.setdefault("discriminators", []).extend(rows["id"][places].tolist() for places, _ in batches)
        challenge(self, rows, batches, round)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Entrant, "train", trained)
        patch.setattr(Entrant, "challenge", challenged)
        ended = here("train", *words)
    assert (ended.code, ended.err) == (0, "")
    return seen


@pytest.fixture(scope="module")
def contest(folder: Path) -> Seen:
    """A competition whose discriminators take 2 of 3 batches a round, so that passes go on in the next one."""
    config = changed(
        HARD, rounds=4, temperature=1.0, anneal_rounds=2, train__epochs=2, checkpoint={"every": 1, "keep": 100}
    )
    score = {"network": mlp(4), "batch_size": 50, "batches": 2, "fresh": False}
    config["mixture"]["init_args"]["score"]["init_args"] = score
    config["pretrain"] = [{"epochs": 2, "batch_size": 30}]
    return rounds_of("--config", write_config(folder / "hard.yaml", config), "--out", "hard")


@pytest.mark.parametrize("key", [key for key, (_, names) in ROUNDS.items() if names is not None])
def test_inside_a_round_what_decides_it_is_refused(key: str, contest: Seen) -> None:
    value, names = ROUNDS[key]
    assert_refused(["train", "--resume", until("hard", 4), f"--{key}", value], str(names))


@pytest.mark.parametrize("stop", [3, 4], ids=["scored", "within a round"])
def test_inside_a_pass_and_a_round_each_row_comes_once(stop: int, contest: Seen) -> None:
    after = rounds_of("--resume", until("hard", stop), *free(ROUNDS))
    batches = contest["discriminators"][:2] + after["discriminators"]  # two in the first scoring
    passes = [flat(batches[first : first + 3]) for first in range(0, len(batches), 3)]
    assert [sorted(one) for one in passes] == [list(range(120))] * 4  # of six scorings
    trained = [flat(contest[f"expert {e}"][n] for e in range(3)) for n in range(2, stop - 1)]
    trained += [flat(after[f"expert {e}"][n] for e in range(3)) for n in range(len(after["expert 0"]))]
    assert [sorted(epoch) for epoch in trained] == [list(range(120))] * 2 * 5  # of five rounds
