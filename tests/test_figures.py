"""Figures are what their names say: bounds lie below what they bound, errors are those of resampling, names have one
definition, and every likelihood says what it is."""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch.distributions import MultivariateNormal

from mixdist.competition import Competition, Elbo
from mixdist.data import Blobs, Dataset
from mixdist.evaluation.evaluate import evaluate
from mixdist.evaluation.record import record, rows_of
from mixdist.experts import VAE, Centroid, Expert, Regressor
from mixdist.gates import Gate, LabelOracle, Softmax, Uniform
from mixdist.mixtures import Context, Ensemble, ExpertEvaluation, Mixture, Soft, TopK
from mixdist.mixtures.clusters import clustering
from mixdist.mixtures.posteriors import ACTIVE
from mixdist.mixtures.study import linearised, standard_error
from mixdist.nets import MLP
from mixdist.noise import Moment
from mixdist.parallel.wire import Wire
from mixdist.terms import Field, Spec
from tests.launch import ROOT
from tests.parity import SEED, Case, data, make_mixture, mesh_of
from tests.pool import Pool


def points(num_rows: int = 1500) -> Dataset:
    """Points in three dimensions, and a label that has to do with where they are."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(num_rows, 3, dtype=torch.float64, generator=generator)
    y = (x[:, 0] + 0.5 * torch.randn(num_rows, dtype=torch.float64, generator=generator) > 0.4).to(torch.uint8)
    spec = {"x": Field((3,), torch.float64), "y": Field((), torch.uint8, num_classes=2)}
    return Dataset({"id": torch.arange(num_rows) + 7, "x": x, "y": y}, spec, "y")


def ready(mixture: Ensemble, spec: Spec) -> Ensemble:
    mesh = mesh_of(mixture.num_experts, 1, 1)
    mixture.setup(Context(SEED, torch.float64, spec, mesh, Wire(mesh.device)))
    return mixture


def judged(mixture: Mixture, dataset: Dataset, num_samples: int | None = None) -> ExpertEvaluation:
    found = evaluate(mixture, dataset, 500, SEED, num_samples)
    assert isinstance(found, ExpertEvaluation)
    return found


def linear(spec: Spec) -> Expert:
    return VAE(spec, 2, MLP([]), "gaussian", 0.7, "identity")


def exact_log_px(expert: Expert, x: torch.Tensor) -> torch.Tensor:
    """Return log N(x; b, W W^T + s^2 I) of a VAE with a linear decoder."""
    affine = expert.get_submodule("decoder.layers.0")
    weight, bias = affine.get_parameter("weight").detach(), affine.get_parameter("bias").detach()
    weight = weight if weight.shape[0] == len(bias) else weight.T
    return MultivariateNormal(bias, weight @ weight.T + 0.49 * torch.eye(3).double()).log_prob(x)


class Sharp(Softmax):
    """A gate that is sure of itself."""

    def forward(self, rows: Any, eps: Any) -> Any:
        return super().forward({name: 20 * column for name, column in rows.items()}, eps)


@pytest.mark.parametrize("gate", [Uniform, Softmax, Sharp, functools.partial(LabelOracle, field="y")])
@pytest.mark.parametrize("hard", [False, True])
def test_the_elbo_is_below_the_likelihood_whatever_the_gate(gate: Callable[..., Gate], hard: bool) -> None:
    dataset = points()
    mixture: Ensemble = Competition(linear, 3, score=Elbo()) if hard else Soft(gate, linear, 3)
    for expert in ready(mixture, dataset.spec).bank.owned().values():
        for parameter in expert.get_submodule("encoder").parameters():
            parameter.data.mul_(0.1)  # near the prior, whose importance weights have a small variance
    found = judged(mixture, dataset, 100)
    share = torch.from_numpy(found.weight_E)
    each = torch.stack([exact_log_px(expert, dataset.rows["x"]) for expert in mixture.bank.owned().values()], 1)
    exact_N = torch.logsumexp(each + share.log(), 1).numpy()
    columns = found.columns
    for lower, upper in ((columns["elbo"], columns["log_likelihood"]), (columns["log_likelihood"], exact_N)):
        assert (lower - upper).mean() <= 4 * standard_error(lower - upper)
    assert found.figures["log_likelihood"] == pytest.approx(exact_N.mean(), abs=0.02)
    assert found.figures["elbo"] < exact_N.mean()
    # What experts have without the price of the choice is no bound: the weights of a row have seen it.
    assert found.figures["expert_elbo"] >= found.figures["elbo"]


def test_exact_experts_need_no_samples() -> None:
    dataset = points(200)
    mixture = ready(Soft(Softmax, Centroid, 3), dataset.spec)
    found, again = judged(mixture, dataset), judged(mixture, dataset, 10)
    x, means = dataset.rows["x"], [expert.mean.detach() for expert in mixture.bank.owned().values()]  # type: ignore
    each = torch.stack([MultivariateNormal(mean[0], torch.eye(3).double()).log_prob(x) for mean in means], 1)
    wanted = torch.logsumexp(each + torch.from_numpy(found.weight_E).log(), 1)
    np.testing.assert_allclose(found.columns["log_likelihood"], wanted.numpy(), rtol=1e-12)
    assert again.figures == found.figures
    # The elbo's only gap is then that of the gate's answer from the posterior of the expert.
    assert found.figures["elbo"] <= found.figures["log_likelihood"]


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("renormalise", [True, False])
def test_the_shares_of_top_k_are_the_mean_of_the_weights_of_rows(k: int, renormalise: bool) -> None:
    dataset = points(200)
    mixture = ready(Soft(Softmax, Centroid, 4, routing=TopK(k, renormalise=renormalise)), dataset.spec)
    found = judged(mixture, dataset)
    weight_E = found.weight_E
    np.testing.assert_allclose(weight_E, found.share_E, rtol=1e-12)
    in_use = math.exp(-sum(share * math.log(share) for share in weight_E if share))
    assert found.figures["experts_in_use"] == pytest.approx(in_use, rel=1e-12)
    assert found.figures["elbo"] <= found.figures["log_likelihood"]
    with torch.no_grad():
        full = mixture.gating(dataset.rows, Moment(SEED)).log_resp_BE.exp().mean(0)
    assert np.abs(weight_E - full.numpy()).max() > 1e-3


# Errors.


def pair(num_rows: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Two columns that belong together, with heavy tails."""
    rng = np.random.default_rng(0)
    common = rng.standard_t(6, num_rows)
    return common + 0.3 * rng.standard_normal(num_rows), common + 0.2 * rng.standard_exponential(num_rows)


