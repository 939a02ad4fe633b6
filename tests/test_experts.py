"""Laws of all experts, stated once: terms and means against torch.distributions, rows that know nothing of each other,
no rows, stacks against loops; then what only one kind has."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import Tensor
from torch.distributions import Bernoulli, ContinuousBernoulli, Laplace, MultivariateNormal, Normal, kl_divergence

import mixdist
from mixdist.cli.main import main
from mixdist.data import Digits
from mixdist.experts import VAE, Centroid, Classifier, Expert, ExpertBank, Noise, Regressor
from mixdist.mixtures.objectives import SoftMinLoss
from mixdist.nets import MLP, Conv
from mixdist.terms import Batch, ExpertTerms, Field, Spec

SPEC: Spec = {
    "x": Field((6,), torch.float64),
    "image": Field((2, 3, 1), torch.float64),
    "picture": Field((3, 9, 6), torch.uint8, scale=1 / 255),
    "grey": Field((1, 8, 8), torch.uint8, scale=1 / 16),
    "real": Field((1, 8, 8), torch.float64),
    "y": Field((3,), torch.float64),
    "number": Field((), torch.float64),
    "label": Field((), torch.uint8, num_classes=4),
    "pair": Field((2,), torch.uint8, num_classes=4),
    "far": Field((4000,), torch.float64, offset=-7.0),
}
VAES: list[dict[str, Any]] = [
    {"likelihood": "bernoulli", "network": MLP([5])},
    {"likelihood": "bernoulli", "network": MLP([5, 4], "sigmoid"), "field": "image"},
    {"likelihood": "continuous_bernoulli", "network": MLP([5]), "field": "image"},
    {"likelihood": "gaussian", "network": MLP([5]), "scale": 0.7},
    {"likelihood": "gaussian", "network": MLP([]), "mean": "identity"},
    {"likelihood": "laplace", "network": MLP([5]), "mean": "identity", "scale": 0.7, "field": "image"},
    {"likelihood": "laplace", "network": MLP([5]), "beta": 0.5, "free_bits": 0.05, "kl_warmup": 8},
    {"likelihood": "logistic", "network": MLP([5]), "field": "grey"},
    {"likelihood": "logistic", "network": MLP([5]), "scale": 0.05, "field": "picture"},
    {"likelihood": "gaussian", "network": Conv([8, 12], residual=True), "field": "picture"},
    {"likelihood": "gaussian", "network": Conv([8, 12], norm="group"), "scale": 0.3, "field": "grey"},
    {"likelihood": "laplace", "network": Conv([8, 12]), "mean": "identity", "free_bits": 1.0, "field": "real"},
    {"likelihood": "logistic", "network": Conv([8, 12], True, "group", "silu"), "kl_warmup": 8, "field": "picture"},
    {"likelihood": "bernoulli", "network": Conv([8, 12], kernel=4), "field": "picture"},
]
REGRESSORS: list[dict[str, Any]] = [
    {},
    {"network": MLP([5], "tanh"), "input": "image", "target": "number"},
    {"likelihood": "gaussian", "network": Conv([4]), "input": "picture"},
    {"likelihood": "gaussian", "scale": 0.7, "network": MLP([5, 4])},
    {"likelihood": "laplace", "target": "image"},
]
CLASSIFIERS: list[dict[str, Any]] = [{}, {"network": MLP([5, 4], "tanh")}, {"network": Conv([4]), "input": "picture"}]
CENTROIDS: list[dict[str, Any]] = [{}, {"scale": 0.3, "field": "image"}, {"scale": 2.0, "field": "grey"}]
CASES: list[tuple[type[Expert], dict[str, Any]]] = [
    *((VAE, {"latent": 3, "scale": "learned", "mean": "sigmoid"} | options) for options in VAES),
    *((Regressor, {"likelihood": "squared", "scale": "learned"} | options) for options in REGRESSORS),
    *((Classifier, {"target": "label"} | options) for options in CLASSIFIERS),
    *((Centroid, {"scale": 1.0} | options) for options in CENTROIDS),
]
NAMES = [f"{kind.__name__}-{i}" for i, (kind, _) in enumerate(CASES)]
every = pytest.mark.parametrize(("kind", "options"), CASES, ids=NAMES)
vaes = pytest.mark.parametrize("options", [options for kind, options in CASES if kind is VAE])


def close(actual: Any, expected: Any, rtol: float = 1e-12, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_of(num_rows: int = 7) -> Batch:
    rows: Batch = {"id": torch.arange(num_rows)}
    for seed, (name, field) in enumerate(SPEC.items()):
        noise, levels = random(num_rows, *field.shape, seed=seed), field.num_classes or round(1 / field.scale) + 1
        stored = (noise.sigmoid() * levels).to(field.dtype)
        real = noise.sigmoid() if name in ("x", "image") else noise
        rows[name] = real if field.dtype == torch.float64 else field.values(stored, torch.float64)
    return rows


def make(kind: Callable[..., Expert], options: dict[str, Any], seed: int = 0) -> Any:
    """Make an expert with every parameter, biases and scales too, away from its start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        expert = kind(SPEC, **options).double()
    for number, parameter in enumerate(expert.parameters()):
        parameter.data += 0.2 * random(*parameter.shape, seed=100 * seed + number)
    expert.anneal(4)
    return expert


