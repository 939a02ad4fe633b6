"""Linear paths, scales, and VAEs that begin as PPCA: their densities are exact, and the same on every layout."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.distributions import Laplace, MultivariateNormal, Normal

from mixdist.baselines.ppca import fit_ppca
from mixdist.baselines.rows import Rows, values_of
from mixdist.competition import Competition, Elbo
from mixdist.data import Dataset
from mixdist.experts import VAE, ExpertBank
from mixdist.gates import DMVAE, Uniform, VaDE
from mixdist.mixtures import Context, Mixture, PCAStart, Soft
from mixdist.nets import MLP, Conv, LinearPaths, Network
from mixdist.nets.likelihood import LEAST_SCALE, Likelihood
from mixdist.noise import Draw, Purpose
from mixdist.parallel.wire import Wire
from mixdist.terms import Field
from tests.launch import HARD, changed, here, mlp, refused, together, write_config
from tests.parity import SEED, mesh_of
from tests.pool import Pool

SHAPE, SIZE = (2, 2, 3), 12
SCALES = ("learned", "channel", "pixel", "decoder")


def normal(*shape: int, seed: int = 1) -> Tensor:
    return Draw(seed, Purpose.PRIOR).normal(torch.arange(shape[0]), [0], shape[1:], torch.float64)[0]


def faces(num_rows: int, size: int = SIZE) -> Dataset:
    """Rows about three centres, correlated, each number with noise of its own, one number hardly any."""
    x = normal(num_rows, 4) @ normal(4, size, seed=2) + normal(num_rows, size, seed=3) * torch.linspace(0.2, 1.5, size)
    x += 6 * normal(3, size, seed=4)[torch.arange(num_rows) % 3]
    x[:, -1] = 1e-4 * x[:, -1] + 2
    shape = SHAPE if size == SIZE else (size,)
    ids = torch.arange(num_rows) * 7 + 5
    return Dataset({"id": ids, "x": x.reshape(-1, *shape)}, {"x": Field(shape, torch.float64)})


def expert(spec: Any, scale: Any = "learned", latent: int = 3, network: Network | None = None, **more: Any) -> VAE:
    network = network or MLP([5], "tanh")
    return VAE(spec, latent, LinearPaths(network), "gaussian", scale, "identity", **more)


def made(mixture: Mixture, dataset: Dataset, ranks: int = 1, ep_size: int = 1) -> Mixture:
    mesh = mesh_of(mixture.num_experts, ranks, ep_size)
    mixture.setup(Context(SEED, torch.float64, dataset.spec, mesh, Wire(mesh.device)))
    mixture.start_experts(dataset)
    return mixture


def begun(dataset: Dataset, num_experts: int = 1, start: PCAStart = PCAStart(), **options: Any) -> list[VAE]:  # noqa: B008
    """The experts of a mixture in one process, as they begin."""
    mixture = made(Soft(Uniform, partial(expert, **options), num_experts, expert_start=start), dataset)
    return list(mixture.parts.experts.values())  # type: ignore[arg-type]


def elbo(vae: VAE, rows: dict[str, Tensor]) -> Tensor:
    """The ELBO itself: log p(x|z) is at most quadratic in eps, and 2 L points integrate those exactly."""
    latent = vae.noise_shape[0]
    points = math.sqrt(latent) * torch.cat([torch.eye(latent), -torch.eye(latent)]).double()
    terms = [vae(rows, one.expand(len(rows["x"]), -1)) for one in points]
    return torch.stack([t.log_px_R - t.kl_R for t in terms]).mean(0).detach()


# Linear paths


@pytest.mark.parametrize("network", [MLP([5]), MLP([]), Conv([4], residual=True, norm="group")])
def test_the_output_begins_as_the_affine_map_and_the_network_learns(network: Network) -> None:
    paths = LinearPaths(network)
    for module, width in ((paths.encoder(SHAPE, 4), SIZE), (paths.decoder(3, SHAPE, 2), 3)):
        x = normal(6, width).float().requires_grad_()
        assert torch.equal(module(x), module.linear(x))
        module(x).square().sum().backward()
        last = list(module.net.parameters())[-1]
        assert last.grad.abs().max() > 0  # zero, but not for long
    assert paths.stackable == network.stackable


def test_a_rate_changes_how_fast_the_affine_map_learns_and_nothing_that_it_is() -> None:
    """Under Adam a step is as long for every number; the rate is a power of two, so that nothing is rounded."""
    x, begun_as, moved = normal(6, SIZE), [], []
    for rate in (1.0, 1 / 64, 0.0):
        torch.manual_seed(0)
        paths = LinearPaths(MLP([5]), rate).encoder(SHAPE, 4).double()
        begun_as.append(paths(x).detach())
        affine = paths.unit * paths.linear.weight.detach()
        optimizer = torch.optim.Adam([p for p in paths.parameters() if p.requires_grad], 1e-3)
        paths(x).square().sum().backward()
        optimizer.step()
        moved.append(float((paths.unit * paths.linear.weight.detach() - affine).abs().mean()))
    assert torch.equal(begun_as[0], begun_as[1])
    assert torch.equal(begun_as[0], begun_as[2])
    assert moved[:2] == pytest.approx([1e-3, 1e-3 / 64], rel=1e-3)
    assert moved[2] == 0
    with pytest.raises(ValueError, match=r"LinearPaths' rate \(2\)"):
        LinearPaths(MLP([5]), 2)


def test_a_stack_of_linear_paths_is_the_loop() -> None:
    spec, noise = faces(4).spec, lambda ids, experts, shape: normal(3, len(ids), *shape)[list(experts)]
    rows = {"id": torch.arange(5), "x": normal(5, *SHAPE)}
    for scale in SCALES:
        results = []
        for execution in ("loop", "stacked"):
            torch.manual_seed(0)
            bank = ExpertBank({e: expert(spec, scale, floor=0.1).double() for e in range(3)}, execution)  # type: ignore[arg-type]
            for p in bank.parameters():
                p.data += 0.1 * normal(p.numel(), 1).reshape(p.shape)
            results.append(bank(rows, noise).loss_R)
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


class Ends(Network):
    """Ends with what is given."""

    def __init__(self, last: Callable[[int], nn.Module]) -> None:
        self.last = last

    def encoder(self, shape: Any, num_outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(math.prod(shape), num_outputs), self.last(num_outputs))


class Scaled(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return 1 + x * self.gain


@pytest.mark.parametrize("last", [lambda n: nn.Sigmoid(), Scaled])
def test_a_network_that_is_not_zero_with_its_last_layer_is_refused(last: Any) -> None:
    with pytest.raises(ValueError, match="LinearPaths around Sequential"):
        LinearPaths(Ends(last)).encoder(SHAPE, 4)
    LinearPaths(Ends(lambda n: nn.Tanh())).encoder(SHAPE, 4)  # 0 at 0
    constant = Ends(last)
    constant.encoder = lambda shape, n: nn.Identity()  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="Identity"):
        LinearPaths(constant).encoder(SHAPE, 4)


# Scales


@pytest.mark.parametrize("floor", [None, 0.2])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["gaussian", "laplace", "logistic"])
def test_every_scale_against_torch_distributions(name: Any, scale: Any, floor: float | None) -> None:
    one = Likelihood(name, scale, "sigmoid", 11, floor, SHAPE).double()
    output, first = normal(7, SIZE * one.num_maps), 0.1 if name == "logistic" else 1.0
    for p in one.parameters():
        p.data += normal(p.numel(), 1).reshape(p.shape) - 0.5
    raw = output[:, SIZE:] + math.log(first) if scale == "decoder" else one.log_scale.detach()
    if scale == "channel":
        raw = raw[:, torch.arange(SIZE) // 6]
    least = (0.0 if scale == "learned" else LEAST_SCALE) if floor is None else floor
    scales = (raw.exp() + least).expand(7, SIZE)
    mean, u = one.mean(output), torch.sigmoid(normal(7, SIZE, seed=5))
    assert torch.equal(mean, output[:, :SIZE].sigmoid())
    x = one.draw(output, u).detach()
    if name == "logistic":
        x_V = torch.arange(11).double()[:, None, None] / 10
        mass = torch.stack([_log_mass(level, mean, scales) for level in x_V])
        torch.testing.assert_close(mass.exp().sum(0), torch.ones(7, SIZE).double())
        wanted = _log_mass(x, mean, scales)
        below = mass.exp().cumsum(0).gather(0, (x * 10).round().long()[None])[0]
        assert ((below - wanted.exp() - 1e-9 <= u) & (u <= below + 1e-9)).all()
    else:
        judge = {"gaussian": Normal, "laplace": Laplace}[name](mean, scales)
        wanted = judge.log_prob(x)
        torch.testing.assert_close(judge.cdf(x), u)
    torch.testing.assert_close(one.log_prob(x, output), wanted.sum(-1), rtol=1e-11, atol=1e-11)


def _log_mass(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    above = torch.where(x > 0.96, 1.0, torch.sigmoid((x + 0.05 - mean) / scale))
    below = torch.where(x < 0.04, 0.0, torch.sigmoid((x - 0.05 - mean) / scale))
    return (above - below).log()


@pytest.mark.parametrize("name", ["gaussian", "laplace"])
@pytest.mark.parametrize("scale", SCALES)
def test_the_density_of_two_numbers_integrates_to_one(name: Any, scale: Any) -> None:
    one = Likelihood(name, scale, "identity", None, 0.3, (2, 1, 1)).double()
    for p in one.parameters():
        p.data += 0.3 * normal(p.numel(), 1).reshape(p.shape)
    grid = torch.linspace(-25, 25, 1001).double()
    x = torch.cartesian_prod(grid, grid)
    output = torch.tensor([[0.3, -0.2, 0.1, -0.8][: 2 * one.num_maps]]).double()
    density = one.log_prob(x, output.expand(len(x), -1)).exp().sum() * (grid[1] - grid[0]) ** 2
    assert density.item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["gaussian", "laplace", "logistic"])
@pytest.mark.parametrize("floor", [None, 0.01])
def test_scales_begin_where_they_are_told(name: Any, scale: Any, floor: float | None) -> None:
    one = Likelihood(name, scale, "identity", None, floor, SHAPE, first=0.25).double()
    output = torch.zeros(3, SIZE * one.num_maps, dtype=torch.float64)
    scales = torch.as_tensor(one.log_scales(output)).exp().double()
    torch.testing.assert_close(scales, torch.full_like(scales, 0.25), rtol=1e-6, atol=0)


def test_a_scale_at_its_floor_has_a_gradient() -> None:
    one = Likelihood("gaussian", "pixel", "identity", None, 1e-2, SHAPE)
    one.log_scale.data.fill_(-12.0)  # type: ignore[union-attr]
    one.log_prob(torch.ones(1, SIZE), torch.zeros(1, SIZE)).sum().backward()
    assert (one.log_scale.grad > 0).all()  # type: ignore[union-attr]
    assert one.log_scales(torch.zeros(1, SIZE)).min().exp() >= 1e-2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("scale", "more", "words"),
    [
        ("learned", {"floor": 0.0}, "floor (0.0)"),
        ("pixel", {"floor": -1.0}, "floor (-1.0)"),
        (0.5, {"floor": 0.1}, "floor (0.1) scale (0.5)"),
        (0.5, {"first": 0.1}, "first_scale (0.1) scale (0.5)"),
        ("learned", {"first": 0.0}, "first_scale (0.0)"),
        ("pixel", {"first": 0.001}, "first_scale (0.001) above the floor, 0.001"),
        (-1.0, {}, "scale (-1.0)"),
        ("channel", {"shape": (12,)}, "channel (12,)"),
    ],
)
def test_what_no_scale_can_be_is_refused(scale: Any, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="scale") as refusal:
        Likelihood("gaussian", scale, "identity", **{"shape": SHAPE, **more})
    assert all(word in str(refusal.value) for word in words.split())


@pytest.mark.parametrize("kind", [VaDE, DMVAE])
def test_gates_take_scales_and_linear_paths(kind: Any) -> None:
    gate = kind(faces(4).spec, 3, 2, LinearPaths(MLP([4])), likelihood="gaussian", scale="decoder", mean="identity")
    rows = {"id": torch.arange(5), "x": normal(5, *SHAPE).float()}
    gating = gate(rows, torch.randn(5, *gate.noise_shape))
    gating.loss_B.sum().backward()
    assert gate.reconstruct(rows).shape == (5, *SHAPE)
    assert gate.decoder.linear.weight.grad[:, SIZE:].abs().max() > 0


# The start


@pytest.mark.parametrize(
    ("scale", "num_rows", "size"),
    [*((scale, 200, SIZE) for scale in SCALES), *((scale, 9, 40) for scale in SCALES if scale != "channel")],
)
def test_at_step_0_the_elbo_is_the_density_of_ppca(scale: str, num_rows: int, size: int) -> None:
    dataset = faces(num_rows, size)
    (vae,) = begun(dataset, scale=scale)
    rows = {"id": torch.arange(6), "x": dataset.rows["x"][:6] + 0.5 * normal(6, size, seed=9).reshape(6, *vae.shape)}
    x = rows["x"].flatten(1)
    ppca = fit_ppca(Rows(dataset, values_of(dataset.spec["x"], "x")), None, {"components": [3]}).best.model
    weight = torch.from_numpy(ppca.directions_DM * np.sqrt(ppca.variance_M - ppca.noise))
    covariance = weight @ weight.T + ppca.noise * torch.eye(size).double()
    density = MultivariateNormal(torch.from_numpy(ppca.mean_D), covariance).log_prob(x)
    torch.testing.assert_close(torch.from_numpy(ppca.log_density(x.numpy())), density, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(elbo(vae, rows), density, rtol=1e-9, atol=1e-9)
    # The posterior is exact: every z gives the density.
    weights = vae.log_weights(rows, 3 * normal(6, 4, 3, seed=6)).detach()
    torch.testing.assert_close(weights, density[:, None].expand(6, 4), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(vae.reconstruct(rows).flatten(1), torch.from_numpy(ppca.reconstruct(x.numpy())))


@pytest.mark.parametrize("scale", ["channel", "pixel", "decoder"])
def test_scales_of_their_own_raise_the_elbo_of_the_rows(scale: str) -> None:
    dataset = faces(200)
    rows = dict(dataset.rows)
    one, each = (elbo(begun(dataset, start=PCAStart(scales=s), scale=scale)[0], rows).mean() for s in ("one", "each"))
    assert each > one + 0.1
    alone = [elbo(begun(dataset, start=PCAStart(scales=s))[0], rows) for s in ("one", "each")]
    torch.testing.assert_close(*alone)  # the mean of what is left is s^2


def test_each_expert_begins_as_ppca_of_its_own_cluster() -> None:
    dataset = faces(90)
    vaes = begun(dataset, 3, PCAStart(clusters="own"), scale="decoder")
    x = dataset.rows["x"].flatten(1)
    cluster = torch.from_numpy(KMeans(3, n_init=10, random_state=0).fit_predict(x.numpy()))
    found = set()
    for vae in vaes:
        weights = vae.log_weights(dict(dataset.rows), normal(90, 1, 3)).detach()[:, 0]
        for k in range(3):
            part = x[cluster == k]
            variance, axes = torch.linalg.eigh(torch.cov(part.T, correction=0))
            noise = variance[:-3].mean()
            model = axes[:, -3:] * (variance[-3:] - noise) @ axes[:, -3:].T + noise * torch.eye(SIZE).double()
            wanted = MultivariateNormal(part.mean(0), model).log_prob(x)
            if torch.allclose(weights, wanted, rtol=1e-7):
                found.add(k)
    assert found == {0, 1, 2}


def test_a_start_from_some_rows_is_theirs_alone() -> None:
    dataset = faces(60)
    (few,), (all_of_them,) = (begun(dataset, start=PCAStart(rows=n)) for n in (30, 60))
    assert not torch.equal(few.encoder.linear.bias, all_of_them.encoder.linear.bias)


def started(case: tuple[str, str, str, int, int]) -> dict[str, Tensor]:
    """The first weights of this rank's experts."""
    family, clusters, execution, ranks, ep_size = case
    start, kind = PCAStart(rows=50, clusters=clusters), partial(expert, scale="decoder")  # type: ignore[arg-type]
    dataset = faces(61)
    if family == "soft":
        mixture: Mixture = Soft(Uniform, kind, 4, execution=execution, expert_start=start)  # type: ignore[arg-type]
    else:
        mixture = Competition(kind, 4, expert_start=start, score=Elbo())
    made(mixture, dataset, ranks, ep_size)
    return {
        f"{o.expert}.{n}": p.detach().clone()
        for o in mixture.owned()
        if o.expert is not None
        for n, p in o.module.named_parameters()
    }


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", ["soft", "competition"])
@pytest.mark.parametrize("clusters", ["one", "own"])
def test_the_first_weights_are_the_same_bits_on_every_layout(
    pool: Callable[[int], Pool], family: str, clusters: str, ranks: int
) -> None:
    whole, seen = started((family, clusters, "loop", 1, 1)), set()
    for ep_size, execution in {(ranks, "loop"), (2, "stacked" if family == "soft" else "loop")}:
        for own in pool(ranks).run("tests.test_linear:started", (family, clusters, execution, ranks, ep_size)):
            seen |= own.keys()
            assert all(torch.equal(tensor, whole[name]) for name, tensor in own.items())
    assert seen == whole.keys()


