"""Mixtures of modalities: gradients and bounds against other ways to them, bytes, absent modalities, bad input."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mixdist.data import Dataset, RankBatch
from mixdist.data.loader import share
from mixdist.evaluation.evaluate import evaluate
from mixdist.experts import Modality
from mixdist.experts.location_scale import KINDS
from mixdist.mixtures import MMVAE, Context, MoPoE, PoEMVAE, WeightedLoss
from mixdist.mixtures.multimodal import Multimodal
from mixdist.mixtures.proposals import check_present
from mixdist.mixtures.subsets import product
from mixdist.nets import MLP
from mixdist.noise import Moment, Purpose
from mixdist.parallel import costs
from mixdist.parallel.launch import Launch
from mixdist.parallel.mesh import Mesh, Placement
from mixdist.parallel.wire import Wire
from mixdist.report.metrics import read_metrics
from mixdist.terms import Field
from tests.launch import here, mlp, refused, together, write_config
from tests.parity import Case, make_multimodal, views
from tests.pool import Pool


def made(mixture: Multimodal, dataset: Dataset, seed: int = 0) -> Multimodal:
    """A mixture with its modules, in one process."""
    place = Mesh(Placement.plan(mixture.num_experts, 1, 1), Launch(0, 1), torch.device("cpu"), 60.0)
    mixture.setup(Context(seed, torch.float64, dataset.spec, place, Wire(place.device)))
    return mixture


def gradients(mixture: Multimodal, rows: dict[str, Tensor], step: int = 0) -> dict[str, Tensor]:
    """The gradient of a step, by parameter."""
    named = {f"{owned.name} {n}": p for owned in mixture.parts.owned() for n, p in owned.module.named_parameters()}
    for p in named.values():
        p.grad = None
    mixture.backward(RankBatch(rows, (len(rows["id"]),)), WeightedLoss(), Moment(0, 0, step))
    return {name: p.grad.clone() for name, p in named.items() if p.grad is not None}


# The doubly reparametrised gradient, by a second way: the weights are formed, and sums are loops.


def by_hand(mixture: MMVAE, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {f"{owned.name} {n}": p for owned in mixture.parts.owned() for n, p in owned.module.named_parameters()}
    kind = {"laplace": torch.distributions.Laplace, "normal": torch.distributions.Normal}[mixture.posterior]
    num, size, latent, samples = len(rows["id"]), mixture.num_experts, mixture.latent, mixture.samples
    experts, values = mixture.modalities, mixture.values(rows, mixture.bank.fields)
    present = rows["present"].bool() if "present" in rows else torch.ones(num, size, dtype=torch.bool)
    draw = Moment(0).draw(Purpose.POSTERIOR)
    eps = draw.normal(rows["id"], range(size), (samples, latent), torch.float64)
    extra = {
        m: Moment(0).draw(Purpose.PRIVATE).normal(rows["id"], [m], (size, samples, one.private), torch.float64)[0]
        for m, one in experts.items()
    }
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    for i in range(num):
        row = {name: column[i : i + 1] for name, column in values.items()}
        there = [m for m in range(size) if present[i, m]]
        q = {m: tuple(field[0] for field in experts[m].encode(row)) for m in there}
        numbers = {m: (loc.detach(), scale.detach()) for m, (loc, scale) in q.items()}
        log_w, leaves = {}, {}
        for n in there:
            for s in range(samples):
                e = mixture.kind.standard(eps[n, i, s])
                z = (numbers[n][0][:latent] + numbers[n][1][:latent] * e).requires_grad_()
                own = mixture.kind.standard(extra[n][i, n, s])
                w = (numbers[n][0][latent:] + numbers[n][1][latent:] * own).requires_grad_()
                value = kind(0.0, mixture.prior.scale()).log_prob(z).sum()
                terms = [kind(numbers[j][0][:latent], numbers[j][1][:latent]).log_prob(z).sum() for j in there]
                value = value - torch.logsumexp(torch.stack(terms), 0) + math.log(len(there))
                if experts[n].private:
                    q_w = kind(numbers[n][0][latent:], numbers[n][1][latent:])
                    value = value + (kind(0.0, experts[n].prior.scale()).log_prob(w) - q_w.log_prob(w)).sum()
                for m in there:
                    private = w if m == n else experts[m].draw_private(extra[m][i, n, s])
                    factor = mixture.weights()[m]
                    value = value + factor * experts[m].log_prob(row, torch.cat([z, private])[None])[0]
                log_w[n, s], leaves[n, s] = value, (z, w, e, own)
        groups = [[(n, s) for s in range(samples)] for n in there]
        groups = groups if mixture.objective == "looser" else [[key for group in groups for key in group]]
        for group in groups:
            weights = torch.softmax(torch.stack([log_w[key] for key in group]).detach(), 0)
            factor = -1.0 / (num * len(groups))
            for key, weight in zip(group, weights.tolist(), strict=True):
                n, (z, w, e, own) = key[0], leaves[key]
                modules = list(named.values())
                found = torch.autograd.grad(log_w[key], [z, w, *modules], retain_graph=True, allow_unused=True)
                for (name, _), grad in zip(named.items(), found[2:], strict=True):
                    if grad is not None:
                        total[name] += factor * weight * grad
                g_z, g_w = (torch.zeros_like(z) if g is None else g for g, z in zip(found[:2], (z, w), strict=True))
                path = factor * weight * (g_z * (q[n][0][:latent] + q[n][1][:latent] * e)).sum()
                path = path + factor * weight**2 * (g_w * (q[n][0][latent:] + q[n][1][latent:] * own)).sum()
                path = path + factor * _reparametrised(mixture, q, n, z.detach(), weight, g_z.detach())
                for (name, _), grad in zip(
                    named.items(), torch.autograd.grad(path, modules, retain_graph=True, allow_unused=True), strict=True
                ):
                    if grad is not None:
                        total[name] += grad
    return total


def _reparametrised(mixture: MMVAE, q: Any, n: int, z: Tensor, weight: float, g_z: Tensor) -> Tensor:
    """-w r_j [(1 - w) g + d log r_n / dz] (loc_j + scale_j e_j), the sum over j."""
    kind = {"laplace": torch.distributions.Laplace, "normal": torch.distributions.Normal}[mixture.posterior]
    leaf, latent = z.clone().requires_grad_(), mixture.latent
    numbers = {j: (loc[:latent].detach(), scale[:latent].detach()) for j, (loc, scale) in q.items()}
    logs = {j: kind(*one).log_prob(leaf).sum() for j, one in numbers.items()}
    log_mix = torch.logsumexp(torch.stack(list(logs.values())), 0)
    (slope,) = torch.autograd.grad(logs[n] - log_mix, leaf, retain_graph=True)
    result = torch.zeros((), dtype=torch.float64)
    for j, (loc, scale) in q.items():
        e_j = (z - numbers[j][0]) / numbers[j][1]
        share = (logs[j] - log_mix).exp().detach()
        way = ((1 - weight) * g_z + slope) * (loc[:latent] + scale[:latent] * e_j)
        result = result - weight * share * way.sum()
    return result


@pytest.mark.parametrize("objective", ["shared", "private"])
@pytest.mark.parametrize("bound", ["looser", "tighter"])
@pytest.mark.parametrize("posterior", ["laplace", "normal"])
def test_dreg_is_what_forms_the_weights(posterior: str, bound: str, objective: str) -> None:
    data = views(3, True).first(7)
    case = Case(family="mmvae", num_experts=3, gate=f"dreg-{bound}", expert=posterior, objective=objective)
    mixture = made(make_multimodal(case), data)
    assert isinstance(mixture, MMVAE)
    got, wanted = gradients(mixture, data.rows), by_hand(mixture, data.rows)
    assert got.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-9, atol=1e-10 * float(grad.abs().max()), msg=name)


# A linear-Gaussian model: x_m = w_m z + b_m + noise, of which expectations are integrals.

NOISE = 0.5


def linear(family: Any = MMVAE, private: int = 0, **options: Any) -> Any:
    how: dict[str, Any] = {"likelihood": "gaussian", "scale": NOISE, "mean": "identity", "learn_prior": False}
    experts = [functools.partial(Modality, field=f"x{m}", network=MLP([]), private=private, **how) for m in range(2)]
    if family is MMVAE:
        options["posterior"] = "normal"
    return family(experts, rescale=False, learn_prior=False, **options)


def gaussian_rows(num: int, sizes: tuple[int, ...] = (1, 1), alike: bool = True) -> Dataset:
    """Rows of two modalities; all the same row, or not."""
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(1 if alike else num, size, generator=generator) for size in sizes]
    rows = {f"x{m}": x.expand(num, -1).clone() for m, x in enumerate(drawn)}
    return Dataset(
        {"id": torch.arange(num), **rows}, {f"x{m}": Field((n,), torch.float32) for m, n in enumerate(sizes)}
    )


def quadrature(mixture: MMVAE, row: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of the expected loss of a row by Gauss-Hermite quadrature over one or two standard normals."""
    points, mass = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(80))
    mass = mass / mass.sum()
    values = mixture.values(row, mixture.bank.fields)
    q = [tuple(field[0, 0] for field in expert.encode(values)) for expert in mixture.modalities.values()]

    def log_w(z: Tensor) -> Tensor:
        standard = torch.distributions.Normal(0.0, 1.0)
        log_q = torch.logsumexp(torch.stack([torch.distributions.Normal(*one).log_prob(z) for one in q]), 0)
        log_px = [expert.log_prob(values, z.reshape(1, -1, 1))[0] for expert in mixture.modalities.values()]
        return standard.log_prob(z) + sum(p.reshape(z.shape) for p in log_px) - log_q + math.log(2)

    at = [log_w(loc + scale * points) for loc, scale in q]
    if mixture.objective == "tighter":
        assert mixture.samples == 1
        pairs = torch.logaddexp(at[0][:, None], at[1][None]) - math.log(2)
        loss = -(mass[:, None] * mass[None] * pairs).sum()
    elif mixture.samples == 1:
        loss = -sum((mass * one).sum() for one in at) / 2
    else:
        assert mixture.samples == 2
        each = [torch.logaddexp(one[:, None], one[None]) - math.log(2) for one in at]
        loss = -sum((mass[:, None] * mass[None] * one).sum() for one in each) / 2
    named = {f"{owned.name} {n}": p for owned in mixture.parts.owned() for n, p in owned.module.named_parameters()}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def estimates(steps: int, rows: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Gradients of the experts' encoders, one a step, and the exact one."""
    data = gaussian_rows(rows)
    mixture = made(linear(latent=1, **options), data)
    named = [name for name in gradients(mixture, data.rows) if "encoder" in name]
    found = [gradients(mixture, data.rows, step) for step in range(steps)]
    exact = torch.zeros(0)
    if options["samples"] <= 2:
        row = {name: column[:1] for name, column in data.rows.items()}
        exact = torch.cat([quadrature(mixture, row)[name].flatten() for name in named])
    return torch.stack([torch.cat([one[name].flatten() for name in named]) for one in found]), exact


@pytest.mark.parametrize(
    ("gradient", "objective", "samples"),
    [
        *((gradient, "looser", 1) for gradient in ("iwae", "stl", "dreg")),
        *((gradient, *how) for gradient in ("iwae", "dreg") for how in (("looser", 2), ("tighter", 1))),
    ],
)
def test_estimators_agree_with_the_exact_gradient(gradient: str, objective: str, samples: int) -> None:
    found, exact = estimates(30, 1000, gradient=gradient, objective=objective, samples=samples)
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - exact).abs() <= 4 * error).all(), (found.mean(0), exact, error)