def test_errors_of_paired_differences_are_those_of_10000_resamples() -> None:
    rng, (a, b) = np.random.default_rng(1), pair()
    picked = rng.integers(0, len(a), (10_000, len(a)))
    for column in (a, b, a - b):
        assert standard_error(column) == pytest.approx(column[picked].mean(1).std(), rel=0.05)
    assert standard_error(a - b) < standard_error(a) / 2  # what pairing is for
    assert math.isnan(standard_error(a[:1]))
    assert math.isnan(standard_error(np.array([1.0, math.nan, 2.0])))


def test_columns_of_clusterings_have_their_figures_and_errors() -> None:
    rng = np.random.default_rng(2)
    class_N = rng.integers(0, 4, 500)
    expert_N = np.where(rng.random(500) < 0.7, class_N, rng.integers(0, 6, 500))
    found = clustering(expert_N, class_N)
    counts_EC = np.array([[((expert_N == e) & (class_N == c)).sum() for c in range(4)] for e in range(6)])
    known = {
        "accuracy": max(counts_EC[list(order), range(4)].sum() for order in permutations_of(6, 4)) / 500,
        "purity": counts_EC.max(1).sum() / 500,
        "nmi": normalized_mutual_info_score(class_N, expert_N),
        "ari": adjusted_rand_score(class_N, expert_N),
    }
    for name, value in known.items():
        assert found[name].mean() == pytest.approx(value, rel=1e-12)
    resamples = []
    for _ in range(400):
        picked = rng.integers(0, 500, 500)
        resamples.append([column.mean() for column in clustering(expert_N[picked], class_N[picked]).values()])
    for error, column in zip(np.std(resamples, axis=0), found.values(), strict=True):
        assert standard_error(column) == pytest.approx(error, rel=0.15)


def permutations_of(num: int, length: int) -> list[tuple[int, ...]]:
    from itertools import permutations

    return list(permutations(range(num), length))


@pytest.mark.parametrize("experts", [[0, 0, 0], [0, 1, 2]])
@pytest.mark.parametrize("classes", [[1, 1, 1], [0, 1, 2], [2, 0, 1]])
def test_clusterings_of_one_cluster_have_finite_columns(experts: list[int], classes: list[int]) -> None:
    for column in clustering(np.array(experts), np.array(classes)).values():
        assert np.isfinite(column).all()


