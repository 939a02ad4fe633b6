"""Experts one by one against torch.distributions and exact integrals; stacks of experts against loops over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Laplace, MultivariateNormal, Normal, kl_divergence
from torch.optim import SGD, Adam, AdamW, Optimizer

from mixdist.experts import VAE, Compute, Expert, ExpertBank, Noise, Regressor, time_executions
from mixdist.nets import MLP
from mixdist.nets.mlp import Affine, FeedForward
from mixdist.terms import Batch, ExpertTerms, Field, Spec

SPEC: Spec = {
    "x": Field((6,), torch.float64),
    "image": Field((2, 3, 1), torch.float64),
    "y": Field((3,), torch.float64),
    "number": Field((), torch.float64),
    "label": Field((), torch.int64, num_classes=4),
}
VAES: list[dict[str, Any]] = [
    {"likelihood": "bernoulli"},
    {"likelihood": "bernoulli", "network": MLP([5, 4], "sigmoid"), "field": "image"},
    {"likelihood": "gaussian", "mean": "sigmoid", "scale": 0.7},
    {"likelihood": "gaussian", "mean": "identity", "scale": "learned", "network": MLP([])},
    {"likelihood": "gaussian", "mean": "sigmoid", "scale": "learned", "field": "image"},
    {"likelihood": "laplace", "mean": "identity", "scale": 0.7, "field": "image"},
    {"likelihood": "laplace", "mean": "sigmoid", "scale": "learned", "beta": 0.5, "free_bits": 0.3, "kl_warmup": 8},
]
REGRESSORS: list[dict[str, Any]] = [
    {},
    {"network": MLP([5], "tanh"), "input": "image", "target": "number"},
    {"likelihood": "gaussian", "target": "y"},
    {"likelihood": "gaussian", "scale": 0.7, "network": MLP([5, 4])},
    {"likelihood": "laplace", "target": "image"},
]
variants = pytest.mark.parametrize(("kind", "options"), [(VAE, o) for o in VAES] + [(Regressor, o) for o in REGRESSORS])
vaes = pytest.mark.parametrize("options", VAES)


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _rows(num_rows: int = 7) -> Batch:
    fields = {name: _random(num_rows, *field.shape, seed=len(name)) for name, field in SPEC.items()}
    return {"id": torch.arange(num_rows), **fields, "x": fields["x"].sigmoid(), "image": fields["image"].sigmoid()}


def _make(kind: type[Expert], options: dict[str, Any], seed: int = 0) -> Any:
    """Make an expert with every parameter, biases and scales too, away from its start."""
    expert = kind(SPEC, **({"latent": 3, "network": MLP([5])} | options if kind is VAE else options)).double()
    for number, parameter in enumerate(expert.parameters()):
        parameter.data = 0.5 * _random(*parameter.shape, seed=100 * seed + number)
    expert.anneal(4)
    return expert


def _net(net: FeedForward, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    *inner, last = (layer for layer in net.layers if isinstance(layer, Affine))
    for layer in inner:
        x = activation(x @ layer.weight + layer.bias)
    return x @ last.weight + last.bias


def _activation(options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    return getattr(torch, options["network"].activation if "network" in options else "relu")


def _density(expert: Any, options: dict[str, Any], output: Tensor) -> Distribution:
    if options["likelihood"] == "bernoulli":
        return Bernoulli(logits=output, validate_args=False)
    scale = options.get("scale", "learned")
    scale = expert.likelihood.log_scale.exp() if scale == "learned" else torch.tensor(scale, dtype=torch.float64)
    mean = output.sigmoid() if options.get("mean") == "sigmoid" else output
    return {"gaussian": Normal, "laplace": Laplace}[options["likelihood"]](mean, scale)


def _judge(expert: VAE, options: dict[str, Any], rows: Batch, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give log p(x|z), the KL of each latent dimension and the mean of p(x|z), by torch.distributions."""
    activation = _activation(options)
    x = rows[options.get("field", "x")].flatten(1)
    mean, log_var = _net(expert.encoder, x, activation).tensor_split(2, dim=1)
    qz_x = Normal(mean, log_var.exp().sqrt())
    px_z = _density(expert, options, _net(expert.decoder, qz_x.mean + qz_x.stddev * eps, activation))
    return px_z.log_prob(x).sum(1), kl_divergence(qz_x, Normal(0.0, 1.0)), px_z.mean


