"""Placement as arithmetic, over every small case; launch, device and arithmetic without starting anything."""

from __future__ import annotations

import re

import pytest
import torch

from mixdist.competition import Competition
from mixdist.config.build import build_mesh
from mixdist.config.config import Config
from mixdist.data import Digits
from mixdist.experts import Centroid
from mixdist.parallel.launch import Launch
from mixdist.parallel.mesh import Mesh, Placement, choose_device
from tests.errors import error_of

LARGEST = 12
SIZES = range(1, LARGEST + 1)


def _fits(num_experts: int, world_size: int, ep_size: int) -> bool:
    return 1 <= ep_size <= num_experts and world_size % ep_size == 0


def _check_refusal(num_experts: int, world_size: int, ep_size: int | None = None) -> None:
    """Check that a layout is refused in one line that has its numbers and exactly those that work."""
    message = error_of(lambda: Placement.plan(num_experts, world_size, ep_size), num_experts, world_size, ep_size or "")
    found = re.search(r"set mesh\.ep_size to ([\d, ]*(?: or )?\d+)", message)
    assert found is not None, message
    assert list(map(int, re.findall(r"\d+", found[1]))) == [p for p in SIZES if _fits(num_experts, world_size, p)]


@pytest.mark.parametrize("num_experts", SIZES)
def test_replicas_hold_each_expert_once_and_groups_partition_the_ranks(num_experts: int) -> None:
    for world_size, ep_size in ((w, p) for w in SIZES for p in SIZES if _fits(num_experts, w, p)):
        placement = Placement.plan(num_experts, world_size, ep_size)
        blocks = [placement.experts_of(member) for member in range(ep_size)]
        # In order and without gaps: that is once each, and contiguous.
        assert [e for block in blocks for e in block] == list(range(num_experts))
        assert 1 <= min(map(len, blocks)) <= max(map(len, blocks)) <= min(map(len, blocks)) + 1
        ep_groups = [placement.ep_ranks(replica) for replica in range(placement.num_replicas)]
        replica_groups = [placement.replica_ranks(member) for member in range(ep_size)]
        assert [rank for group in ep_groups for rank in group] == list(range(world_size)), "neighbours inside a node"
        assert {len(group) for group in ep_groups} == {ep_size}
        assert replica_groups == [list(ranks) for ranks in zip(*ep_groups, strict=True)]
        for rank in range(world_size):
            assert ep_groups[placement.replica_of(rank)][placement.member_of(rank)] == rank


@pytest.mark.parametrize("num_experts", SIZES)
def test_a_refused_ep_size_is_told_exactly_what_works(num_experts: int) -> None:
    for world_size in SIZES:
        for ep_size in (-1, 0, *SIZES, LARGEST + 1):
            if _fits(num_experts, world_size, ep_size):
                Placement.plan(num_experts, world_size, ep_size)
            else:
                _check_refusal(num_experts, world_size, ep_size)


@pytest.mark.parametrize("num_experts", SIZES)
def test_without_ep_size_all_ranks_or_whole_replicas(num_experts: int) -> None:
    for world_size in SIZES:
        if world_size <= num_experts or world_size % num_experts == 0:
            assert Placement.plan(num_experts, world_size).ep_size == min(num_experts, world_size)
        else:
            _check_refusal(num_experts, world_size)


def test_no_experts_cannot_be_placed() -> None:
    for num_experts in (0, -3):
        error_of(lambda num=num_experts: Placement.plan(num, 2), f"num_experts ({num_experts})")  # type: ignore[misc]


TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_RANK": "1"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2", "SLURM_NTASKS_PER_NODE": "3"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (TORCHRUN, Launch(5, 8, 1, 4)),
        (SRUN, Launch(3, 6, 2, 3)),
        ({}, Launch(0, 1, 0)),
        # torchrun started by srun: the inner launcher made this process.
        (TORCHRUN | SRUN, Launch(5, 8, 1, 4)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, Launch(2, 4, 2, 3)),
        (DEEPSPEED, Launch(5, 8, 1, 4)),
        (DEEPSPEED | TORCHRUN, Launch(5, 8, 1, 4)),
        ({"WORLD_SIZE": "4"}, Launch(0, 1, 0)),
        # A batch script outside srun, or one task: nothing was started together.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "6", "SLURM_LOCALID": "0"}, Launch(0, 1, 0)),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}, Launch(0, 1, 0)),
    ],
)
def test_launch_is_read_from_the_environment(
    env: dict[str, str], expected: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Launch.read(env) == expected
    for name in TORCHRUN | SRUN | DEEPSPEED:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert Launch.read() == expected


def _devices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Make torch see this many CUDA devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    _devices(monkeypatch, 0)
    assert {choose_device(name, Launch(3, 4, 3, 4)) for name in ("auto", "cpu")} == {torch.device("cpu")}
    with pytest.raises(ValueError, match=r"^mesh\.device \(cuda\)"):
        choose_device("cuda", Launch())
    _devices(monkeypatch, 2)
    two, three = ([Launch(rank, n, rank, n) for rank in range(n)] for n in (2, 3))
    assert choose_device("cpu", two[1]) == torch.device("cpu")
    for name in ("auto", "cuda"):
        assert [choose_device(name, one) for one in two] == [torch.device("cuda", 0), torch.device("cuda", 1)]
    # More processes than devices: all of a host compute on the CPU, or all fail, and never some of them.
    assert [choose_device("auto", one) for one in three] == [torch.device("cpu")] * 3
    for one in three:
        with pytest.raises(ValueError, match=r"^3 processes .* 2 CUDA devices"):
            choose_device("cuda", one)


def test_one_process_needs_no_groups() -> None:
    mesh = Mesh(Placement.plan(5, 1), Launch(), torch.device("cpu"))
    assert (mesh.world, mesh.ep_group, mesh.replica_group) == (None, None, None)
    assert list(mesh.experts) == [0, 1, 2, 3, 4]
    assert mesh.leads
    mesh.close()
    assert not torch.distributed.is_initialized()


def test_commands_flush_subnormal_numbers() -> None:
    can = torch.set_flush_denormal(True)
    torch.set_flush_denormal(False)
    tiny = torch.full((64,), 1e-30)
    assert (tiny * 1e-10).count_nonzero() == 64
    build_mesh(Config(Digits(), Competition(Centroid, num_experts=1))).close()
    assert (tiny * 1e-10).count_nonzero() == (0 if can else 64)
