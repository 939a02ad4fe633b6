"""README keeps its word: its own data set, expert, gate and objective train, from files outside the package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import mixdist
from mixdist.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_a_data_set_an_expert_a_gate_and_an_objective_of_one_s_own(tmp_path: Path) -> None:
    for block in blocks("python"):
        named = re.match(r"# (my_\w+\.py)", block)
        if named:
            (tmp_path / named[1]).write_text(block)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["my_data.py", "my_expert.py", "my_gate.py", "my_objective.py"]
    (config,) = blocks("yaml")
    (tmp_path / "own.yaml").write_text(config + "log_every: 1\n")
    words = ["train", "--config", "own.yaml", "--train.epochs", "3", "--out", "run"]
    done = subprocess.run(
        [sys.executable, "-m", "mixdist", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "1000 held-out rows: loss" in done.stdout
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
