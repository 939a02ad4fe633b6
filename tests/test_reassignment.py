"""How samples are given in a competition: by shares, several times, drawn with a temperature."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mixdist.competition import Competition, Discriminators, Elbo, Fixed, LabelOracle, Likelihood, Random, Score
from mixdist.competition.reassign import Scoring
from mixdist.data import Blobs, Dataset, share
from mixdist.experts import VAE
from mixdist.gates import LatentGMM
from mixdist.mixtures import ClusterStart, Context
from mixdist.nets import MLP, Centred
from mixdist.parallel.wire import Wire
from mixdist.stats import Step, Warmup
from mixdist.terms import Field
from tests.contest import Contest, make_rounds, records_of
from tests.launch import HARD, changed, here, mlp, together, write_config
from tests.parity import mesh_of
from tests.pool import Pool

EXPERTS = 4


def scoring(num: int, **rules: Any) -> Scoring:
    """The scoring of a competition in one process, for so many samples with ids of their own."""
    rounds = make_rounds(Contest(num_experts=EXPERTS, score="elbo"), mesh_of(EXPERTS, 1, 1), Wire(torch.device("cpu")))
    made = rounds.scoring
    made.mixture.rules = replace(made.mixture.rules, **rules)
    ids = torch.randperm(10 * num, generator=torch.Generator().manual_seed(1))[:num]
    made.dataset = Dataset({"id": ids, "x": torch.zeros(num, 1)}, {"x": Field((1,), torch.float32)})
    return made


def given(made: Scoring, scores_NE: np.ndarray, table: Any = None, round: int = 0) -> tuple[np.ndarray, int]:
    return made._given(scores_NE, range(len(scores_NE)), table, round)


def far_apart(num: int, spread: float = 2.0) -> np.ndarray:
    return spread * np.random.default_rng(2).normal(size=(num, EXPERTS)) + np.array([0.0, 0.05, -0.05, 0.1])


@pytest.mark.parametrize(
    ("score", "counts"),
    [
        (Elbo(), True),
        (Likelihood(), True),
        (Fixed(), True),
        (Elbo(normalized=True), False),
        (Likelihood(normalized=True), False),
        (Discriminators(), False),
        (LabelOracle(), False),
        (Random(), False),
    ],
)
def test_shares_count_for_log_likelihoods_unless_they_are_not_to(score: Score, counts: bool) -> None:
    assert Competition(VAE, 3, score=score).rules.counts_shares == counts
    for told in (False, True):
        assert Competition(VAE, 3, score=score, by_shares=told).rules.counts_shares == told


@pytest.mark.parametrize("table", [None, "skewed"])
def test_each_e_step_lowers_the_objective_with_shares(table: Any) -> None:
    """Equal to a plain loop; F + H(alpha) falls until nothing moves, and then the next would move nothing."""
    scores_NE, num = far_apart(500), 500
    before_N = None if table is None else np.repeat(np.arange(EXPERTS), (250, 150, 60, 40))
    counts_E = np.ones(EXPERTS) if before_N is None else np.bincount(before_N)
    values, tables = list[float](), list[np.ndarray]()
    for _ in range(40):
        expert_N = np.array([max(range(EXPERTS), key=lambda j: row[j] + math.log(counts_E[j])) for row in scores_NE])
        counts_E = np.bincount(expert_N, minlength=EXPERTS)
        assert counts_E.all()
        share_E = counts_E / num
        values.append(-scores_NE[np.arange(num), expert_N].mean() - float((share_E * np.log(share_E)).sum()))
        tables.append(expert_N)
    still = next(i for i in range(1, 40) if (tables[i] == tables[i - 1]).all())
    assert still > 3
    assert all(later < before for before, later in itertools.pairwise(values[:still]))
    for e_steps in (1, 2, 3, 40):
        found_N, done = given(scoring(num, e_steps=e_steps, by_shares=True), scores_NE, before_N)
        np.testing.assert_array_equal(found_N, tables[min(e_steps, still + 1) - 1])
        assert done == min(e_steps, still + 1)


def test_samples_are_drawn_from_tempered_responsibilities() -> None:
    """Many samples of one row: softmax((log alpha + s) / T), by a chi-squared test; T falls linearly to the best."""
    num, row_E, table = (
        20_000,
        np.array([0.4, 0.0, -0.7, -1.5]),
        np.repeat(np.arange(EXPERTS), (8000, 6000, 4000, 2000)),
    )
    made = scoring(num, rounds=5, by_shares=True, temperature=2.0, anneal_rounds=4)
    scores_NE = np.tile(row_E, (num, 1))
    best = int(np.argmax(row_E + np.log(np.bincount(table))))
    drawn = []
    for round, temperature in enumerate((2.0, 1.5, 1.0, 0.5, 0.0, 0.0)):
        assert made.mixture.rules.temperature_of(round) == temperature
        found_N, _ = given(made, scores_NE, table, round)
        drawn.append(found_N)
        if not temperature:
            assert (found_N == best).all()
            continue
        expected_E = np.exp((row_E + np.log(np.bincount(table) / num)) / temperature)
        expected_E *= num / expected_E.sum()
        assert (
            np.square(np.bincount(found_N, minlength=EXPERTS) - expected_E) / expected_E
        ).sum() < 16.3  # 0.001, 3 df
    assert (drawn[0] != drawn[1]).mean() > 0.3  # each round draws anew


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_a_draw_belongs_to_its_row(parts: int) -> None:
    made = scoring(100, temperature=2.0, anneal_rounds=3)
    cut = [made._noise(share(100, part, parts), EXPERTS, 1) for part in range(parts)]
    np.testing.assert_array_equal(np.concatenate(cut), made._noise(range(100), EXPERTS, 1))


def test_what_a_round_did_is_recorded() -> None:
    case = Contest(num_experts=EXPERTS, score="elbo", given="drawn", rounds=2)
    records = list(records_of(make_rounds(case, mesh_of(EXPERTS, 1, 1), Wire(torch.device("cpu")))))
    rounds = [record for record in records if "round" in record]
    assert [record["temperature"] for record in rounds] == [3.0, 1.5, 0.0]
    assert all(1 <= record["e_steps"] <= 2 for record in rounds)


def test_the_gate_over_latents_goes_from_soft_to_hard() -> None:
    """t = 9^(1 - u) in training, u by epochs; evaluation has the last one at any step."""

    def made(**more: Any) -> LatentGMM:
        torch.manual_seed(0)
        return LatentGMM({"x": Field((4,), torch.float32)}, 3, 2, MLP([5]), **more)

    rows, gate = {"x": torch.randn(6, 4)}, made(temperature=9.0, final_temperature=1.0, anneal_steps=Warmup(epochs=2))
    plain: Callable[[float], torch.Tensor] = lambda t: made(temperature=t)(rows, None).log_resp_BE  # noqa: E731
    for epochs, temperature in ((0, 9.0), (1, 3.0), (2, 1.0), (3, 1.0)):
        gate.train().anneal(Step(5 * epochs, epochs))  # type: ignore[func-returns-value]
        torch.testing.assert_close(gate(rows, None).log_resp_BE, plain(temperature))
        torch.testing.assert_close(gate.eval()(rows, None).log_resp_BE, plain(1.0))
    with pytest.raises(ValueError, match="LatentGMM's final_temperature"):
        made(final_temperature=1.0)


def first_table(layout: tuple[int, int]) -> np.ndarray:
    """The table that a competition over rows in far clumps begins with, on this rank."""
    dataset = Blobs(num_classes=EXPERTS, rows=1200, spread=0.05).load().train
    mixture = Competition(VAE, EXPERTS, expert_start=ClusterStart(rows=900), start="clusters", score=Elbo())
    mesh = mesh_of(EXPERTS, *layout)
    mixture.setup(Context(0, torch.float64, dataset.spec, mesh, Wire(mesh.device)))
    mixture.start_experts(dataset)
    assert mixture.first_N is not None
    return mixture.first_N


def centred(layout: tuple[int, int]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """The centres of this rank's encoders and decoders after the same start, of networks that have one."""
    dataset = Blobs(num_classes=EXPERTS, rows=1200, spread=0.05).load().train
    expert = functools.partial(VAE, network=Centred(MLP([4])), likelihood="gaussian", mean="identity")
    mixture = Competition(expert, EXPERTS, expert_start=ClusterStart(rows=900), start="clusters", score=Elbo())
    mesh = mesh_of(EXPERTS, *layout)
    mixture.setup(Context(0, torch.float64, dataset.spec, mesh, Wire(mesh.device)))
    mixture.start_experts(dataset)
    experts = mixture.parts.experts.items()
    return {e: (one.encoder.centre_D.clone(), one.decoder.centre_D.clone()) for e, one in experts}  # type: ignore