def eps_for(expert: Expert, *num: int, seed: int = 0) -> Tensor:
    return random(*num, *(expert.noise_shape or ()), seed=seed)


def fields_of(terms: ExpertTerms) -> list[Tensor | None]:
    return [terms.loss_R, terms.log_px_R, terms.kl_R]


class Judged(NamedTuple):
    """What an expert says, by torch.distributions: log p, the KL of each latent dimension, the mean."""

    log_p: Tensor
    kl_RL: Tensor | None
    mean: Tensor


def density(expert: Any, options: dict[str, Any], x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p(x | output) and the mean, both (R, D)."""
    if options["likelihood"] == "bernoulli":
        return Bernoulli(logits=output, validate_args=False).log_prob(x), output.sigmoid()
    if options["likelihood"] == "continuous_bernoulli":
        judged = ContinuousBernoulli(logits=output, lims=(0.499999, 0.500001), validate_args=False)
        return judged.log_prob(x), judged.mean
    scale = options["scale"]
    scale = expert.likelihood.log_scale.exp() if scale == "learned" else torch.tensor(scale, dtype=torch.float64)
    mean = output.sigmoid() if options.get("mean") == "sigmoid" else output
    if options["likelihood"] == "logistic":
        half = SPEC[options["field"]].scale / 2
        sign = torch.where(x > mean, -1.0, 1.0)  # of two tails the one where both numbers are small
        sides = [torch.sigmoid(sign * (x + step - mean) / scale) for step in (half, -half)]
        sides = [torch.where(x > 1 - half, (sign > 0).double(), sides[0]), sides[1]]
        return (sides[0] - torch.where(x < half, (sign < 0).double(), sides[1])).abs().log(), mean
    return {"gaussian": Normal, "laplace": Laplace}[options["likelihood"]](mean, scale).log_prob(x), mean


def judge(expert: Any, options: dict[str, Any], rows: Batch, eps: Tensor) -> Judged:
    if isinstance(expert, Centroid):
        x = rows[expert.field].flatten(1)
        return Judged(Normal(expert.mean, options["scale"]).log_prob(x).sum(1), None, expert.mean.expand_as(x))
    if isinstance(expert, Classifier):
        logits = expert.net(rows[expert.input].flatten(1))
        return Judged(-F.cross_entropy(logits, rows["label"], reduction="none"), None, logits.softmax(1))
    if isinstance(expert, Regressor):
        output = expert.net(rows[expert.input].flatten(1))
        y = rows[expert.target].reshape(output.shape)
        if options["likelihood"] == "squared":
            return Judged(-(torch.linalg.vector_norm(y - output, dim=1) ** 2), None, output)
        log_p, mean = density(expert, options, y, output)
        return Judged(log_p.sum(1), None, mean)
    x = rows[expert.field].flatten(1)
    mean, log_var = expert.encoder(x).tensor_split(2, dim=1)
    qz_x = Normal(mean, log_var.exp().sqrt())
    log_p, mean = density(expert, options, x, expert.decoder(qz_x.mean + qz_x.stddev * eps))
    return Judged(log_p.sum(1), kl_divergence(qz_x, Normal(0.0, 1.0)), mean)


# All experts.


@every
def test_terms_are_those_of_torch_distributions(kind: type[Expert], options: dict[str, Any]) -> None:
    expert, rows = make(kind, options), rows_of()
    eps = eps_for(expert, 7)
    terms, judged = expert(rows, eps), judge(expert, options, rows, eps)
    near = partial(close, rtol=1e-12, atol=1e-12)
    assert (terms.log_px_R is None) == (options.get("likelihood") == "squared")
    if terms.log_px_R is not None:
        near(terms.log_px_R, judged.log_p)
    assert (terms.kl_R is None) == (judged.kl_RL is None)
    if judged.kl_RL is None:
        near(terms.loss_R, -judged.log_p)
        return
    near(terms.kl_R, judged.kl_RL.sum(1))
    floor = options.get("free_bits", 0.0)
    assert not floor or ((judged.kl_RL < floor).any() and (judged.kl_RL > floor).any())
    charged = options.get("beta", 1.0) * judged.kl_RL.clamp(min=floor).sum(1)
    weight = 4 / options["kl_warmup"] if "kl_warmup" in options else 1.0
    near(terms.loss_R, weight * charged - judged.log_p)
    near(expert.eval()(rows, eps).loss_R, charged - judged.log_p)


@every
@pytest.mark.parametrize("num_rows", [0, 1, 7])
def test_what_it_makes_of_rows_is_a_mean(kind: type[Expert], options: dict[str, Any], num_rows: int) -> None:
    expert, rows = make(kind, options), rows_of(num_rows)
    shape = SPEC[options.get("target", "y") if hasattr(expert, "target") else expert.field].shape
    with torch.no_grad():
        if kind in (Regressor, Classifier):
            assert not any(expert.can(ability) for ability in ("sample", "draw", "reconstruct", "log_weights"))
            made = expert.predict({expert.input: rows[expert.input]})  # the target is not needed
            assert made.shape == (num_rows, *(shape if kind is Regressor else (4,)))
        else:
            made, eps = expert.reconstruct(rows), eps_for(expert, num_rows)
            samples, u = expert.sample(eps), random(num_rows, *shape, seed=1).sigmoid()
            assert made.shape == samples.shape == expert.draw(eps, u).shape == (num_rows, *shape)
            mean = expert.encode(rows)[0] if kind is VAE else (expert.mean - expert.mean) / expert.scale
            close(expert.sample(mean.expand_as(eps)), made)
            assert not made.requires_grad
        expected = judge(expert, options, rows, torch.zeros_like(eps_for(expert, num_rows))).mean
        close(made.reshape(expected.shape), expected)


@every
def test_a_row_depends_on_no_other(kind: type[Expert], options: dict[str, Any]) -> None:
    expert, rows = make(kind, options), rows_of()
    eps = eps_for(expert, 7)
    whole = fields_of(expert(rows, eps))
    for chosen in ([4], [5, 0, 2], [3, 1, 4, 6, 5, 0, 2]):
        some = fields_of(expert({name: column[chosen] for name, column in rows.items()}, eps[chosen]))
        for part, field in zip(some, whole, strict=True):
            assert (part is None) == (field is None)
            if field is not None:
                close(part, field[chosen])


@every
def test_no_rows_give_no_terms_and_gradients_of_zero(kind: type[Expert], options: dict[str, Any]) -> None:
    expert = make(kind, options)
    terms = expert(rows_of(0), eps_for(expert, 0))
    assert all(field.shape == (0,) for field in fields_of(terms) if field is not None)
    terms.loss_R.sum().backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in expert.parameters())


def make_bank(case: int, execution: Any, ids: Sequence[int] = (2, 5, 7), **compute: Any) -> ExpertBank:
    kind, options = CASES[case]
    return ExpertBank({e: make(kind, options, seed=e) for e in ids}, execution, **compute)


def given(bank: ExpertBank, eps: Tensor) -> Noise:
    """Hand out given noise (E, R, *): row r has the id r."""

    def noise(ids: Tensor, experts: Sequence[int], shape: tuple[int, ...], of_T: Tensor | None = None) -> Tensor:
        places = [bank.ids.index(e) for e in experts]
        if of_T is not None:
            return eps[places][of_T, ids]
        return torch.stack([eps[i][own] for i, own in zip(places, ids.expand(len(places), -1), strict=True)])

    return noise


def mixed(fields: Sequence[Tensor | None]) -> Tensor:
    """Mix all fields, rows and experts into one number, each with a weight of its own."""
    return torch.stack([(random(*f.shape, seed=i) * f).sum() for i, f in enumerate(fields) if f is not None]).sum()


@pytest.mark.parametrize("rows", ["one expert", "all", "masked"])
@pytest.mark.parametrize("execution", ["loop", "stacked"])
@pytest.mark.parametrize("case", range(len(CASES)), ids=NAMES)
def test_a_bank_is_its_experts(case: int, execution: str, rows: str) -> None:
    ids = (4,) if rows == "one expert" else (2, 5, 7)
    alone, batch = [make(*CASES[case], seed=e) for e in ids], rows_of()
    if execution == "stacked" and isinstance(CASES[case][1].get("network"), Conv):
        with pytest.raises(ValueError, match=f"stackable.* {CASES[case][0].__name__}.*loop"):
            make_bank(case, execution, ids)
        return
    bank, eps = make_bank(case, execution, ids), eps_for(alone[0], len(ids), 7)
    mask = random(7, len(ids), seed=3) < 0.3 if rows == "masked" else None
    fields = fields_of(bank(batch, given(bank, eps), mask))
    judges = [fields_of(expert(batch, eps[i])) for i, expert in enumerate(alone)]
    columns = [None if f[0] is None else torch.stack(f, 1) for f in zip(*judges, strict=True)]  # type: ignore[arg-type]
    columns = [f if mask is None or f is None else f * mask for f in columns]
    for field, column in zip(fields, columns, strict=True):
        assert (field is None) == (column is None)
        if field is not None:
            close(field, column, atol=1e-11)
    mixed(fields).backward()
    mixed(columns).backward()
    assert bank.ids == list(ids)
    for expert, judge in zip(bank.owned().values(), alone, strict=True):
        for name, parameter in judge.named_parameters():
            assert parameter.grad.abs().max() > 0, name
            close(expert.get_parameter(name).grad, parameter.grad, rtol=1e-10, atol=1e-10)
    empty = bank(rows_of(0), given(bank, eps[:, :0]))
    assert all(f.shape == (0, len(ids)) for f in fields_of(empty) if f is not None)


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        (VAE, {"field": "z"}, ["VAE", "'z'", "set its field"]),
        (VAE, {"field": "label"}, ["VAE", "'label'", "4 classes"]),
        (VAE, {"beta": -1.0}, ["beta (-1.0)"]),
        (VAE, {"beta": math.nan}, ["beta (nan)"]),
        (VAE, {"kl_warmup": -1}, ["kl_warmup (-1)"]),
        (VAE, {"free_bits": -0.5}, ["free_bits (-0.5)"]),
        (VAE, {"latent": 0}, ["latent (0)"]),
        (VAE, {"samples": 0}, ["samples (0)"]),
        (VAE, {"samples": 5, "free_bits": 0.1}, ["samples (5)", "free_bits (0.1)"]),
        (VAE, {"likelihood": "gaussian", "scale": 0.0}, ["scale (0.0)"]),
        (VAE, {"likelihood": "laplace", "scale": math.inf}, ["scale (inf)"]),
        (VAE, {"likelihood": "logistic", "field": "real"}, ["logistic", "'real'", "bytes"]),
        (Regressor, {"input": "z"}, ["Regressor", "'z'"]),
        (Regressor, {"target": "label"}, ["Regressor", "'label'", "4 classes"]),
        (Regressor, {"likelihood": "gaussian", "scale": -1.0}, ["scale (-1.0)"]),
        (Classifier, {"target": "x"}, ["Classifier", "'x'", "labels ['label']"]),
        (Classifier, {"target": "pair"}, ["Classifier", "'pair'"]),
        (Classifier, {"target": "z"}, ["Classifier", "'z'"]),
        (Classifier, {"target": "label", "input": "label"}, ["Classifier", "'label'", "4 classes"]),
        (Centroid, {"field": "z"}, ["Centroid", "'z'"]),
        (Centroid, {"field": "label"}, ["Centroid", "'label'", "4 classes"]),
        (Centroid, {"scale": 0.0}, ["scale (0.0)"]),
        (Centroid, {"scale": math.nan}, ["scale (nan)"]),
    ],
)
def test_what_is_refused_is_named_in_one_line(kind: type[Expert], options: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(named[0])) as caught:
        kind(SPEC, **options)  # type: ignore[call-arg]
    assert all(part in str(caught.value) for part in named)
    assert "\n" not in str(caught.value)


# VAEs.


@vaes
def test_importance_weights(options: dict[str, Any]) -> None:
    expert, rows, num = make(VAE, options).eval(), rows_of(4), 500
    eps = random(4, num, 3)
    with torch.no_grad():
        log_w, one = expert.log_weights(rows, eps), expert(rows, eps[:, 7])
        # With the same noise the two differ by the KL and its estimate from one sample alone.
        mean, log_var = expert.encode(rows)
        qz_x = Normal(mean, (0.5 * log_var).exp())
        z = qz_x.mean + qz_x.stddev * eps[:, 7]
        close(log_w[:, 7] - (Normal(0.0, 1.0).log_prob(z) - qz_x.log_prob(z)).sum(1), one.log_px_R, 1e-9, 1e-9)
        # Their mean over samples is the ELBO, here within five standard errors of both estimates.
        repeated = {name: column.repeat_interleave(num, 0) for name, column in rows.items()}
        terms = expert(repeated, random(4 * num, 3, seed=1))
        elbo = (terms.log_px_R - terms.kl_R).view(4, -1)
        assert expert.log_weights(rows_of(0), random(0, 5, 3)).shape == (0, 5)
    error = ((elbo.var(1) + log_w.var(1)) / num).sqrt()
    assert ((elbo.mean(1) - log_w.mean(1)).abs() < 5 * error + 1e-9).all()
    assert (log_w.logsumexp(1) - math.log(num) >= log_w.mean(1)).all()


@vaes
@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_several_samples_are_the_bound_of_importance_weights(options: dict[str, Any], beta: float) -> None:
    """The loss is that of torch.distributions; without a weight of its own it is of the expert's log_weights."""
    expert, rows = make(VAE, {**options, "samples": 4, "beta": beta, "free_bits": 0.0}), rows_of()
    eps = eps_for(expert, 7)
    assert eps.shape == (7, 4, 3)
    judged = [judge(expert, options, rows, eps[:, s]) for s in range(4)]
    mean, log_var = expert.encode(rows)
    q, p = Normal(mean, (0.5 * log_var).exp()), Normal(0.0, 1.0)
    z = [mean + (0.5 * log_var).exp() * eps[:, s] for s in range(4)]
    ratio = torch.stack([(p.log_prob(one) - q.log_prob(one)).sum(1) for one in z], 1)
    log_w = torch.stack([one.log_p for one in judged], 1) + beta * ratio
    terms = expert.eval()(rows, eps)
    close(terms.loss_R, math.log(4) - log_w.logsumexp(1))
    assert terms.log_px_R is not None
    close(terms.log_px_R, torch.stack([one.log_p for one in judged]).mean(0))
    close(terms.kl_R, judged[0].kl_RL.sum(1) if judged[0].kl_RL is not None else None)
    if beta == 1.0:
        close(terms.loss_R, math.log(4) - expert.log_weights(rows, eps).logsumexp(1))
    assert expert.latent_shape == (3,) == expert.posterior(rows).mean_RL.shape[1:]


def test_the_shape_of_one_latent_is_that_of_the_noise_unless_it_is_set() -> None:
    """A subclass that takes more noise goes on getting it in all its methods."""

    class Wider(VAE):
        def __init__(self, **options: Any) -> None:
            super().__init__(SPEC, 3, **options)
            self.noise_shape = (*self.noise_shape[:-1], 5)

    assert (Wider().latent_shape, Wider(samples=2).latent_shape) == ((5,), (3,))
    wider = Wider()
    wider.latent_shape = (4,)
    assert (wider.noise_shape, wider.latent_shape) == ((5,), (4,))


@pytest.mark.parametrize("weights", [{"beta": 0.0}, {"beta": 4.0}, {"free_bits": 0.5}, {"kl_warmup": 100}])
def test_the_elbo_ignores_the_weights_of_training(weights: dict[str, float]) -> None:
    plain, weighted, rows, eps = make(VAE, {}), make(VAE, weights), rows_of(), random(7, 10)
    expected, terms = plain(rows, eps), weighted(rows, eps)
    assert torch.equal(terms.log_px_R - terms.kl_R, -expected.loss_R)
    assert not torch.allclose(terms.loss_R, expected.loss_R)
    before_any_step = VAE(SPEC, kl_warmup=10).double()(rows, eps)
    close(before_any_step.loss_R, before_any_step.kl_R - before_any_step.log_px_R)


def test_linear_gaussian_vae_against_its_exact_evidence() -> None:
    # Gauss-Hermite quadrature is the mean over infinitely many draws of eps.
    expert = make(VAE, {"likelihood": "gaussian", "mean": "identity", "network": MLP([]), "latent": 2})
    rows, (nodes, weights) = rows_of(5), np.polynomial.hermite_e.hermegauss(100)
    grid = torch.from_numpy(np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2))
    share = torch.from_numpy(np.outer(weights, weights).ravel() / (2 * math.pi))
    with torch.no_grad():
        terms = expert({"x": rows["x"].repeat_interleave(len(grid), 0)}, grid.repeat(5, 1))
        log_w = expert.log_weights(rows, grid.expand(5, -1, -1))
        mean, log_var = expert.encode(rows)
        decoder, scale = expert.decoder.layers[0], expert.likelihood.log_scale.exp()
        loadings, noise = decoder.weight, scale.square() * torch.eye(6).double()
        evidence = MultivariateNormal(decoder.bias, loadings.T @ loadings + noise).log_prob(rows["x"])
        precision = torch.eye(2).double() + loadings @ loadings.T / scale.square()
        true_mean = (rows["x"] - decoder.bias) @ loadings.T @ precision.inverse() / scale.square()
        posterior = MultivariateNormal(true_mean, precision_matrix=precision)
        gap = kl_divergence(MultivariateNormal(mean, log_var.exp().diag_embed()), posterior)
    close((log_w.exp() @ share).log(), evidence, rtol=1e-10, atol=1e-10)
    elbo = (terms.log_px_R - terms.kl_R).view(5, -1) @ share
    close(elbo, evidence - gap, rtol=1e-11, atol=1e-11)
    assert (elbo < evidence).all()