@vaes
def test_vae_against_torch_distributions(options: dict[str, Any]) -> None:
    expert, rows, eps = _make(VAE, options), _rows(), _random(7, 3)
    terms = expert(rows, eps)
    log_px, kl_RL, _ = _judge(expert, options, rows, eps)
    _close(terms.log_px_R, log_px)
    _close(terms.kl_R, kl_RL.sum(1))
    weight = options.get("beta", 1.0) * (4 / options["kl_warmup"] if "kl_warmup" in options else 1.0)
    _close(terms.loss_R, weight * kl_RL.clamp(min=options.get("free_bits", 0.0)).sum(1) - log_px)


@vaes
def test_reconstruct_and_sample_give_means(options: dict[str, Any]) -> None:
    expert, rows, shape = _make(VAE, options), _rows(), SPEC[options.get("field", "x")].shape
    _close(expert.reconstruct(rows), _judge(expert, options, rows, torch.zeros(7, 3).double())[2].reshape(7, *shape))
    z = _random(7, 3)
    activation = _activation(options)
    _close(expert.sample(z), _density(expert, options, _net(expert.decoder, z, activation)).mean.reshape(7, *shape))
    inward, outward = ([p.numel() for p in n.parameters() if p.dim() == 1] for n in (expert.encoder, expert.decoder))
    assert outward[:-1] == inward[-2::-1]  # the decoder mirrors the encoder
    assert expert.reconstruct(_rows(0)).shape == expert.sample(z[:0]).shape == (0, *shape)


@pytest.mark.parametrize("weights", [{"beta": 0.0}, {"beta": 4.0}, {"free_bits": 0.5}, {"kl_warmup": 100}])
def test_the_elbo_ignores_the_weights_of_training(weights: dict[str, float]) -> None:
    plain, weighted, rows, eps = _make(VAE, {}), _make(VAE, weights), _rows(), _random(7, 3)
    expected, terms = plain(rows, eps), weighted(rows, eps)
    assert torch.equal(terms.log_px_R - terms.kl_R, -expected.loss_R)
    assert not torch.allclose(terms.loss_R, expected.loss_R)


def test_linear_gaussian_vae_against_its_exact_evidence() -> None:
    # Gauss-Hermite quadrature is the mean over infinitely many draws of eps.
    expert = _make(VAE, {"likelihood": "gaussian", "mean": "identity", "network": MLP([]), "latent": 2})
    rows, (nodes, weights) = _rows(5), np.polynomial.hermite_e.hermegauss(100)
    grid = torch.from_numpy(np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2))
    share = torch.from_numpy(np.outer(weights, weights).ravel() / (2 * math.pi))
    eps = grid.repeat(5, 1)
    with torch.no_grad():
        terms = expert({"x": rows["x"].repeat_interleave(len(grid), 0)}, eps)
        mean, log_var = expert.encode(rows)
        qz_x = Normal(mean[:, None], (0.5 * log_var).exp()[:, None])
        z = qz_x.mean + qz_x.stddev * grid
        log_w = terms.log_px_R.view(5, -1) + (Normal(0.0, 1.0).log_prob(z) - qz_x.log_prob(z)).sum(2)
        decoder, scale = expert.decoder.layers[0], expert.likelihood.log_scale.exp()
        loadings, noise = decoder.weight, scale.square() * torch.eye(6).double()
        evidence = MultivariateNormal(decoder.bias, loadings.T @ loadings + noise).log_prob(rows["x"])
        precision = torch.eye(2).double() + loadings @ loadings.T / scale.square()
        true_mean = (rows["x"] - decoder.bias) @ loadings.T @ precision.inverse() / scale.square()
        posterior = MultivariateNormal(true_mean, precision_matrix=precision)
        gap = kl_divergence(MultivariateNormal(mean, log_var.exp().diag_embed()), posterior)
    torch.testing.assert_close((log_w.exp() @ share).log(), evidence, rtol=1e-9, atol=1e-9)
    elbo = (terms.log_px_R - terms.kl_R).view(5, -1) @ share
    torch.testing.assert_close(elbo, evidence - gap, rtol=1e-10, atol=1e-10)
    assert (elbo < evidence).all()


