"""Runs on shards: those of the same rows in memory, on any layout; mistakes told in one line."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mixdist.report.metrics import read_metrics
from tests.launch import Started, descendants, here, mlp, refused, together, write_config
from tests.range_server import RangeServer
from tests.tars import COUNTS, make_index, make_shards, sample_of, write_shard

IN_MEMORY = '''
"""The rows of the shards, in memory."""
import torch
from mixdist.data import Dataset, Source, Splits
from mixdist.terms import Field
from tests.tars import image_of

SPEC = {
    "x": Field((3, 8, 8), torch.uint8, scale=1 / 255),
    "y": Field((), torch.uint8, num_classes=3),
    "attributes": Field((2,), torch.uint8),
}


class Rows(Source):
    def load(self):
        return Splits(self.part(0, 44), self.part(44, 53))

    def part(self, first, last):
        ids = torch.arange(first, last)
        x = torch.stack([torch.from_numpy(image_of(n)).permute(2, 0, 1) for n in range(first, last)])
        attributes = torch.stack([ids % 2, (ids % 5 == 0).long()], 1)
        rows = {"id": ids, "x": x, "y": (ids % 3).to(torch.uint8), "attributes": attributes.to(torch.uint8)}
        return Dataset(rows, SPEC, "y", ("a", "b", "c"))
'''

EXPERTS: dict[str, Any] = {
    "expert": {
        "class_path": "mixdist.experts.VAE",
        "init_args": {
            "network": {"class_path": "mixdist.nets.Conv", "init_args": {"channels": [4, 4]}},
            "latent": 2,
            "likelihood": "gaussian",
        },
    },
    "num_experts": 3,
}
BASE: dict[str, Any] = {
    "dtype": "float64",
    "train": {
        "epochs": 2,
        "batch_size": 9,
        # Adam divides what is 0 but for rounding by itself: see docs/decisions/code.md.
        "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.001, "eps": 1e-5}},
    },
    "log_every": 1,
    "checkpoint": {"every": 1, "keep": 1000},
}
SOFT = {
    "mixture": {
        "class_path": "mixdist.mixtures.Soft",
        "init_args": {
            **EXPERTS,
            "gate": {"class_path": "mixdist.gates.Softmax"},
            "routing": {"k": 2},
            "execution": "loop",
        },
    }
}
HARD = {
    "mixture": {
        "class_path": "mixdist.competition.Competition",
        "init_args": {
            **EXPERTS,
            "rounds": 2,
            "block": 20,
            "score": {
                "class_path": "mixdist.competition.Discriminators",
                "init_args": {"batch_size": 10, "network": mlp(4)},
            },
        },
    },
    "pretrain": [{"epochs": 1, "batch_size": 9}],
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_shards(tmp_path / "shards")
    (tmp_path / "in_memory.py").write_text(IN_MEMORY)
    return tmp_path


def config_of(kind: dict[str, Any], data: dict[str, Any] | None, **rules: Any) -> str:
    """Write a config on shards with these arguments, or on the rows in memory."""
    config = copy.deepcopy({**BASE, **kind})
    shards = {"class_path": "mixdist.data.Shards", "init_args": {"root": "shards", "workers": 0, **(data or {})}}
    config["data"] = {"class_path": "in_memory.Rows"} if data is None else shards
    if rules:
        config["mixture"]["init_args"] |= rules
    return write_config(Path("config.yaml"), config)


def run(config: str, out: str, ranks: int = 1) -> str:
    words = ("train", "--config", config, "--out", out)
    ended = here(*words) if ranks == 1 else together(*words, ranks=ranks, folder=Path.cwd())
    assert ended.code == 0, ended.err
    return out


def same(one: str, other: str) -> None:
    """Hold weights, records and figures of two runs against each other by contract 1."""
    checkpoints = [max((Path(run) / "checkpoints").glob("step-*[0-9]")) for run in (one, other)]
    assert checkpoints[0].name == checkpoints[1].name
    names = [sorted(path.name for path in checkpoint.glob("*.safetensors")) for checkpoint in checkpoints]
    assert names[0] == names[1]
    for name in names[0]:
        a, b = (load_file(checkpoint / name) for checkpoint in checkpoints)
        for key, tensor in b.items():
            if tensor.numel():
                assert (a[key].double() - tensor.double()).abs().max() <= 1e-10 * tensor.double().abs().max(), key
    for a, b in zip(read_metrics(Path(one)), read_metrics(Path(other)), strict=True):
        assert a["step"] == b["step"]
        assert a.get("counts") == b.get("counts")
        assert (a["loss"] is None) == (b["loss"] is None)
        if b["loss"] is not None:
            assert abs(a["loss"] - b["loss"]) <= 1e-10 * abs(b["loss"])


@pytest.mark.parametrize("kind", [SOFT, pytest.param(HARD, marks=pytest.mark.slow)], ids=["soft", "hard"])
def test_a_run_on_shards_is_that_of_the_rows_in_memory(kind: dict[str, Any]) -> None:
    run(config_of(kind, None), "memory")
    same(run(config_of(kind, {"order": "full"}), "shards"), "memory")
    same(run(config_of(kind, {"order": "full", "workers": 2}), "workers"), "memory")


@pytest.mark.parametrize(
    ("kind", "ranks", "rules"),
    [
        (HARD, 2, {"delivery": "wire"}),
        pytest.param(SOFT, 2, {}, marks=pytest.mark.slow),
        pytest.param(HARD, 3, {"delivery": "read"}, marks=pytest.mark.slow),
        pytest.param(SOFT, 3, {}, marks=pytest.mark.slow),
        pytest.param(HARD, 2, {"delivery": "read"}, marks=pytest.mark.slow),
        pytest.param(HARD, 3, {"delivery": "wire"}, marks=pytest.mark.slow),
    ],
)
def test_a_run_on_shards_is_the_same_on_any_layout(kind: dict[str, Any], ranks: int, rules: dict[str, Any]) -> None:
    data = {"block": 5, "window": 2, "augment": {"flip": True, "shift": 1}}
    run(config_of(kind, data), "one")
    same(run(config_of(kind, data | {"workers": ranks - 1}, **rules), "many", ranks), "one")


@pytest.mark.parametrize("kind", [SOFT, pytest.param(HARD, marks=pytest.mark.slow)], ids=["soft", "hard"])
def test_a_run_goes_on_inside_an_epoch_on_another_layout(kind: dict[str, Any]) -> None:
    config = config_of(kind, {"block": 5, "window": 2, "augment": {"flip": True}})
    run(config, "whole")
    run(config, "cut")
    checkpoints = sorted(Path("cut/checkpoints").glob("step-*"))
    for newer in checkpoints[3:]:
        shutil.rmtree(newer)
    ended = together("train", "--resume", "cut", ranks=2, folder=Path.cwd())
    assert ended.code == 0, ended.err
    same("cut", "whole")


def damage() -> None:
    bad = sample_of(30)
    bad["png"] = b"no image"
    write_shard(Path("shards/train-000002.tar"), [bad if n == 30 else sample_of(n) for n in range(14, 44)])
    make_index(Path("shards"), list(COUNTS))


def test_samples_that_cannot_be_read_are_left_out_alike() -> None:
    damage()
    data = {"on_error": "skip", "max_skipped": 0.05}
    config = config_of(SOFT, data)
    ended = here("train", "--config", config, "--out", "one")
    assert ended.code == 0, ended.err
    assert "mixdist: skipped: sample 30 in shard train-000002.tar at offset" in ended.err
    assert "mixdist: 1 of 44 training samples skipped" in ended.err
    same(run(config_of(SOFT, data | {"workers": 1}), "two", 2), "one")


def test_a_sample_that_cannot_be_read_ends_every_rank() -> None:
    damage()
    ended = together("train", "--config", config_of(SOFT, {}), "--out", "r", ranks=2, folder=Path.cwd())
    assert ended.code == 1
    lines = [line for line in ended.err.splitlines() if line.startswith("mixdist:")]
    assert len(lines) == 1
    assert "sample 30 in shard train-000002.tar at offset" in lines[0]
    assert "Traceback" not in ended.err.split("mixdist:")[0]


def test_evaluate_a_run_on_shards() -> None:
    run(config_of(SOFT, {}), "r")
    assert here("evaluate", "r", "--num_samples", "2").code == 0
    assert json.loads(Path("r/evaluation.json").read_text())["protocol"]["rows"] == 9


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_goes_on_while_its_server_dies_and_comes_back(tmp_path: Path, ranks: int) -> None:
    (tmp_path / "control").mkdir()
    server = RangeServer(tmp_path / "shards", tmp_path / "control")
    told: list[int] = []

    def die_and_come_back() -> None:
        deadline = time.monotonic() + 300
        while len(server.requests) < 40 and time.monotonic() < deadline:
            time.sleep(0.01)
        server.kill()
        told.append(len(server.requests))
        time.sleep(1.5)
        server.start()

    # The folder of blocks is far smaller than the shards, so the server is needed all the time.
    cache = {"folder": str(tmp_path / "cache"), "limit_gb": 2e-5, "block_mb": 0.004}
    data = {"block": 5, "window": 2}
    config = config_of(SOFT, {**data, "root": server.url, "cache": cache, "workers": ranks - 1})
    end = threading.Thread(target=die_and_come_back)
    end.start()
    try:
        run(config, "far", ranks)
    finally:
        end.join()
        asked = len(server.requests)
        server.kill()
    assert asked > told[0] + 20  # it was needed afterwards
    same("far", run(config_of(SOFT, data), "near"))


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ({"root": "nowhere"}, "nowhere"),
        ({"root": "."}, "'.'"),
        ({"root": "ftp://example.org/x"}, "ftp"),
        ({"train": "training"}, "train (training) test"),
        ({"test": "valid"}, "test (valid)"),
        ({"holdout": 0.1}, "holdout (0.1)"),
        ({"label": "Smiling"}, "label (Smiling)"),
        ({"augment": {"shift": 8}}, "shift"),
        ({"augment": {"shift": -1}}, "augment.shift (-1)"),
        ({"workers": -1}, "workers (-1)"),
        ({"crop": 9}, "crop (9)"),
        ({"channels": 2}, "channels (2)"),
        ({"order": "random"}, "order (random)"),
        ({"max_skipped": 2.0}, "max_skipped (2.0)"),
    ],
)
def test_what_makes_no_sense_on_shards_is_refused(data: dict[str, Any], names: str) -> None:
    refused("train", "--config", config_of(SOFT, data), names=names)


@pytest.mark.parametrize("name", ["train-000002.tar", "test-000000.tar"])
def test_shards_that_do_not_fit_their_index_are_refused(name: str) -> None:
    shard = Path("shards") / name
    shard.write_bytes(shard.read_bytes()[:-512])
    refused("train", "--config", config_of(SOFT, {}), names=name)
    shard.unlink()
    refused("train", "--config", config_of(SOFT, {}), names=name)


def test_labels_asked_for_where_there_are_none() -> None:
    for name, count in COUNTS.items():
        samples = [{k: v for k, v in sample_of(n).items() if k != "cls"} for n in range(count)]
        write_shard(Path("shards") / name, [s | {"__key__": f"{name[:-4]}-{n}"} for n, s in enumerate(samples)])
    index = make_index(Path("shards"), list(COUNTS))
    assert index.label_N is None
    refused("train", "--config", config_of(SOFT, {"label": "y"}), names="label (y) 'shards'")
    oracle = {"class_path": "mixdist.competition.LabelOracle"}
    refused("train", "--config", config_of(HARD, {}, score=oracle), names="y")


def test_a_run_on_shards_is_loaded_without_them() -> None:
    import mixdist

    run(config_of(SOFT, {}), "r")
    Path("shards").rename("gone")
    model = mixdist.load("r")
    images = torch.from_numpy(np.stack([np.zeros((3, 8, 8), dtype=np.uint8)]))
    assert model.assign(images).shape == (1,)


def decoders(pid: int) -> list[int]:
    """Give the decoding processes of a trainer, once there are some."""
    return [child for child in descendants(pid) if "forkserver" in Path(f"/proc/{child}/cmdline").read_text()]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("victim", ["trainer", pytest.param("decoder", marks=pytest.mark.slow)])
def test_no_process_is_left_when_one_is_killed(victim: str) -> None:
    words = ["train", "--config", config_of(SOFT, {"workers": 2}), "--train.epochs", "10000", "--out", "r"]
    with Started(["mixdist", *words], Path.cwd(), {}) as started:
        started.until(lambda: any(Path("r/checkpoints").glob("step-*")) and len(decoders(started.process.pid)) >= 3)
        family = decoders(started.process.pid)
        os.kill(started.process.pid if victim == "trainer" else max(family), signal.SIGKILL)
        ended = started.end()
        if victim == "decoder":
            assert ended.code == 2, ended.err
            told = ended.err.strip().splitlines()[-1]
            assert told.startswith("mixdist: one of 2 worker processes was killed")
            assert "data.init_args.workers" in told
            assert "Traceback" not in ended.err
        deadline = time.monotonic() + 300
        while any(map(lives, family)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(lives, family))
