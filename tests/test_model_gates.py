"""Gates that are models: GMM against scikit-learn, bounds of VaDE and DMVAE, and what each stage learns."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from mixdist.data import Digits
from mixdist.experts import VAE
from mixdist.experts.importance import Weights
from mixdist.gates import DMVAE, GMM, Consistent, Gate, VaDE
from mixdist.gates.gaussians import fit_diagonal, log_joint, weighted_clusters
from mixdist.mixtures.gate_shown import in_the_plane
from mixdist.nets import MLP
from mixdist.report.metrics import read_metrics
from mixdist.terms import Batch, Field
from tests.launch import changed, here, mlp, write_config

SPEC = {"x": Field((3,), torch.float64)}
IMAGES = {"x": Field((1, 6, 6), torch.float64)}
NET = MLP([7])


def rows(num: int = 40, shape: tuple[int, ...] = (3,)) -> Batch:
    x = torch.randn(num, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return {"id": torch.arange(num), "x": x}


def scattered(make: Callable[[], Gate], seed: int = 0) -> Gate:
    """Return a gate whose parameters are all away from their first values."""
    torch.manual_seed(seed)
    gate = make().double()
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return gate


def noise(gate: Gate, num: int) -> Tensor | None:
    if gate.noise_shape is None:
        return None
    return torch.randn(num, *gate.noise_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def vade(**more: Any) -> VaDE:
    return VaDE(SPEC, 4, latent=2, network=NET, likelihood="gaussian", mean="identity", **more)


def dmvae(**more: Any) -> DMVAE:
    return DMVAE(SPEC, 4, latent=2, network=NET, likelihood="gaussian", mean="identity", **more)


# GMM


def as_scikit_learn(gate: GMM) -> GaussianMixture:
    """Return scikit-learn's mixture with the parameters of a gate."""
    model = GaussianMixture(gate.num_clusters, covariance_type=gate.covariance)
    model.weights_ = torch.softmax(gate.logits_K, 0).detach().numpy()
    model.means_ = gate.mean_KD.detach().numpy()
    factors = gate.log_diagonal_KD.exp() if gate.covariance == "diag" else gate.factors()
    model.precisions_cholesky_ = factors.detach().numpy()
    return model


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_gmm_is_scikit_learns(covariance: str) -> None:
    gate, given = scattered(lambda: GMM(SPEC, 4, covariance=covariance)), rows()
    gating, model, x = gate(given, None), as_scikit_learn(gate), given["x"].numpy()
    np.testing.assert_allclose(gating.log_resp_BE.exp().detach(), model.predict_proba(x), rtol=1e-10, atol=1e-300)
    np.testing.assert_allclose(-gating.loss_B.detach(), model.score_samples(x), rtol=1e-10)
    torch.testing.assert_close(gate.log_weights(given, None)[:, 0], -gating.loss_B, rtol=1e-12, atol=0)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_em_makes_scikit_learns_iterations(covariance: str) -> None:
    gate, given = scattered(lambda: GMM(SPEC, 3, covariance=covariance, min_variance=1e-3)), rows(200)
    before, x = as_scikit_learn(gate), given["x"].numpy()
    factors = before.precisions_cholesky_
    precisions = factors**2 if covariance == "diag" else factors @ factors.transpose(0, 2, 1)
    options = {"weights_init": before.weights_, "means_init": before.means_, "precisions_init": precisions}
    model = GaussianMixture(3, covariance_type=covariance, reg_covar=1e-3, max_iter=5, tol=0, **options)
    with pytest.warns(Warning, match="converge"):
        model.fit(x)
    for _ in range(5):
        parts = [{name: column[part] for name, column in given.items()} for part in (slice(0, 70), slice(70, None))]
        gate.maximise(sum(map(gate.statistics, parts)))
    np.testing.assert_allclose(gate.mean_KD.detach(), model.means_, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(torch.softmax(gate.logits_K, 0).detach(), model.weights_, rtol=1e-9)
    found = as_scikit_learn(gate).precisions_cholesky_
    np.testing.assert_allclose(found, model.precisions_cholesky_, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_gmm_samples_have_its_moments(covariance: str) -> None:
    gate = scattered(lambda: GMM(SPEC, 2, covariance=covariance))
    eps = torch.randn(40_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = gate.sample(torch.ones(len(eps), dtype=torch.int64), eps).detach()
    factor = torch.diag(gate.log_diagonal_KD[1].exp()) if covariance == "diag" else gate.factors()[1]
    covariance_DD = torch.linalg.inv(factor @ factor.T).detach()
    scale = covariance_DD.diagonal().sqrt()
    torch.testing.assert_close(found.mean(0), gate.mean_KD[1].detach(), rtol=0, atol=0.03 * float(scale.max()))
    error = (found.T.cov() - covariance_DD) / torch.outer(scale, scale)
    assert error.abs().max() < 0.04


@pytest.mark.parametrize("make", [vade, dmvae, lambda: GMM(SPEC, 4)], ids=["VaDE", "DMVAE", "GMM"])
def test_what_is_drawn_has_the_mean_of_the_samples(make: Callable[[], Gate]) -> None:
    """At the same z: drawn rows vary about what ``sample`` returns, by the noise of p(x|z), which a GMM has not."""
    gate = scattered(make).eval()
    generator = torch.Generator().manual_seed(2)
    eps = torch.randn(1, gate.num_drawn, dtype=torch.float64, generator=generator).expand(20_000, -1)
    cluster = torch.full((len(eps),), 2)
    uniform = torch.rand(len(eps), 3, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        mean, drawn = gate.sample(cluster, eps), gate.draw(cluster, eps, uniform)
    assert drawn.shape == mean.shape
    off = (drawn - mean).flatten(1)
    assert (off.mean(0).abs() <= 5 * off.std(0) / math.sqrt(len(off))).all()
    assert bool(off.any()) == (gate.latent is not None)
    torch.testing.assert_close(gate.log_pi().exp().sum().item(), 1.0)


# Bounds


@pytest.mark.parametrize("make", [vade, lambda: dmvae(relaxed=False)], ids=["VaDE", "DMVAE"])
def test_the_bound_is_below_the_likelihood(make: Callable[[], Gate]) -> None:
    gate, given = scattered(make).eval(), rows(30)
    draws = torch.randn(30, 4000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    weights = Weights(30, draws.device)
    with torch.no_grad():
        weights.add(gate.log_weights(given, draws))
        losses = torch.stack([gate(given, noise_of(gate, 30, s)).loss_B for s in range(300)])
    found, bound = weights.evidence(), -losses.mean(0)
    slack = 4 * (found.error + losses.std(0) / math.sqrt(300))
    assert (bound <= found.log_px + slack).all()
    assert bound.mean() < found.log_px.mean()


def noise_of(gate: Gate, num: int, seed: int) -> Tensor:
    assert gate.noise_shape is not None
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, *gate.noise_shape, dtype=torch.float64, generator=generator)


def test_the_likelihood_of_a_latent_gate_by_quadrature() -> None:
    torch.manual_seed(0)
    gate = VaDE(SPEC, 3, latent=1, network=NET, likelihood="gaussian", mean="identity").double()
    given, grid = rows(6), torch.linspace(-12, 12, 6001, dtype=torch.float64)[:, None]
    draws = torch.randn(6, 20_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = Weights(6, grid.device)
    with torch.no_grad():
        log_prior = log_joint(grid, gate.clusters()).logsumexp(-1)
        log_px = torch.stack([gate.log_px({"x": x.expand(len(grid), 3)}, grid) for x in given["x"]])
        exact = (log_px + log_prior).logsumexp(1) + math.log(24 / 6000)
        weights.add(gate.log_weights(given, draws))
    found = weights.evidence()
    assert ((found.log_px - exact).abs() <= 4 * found.error + 1e-6).all()


def test_the_true_bound_of_dmvae_is_above_the_relaxed_loss() -> None:
    """At temperature 0.2, on average over rows and draws: a mean of clusters is nearer to z than they are."""
    relaxed, exact = (scattered(lambda one=one: dmvae(relaxed=one, temperature=0.2)) for one in (True, False))
    exact.load_state_dict(relaxed.state_dict())
    given = rows(50)
    with torch.no_grad():
        draws = [noise_of(relaxed, 50, s) for s in range(200)]
        loose = torch.stack([relaxed(given, eps).loss_B for eps in draws]).mean()
        tight = torch.stack([exact(given, eps[:, :2]).loss_B for eps in draws]).mean()
    assert tight > loose


@pytest.mark.parametrize("kind", [VaDE, DMVAE])
def test_a_gate_with_one_cluster_is_a_vae(kind: type[VaDE | DMVAE]) -> None:
    torch.manual_seed(0)
    gate = kind(IMAGES, 1, latent=2, network=NET, likelihood="gaussian", mean="identity").double()
    expert = VAE(IMAGES, latent=2, network=NET, likelihood="gaussian", mean="identity").double()
    for name in ("encoder", "decoder", "likelihood"):
        getattr(expert, name).load_state_dict(getattr(gate, name).state_dict())
    with torch.no_grad():
        gate.mean_KL.zero_()
    given, eps = rows(9, (1, 6, 6)), noise(gate, 9)
    mine, theirs = gate(given, eps), expert(given, eps.reshape(9, -1)[:, :2])
    torch.testing.assert_close(mine.loss_B, theirs.loss_R, rtol=1e-12, atol=1e-12)
    assert (mine.log_resp_BE == 0).all()
    torch.testing.assert_close(gate.reconstruct(given), expert.reconstruct(given))
    draws = torch.randn(9, 5, 2, dtype=torch.float64)
    torch.testing.assert_close(gate.log_weights(given, draws), expert.log_weights(given, draws), rtol=1e-10, atol=1e-10)


# Stages


@pytest.mark.parametrize("make", [vade, dmvae], ids=["VaDE", "DMVAE"])
@pytest.mark.parametrize("stage", ["autoencoder", "classify", "joint"])
def test_a_stage_learns_what_it_says(make: Callable[[], Gate], stage: str) -> None:
    gate, given = scattered(make), rows()
    gate.enter(stage)
    gating = gate(given, noise(gate, 40))
    total = gating.log_resp_BE[:, 0].sum() + (0 if gating.loss_B is None else gating.loss_B.sum())
    total.backward()
    learnt = {name.split(".")[0] for name, p in gate.named_parameters() if p.grad is not None and p.grad.any()}
    free = {name.split(".")[0] for name, p in gate.named_parameters() if p.requires_grad}
    assert learnt == free
    autoencoder, prior = {"encoder", "decoder", "likelihood"}, {"mean_KL", "log_var_KL"}
    told = {"classifier"} if isinstance(gate, DMVAE) else {"encoder", "logits_K", *prior}
    everything = {name.split(".")[0] for name, _ in gate.named_parameters()}
    assert free == {"autoencoder": autoencoder, "classify": told, "joint": everything}[stage]
    resp = gating.log_resp_BE.exp()
    assert (resp - 0.25).abs().max() < 1e-12 if stage == "autoencoder" else (resp - 0.25).abs().max() > 0.01


@pytest.mark.parametrize("make", [vade, lambda: vade(test_samples=3), dmvae], ids=["VaDE", "VaDE over z", "DMVAE"])
@pytest.mark.parametrize("training", [True, False])
def test_responsibilities_alone_are_those_of_forward(make: Callable[[], Gate], training: bool) -> None:
    for stage in ("autoencoder", "classify", "joint"):
        gate = scattered(make).train(training)
        gate.enter(stage)
        given, eps = rows(), noise(gate, 40)
        torch.testing.assert_close(gate.log_responsibilities(given, eps), gate(given, eps).log_resp_BE)


def test_vade_averages_over_z_where_it_is_told_to() -> None:
    gate, given = scattered(lambda: vade(test_samples=3)).eval(), rows()
    eps = noise(gate, 40)
    mean, log_var = gate.encode(given)
    each = [gate._log_g(mean + (0.5 * log_var).exp() * eps[:, s]).exp() for s in range(3)]
    torch.testing.assert_close(gate(given, eps).log_resp_BE.exp(), torch.stack(each).mean(0))
    mean_alone = scattered(vade).eval()
    torch.testing.assert_close(mean_alone(given, eps[:, :1]).log_resp_BE, mean_alone._log_g(mean_alone.embed(given)))


def test_a_wrapped_gate_keeps_its_stages() -> None:
    torch.manual_seed(0)
    inner = lambda spec, k: VaDE(spec, k, latent=2, network=NET, likelihood="gaussian", mean="identity")  # noqa: E731
    gate = Consistent(IMAGES, 4, inner, shift=1.0).double()
    assert isinstance(gate.model, VaDE)
    gate.model.enter("classify")
    given = rows(9, (1, 6, 6))
    gating = gate(given, noise(gate, 9))
    assert gating.loss_B is not None
    assert (gating.loss_B >= 0).all()  # the divergence alone: this stage has no loss of VaDE's
    torch.testing.assert_close(gating.log_resp_BE, gate.log_responsibilities(given, noise(gate, 9)))


# Starts


def test_a_start_finds_separate_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]], dtype=torch.float64)
    points = (centres[:, None] + torch.randn(3, 100, 2, dtype=torch.float64, generator=generator)).flatten(0, 1)
    one, again = (fit_diagonal(points, 3, seed=4) for _ in range(2))
    for mine, theirs in zip(one, again, strict=True):
        assert torch.equal(mine, theirs)
    order = torch.cdist(centres, one.mean_KL).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    resp = torch.zeros(300, 3, dtype=torch.float64)
    resp[torch.arange(300), torch.arange(300) // 100] = 1
    for mine, theirs in zip(weighted_clusters(points, resp), one, strict=True):
        torch.testing.assert_close(mine, theirs[order], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("make", "begins"), [(vade, "mixture"), (dmvae, "mixture"), (dmvae, "classes")])
def test_after_a_start_posteriors_are_narrower_than_clusters(make: Callable[..., Any], begins: str) -> None:
    gate, given = scattered(lambda: make(start=begins)), rows(80)
    assert [gate.starts_at(stage) for stage in gate.stages] == [False, False, True]
    with torch.no_grad():
        gate.start(gate.seen(given), seed=1)
        log_var = gate.encode(given)[1]
    assert (log_var < gate.log_var_KL.mean(0)).all()
    assert log_var.std(0).max() < 1e-12  # the same for all rows


def test_an_empty_cluster_starts_as_all_rows_lie() -> None:
    points = torch.randn(60, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    resp = torch.zeros(60, 4)
    resp[:30, 1] = resp[30:, 0] = 1.0
    found = weighted_clusters(points + 5.0, resp)
    torch.testing.assert_close(found.mean_KL[2], (points + 5.0).mean(0))
    torch.testing.assert_close(found.log_var_KL[2].exp(), points.var(0, correction=0))
    assert found.log_pi_K[2] < -9
    gate = dmvae(start="classes")
    gate.take(weighted_clusters(points, resp))
    torch.testing.assert_close(gate.log_var_offset_L.double() + 2.0, found.log_var_KL[:2].mean(0), rtol=0, atol=0.1)


def test_a_start_far_from_0_is_that_near_it() -> None:
    points = torch.randn(90, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    near, far = fit_diagonal(points * 1e-3, 2, seed=0), fit_diagonal(points * 1e-3 + 1e4, 2, seed=0)
    torch.testing.assert_close(far.mean_KL - 1e4, near.mean_KL, rtol=0, atol=1e-6)
    torch.testing.assert_close(far.log_var_KL, near.log_var_KL, rtol=0, atol=1e-4)


@pytest.mark.parametrize("points", [np.ones((10, 3)), np.full((10, 3), np.nan), np.zeros((3, 5)), np.ones((5, 1))])
def test_latents_that_cannot_be_parted_are_shown_as_they_are(points: np.ndarray) -> None:
    assert in_the_plane(points, 0).shape == (len(points), 2)


# Mistakes


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: VaDE(SPEC, 3, latent=0), ["VaDE", "latent (0)"]),
        (lambda: VaDE(SPEC, 3, spread=-1.0), ["VaDE", "spread (-1.0)"]),
        (lambda: VaDE(SPEC, 3, test_samples=-1), ["VaDE", "test_samples (-1)"]),
        (lambda: DMVAE(SPEC, 3, temperature=0.0), ["DMVAE", "temperature (0.0)"]),
        (lambda: DMVAE({"y": Field((), torch.uint8, num_classes=2)}, 3), ["DMVAE", "'x'"]),
        (lambda: GMM(SPEC, 3, min_variance=0.0), ["GMM", "min_variance (0.0)"]),
        (lambda: GMM(SPEC, 3, covariance="full").check_rows(3), ["GMM", "full", "3"]),
        (lambda: fit_diagonal(torch.ones(9, 2), 3, 0), ["3 clusters", "9 rows"]),
        (lambda: fit_diagonal(torch.full((9, 2), math.nan), 3, 0), ["finite"]),
        (lambda: vade(start="mixture").check_start(3), ["VaDE", "3", "4 clusters"]),
        (lambda: vade(start="mixture", start_rows=2).check_start(300), ["VaDE", "2", "start_rows"]),
    ],
)
def test_what_is_refused_is_named_in_one_line(make: Callable[[], Any], named: list[str]) -> None:
    with pytest.raises(ValueError, match=r"must|cannot|needs|start|finite") as refused:
        make()
    text = str(refused.value)
    assert "\n" not in text
    assert all(part in text for part in named), text


# What users see


def test_what_a_gate_that_is_a_model_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of a gate alone: figures, pictures, and clusters in Python that are those of the pictures' draws."""
    import mixdist

    monkeypatch.chdir(tmp_path)
    gate = {"class_path": "mixdist.gates.DMVAE", "init_args": {"latent": 3, "network": mlp(8), "relaxed": False}}
    silent, alone = {"class_path": "mixdist.experts.Silent"}, {"class_path": "mixdist.mixtures.GateLoss"}
    config = write_config(tmp_path / "config.yaml", changed(gate=gate, expert=silent, train__objective=alone))
    ended = here("train", "--config", config, "--out", "run", "--pictures", "true")
    assert ended.code == 0, ended.err
    assert {path.name for path in Path("run/images").iterdir()} >= {"gate.png", "latent.png", "labels.png"}
    assert "gate.png" in ended.out
    assert here("evaluate", "run", "--num_samples", "50").code == 0
    figures = json.loads(Path("run/evaluation.json").read_text())["figures"]
    assert figures["gate_log_likelihood"] >= -figures["gate_loss"] - 0.5
    assert "loss" not in figures  # no expert has one
    assert all(record["wire_bytes"] == 0 for record in read_metrics(Path("run")))
    model, x = mixdist.load("run"), Digits().load().test.rows["x"][:7]
    assert model.embed(x).shape == (7, 3)
    assert model.reconstruct(x).shape == (7, 1, 8, 8)
    assert torch.equal(model.generate(4, cluster=2), model.generate(9, cluster=2)[:4])
    assert not torch.equal(model.generate(4, cluster=2), model.generate(4, cluster=3))
    assert model.generate(4, cluster=2).shape == (4, 1, 8, 8)
    assert set(model.generate(4, cluster=2, observed=True).unique().tolist()) == {0.0, 1.0}  # of a Bernoulli likelihood
    for call in (lambda: model.generate(4, cluster=9), lambda: model.generate(-1, cluster=0)):
        with pytest.raises(ValueError, match=r"cluster|num_samples"):
            call()
    assert here("sample", "run").code == 0


def test_a_gate_that_is_no_model_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mixdist

    monkeypatch.chdir(tmp_path)
    assert here("train", "--config", write_config(tmp_path / "config.yaml", changed()), "--out", "run").code == 0
    with pytest.raises(ValueError, match="Softmax"):
        mixdist.load("run").embed(torch.zeros(1, 1, 8, 8))


def test_samples_in_the_plane_have_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mixdist

    monkeypatch.chdir(tmp_path)
    options = {"latent": 2, "network": mlp(8), "likelihood": "gaussian", "mean": "identity"}
    gate = {"class_path": "mixdist.gates.VaDE", "init_args": options}
    changes = {"gate": gate, "expert": {"class_path": "mixdist.experts.Silent"}, "num_experts": 5}
    changes |= {"data": {"class_path": "mixdist.data.Spiral", "init_args": {"rows": 100, "test_rows": 50}}}
    config = changed(**changes, train__objective={"class_path": "mixdist.mixtures.GateLoss"})
    assert here("train", "--config", write_config(tmp_path / "config.yaml", config), "--out", "run").code == 0
    assert "gate_log_likelihood is of x" in here("evaluate", "run", "--num_samples", "2").out
    model = mixdist.load("run")
    assert torch.equal(model.rows_of_samples(9)["cluster 3"], model.generate(9, 3, observed=True))
    with pytest.raises(ValueError, match="generate"):
        model.sample(2, 0)
