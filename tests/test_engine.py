"""The engine: one norm of everything counted once, zero gradients that step, and nothing that is not finite."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from mixdist.engines import Native, NotFinite
from mixdist.engines.state import check_elementwise
from mixdist.experts import VAE, Expert, ExpertBank
from mixdist.nets import MLP
from mixdist.noise import Moment
from mixdist.parallel.launch import Launch
from mixdist.parallel.mesh import Mesh, Placement
from mixdist.parallel.wire import Wire
from mixdist.terms import Field, Outcome, Parts
from mixdist.training.phases import Phase
from mixdist.training.trainer import Trainer
from tests.launch import changed, here, write_config
from tests.parity import SEED, Case, Loader, data, make_mixture, make_objective

MESH4 = Mesh(Placement.plan(4, 1), Launch(), torch.device("cpu"))
MESH = Mesh(Placement.plan(3, 1), Launch(), torch.device("cpu"))


def parts() -> Parts:
    torch.manual_seed(0)
    return Parts({"gate": nn.Linear(3, 2).double()}, {e: nn.Linear(2, 2).double() for e in range(3)})


def outcome(**changed: Any) -> Outcome:
    zero, seen = torch.zeros((), dtype=torch.float64), torch.full((3,), 4.0, dtype=torch.float64)
    return Outcome(**{"loss": zero, "parts": {}, "sums": {"seen": seen}, **changed})


def engine_of(made: Parts, optimizer: Callable[..., Any] | None = None, **arguments: Any) -> Native:
    return Native(made, MESH, Wire(MESH.device), optimizer or (lambda p: torch.optim.SGD(p, 1.0)), **arguments)


def all_parameters(made: Parts) -> list[nn.Parameter]:
    return [p for owned in made.owned() for p in owned.module.parameters()]


def fill(made: Parts) -> None:
    for i, parameter in enumerate(all_parameters(made)):
        parameter.grad = torch.full_like(parameter, 0.1 * (i + 1))


@pytest.mark.parametrize("clip_norm", [None, 0.3, 1e6])
def test_clipping_is_torch_s_own_on_all_parameters(clip_norm: float | None) -> None:
    made = parts()
    engine = engine_of(made, clip_norm=clip_norm)
    fill(made)
    judge = copy.deepcopy(all_parameters(made))
    for mine, parameter in zip(judge, all_parameters(made), strict=True):
        assert parameter.grad is not None
        mine.grad = parameter.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(judge, clip_norm or float("inf"))
    # torch divides by norm + 1e-6, and mixdist by the norm.
    exact = 1.0 if clip_norm is None or norm <= clip_norm else (norm.item() + 1e-6) / norm.item()
    totals = engine.step(outcome(), 1)
    assert totals.grad_norm == pytest.approx(norm.item(), rel=1e-14)
    for mine, parameter in zip(judge, all_parameters(made), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(parameter.detach(), (mine - exact * mine.grad).detach(), rtol=1e-14, atol=1e-14)


def test_a_missing_gradient_is_zero_and_its_optimizer_steps() -> None:
    made = parts()
    engine = engine_of(made, lambda p: torch.optim.Adam(p, 0.1))
    fill(made)
    engine.step(outcome(), 1)
    before = [p.detach().clone() for p in made.experts[1].parameters()]
    engine.zero_grad()
    engine.step(outcome(), 2)
    state = engine.optimizer_state(made.owned()[2])
    assert state["weight.step"].item() == 2
    # Adam's momentum of the first step goes on moving the weights: a skipped step would not.
    assert all(not torch.equal(a, b) for a, b in zip(before, made.experts[1].parameters(), strict=True))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"faults": {"the loss of expert {}": torch.tensor([0.0, 0.0, 2.0])}},
            "step 7: the loss of expert 2 is not finite for 2 of 4 rows",
        ),
        ({"faults": {"the gate's output": torch.tensor(3.0)}}, "step 7: the gate's output is not finite for 3 rows"),
        ({"loss": torch.tensor(torch.inf)}, r"step 7: the loss \(inf\) is not finite"),
    ],
)
def test_what_is_not_finite_is_named_and_nothing_moves(changed: dict[str, Any], said: str) -> None:
    made = parts()
    engine = engine_of(made)
    fill(made)
    before = [p.detach().clone() for p in all_parameters(made)]
    with pytest.raises(NotFinite, match=said) as caught:
        engine.step(outcome(**changed), 7)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, all_parameters(made), strict=True))


@pytest.mark.parametrize(("owner", "name"), [(0, "gate"), (2, "expert 1")])
def test_a_gradient_that_is_not_finite_is_named(owner: int, name: str) -> None:
    made = parts()
    engine = engine_of(made)
    fill(made)
    parameter = next(iter(made.owned()[owner].module.parameters()))
    assert parameter.grad is not None
    parameter.grad[0, 0] = torch.nan
    with pytest.raises(NotFinite, match=f"the gradient of {name} is not finite"):
        engine.step(outcome(), 1)


def nan_row_on_one_rank(bad_rank: int) -> str:
    """Train a step in which one rank's expert breaks; every rank must hear of it."""
    mesh = Mesh(Placement.plan(4, 2), Launch(dist.get_rank(), 2), torch.device("cpu"), 60.0)
    wire, case = Wire(mesh.device), Case(ranks=2, ep_size=2)
    mixture = make_mixture(case, mesh, wire)
    engine = Native(mixture.parts, mesh, wire, lambda p: torch.optim.Adam(p))
    if mesh.rank == bad_rank:
        broken = list(mixture.parts.experts.values())[1]
        next(broken.parameters()).data[0, 0] = torch.nan
    shard = Loader(data(), 16, SEED, 0, mesh.rank, 2).batch(0, 0)
    result = mixture.backward(shard, make_objective(case), Moment(SEED))
    try:
        engine.step(result, 5)
    except NotFinite as error:
        return str(error)
    return "nothing was seen"


