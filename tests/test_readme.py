"""README keeps its word: its own data set, expert, gate and objective train, from files outside the package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import mixdist
from mixdist.report.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def train(folder: Path, config: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mixdist", "train", "--config", config, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_data_set_an_expert_a_gate_and_an_objective_of_one_s_own(tmp_path: Path) -> None:
    for block in blocks("python"):
        named = re.match(r"# (my_\w+\.py)", block)
        if named:
            (tmp_path / named[1]).write_text(block)
    kinds = ("data", "expert", "gate", "objective", "score")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"my_{kind}.py" for kind in kinds]
    competition, shards, soft = blocks("yaml")
    assert "mixdist.data.Shards" in shards
    (tmp_path / "own.yaml").write_text(soft + "log_every: 1\n")
    assert "1000 held-out rows: loss" in train(tmp_path, "own.yaml", "--train.epochs", "3", "--out", "run")
    hard = "data: {class_path: my_data.Waves}\nexpert: {class_path: mixdist.experts.VAE}\nnum_experts: 3\n"
    (tmp_path / "hard.yaml").write_text(hard + competition)
    words = ["--competition.rounds", "2", "--train.epochs", "1", "--out", "hard"]
    assert "round 2: " in train(tmp_path, "hard.yaml", *words)
    own = ["--competition.score", "my_score.Reconstruction", *words[:-1], "own"]
    assert "round 2: " in train(tmp_path, "hard.yaml", *own)
    losses = [record["loss"] for record in read_metrics(tmp_path / "run")]
    assert len(losses) == 30
    assert losses[-1] < losses[0]


def test_readme_s_two_commands_are_one_line_each_and_use_the_constraints() -> None:
    first, second = blocks("bash")
    for block in (first, second):
        assert len(block.strip().splitlines()) == 1
        assert "-c constraints.txt" in block
    assert "torchrun --standalone --nproc-per-node 2 -m mixdist train --config configs/digits_moe.yaml" in first
    assert "pytest" in second
    assert mixdist.__version__