def test_without_the_score_alone_the_gradient_is_biased() -> None:
    """stl with several samples, which the authors of the seed call dreg."""
    found, exact = estimates(30, 1000, gradient="stl", objective="looser", samples=2)
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - exact).abs() > 10 * error).any()


@pytest.mark.parametrize("objective", ["looser", "tighter"])
def test_dreg_has_the_smallest_variance(objective: str) -> None:
    found = {
        gradient: estimates(100, 2, gradient=gradient, objective=objective, samples=30)[0]
        for gradient in ("iwae", "stl", "dreg")
    }
    variance = {gradient: float(one.var(0).sum()) for gradient, one in found.items()}
    assert variance["dreg"] < min(variance["stl"], variance["iwae"]), variance
    apart = (found["dreg"].mean(0) - found["iwae"].mean(0)).abs()
    assert (apart <= 4 * ((found["dreg"].var(0) + found["iwae"].var(0)) / 100).sqrt()).all()


# Products


def test_a_product_of_normals_is_their_product() -> None:
    """Its density is the product of the members' over its integral."""
    loc, scale = torch.tensor([[[0.5], [-1.0], [2.0]]]).double(), torch.tensor([[[0.7], [1.3], [0.4]]]).double()
    members, prior = torch.tensor([[[True, True, False], [False, False, True]]]), torch.tensor([0.9]).double()
    z = torch.linspace(-12, 12, 20001).double()
    for with_prior in (None, prior):
        got = product(loc, scale, members, with_prior)
        for k, chosen in enumerate(([0, 1], [2])):
            log_p = sum(torch.distributions.Normal(loc[0, m, 0], scale[0, m, 0]).log_prob(z) for m in chosen)
            if with_prior is not None:
                log_p = log_p + torch.distributions.Normal(0.0, prior).log_prob(z)
            mass = torch.softmax(log_p, 0)
            mean = (mass * z).sum()
            assert got[0][0, k, 0].item() == pytest.approx(mean.item(), abs=1e-6)
            assert got[1][0, k, 0].square().item() == pytest.approx((mass * (z - mean).square()).sum().item(), abs=1e-6)


