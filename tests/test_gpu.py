"""On CUDA devices: the same run as on the CPU, alone and over NCCL."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixdist.report.metrics import read_metrics
from tests.launch import HANG_S, ROOT

WORDS = ["--train.epochs=1", "--dtype=float64", "--log_every=1", "--num_experts=4", "--train.optimizer.fused=false"]
needs = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def losses(run: Path, device: str, ranks: int) -> list[float]:
    """Train on a device; give the loss of every step."""
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    words = ["mixdist", "train", "--config", str(ROOT / "configs" / "digits_moe.yaml"), *WORDS]
    words += ["--mesh.device", device, "--out", str(run)]
    subprocess.run([*launcher, *words], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=HANG_S)
    return [record["loss"] for record in read_metrics(run)]


@pytest.mark.gpu
@needs
def test_a_cuda_device_gives_the_run_of_the_cpu(tmp_path: Path) -> None:
    assert losses(tmp_path / "gpu", "cuda", 1) == pytest.approx(losses(tmp_path / "cpu", "cpu", 1), rel=1e-10)


@pytest.mark.gpu
@needs
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices here")
def test_nccl_gives_the_run_of_the_cpu(tmp_path: Path) -> None:
    assert losses(tmp_path / "gpu", "cuda", 2) == pytest.approx(losses(tmp_path / "cpu", "cpu", 2), rel=1e-10)
