"""Experts that start from one trained model are that model, and begin on clusters of its latents, on every layout."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

import mixdist
from mixdist.competition import Competition, Elbo
from mixdist.data import Blobs, Samples
from mixdist.data.sources.splits import load_splits
from mixdist.experts import VAE
from mixdist.gates import LatentGMM, Uniform
from mixdist.gates.gaussians import fit_clusters, log_joint
from mixdist.mixtures import Context, Mixture, Soft
from mixdist.mixtures.evidence import mixture_elbo, mixture_log_likelihood
from mixdist.nets import MLP
from mixdist.noise import Draw, Moment, Purpose
from mixdist.parallel.wire import Wire
from mixdist.training import Upcycled
from mixdist.training.phases import Phase
from tests.launch import HARD, SMALL, changed, here, mlp, refused, together, write_config
from tests.parity import SEED, mesh_of
from tests.test_docs import DOCS, blocks
from tests.test_linear import last

LATENT, HIDDEN, K = 3, 16, 4
BLOBS = {
    "class_path": "mixdist.data.Blobs",
    "init_args": {"num_classes": K, "rows": 1200, "test_rows": 30, "spread": 0.1},
}
EXPERT = {"network": mlp(HIDDEN), "latent": LATENT, "likelihood": "gaussian", "mean": "identity"}
VAE_OF = {"class_path": "mixdist.experts.VAE", "init_args": EXPERT}
GATE = {"class_path": "mixdist.gates.LatentGMM", "init_args": {"network": mlp(HIDDEN), "latent": LATENT}}
ONE = changed(
    data=BLOBS,
    dtype="float64",
    num_experts=1,
    gate={"class_path": "mixdist.gates.Uniform"},
    expert=VAE_OF,
    train={"epochs": 20, "batch_size": 100, "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.02}}},
)
"""The run of the one model."""


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a run of one expert."""
    folder = tmp_path_factory.mktemp("one")
    ended = here("train", "--config", write_config(folder / "one.yaml", ONE), "--out", str(folder / "run"))
    assert ended.code == 0, ended.err
    return str(folder / "run")


def rows() -> Samples:
    return load_splits(Blobs(**BLOBS["init_args"]), None).train  # type: ignore[arg-type]


def made(family: str, start: Upcycled, ranks: int = 1, ep_size: int = 1, execution: Any = "loop") -> Mixture:
    """A mixture as it is before its first step."""
    kind = partial(VAE, latent=LATENT, network=MLP([HIDDEN]), likelihood="gaussian", mean="identity")
    gate = partial(LatentGMM, latent=LATENT, network=MLP([HIDDEN]), start=start.clusters, start_rows=start.rows)
    mixture: Mixture = Competition(kind, K, expert_start=start, start="clusters", score=Elbo())
    if family == "soft":
        mixture = Soft(gate, kind, K, execution=execution, expert_start=start)
    mesh, dataset = mesh_of(K, ranks, ep_size), rows()
    mixture.setup(Context(SEED, torch.float64, dataset.spec, mesh, Wire(mesh.device)))
    mixture.start_experts(dataset)
    mixture.start(dataset, Phase(), Moment(SEED))
    return mixture


def experts(mixture: Mixture) -> list[VAE]:
    return list(mixture.parts.experts.values())  # type: ignore[arg-type]


def batch(dataset: Samples, num: int) -> dict[str, Tensor]:
    stored = dataset.take(torch.arange(num))
    return {"id": stored["id"], "x": dataset.spec["x"].values(stored["x"], torch.float64)}


def test_every_expert_is_the_trained_model_bit_for_bit(one: str) -> None:
    (model,) = mixdist.load(one).experts.values()
    some = batch(rows(), 20)
    eps = Draw(1, Purpose.PRIOR).normal(some["id"], [0], (5, LATENT), torch.float64)[0]
    for family in ("soft", "competition"):
        for expert in experts(made(family, Upcycled(one))):
            assert all(torch.equal(value, model.state_dict()[name]) for name, value in expert.state_dict().items())
            assert torch.equal(expert.log_weights(some, eps), model.log_weights(some, eps))


