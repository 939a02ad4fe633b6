"""Densities of baselines are those of their formulas, clusters the nearest; one expert spends what a mixture spends."""

from __future__ import annotations

import hashlib
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

import mixdist.baselines.rows
import mixdist.nets.principal
from mixdist.baselines.clusters import GaussianMixture, KMeans, fit_gmm, fit_kmeans
from mixdist.baselines.model import Candidate, choose_settings, evaluate_baseline
from mixdist.baselines.ppca import PPCA, fit_ppca
from mixdist.baselines.rows import Rows, dequantised, values_of
from mixdist.baselines.single import alone, epochs_for, expert_of, widened
from mixdist.competition import Competition, Elbo
from mixdist.config.experts import make_expert, num_parameters
from mixdist.data import Dataset
from mixdist.experts import Centroid
from mixdist.gates import Softmax
from mixdist.mixtures import Soft, TopK
from mixdist.terms import Field
from mixdist.training.phases import Phase, Stretched
from tests.errors import error_of
from tests.launch import mlp

RNG = np.random.default_rng(0)


def dataset(x: np.ndarray, label: np.ndarray | None = None) -> Dataset:
    """Return a data set in memory with ids in an order of their own."""
    ids = torch.from_numpy(np.random.default_rng(1).permutation(len(x)))
    rows, spec = {"id": ids, "x": torch.from_numpy(x)}, {"x": Field(x.shape[1:], torch.from_numpy(x).dtype)}
    if label is None:
        return Dataset(rows, spec)
    labels = {"y": torch.from_numpy(label).to(torch.uint8)}
    return Dataset(rows | labels, spec | {"y": Field((), torch.uint8, num_classes=int(label.max()) + 1)}, "y")


def rows(x: np.ndarray, label: np.ndarray | None = None) -> Rows:
    found = dataset(x, label)
    return Rows(found, values_of(found.spec["x"], "x"))


def ppca(x: np.ndarray, num_components: int, level: float | None = None) -> PPCA:
    model = fit_ppca(rows(x), None, {"components": [num_components]}, level).best.model
    assert isinstance(model, PPCA)
    return model


def gmm(x: np.ndarray, num: int, part: float = 1e-6, covariance: Any = "full") -> Candidate:
    return fit_gmm(rows(x), None, {"components": [num], "min_variance": [part]}, covariance, seed=0).best


def gaussian(num: int, size: int) -> np.ndarray:
    """Return rows of unlike variances about a mean of their own."""
    return RNG.normal(size=(num, size)) @ RNG.normal(size=(size, size)) * np.linspace(0.2, 2, size) + RNG.normal(
        size=size
    )


@pytest.mark.parametrize(
    ("num", "size", "few"), [(300, 7, 1000), (300, 60, 10), (30, 60, 1000), (60, 90, 10), (9, 1, 10)]
)
def test_ppca_is_the_gaussian_of_its_formula(monkeypatch: pytest.MonkeyPatch, num: int, size: int, few: int) -> None:
    """More rows than numbers and fewer, by LAPACK and by Lanczos: W W^T + s^2 I from the covariance's eigenvectors."""
    monkeypatch.setattr(mixdist.nets.principal, "FEW", few)
    monkeypatch.setattr(mixdist.baselines.rows, "AT_ONCE", 64)
    x, num_components = gaussian(num, size), min(3, size - 1)
    if not num_components:
        error_of(lambda: ppca(x, 1), "--components (1)", "numbers in a row (1)")
        return
    model = ppca(x, num_components)
    values, vectors = np.linalg.eigh(np.cov(x.T, ddof=0))
    kept, noise = values[::-1][:num_components], values[::-1][num_components:].mean()
    w = vectors[:, ::-1][:, :num_components] * np.sqrt(kept - noise)
    covariance, mean, tests = w @ w.T + noise * np.eye(size), x.mean(0), gaussian(50, size)
    expected = multivariate_normal(mean, covariance).logpdf(tests)
    np.testing.assert_allclose(model.log_density(tests), expected, rtol=1e-9)
    # E[x|z] at z's posterior mean: mu + W (W^T W + s^2 I)^-1 W^T (x - mu).
    posterior = np.linalg.solve(w.T @ w + noise * np.eye(num_components), w.T @ (tests - mean).T)
    np.testing.assert_allclose(model.reconstruct(tests), mean + (w @ posterior).T, rtol=1e-9, atol=1e-9)
    assert model.num_parameters == size * (num_components + 1) + 1 - math.comb(num_components, 2)