@pytest.mark.parametrize(("step", "weight"), [(0, 0.0), (1, 0.1), (5, 0.5), (10, 1.0), (1000, 1.0)])
def test_kl_warmup(step: int, weight: float) -> None:
    expert, rows, eps = _make(VAE, {"kl_warmup": 10, "beta": 3.0}), _rows(), _random(7, 3)
    expert.anneal(step)
    terms = expert(rows, eps)
    _close(terms.loss_R + terms.log_px_R, 3.0 * weight * terms.kl_R)
    terms = expert.eval()(rows, eps)
    _close(terms.loss_R + terms.log_px_R, 3.0 * terms.kl_R)
    terms = VAE(SPEC, latent=3, kl_warmup=10).double()(rows, eps)  # before any step: full weight
    _close(terms.loss_R, terms.kl_R - terms.log_px_R)


def test_free_bits_are_a_floor_for_each_dimension() -> None:
    rows, eps = _rows(), _random(7, 3)
    kl_RL = _judge(_make(VAE, {}), VAES[0], rows, eps)[1].detach()
    floor = kl_RL.median().item()  # some dimensions below, some above, in one row too
    expert = _make(VAE, {"free_bits": floor, "beta": 2.0})
    terms = expert(rows, eps)
    charged = np.where(kl_RL.numpy() < floor, floor, kl_RL.numpy()).sum(1)
    _close((terms.loss_R + terms.log_px_R).detach(), 2.0 * torch.from_numpy(charged))


@variants
def test_no_rows(kind: type[Expert], options: dict[str, Any]) -> None:
    expert = _make(kind, options)
    terms = expert(_rows(0), torch.zeros(0, 3).double())
    assert all(field.shape == (0,) for field in terms if field is not None)
    terms.loss_R.sum().backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in expert.parameters())


@pytest.mark.parametrize("options", REGRESSORS)
def test_regressor_against_torch_distributions(options: dict[str, Any]) -> None:
    expert, rows, target = _make(Regressor, options), _rows(), options.get("target", "y")
    activation = _activation(options)
    output, y = _net(expert.net, rows[options.get("input", "x")].flatten(1), activation), rows[target].reshape(7, -1)
    terms = expert(rows, None)
    if options.get("likelihood", "squared") == "squared":
        _close(terms.loss_R, torch.linalg.vector_norm(y - output, dim=1) ** 2)
        assert terms.log_px_R is None
    else:
        _close(terms.log_px_R, _density(expert, options, output).log_prob(y).sum(1))
        assert torch.equal(terms.loss_R, -terms.log_px_R)
    assert terms.kl_R is None
    _close(expert.predict(rows), output.reshape(7, *SPEC[target].shape))
    assert expert.predict(_rows(0)).shape == (0, *SPEC[target].shape)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (partial(VAE, field="z"), r"VAE needs the field 'z', but the data has \[.*\]: set its field"),
        (partial(VAE, field="label"), "VAE needs real numbers, but the field 'label' holds 4 classes"),
        (partial(VAE, beta=-1.0), r"VAE's beta \(-1.0\) must be a number from 0"),
        (partial(VAE, kl_warmup=-1), r"VAE's kl_warmup \(-1\) must be a number from 0"),
        (partial(VAE, free_bits=-0.5), r"VAE's free_bits \(-0.5\) must be a number from 0"),
        (partial(VAE, beta=math.nan), r"VAE's beta \(nan\)"),
        (partial(VAE, network=MLP([0])), r"layer widths \[6, 0, 20\] must all be at least 1"),
        (partial(VAE, latent=0), r"VAE's latent \(0\) must be at least 1"),
        (partial(VAE, likelihood="gaussian", scale=0.0), r"scale \(0.0\) must be a positive number or 'learned'"),
        (partial(VAE, likelihood="laplace", scale=math.nan), r"scale \(nan\) must be a positive number or 'learned'"),
        (partial(Regressor, input="z"), "Regressor needs the field 'z'"),
        (partial(Regressor, target="label"), "Regressor needs real numbers, but the field 'label' holds 4 classes"),
        (partial(Regressor, likelihood="gaussian", scale=-1.0), r"scale \(-1.0\) must be a positive number"),
        (partial(Regressor, network=MLP([3, 0])), r"layer widths \[6, 3, 0, 3\] must all be at least 1"),
    ],
)
def test_what_is_refused(make: Callable[[Spec], Expert], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}") as caught:
        make(SPEC)
    assert "\n" not in str(caught.value)


