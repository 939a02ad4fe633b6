"""Placement as arithmetic, over every small case; launch, device and arithmetic without starting anything."""

from __future__ import annotations

import re

import pytest
import torch

from mixdist.config.build import build_mesh
from mixdist.config.config import Config
from mixdist.data import Digits
from mixdist.experts import Centroid
from mixdist.parallel.launch import Launch
from mixdist.parallel.mesh import Mesh, Placement, choose_device

LARGEST = 12
SIZES = range(1, LARGEST + 1)


def _fits(num_experts: int, world_size: int, ep_size: int) -> bool:
    return 1 <= ep_size <= num_experts and world_size % ep_size == 0


def _refusal(num_experts: int, world_size: int, ep_size: int | None = None) -> str | None:
    try:
        Placement.plan(num_experts, world_size, ep_size)
    except ValueError as error:
        return str(error)
    return None


def _advised(message: str) -> list[int]:
    found = re.search(r"set mesh\.ep_size to ([\d, ]*(?: or )?\d+)", message)
    assert found is not None, message
    return [int(number) for number in re.findall(r"\d+", found[1])]


@pytest.mark.parametrize("num_experts", SIZES)
def test_each_expert_once_in_each_replica(num_experts: int) -> None:
    for world_size in SIZES:
        for ep_size in (p for p in SIZES if _fits(num_experts, world_size, p)):
            placement = Placement.plan(num_experts, world_size, ep_size)
            blocks = [placement.experts_of(member) for member in range(ep_size)]
            # In order and without gaps: that is once each, and contiguous.
            assert [e for block in blocks for e in block] == list(range(num_experts))
            sizes = [len(block) for block in blocks]
            assert min(sizes) >= 1
            assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("num_experts", SIZES)
def test_groups_partition_the_ranks(num_experts: int) -> None:
    for world_size in SIZES:
        for ep_size in (p for p in SIZES if _fits(num_experts, world_size, p)):
            placement = Placement.plan(num_experts, world_size, ep_size)
            ep_groups = [placement.ep_ranks(replica) for replica in range(placement.num_replicas)]
            replica_groups = [placement.replica_ranks(member) for member in range(ep_size)]
            assert {len(group) for group in ep_groups} == {ep_size}
            assert {len(group) for group in replica_groups} == {placement.num_replicas}
            for groups in (ep_groups, replica_groups):
                assert sorted(rank for group in groups for rank in group) == list(range(world_size))
            for rank in range(world_size):
                replica, member = placement.replica_of(rank), placement.member_of(rank)
                assert ep_groups[replica][member] == rank
                assert replica_groups[member][replica] == rank
            # Neighbours, so that an EP group stays inside a node.
            assert all(group == list(range(group[0], group[0] + ep_size)) for group in ep_groups)


@pytest.mark.parametrize("num_experts", SIZES)
def test_a_refused_ep_size_is_told_exactly_what_works(num_experts: int) -> None:
    for world_size in SIZES:
        works = [p for p in SIZES if _fits(num_experts, world_size, p)]
        assert works == [p for p in SIZES if _refusal(num_experts, world_size, p) is None]
        for ep_size in sorted({-1, 0, *SIZES, LARGEST + 1} - set(works)):
            message = _refusal(num_experts, world_size, ep_size)
            assert message is not None
            assert _advised(message) == works
            assert "\n" not in message
            for said in (f"num_experts ({num_experts})", f"{world_size} ranks", f"ep_size {ep_size}:"):
                assert said in message


@pytest.mark.parametrize("num_experts", SIZES)
def test_without_ep_size_all_ranks_or_whole_replicas(num_experts: int) -> None:
    for world_size in SIZES:
        message = _refusal(num_experts, world_size)
        if world_size <= num_experts or world_size % num_experts == 0:
            assert message is None
            assert Placement.plan(num_experts, world_size).ep_size == min(num_experts, world_size)
            continue
        assert message is not None
        assert "\n" not in message
        assert f"{num_experts} experts cannot be placed on {world_size} ranks" in message
        assert _advised(message) == [p for p in SIZES if _fits(num_experts, world_size, p)]
        assert f"start at most {num_experts} ranks or a multiple of {num_experts}" in message


@pytest.mark.parametrize("num_experts", [0, -3])
def test_no_experts_cannot_be_placed(num_experts: int) -> None:
    with pytest.raises(ValueError, match=rf"num_experts \({num_experts}\) must be at least 1"):
        Placement.plan(num_experts, 2)


TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
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
        ({"WORLD_SIZE": "4"}, Launch(0, 1, 0)),
        # A batch script outside srun, or one task: nothing was started together.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "6", "SLURM_LOCALID": "0"}, Launch(0, 1, 0)),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}, Launch(0, 1, 0)),
    ],
)
def test_launch_is_read_from_the_environment(env: dict[str, str], expected: Launch) -> None:
    assert Launch.read(env) == expected


def test_launch_reads_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert Launch.read() == Launch(5, 8, 1, 4)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """A machine that has this many CUDA devices, as far as torch can tell."""
    count: int = request.param
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return count


@pytest.mark.parametrize("devices", [0], indirect=True)
def test_device_without_cuda(devices: int) -> None:
    assert choose_device("auto", Launch(3, 4, 3, 4)) == torch.device("cpu")
    assert choose_device("cpu", Launch(3, 4, 3, 4)) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"^mesh\.device \(cuda\) needs a CUDA device and none is here: set"):
        choose_device("cuda", Launch())


@pytest.mark.parametrize("devices", [2], indirect=True)
def test_device_with_cuda(devices: int) -> None:
    two, three = ([Launch(rank, n, rank, n) for rank in range(n)] for n in (2, 3))
    assert choose_device("cpu", two[1]) == torch.device("cpu")
    for name in ("auto", "cuda"):
        assert [choose_device(name, one) for one in two] == [torch.device("cuda", 0), torch.device("cuda", 1)]
    # More processes than devices: all of a host compute on the CPU, or all fail, and never some of them.
    assert [choose_device("auto", one) for one in three] == [torch.device("cpu")] * 3
    for one in three:
        with pytest.raises(ValueError, match=r"^3 processes on this host have 2 CUDA devices: start at most 2"):
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
    build_mesh(Config(Digits(), Centroid, num_experts=1)).close()
    assert (tiny * 1e-10).count_nonzero() == (0 if can else 64)
