"""Ranks agree, or say so: one line that names what differs and the rank, and nobody waits for who does not come."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from mixdist.config.card import card
from mixdist.config.options import parse
from mixdist.config.parsing import config_parser
from mixdist.parallel.identity import difference
from mixdist.parallel.launch import Launch
from tests.errors import error_of
from tests.launch import HARD, SMALL, Ended, changed, here, write_config
from tests.ranks import ByHand, by_hand

OWN = '''
import os

import torch
from torch import nn
from mixdist.experts import VAE
from mixdist.gates import Gate
from mixdist.mixtures import WeightedLoss
from mixdist.nets import MLP
from mixdist.terms import Gating

from meeting_width import WIDTH


class Wide(Gate):
    """A gate whose width is read where a config does not show it."""

    def __init__(self, spec, num_experts: int) -> None:
        super().__init__()
        if os.environ.get("OWN_FAULT"):
            raise KeyError("no fields")
        self.sharpness = float(os.environ.get("OWN_SHARPNESS", 1))
        self.steps = [1, (2, float(os.environ.get("OWN_STEP", 3)))]
        self.offset = {"all": torch.tensor([0.5, float(os.environ.get("OWN_OFFSET", 0))])}
        width = int(os.environ.get("OWN_WIDTH", WIDTH))
        self.net = nn.Sequential(nn.Linear(spec["x"].num_values, width), nn.Linear(width, num_experts))

    def forward(self, rows, eps):
        sharpness = float(os.environ.get("OWN_LATE", 1))
        return Gating(torch.log_softmax(self.net(rows["x"].flatten(1)) * sharpness, dim=1))


class Scaled(VAE):
    def __init__(self, spec, latent: int = 2) -> None:
        super().__init__(spec, latent, MLP([4]), "gaussian", mean="identity")
        self.scales = [torch.ones(2), torch.full((2,), float(os.environ.get("OWN_SCALE", 1)))]


class Read(WeightedLoss):
    def __init__(self) -> None:
        super().__init__()
        self.weights = {"rows": [float(os.environ.get("OWN_WEIGHT", 1))]}

    def gate_rows(self, log_resp_BE):
        return log_resp_BE[:, 0] * float(os.environ.get("OWN_LATE_WEIGHT", 0))
'''
ROWS = '''
from pathlib import Path

import torch
from mixdist.data import Dataset, Source
from mixdist.terms import Field


class Numbers(Source):
    """Rows of a file."""

    def __init__(self, root: str) -> None:
        self.root = root

    def load(self):
        x = torch.tensor([float(word) for word in Path(self.root).read_text().split()]).reshape(-1, 2)
        spec = {"x": Field((2,), torch.float32)}
        ids = torch.arange(len(x))
        return Dataset({"id": ids[::2], "x": x[::2]}, spec), Dataset({"id": ids[1::2], "x": x[1::2]}, spec)
'''
SHORT = ("--mesh.timeout_s", "1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make configs, own classes and a finished run."""
    folder = tmp_path_factory.mktemp("place")
    for name, width in (("one", 3), ("other", 4)):
        for at in (folder / name, folder / name / "cwd"):
            at.mkdir()
        (folder / name / "meeting_width.py").write_text(f"WIDTH = {width}\n")
        (folder / name / "meeting_gate.py").write_text(OWN)
        (folder / name / "rows.txt").write_text(" ".join(str((i * width) % 7 / 7) for i in range(80)))
    (folder / "meeting_rows.py").write_text(ROWS)
    data = {"class_path": "meeting_rows.Numbers", "init_args": {"root": str(folder / "one/rows.txt")}}
    config = changed(data=data, train__batch_size=20, mesh={"device": "cpu"}, dtype="float64", execution="loop")
    config["mixture"]["init_args"]["expert"]["init_args"] |= {"likelihood": "gaussian", "mean": "identity"}
    write_config(folder / "c.yaml", config)
    own = changed(config, gate={"class_path": "meeting_gate.Wide"}, expert={"class_path": "meeting_gate.Scaled"})
    own["train"]["objective"] = {"class_path": "meeting_gate.Read"}
    write_config(folder / "own.yaml", own)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed in ("0", "1"):
            where = "one" if seed == "0" else "other"
            argv = ["--config", "c.yaml", "--train.epochs", "1", "--out", f"{where}/cwd/run", "--seed", seed]
            assert here("train", *argv).code == 0
    text = (folder / "other/cwd/run/config.yaml").read_text()
    (folder / "other/cwd/run/config.yaml").write_text(text.replace("seed: 1", "seed: 0"))
    return folder