def test_centres_are_those_of_clusters(pool: Callable[[int], Pool]) -> None:
    """Each the mean of the rows that are the expert's in the first table; the same bits on every layout."""
    dataset, alone_N, found = Blobs(num_classes=EXPERTS, rows=1200, spread=0.05).load().train, first_table((1, 1)), {}
    x_ND = dataset.spec["x"].values(dataset.rows["x"], torch.float64).flatten(1)
    for e, (encoder_D, decoder_D) in (alone := centred((1, 1))).items():
        assert torch.equal(encoder_D, decoder_D)
        torch.testing.assert_close(encoder_D, x_ND[torch.from_numpy(alone_N) == e].mean(0), atol=0.02, rtol=0)
    assert len({tuple(encoder_D.tolist()) for encoder_D, _ in alone.values()}) == EXPERTS
    for layout in ((2, 2), (4, 2)):
        for own in pool(layout[0]).run("tests.test_reassignment:centred", layout):
            found |= own
            assert all(torch.equal(one_D, alone[e][0]) for e, two in own.items() for one_D in two)
        assert found.keys() == alone.keys()


def test_a_centre_moves_rows_and_means() -> None:
    """The loss of x + c around c is that of x around 0, and samples move by c; with scales from the decoder, too."""
    spec, x, c_D = {"x": Field((4,), torch.float64)}, torch.randn(6, 4).double(), torch.arange(4.0).double()
    for scale in ("learned", "decoder"):
        torch.manual_seed(0)
        expert = VAE(spec, 2, Centred(MLP([5])), "gaussian", scale, "identity").double()  # type: ignore[arg-type]
        eps = torch.randn(6, 2).double()
        around_0, drawn = expert({"x": x}, eps).loss_R, expert.sample(eps)
        for one in (expert.encoder, expert.decoder):
            one.set(c_D)
        torch.testing.assert_close(expert({"x": x + c_D}, eps).loss_R, around_0)
        torch.testing.assert_close(expert.sample(eps), drawn + c_D)


