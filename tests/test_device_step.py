"""What a training step does on a device, judged without one: one host tensor, one read, one draw.

The device is that of ``tests/device.py``. Counted is the second step, from clearing gradients to the totals, once
its rows are there; the first one makes what is made once. ``python -m tests.test_device_step`` prints the table of
docs/engines.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from mixdist.competition.entrant import Entrant
from mixdist.mixtures import Masks, WeightedLoss
from mixdist.noise import Draw, Moment
from mixdist.parallel.launch import Launch
from mixdist.parallel.mesh import Mesh, Placement
from mixdist.parallel.wire import Wire
from mixdist.terms import places
from tests.contest import Contest, make_phase
from tests.contest import make_mixture as make_competition
from tests.device import DEVICE, Device
from tests.parity import SEED, Case, Loader, data, make_engine, make_mixture, make_objective, rows_of

SENT = {"engine.start_totals": 1}
"""The one host tensor of a step: the bytes that this rank has sent, which are summed with all else."""
TOTALS = {"engine.start_totals.finish": 1}
"""The one read of a step: what it was over all ranks, which says whether anything is not finite."""
ARRIVALS = {"dispatch.Dispatch.arrivals": 1}
"""What sparse routes need beside: how many rows and pairs go and come, before memory is made for them."""
EIGENVALUES = {"penalties.W2.__call__": 1}
"""torch waits for a device's eigenvalues, to see that they were found."""

SOFT = Case(balance="none")
MVAE = replace(SOFT, family="mvae", gate="none")
MMVAE = replace(SOFT, family="mmvae", num_experts=3, expert="laplace", gate="dreg-looser")


class Law(NamedTuple):
    """What a step of a case does.

    Args:
        case: what trains.
        draws: of noise.
        reads: beside that of the totals.
    """

    case: Case
    draws: int = 1
    reads: Mapping[str, int] = MappingProxyType({})


LAWS = {
    "Soft, dense, loop": Law(SOFT),
    "Soft, dense, stacked": Law(replace(SOFT, execution="stacked")),
    "Soft, dense, one way": Law(replace(SOFT, way="ahead")),
    "Soft, dense, a balance term": Law(replace(SOFT, balance="kl", objective="tempered")),
    "Soft, dense, micro-batches": Law(replace(SOFT, memory="recompute")),
    "Soft, dense, accumulation of 2": Law(replace(SOFT, accumulate=2), 2),
    "Soft, dense, clipped": Law(replace(SOFT, optimizer="clipped-sgd")),
    "Soft, dense, sharded": Law(replace(SOFT, engine="sharded")),
    "Soft, dense, fixed gate": Law(replace(SOFT, gate="uniform")),
    "Soft, top-2, loop": Law(replace(SOFT, routing="top2"), 1, ARRIVALS),
    "Soft, top-2, stacked": Law(replace(SOFT, routing="top2", execution="stacked"), 1, ARRIVALS),
    "Soft, top-2, one way": Law(replace(SOFT, routing="top2", way="ahead"), 1, ARRIVALS),
    "Soft, top-2, accumulation of 2": Law(replace(SOFT, routing="top2", accumulate=2), 2, ARRIVALS),
    "Soft, top-1 with a capacity": Law(replace(SOFT, routing="top1-tight"), 1, ARRIVALS),
    "Soft, experts of three noise shapes": Law(replace(SOFT, expert="unlike", num_experts=5), 3),
    "Soft, noisy gate": Law(replace(SOFT, gate="annealed"), 2),
    "Soft, consistent gate": Law(replace(SOFT, gate="consistent"), 2),
    "Soft, GMM": Law(replace(SOFT, gate="gmm")),
    "Soft, VaDE": Law(replace(SOFT, gate="vade"), 2),
    "Soft, DMVAE": Law(replace(SOFT, gate="dmvae"), 2),
    "VaDE alone": Law(replace(SOFT, gate="vade", expert="silent", objective="gate")),
    "MVAE": Law(MVAE, 2),
    "MVAE, masks": Law(replace(MVAE, gate="gumbel-shared"), 3),
    "MVAE, masks that put components off": Law(replace(MVAE, gate="gumbel-each-off"), 3, {"masks.Masks.on": 1}),
    "MVAE, DHSIC": Law(replace(MVAE, balance="dhsic"), 2),
    "MVAE, MMD, accumulation of 2": Law(replace(MVAE, balance="mmd", accumulate=2), 6),
    "MVAE, W2": Law(replace(MVAE, balance="w2"), 2, EIGENVALUES),
    "MVAE, mutual posteriors": Law(replace(MVAE, balance="mutual"), 2),
    "MMVAE": Law(MMVAE),
    "MMVAE, three private latents": Law(replace(MMVAE, objective="private"), 4),
    "PoEMVAE, random subsets": Law(replace(MMVAE, family="poe"), 2),
    "MoPoE": Law(replace(MMVAE, family="mopoe")),
}


class Counts(NamedTuple):
    """What a step did: the counts of ``Device``, draws, and its loss."""

    operators: int
    noise: int
    draws: int
    copies: dict[str, int]
    reads: dict[str, int]
    loss: float


@functools.cache
def mesh_on(device: torch.device, num_experts: int, ranks: int, ep_size: int) -> Mesh:
    launch = Launch(dist.get_rank() if ranks > 1 else 0, ranks)
    return Mesh(Placement.plan(num_experts, ranks, ep_size), launch, device, 60.0)