def _bank(kind: type[Expert], options: dict[str, Any], execution: Any, ids: tuple[int, ...] = (2, 5, 7)) -> ExpertBank:
    return ExpertBank({e: _make(kind, options, seed=e) for e in ids}, execution)


def _given(bank: ExpertBank, eps: Tensor) -> Noise:
    """Hand out given noise (E, R, *): row r has the id r."""
    return lambda ids, experts: eps[[bank.ids.index(e) for e in experts]][:, ids]


def _mixed(terms: Iterable[Tensor | None]) -> Tensor:
    """Mix all fields, rows and experts into one number, each with a weight of its own."""
    return torch.stack([(_random(*f.shape, seed=i) * f).sum() for i, f in enumerate(terms) if f is not None]).sum()


@pytest.mark.parametrize("ids", [(0,), (2, 5, 7)])
@pytest.mark.parametrize("execution", ["loop", "stacked"])
@variants
def test_bank_is_its_experts(kind: type[Expert], options: dict[str, Any], execution: str, ids: tuple[int, ...]) -> None:
    bank, alone = (_bank(kind, options, e, ids) for e in (execution, "loop"))
    rows, eps = _rows(), _random(len(ids), 7, 3)
    terms, judges = (
        bank(rows, _given(bank, eps)),
        [expert(rows, eps[i]) for i, expert in enumerate(alone.owned().values())],
    )
    for field, own in zip(terms, zip(*judges, strict=True), strict=True):
        assert (field is None) == (own[0] is None)
        if field is not None:
            _close(field, torch.stack(own, 1))
    _mixed(terms).backward()
    _mixed(None if f[0] is None else torch.stack(f, 1) for f in zip(*judges, strict=True)).backward()
    assert bank.ids == list(ids)
    for name, parameter in alone.named_parameters():
        gradient = bank.get_parameter(name).grad
        assert parameter.grad is not None
        assert gradient is not None
        assert parameter.grad.abs().max() > 0, name
        _close(gradient, parameter.grad)
    assert all(f.shape == (0, len(ids)) for f in bank(_rows(0), _given(bank, eps[:, :0])) if f is not None)


@pytest.mark.parametrize(
    "optimizer",
    [Adam, partial(Adam, fused=True), AdamW, partial(SGD, momentum=0.9)],
    ids=["adam", "fused", "adamw", "momentum"],
)
def test_optimisers_step_a_stack_like_a_loop(optimizer: Callable[..., Optimizer]) -> None:
    banks, begin = [_bank(VAE, VAES[-1], e) for e in ("loop", "stacked")], _bank(VAE, VAES[-1], "loop").state_dict()
    for bank in banks:
        steppers = [optimizer(expert.parameters(), lr=0.01) for expert in bank.owned().values()]
        for step in range(5):
            for stepper in steppers:
                stepper.zero_grad(set_to_none=False)
            bank(_rows(), _given(bank, _random(3, 7, 3, seed=step))).loss_R.sum().backward()
            for stepper in steppers:
                stepper.step()
    loop, stacked = (bank.state_dict() for bank in banks)
    assert loop.keys() == stacked.keys()
    for name, value in loop.items():
        torch.testing.assert_close(stacked[name], value, rtol=1e-10, atol=1e-12)
        assert not torch.equal(value, begin[name]), name