def test_errors_of_roots_and_of_the_effective_number_are_those_of_resampling() -> None:
    dataset = points(600)
    mixture = ready(Soft(Sharp, linear, 3), dataset.spec)
    found = judged(mixture, dataset)
    with torch.no_grad():
        resp_NE = mixture.gating(dataset.rows, Moment(SEED)).log_resp_BE.exp().numpy()  # type: ignore[attr-defined]
    each = torch.stack([e.reconstruct(dataset.rows) for e in mixture.bank.owned().values()], 1).detach()
    own = each[torch.arange(600), torch.from_numpy(found.expert_N)]
    squared_N = (own - dataset.rows["x"]).square().sum(1).numpy()
    picked = np.random.default_rng(3).integers(0, 600, (4000, 600))
    means_E = resp_NE[picked].mean(1)
    resampled = {
        "rmse_row": np.sqrt(squared_N[picked].mean(1)),
        "rmse_value": np.sqrt(squared_N[picked].mean(1) / 3),
        "experts_in_use": np.exp(-(means_E * np.log(means_E)).sum(1)),
    }
    for name, values in resampled.items():
        assert found.errors[name] == pytest.approx(values.std(), rel=0.1), name
        assert found.figures[name] == pytest.approx(values.mean(), rel=0.01), name
    np.testing.assert_allclose(linearised(0.0, np.zeros(3)), np.zeros(3))


# Latent dimensions.


def test_active_units_are_those_whose_posterior_mean_moves() -> None:
    dataset = points(300)
    mixture = ready(Soft(Softmax, lambda spec: VAE(spec, 4, MLP([]), "gaussian", 0.7, "identity"), 2), dataset.spec)
    with torch.no_grad():
        for expert in mixture.bank.owned().values():
            expert.get_submodule("encoder.layers.0").get_parameter("weight")[..., :2] *= 1e-4
            expert.get_submodule("encoder.layers.0").get_parameter("weight")[:2] *= 1e-4
    found = judged(mixture, dataset)
    for e, expert in mixture.bank.owned().items():
        with torch.no_grad():
            mean_NL, kl_NL = expert.posterior(dataset.rows)
        own = torch.from_numpy(found.expert_N == e)
        for told, rows in ((found.latent_own[e], own), (found.latent_all[e], torch.ones_like(own))):
            variance_L = mean_NL[rows].var(0, correction=0)
            np.testing.assert_allclose(told["kl_by_dimension"], kl_NL[rows].mean(0), rtol=1e-10)
            np.testing.assert_allclose(told["variance_of_means"], variance_L, rtol=1e-7, atol=1e-12)
            assert told["active_units"] == (variance_L > ACTIVE).sum() < 4
    kl_N = torch.stack([expert.posterior(dataset.rows).kl_RL.sum(1) for expert in mixture.bank.owned().values()], 1)
    wanted = kl_N.detach()[torch.arange(300), torch.from_numpy(found.expert_N)].mean().item()
    assert found.figures["kl"] == pytest.approx(wanted, rel=1e-12)
    units = [told.get("active_units", 0) for told in found.latent_own]
    assert found.figures["active_units"] == pytest.approx(np.mean([units[e] for e in found.expert_N]))


# What likelihoods are.


def grey(values: torch.Tensor) -> Dataset:
    spec = {"x": Field((4,), torch.uint8, scale=1 / 255)}
    return Dataset({"id": torch.arange(len(values)), "x": values.to(torch.uint8)}, spec)


LEVELS = torch.arange(40).reshape(10, 4) * 6
KINDS = [
    ("bernoulli", LEVELS, "neither"),
    ("bernoulli", (LEVELS > 99) * 255, "mass"),
    ("continuous_bernoulli", LEVELS, "density"),
    ("logistic", LEVELS, "mass"),
    ("gaussian", LEVELS, "density"),
    ("laplace", LEVELS, "density"),
]


@pytest.mark.parametrize(("name", "values", "kind"), KINDS)
def test_a_likelihood_says_what_it_is(name: Any, values: torch.Tensor, kind: str) -> None:
    dataset = grey(values)
    found = judged(ready(Soft(Uniform, lambda spec: VAE(spec, 2, MLP([3]), name), 2), dataset.spec), dataset, 5)
    assert (found.protocol["likelihood"], found.protocol["likelihood_of"]) == (kind, "x")
    if kind == "density":
        assert found.protocol["add_for_stored_units"] == pytest.approx(-4 * math.log(255))
    else:
        assert "add_for_stored_units" not in found.protocol
    if kind == "mass":
        assert (found.columns["log_likelihood"] < 0).all()


