"""A mixture with one decoder: its terms against quadrature and known values, and what one component is."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import Tensor

from mixdist.config.options import parse
from mixdist.config.parsing import config_parser, make_config
from mixdist.data import RankBatch
from mixdist.experts import Component
from mixdist.mixtures import DHSIC, MMD, MVAE, W2, Masks, MutualPosterior, Penalty, WeightedLoss
from mixdist.mixtures.dirichlet import NUM_UNIFORM, dirichlet_kl, log_weights
from mixdist.nets import MLP, Conv, Network
from mixdist.noise import TRIAL_PHASE, Moment
from mixdist.report.metrics import read_metrics
from mixdist.terms import Field
from tests.launch import ROOT, changed, here, mlp, refused, together, write_config
from tests.test_figures import ready


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


# Dirichlet weights


def draws(a_E: Tensor, num: int, seed: int = 0) -> Tensor:
    uniform = torch.rand(num, len(a_E), NUM_UNIFORM, dtype=torch.float64, generator=generator(seed))
    return log_weights(a_E.expand(num, -1), uniform)


@pytest.mark.parametrize("a", [[0.05, 0.3, 1.0], [1.0, 1.0, 1.0], [5.0, 0.5, 20.0]])
def test_weights_are_dirichlet(a: list[float]) -> None:
    """Each weight is beta(a_i, sum of the others), and they sum to 1."""
    log_w = draws(torch.tensor(a, dtype=torch.float64), 20_000)
    torch.testing.assert_close(log_w.exp().sum(1), torch.ones(20_000).double())
    for i, own in enumerate(a):
        assert scipy.stats.kstest(log_w[:, i].exp().numpy(), "beta", (own, sum(a) - own)).pvalue > 1e-3


@pytest.mark.parametrize("a", [[0.3, 0.6], [1.5, 4.0]])
def test_the_gradient_of_a_mean_is_that_of_the_integral(a: list[float]) -> None:
    """d E[f(w_1)] / da by draws, against the derivative of the integral over the beta density."""

    def mean(first: float) -> float:
        density = scipy.stats.beta(first, a[1])
        return float(scipy.integrate.quad(lambda w: w**2 * density.pdf(w), 0, 1, points=[1e-4, 0.999])[0])

    exact = (mean(a[0] + 1e-4) - mean(a[0] - 1e-4)) / 2e-4
    leaf = torch.tensor(a, dtype=torch.float64).requires_grad_()
    log_w = draws(leaf, 200_000)
    (slope,) = torch.autograd.grad((2 * log_w[:, 0]).exp().mean(), leaf)
    assert slope[0].item() == pytest.approx(exact, abs=0.01 * abs(exact) + 0.002)


def test_the_gradient_holds_at_small_parameters() -> None:
    """Of sum_k k w_k with all four a = 0.001 it is -375, -125, 125, 375 (torch's own Dirichlet has thousands)."""
    leaf = torch.full((4,), 0.001, dtype=torch.float64).requires_grad_()
    value = (draws(leaf, 400_000, seed=3).exp() * torch.arange(1.0, 5.0).double()).sum(1).mean()
    (slope,) = torch.autograd.grad(value, leaf)
    np.testing.assert_allclose(slope, [-375, -125, 125, 375], atol=120)


def test_the_divergence_is_torchs() -> None:
    a = normal(5, 4).exp()
    for prior in (0.25, 1.0):
        one, other = (torch.distributions.Dirichlet(x) for x in (a, torch.full_like(a, prior)))
        torch.testing.assert_close(dirichlet_kl(a, prior), torch.distributions.kl_divergence(one, other))


# Masks


@pytest.mark.parametrize("t", [0.001, 0.1, 0.5, 1.0, 5.0, 20.0])
def test_the_cost_of_gaussian_masks_against_quadrature(t: float) -> None:
    """KL(N(1, t) || log-uniform) up to a constant, -0.5 log t + E log |1 + sqrt(t) eps|: from t to t = 1."""

    def exact(t: float) -> float:
        def inner(eps: float) -> float:
            return math.log(abs(1 + math.sqrt(t) * eps) + 1e-300) * scipy.stats.norm.pdf(eps)

        return -0.5 * math.log(t) + scipy.integrate.quad(inner, -12, 12, points=[-1 / math.sqrt(t)], limit=500)[0]

    def ours(t: float, kl: Any) -> float:
        return Masks(2, "gaussian", rate=t / (1 + t), kl=kl).double().cost().item()

    wanted = exact(t) - exact(1.0)
    assert ours(t, "sigmoid") - ours(1.0, "sigmoid") == pytest.approx(wanted, abs=0.02)
    if t <= 1:
        assert ours(t, "polynomial") - ours(1.0, "polynomial") == pytest.approx(wanted, abs=0.08)


@pytest.mark.parametrize("kind", ["gaussian", "gumbel"])
@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_what_masks_keep_is_how_often_they_keep(kind: Any, rate: float) -> None:
    masks = Masks(3, kind, rates="each", rate=rate).double()
    m = masks.log_masks(torch.rand(40_000, 3, dtype=torch.float64, generator=generator(1))).exp()
    least = {"gaussian": 0.8, "gumbel": 0.1}[kind]
    torch.testing.assert_close((m >= least).double().mean(0), masks.kept(), rtol=0, atol=0.01)
    if kind == "gaussian":
        torch.testing.assert_close(m.mean(0), masks.mean().double(), rtol=0, atol=0.04)  # none is below 1e-6


# Penalties


@pytest.mark.parametrize(("size", "num", "alike", "wanted"), [(2, 128, False, 0.0063), (2, 128, True, 0.109)])
def test_dhsic_of_standard_normal_latents(size: int, num: int, alike: bool, wanted: float) -> None:
    """Six components, median bandwidth: independent ones, and one that is repeated."""
    found = []
    for seed in range(5):
        z = normal(num, 6, size, seed=seed)
        z = z[:, :1].expand(-1, 6, -1) if alike else z
        found.append(DHSIC()(z, z, z).item())
    assert np.mean(found) == pytest.approx(wanted, rel=0.2)


def test_dhsic_is_its_formula() -> None:
    z = normal(7, 3, 2)
    kernels = []
    for z_NL in z.unbind(1):
        squared = torch.cdist(z_NL, z_NL).square()
        median = squared[torch.ones(7, 7, dtype=torch.bool).triu(1)].median()
        kernels.append(torch.exp(-squared / (2 * median)))
    joint, each = torch.stack(kernels).prod(0), [k.mean() for k in kernels]
    rows = torch.stack([k.mean(1) for k in kernels]).prod(0)
    exact = joint.mean() + math.prod(each) - 2 * rows.mean()
    torch.testing.assert_close(DHSIC()(z, z, z), exact)
    torch.testing.assert_close(DHSIC(root=True)(z, z, z), exact.sqrt())


@pytest.mark.parametrize("penalty", [MMD(), W2()], ids=["MMD", "W2"])
def test_distances_to_the_prior_see_what_is_far(penalty: Penalty) -> None:
    near, far = normal(400, 2, 3), 1.0 + 0.3 * normal(400, 2, 3, seed=1)
    assert abs(penalty(near, near, near)) < 0.1 * penalty(far, far, far)
    wanted = 3.0 + 3 * (1 - 0.3) ** 2
    if isinstance(penalty, W2):
        assert penalty(far, far, far).item() == pytest.approx(wanted, rel=0.1)


def test_mutual_posterior_divergence_against_torch() -> None:
    mean, log_var = normal(6, 2, 3), 0.3 * normal(6, 2, 3, seed=1)
    each = []
    for e in range(2):
        q = [torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in zip(mean[:, e], log_var[:, e], strict=True)]
        pairs = [torch.distributions.kl_divergence(a, b).sum() for a in q for b in q if a is not b]
        each.append(torch.stack(pairs))
    diverse = -2.0 * torch.stack([torch.nn.functional.logsigmoid(d / 2.0).mean() for d in each]).mean()
    exact = diverse + 0.5 * torch.stack([d.std(correction=0) for d in each]).mean()
    torch.testing.assert_close(MutualPosterior(eta=2.0, gamma=0.5)(mean, mean, log_var), exact)


# The family


def config_of(folder: Path, **options: Any) -> str:
    component = {
        "class_path": "mixdist.experts.Component",
        "init_args": {"latent": 3, "features": 8, "network": mlp(8)},
    }
    init_args = {"num_experts": 3, "component": component, "decoder": mlp(8), **options}
    train = {"epochs": 1, "batch_size": 500}
    mixture = {"class_path": "mixdist.mixtures.MVAE", "init_args": init_args}
    base = changed(dtype="float64", checkpoint={"every": 1}) | {"mixture": mixture, "train": train}
    return write_config(folder / "config.yaml", base)


def masks(**options: Any) -> dict[str, Any]:
    return {"class_path": "mixdist.mixtures.Masks", "init_args": options}


def losses(run: str) -> list[float]:
    return [record["loss"] for record in read_metrics(Path(run))]


@pytest.mark.parametrize("kind", ["gaussian", "gumbel"])
def test_masks_of_one_component_change_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equation 16 divides by their sum: the run is that without masks, to rounding."""
    monkeypatch.chdir(tmp_path)
    assert here("train", "--config", config_of(tmp_path, num_experts=1), "--out", "plain").code == 0
    fixed = config_of(tmp_path, num_experts=1, masks=masks(kind=kind, learned=False))
    assert here("train", "--config", fixed, "--out", "masked").code == 0
    np.testing.assert_allclose(losses("masked"), losses("plain"), rtol=1e-12)


def test_one_component_is_a_vae(tmp_path: Path) -> None:
    """Its loss is -log p(x|z) + KL: a decoder behind one more layer."""
    spec = {"x": Field((1, 4, 4), torch.float64)}
    component = Component(spec, 2, 5, MLP([4])).double()
    x, eps = torch.rand(6, 1, 4, 4, dtype=torch.float64, generator=generator(0)), normal(6, 2)
    terms = component({"x": x}, eps)
    mean, log_var, a = component.encode({"x": x})
    q, prior = torch.distributions.Normal(mean, (0.5 * log_var).exp()), torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(terms.loss_R, torch.distributions.kl_divergence(q, prior).sum(1))
    torch.testing.assert_close(terms.features["z_RL"], mean + (0.5 * log_var).exp() * eps)
    assert (a > 0.01).all()


@pytest.mark.parametrize("execution", ["loop", "stacked"])
def test_without_components_that_are_off_it_is_the_mixture_of_the_others(execution: Any) -> None:
    """Loss, penalty and gradients; and no row runs through what is off."""
    spec = {"id": Field((), torch.int64), "x": Field((6,), torch.float64)}
    batch = RankBatch(
        {"id": torch.arange(20), "x": torch.rand(20, 6, dtype=torch.float64, generator=generator(3))}, [20]
    )

    def made(num_experts: int, off_above: float | None) -> MVAE:
        make = functools.partial(Masks, rates="each", off_above=off_above)
        component = functools.partial(Component, latent=2, features=6, network=MLP([7], "tanh"))
        return ready(
            MVAE(component, num_experts, MLP([8], "tanh"), masks=make, penalty=DHSIC(5.0), execution=execution), spec
        )  # type: ignore[return-value]

    few, many = made(2, None), made(5, 0.5)
    many.masks.above_E[2:] = 500
    ran: list[int] = []
    for component in many.bank.owned().values():
        component.encoder.register_forward_hook(lambda module, given, _: ran.append(given[0].shape[:-1].numel()))
    found, wanted = (one.backward(batch, WeightedLoss(), Moment(7)) for one in (many, few))
    for name in ("rows", "penalty"):
        torch.testing.assert_close(found.parts[name], wanted.parts[name], rtol=1e-12, atol=0)
    assert sum(ran) == 40
    theirs = {f"{o.name} {name}": p.grad for o in few.parts.owned() for name, p in o.module.named_parameters()}
    for owned in many.parts.owned():
        for name, parameter in owned.module.named_parameters():
            if owned.expert is not None and owned.expert > 1:
                assert parameter.grad is None or not parameter.grad.any()
            elif owned.name != "masks":
                torch.testing.assert_close(parameter.grad, theirs[f"{owned.name} {name}"], rtol=1e-10, atol=1e-14)


def test_a_component_is_off_after_so_many_steps_in_a_row_and_one_stays() -> None:
    masks = Masks(3, rates="each", rate=0.3, off_above=0.5, off_after=2)

    def step(number: int, *rates: float) -> list[bool]:
        masks.logit_P.data = torch.tensor(rates).logit()
        masks.count(Moment(0, 0, number))
        masks.count(Moment(0, TRIAL_PHASE, number))  # a step that is only tried does not count
        return masks.on()

    assert step(0, 0.6, 0.6, 0.4) == [True, True, True]
    assert step(1, 0.4, 0.6, 0.6) == [True, False, True]
    assert step(2, 0.6, 0.1, 0.4) == [True, False, True]  # for good
    assert step(3, 0.8, 0.1, 0.7) == [False, False, True]
    assert step(4, 0.8, 0.1, 0.9) == [False, False, True]
    assert masks.kept()[:2].tolist() == [0.0, 0.0] == masks.mean()[:2].tolist()


def test_what_is_on_is_known_anew_after_every_change() -> None:
    """It is kept between reads of the device, also when counts are loaded, moved or copied."""
    one, other = (Masks(3, rates="each", off_above=0.5, off_after=2) for _ in range(2))
    assert one.on() == other.on() == [True] * 3
    other.above_E[1] = 2
    assert other.on() == [True, False, True]
    one.load_state_dict(other.state_dict())
    assert one.on() == copy.deepcopy(one).on() == [True, False, True]
    one.above_E = torch.zeros(3, dtype=torch.int64)
    assert one.on() == [True] * 3


def test_a_run_goes_on_with_components_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    import mixdist
    from mixdist.data import Digits

    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path, masks=masks(rates="each", off_above=0.05, off_after=2))
    ended = here("train", "--config", config, "--out", "whole", "--pictures", "true", "--train.ema", "0.5")
    assert ended.code == 0, ended.err
    assert [record["components_on"] for record in read_metrics(Path("whole"))] == [3, 1, 1]
    shutil.copytree("whole", "again")
    shutil.rmtree("again/checkpoints/step-000000003")
    ended = together("train", "--resume", "again", "--pictures", "false", ranks=2, folder=tmp_path)
    assert ended.code == 0, ended.err
    np.testing.assert_allclose(losses("again"), losses("whole"), rtol=1e-10)
    for words in (("evaluate", "whole", "--rows", "50"), ("evaluate", "whole", "--rows", "50", "--ema")):
        ended = here(*words)
        assert ended.code == 0, ended.err
    model = mixdist.load("whole", ema=True)
    weights = model.weights(Digits().load().test.rows["x"][:5])
    assert ((weights == 0).sum(1) == 2).all()
    assert model.sample(3).isfinite().all()


def test_a_run_resumes_on_two_ranks_and_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    import mixdist
    from mixdist.data import Digits

    monkeypatch.chdir(tmp_path)
    penalty = {"class_path": "mixdist.mixtures.DHSIC", "init_args": {"weight": 5.0}}
    config = config_of(tmp_path, masks=masks(rates="each"), penalty=penalty, num_experts=4)
    ended = here("train", "--config", config, "--out", "whole", "--pictures", "true")
    assert ended.code == 0, ended.err
    shutil.copytree("whole", "again")
    shutil.rmtree("again/checkpoints/step-000000003")
    ended = together("train", "--resume", "again", "--pictures", "false", ranks=2, folder=tmp_path)
    assert ended.code == 0, ended.err
    np.testing.assert_allclose(losses("again"), losses("whole"), rtol=1e-10)
    assert Path("whole/images/components.png").exists()
    model, x = mixdist.load("whole"), Digits().load().test.rows["x"][:5]
    assert model.latents(x).shape == (5, 4, 3)
    torch.testing.assert_close(model.weights(x).sum(1), torch.ones(5).double())
    assert model.reconstruct(x).shape == model.reconstruct(x, expert=2).shape == model.cross(x, 0, 1).shape == x.shape
    between = model.interpolate(x[:2], x[2:4], steps=3)
    torch.testing.assert_close(between[0], model.reconstruct(x[:2]))
    torch.testing.assert_close(between[2], model.reconstruct(x[2:4]))
    torch.testing.assert_close(model.cross(x, 1, 1), model.reconstruct(x, expert=1))
    exchanged = model.interpolate(x[:2], x[2:4], steps=3, shift=1)
    assert not torch.allclose(exchanged, between)
    torch.testing.assert_close(exchanged[0], model.interpolate(x[:2], x[:2], steps=1, shift=1)[0])
    for words, wrong in (("shift 4", {"shift": 4}), ("2 first and 1 second", {"second": x[:1]})):
        with pytest.raises(ValueError, match=words.replace("shift 4", r"shift \(4\)")):
            model.interpolate(**{"first": x[:2], "second": x[2:4]} | wrong)
    assert here("sample", "whole").code == 0
    with pytest.raises(ValueError, match=r"label \(1\) is read by no component"):
        model.sample(3, label=1)
    with pytest.raises(ValueError, match="component 9"):
        model.reconstruct(x, expert=9)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"num_experts": 1, "masks": masks()}, "mixture.masks gumbel"),
        ({"masks": masks(rate=1.5)}, "mixture.masks.rate 1.5"),
        ({"masks": masks(rates="each", off_above=1.5)}, "mixture.masks.off_above 1.5"),
        ({"masks": masks(rates="each", off_above=0.5, off_after=0)}, "mixture.masks.off_after 0"),
        ({"masks": masks(off_above=0.5)}, "mixture.masks.off_above shared"),
        ({"penalty": {"class_path": "mixdist.mixtures.DHSIC", "init_args": {"weight": -1.0}}}, "DHSIC weight -1.0"),
        ({"kl_weight": -2.0}, "mixture.kl_weight -2.0"),
        ({"component": {"class_path": "mixdist.experts.Component", "init_args": {"label": "z"}}}, "Component 'z'"),
        ({"decoder": {"class_path": "mixdist.nets.Conv", "init_args": {"channels": [4] * 9}}}, "channels"),
        ({"decoder": {"class_path": "mixdist.nets.Deconv"}}, "Deconv feature 16384 8"),
    ],
)
def test_what_does_not_fit_is_refused(
    options: dict[str, Any], names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused("train", "--config", config_of(tmp_path, **options), names=names)


@pytest.mark.parametrize(
    "make",
    [lambda: Component({"x": Field((1, 4, 4), torch.float64)}, latent=0), lambda: MVAE(prior=0.0)],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()


class Mixing(MLP):
    """A decoder whose rows depend on each other."""

    def decoder(self, num_inputs: int, shape: tuple[int, ...], num_maps: int = 1) -> torch.nn.Module:
        return torch.nn.Sequential(super().decoder(num_inputs, shape, num_maps), torch.nn.Softmax(dim=0))


def test_a_decoder_that_mixes_rows_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    decoder = {"class_path": "tests.test_mvae.Mixing", "init_args": {"hidden": [4]}}
    refused("train", "--config", config_of(tmp_path, decoder=decoder), names="mixture.decoder other rows Softmax net.1")


def test_a_component_alone_is_no_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss is a KL, which a soft mixture would bring to 0 and call it trained."""
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path / "config.yaml", changed(expert={"class_path": "mixdist.experts.Component"}))
    refused("train", "--config", config, names="Component sub_decoder")