def test_a_stack_follows_what_is_loaded() -> None:
    source, bank = _bank(VAE, VAES[-1], "loop", (1, 3)), _bank(VAE, VAES[-1], "stacked", (0, 2))
    for new, old in zip(bank.owned().values(), source.owned().values(), strict=True):
        new.load_state_dict(old.state_dict())
    eps = _random(2, 7, 3)
    _close(bank(_rows(), _given(bank, eps)).loss_R, source(_rows(), _given(source, eps)).loss_R)


@pytest.mark.parametrize("execution", ["loop", "stacked"])
def test_a_frozen_bank_gives_no_gradient(execution: str) -> None:
    bank = _bank(VAE, VAES[-1], execution).requires_grad_(False)
    noise = _given(bank, _random(3, 7, 3))
    assert not bank(_rows(), noise).loss_R.requires_grad
    assert all(p.grad is None or p.grad.eq(0).all() for p in bank.parameters())
    bank.requires_grad_(True)(_rows(), noise).loss_R.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in bank.parameters())


def test_an_expert_that_does_not_stack_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^execution 'stacked' .* Expert is not: set execution to 'loop'$"):
        ExpertBank({0: Expert()}, "stacked")


def test_timing_leaves_the_experts_as_they_are() -> None:
    bank = _bank(VAE, VAES[-1], "loop")
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    seconds = time_executions(bank.owned(), _rows(), _given(bank, _random(3, 7, 3)), Compute())
    assert seconds.keys() == {"loop", "stacked"}
    assert min(seconds.values()) > 0
    assert all(torch.equal(value, before[name]) for name, value in bank.state_dict().items())
    assert all(p.grad is None for p in bank.parameters())
    assert time_executions({0: Plain(SPEC)}, _rows(), None, Compute()).keys() == {"loop"}


class Plain(Expert):
    """An expert that does not stack."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.centre = torch.nn.Parameter(torch.zeros(()))

    def forward(self, rows: Batch, eps: Tensor | None) -> ExpertTerms:
        return ExpertTerms((rows["x"].flatten(1) - self.centre).square().sum(1))


@pytest.mark.parametrize(
    "compute", [Compute(micro_batch=3), Compute(micro_batch=2, recompute=True), Compute(recompute=True)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_pieces_and_recomputation_change_nothing(compute: Compute, masked: bool) -> None:
    mask = torch.rand(7, 3, generator=torch.Generator().manual_seed(0)) < 0.5 if masked else None
    eps, results = _random(3, 7, 3), []
    for how in (Compute(), compute):
        bank = ExpertBank({e: _make(VAE, VAES[-1], seed=e) for e in (2, 5, 7)}, "loop", how)
        losses = bank(_rows(), _given(bank, eps), mask).loss_R
        (losses * _random(7, 3)).sum().backward()
        results.append([losses.detach(), *(p.grad for p in bank.parameters())])
    for got, wanted in zip(results[1], results[0], strict=True):
        _close(got, wanted)


@pytest.mark.parametrize("execution", ["loop", "stacked"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_that_come_ahead_are_those_that_come_after(execution: str, masked: bool) -> None:
    mask = torch.rand(7, 3, generator=torch.Generator().manual_seed(0)) < 0.5 if masked else None
    eps, grads = _random(3, 7, 3), _random(7, 3, seed=5)
    after, ahead = (_bank(VAE, VAES[-1], execution) for _ in range(2))
    losses = after(_rows(), _given(after, eps), mask).loss_R
    losses.backward(grads)
    returned = ahead.backward(_rows(), _given(ahead, eps), mask, lambda: grads if mask is None else grads * mask)
    _close(returned, losses.detach())
    assert not returned.requires_grad
    for name, parameter in after.named_parameters():
        got = ahead.get_parameter(name).grad
        assert got is not None
        assert parameter.grad is not None
        _close(got, parameter.grad)