# Runs

LINEAR = {"class_path": "mixdist.nets.LinearPaths", "init_args": {"network": mlp(8)}}
PCA = {"class_path": "mixdist.mixtures.PCAStart", "init_args": {"rows": 700, "clusters": "own"}}
EXPERT = {"network": LINEAR, "latent": 2, "likelihood": "gaussian", "mean": "identity", "scale": "decoder"}


def config_of(folder: Path, **changes: Any) -> str:
    own = {"class_path": "mixdist.experts.VAE", "init_args": EXPERT}
    changes = {"expert": own, "expert_start": PCA, "dtype": "float64", "checkpoint": {"every": 1}, **changes}
    return write_config(folder / "config.yaml", changed(**changes))


def last(run: str) -> dict[str, Tensor]:
    folder = Path(run) / "checkpoints" / (Path(run) / "checkpoints" / "latest").read_text().strip()
    return {f"{p.stem}.{k}": v for p in folder.glob("*.safetensors") for k, v in load_file(p).items()}


def test_a_run_is_the_same_on_ranks_and_after_a_kill_at_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path)
    assert (ended := here("train", "--config", config, "--out", "whole")).code == 0, ended.err
    assert (ended := together("train", "--config", config, "--out", "two", ranks=2, folder=tmp_path)).code == 0, (
        ended.err
    )
    shutil.copytree("whole", "again")
    for path in Path("again/checkpoints").glob("step-*"):
        if path.name != "step-000000001":
            shutil.rmtree(path)
    assert (ended := here("train", "--resume", "again")).code == 0, ended.err
    whole = last("whole")
    assert all(torch.equal(value, whole[name]) for name, value in last("again").items())
    assert all(
        (value - whole[name]).abs().max() <= 1e-10 * whole[name].abs().max() for name, value in last("two").items()
    )