def test_the_architecture_of_seed_document_004() -> None:
    vae = VAE({"x": Field((1, 28, 28), torch.uint8, scale=1 / 255)}, 8, Conv([8, 16, 32, 64], kernel=4))
    seen: list[tuple[int, ...]] = []
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            assert module.kernel_size == (4, 4)
            module.register_forward_hook(lambda _, inputs, output: seen.append(tuple(output.shape[1:])))
    assert vae.reconstruct({"x": torch.rand(2, 1, 28, 28)}).shape == (2, 1, 28, 28)
    inward = [(8, 14, 14), (16, 7, 7), (32, 4, 4), (64, 2, 2)]
    assert seen == [*inward, *inward[-2::-1], (1, 28, 28)]


def test_the_stated_numbers_of_parameters() -> None:
    spec = {"x": Field((3, 64, 64), torch.uint8, scale=1 / 255)}
    for channels, latent, millions in ([64, 128, 256, 512], 160, 7.0), ([16, 32, 64, 128], 16, 0.29):
        count = sum(p.numel() for p in VAE(spec, latent, Conv(channels)).parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.05)


# Classifiers.


def test_a_label_may_be_as_stored() -> None:
    expert, rows = make(Classifier, CASES[-5][1]), rows_of()
    stored = {**rows, "label": rows["label"].to(torch.uint8)}
    assert torch.equal(expert(stored, None).loss_R, expert(rows, None).loss_R)