@pytest.mark.parametrize(("bad_rank", "expert"), [(0, 1), (1, 3)])
def test_every_rank_hears_of_one_rank_s_broken_expert(pool: Callable[..., Any], bad_rank: int, expert: int) -> None:
    for message in pool(2).run("tests.test_engine:nan_row_on_one_rank", bad_rank):
        assert message.startswith(f"step 5: the loss of expert {expert} is not finite for 16 of 16 rows")


def test_a_schedule_is_replayed_to_the_same_rate() -> None:
    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5)
        fall = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 6], 0.3)
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, fall], [5])

    walked, jumped = (engine_of(parts(), lambda p: torch.optim.SGD(p, 0.7), schedule=schedule) for _ in range(2))
    rates = []
    for step in range(12):
        rates.append(walked.learning_rate())
        walked.step(outcome(), step)
    assert len(set(rates)) > 5
    jumped.fast_forward(12)
    assert jumped.learning_rate() == walked.learning_rate()


def test_modules_that_do_not_train_have_no_optimizer_and_do_not_count() -> None:
    made = parts()
    made.shared["gate"].requires_grad_(False)
    engine = engine_of(made)
    fill(made)
    assert list(engine.optimizers) == ["expert 0", "expert 1", "expert 2"]
    own = [p.grad for p in all_parameters(made) if p.requires_grad and p.grad is not None]
    expected = torch.stack([g.square().sum() for g in own]).sum().sqrt().item()
    assert engine.step(outcome(), 1).grad_norm == pytest.approx(expected, rel=1e-14)


def stacked_or_loop(execution: Any, steps: int, first: dict[str, dict[str, Tensor]] | None = None) -> Any:
    """Train three VAEs for some steps, from a state if one is given: weights and the optimiser's state of each."""
    spec = {"x": Field((1, 4, 4), torch.uint8, 1 / 255)}
    experts: dict[int, Expert] = {}
    for e in range(3):
        torch.manual_seed(e)
        experts[e] = VAE(spec, 2, MLP([5])).double()
    bank = ExpertBank(experts, execution)
    made = Parts({}, dict(bank.owned()), bank.stack)
    engine = engine_of(made, lambda p: torch.optim.Adam(p, 0.1, amsgrad=True), clip_norm=1.0)
    for owned in made.owned() if first else ():
        owned.module.load_state_dict(first[f"{owned.name} model"])
        engine.load_optimizer_state(owned, first[f"{owned.name} state"])
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        rows = {"id": torch.arange(7), "x": torch.rand(7, 1, 4, 4, generator=generator, dtype=torch.float64)}
        eps = torch.randn(3, 7, 2, generator=generator, dtype=torch.float64)
        engine.zero_grad()
        bank(rows, lambda ids, numbers, shape, eps=eps: eps[list(numbers)]).loss_R.sum().backward()
        engine.step(outcome(), step)
    kept = {f"{o.name} model": {n: v.clone() for n, v in o.module.state_dict().items()} for o in made.owned()}
    return kept | {
        f"{o.name} state": {n: v.clone() for n, v in engine.optimizer_state(o).items()} for o in made.owned()
    }


def test_a_stack_s_optimiser_is_those_of_its_experts() -> None:
    """Weights and state agree with a loop's, and go from one to the other in the middle."""
    halves = {way: stacked_or_loop(way, 4) for way in ("loop", "stacked")}
    torch.testing.assert_close(halves["stacked"], halves["loop"], rtol=1e-12, atol=1e-14)
    kept = halves["stacked"]["expert 1 state"]
    assert {"encoder.layers.0.weight.exp_avg", "encoder.layers.0.weight.step"} <= kept.keys()
    whole = stacked_or_loop("loop", 3, halves["loop"])
    for way, other in (("stacked", "loop"), ("loop", "stacked"), ("stacked", "stacked")):
        torch.testing.assert_close(stacked_or_loop(way, 3, halves[other]), whole, rtol=1e-12, atol=1e-14)
    fresh = stacked_or_loop("loop", 3, {n: {} if n.endswith("state") else v for n, v in halves["loop"].items()})
    difference = fresh["expert 1 model"]["encoder.layers.0.weight"] - whole["expert 1 model"]["encoder.layers.0.weight"]
    assert difference.abs().max() > 1e-4  # the state is what makes it the same