def train(*argv: str, config: str = "c.yaml", **kind: Any) -> ByHand:
    return ByHand(["train", "--config", config, "--out", "new", *argv], **kind)


def evaluate(*argv: str, run: str = "one/cwd/run", **kind: Any) -> ByHand:
    return ByHand(["evaluate", run, "--num_samples", "2", *argv], **kind)


def own(at: str, **env: str) -> ByHand:
    return train(config="own.yaml", path=at, env=env)


def told_once(ends: list[Ended], *named: str) -> None:
    """Check that all ranks end with code 2, and rank 0 alone with one line, which has these words."""
    assert [end.code for end in ends] == [2] * len(ends), ends
    assert [end.err for end in ends[1:]] == [""] * (len(ends) - 1), ends
    check_line(ends[0], *named)


def check_line(end: Ended, *named: str) -> None:
    assert end.err.startswith("mixdist: ")
    assert end.err.count("\n") == 1, end.err
    assert not re.search(r"Traceback|frame #|\[W|\[E", end.err)
    assert [word for word in named if word not in end.err] == [], end.err


DIFFERENT: dict[str, tuple[ByHand, ByHand, tuple[str, ...]]] = {
    "seed": (train(), train("--seed", "3"), ("seed", "(3)", "(0)")),
    "experts": (train(), train("--mixture.num_experts", "3"), ("mixture.num_experts", "(3)", "(4)")),
    "ep_size": (train(), train("--mesh.ep_size", "1"), ("mesh.ep_size", "(1)")),
    "command": (train(), evaluate(), ("command", "(evaluate)", "(train)")),
    "samples": (evaluate(), evaluate("--num_samples", "3"), ("num_samples", "(3)", "(2)")),
    "resume": (
        ByHand(["train", "--resume", "one/cwd/run"]),
        ByHand(["train", "--config", "one/cwd/run/config.yaml"]),
        ("resume", "(null)", "(one/cwd/run)"),
    ),
    "resumed run": (
        ByHand(["train", "--resume", "run"], cwd="one/cwd", path="{}"),
        ByHand(["train", "--resume", "run"], cwd="other/cwd", path="{}"),
        ("other/cwd/run",),
    ),
    "evaluated run": (
        evaluate(run="run", cwd="one/cwd", path="{}"),
        evaluate(run="run", cwd="other/cwd", path="{}"),
        ("checkpoint step-", "other/cwd", "one/cwd"),
    ),
    "version": (train(), train(version="0.0.9"), ("version of mixdist", "(0.0.9)")),
    "own source": (own("one"), own("other"), ("source of meeting_width",)),
    "environment": (own("one"), own("one", OWN_WIDTH="5"), ("initial weights of gate", "[5, 2]", "[3, 2]")),
    "read attribute": (own("one"), own("one", OWN_SHARPNESS="5"), ("sharpness of gate", "(5.0)", "(1.0)")),
    "read list": (own("one"), own("one", OWN_STEP="5"), ("steps[1] of gate", "((2, 5.0))", "((2, 3.0))")),
    "read tensor": (own("one"), own("one", OWN_OFFSET="5"), ("weights of gate offset['all']", "norm 5.02")),
    "read by experts": (own("one"), own("one", OWN_SCALE="5"), ("weights of expert 0 scales[1]", "norm 7.07")),
    "read by an objective": (own("one"), own("one", OWN_WEIGHT="5"), ("train.objective.weights['rows']", "[5.0]")),
    "read in forward": (own("one"), own("one", OWN_LATE="5"), ("mixture.gate: Wide.forward", "environment variable")),
    "read in rows": (own("one"), own("one", OWN_LATE_WEIGHT="5"), ("objective: Read.rows", "environment variable")),
    "data": (
        train(),
        train("--data.root", "other/rows.txt"),
        ("sha256 of the training rows", "data.root other/rows.txt", "one/rows.txt)"),
    ),
    "world size": (train(), train(env={"WORLD_SIZE": "3"}), ("WORLD_SIZE", "(3)", "(2)")),
}
"""Rank 0, rank 1, and what the line names."""
EARLY = {
    "config": (train(config="missing.yaml"), "missing.yaml"),
    "class": (train("--mixture.gate", "nix.Nix"), "nix.Nix"),
    "command": (ByHand(["trian"]), "trian"),
    "rank": (train(env={"RANK": "5"}), "RANK (5)"),
}
"""What a rank finds before it meets the others."""
ALONE: dict[str, tuple[ByHand, tuple[str, ...]]] = {
    "no address": (train(*SHORT, env={"MASTER_ADDR": "no.such.host"}), ("MASTER_ADDR (no.such.host)",)),
    "nobody there": (train(*SHORT, env={"RANK": "1"}), ("rank 1", "MASTER_ADDR:MASTER_PORT (127.0.0.1:", "(1)")),
    "no port": (train(*SHORT, env={"MASTER_PORT": "http"}), ("MASTER_PORT (http)",)),
    "unset": (train(*SHORT, env={"MASTER_ADDR": ""}), ("MASTER_ADDR", "set")),
    "no rank": (train(*SHORT, env={"RANK": "first"}), ("RANK (first)",)),
    "waits in vain": (train(*SHORT), ("rank 1", "mesh.timeout_s (1)")),
}
"""One rank of two, the other never comes."""


