"""The primitives move what they say, their adjoints are their transposes, and every byte is counted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mixdist.parallel.agreement import agree, gather_bytes, gather_json
from mixdist.parallel.dispatch import Dispatch
from mixdist.parallel.launch import Launch
from mixdist.parallel.mesh import Mesh, Placement
from mixdist.parallel.route import mask_bytes, pack_mask, unpack_mask
from mixdist.parallel.wire import Wire
from mixdist.terms import Batch, Field
from tests.pool import Pool

LAYOUTS = ((1, 1), (2, 2), (3, 3), (4, 4), (4, 2))
SPEC = {
    "x": Field((2, 3), torch.uint8, 1 / 255),
    "y": Field((), torch.float32),
    "label": Field((), torch.uint8, 1, 0, 9),
}
COUNTS = (3, 0, 5, 2)
NUM_EXPERTS = 5
WIDTH = 1000
LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")


@functools.cache
def make(ranks: int, ep_size: int) -> Dispatch:
    rank = dist.get_rank() if ranks > 1 else 0
    mesh = Mesh(Placement.plan(NUM_EXPERTS, ranks, ep_size), Launch(rank, ranks), torch.device("cpu"), 60.0)
    return Dispatch(mesh, Wire(mesh.device), SPEC)


def own_rows(dispatch: Dispatch) -> Batch:
    """Rows whose numbers tell their id."""
    mesh = dispatch.mesh
    ids = torch.arange(COUNTS[mesh.rank]) + 2**40 + 100 * mesh.rank
    x = (ids[:, None] + torch.arange(6)).remainder(251).to(torch.uint8).reshape(-1, 2, 3)
    return {"id": ids, "x": x, "y": ids.remainder(97).float() / 7, "label": ids.remainder(9).to(torch.uint8)}


def numbers(ids: Tensor, experts: range | Tensor, width: int) -> Tensor:
    """Numbers (rows, experts, width) that tell whose they are."""
    row, expert = ids.remainder(2**40).double()[:, None, None], torch.as_tensor(list(experts)).double()[None, :, None]
    return row * 1000 + expert * 10 + torch.arange(width).double()


def on_ranks(ranks: int, ep_size: int) -> list[str]:
    """Run every check on this rank; give what went wrong."""
    dispatch = make(ranks, ep_size)
    mesh, rows, experts = dispatch.mesh, own_rows(dispatch), range(NUM_EXPERTS)
    counts = COUNTS[:ranks]
    route = dispatch.send(rows, ["x", "y", "label"], counts)
    here = route.rows()
    ids = torch.cat([torch.arange(counts[r]) + 2**40 + 100 * r for r in mesh.placement.ep_ranks(mesh.replica)])
    field = numbers(ids, mesh.experts, 2)
    weights = torch.rand(len(rows["id"]), NUM_EXPERTS, dtype=torch.float64)
    mine = numbers(rows["id"], experts, 2)
    wanted_sum = (weights[:, :, None] * mine).sum(1)
    everyone = torch.cat([torch.arange(n) + 2**40 + 100 * r for r, n in enumerate(counts)])
    found = {
        "ids": torch.equal(here["id"], ids),
        "x": torch.equal(here["x"].reshape(-1, 6)[:, 1].long(), (ids + 1).remainder(251))
        and here["x"].dtype == torch.uint8,
        "y": torch.equal(here["y"], ids.remainder(97).float() / 7),
        "combine": torch.equal(dispatch.combine(field, route), mine),
        "exchange": torch.equal(dispatch.exchange(field, route), numbers(ids, experts, 2)),
        "spread": torch.equal(dispatch.spread(mine, route), field),
        "combine_sum": torch.allclose(dispatch.combine_sum(field, weights, route), wanted_sum, rtol=1e-14, atol=0),
        "sum": torch.equal(dispatch.over_batch.sum(torch.ones(3) * mesh.rank), torch.ones(3) * sum(range(ranks))),
        "gather": torch.equal(dispatch.over_batch.gather(rows["id"].double(), counts), everyone.double()),
    }
    return [name for name, good in found.items() if not good]


def masked(num_rows: int, rank: int, density: float) -> Tensor:
    """Some experts for each row; of the densities, 0 is none at all and 2 is expert 3 for every row."""
    if density == 2:
        return torch.arange(NUM_EXPERTS).eq(3).expand(num_rows, -1)
    return torch.rand(num_rows, NUM_EXPERTS, generator=torch.Generator().manual_seed(rank)) < density


def some_on_ranks(ranks: int, ep_size: int, density: float) -> dict[str, Any]:
    """Send rows to some experts only: what went wrong on this rank, its bytes, and both sides of two adjoints."""
    dispatch = make(ranks, ep_size)
    mesh, rows = dispatch.mesh, own_rows(dispatch)
    routed = masked(len(rows["id"]), mesh.rank, density)
    dispatch.wire.meter.reset()
    [counts] = dispatch.arrivals([routed])
    route = dispatch.send_some(rows, ["x", "y", "label"], routed, counts)
    here = route.rows()
    assert route.mask_Re is not None
    wanted_ids, wanted_mask = [], []
    for rank in mesh.placement.ep_ranks(mesh.replica):
        theirs = masked(COUNTS[rank], rank, density)[:, list(mesh.experts)]
        wanted_ids.append((torch.arange(COUNTS[rank]) + 2**40 + 100 * rank)[theirs.any(1)])
        wanted_mask.append(theirs[theirs.any(1)])
    ids, mask = torch.cat(wanted_ids), torch.cat(wanted_mask)
    mine = numbers(rows["id"], range(NUM_EXPERTS), 2) * routed[:, :, None]
    field = numbers(ids, mesh.experts, 2) * mask[:, :, None]
    found = {
        "ids": torch.equal(here["id"], ids),
        "y": torch.equal(here["y"], ids.remainder(97).float() / 7),
        "mask": torch.equal(route.mask_Re, mask),
        "combine": torch.equal(dispatch.combine(field, route), mine),
        "spread": torch.equal(dispatch.spread(mine, route), field),
    }
    generator = torch.Generator().manual_seed(mesh.rank)
    sides = {}
    for name, shape, apply in (("combine", field.shape, dispatch.combine), ("spread", mine.shape, dispatch.spread)):
        x = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        result = apply(x, route)
        y = torch.randn(result.shape, dtype=torch.float64, generator=generator)
        (gradient,) = torch.autograd.grad(result, x, y)
        sides[name] = ((result * y).sum().item(), (x * gradient).sum().item())
    meter = dispatch.wire.meter
    wrong = [name for name, good in found.items() if not good]
    return {"wrong": wrong, "sides": sides, "sent": meter.wire_bytes, "least": meter.wire_bytes_min}


def adjoints(ranks: int, ep_size: int) -> dict[str, tuple[float, float]]:
    """Give this rank's part of <A x, y> and <x, A' y> for each primitive A, its transpose A' by autograd."""
    dispatch = make(ranks, ep_size)
    mesh, rows = dispatch.mesh, own_rows(dispatch)
    counts = COUNTS[:ranks]
    route = dispatch.send(rows, ["x"], counts)
    generator = torch.Generator().manual_seed(mesh.rank)
    here, local, own = route.num_rows, len(mesh.experts), len(rows["id"])
    weights = torch.rand(own, NUM_EXPERTS, dtype=torch.float64, generator=generator)
    maps: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
        "combine": ((here, local, 2), lambda f: dispatch.combine(f, route)),
        "exchange": ((here, local, 2), lambda f: dispatch.exchange(f, route)),
        "spread": ((own, NUM_EXPERTS), lambda f: dispatch.spread(f, route)),
        "combine_sum": ((here, local, 2), lambda f: dispatch.combine_sum(f, weights, route)),
        "sum": ((4,), dispatch.over_batch.sum),
        "gather": ((own, 2), lambda f: dispatch.over_batch.gather(f, counts)),
    }
    result = {}
    for name, (shape, apply) in maps.items():
        x = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        result_x = apply(x)
        y = torch.randn(result_x.shape, dtype=torch.float64, generator=generator)
        (gradient,) = torch.autograd.grad(result_x, x, y)
        result[name] = ((result_x * y).sum().item(), (x * gradient).sum().item())
    return result