def test_a_density_and_a_mass_make_no_mixture() -> None:
    dataset = grey(LEVELS)
    experts = [lambda spec: VAE(spec, 2, MLP([3]), "gaussian"), lambda spec: VAE(spec, 2, MLP([3]), "logistic")]
    found = judged(ready(Soft(Uniform, experts), dataset.spec), dataset, 5)
    assert found.protocol["likelihood"] is None
    assert not {"log_likelihood", "elbo", "expert_elbo"} & found.figures.keys()
    assert {"loss", "rmse_row"} <= found.figures.keys()


def line(num_rows: int = 60) -> Dataset:
    """y is x or -x, and a label says which."""
    x = torch.linspace(-1, 1, num_rows).double()[:, None]
    side = torch.arange(num_rows) % 2
    spec = {"x": Field((1,), torch.float64), "y": Field((1,), torch.float64)}
    return Dataset({"id": torch.arange(num_rows), "x": x, "y": x * (2 * side[:, None] - 1)}, spec)


class Peeks(Gate):
    """It reads what is to be predicted."""

    fields = ("x", "y")

    def __init__(self, spec: Spec, num_experts: int) -> None:
        super().__init__()

    def forward(self, rows: Any, eps: Any) -> Any:
        from mixdist.terms import Gating

        right = (rows["x"] * rows["y"])[:, 0] > 0
        return Gating(torch.log_softmax(20.0 * torch.stack([right, ~right], 1).double(), dim=1))


@pytest.mark.parametrize("hard", [False, True])
def test_weights_that_have_seen_the_target_are_not_those_of_a_prediction(hard: bool) -> None:
    dataset = line()

    def affine(spec: Spec) -> Expert:
        return Regressor(spec, MLP([]), "gaussian", 0.1)

    mixture = ready(Competition(affine, 2, score=Elbo()) if hard else Soft(Peeks, affine, 2), dataset.spec)
    experts = mixture.bank.owned()
    with torch.no_grad():
        for expert, slope in zip(experts.values(), (1.0, -1.0), strict=True):
            for parameter in expert.parameters():
                parameter.fill_(slope if parameter.numel() == 1 and parameter.dim() > 1 else 0.0)
    found = judged(mixture, dataset)
    share = torch.from_numpy(found.weight_E)
    log_py = torch.stack([-expert(dataset.rows, None).loss_R for expert in experts.values()], 1).detach()
    wanted = torch.logsumexp(log_py + share.log(), 1).mean().item()
    assert found.figures["conditional_log_likelihood"] == pytest.approx(wanted, rel=1e-12)
    # Each row's best expert is right, but nobody who has not seen y can know which it is.
    assert found.figures["loss"] < -1
    mean = sum(weight * slope for weight, slope in zip(share.tolist(), (1.0, -1.0), strict=True))
    error = (dataset.rows["y"] - mean * dataset.rows["x"]).square().mean().sqrt().item()
    assert found.figures["prediction_rmse"] == pytest.approx(error, rel=1e-6)
    assert any("reads y" in finding for finding in found.findings)


# Names.


def shown() -> dict[str, set[str]]:
    """The figures of mixtures of every kind."""
    kinds = {kind: make_mixture(Case(expert=kind), mesh_of(4, 1, 1), Wire(torch.device("cpu"))) for kind in EXPERTS}
    return {kind: set(judged(mixture, data(), 2).figures) for kind, mixture in kinds.items()}


EXPERTS = ("bernoulli", "regressor", "classifier", "conv", "unlike")


def test_every_figure_has_one_definition() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text()
    table = text.partition("## Figures")[2].partition("\n\n`evaluation.json` has")[0]
    defined = re.findall(r"^\| `(\w+)` \|", table, re.M)
    assert len(defined) == len(set(defined))
    figures = set().union(*shown().values()) | {"kde_log_likelihood"}
    for gate in ("softmax", "vade"):
        mixture = make_mixture(Case(gate=gate), mesh_of(4, 1, 1), Wire(torch.device("cpu")))
        figures |= set(judged(mixture, known(), 2).figures)
    assert figures == set(defined)


def known() -> Dataset:
    return replace(data(), log_density_N=torch.zeros(45, dtype=torch.float64))