def test_the_weighted_mean_of_predictions_is_the_mixture_of_the_likelihood_objective() -> None:
    # -log sum_k q(k|x) p(y|x, k), once from the experts' losses and once from their predictions.
    experts, rows = [make(Classifier, {"target": "label"}, seed=e) for e in range(3)], rows_of()
    q = random(7, 3, seed=2).softmax(1)
    losses = torch.stack([expert(rows, None).loss_R for expert in experts], 1)
    p = torch.einsum("re,rec->rc", q, torch.stack([expert.predict(rows) for expert in experts], 1))
    close(SoftMinLoss().rows(q.log(), losses), -p[torch.arange(7), rows["label"]].log())


@pytest.mark.slow
def test_a_run_ends_with_the_likelihood_of_its_weighted_mean(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = Path(__file__).parents[1] / "configs" / "digits_moe_supervised.yaml"
    run = tmp_path / "run"
    assert main(["train", "--config", str(config), "--train.epochs", "2", "--out", str(run)]) == 0
    told = float(re.search(r"\bconditional_log_likelihood (-?[0-9.]+)", capsys.readouterr().out)[1])
    rows = Digits().load()[1].rows
    p = mixdist.load(run).predict(rows["x"])
    assert p.shape == (359, 10)
    torch.testing.assert_close(p.sum(1), torch.ones(359))
    assert p.gather(1, rows["y"].long()[:, None]).log().mean().item() == pytest.approx(told, abs=1e-4)


# Centroids.


@pytest.mark.parametrize("scale", [1.0, 0.3, 2.0])
def test_one_step_of_a_centroid_on_all_rows_is_the_mean(scale: float) -> None:
    expert, rows = make(Centroid, {"scale": scale}), rows_of()
    step, before = torch.optim.SGD(expert.parameters(), lr=scale**2), expert.mean.detach().clone()
    expert(rows, None).loss_R.mean().backward()
    close(expert.mean.grad, (before - rows["x"].mean(0)) / scale**2)
    step.step()
    close(expert.mean[0], rows["x"].mean(0))
    assert [p.numel() for p in expert.parameters()] == [6]


def test_the_distance_to_a_centroid_is_of_differences() -> None:
    # |x|^2 - 2 x m + |m|^2 would lose everything here.
    expert = make(Centroid, {"scale": 0.3})
    with torch.no_grad():
        expert.mean.fill_(1e8)
        x = torch.tensor([[1e8] * 6, [1e8 + 1] * 6], dtype=torch.float64)
        near = expert({"id": torch.arange(2), "x": x}, None).loss_R
    assert (near[1] - near[0]).item() == pytest.approx(6 / (2 * 0.3**2), rel=1e-12)


def test_samples_of_a_centroid_are_normal() -> None:
    expert, eps = make(Centroid, {"scale": 0.3, "field": "image"}), random(6, 6)
    x = expert.sample(eps)
    assert torch.equal(expert.draw(eps, torch.full_like(x, 0.5)), x)
    close(Normal(expert.mean, 0.3).cdf(x.flatten(1)), Normal(0.0, 1.0).cdf(eps))
    assert not expert.can("log_weights")


def test_centroids_start_about_the_middle_of_the_values() -> None:
    first, *others = (Centroid(SPEC, field="far").mean for _ in range(2))
    assert not torch.equal(first, others[0])
    assert (first.mean() + 7).abs() < 5 * 0.1 / math.sqrt(4000)
    assert first.std().item() == pytest.approx(0.1, rel=0.1)
    middle = torch.cat([Centroid(SPEC, field="grey").mean for _ in range(100)]).mean()
    assert (middle - 0.5).abs() < 5 * 0.1 / math.sqrt(6400)


@pytest.mark.parametrize("num_clusters", [3, 10])
def test_rounds_of_centroids_are_the_iterations_of_lloyd(num_clusters: int) -> None:
    # Centres near samples, so that none is empty; not at them: pixels are whole numbers, some rows would be as far from
    # one centre as from another, and scikit-learn breaks such ties by its rounding.
    x = torch.from_numpy(load_digits().data)
    chosen = np.random.default_rng(0).choice(len(x), num_clusters, replace=False)
    centres = x[torch.from_numpy(chosen)] + 0.01 * random(num_clusters, 64)
    experts = [Centroid({"x": Field((1, 8, 8), torch.float64)}).double() for _ in range(num_clusters)]
    for expert, centre in zip(experts, centres, strict=True):
        expert.mean.data.copy_(centre)
    rows, moved = {"id": torch.arange(len(x)), "x": x.view(-1, 1, 8, 8)}, []
    for num_rounds in range(1, 11):
        with torch.no_grad():
            owner = torch.stack([-expert(rows, None).loss_R for expert in experts], 1).argmax(1)
        for e, expert in enumerate(experts):
            own = {name: column[owner == e] for name, column in rows.items()}
            assert len(own["id"]), f"cluster {e} is empty in round {num_rounds}: choose other centres"
            expert.zero_grad()
            expert(own, None).loss_R.mean().backward()
            torch.optim.SGD(expert.parameters(), lr=1.0).step()
        means = torch.cat([expert.mean.detach() for expert in experts])
        judge = KMeans(num_clusters, init=centres, n_init=1, algorithm="lloyd", tol=0, max_iter=num_rounds).fit(x)
        close(means, torch.from_numpy(judge.cluster_centers_), rtol=0, atol=1e-11)
        moved.append(judge.n_iter_)
    assert moved == list(range(1, 11))  # it had not converged, so each round was a test