def test_ppca_of_all_but_one_direction_is_the_gaussian_of_greatest_likelihood() -> None:
    x = gaussian(200, 5)
    model, full = ppca(x, 4), multivariate_normal(x.mean(0), np.cov(x.T, ddof=0))
    np.testing.assert_allclose(model.log_density(x), full.logpdf(x), rtol=1e-9)


def test_ppca_of_levels_is_the_expectation_over_values_spread_on_theirs() -> None:
    """log p is a quadratic form, so two points a dimension give its mean over a level exactly."""
    x, h = np.round(gaussian(100, 3) * 4) / 4, 0.25
    plain, spread = (ppca(x, 1, level) for level in (None, h))
    points = np.array(list(itertools.product((-1, 1), repeat=3))) * h / math.sqrt(12)
    covariance = np.cov(x.T, ddof=0) + np.eye(3) * h**2 / 12
    values, vectors = np.linalg.eigh(covariance)
    noise, w = values[:2].mean(), vectors[:, 2:] * math.sqrt(values[2] - values[:2].mean())
    density = multivariate_normal(x.mean(0), w @ w.T + noise * np.eye(3))
    expected = np.mean([density.logpdf(x + point) for point in points], axis=0) + 3 * math.log(h)
    np.testing.assert_allclose(spread.log_density(x), expected, rtol=1e-9)
    assert not np.allclose(plain.log_density(x), spread.log_density(x))