class Watching(Native):
    """Sees every gradient that reaches a parameter, and whether that is within ``accumulating``."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.inside, self.seen = False, []
        for _, parameters in self.trained:
            for parameter in parameters:
                parameter.register_hook(lambda grad: self.seen.append(self.inside))

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False


@pytest.mark.parametrize("way", ["back", "ahead"])
def test_an_engine_sees_every_backward_pass(way: str) -> None:
    case = Case(way=way, accumulate=3, gate="noisy", balance="kl")
    mixture = make_mixture(case, MESH4, Wire(MESH4.device))
    phase = Phase(epochs=1, batch_size=16, accumulate=3, objective=make_objective(case), optimizer=torch.optim.SGD)
    trainer = Trainer(mixture, data(), [phase], Watching)
    while not trainer.finished:
        trainer.advance()
    engine = trainer.engine
    assert isinstance(engine, Watching)
    assert all(engine.seen)
    assert len(engine.seen) >= 3 * 3 * sum(len(parameters) for _, parameters in engine.trained[1:])


OWN_ENGINE = '''
"""Sign descent: the native engine with other steps, from a file of a user's own."""
import torch
from mixdist.engines import Native


class Signs(Native):
    def __init__(self, parts, mesh, wire, optimizer, schedule=None, clip_norm=None, rate: float = 0.1):
        super().__init__(parts, mesh, wire, optimizer, schedule, clip_norm)
        self.rate = rate

    def step(self, outcome, step):
        before = {p: p.detach().clone() for _, parameters in self.trained for p in parameters}
        totals = super().step(outcome, step)
        with torch.no_grad():
            for parameter, old in before.items():
                parameter.copy_(old - self.rate * parameter.grad.sign())
        return totals
'''


def test_an_engine_of_ones_own_is_named_in_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "signs.py").write_text(OWN_ENGINE)
    engine = {"class_path": "signs.Signs", "init_args": {"rate": 0.01}}
    config = write_config(tmp_path / "c.yaml", changed(engine=engine, mixture__init_args__execution="loop"))
    assert here("train", "--config", config, "--out", "two").code == 0
    assert here("train", "--config", config, "--out", "one", "--engine.rate", "0.02").code == 0
    one, two = (load_file(tmp_path / run / "checkpoints/step-000000003/gate.safetensors") for run in ("one", "two"))
    moved = [(one[name] - two[name]).abs().max() for name in one if name.startswith("model.")]
    assert 0 < max(moved) <= 0.09 + 1e-6  # three steps, in which the rates differ by 0.01 or add up to 0.03


def test_an_engine_that_cannot_run_a_stack_says_so() -> None:
    class Plain(Native):
        stacks = False

    phase = Phase(epochs=1, batch_size=16, objective=make_objective(Case()), optimizer=torch.optim.SGD)
    for execution in ("loop", "stacked"):
        mixture = make_mixture(Case(execution=execution), MESH4, Wire(MESH4.device))
        if execution == "loop":
            assert Trainer(mixture, data(), [phase], Plain).engine.stacks is False
            continue
        with pytest.raises(ValueError, match=r"execution \(stacked\).* Plain.*loop"):
            Trainer(mixture, data(), [phase], Plain)


@pytest.mark.parametrize("execution", ["loop", "stacked"])
def test_a_stack_refuses_an_optimiser_that_looks_at_shapes(execution: Any) -> None:
    """It would step all experts by the norm of all: another run than experts one by one, and on another layout."""
    mixture = make_mixture(Case(execution=execution), MESH4, Wire(MESH4.device))
    phase = Phase(epochs=1, batch_size=16, objective=make_objective(Case()), optimizer=torch.optim.Adafactor)
    if execution == "loop":
        assert Trainer(mixture, data(), [phase], Native).engine.kind() == "Adafactor"
        return
    with pytest.raises(ValueError, match=r"train\.optimizer \(Adafactor\).* stack .*mixture\.execution to loop"):
        Trainer(mixture, data(), [phase], Native)


@pytest.mark.parametrize(
    "name", ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adagrad", "RMSprop", "Rprop", "ASGD", "Adamax"]
)
def test_optimisers_that_work_element_by_element_are_known(name: str) -> None:
    check_elementwise(getattr(torch.optim, name), "a stack", "nothing")
