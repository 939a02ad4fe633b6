"""The configs beside the kVAEs: baselines have the mixture's data and batches, and learn from as much."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from mixdist.config.parsing import read_config
from mixdist.sweep.grid import read_system
from tests.launch import ROOT

MIXTURES = sorted((ROOT / "configs").glob("kvaes_*_small.yaml"))


def gradients(path: Path) -> float:
    """How often a training row is in a batch of an expert, in the whole run."""
    config = read_config(path)
    return sum(config.mixture.gradients([*config.pretrain, config.train]))


@pytest.mark.parametrize("path", MIXTURES, ids=lambda path: path.stem)
@pytest.mark.parametrize("kind", ["bag", "vae"])
def test_baselines_have_the_mixture_s_data_batches_and_sample_gradients(path: Path, kind: str) -> None:
    other = Path(str(path).replace("_small", f"_{kind}"))
    mixture, baseline = read_config(path), read_config(other)
    assert vars(baseline.data) == vars(mixture.data)
    assert baseline.mixture.num_experts == (mixture.mixture.num_experts if kind == "bag" else 1)
    assert baseline.train.batch_size == mixture.train.batch_size
    assert gradients(other) == gradients(path)


def test_the_sweeps_of_the_docs_name_systems_and_their_marks() -> None:
    page = (ROOT / "docs" / "kvaes.md").read_text()
    (block,) = re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)
    assert "<!-- kvaes_3modes -->" in page
    assert "<!-- kvaes_3modes costs -->" in page
    (command,) = re.findall(r"mixdist sweep (.*?--out \S+)", block, re.S)
    for modes in ("3modes", "5modes", "9modes", "mnist"):
        words = shlex.split(command.replace("3modes", modes))
        systems = [read_system(word) for word in words if ".yaml" in word]
        assert [system.name for system in systems] == ["kVAEs", "bag"]
        assert all((ROOT / system.path).exists() for system in systems)