def traffic(num_rows: int) -> dict[str, Any]:
    """Send wide rows between two ranks; give what the meter counted and what the loopback interface did."""
    mesh = Mesh(Placement.plan(2, 2), Launch(dist.get_rank(), 2), torch.device("cpu"), 60.0)
    wire = Wire(mesh.device)
    dispatch = Dispatch(mesh, wire, {"x": Field((3, 64, 64), torch.uint8)})
    rows = {"id": torch.arange(num_rows), "x": torch.zeros(num_rows, 3, 64, 64, dtype=torch.uint8)}
    dist.barrier()
    before = int(LOOPBACK.read_text())
    route = dispatch.send(rows, ["x"], (num_rows, num_rows))
    wide = (route.rows()["x"].double().reshape(-1, 1, 3 * 64 * 64)[:, :, :WIDTH] + 1).requires_grad_()
    dispatch.combine(wide, route).sum().backward()
    dist.barrier()
    return {
        "seen": int(LOOPBACK.read_text()) - before,
        "sent": wire.meter.wire_bytes,
        "least": wire.meter.wire_bytes_min,
    }


def control() -> list[Any]:
    """Gather values and an error that only one rank has."""
    rank = dist.get_rank()
    group = dist.group.WORLD
    try:
        agree("disk full" if rank == 2 else None, group)
    except ValueError as error:
        return [gather_json({"rank": rank}, group), gather_bytes(b"x" * rank, group), str(error)]
    return []


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_primitives_move_what_they_say(pool: Callable[[int], Pool], layout: tuple[int, int]) -> None:
    assert pool(layout[0]).run("tests.test_dispatch:on_ranks", *layout) == [[]] * layout[0]