@pytest.mark.parametrize(
    ("likelihood", "mean", "components"), [("gaussian", "sigmoid", 1), ("bernoulli", "identity", 1)]
)
def test_a_centre_needs_means_as_they_are(likelihood: Any, mean: Any, components: int) -> None:
    with pytest.raises(ValueError, match=rf"network \(Centred\) .*{likelihood} .*{mean}"):
        VAE({"x": Field((4,), torch.float32)}, 2, Centred(MLP([5])), likelihood, mean=mean, components=components)


def test_a_first_table_of_clusters_of_rows(pool: Callable[[int], Pool]) -> None:
    """Each clump has one expert, whatever its number; the same on every layout."""
    dataset, alone_N = Blobs(num_classes=EXPERTS, rows=1200, spread=0.05).load().train, first_table((1, 1))
    pairs = set(zip(alone_N.tolist(), dataset.rows["y"].tolist(), strict=True))
    assert len(pairs) == EXPERTS == len({label for _, label in pairs})
    for layout in ((2, 2), (3, 3), (4, 2)):
        for own_N in pool(layout[0]).run("tests.test_reassignment:first_table", layout):
            np.testing.assert_array_equal(own_N, alone_N)


def test_centres_are_in_checkpoints(folder: Path) -> None:
    """Two ranks and a resume on one are one process: weights and centres."""
    network = {"class_path": "mixdist.nets.Centred", "init_args": {"network": mlp(6)}}
    start = {"expert_start": {"class_path": "mixdist.mixtures.ClusterStart"}, "start": "clusters"}
    config = write_config(
        folder / "c.yaml",
        changed(HARD, dtype="float64", expert__init_args__network=network, score="mixdist.competition.Elbo", **start),
    )
    assert (
        together("train", "--config", config, "--out", "two", "--mixture.rounds", "1", ranks=2, folder=folder).code == 0
    )
    assert here("train", "--resume", "two", "--mixture.rounds", "2").code == 0
    assert here("train", "--config", config, "--out", "one").code == 0
    (newest, *_) = sorted(Path("one/checkpoints").glob("step-*"), reverse=True)
    files = sorted(newest.glob("expert*.safetensors"))
    assert len(files) == 3
    for path in files:
        mine, theirs = load_file(Path("two/checkpoints") / newest.name / path.name), load_file(path)
        assert mine.keys() == theirs.keys()
        assert theirs["model.encoder.centre_D"].abs().max() > 0.1
        for name, b in theirs.items():
            torch.testing.assert_close(mine[name], b, rtol=1e-9, atol=1e-10)