@pytest.mark.parametrize("family", ["poe", "mopoe"])
def test_the_loss_of_products_is_their_sum_of_elbos(family: str) -> None:
    """Formed subset by subset, with torch's own densities and divergences."""
    data, num = views(3, True).first(9), 3
    mixture = made(make_multimodal(Case(family=family, num_experts=3, objective="shared")), data)
    assert isinstance(mixture, (PoEMVAE, MoPoE))
    at, ids, present = Moment(0), data.ids, data.rows["present"].bool()
    values = mixture.values(data.rows, mixture.bank.fields)
    q = [expert.encode(values) for expert in mixture.modalities.values()]
    uniform = at.draw(Purpose.SUBSET).uniform(ids, range(2), (num,), torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(9):
        there = [m for m in range(num) if present[i, m]]
        every = [[m for m in range(num) if code >> m & 1] for code in range(1, 8)]
        every.sort(key=lambda one: (len(one), one))
        if family == "poe":
            drawn = [[m for m in there if one[i, m] < 0.5] or [min(there, key=lambda m: one[i, m])] for one in uniform]
            chosen = [(3, there), *((m, [m]) for m in there), *((4 + j, one) for j, one in enumerate(drawn))]
        else:
            chosen = [(k, one) for k, one in enumerate(every) if set(one) <= set(there)]
        for key, members in chosen:
            own = [(q[m][0][i], q[m][1][i]) for m in members]
            precision = sum(1 / (scale**2 + 1e-8) for _, scale in own)
            precision = precision + 1 / mixture.prior.scale() ** 2 if family == "poe" else precision
            loc = sum(loc / (scale**2 + 1e-8) for loc, scale in own) / precision
            posterior = torch.distributions.Normal(loc, precision**-0.5)
            prior = torch.distributions.Normal(torch.zeros_like(loc), mixture.prior.scale())
            elbo = -mixture.beta * torch.distributions.kl_divergence(posterior, prior).sum()
            eps = at.draw(Purpose.POSTERIOR).normal(ids[i : i + 1], [key], (2, 3), torch.float64)[0, 0]
            row = {name: column[i : i + 1] for name, column in values.items()}
            for m in members if family == "poe" else there:
                z = (loc + posterior.scale * eps)[None]
                elbo = elbo + mixture.weights()[m] * mixture.modalities[m].log_prob(row, z).mean()
            total = total - elbo / (1 if family == "poe" else len(chosen))
    got = mixture.backward(RankBatch(data.rows, (9,)), WeightedLoss(), at).loss
    torch.testing.assert_close(got, total.detach() / 9)


# Likelihoods


@pytest.mark.parametrize(
    ("family", "private", "wider"), [(MMVAE, 0, 1.2), (MMVAE, 1, 1.2), (PoEMVAE, 1, 2.0), (MoPoE, 1, 1.5)]
)
def test_bounds_are_in_order_and_reach_the_exact_likelihood(family: Any, private: int, wider: float) -> None:
    """ELBO <= looser <= tighter <= log p(x) on held-out rows; one modality alone, and from another, exactly too."""
    data = gaussian_rows(40, (3, 2), alike=False)
    mixture = made(linear(family, private, latent=2), data)
    values = [data.rows[f"x{m}"].double() for m in range(2)]
    weights = [expert.decoder.layers[0].weight.detach().T for expert in mixture.modalities.values()]
    size = 2 + private
    for expert, w in zip(mixture.modalities.values(), weights, strict=True):
        covariance = torch.linalg.inv(w.T @ w / NOISE**2 + torch.eye(size).double())  # of p(z|x_m), wider in q
        layer, scale = expert.encoder.layers[0], wider * covariance.diagonal().sqrt()
        factor = torch.ones(size).double()
        if family is PoEMVAE:  # its product has the prior as well
            factor[:2] += scale[:2].square()
        with torch.no_grad():
            layer.weight[:] = torch.cat([w @ covariance * factor / NOISE**2, torch.zeros_like(w)], dim=1)
            layer.bias[size:] = torch.log(torch.expm1(scale))
    found = evaluate(mixture, data, 16, 0, num_samples=1000)

    def exact(chosen: list[int], loc: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """log N(x; W loc, W scale^2 W' + U U' of each modality by itself + noise), biases are 0."""
        w = torch.cat([weights[m][:, :2] for m in chosen])
        own = torch.block_diag(*(weights[m][:, 2:] @ weights[m][:, 2:].T for m in chosen))
        x = torch.cat([values[m] for m in chosen], dim=1)
        inner = torch.eye(2).double().expand(len(x), 2, 2) if scale is None else torch.diag_embed(scale.square())
        mean = torch.zeros_like(x) if loc is None else loc @ w.T
        covariance = w @ inner @ w.T + own + NOISE**2 * torch.eye(w.shape[0]).double()
        return torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)

    bounds = [torch.from_numpy(found.columns[name]) for name in ("elbo", "looser", "log_joint")]
    assert (bounds[0] <= bounds[1] + 1e-12).all()
    assert (bounds[1] <= bounds[2] + 1e-12).all()
    assert bounds[0].mean() < bounds[1].mean() - 0.01
    torch.testing.assert_close(bounds[2], exact([0, 1]), rtol=0, atol=0.4)
    assert float((bounds[2] - exact([0, 1])).mean()) == pytest.approx(0, abs=0.04)
    with torch.no_grad():
        q = [expert.encode(mixture.values(data.rows, expert.fields)) for expert in mixture.modalities.values()]
    for m, n in ((0, 1), (1, 0)):
        for name in (f"log_single_x{m}", f"log_synergy_x{m}"):
            assert float(torch.from_numpy(found.columns[name]).mean() - exact([m]).mean()) == pytest.approx(0, abs=0.04)
        if family is MMVAE:
            conditional = torch.from_numpy(found.columns[f"log_conditional_x{m}_x{n}"])
            shared = (field[:, :2] for field in q[n])
            assert float((conditional - exact([m], *shared)).mean()) == pytest.approx(0, abs=0.04)


@pytest.mark.parametrize("family", ["mmvae", "poe", "mopoe"])
def test_what_a_row_lacks_does_not_count(family: str) -> None:
    """Neither loss nor gradients nor figures depend on the values of absent modalities."""
    data = views(3, True)
    case = Case(family=family, num_experts=3, gate="dreg-looser", expert="laplace", objective="private")
    mixture = made(make_multimodal(case), data)
    other = {name: column.clone() for name, column in data.rows.items()}
    for m in range(3):
        absent = data.rows["present"][:, m] == 0
        other[f"x{m}"][absent] = 1
    one, two = gradients(mixture, data.rows), gradients(mixture, other)
    for name, grad in one.items():
        torch.testing.assert_close(two[name], grad)
    figures = [evaluate(mixture, Dataset(rows, data.spec), 16, 0, num_samples=4).figures for rows in (data.rows, other)]
    assert figures[0] == pytest.approx(figures[1])


def test_one_modality_present_is_a_mixture_of_one() -> None:
    """A row with modality 1 alone has the loss that it has in a mixture without the others."""
    data = views(2, False).first(6)
    present = torch.tensor([[0, 1]] * 6, dtype=torch.uint8)
    some = Dataset({**data.rows, "present": present}, {**data.spec, "present": Field((2,), torch.uint8)})
    case = Case(family="mmvae", num_experts=2, gate="iwae-tighter", expert="normal", objective="shared")
    both = made(make_multimodal(case), some)
    expert = both.modalities[1]
    at, rows = Moment(0), both.values(some.rows, ("x1",))
    loc, scale = expert.encode(rows)
    eps = at.draw(Purpose.POSTERIOR).normal(some.ids, [1], (3, 3), torch.float64)[0]
    z = loc[:, None] + scale[:, None] * eps
    q = torch.distributions.Normal(loc[:, None], scale[:, None])
    log_px = 8 * expert.log_prob(rows, z)  # the image has 16 numbers, the vector 2
    log_w = log_px + both.prior.log_prob(z) - q.log_prob(z).sum(-1)
    wanted = -(torch.logsumexp(log_w, 1) - math.log(3)).mean()
    got = both.backward(RankBatch(some.rows, (6,)), WeightedLoss(), at).loss
    torch.testing.assert_close(got, wanted.detach())


# What crosses the wire


@pytest.mark.parametrize(("family", "scores"), [("mmvae", 9), ("poe", 8), ("mopoe", 14)])
def test_bytes_are_the_least(pool: Callable[[int], Pool], family: str, scores: int) -> None:
    """Own fields of each rank's experts and present, 2 L parameters, S numbers for each proposal, and gradients."""
    case = Case(ranks=2, ep_size=2, num_experts=3, family=family, gate="dreg-looser", expert="normal", balance="absent")
    case = Case(**{**vars(case), "objective": "private", "steps": 1})
    reports = pool(2).run("tests.parity:run", case)
    counts = [len(share(16, rank, 2)) for rank in range(2)]
    owners = [Placement.plan(3, 2, 2).experts_of(p) for p in range(2)]
    spec = views(3, True).spec
    widths = [costs.row_bytes([spec["present"], *(spec[f"x{e}"] for e in experts)]) for experts in owners]
    sizes = [len(experts) for experts in owners]
    least = sum(costs.modalities_step(counts, sizes, widths, me, 8, 3, scores) for me in range(2))
    assert reports[0]["bytes"] == [(least, least)]
    # Counted once more: rows 8 x (8 + 3 + fields) each way, 8-byte numbers of 16 rows.
    assert least == 8 * sum(widths) + 8 * 2 * (16 * 6 * 3 + 8 * scores * 3)


# The parts


@pytest.mark.parametrize("name", ["laplace", "normal"])
def test_location_and_scale(name: Any) -> None:
    kind, torchs = KINDS[name], {"laplace": torch.distributions.Laplace, "normal": torch.distributions.Normal}[name]
    generator = torch.Generator().manual_seed(0)
    z, loc, raw = torch.randn(3, 50, 4, dtype=torch.float64, generator=generator)
    scale = kind.scale(raw)
    q, p = torchs(loc, scale), torchs(torch.zeros_like(loc), torch.full_like(loc, 0.7))
    torch.testing.assert_close(kind.log_prob(z, loc, scale), q.log_prob(z))
    torch.testing.assert_close(kind.kl(loc, scale, 0.7), torch.distributions.kl_divergence(q, p))
    leaf = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(q.log_prob(leaf).sum(), leaf)
    torch.testing.assert_close(kind.slope(z, loc, scale), slope)
    eps = torch.tensor([-9.0, -2.0, -0.1, 0.1, 2.0, 9.0], dtype=torch.float64)
    standard = torchs(torch.zeros(()).double(), torch.ones(()).double())
    below = torch.distributions.Normal(0.0, 1.0).cdf(eps[:3])
    torch.testing.assert_close(standard.cdf(kind.standard(eps)[:3]), below)  # the same quantiles, and both tails
    torch.testing.assert_close(kind.standard(eps), -kind.standard(-eps))
    torch.testing.assert_close(kind.scale(torch.full((4,), kind.raw)), torch.ones(4))


def test_a_text_s_padding_counts_for_nothing() -> None:
    from mixdist.nets import Text

    spec = {"words": Field((6,), torch.int16, num_classes=5)}
    expert = Modality(spec, 2, "normal", "words", network=Text(3, [4]), likelihood="categorical", padding=0).double()
    text = torch.tensor([[1, 2, 3, 0, 0, 0]])
    z = torch.zeros(1, 2, dtype=torch.float64)
    scores = torch.log_softmax(expert.decoder(z).reshape(6, 5), 1)
    wanted = sum(scores[place, word] for place, word in enumerate((1, 2, 3)))
    torch.testing.assert_close(expert.log_prob({"words": text}, z)[0], wanted)
    assert expert.decode(z).shape == (1, 6)


# The commands


def config_of(folder: Path, family: str = "MMVAE", absent: float = 0.0, **options: Any) -> str:
    experts = [
        {
            "class_path": "mixdist.experts.Modality",
            "init_args": {"field": f"x{m}", "network": mlp(8), "private": 2},
        }
        for m in range(3)
    ]
    init_args = {"expert": experts, "latent": 4, "samples": 2, **options}
    source = {"source": {"class_path": "mixdist.data.Digits"}, "modalities": 3, "channels": 1}
    return write_config(
        folder / "config.yaml",
        {
            "data": {"class_path": "mixdist.data.Textures", "init_args": source},
            "dtype": "float64",
            "mixture": {"class_path": f"mixdist.mixtures.{family}", "init_args": init_args},
            "train": {"epochs": 1, "batch_size": 500},
            "checkpoint": {"every": 1},
            "log_every": 1,
        },
    )


def losses(run: str) -> list[float]:
    return [record["loss"] for record in read_metrics(Path(run))]


def test_a_run_resumes_on_three_ranks_and_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    import mixdist
    from mixdist.data import Digits, Textures

    monkeypatch.chdir(tmp_path)
    ended = here("train", "--config", config_of(tmp_path), "--out", "whole", "--pictures", "true")
    assert ended.code == 0, ended.err
    assert {path.stem for path in Path("whole/images").iterdir()} >= {"joint", "reconstructions", "traversals"}
    shutil.copytree("whole", "again")
    shutil.rmtree("again/checkpoints/step-000000003")
    ended = together("train", "--resume", "again", "--pictures", "false", ranks=3, folder=tmp_path)
    assert ended.code == 0, ended.err
    np.testing.assert_allclose(losses("again"), losses("whole"), rtol=1e-10)
    model = mixdist.load("whole")
    test = Textures(Digits(), modalities=3, channels=1).load().test
    rows = test.take(torch.arange(5))
    x0 = {"x0": rows["x0"]}
    assert {name: z.shape for name, z in model.encode(rows).items()} == {f"x{m}": (5, 4) for m in range(3)}
    assert model.translate(x0, "x0", "x2").shape == model.translate(rows, ["x0", 1], 2).shape == (5, 1, 8, 8)
    torch.testing.assert_close(model.infer(x0), model.encode(x0)["x0"])
    torch.testing.assert_close(model.reconstruct(rows, ["x1"])["x2"], model.translate(rows, "x1", "x2"))
    assert {name: made.shape for name, made in model.generate(6).items()} == {f"x{m}": (6, 1, 8, 8) for m in range(3)}
    assert here("sample", "whole").code == 0
    more = ("train", "--resume", "whole", "--train.epochs", "2")
    refused(*more, "--mixture.posterior", "normal", names="posterior laplace normal")
    with pytest.raises(ValueError, match="modality 'x9'"):
        model.decode(torch.zeros(1, 4), "x9")
    with pytest.raises(ValueError, match="x1"):
        model.infer(x0, ["x1"])


@pytest.mark.parametrize("family", ["PoEMVAE", pytest.param("MoPoE", marks=pytest.mark.slow)])
def test_products_train_and_are_evaluated(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mixdist.mixtures.judges.STEPS", 20)  # how well they judge is another test's
    ended = here("train", "--config", config_of(tmp_path, family), "--out", "run")
    assert ended.code == 0, ended.err
    ended = here("evaluate", "run", "--rows", "20", "--num_samples", "5")
    assert ended.code == 0, ended.err
    assert "log_joint" in ended.out


@pytest.mark.parametrize(
    ("family", "options", "names"),
    [
        ("MMVAE", {"latent": 0}, "mixture.latent 0"),
        ("MMVAE", {"samples": 0}, "mixture.samples 0"),
        ("PoEMVAE", {"beta": -1.0}, "mixture.beta -1.0"),
        ("PoEMVAE", {"subsets": -1}, "mixture.subsets -1"),
        ("MMVAE", {"expert": []}, "mixture.expert Modality"),
    ],
)
def test_what_does_not_fit_is_refused(
    family: str, options: dict[str, Any], names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused("train", "--config", config_of(tmp_path, family, **options), names=names)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ([{"field": "x7"}], "x7 x0"),
        ([{"field": "x1"}], "mixture.expert[1] mixture.expert[0] 'x1'"),
        ([{"scale": 0.0}], "scale 0.0"),
        ([{"scale": -0.5}], "scale -0.5"),
        ([{"padding": 0}], "padding 0"),
        ([{"likelihood": "categorical"}], "categorical 'x0'"),
        ([{"private": -1}], "private -1"),
        ([{"network": {"class_path": "mixdist.nets.Text"}}], "Text 8"),
        ([{"class_path": "mixdist.experts.VAE"}], "VAE mixdist.experts.Modality"),
    ],
)
def test_modalities_that_do_not_fit_are_refused(
    changes: list[dict[str, Any]], names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    experts = [
        {"class_path": "mixdist.experts.Modality", "init_args": {"field": f"x{m}", "network": mlp(8)}} for m in range(3)
    ]
    for expert, change in zip(experts, changes, strict=False):
        if "class_path" in change:
            expert.update(change, init_args={"field": "x0"})
        else:
            expert["init_args"] |= change  # type: ignore[operator]
    refused("train", "--config", config_of(tmp_path, expert=experts), names=names)


HOLED = """
import torch
from mixdist.data import Dataset, Source, Splits
from mixdist.terms import Field


class Holed(Source):
    def __init__(self, empty: int = 0):
        self.empty = empty

    def load(self):
        spec = {f"x{m}": Field((4,), torch.float32) for m in range(2)} | {"present": Field((2,), torch.uint8)}
        parts = []
        for ids in (torch.arange(40), torch.arange(40, 60)):
            present = torch.ones(len(ids), 2, dtype=torch.uint8)
            present[: self.empty] = 0
            views = {f"x{m}": (ids[:, None] * torch.ones(4)).sin() for m in range(2)}
            parts.append(Dataset({"id": ids, "present": present, **views}, spec))
        return Splits(*parts)
"""


@pytest.mark.parametrize(
    ("empty", "num", "names"), [(2, 2, "sample 0 'present' 2"), (0, 1, "mixture.expert 1 'present' (2,)")]
)
def test_rows_and_experts_must_fit_what_is_present(
    empty: int, num: int, names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row without any modality, and a number of experts that is not that of the field's places."""
    monkeypatch.chdir(tmp_path)
    Path("holed_views.py").write_text(HOLED)
    experts = [
        {"class_path": "mixdist.experts.Modality", "init_args": {"field": f"x{m}", "network": mlp(8)}}
        for m in range(num)
    ]
    source = {"class_path": "holed_views.Holed", "init_args": {"empty": empty}}
    config = write_config(
        tmp_path / "config.yaml",
        {
            "data": source,
            "mixture": {"class_path": "mixdist.mixtures.MMVAE", "init_args": {"expert": experts}},
            "train": {"epochs": 1, "batch_size": 20},
        },
    )
    refused("train", "--config", config, names=names)


def test_a_modality_has_the_latent_of_its_mixture() -> None:
    def own(spec: Any, latent: int, posterior: Any) -> Modality:
        return Modality(spec, 7, posterior, "x0")

    with pytest.raises(ValueError, match=r"latent 7 .* mixture.latent \(20\)"):
        made(MMVAE([own]), views(2, False))


def test_present_holds_0_and_1_alone() -> None:
    data = views(2, True).first(2)
    rows = {**data.rows, "present": torch.tensor([[1, 1], [0, 2]], dtype=torch.uint8)}
    with pytest.raises(ValueError, match=rf"'present' of sample {data.ids[1]} holds 2, expected 1"):
        check_present(Dataset(rows, data.spec))


def test_a_row_without_any_modality_is_a_fault_of_the_step() -> None:
    """Where rows are not in memory, it is found when it comes by."""
    data = views(2, True).first(4)
    rows = {**data.rows, "present": torch.tensor([[1, 1], [0, 0], [1, 0], [0, 1]], dtype=torch.uint8)}
    case = Case(family="mmvae", num_experts=2, gate="dreg-looser", expert="normal", objective="private")
    outcome = made(make_multimodal(case), data).backward(RankBatch(rows, (4,)), WeightedLoss(), Moment(0))
    assert [count.item() for count in outcome.faults.values()] == [1]
    assert outcome.loss.isfinite()
    with pytest.raises(ValueError, match="sample 1001 has none"):
        evaluate(made(make_multimodal(case), data), Dataset(rows, data.spec), 4, 0)