@pytest.fixture(scope="module")
def ends(place: Path) -> Iterator[dict[str, list[Ended]]]:
    """Run all cases."""
    cases = {f"different {name}": [first, second] for name, (first, second, _) in DIFFERENT.items()}
    for name, (mistaken, _) in EARLY.items():
        cases |= {f"early 0 {name}": [mistaken, train()], f"early 1 {name}": [train(), mistaken]}
    alone = {"env": {"WORLD_SIZE": "2"}}
    cases |= {f"alone {name}": [one._replace(env={**alone["env"], **one.env})] for name, (one, _) in ALONE.items()}
    cases["twice"] = [train(), train(), train(env={"RANK": "1"})]
    cases["fault"] = [own("one"), own("one", OWN_FAULT="1")]
    del cases["early 0 rank"]  # rank 1 would wait for its rank 0
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases["stranger"] = [train(*SHORT, env={"MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": "1"})]
        cases["port"] = [train(*SHORT, env={"MASTER_PORT": port, "WORLD_SIZE": "2"})]
        with_path = {
            name: [
                one._replace(path=str(place / one.path) if one.path not in ("", "{}") else str(place)) for one in ranks
            ]
            for name, ranks in cases.items()
        }
        before = sorted(place.rglob("*"))
        yield by_hand(with_path, place)
    made = [path for path in place.rglob("*") if path not in before and "__pycache__" not in path.parts]
    assert [path for path in made if path.name != ".lock"] == []


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_named_with_its_rank(name: str, ends: dict[str, list[Ended]]) -> None:
    told_once(ends[f"different {name}"], "rank 1", *DIFFERENT[name][2])