@pytest.mark.parametrize("density", [0.0, 0.3, 0.8, 2.0])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rows_go_to_some_experts_only(pool: Callable[[int], Pool], layout: tuple[int, int], density: float) -> None:
    """A row once to each rank with an expert for it; two numbers a pair back, and by autograd two out, and so on."""
    reports = pool(layout[0]).run("tests.test_dispatch:some_on_ranks", *layout, density)
    assert [report["wrong"] for report in reports] == [[]] * layout[0]
    for name in ("combine", "spread"):
        forward, backward = (sum(report["sides"][name][i] for report in reports) for i in (0, 1))
        assert forward == pytest.approx(backward, rel=1e-12), name
    placement = Placement.plan(NUM_EXPERTS, *layout)
    copies = pairs = masks = 0
    for rank in range(layout[0]):
        routed = masked(COUNTS[rank], rank, density)
        for member in range(placement.ep_size):
            if member != placement.member_of(rank):
                there = routed[:, list(placement.experts_of(member))]
                copies += int(there.any(1).sum())
                pairs += int(there.sum())
                masks += int(there.any(1).sum()) if there.shape[1] > 1 else 0
    # combine and spread once, then each again with its gradient: six moves of two float64 a pair.
    wanted = copies * (8 + 6 + 4 + 1) + 6 * pairs * 2 * 8
    assert sum(report["least"] for report in reports) == wanted
    assert sum(report["sent"] for report in reports) == wanted + masks


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_adjoints_are_transposes(pool: Callable[[int], Pool], layout: tuple[int, int]) -> None:
    parts = pool(layout[0]).run("tests.test_dispatch:adjoints", *layout)
    for name in parts[0]:
        forward, backward = (sum(part[name][i] for part in parts) for i in (0, 1))
        assert forward == pytest.approx(backward, rel=1e-12), name


@pytest.mark.skipif(not LOOPBACK.exists(), reason="no counters of the loopback interface here")
def test_counted_bytes_are_those_of_the_interface(pool: Callable[[int], Pool]) -> None:
    """Two ranks on one host: 2 x 400 rows of 12,288 bytes with their ids; wide fields back, their gradients out."""
    seen = []
    for _ in range(5):  # whatever else uses the interface only adds: the least of some attempts is ours
        reports = pool(2).run("tests.test_dispatch:traffic", 400)
        sent, least = (sum(report[name] for report in reports) for name in ("sent", "least"))
        assert sent == least == 2 * 400 * (3 * 64 * 64 + 8) + 2 * 400 * 2 * 8 * WIDTH
        seen.append(max(report["seen"] for report in reports))
    assert sent <= min(seen) <= 1.05 * sent  # headers and acknowledgements


@pytest.mark.parametrize("num_experts", [1, 2, 7, 8, 9, 16, 17, 40])
@pytest.mark.parametrize("num_rows", [0, 1, 30])
def test_masks_come_back_as_they_were(num_rows: int, num_experts: int) -> None:
    mask = torch.rand(num_rows, num_experts, generator=torch.Generator().manual_seed(num_experts)) < 0.5
    mask |= num_experts == 1  # a row that goes to a member with one expert is for that one
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (num_rows, mask_bytes(num_experts))
    assert unpack_mask(packed, num_experts).equal(mask)


def test_all_ranks_learn_of_one_rank_s_error(pool: Callable[[int], Pool]) -> None:
    for values, data, message in pool(3).run("tests.test_dispatch:control"):
        assert values == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert data == [b"", b"x", b"xx"]
        assert message == "rank 2: disk full"