@contextmanager
def draws_counted(device: Device) -> Iterator[list[str]]:
    """Count draws, and the operators within."""
    drawn: list[str] = []

    def counted(draw: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            drawn.append(draw.__name__)
            device.drawing = True
            found = draw(*args, **kwargs)
            device.drawing = False
            return found

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("normal", "uniform"):
            patch.setattr(Draw, name, counted(getattr(Draw, name)))
        yield drawn


def count(case: Case, at: torch.device = DEVICE, prepare: Callable[[Any], None] = lambda mixture: None) -> Counts:
    """Do two steps on this rank, of a mixture that is prepared first; return what the second one did."""
    mesh, device = mesh_on(at, case.num_experts, case.ranks, case.ep_size), Device()
    wire = Wire(mesh.device)
    with device.running(), draws_counted(device) as drawn:
        mixture = make_mixture(case, mesh, wire)
        prepare(mixture)
        engine = make_engine(case, mixture, mesh, wire)
        loader = Loader(rows_of(case), case.batch_size, SEED, 0, mesh.rank, mesh.world_size)
        for step in range(2):
            batch = loader.batch(0, step).to(mesh.device)
            device.clear()
            drawn.clear()
            objective = make_objective(case) if case.family == "soft" else WeightedLoss()
            engine.zero_grad()
            outcome = mixture.backward(batch, objective, Moment(SEED, 0, step), case.accumulate)
            totals = engine.step(outcome, step)
    copies, reads = dict(+device.copies), dict(+device.reads)
    return Counts(device.operators, device.noise, len(drawn), copies, reads, totals.outcome.loss.item())


@pytest.mark.parametrize("name", LAWS)
def test_a_step_sends_one_tensor_reads_once_and_draws_once(name: str) -> None:
    case, draws, reads = LAWS[name]
    found = count(case)
    assert found.copies == SENT
    assert found.reads == {**TOTALS, **reads}
    assert found.draws == draws
    assert found.loss == pytest.approx(count(case, torch.device("cpu")).loss, rel=1e-12)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_components_that_are_off_are_read_once_too(accumulate: int) -> None:
    def put_off(mixture: Any) -> None:
        mixture.masks.above_E[1:] += 500

    case = replace(MVAE, gate="gumbel-each-off", balance="dhsic", accumulate=accumulate)
    found, plain = count(case, DEVICE, put_off), count(case, torch.device("cpu"), put_off)
    assert found.reads == {**TOTALS, "masks.Masks.on": 1}
    assert found.copies == SENT
    assert found.loss == pytest.approx(plain.loss, rel=1e-12)
    assert found.loss != pytest.approx(count(case).loss)


@pytest.mark.parametrize("case", [SOFT, replace(SOFT, routing="top2"), MVAE], ids=["dense", "top-2", "MVAE"])
def test_draws_do_not_depend_on_the_number_of_experts(case: Case) -> None:
    few, many = (count(replace(case, num_experts=number)) for number in (2, 6))
    assert (few.draws, few.noise) == (many.draws, many.noise)


@pytest.mark.parametrize("case", [SOFT, replace(SOFT, routing="top2"), MVAE], ids=["dense", "top-2", "MVAE"])
def test_ranks_read_no_more_than_one_process(case: Case, pool: Callable[[int], Any]) -> None:
    alone = count(case)
    for found in pool(2).run("tests.test_device_step:count", replace(case, ranks=2, ep_size=2)):
        assert (found.copies, found.reads, found.draws) == (alone.copies, alone.reads, alone.draws)
        assert found.loss == pytest.approx(alone.loss, rel=1e-12)


def test_an_expert_of_a_competition_reads_its_loss_and_norms_once_a_step() -> None:
    contest, device = Contest(), Device()
    mesh = mesh_on(DEVICE, contest.num_experts, 1, 1)
    with device.running(), draws_counted(device) as drawn:
        mixture = make_competition(contest, mesh, Wire(DEVICE))
        entrant = Entrant(1, mixture, make_phase(contest, 1))
        rows = {name: column.to(DEVICE) for name, column in data().rows.items()}
        for _ in range(2):
            batches = [(torch.arange(i, i + 10).to(DEVICE), 10) for i in (0, 10, 20)]
            device.clear()
            drawn.clear()
            entrant.train(rows, batches, 0, 30)
    assert not +device.copies
    assert dict(+device.reads) == {"solo.Solo.step": 3}
    assert drawn == ["normal"]


@pytest.mark.parametrize("kind", ["none", "gaussian", "gumbel"])
def test_masks_live_where_their_mixture_does(kind: Any) -> None:
    with Device().running():
        masks = Masks(3, kind).to(DEVICE)
        found = [masks.rates(), masks.mean(), masks.kept(), masks.cost(), masks.log_masks(masks.rates()[None] * 0.5)]
        assert {one.device for one in found} == {DEVICE}


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_places_are_found_without_a_read(density: float) -> None:
    mask = torch.rand(7, 5, generator=torch.Generator().manual_seed(0)) < density
    device, number = Device(), int(mask.sum())
    with device.running():
        there = mask.to(DEVICE)
        found = places(there, number)
        assert not +device.reads
        assert torch.equal(found.cpu(), places(mask, number))
    assert torch.equal(places(mask, number), mask.flatten().nonzero()[:, 0])


def table() -> list[str]:
    """Return the counts of every case, four experts, as lines of a table."""
    lines = ["| a step of | operators | in draws | draws | host tensors sent | reads |", "|---|---|---|---|---|---|"]
    for name, law in LAWS.items():
        found = count(law.case)
        sizes = [found.operators, found.noise, found.draws, sum(found.copies.values()), sum(found.reads.values())]
        lines.append(" | ".join([f"| {name}", *map(str, sizes)]) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