def test_at_step_0_the_mixture_s_density_is_the_model_s_and_its_bound_costs_the_sorting(one: str) -> None:
    (model,) = mixdist.load(one).experts.values()
    mixture, some = made("soft", Upcycled(one)), batch(rows(), 50)
    assert isinstance(mixture, Soft)
    share_E = mixture.shares(rows(), 400, Moment(SEED)).log()
    resp_BE = mixture.gate(some, None).log_resp_BE.detach()
    eps = Draw(1, Purpose.PRIOR).normal(some["id"], [0], (1, LATENT), torch.float64)[0]
    density_B, density_BE = (
        torch.stack([expert.log_weights(some, eps)[:, 0].detach() for expert in found], dim=-1)
        for found in ([model], experts(mixture))
    )
    torch.testing.assert_close(mixture_log_likelihood(density_BE, share_E), density_B[:, 0])
    terms = model(some, eps[:, 0])
    elbo_B = (terms.log_px_R - terms.kl_R).detach()
    sorting_B = (resp_BE.exp() * (resp_BE - share_E)).sum(-1)
    torch.testing.assert_close(mixture_elbo(elbo_B[:, None].expand(-1, K), resp_BE, share_E), elbo_B - sorting_B)


def test_the_perturbation_is_keyed_and_of_the_size_given(one: str) -> None:
    (model,) = mixdist.load(one).experts.values()
    drawn = [experts(made("soft", Upcycled(one, noise=0.25))) for _ in range(2)]
    numbers = []
    for first, again in zip(*drawn, strict=True):
        for (name, mine), same in zip(first.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(mine, same)
            numbers.append((mine / model.get_parameter(name) - 1).flatten() / 0.25)
    eps = torch.cat(numbers).detach()
    assert len(eps.unique()) > 0.99 * len(eps)  # no number serves twice
    assert abs(float(eps.mean())) < 5 / math.sqrt(len(eps))
    assert abs(float(eps.square().mean()) - 1) < 5 * math.sqrt(2 / len(eps))


@pytest.mark.parametrize("clusters", ["kmeans", "mixture"])
def test_the_first_table_is_that_of_clusters_of_latents(one: str, clusters: Any) -> None:
    """Of rows in well separated places, and all of them, though fewer are fitted."""
    mixture, dataset = made("competition", Upcycled(one, clusters=clusters, rows=300)), rows()
    assert isinstance(mixture, Competition)
    label_N = dataset.take(torch.arange(len(dataset)))[str(dataset.label)].numpy()
    assert mixture.first_N is not None
    assert adjusted_rand_score(label_N, mixture.first_N) > 0.95
    soft = made("soft", Upcycled(one, clusters=clusters, rows=300))
    assert isinstance(soft, Soft)
    resp_NE = soft.gate(batch(dataset, len(dataset)), None).log_resp_BE
    assert adjusted_rand_score(label_N, resp_NE.argmax(-1)) > 0.95


def test_the_most_probable_centre_is_the_nearest() -> None:
    points = Draw(1, Purpose.PRIOR).normal(torch.arange(200), [0], (3,), torch.float64)[0] + 50
    found = fit_clusters(points, 5, 0, "kmeans")
    nearest = torch.cdist(points, found.mean_KL)
    assert torch.equal(log_joint(points, found).argmax(-1), nearest.argmin(-1))
    likeliest = nearest.min(-1).values.square().mean() / 3  # of one variance, given the centres
    torch.testing.assert_close(found.log_var_KL.exp(), likeliest.expand(5, 3))


def started(case: tuple[str, str, str, str, int, int]) -> dict[str, Tensor]:
    """The first weights of this rank's modules, and the first table."""
    run, family, clusters, execution, ranks, ep_size = case
    start = Upcycled(run, noise=0.1, clusters=clusters, rows=700)  # type: ignore[arg-type]
    mixture = made(family, start, ranks, ep_size, execution)
    found = {f"{o.name} {n}": p.detach().clone() for o in mixture.parts.owned() for n, p in o.module.named_parameters()}
    if isinstance(mixture, Competition):
        found["table"] = torch.from_numpy(mixture.first_N)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", ["soft", "competition"])
def test_the_start_is_the_same_bits_on_every_layout(
    one: str, pool: Callable[[int], Any], family: str, ranks: int
) -> None:
    clusters = "mixture" if family == "soft" else "kmeans"
    whole, seen = started((one, family, clusters, "loop", 1, 1)), set()
    for ep_size, execution in {(ranks, "loop"), (2, "stacked" if family == "soft" else "loop")}:
        for own in pool(ranks).run("tests.test_upcycled:started", (one, family, clusters, execution, ranks, ep_size)):
            seen |= own.keys()
            assert all(torch.equal(tensor, whole[name]) for name, tensor in own.items())
    assert seen == whole.keys()


def test_experts_that_are_alike_score_alike_with_the_same_noise(one: str) -> None:
    mixture, some = made("competition", Upcycled(one)), batch(rows(), 50)
    for same_noise in (True, False):
        score, own = Elbo(same_noise=same_noise), enumerate(experts(mixture))
        columns = [score.column(e, expert, None, some, Moment(SEED), torch.float64) for e, expert in own]
        assert all(torch.equal(columns[0], column) == same_noise for column in columns[1:])


PART = ["decoder.layers.2"]


def test_what_does_not_train_stays_the_model_and_is_not_perturbed(one: str) -> None:
    (model,) = mixdist.load(one).experts.values()
    for expert in experts(made("soft", Upcycled(one, noise=0.25, trains=PART))):
        for name, parameter in expert.named_parameters():
            assert parameter.requires_grad == torch.is_nonzero((parameter != model.get_parameter(name)).any())
            assert parameter.requires_grad == name.startswith(PART[0])


# Runs


def config_of(folder: Path, run: str, family: str, **changes: Any) -> str:
    start = {"class_path": "mixdist.training.Upcycled", "init_args": {"run": run, "noise": 0.01}}
    options = {"data": BLOBS, "dtype": "float64", "expert": VAE_OF, "num_experts": K, "expert_start": start}
    options |= {"checkpoint": {"every": 1, "keep": 100}}
    if family == "soft":
        base, own = SMALL, {"gate": GATE}
    else:
        base, own = HARD, {"start": "clusters", "score": {"class_path": "mixdist.competition.Elbo"}, "by_shares": True}
    return write_config(folder / "config.yaml", changed(base, **copy.deepcopy(options | own | changes)))


@pytest.mark.parametrize("trains", [None, PART])
@pytest.mark.parametrize("family", ["soft", "competition"])
def test_a_run_goes_on_without_the_run_that_it_started_from(
    one: str, family: str, trains: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(one, "one")
    options: dict[str, Any] = {"expert_start__init_args": {"run": "one", "noise": 0.01, "trains": trains}}
    if family == "competition":
        options["score__init_args"] = {"same_noise": trains is not None}
    config = config_of(tmp_path, "one", family, **options)
    assert (ended := here("train", "--config", config, "--out", "whole")).code == 0, ended.err
    told = "each expert trains 34 of its 249 parameters (decoder.layers.2); all else stays as in one"
    assert (told in ended.err) == (trains is not None)
    if family == "competition":
        words = ("train", "--config", config, "--out", "two")
        assert (ended := together(*words, ranks=2, folder=tmp_path)).code == 0, ended.err
    shutil.rmtree("one")
    shutil.copytree("whole", "again")
    for path in Path("again/checkpoints").glob("step-*"):
        if path.name != "step-000000001":
            shutil.rmtree(path)
    assert (ended := here("train", "--resume", "again")).code == 0, ended.err
    whole = last("whole")
    assert all(torch.equal(value, whole[name]) for name, value in last("again").items())
    assert np.isfinite([float(value.double().sum()) for value in whole.values()]).all()
    assert (ended := here("evaluate", "whole")).code == 0, ended.err
    if trains:
        check_kept(last(one), whole, PART[0])
        other = '["decoder"]'
        words = ("train", "--resume", "again", "--mixture.expert_start.trains", other)
        refused(*words, names="expert_start.trains decoder.layers.2 decoder")
    if family == "competition":
        assert all(torch.equal(value, whole[name]) for name, value in last("two").items())


@pytest.mark.parametrize("family", ["soft", "competition"])
def test_a_damaged_checkpoint_is_passed_over_in_one_line(
    one: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by every command, and once, though experts and a first table read it; no warning of Python's."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(one, "one")
    newest = max(Path("one/checkpoints").glob("step-*"))
    other = Path(f"{newest.parent}/step-{int(newest.name[5:]) + 1:09d}")
    shutil.copytree(newest, other)
    (other / "expert-0000.safetensors").write_bytes(b"")
    ended = here("train", "--config", config_of(tmp_path, "one", family), "--out", "run")
    assert ended.code == 0, ended.err
    told = f"mixdist: mixture.expert_start.run (one): checkpoint {other.name} is damaged (expert-0000.safetensors"
    lines = [line for line in ended.err.splitlines() if "damaged" in line]
    assert len(lines) == 1, ended.err
    assert lines[0].startswith(told)
    assert lines[0].endswith(f"using {newest.name}")


def check_kept(model: dict[str, Tensor], ended: dict[str, Tensor], part: str) -> None:
    """Check that experts moved in one part alone, and have an optimiser's states of that alone."""
    own = {name.partition(".")[2]: value for name, value in model.items()}
    for name, value in ended.items():
        file, _, key = name.partition(".")
        if not file.startswith("expert"):
            continue
        if key.startswith("optimizer."):
            assert key.startswith(f"optimizer.{part}.")
        else:
            assert torch.equal(value, own[key]) != key.startswith(f"model.{part}.")


def test_the_page_s_two_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = DOCS / "upcycling.md"
    one, many, soft, part = blocks(page, "yaml")
    start = next(line.strip() for line in many.splitlines() if "Upcycled" in line)
    parts = many.replace(start, part.strip())
    soft = "data: {class_path: mixdist.data.Digits}\n" + soft
    for name, block in (("one", one), ("many", many), ("soft", soft), ("parts", parts)):
        (tmp_path / f"{name}.yaml").write_text(block)
    commands = [line.split()[1:] for line in blocks(page, "bash")[0].splitlines()]
    assert len(commands) == 2
    for words in (*commands, *(["train", "--config", f"{n}.yaml", "--out", f"runs/{n}"] for n in ("soft", "parts"))):
        ended = here(*words, "--train.epochs", "1")
        assert ended.code == 0, ended.err
    assert "each expert trains 8,257 of its 19,793 parameters" in page.read_text()
    assert "each expert trains 8,257 of its 19,793 parameters (decoder.layers.2, likelihood)" in ended.err


@pytest.mark.parametrize(
    ("family", "changes", "names"),
    [
        ("soft", {"expert__init_args": {**EXPERT, "latent": 2}}, "mixture.expert.init_args.latent 2 3"),
        (
            "soft",
            {"expert__init_args": {**EXPERT, "likelihood": "laplace"}},
            "init_args.likelihood laplace gaussian",
        ),
        ("soft", {"expert__init_args": {**EXPERT, "network": mlp(5)}}, "mixture.expert.init_args.network hidden 5 16"),
        (
            "soft",
            {"gate__init_args": {"network": mlp(5), "latent": LATENT}},
            "mixture.gate LatentGMM encoder.layers.0.bias",
        ),
        ("soft", {"gate__init_args": {"latent": 0}}, "latent (0)"),
        ("soft", {"expert_start": None}, "mixture.gate LatentGMM Upcycled"),
        ("soft", {"expert_start__init_args": {"run": "nowhere"}}, "mixture.expert_start.run (nowhere)"),
        ("soft", {"expert_start__init_args": {"run": "many"}}, "mixture.expert_start many 4 1"),
        ("soft", {"expert_start__init_args": {"run": "one", "noise": -1}}, "mixture.expert_start.noise -1"),
        ("soft", {"expert_start__init_args": {"run": "one", "trains": ["head"]}}, "trains (head) decoder.layers"),
        ("soft", {"expert_start__init_args": {"run": "one", "trains": []}}, "mixture.expert_start.trains ([])"),
        (
            "competition",
            {"expert_start__init_args": {"run": "one", "trains": PART}, "starved": "reseed"},
            "mixture.starved (reseed) mixture.expert_start.trains",
        ),
        ("competition", {"expert_start": None}, "mixture.start clusters null Upcycled"),
        ("competition", {"expert_start": {"class_path": "mixdist.mixtures.PCAStart"}}, "mixture.start PCAStart"),
        ("competition", {"expert_start__init_args": {"run": "one", "rows": 3}}, "mixture.expert_start 3 rows 4"),
        (
            "competition",
            {"expert": {"class_path": "mixdist.experts.Centroid"}},
            "mixture.expert Centroid VAE",
        ),
    ],
)
def test_what_cannot_start_so_is_refused_before_anything_is_written(
    one: str, family: str, changes: dict[str, Any], names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(one, "one")
    if "many" in names:
        many = changed(ONE, num_experts=K, train__epochs=1, data__init_args__rows=100)
        write_config(tmp_path / "many.yaml", many)
        assert here("train", "--config", "many.yaml", "--out", "many").code == 0
    refused("train", "--config", config_of(tmp_path, "one", family, **changes), names=names)


def test_weights_that_do_not_fit_are_named_though_the_config_says_nothing(one: str) -> None:
    start, names = Upcycled(one), {"latent": LATENT + 1, "network": MLP([HIDDEN])}
    kind = partial(VAE, likelihood="gaussian", mean="identity", **names)  # type: ignore[arg-type]
    mixture, dataset = Soft(Uniform, kind, 2, expert_start=start), rows()
    mesh = mesh_of(2, 1, 1)
    mixture.setup(Context(SEED, torch.float64, dataset.spec, mesh, Wire(mesh.device)))
    with pytest.raises(ValueError, match=r"decoder\.layers\.0\.weight has shape \(3, 16\), expected \(4, 16\)"):
        mixture.start_experts(dataset)
