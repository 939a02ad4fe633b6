"""Banks of experts beyond what tests/test_experts.py says: optimisers, pieces, freezing, memory formats, timing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from mixdist.experts import VAE, Compute, ExpertBank, time_executions
from mixdist.nets import MLP
from mixdist.stats import Warmup
from tests.test_experts import NAMES, SPEC, close, given, make_bank, random, rows_of

LAPLACE, CONV = NAMES.index("VAE-5"), NAMES.index("VAE-11")
executions = pytest.mark.parametrize("execution", ["loop", "stacked"])
masks = pytest.mark.parametrize("mask", [None, random(7, 3, seed=3) < 0.3], ids=["all", "masked"])


def gradients(bank: ExpertBank) -> list[Tensor | None]:
    return [p.grad for p in bank.parameters()]


def trained(bank: ExpertBank, mask: Tensor | None = None) -> list[Any]:
    """Return losses and gradients, with a weight for each loss."""
    losses = bank(rows_of(), given(bank, random(len(bank.ids), 7, 3)), mask).loss_R
    (losses * random(*losses.shape, seed=5)).sum().backward()
    return [losses.detach(), *gradients(bank)]


@pytest.mark.parametrize(
    "optimizer",
    [Adam, partial(Adam, fused=True), AdamW, partial(SGD, momentum=0.9)],
    ids=["adam", "fused", "adamw", "momentum"],
)
def test_optimisers_step_a_stack_like_a_loop(optimizer: Callable[..., Optimizer]) -> None:
    banks, begin = [make_bank(LAPLACE, e) for e in ("loop", "stacked")], make_bank(LAPLACE, "loop").state_dict()
    for bank in banks:
        steppers = [optimizer(expert.parameters(), lr=0.01) for expert in bank.owned().values()]
        for step in range(5):
            for stepper in steppers:
                stepper.zero_grad(set_to_none=False)
            bank(rows_of(), given(bank, random(3, 7, 3, seed=step))).loss_R.sum().backward()
            for stepper in steppers:
                stepper.step()
    loop, stacked = (bank.state_dict() for bank in banks)
    assert loop.keys() == stacked.keys()
    for name, value in loop.items():
        close(stacked[name], value, rtol=1e-10)
        assert not torch.equal(value, begin[name]), name


def test_a_stack_follows_what_is_loaded() -> None:
    source, bank = make_bank(LAPLACE, "loop", (1, 3)), make_bank(LAPLACE, "stacked", (0, 2))
    for new, old in zip(bank.owned().values(), source.owned().values(), strict=True):
        new.load_state_dict(old.state_dict())
    eps = random(2, 7, 3)
    close(bank(rows_of(), given(bank, eps)).loss_R, source(rows_of(), given(source, eps)).loss_R)


@executions
def test_a_frozen_bank_gives_no_gradient(execution: str) -> None:
    bank = make_bank(LAPLACE, execution).requires_grad_(False)
    noise = given(bank, random(3, 7, 3))
    assert not bank(rows_of(), noise).loss_R.requires_grad
    assert all(grad is None or grad.eq(0).all() for grad in gradients(bank))
    bank.requires_grad_(True)(rows_of(), noise).loss_R.sum().backward()
    assert all(grad is not None and grad.abs().max() > 0 for grad in gradients(bank))


@pytest.mark.parametrize(
    "compute", [Compute(micro_batch=3), Compute(micro_batch=2, recompute=True), Compute(recompute=True)]
)
@masks
def test_pieces_and_recomputation_change_nothing(compute: Compute, mask: Tensor | None) -> None:
    whole, cut = (trained(make_bank(LAPLACE, "loop", compute=how), mask) for how in (Compute(), compute))
    for got, wanted in zip(cut, whole, strict=True):
        close(got, wanted)


@executions
@masks
def test_gradients_that_come_ahead_are_those_that_come_after(execution: str, mask: Tensor | None) -> None:
    after, ahead = (make_bank(LAPLACE, execution) for _ in range(2))
    losses, *expected = trained(after, mask)
    grads, noise = random(7, 3, seed=5), given(ahead, random(3, 7, 3))
    returned = ahead.backward(rows_of(), noise, mask, lambda: grads if mask is None else grads * mask)
    close(returned, losses)
    assert not returned.requires_grad
    for got, wanted in zip(gradients(ahead), expected, strict=True):
        close(got, wanted)


@pytest.mark.parametrize("how", [Compute(channels_last=True), Compute(channels_last=True, micro_batch=4)])
def test_channels_last_changes_nothing_but_the_memory_format(how: Compute) -> None:
    plain, last = (trained(make_bank(CONV, "loop", compute=compute)) for compute in (Compute(), how))
    for got, wanted in zip(last, plain, strict=True):
        close(got, wanted, rtol=1e-12, atol=1e-12)


def test_bfloat16_runs_the_networks_and_not_the_densities() -> None:
    rows = {name: column.float() if column.is_floating_point() else column for name, column in rows_of().items()}
    losses = []
    for bf16 in (False, True):
        bank = make_bank(CONV, "loop", (0,), compute=Compute(bf16=bf16)).float()
        losses.append(bank(rows, given(bank, random(1, 7, 3).float())).loss_R.detach())
        assert losses[-1].dtype == torch.float32
    assert not torch.equal(*losses)
    torch.testing.assert_close(*losses, rtol=2e-2, atol=0.0)


def test_timing_leaves_the_experts_as_they_are() -> None:
    bank = make_bank(LAPLACE, "loop")
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    seconds = time_executions(bank.owned(), rows_of(), given(bank, random(3, 7, 3)), Compute())
    assert seconds.keys() == {"loop", "stacked"}
    assert min(seconds.values()) > 0
    assert all(torch.equal(value, before[name]) for name, value in bank.state_dict().items())
    assert all(grad is None for grad in gradients(bank))
    unstackable = make_bank(CONV, "loop")
    noise = given(unstackable, random(3, 7, 3))
    assert time_executions(unstackable.owned(), rows_of(), noise, Compute()).keys() == {"loop"}


@pytest.mark.parametrize("options", [{"beta": 2.0}, {"samples": 5}, {"kl_warmup": 9}, {"kl_warmup": Warmup(steps=9)}])
def test_a_stack_is_of_experts_with_the_same_options(options: dict[str, Any]) -> None:
    """It runs through the first one: the others would take its weight of the KL, its warm-up and its samples."""
    alike, other = [VAE(SPEC, 3, MLP([4])) for _ in range(2)], VAE(SPEC, 3, MLP([4]), **options)
    assert ExpertBank(dict(enumerate(alike))).can_stack
    with pytest.raises(ValueError, match=r"stacked.* options and buffers.* loop"):
        ExpertBank({0: alike[0], 1: other}, "stacked")


def test_a_stack_is_of_experts_with_the_same_buffers() -> None:
    experts = [VAE(SPEC, 3, MLP([4])) for _ in range(2)]
    for e, expert in enumerate(experts):
        expert.encoder.register_buffer("shift", torch.tensor(0.1 * e))
    assert not ExpertBank(dict(enumerate(experts))).can_stack
