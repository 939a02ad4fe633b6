"""Gates: responsibilities against scipy, limits of the temperature, the oracle, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from mixdist.gates import Consistent, Gate, LabelOracle, Softmax, Uniform
from mixdist.nets import MLP, Conv
from mixdist.terms import Batch, Field, Spec

SPEC: Spec = {
    "x": Field((6,), torch.float64),
    "image": Field((1, 2, 3), torch.uint8, scale=1 / 255),
    "picture": Field((2, 9, 12), torch.float64),
    "number": Field((), torch.float64),
    "y": Field((), torch.int64, num_classes=4),
}
KINDS = ["uniform", "linear", "mlp", "image", "conv", "oracle"]


def _gate(kind: str, num_experts: int = 4) -> Gate:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        match kind:
            case "uniform":
                gate: Gate = Uniform(SPEC, num_experts)
            case "oracle":
                gate = LabelOracle(SPEC, num_experts)
            case "mlp":
                gate = Softmax(SPEC, num_experts, network=MLP([5], "tanh"), temperature=0.5)
            case "conv":
                gate = Softmax(SPEC, num_experts, Conv([8, 12], True, "group"), temperature=0.7, field="picture")
            case "image":
                gate = Softmax(SPEC, num_experts, field="image")
            case _:
                gate = Softmax(SPEC, num_experts)
    return gate.double()


def _rows(num_rows: int = 50) -> Batch:
    generator = torch.Generator().manual_seed(1)
    values = {n: torch.randn(num_rows, *f.shape, generator=generator).double() for n, f in SPEC.items() if n != "y"}
    return {"id": torch.arange(num_rows), "y": torch.arange(num_rows) % 4, **values}


def _log_resp(gate: Gate, rows: Batch) -> Tensor:
    """Ask the gate about the fields it says it reads, and no others."""
    gating = gate({"id": rows["id"], **{name: rows[name] for name in gate.fields}}, None)
    assert gating.loss_B is None
    return gating.log_resp_BE.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_responsibilities_sum_to_one(kind: str) -> None:
    log_resp = _log_resp(_gate(kind), _rows())
    assert log_resp.dtype == torch.float64
    assert log_resp.shape == (50, 4)
    torch.testing.assert_close(log_resp.logsumexp(1), torch.zeros(50).double(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind: str) -> None:
    gate = _gate(kind)
    log_resp = gate(_rows(0), None).log_resp_BE
    assert log_resp.shape == (0, 4)
    if log_resp.requires_grad:
        log_resp.sum().backward()
        assert all(p.grad is not None and p.grad.eq(0).all() for p in gate.parameters())
        gate(_rows(), None).log_resp_BE[:, 1].sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in gate.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_no_other(kind: str) -> None:
    gate, rows = _gate(kind), _rows()
    some = {name: column[[40, 7]] for name, column in rows.items()}
    torch.testing.assert_close(_log_resp(gate, some), _log_resp(gate, rows)[[40, 7]], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("temperature", [1e-8, 0.3, 1.0, 4.0, 1e12])
def test_softmax_against_scipy(temperature: float) -> None:
    for network, field in ((None, "x"), (MLP([5]), "image"), (Conv([8, 12]), "picture"), (None, "number")):
        gate, rows = Softmax(SPEC, 3, network, temperature, field).double(), _rows()
        logits = gate.net(rows[field].reshape(50, -1)).detach().numpy()
        expected = scipy.special.log_softmax(logits / temperature, axis=1)
        np.testing.assert_allclose(_log_resp(gate, rows).numpy(), expected, rtol=1e-12, atol=1e-13)


def _annealed(dtype: torch.dtype = torch.float64) -> Softmax:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Softmax(SPEC, 4, MLP([5], "tanh"), 3.0, "x", 0.3, noise=0.7, final_noise=0.1, anneal_steps=40)
    return made.to(dtype)


def test_schedules_end_where_they_say() -> None:
    gate = _annealed()
    assert (gate.temperature.item(), gate.noise.item()) == (3.0, 0.7)
    seen = {}
    for step in (0, 10, 20, 40, 1000):
        gate.anneal(step)
        seen[step] = (gate.temperature.item(), gate.noise.item())
    assert seen[0] == (3.0, 0.7)
    assert seen[40] == seen[1000] == (0.3, 0.1)
    assert seen[20] == pytest.approx((math.sqrt(3.0 * 0.3), 0.4), rel=1e-14)
    assert seen[10] == pytest.approx((3.0**0.75 * 0.3**0.25, 0.55), rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_schedule_depends_on_the_step_alone(dtype: torch.dtype) -> None:
    stepped, resumed = _annealed(dtype), _annealed(dtype)
    for step in range(18):
        stepped.anneal(step)
    resumed.anneal(17)
    assert torch.equal(stepped.temperature, resumed.temperature)
    assert torch.equal(stepped.noise, resumed.noise)
    assert not {"temperature", "noise"} & stepped.state_dict().keys()


def test_a_step_of_the_schedule_is_a_softmax_of_that_temperature_and_noise() -> None:
    gate, rows = _annealed(), _rows()
    eps = torch.randn(50, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gate.anneal(10)
    logits = gate.logits(rows) + 0.55 * eps
    expected = scipy.special.log_softmax(logits.detach().numpy() / (3.0**0.75 * 0.3**0.25), axis=1)
    np.testing.assert_allclose(gate(rows, eps).log_resp_BE.detach().numpy(), expected, rtol=1e-12, atol=1e-13)


def test_evaluation_is_at_the_final_temperature_and_without_noise() -> None:
    gate, rows = _annealed().eval(), _rows()
    expected = (gate.logits(rows) / 0.3).log_softmax(1)
    for step, eps in ((0, None), (20, torch.ones(50, 4).double()), (99, torch.randn(50, 4).double())):
        gate.anneal(step)
        torch.testing.assert_close(gate(rows, eps).log_resp_BE, expected, rtol=1e-14, atol=0)


def test_noise_is_of_its_row_alone() -> None:
    gate, rows = _annealed(), _rows()
    assert gate.noise_shape == (4,)
    assert Softmax(SPEC, 4).noise_shape is None
    eps = torch.randn(50, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    before = gate(rows, eps).log_resp_BE
    eps[7] += 1.0
    eps[7, 2] += 1.0
    changed = (gate(rows, eps).log_resp_BE != before).any(1)
    assert changed.nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("num_experts", [1, 3, 10])
def test_uniform_is_exact(num_experts: int) -> None:
    gate = Uniform(SPEC, num_experts).double()
    assert gate.fields == ()
    assert not list(gate.parameters())
    expected = torch.full((50, num_experts), -math.log(num_experts), dtype=torch.float64)
    torch.testing.assert_close(_log_resp(gate, _rows()), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("num_experts", [4, 7])
def test_oracle_is_one_hot(num_experts: int) -> None:
    gate, rows = LabelOracle(SPEC, num_experts).double(), _rows()
    assert gate.fields == ("y",)
    resp = _log_resp(gate, rows).exp()
    assert resp.tolist() == np.eye(num_experts)[rows["y"].numpy()].tolist()


def _on_pictures(spec: Spec, num_experts: int, noise: float = 0.0) -> Gate:
    return Softmax(spec, num_experts, MLP([5], "tanh"), field="picture", noise=noise)


def _consistent(noise: float = 0.0, **options: Any) -> Consistent:
    still = {"shift": 0.0, "rotation": 0.0, "scale": 0.0, "shear": 0.0, "field": "picture"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Consistent(SPEC, 4, partial(_on_pictures, noise=noise), **still | options).double()


def _view_noise(gate: Gate, num_rows: int = 50) -> Tensor:
    assert gate.noise_shape is not None
    generator = torch.Generator().manual_seed(5)
    return torch.randn(num_rows, *gate.noise_shape, generator=generator, dtype=torch.float64)


MOVED = {"shift": 2.0, "rotation": 20.0, "scale": 0.3, "shear": 0.2}


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_view_that_is_the_picture_costs_nothing(noise: float) -> None:
    gate, rows = _consistent(noise), _rows()
    eps = _view_noise(gate)
    torch.testing.assert_close(gate.view(rows["picture"], eps[:, :6]), rows["picture"], rtol=0, atol=1e-12)
    loss = gate(rows, eps).loss_B
    torch.testing.assert_close(loss, torch.zeros(50).double(), rtol=0, atol=1e-12)
    assert (_consistent(noise, **MOVED)(rows, eps).loss_B > 0).all()


def test_the_loss_is_the_divergence_from_the_answer_for_the_view() -> None:
    gate, rows = _consistent(weight=3.0, **MOVED), _rows()
    eps = _view_noise(gate)
    gating = gate(rows, eps)
    moved = gate.gate(rows | {"picture": gate.view(rows["picture"], eps)}, None)
    q, p = (log_resp.detach().exp().numpy() for log_resp in (gating.log_resp_BE, moved.log_resp_BE))
    np.testing.assert_allclose(gating.loss_B.detach().numpy(), 3.0 * scipy.stats.entropy(q, p, axis=1), rtol=1e-10)
    assert torch.equal(gating.log_resp_BE, gate.gate(rows, None).log_resp_BE)


def test_the_weight_warms_up_with_the_step_and_the_inner_gate_anneals() -> None:
    inner = partial(Softmax, field="picture", temperature=4.0, final_temperature=1.0, anneal_steps=20)
    gate = Consistent(SPEC, 4, inner, weight=3.0, field="picture", warmup_steps=10).double()
    rows, eps = _rows(), _view_noise(gate)
    full = gate(rows, eps).loss_B
    for step, share in ((0, 0.0), (5, 0.5), (10, 1.0), (10**6, 1.0), (1, 0.1)):
        gate.anneal(step)
        assert gate.gate.temperature.item() == pytest.approx(4.0 ** (1 - min(1.0, step / 20)), rel=1e-14)
        gate.gate.temperature.fill_(4.0)
        torch.testing.assert_close(gate(rows, eps).loss_B, share * full, rtol=1e-12, atol=0)


def test_evaluation_sees_the_picture_alone() -> None:
    gate, rows = _consistent(noise=0.5, **MOVED).eval(), _rows()
    expected = gate.gate(rows, None).log_resp_BE
    for eps in (None, _view_noise(gate)):
        gating = gate(rows, eps)
        assert gating.loss_B is None
        assert torch.equal(gating.log_resp_BE, expected)


def test_a_view_is_of_its_row_alone() -> None:
    gate, rows = _consistent(noise=0.5, **MOVED), _rows()
    eps = _view_noise(gate)
    some = {name: column[[40, 7]] for name, column in rows.items()}
    torch.testing.assert_close(gate(some, eps[[40, 7]]).loss_B, gate(rows, eps).loss_B[[40, 7]], rtol=1e-12, atol=1e-13)
    assert gate({name: column[:0] for name, column in rows.items()}, eps[:0]).loss_B.shape == (0,)


def test_consistency_can_be_learned() -> None:
    gate, rows = _consistent(weight=1.0, **MOVED), _rows()
    eps = _view_noise(gate)
    loss = gate(rows, eps).loss_B.mean()
    gradients = torch.autograd.grad(loss, list(gate.parameters()))
    assert all(g.isfinite().all() and g.any() for g in gradients)
    with torch.no_grad():
        for parameter, gradient in zip(gate.parameters(), gradients, strict=True):
            parameter -= 1e-3 * gradient
    assert gate(rows, eps).loss_B.mean() < loss


def test_a_shift_moves_whole_pixels() -> None:
    gate, rows = _consistent(shift=3.0), _rows()
    u = torch.tensor([2 / 3, -1 / 3], dtype=torch.float64).expand(50, 2)
    eps = torch.cat([math.sqrt(2.0) * torch.erfinv(u), torch.zeros(50, 4)], dim=1)
    expected = torch.zeros_like(rows["picture"])
    expected[:, :, 1:, :-2] = rows["picture"][:, :, :-1, 2:]  # read 2 to the right and 1 above
    torch.testing.assert_close(gate.view(rows["picture"], eps), expected, rtol=0, atol=1e-10)


def test_a_turn_keeps_lengths_where_pictures_are_not_square() -> None:
    gate = _consistent(rotation=90.0)
    x = torch.randn(1, 2, 4, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    eps = torch.zeros(1, 6, dtype=torch.float64)
    eps[0, 4] = 40.0  # u is 1: the largest turn
    middle = x[..., 3:7]  # a turn about the centre stays within the four columns in the middle
    torch.testing.assert_close(gate.view(x, eps)[..., 3:7], middle.rot90(1, (2, 3)), rtol=0, atol=1e-9)


def test_sizes_lie_between_the_limits() -> None:
    gate = _consistent(scale=1.0)
    x = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    x[:, :, 2:6, 2:6] = 1.0
    eps = torch.zeros(2, 6, dtype=torch.float64)
    eps[:, 2:4] = torch.tensor([[-40.0], [40.0]])  # twice the size, half the size
    assert gate.view(x, eps).sum((1, 2, 3)).tolist() == pytest.approx([64.0, 4.0], rel=0.2)


REFUSED: list[tuple[Callable[..., Gate], dict[str, Any], str]] = [
    (LabelOracle, {"spec": {"x": SPEC["x"]}}, r" needs the label 'y', but the data has no labels"),
    (LabelOracle, {"field": "class"}, r" needs the label 'class', but the data has labels \['y'\]"),
    (LabelOracle, {"field": "x"}, r" needs the label 'x', but the data has labels \['y'\]"),
    (LabelOracle, {"num_experts": 3}, " has 4 classes for 3 experts: set num_experts to 4"),
    (Softmax, {"field": "z"}, " needs .*'z'"),
    (Softmax, {"field": "y"}, " needs .*'y'"),
    (Softmax, {"temperature": 0.0}, r"'s temperature \(0.0\) must be positive: give 1 for a plain softmax"),
    (Softmax, {"temperature": math.nan}, r"'s temperature \(nan\) must be positive"),
    (Softmax, {"final_temperature": -1.0, "anneal_steps": 5}, r"'s final_temperature \(-1.0\) must be positive"),
    (Softmax, {"noise": -0.5}, r"'s noise \(-0.5\) must be a number from 0: give 0 for none"),
    (Softmax, {"noise": 1.0, "final_noise": math.inf, "anneal_steps": 5}, r"'s final_noise \(inf\) must be a number"),
    (Softmax, {"final_noise": 0.0, "anneal_steps": -5}, r"'s anneal_steps \(-5\) must be a number of training steps"),
    (Softmax, {"final_temperature": 0.5}, r"'s final_temperature \(0.5\) is never reached .*: set anneal_steps"),
    (Softmax, {"anneal_steps": 5}, r"'s anneal_steps \(5\) has nothing to anneal: set final_temperature or"),
    (_consistent, {"field": "x"}, r" needs an image \(channels, height, width\), not 'x': the data has .*: set field"),
    (_consistent, {"field": "none"}, " needs an image .*, not 'none'"),
    (_consistent, {"field": "image"}, r"'s field is 'image', but Softmax reads \['picture'\]: set the same field"),
    *(
        (_consistent, {name: value}, rf"'s {name} \({value}\) must be a number .*: give 0 for no")
        for name in ("weight", "shift", "rotation", "scale", "shear")
        for value in (-0.1, math.inf, math.nan)
    ),
    (_consistent, {"warmup_steps": -1}, r"'s warmup_steps \(-1\) must be a number .*: give 0 for no"),
    (_consistent, {"warmup_steps": math.inf}, r"'s warmup_steps \(inf\) must be a whole number or a Warmup"),
]


@pytest.mark.parametrize(("make", "given", "said"), REFUSED)
def test_what_is_refused_is_named_in_one_line(make: Callable[..., Gate], given: dict[str, Any], said: str) -> None:
    kind = "Consistent" if make is _consistent else make.__name__
    with pytest.raises(ValueError, match=f"^{kind}{said}") as caught:
        make(**({} if make is _consistent else {"spec": SPEC, "num_experts": 4}) | given)
    assert "\n" not in str(caught.value)