@pytest.mark.parametrize("name", EARLY)
def test_a_rank_that_ends_early_speaks_and_the_others_name_it(name: str, ends: dict[str, list[Ended]]) -> None:
    named = EARLY[name][1]
    for rank in (0, 1):
        for number, end in enumerate(ends.get(f"early {rank} {name}", [])):
            assert (end.code, end.out) == (2, "")
            who = end.err.partition(" ended before all ranks had met: ")[0]
            if number != rank:
                assert who == f"mixdist: rank {'5' if name == 'rank' else rank}"
            check_line(end, named)


def test_a_bug_of_the_users_own_class_is_told_once(ends: dict[str, list[Ended]]) -> None:
    told_once(ends["fault"], "rank 1: mixture.gate: Wide.__init__", "KeyError: 'no fields'", "meeting_gate.py line")


@pytest.mark.parametrize("name", ALONE)
def test_who_waits_in_vain_says_where(name: str, ends: dict[str, list[Ended]]) -> None:
    (end,) = ends[f"alone {name}"]
    assert end.code == 2
    check_line(end, *ALONE[name][1])


def test_a_port_or_a_rank_that_is_taken(ends: dict[str, list[Ended]]) -> None:
    check_line(ends["port"][0], "MASTER_PORT", "use")
    check_line(ends["stranger"][0], "MASTER_PORT", "rank 0")
    for end in ends["twice"]:
        assert end.code == 2
        check_line(end, "RANK (1)")


def numbers_in(section: Any, at: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Yield what holds each number of a parsed config, its key there, and its name as a dotted option."""
    items = list(enumerate(section)) if isinstance(section, list) else list(vars(section).items())
    for key, value in items:
        name = at if key == "init_args" else f"{at}[{key}]" if isinstance(section, list) else f"{at}.{key}".lstrip(".")
        if isinstance(value, (bool, int, float)):
            yield section, key, name
        elif isinstance(value, (Namespace, list)) and key != "config":
            yield from numbers_in(value, name)


@pytest.mark.parametrize("config", [SMALL, HARD], ids=["soft", "hard"])
def test_every_number_of_a_config_must_be_the_same(config: Any, folder: Path) -> None:
    config = changed(config, pretrain=[{"epochs": 1}], mesh={"ep_size": 1}, checkpoint={"keep": 2})
    parsed = parse(config_parser(), ["--config", write_config(folder / "c.yaml", config)])
    first, names = card("train", parsed), []
    assert difference(first, card("train", parsed), 1) is None
    for section, key, name in numbers_in(parsed):
        in_list = isinstance(section, list)
        value = section[key]
        section[key] = value + 1
        told = difference(first, card("train", parsed), 3)
        section[key] = value
        assert told is not None, name
        named = name.rpartition("[")[0] if in_list else name  # a list of numbers is one value
        assert told.startswith(f"{named} of rank 3 ("), told
        names.append(name)
    assert {"seed", "train.batch_size", "pretrain[0].epochs", "mesh.timeout_s", "mixture.num_experts"} <= set(names)
    assert len(names) > 20


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, ("RANK (2)", "WORLD_SIZE is 2")),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, ("RANK (-1)",)),
        ({"RANK": "1"}, ("RANK (1)", "WORLD_SIZE")),
        ({"RANK": "0", "WORLD_SIZE": "two"}, ("WORLD_SIZE (two)",)),
        ({"RANK": "0", "WORLD_SIZE": ""}, ("WORLD_SIZE ()",)),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, ("LOCAL_RANK (x)",)),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "4", "SLURM_LOCALID": "0"}, ("SLURM_PROCID (4)",)),
        ({"SLURM_STEP_NUM_TASKS": "many"}, ("SLURM_STEP_NUM_TASKS (many)",)),
    ],
)
def test_an_environment_that_makes_no_rank_is_refused(env: dict[str, str], named: tuple[str, ...]) -> None:
    error_of(lambda: Launch.read(env), *named)