def test_what_is_told_of_each_expert_is_explained() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text()
    found = judged(make_mixture(Case(), mesh_of(4, 1, 1), Wire(torch.device("cpu"))), data(), 2).describe()
    for rows in ("on_own_rows", "on_all_rows"):
        for expert in found["experts"]:
            assert [name for name in expert[rows] if f"`{name}`" not in text] == []


# Files.


def test_a_record_has_the_rows_whose_means_it_tells(tmp_path: Path) -> None:
    found = judged(make_mixture(Case(), mesh_of(4, 1, 1), Wire(torch.device("cpu"))), data(), 3)
    path = tmp_path / "evaluation.json"
    record(found, {"seed": 1}, path)
    with np.load(tmp_path / "evaluation.npz", allow_pickle=False) as columns:
        assert set(columns) == {"id", "label", "expert"} | (found.errors.keys() - {"experts_in_use"})
        np.testing.assert_array_equal(columns["id"], data().ids)
        np.testing.assert_array_equal(columns["label"], data().rows["label"])
        for name in set(columns) - {"id", "label", "expert"}:
            assert columns[name].dtype == np.float64
            assert columns[name].mean() == pytest.approx(found.figures[name], rel=1e-12)
            assert columns[name].std(ddof=1) / math.sqrt(45) == pytest.approx(found.errors[name], rel=1e-12)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evaluation.json", "evaluation.npz"]


def columns_of(case: Case) -> dict[str, np.ndarray]:
    mixture = make_mixture(case, mesh_of(case.num_experts, case.ranks, case.ep_size), Wire(torch.device("cpu")))
    found = evaluate(mixture, data(), case.batch_size, SEED, 3, data())
    with np.load(io.BytesIO(rows_of(found)), allow_pickle=False) as columns:
        return dict(columns)


@pytest.mark.parametrize("expert", ["bernoulli", "unlike"])
def test_every_layout_writes_the_same_rows(pool: Callable[[int], Pool], expert: str) -> None:
    case = Case(ranks=2, ep_size=2, expert=expert, batch_size=13)
    wanted = columns_of(case.reference())
    for got in pool(2).run("tests.test_figures:columns_of", case):
        assert got.keys() == wanted.keys()
        for name, column in wanted.items():
            np.testing.assert_allclose(got[name], column, rtol=1e-10, atol=1e-12, err_msg=name)


# Capacity.


def test_refused_rows_are_counted_and_the_weighted_loss_does_not_fall_by_them() -> None:
    from mixdist.data import RankBatch
    from mixdist.mixtures import SoftMinLoss, WeightedLoss

    dataset = points(40)
    batch, losses = RankBatch(dataset.rows, (40,)), {}
    for factor in (None, 0.3):
        for renormalise in (True, False):
            routing = TopK(1, factor, renormalise)
            mixture = ready(Soft(Softmax, Centroid, 2, routing=routing), dataset.spec)
            outcome = mixture.backward(batch, WeightedLoss(), Moment(SEED))
            told = mixture.record(outcome, 40)
            taken = outcome.sums["seen"].sum().item()
            assert told["refused_rows"] == 40 - taken
            losses[factor, renormalise] = outcome.loss.item(), told["weighted_loss"]
            again = mixture.record(mixture.backward(batch, SoftMinLoss(), Moment(SEED)), 40)
            assert again["weighted_loss"] == pytest.approx(told["weighted_loss"], rel=1e-12)
    assert losses[0.3, True][0] < 0.6 * losses[None, True][0]
    assert losses[0.3, True][1] == pytest.approx(losses[None, True][1], rel=0.3)
    assert losses[None, True][0] == pytest.approx(losses[None, True][1], rel=1e-12)


def test_a_table_has_no_column_that_no_expert_has() -> None:
    """Of experts that differ: what one does not have is a dash, what none has is left out."""
    data = Blobs(rows=4, test_rows=2).load().train
    shown = []
    for log_px in ([math.nan, math.nan], [math.nan, -2.0]):
        on_own = {"loss": np.ones(2), "log_likelihood": np.array(log_px)}
        own = {"rows_E": np.array([3, 1]), "expert_N": np.array([0, 0, 0, 1]), "share_E": np.ones(2) / 2}
        shown.append(ExpertEvaluation(data, {}, on_own=on_own, **own).table())
    (without, _), (headers, lines) = shown
    assert "log-likelihood" not in without
    assert [line[headers.index("log-likelihood")] for line in lines] == ["-", "-2"]