@pytest.mark.parametrize("covariance", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("size", [1, 4])
def test_a_mixture_is_that_of_its_formula(covariance: Any, size: int) -> None:
    from sklearn.mixture import GaussianMixture as Reference

    x = np.concatenate([gaussian(150, size), gaussian(150, size) + 4])
    fitted = Reference(3, covariance_type=covariance, random_state=0).fit(x)
    model, tests = GaussianMixture.of(fitted), gaussian(40, size)
    each = {
        "full": lambda k: fitted.covariances_[k],
        "tied": lambda k: fitted.covariances_,
        "diag": lambda k: np.diag(fitted.covariances_[k]),
        "spherical": lambda k: fitted.covariances_[k] * np.eye(size),
    }[covariance]
    log_p = [
        multivariate_normal(fitted.means_[k], each(k)).logpdf(tests) + np.log(fitted.weights_[k]) for k in range(3)
    ]
    np.testing.assert_allclose(model.log_density(tests), logsumexp(log_p, axis=0), rtol=1e-9)
    assert (model.assign(tests) == fitted.predict(tests)).all()
    assert model.num_parameters == fitted._n_parameters()
    ours = gmm(x, 3, 1e-6 / x.var(0).mean(), covariance).model
    np.testing.assert_allclose(ours.log_density(tests), model.log_density(tests), rtol=1e-9)


def test_levels_are_spread_by_id_alone() -> None:
    field, stored = (
        Field((2,), torch.uint8, scale=0.5, offset=1.0),
        torch.tensor([[0, 3], [255, 4], [7, 7]], dtype=torch.uint8),
    )
    spread, ids = dequantised(field, "x", seed=3), torch.tensor([5, 1, 2**40])
    values = spread({"id": ids, "x": stored})
    assert ((values - field.values(stored, torch.float64)).abs() < 0.25).all()
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(spread({"id": ids[order], "x": stored[order]}), values[order], rtol=0, atol=0)


def test_k_means_takes_the_nearest_centre() -> None:
    x, label = np.concatenate([gaussian(50, 3) * 0.1 + shift for shift in (0, 5, 10)]), np.repeat(np.arange(3), 50)
    model = fit_kmeans(rows(x), 3, seed=0).best.model
    assert isinstance(model, KMeans)
    distance = np.square(x[:, None] - model.centre_KD).sum(2)
    assert (model.assign(x) == distance.argmin(1)).all()
    found = evaluate_baseline(model, rows(x, label), 3)
    assert found.figures["accuracy"] == found.figures["nmi"] == found.figures["ari"] == 1.0
    assert found.figures["rmse_row"] == pytest.approx(math.sqrt(distance.min(1).mean()))
    assert found.figures["rmse_value"] == pytest.approx(math.sqrt(distance.min(1).mean() / 3))
    assert evaluate_baseline(model, rows(x, label), None).figures.keys() == {"accuracy", "purity", "nmi", "ari"}


def test_figures_are_means_of_columns_in_the_data_set_s_order() -> None:
    x = gaussian(2100, 4)
    data, model = rows(x), ppca(x, 2)
    found = evaluate_baseline(model, data, 4)
    assert (found.columns["id"] == data.dataset.ids.numpy()).all()
    np.testing.assert_allclose(found.columns["log_likelihood"], model.log_density(x), rtol=1e-12)
    for name, value in found.figures.items():
        assert found.columns[name].mean() == pytest.approx(value)
        assert found.errors[name] == pytest.approx(found.columns[name].std(ddof=1) / math.sqrt(2100))


def test_what_is_chosen_is_the_best_on_validation_rows(tmp_path: Path) -> None:
    x, valid = gaussian(400, 6), gaussian(100, 6)
    found = fit_ppca(rows(x), rows(valid), {"components": [1, 2, 5]})
    means = [ppca(x, m).log_density(valid).mean() for m in (1, 2, 5)]
    assert found.best.settings == {"components": (1, 2, 5)[int(np.argmax(means))]}
    assert [one["valid_log_likelihood"] for one in found.tried] == pytest.approx(means)
    mixture = fit_gmm(rows(x), rows(valid), {"components": [1, 3], "min_variance": [1e-6, 10.0]}, "full", seed=0)
    assert len(mixture.tried) == 4
    assert max(one["valid_log_likelihood"] for one in mixture.tried) == pytest.approx(
        mixture.best.model.log_density(valid).mean()
    )
    for model in (found.best.model, mixture.best.model):
        path, data = tmp_path / "model.npz", model.to_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        path.write_bytes(data)
        again = type(model).read(path, sha256)
        assert (again.log_density(valid) == model.log_density(valid)).all()
        path.write_bytes(data[:-40])
        error_of(lambda model=model, path=path, sha256=sha256: type(model).read(path, sha256), "model.npz")


def test_without_validation_rows_a_tenth_of_the_training_rows_chooses() -> None:
    """The test rows are not asked, and what was chosen is fitted to all training rows."""
    x, seen = gaussian(400, 6), []

    def fit(train: Rows, valid: Rows | None, grid: Any) -> Any:
        seen.append((len(train), valid and len(valid)))
        return fit_ppca(train, valid, grid)

    found = choose_settings(fit, rows(x), None, {"components": [1, 2, 5]})
    (inner, held), last = seen
    assert inner + held == 400
    assert 20 <= held <= 60
    assert last == (400, None)
    assert (len(found.tried), found.chosen_on) == (3, "a tenth of the training rows")
    chosen = ppca(x, found.best.settings["components"])
    assert (found.best.model.log_density(x) == chosen.log_density(x)).all()
    assert choose_settings(fit, rows(x[:40]), None, {"components": [2, 1, 5]}).best.settings == {"components": 2}


def test_settings_that_cannot_be_fitted_are_passed_over() -> None:
    x, valid = np.repeat(gaussian(4, 9), 5, 0), gaussian(10, 9)
    found = fit_ppca(rows(x), rows(valid), {"components": [1, 2, 3]})  # four points lie in three dimensions
    assert [one["components"] for one in found.tried] == [1, 2]


def test_what_cannot_be_fitted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian(20, 30)
    error_of(lambda: ppca(x, 20), "--components (20)", "training rows (20)")
    error_of(lambda: ppca(x[:, :4], 4), "--components (4)", "numbers in a row (4)")
    error_of(lambda: ppca(np.repeat(x[:2], 10, 0), 2), "--components (2)", "no noise")
    told = error_of(lambda: ppca(np.ones((20, 3)), 1), "--components (1)", "no noise", "varies")
    assert "fewer components" not in told
    error_of(lambda: gmm(np.full((20, 3), 0.1), 2, 1e-2), "20 training rows are the same")
    still = np.concatenate([np.zeros((20, 1)), gaussian(20, 1)], axis=1)
    told = error_of(lambda: gmm(still, 1, 0.0), "--min_variance 0", "singular", "as 0.001")
    assert "fewer components" not in told
    remedy = error_of(lambda: gmm(1e-200 * x, 2, 5e-3), "--min_variance 0.005", "singular", "as 0.05")
    assert "fewer components" in remedy
    error_of(lambda: gmm(x, 21), "--components (21)", "(20)")
    error_of(lambda: gmm(x, 2, 0.0), "--min_variance", "0", "singular")
    error_of(lambda: fit_kmeans(rows(x), 21, 0), "--clusters (21)", "(20)")
    monkeypatch.setattr(mixdist.baselines.rows, "free_memory", lambda: 10_000)
    for fit in (
        lambda: ppca(x, 2),
        lambda: gmm(x, 2),
        lambda: fit_kmeans(rows(x), 2, 0),
    ):
        error_of(fit, "0.0 GB", "--rows")
    bad = dataset(gaussian(10, 3))
    bad.rows["x"][4, 1] = math.nan
    error_of(lambda: list(Rows(bad, values_of(bad.spec["x"], "x")).batches()), f"sample {bad.ids[4]}", "nan")


def test_constant_values_are_told() -> None:
    x = np.concatenate([gaussian(100, 3), np.ones((100, 2))], axis=1)
    found = gmm(x, 2, 1e-4)
    assert "2 of 5 values" in found.findings[0]
    assert math.isfinite(ppca(x, 2).log_density(x).mean())


# One expert

GATE, STAGES = Softmax, [Phase(epochs=3), Phase(epochs=5, trains="gate"), Phase(epochs=2)]


@pytest.mark.parametrize(
    ("mixture", "gradients"),
    [
        (Soft(GATE, Centroid, 4), [12, 0, 8]),
        (Soft(GATE, Centroid, 4, routing=TopK(2)), [6, 0, 4]),
        (Soft(GATE, Centroid, 4, routing=TopK(1, capacity_factor=0.5)), [1.5, 0, 1]),
        (Competition(Centroid, 4, rounds=7, score=Elbo()), [12, 20, 14]),
        (Competition(Centroid, 4, rounds=7, score=Elbo(), start="split"), [3, 5, 14]),
    ],
)
def test_a_budget_is_counted_in_sample_gradients(mixture: Any, gradients: list[float]) -> None:
    stages = STAGES if isinstance(mixture, Soft) else [STAGES[0], Phase(epochs=5), STAGES[2]]
    assert mixture.gradients(stages) == gradients
    assert epochs_for(gradients, 4, "mixture") == [math.ceil(one) for one in gradients]
    assert epochs_for(gradients, 4, "expert") == [math.ceil(one / 4) for one in gradients]


def vae(network: dict[str, Any]) -> dict[str, Any]:
    return {"class_path": "mixdist.experts.VAE", "init_args": {"network": network, "latent": 3}}


CONV = {"class_path": "mixdist.nets.Conv", "init_args": {"channels": [4, 8]}}


@pytest.mark.parametrize("network", [mlp(16, 8), CONV], ids=["mlp", "conv"])
@pytest.mark.parametrize("factor", [0.5, 1, 4, 10])
def test_a_wider_expert_has_the_parameters_wanted(network: dict[str, Any], factor: float) -> None:
    spec = {"x": Field((1, 8, 8), torch.uint8, 1 / 255)}
    count = lambda one: num_parameters(one, spec)  # noqa: E731
    wanted = round(factor * count(vae(network)))
    found = widened(vae(network), wanted, count)
    (key,) = network["init_args"]
    widths, before = found["init_args"]["network"]["init_args"][key], network["init_args"][key]
    widest = max(widths)
    for other in (widest - 1, widest + 1):
        changed = [max(1, round(width * other / max(before))) for width in before]
        assert abs(count(found) - wanted) <= abs(count(vae({**network, "init_args": {key: changed}})) - wanted)
    assert widths == before or factor != 1
    assert network["init_args"][key] == before


def test_an_expert_without_widths_is_refused() -> None:
    centroid = {"class_path": "mixdist.experts.Centroid", "init_args": {}}
    error_of(lambda: widened(centroid, 100, lambda one: 1), "mixdist.experts.Centroid", "widths")
    config = {"mixture": {"class_path": "my.Family", "init_args": {"num_experts": 3}}}
    error_of(lambda: expert_of(config, 0), "my.Family", "expert")
    config["mixture"]["init_args"]["expert"] = [centroid, vae(mlp(4))]
    assert expert_of(config, 1) == vae(mlp(4))
    error_of(lambda: expert_of(config, 2), "--expert (2)", "0 to 1")


def test_looking_at_an_expert_draws_nothing() -> None:
    before = torch.random.get_rng_state()
    expert = make_expert(vae(mlp(4)), {"x": Field((5,), torch.float32)})
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {p.device.type for p in expert.parameters()} == {"meta"}


def test_one_expert_keeps_the_phases_that_train_experts() -> None:
    schedule = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 20}}
    phase = {"batch_size": 10, "trains": "experts", "objective": {"class_path": "a.B"}, "schedule": None}
    config = {
        "mixture": {"class_path": "mixdist.mixtures.Soft", "init_args": {"expert": vae(mlp(4))}},
        "pretrain": [{**phase, "epochs": 2}, {**phase, "epochs": 9, "trains": "gate"}],
        "train": {**phase, "epochs": 4, "schedule": schedule},
        "mesh": {"ep_size": 2, "device": "cpu"},
    }
    found = alone(config, vae(mlp(8)), [6, 0, 12], [(20, 60), (90, 0), (40, 120)])
    assert [one["epochs"] for one in (*found["pretrain"], found["train"])] == [6, 12]
    assert not {"objective", "trains"} & found["train"].keys()
    assert found["train"]["schedule"]["init_args"] == {"schedule": schedule, "steps": 40, "over": 120}
    assert found["mixture"]["init_args"]["num_experts"] == 1
    error_of(lambda: alone(config, vae(mlp(8)), [0, 0, 0], [(1, 1)] * 3), "train.trains")


@pytest.mark.parametrize("over", [10, 30, 70, 7])
def test_a_stretched_schedule_is_where_the_schedule_was(over: int) -> None:
    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.SGD([torch.zeros(1)], lr=1.0)

    def cosine(one: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(one, 1.0, total_steps=31)

    plain, stretched = optimizer(), optimizer()
    rates, schedule = [], cosine(plain)
    for _ in range(31):
        rates.append(plain.param_groups[0]["lr"])
        plain.step()
        if len(rates) < 31:
            schedule.step()
    slow = Stretched(stretched, cosine, 30, over)
    for step in range(over + 20):
        assert stretched.param_groups[0]["lr"] == rates[min(step * 30 // over, 30)]
        stretched.step()
        slow.step()