def test_a_competition_begins_from_clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an epoch, the first scores give each expert the rows of its own cluster."""
    monkeypatch.chdir(tmp_path)
    options = {"expert__init_args": {**EXPERT, "latent": 1}, "expert_start": PCA, "rounds": 1}
    config = write_config(
        tmp_path / "config.yaml", changed(HARD, **options, score={"class_path": "mixdist.competition.Elbo"})
    )
    assert (ended := here("train", "--config", config, "--out", "run")).code == 0, ended.err


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"expert__init_args": {**EXPERT, "network": mlp(8)}}, "mixture.expert_start expert 0 LinearPaths"),
        ({"expert__init_args": {**EXPERT, "likelihood": "laplace"}}, "mixture.expert_start laplace gaussian identity"),
        ({"expert__init_args": {**EXPERT, "likelihood": "bernoulli"}}, "mixture.expert_start bernoulli gaussian"),
        ({"expert__init_args": {**EXPERT, "mean": "sigmoid"}}, "mixture.expert_start sigmoid identity"),
        ({"expert__init_args": {**EXPERT, "scale": 0.5}}, "mixture.expert_start scale 0.5 learned"),
        ({"expert__init_args": {**EXPERT, "latent": 64}}, "mixture.expert_start latent 64 numbers"),
        ({"expert__init_args": {**EXPERT, "latent": 63}}, "mixture.expert_start latent 63 noise"),
        ({"expert__init_args": {**EXPERT, "floor": 0.9}}, "mixture.expert_start floor 0.9"),
        ({"expert__init_args": {**EXPERT, "floor": 0}}, "floor 0"),
        ({"expert": {"class_path": "mixdist.experts.Centroid"}}, "mixture.expert_start Centroid"),
        ({"expert_start": {**PCA, "init_args": {"rows": 1}}}, "mixture.expert_start.rows 1"),
        ({"expert_start": {**PCA, "init_args": {"rows": 2}}}, "mixture.expert_start latent 2 rows"),
        ({"expert_start": {**PCA, "init_args": {"rows": 5, "clusters": "own"}}}, "mixture.expert_start latent 2 rows"),
    ],
)
def test_what_cannot_begin_so_is_refused_before_anything_is_written(
    changes: dict[str, Any], names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = dict(changes)
    inner = {"class_path": "mixdist.experts.VAE", "init_args": changes.pop("expert__init_args", EXPERT)}
    changes = {"expert": inner, **changes}
    refused("train", "--config", config_of(tmp_path, **changes), names=names)