@pytest.mark.parametrize("network", [MLP([4]), Conv([4])], ids=["numbers", "maps"])
def test_a_labelled_component_reads_the_label(network: Network) -> None:
    """Beside flat rows as a number of each class, beside images as a map of each class."""
    spec = {"x": Field((2, 4, 4), torch.float64), "y": Field((), torch.uint8, num_classes=3)}
    component = Component(spec, 2, 5, network, label="y").double()
    x, y = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.tensor([2, 0, 1])
    if isinstance(network, Conv):
        seen = torch.cat([x, torch.eye(3, dtype=x.dtype)[y][:, :, None, None].expand(3, 3, 4, 4)], dim=1).flatten(1)
    else:
        seen = torch.cat([x.flatten(1), torch.eye(3, dtype=x.dtype)[y]], dim=1)
    mean, _, _ = component.encode({"x": x, "y": y})
    torch.testing.assert_close(mean, component.encoder(seen)[:, :2], rtol=0.0, atol=0.0)
    z = torch.zeros(3, 2, dtype=x.dtype)
    features = component.decode(z, {"x": x, "y": y})
    assert not torch.allclose(features[0], features[1])


@pytest.mark.parametrize(
    "line", re.findall(r"^\| [\w -]+ \| (`--mixture.*)\|$", (ROOT / "docs/mvae.md").read_text(), re.M)
)
def test_a_baseline_of_the_page_is_a_config(line: str) -> None:
    """Each is the mixture without masks with one component and other words."""
    words = [word for part in re.findall(r"`(--[^`]+)`", line) for word in part.split()]
    given = [{"W": "0.5", "V": "2"}.get(word, word) for word in words if word != "--mixture.component.latent"]
    parser = config_parser("mixdist train", "")
    base = ["--config", str(ROOT / "configs/mvae_fixed_mnist.yaml"), "--mixture.num_experts", "1"]
    mixture = make_config(parser, parse(parser, [*base, *given])).mixture
    assert isinstance(mixture, MVAE)
    assert mixture.num_experts == 1
    named = given[given.index("--mixture.penalty") + 1] if "--mixture.penalty" in given else ""
    assert type(mixture.penalty).__name__ == {"null": "NoneType"}.get(named, named)
