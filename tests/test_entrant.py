"""One expert that trains by itself, and moves: as the engine of soft mixtures trains it, with all that is its own."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from mixdist.competition.entrant import Entrant
from mixdist.competition.entrants import Entrants
from mixdist.engines import Native, Solo
from mixdist.engines.state import Slot, read_optimizer, write_optimizer
from mixdist.noise import Moment, Purpose
from mixdist.parallel.wire import Wire
from mixdist.stats import Step
from mixdist.terms import Outcome, Parts
from tests.contest import Contest, make_mixture, make_phase
from tests.parity import SEED, data, mesh_of
from tests.pool import Pool

PLACES = [(part, len(part)) for part in torch.arange(45).split(16)]


def go_on(entrant: Entrant) -> None:
    """Train an expert for an epoch, and its discriminator for a pass over the data."""
    entrant.train(data().rows, PLACES, 1, 45)
    entrant.end_epoch()
    entrant.challenge(data().rows, PLACES, 1)


def trained(case: Contest, wire: Wire, number: int = 2, epochs: int = 2, ranks: int = 1) -> Entrant:
    """An expert and its discriminator that have trained for some epochs of 45 rows in batches of 16."""
    entrant = Entrant(number, make_mixture(case, mesh_of(4, ranks, ranks), wire), make_phase(case, 1))
    for _ in range(epochs):
        entrant.train(data().rows, PLACES, 1, 45)
        entrant.end_epoch()
    entrant.meet(1)
    entrant.challenge(data().rows, PLACES, 1)
    return entrant


@pytest.mark.parametrize("optimizer", ["adam", "clipped"])
def test_alone_is_as_with_the_engine_of_mixtures(optimizer: str) -> None:
    case, mesh = Contest(optimizer=optimizer, expert="gaussian"), mesh_of(1, 1, 1)
    entrant, phase = trained(case, Wire(mesh.device)), make_phase(case, 1)
    expert = entrant.mixture.make_expert(2, 0)
    engine = Native(Parts({}, {0: expert}), mesh, Wire(mesh.device), phase.optimizer, clip_norm=phase.clip_norm)
    schedule = phase.schedule(next(iter(engine.optimizers.values()))) if phase.schedule else None
    norms = []
    for step in range(6):
        ids = torch.arange(45).split(16)[step % 3]
        rows = entrant.context.values({n: column[ids] for n, column in data().rows.items()}, expert.fields)
        engine.zero_grad()
        expert.anneal(Step(step, step // 3 + Fraction(16 * (step % 3), 45)))
        assert expert.noise_shape is not None
        eps = Moment(SEED, 1, step).draw(Purpose.POSTERIOR).normal(rows["id"], [2], expert.noise_shape, torch.float64)
        loss = expert(rows, eps[0]).loss_R.sum() / len(ids)
        loss.backward()
        nothing = torch.zeros(1, dtype=torch.float64)
        outcome = Outcome(loss.detach(), {}, {"seen": nothing})
        norms.append(engine.step(outcome, step).grad_norm)
        if schedule is not None and step % 3 == 2:  # alone, a schedule counts epochs
            schedule.step()
    for (name, mine), theirs in zip(entrant.expert.named_parameters(), expert.parameters(), strict=True):
        assert (mine - theirs).abs().max() <= 1e-14 * theirs.abs().max(), name
    assert optimizer == "adam" or max(norms) > 0.5  # it was clipped


def test_an_unused_parameter_gets_a_zero_gradient() -> None:
    module = torch.nn.ParameterDict({"a": torch.ones(2), "b": torch.ones(2)}).double()
    engine = Solo("m", module, None, Wire(torch.device("cpu")), lambda p: torch.optim.Adam(p, 0.1))
    for use in ("a", "b"):
        engine.zero_grad()
        module[use].sum().backward()
        engine.step(torch.zeros(1))
    state = engine.state()
    assert state["a.step"] == state["b.step"] == 2
    assert module["a"].tolist() != [1.0, 1.0]


def test_what_an_optimiser_remembers_comes_back() -> None:
    entrant = trained(Contest(), Wire(torch.device("cpu")))
    optimizer = entrant.engine.optimizer
    slots = list(entrant.engine._slots())
    kept = {name: tensor.clone() for name, tensor in read_optimizer(optimizer, slots).items()}
    assert len(kept) == 3 * len(slots)
    fresh = torch.optim.Adam([slot.tensor for slot in slots], 1e-2)
    write_optimizer(fresh, slots, kept)
    for name, tensor in read_optimizer(fresh, slots).items():
        assert torch.equal(tensor, kept[name])
        assert tensor.data_ptr() != kept[name].data_ptr()


def there_and_back(ranks: int, optimizer: str) -> dict[str, Tensor]:
    """Train, let all experts move to the last rank or the next ones, and home; report what is here before and after."""
    case, mesh = Contest(optimizer=optimizer), mesh_of(4, ranks, ranks)
    wire = Wire(mesh.device)
    entrants = Entrants(make_mixture(case, mesh, wire), phase := make_phase(case, 1))
    entrants.update({e: trained(case, wire, e, 1 + e % 2, ranks) for e in mesh.experts})
    here = list(entrants.values())
    report = {f"before {e} {n}": t for e, entrant in entrants.items() for n, t in entrant.tensors().items()}
    home = [list(mesh.placement.experts_of(member)) for member in range(ranks)]
    around, crowd = [home[-1], *home[:-1]], [[] for _ in range(ranks - 1)] + [[0, 1, 2, 3]]
    for homes in (around, crowd, home):
        entrants.move(homes, phase, 1)
        assert list(entrants) == homes[mesh.member]
    assert not any(entrant in here for entrant in entrants.values())
    # Each goes on from there: what an optimiser and a schedule remember counts.
    after = {f"after {e} {n}": t for e, entrant in entrants.items() for n, t in entrant.tensors().items()}
    for entrant in entrants.values():
        go_on(entrant)
    return report | after | {f"on {e} {n}": t for e, x in entrants.items() for n, t in x.tensors().items()}


@pytest.mark.parametrize("optimizer", ["adam", "clipped"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_there_and_back_nothing_is_lost(pool: Callable[[int], Pool], ranks: int, optimizer: str) -> None:
    found = {n: t for r in pool(ranks).run("tests.test_entrant:there_and_back", ranks, optimizer) for n, t in r.items()}
    for e in range(4):
        stayed = trained(Contest(optimizer=optimizer), Wire(torch.device("cpu")), e, 1 + e % 2)
        names = [name.removeprefix(f"before {e} ") for name in found if name.startswith(f"before {e} ")]
        assert {name.partition("/")[0] for name in names} == {"steps", "expert", "discriminator"}
        for name, tensor in stayed.tensors().items():
            assert torch.equal(found[f"before {e} {name}"], tensor), name
            assert torch.equal(found[f"after {e} {name}"], tensor), name
        go_on(stayed)
        for name, tensor in stayed.tensors().items():
            assert torch.equal(found[f"on {e} {name}"], tensor), name


def test_passes_are_counted_alike_whatever_rows_there_are() -> None:
    case, phase = Contest(), make_phase(Contest(), 1)
    few, many = (Entrant(e, make_mixture(case, mesh_of(4, 1, 1), Wire(torch.device("cpu"))), phase) for e in range(2))
    for entrant, num_rows in ((few, 10), (many, 45)):
        batches = [(part, len(part)) for part in torch.arange(num_rows).split(4)]
        seen = []
        for batch in batches:
            entrant.train(data().rows, [batch], 1, num_rows)
            seen.append(entrant.step(num_rows).epochs)
        assert seen[:2] == [Fraction(4, num_rows), Fraction(8, num_rows)]
        assert seen[-1] == 1
        entrant.end_epoch()
        assert entrant.step(num_rows).epochs == 1
        assert entrant.step(num_rows) == len(batches)
    late = Entrant(0, few.mixture, phase, round=3)  # in the place of another, which trained for two rounds
    late.engine.go_to(0, 2 * phase.epochs)
    assert late.step(7).epochs == 0


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.NAdam])
def test_a_scalar_in_a_stack_keeps_what_is_its_own(make: Callable[[list[Tensor]], Optimizer]) -> None:
    """A scale beside a matrix, three experts of each: all but the counters is one for each expert."""
    stack = {"scale": torch.zeros(3, requires_grad=True), "weight": torch.zeros(3, 2, 2, requires_grad=True)}
    made, again = (make(list(stack.values())) for _ in range(2))
    for tensor in stack.values():
        tensor.grad = torch.arange(float(tensor.numel())).view_as(tensor)
    made.step()
    for place in range(3):
        slots = [Slot(name, tensor, place) for name, tensor in stack.items()]
        write_optimizer(again, slots, read_optimizer(made, slots))
    for tensor in stack.values():
        assert again.state[tensor].keys() == made.state[tensor].keys()
        assert all(torch.equal(value, made.state[tensor][key]) for key, value in again.state[tensor].items())
