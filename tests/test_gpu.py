"""On CUDA devices: the same run as on the CPU, alone and over NCCL."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixdist.noise import Draw, Purpose
from mixdist.noise.philox import compiled, rounds
from mixdist.report.metrics import read_metrics
from tests.launch import HANG_S, ROOT

WORDS = [
    "--train.epochs=1",
    "--dtype=float64",
    "--log_every=1",
    "--mixture.num_experts=4",
    "--train.optimizer.fused=false",
]


SHARDED = ["--engine=mixdist.engines.Native", "--engine.shard=optimizer", "--engine.offload=optimizer"]


def losses(run: Path, device: str, ranks: int, *more: str) -> list[float]:
    """Train on a device; return the loss of every step."""
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    words = ["mixdist", "train", "--config", str(ROOT / "configs" / "digits_moe.yaml"), *WORDS, *more]
    words += ["--mesh.device", device, "--out", str(run)]
    subprocess.run([*launcher, *words], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=HANG_S)
    return [record["loss"] for record in read_metrics(run)]


@pytest.mark.gpu
@pytest.mark.parametrize("engine", [[], SHARDED], ids=["plain", "sharded"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_cuda_devices_give_the_run_of_the_cpu(tmp_path: Path, ranks: int, engine: list[str]) -> None:
    """Two of them talk over NCCL."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"fewer than {ranks} CUDA devices here")
    assert losses(tmp_path / "gpu", "cuda", ranks, *engine) == pytest.approx(
        losses(tmp_path / "cpu", "cpu", ranks), rel=1e-10
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_compiled_noise_has_the_bits_of_the_cpu() -> None:
    device = torch.device("cuda", 0)
    assert compiled(device) is not rounds
    for step in (0, 7):
        draw, ids = Draw(seed=3, purpose=Purpose.POSTERIOR, step=step), torch.arange(99)
        assert torch.equal(draw.uniform(ids.to(device), [0, 5], (7,)).cpu(), draw.uniform(ids, [0, 5], (7,)))
