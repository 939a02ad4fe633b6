"""What fails in a user's own code, whenever it does, ends a command with one line: which function, why and where.

The checks on a few rows see most of it before; here is what they cannot see, or what is no call on rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mixdist.messages import last_own_line, own_failure
from tests.launch import HARD, SMALL, changed, here, together, write_config

OWN = '''
import torch
from torch import nn
from mixdist.competition import Elbo
from mixdist.engines import Native
from mixdist.experts import Expert, VAE
from mixdist.gates import Gate, Softmax
from mixdist.mixtures import Soft, WeightedLoss
from mixdist.nets import MLP
from mixdist.terms import ExpertTerms, Gating


class Plain(Gate):
    def __init__(self, spec, num_experts):
        super().__init__()
        self.net = nn.Linear(64, num_experts)

    def forward(self, rows, eps):
        return Gating(torch.log_softmax(self.net(rows["x"].flatten(1)), 1))


class Enter(Plain):
    def enter(self, stage):
        {}["nix"]


class Rows(Plain):
    def check_rows(self, num_rows):
        {}["nix"]


class Start(Plain):
    def starts_at(self, stage):
        return True

    def seen(self, rows):
        return rows["x"].flatten(1)

    def start(self, seen, seed):
        {}["nix"]


class NoSeen(Plain):
    def starts_at(self, stage):
        return True


class Steps(Plain):
    em_steps = 3


class SeenMean(Start):
    def seen(self, rows):
        return rows["x"].mean()


class Stages(Plain):
    stages = "joint"


class Drawn(Plain):
    num_drawn = "3"


class Late(VAE):
    def forward(self, rows, eps):
        if len(rows["x"]) > 100:
            {}["nix"]
        return super().forward(rows, eps)


class Words(VAE):
    def forward(self, rows, eps):
        if len(rows["x"]) > 100:
            raise ValueError("too many rows")
        return super().forward(rows, eps)


class LateEval(VAE):
    def forward(self, rows, eps):
        if len(rows["x"]) > 100 and not self.training:
            {}["nix"]
        return super().forward(rows, eps)


class Narrow(VAE):
    def reconstruct(self, rows):
        return rows["x"][..., :3]


class Field(VAE):
    def __init__(self, spec):
        super().__init__(spec)
        self.field = "zz"


class Target(VAE):
    target = "zz"


class Sum(WeightedLoss):
    def rows(self, log_resp_BE, losses_BE):
        if len(losses_BE) > 100:
            {}["nix"]
        return super().rows(log_resp_BE, losses_BE)


class Score(Elbo):
    def __init__(self, how: str):
        super().__init__()
        self.how = how

    def describe(self):
        return {"how": object()} if self.how == "describe" else {}

    def column(self, e, expert, discriminator, rows, at, dtype):
        if self.how == "late" and len(rows["id"]) > 100:
            {}["nix"]
        return super().column(e, expert, discriminator, rows, at, dtype)


class Engine(Native):
    def step(self, outcome, step):
        pass


class Family(Soft):
    """Says nothing, or what JSON cannot hold, where it is told to."""

    def __init__(self, how: str = "", num_experts: int = 3):
        super().__init__(Softmax, lambda spec: VAE(spec, 2, MLP([4])), num_experts)
        self.how = how


def put(name, value):
    kept = getattr(Family, name)

    def method(self, *args):
        if self.how == f"{name} fails":
            {}["nix"]
        return value() if self.how == name else kept(self, *args)

    setattr(Family, name, method)


for name in ("study", "record", "diagnose", "pictures", "choose", "model"):
    put(name, lambda: None)
for name in ("describe", "state", "protocol"):
    put(name, lambda: {"a": object()})
for name in ("check", "enter", "start"):
    put(name, lambda: None)
'''


def of(name: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": f"own_code.{name}", **({"init_args": init_args} if init_args else {})}


def family(how: str) -> dict[str, Any]:
    return {**changed(SMALL), "mixture": of("Family", how=how)}


NIX = "fails KeyError: 'nix'; own_code.py line"
JSON = "what JSON cannot hold"
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "gate enter": (changed(gate=of("Enter")), f"Enter.enter {NIX}"),
    "gate rows": (changed(gate=of("Rows")), f"Rows.check_rows {NIX}"),
    "gate start": (changed(gate=of("Start")), f"Start.start {NIX}"),
    "gate without seen": (changed(gate=of("NoSeen")), "NoSeen has no start"),
    "gate seen": (changed(gate=of("SeenMean")), "mixture.gate: SeenMean.seen (n, M)"),
    "gate em_steps": (changed(gate=of("Steps")), "mixture.gate: Steps.em_steps (3) starts_at"),
    "gate stages": (changed(gate=of("Stages")), "mixture.gate: Stages.stages ('joint',)"),
    "gate num_drawn": (changed(gate=of("Drawn")), "mixture.gate: Drawn.num_drawn ('3')"),
    "expert late": (changed(expert=of("Late")), f"Late.forward {NIX}"),
    "expert's own words": (changed(expert=of("Words")), "too many rows (Words.forward; own_code.py line"),
    "expert in evaluation": (changed(expert=of("LateEval")), f"LateEval.forward {NIX}"),
    "expert reconstruct": (changed(expert=of("Narrow")), "Narrow.reconstruct (8, 1, 8, 3) (8, 1, 8, 8)"),
    "expert field": (changed(expert=of("Field")), "Field.field ('zz') x, y"),
    "expert target": (changed(expert=of("Target")), "Target.target ('zz') x, y"),
    "objective late": (changed(train__objective=of("Sum")), f"Sum.rows {NIX}"),
    "score late": (changed(HARD, score=of("Score", how="late")), f"Score.column {NIX}"),
    "score describe": (changed(HARD, score=of("Score", how="describe")), f"Competition.describe {JSON}"),
    "engine": (changed(engine=of("Engine")), "engine: Engine.step None Totals"),
    **{f"family {how}": (family(f"{how} fails"), NIX) for how in ("check", "enter", "start")},
    **{f"family {how}": (family(how), f"Family.{how} {JSON}") for how in ("describe", "state")},
    **{f"family {how}": (family(how), f"Family.{how} returns") for how in ("study", "record", "diagnose", "choose")},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_code.py").write_text(OWN)
    return tmp_path


@pytest.mark.parametrize("name", CASES)
def test_what_fails_in_a_user_s_code_is_one_line(name: str, folder: Path) -> None:
    config, words = CASES[name]
    ended = here("train", "--config", write_config(folder / "c.yaml", config), "--out", "run")
    assert ended.code == 2, ended
    assert (ended.err.count("\n"), ended.err[:9]) == (1, "mixdist: "), ended.err
    assert all(word in ended.err for word in words.split()), ended.err
    assert "Traceback" not in ended.err


def test_a_family_around_ours_runs_as_ours_does(folder: Path) -> None:
    """A subclass of Soft with another constructor, whose experts run as a stack: trained, evaluated, drawn from."""
    assert here("train", "--config", write_config(folder / "c.yaml", family("")), "--out", "run").code == 0
    for words in (("evaluate", "run", "--num_samples", "2"), ("sample", "run"), ("train", "--resume", "run")):
        ended = here(*words)
        assert ended.code == 0, ended.err


@pytest.mark.parametrize(("how", "words"), [("protocol", ("evaluate", "run")), ("model", ("sample", "run"))])
def test_what_a_family_says_afterwards_is_checked_too(how: str, words: tuple[str, ...], folder: Path) -> None:
    assert here("train", "--config", write_config(folder / "c.yaml", family(how)), "--out", "run").code == 0
    ended = here(*words)
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended
    assert f"Family.{how} returns" in ended.err


def test_on_two_ranks_each_that_fails_says_so(folder: Path) -> None:
    config = write_config(folder / "c.yaml", changed(expert=of("Late")))
    ended = together("train", "--config", config, "--out", "run", ranks=2, folder=folder)
    told = [line for line in ended.err.splitlines() if line.startswith("mixdist: ")]
    assert told, ended.err
    assert all("Late.forward fails (KeyError: 'nix'; own_code.py line" in line for line in told), ended.err
    assert "Traceback" not in "".join(line for line in ended.err.splitlines() if "torch" not in line)


def test_a_mistake_of_python_or_of_this_package_is_no_user_s(folder: Path) -> None:
    import json

    try:
        json.dumps(object())
    except TypeError as error:
        kept = error.__traceback__
        assert kept is not None
        inside = error.with_traceback(kept.tb_next)  # without this file
        assert not last_own_line(inside)
        assert not own_failure(inside)
