"""Likelihoods: importance sampling against exact evidence, mixture bounds, layouts, dead and duplicate experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mixdist.data import Dataset, Loader
from mixdist.evaluation.evaluate import evaluate
from mixdist.experts import Expert
from mixdist.experts import importance as subject
from mixdist.experts.importance import SAMPLES_AT_ONCE, importance
from mixdist.gates import Uniform
from mixdist.mixtures import Context, ExpertEvaluation, Soft
from mixdist.mixtures.evidence import duplicate_pairs, mixture_log_likelihood
from mixdist.mixtures.health import dead, duplicates, in_words
from mixdist.noise import EVALUATION_PHASE, Draw, Moment, Purpose, weights_seed
from mixdist.parallel.wire import Wire
from mixdist.terms import Batch, ExpertTerms, Field
from tests.parity import SEED, Case, data, make_expert, make_mixture, mesh_of
from tests.pool import Pool

AT = Moment(SEED, EVALUATION_PHASE)


def rows_of(num_rows: int) -> Batch:
    ids = torch.arange(num_rows) + 10**10  # beyond 32 bits
    return {"id": ids, "x": Draw(SEED, Purpose.DATA).normal(ids, [0], (5,), torch.float64)[0]}


class Plain(Expert):
    """Log-weights that are the sum of the noise, larger for larger x."""

    noise_shape = (3,)

    def log_weights(self, rows: Batch, eps: Tensor) -> Tensor:
        return rows["x"].sum(1, keepdim=True) + 200 * eps.sum(-1)


@pytest.mark.parametrize("num_samples", [2, SAMPLES_AT_ONCE, 2 * SAMPLES_AT_ONCE + 3])
def test_chunks_do_not_matter(num_samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(23)
    whole = importance(Plain(), rows, 3, AT, num_samples, torch.float64, Plain.noise_shape)
    # By the textbook, from all samples at once; the weights span hundreds of nats.
    steps = range(-(-num_samples // SAMPLES_AT_ONCE))
    draws = [Draw(SEED, Purpose.IMPORTANCE, EVALUATION_PHASE, c) for c in steps]
    eps = torch.cat([d.normal(rows["id"], [3], (SAMPLES_AT_ONCE, 3), torch.float64)[0] for d in draws], dim=1)
    log_w = Plain().log_weights(rows, eps[:, :num_samples])
    largest = log_w.max(1, keepdim=True).values
    w = (log_w - largest).exp()
    torch.testing.assert_close(whole.log_px, w.mean(1).log() + largest[:, 0])
    torch.testing.assert_close(whole.error, w.std(1) / (math.sqrt(num_samples) * w.mean(1)))

    monkeypatch.setattr(subject, "DECODES_AT_ONCE", {"cpu": 3 * num_samples, "cuda": 1})
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    mixed = importance(
        Plain(), {n: c[order] for n, c in rows.items()}, 3, AT, num_samples, torch.float64, Plain.noise_shape
    )
    for one, other in zip(mixed, whole, strict=True):
        torch.testing.assert_close(one, other[order], rtol=1e-12, atol=1e-12)
    assert importance(Plain(), rows, 3, AT, 1, torch.float64, Plain.noise_shape).error.isnan().all()
    none = importance(
        Plain(), {n: c[:0] for n, c in rows.items()}, 3, AT, num_samples, torch.float64, Plain.noise_shape
    )
    assert [len(field) for field in none] == [0, 0]


def test_a_mixture_lies_between_its_terms_and_its_best_expert() -> None:
    generator = torch.Generator().manual_seed(3)
    log_px_BE = 300 * torch.randn(500, 6, generator=generator, dtype=torch.float64)
    shares = torch.rand(6, generator=generator, dtype=torch.float64) * 7  # normalised by the function
    shares[2] = 0
    gate = torch.log_softmax(20 * torch.randn(500, 6, generator=generator), dim=1)  # float32
    gate[:, 1] = -math.inf
    for log_weights in (shares.log(), gate):
        log_pi = log_weights.double() - log_weights.double().logsumexp(-1, keepdim=True)
        mixture = mixture_log_likelihood(log_px_BE, log_weights)
        assert (mixture[:, None] >= log_pi + log_px_BE).all()
        assert (mixture <= log_px_BE.max(1).values + 1e-12).all()
    one = torch.zeros(6).index_fill(0, torch.tensor([4]), 1.0).log()
    assert torch.equal(mixture_log_likelihood(log_px_BE, one), log_px_BE[:, 4])


# Evaluations of whole mixtures.


def soft(case: Case) -> Soft:
    mesh = mesh_of(case.num_experts, case.ranks, case.ep_size)
    mixture = make_mixture(case, mesh, Wire(mesh.device))
    assert isinstance(mixture, Soft)
    return mixture


def judged(
    case: Case,
    num_samples: int | None = 25,
    change: Callable[[Soft], None] = lambda mixture: None,
    dataset: Dataset | None = None,
) -> ExpertEvaluation:
    mixture = soft(case)
    change(mixture)
    found = evaluate(mixture, dataset or data(), case.batch_size, SEED, num_samples, data())
    assert isinstance(found, ExpertEvaluation)
    return found


def attributed(*names: str) -> Dataset:
    """The rows with attributes: bright, and of the label 2."""
    known = data()
    marks = torch.stack([known.rows["x"].float().mean((1, 2, 3)) > 128, known.rows["label"] == 2], dim=1)
    rows = {**known.rows, "marks": marks.to(torch.uint8)}
    spec = {**known.spec, "marks": Field((2,), torch.uint8)}
    return replace(known, rows=rows, spec=spec, attribute="marks", attribute_names=names)


def rates(case: Case) -> ExpertEvaluation:
    return judged(case, None, dataset=attributed())


def test_experts_are_held_against_attributes_on_any_layout(pool: Callable[[int], Pool]) -> None:
    case = Case(ranks=2, ep_size=2, gate="starved", batch_size=13)
    found = rates(case.reference())
    marks, expert_N = attributed().rows["marks"].numpy(), found.expert_N
    assert found.rows_E[1] == 0  # the gate never takes it
    for e in range(4):
        wanted = marks[expert_N == e].mean(0) if found.rows_E[e] else [math.nan] * 2
        np.testing.assert_allclose(found.attribute_EA[e], wanted, rtol=1e-15)
    np.testing.assert_allclose(found.attribute_A, marks.mean(0), rtol=1e-15)
    for got in pool(2).run("tests.test_evidence:rates", case):
        np.testing.assert_array_equal(got.attribute_EA, found.attribute_EA)
        np.testing.assert_array_equal(got.attribute_A, found.attribute_A)


def test_a_table_names_the_attribute_that_stands_out() -> None:
    rate_EA = np.array([[0.5, 0.61], [math.nan] * 2, [0.2, 0.0], [0.5, 0.5]])
    found = replace(
        rates(Case(gate="starved", batch_size=13)),
        dataset=attributed("Bright", "Of_2"),
        attribute_EA=rate_EA,
        attribute_A=np.array([0.5, 0.15]),
        rows_E=np.array([9, 0, 8, 7]),
    )
    told = ["Of_2 61% (15%)", "", "Bright 20% (50%)", "Of_2 50% (15%)"]
    assert [found.stands_out(e) for e in range(4)] == told
    headers, lines = found.table()
    assert headers[-2:] == ["took label", "attribute (of all rows)"]
    assert [line[-1] for line in lines] == [one or "-" for one in told]
    assert replace(found, dataset=attributed()).stands_out(0) == "1 61% (15%)"
    assert replace(found, attribute_EA=np.array([[0.5, 0.15]])).stands_out(0) == ""
    about = found.describe()
    assert (about["attribute"], about["attribute_names"]) == ("marks", ["Bright", "Of_2"])
    np.testing.assert_array_equal(about["attribute_EA"], rate_EA)
    plain = judged(Case())
    assert plain.table()[0][-1] == "took label"
    assert plain.describe()["attribute_EA"] is None


def numbers(case: Case) -> dict[str, Any]:
    """What ranks send back."""
    found = judged(case)
    each = {f"{kind} {n}": v for kind in ("on_own", "on_all") for n, v in getattr(found, kind).items()}
    each |= {f"{kind} {n}": v for kind in ("errors", "columns") for n, v in getattr(found, kind).items()}
    for kind in ("latent_own", "latent_all"):
        for e, told in enumerate(getattr(found, kind)):
            each |= {f"{kind} {e} {n}": v for n, v in told.items()}
    return {**found.figures, **each, "share": found.share_E, "rows": found.rows_E}


@pytest.mark.parametrize("layout", [(2, 2), (2, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("expert", ["bernoulli", "gaussian", "regressor"])
def test_every_layout_gives_the_same_figures(pool: Callable[[int], Pool], layout: tuple[int, int], expert: str) -> None:
    case = Case(ranks=layout[0], ep_size=layout[1], expert=expert, batch_size=13)
    wanted = numbers(case.reference())
    name = "conditional_log_likelihood" if expert == "regressor" else "log_likelihood"
    assert {name, f"errors {name}", f"columns {name}", "on_all log_likelihood"} <= wanted.keys()
    for got in pool(layout[0]).run("tests.test_evidence:numbers", case):
        assert got.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_allclose(got[name], wanted[name], rtol=1e-10, atol=1e-12, err_msg=name)


def test_supervised_likelihoods_are_exact() -> None:
    case = Case(expert="regressor")
    found, mixture = judged(case), soft(case)
    with torch.no_grad():
        rows = mixture.values(data().rows, ("x", "y"))
        log_resp = mixture.gate(rows, None).log_resp_BE
        log_py = torch.stack([-expert(rows, None).loss_R for expert in mixture.bank.owned().values()], dim=1)
    gate = torch.logsumexp(log_resp + log_py, 1).mean().item()
    assert found.figures["conditional_log_likelihood"] == pytest.approx(gate, rel=1e-12)
    np.testing.assert_allclose(found.on_all["log_likelihood"], log_py.mean(0).numpy(), rtol=1e-12)
    assert "prediction_rmse" in found.figures
    assert not {"rmse_row", "elbo", "log_likelihood"} & found.figures.keys()
    assert found.findings == []


def test_reconstruction_routing_and_purity_are_as_defined() -> None:
    found, mixture = judged(Case(), None), soft(Case())
    with torch.no_grad():
        rows = mixture.values(data().rows, ("x",))
        resp = mixture.gate(rows, None).log_resp_BE.exp()
        each = torch.stack([expert.reconstruct(rows) for expert in mixture.bank.owned().values()], dim=1)
    own = each[torch.arange(45), torch.from_numpy(found.expert_N)]
    squared = (own - rows["x"]).square().flatten(1).sum(1)
    assert found.figures["rmse_row"] == pytest.approx(squared.mean().sqrt().item(), rel=1e-12)
    assert found.figures["rmse_value"] == pytest.approx((own - rows["x"]).square().mean().sqrt().item(), rel=1e-12)
    assert found.figures["routing_entropy"] == pytest.approx(-(resp * resp.log()).sum(1).mean().item(), rel=1e-12)
    mean = resp.mean(0)
    assert found.figures["experts_in_use"] == pytest.approx(math.exp(-(mean * mean.log()).sum()), rel=1e-12)
    assert found.counts_EC is not None
    assert found.figures["purity"] == pytest.approx(found.counts_EC.max(1).sum() / 45)
    uniform = judged(Case(gate="uniform"), None).figures
    assert uniform["experts_in_use"] == pytest.approx(4)
    assert uniform["routing_entropy"] == pytest.approx(math.log(4))


class Guess(Expert):
    """A classifier that says the same for every row."""

    fields, target = ("x", "label"), "label"

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.probabilities = torch.tensor(probabilities, dtype=torch.float64)

    def forward(self, rows: Batch, eps: Tensor | None) -> ExpertTerms:
        log_py = self.probabilities.log()[rows["label"]]
        return ExpertTerms(-log_py, log_py)

    def predict(self, rows: Batch) -> Tensor:
        return self.probabilities.expand(len(rows["id"]), -1)


def test_classifiers_are_judged_by_accuracy_and_likelihood() -> None:
    guesses = [lambda spec: Guess([0.7, 0.2, 0.1]), lambda spec: Guess([0.5, 0.2, 0.3])]
    mixture, mesh = Soft(Uniform, guesses), mesh_of(2, 1, 1)
    mixture.setup(Context(SEED, torch.float64, data().spec, mesh, Wire(mesh.device)))
    found = evaluate(mixture, data(), 16, SEED, 3).figures
    label = data().rows["label"].long()
    nll = -torch.tensor([0.6, 0.2, 0.2], dtype=torch.float64).log()[label].mean().item()
    assert found["prediction_accuracy"] == pytest.approx((label == 0).double().mean().item())
    assert found["conditional_log_likelihood"] == pytest.approx(-nll)


# Dead experts and duplicates.


def copy_expert(mixture: Soft) -> None:
    """Make expert 2 what expert 0 is, with its latent dimensions in reverse."""
    owned = mixture.bank.owned()
    owned[2].load_state_dict(owned[0].state_dict())
    with torch.no_grad():
        encoder, decoder = owned[2].get_submodule("encoder.layers.2"), owned[2].get_submodule("decoder.layers.0")
        for parameter in encoder.parameters():
            parameter.copy_(torch.cat([half.flip(-1) for half in parameter.chunk(2, dim=-1)], dim=-1))
        weight = decoder.get_parameter("weight")
        weight.copy_(weight.flip(0))


def test_a_copy_is_found_whatever_the_order_of_its_latent_dimensions() -> None:
    told = "experts 0 and 2 are duplicates: their losses differ by less than 1% of their deviation over rows"
    assert judged(Case(), None, copy_expert).findings == [told]
    assert judged(Case(gate="uniform"), None, copy_expert).findings == [told]
    assert judged(Case(), None).findings == []


def test_copies_are_found_on_a_batch_by_every_layout(pool: Callable[[int], Pool]) -> None:
    for ranks in (1, 2):
        found = pool(ranks).run("tests.test_evidence:found_on_a_batch", ranks)
        assert found == [([], [(0, 2)])] * ranks


def found_on_a_batch(ranks: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Duplicates before expert 2 becomes what expert 0 is, and after."""
    case = Case(ranks=ranks, ep_size=ranks)
    mixture = soft(case)
    shard = Loader(data(), 16, SEED, 0, mixture.context.mesh.rank, ranks).batch(0, 0)
    before = duplicate_pairs(mixture, shard)
    if 2 in mixture.bank.owned():
        torch.manual_seed(weights_seed(SEED, Purpose.WEIGHTS, 0))
        mixture.bank.owned()[2].load_state_dict(make_expert(case, data().spec).double().state_dict())
    return before, duplicate_pairs(mixture, shard)


def test_a_dead_expert_is_found() -> None:
    dead_one = judged(Case(gate="oracle"), None)  # three classes, four experts
    assert dead_one.findings == ["expert 3 is dead: its mean responsibility 0 is below 0.0025"]
    starved = judged(Case(gate="starved"), None)
    assert starved.findings == ["expert 1 is dead: its mean responsibility 0 is below 0.0025"]


def test_the_rules_of_health() -> None:
    assert dead(np.array([0.5, 0.0049, 0.4951])) == []  # 0.01 / 3 = 0.0033
    assert dead(np.array([0.5, 0.0032, 0.4968])) == [1]
    squares = np.array([[0, 0.09, 5], [0.09, 0, 0.11], [5, 0.11, 0]]) ** 2
    for spread, found in ((10.0, [(0, 1)]), (0.0, []), (math.nan, [])):
        mean_square = np.array([[3.0, 4, 5], [9 + spread**2, 16 + spread**2, 25 + spread**2]])
        assert duplicates(np.concatenate([squares, mean_square])) == found
    assert duplicates(np.concatenate([np.full((2, 2), np.nan), [[3, 4], [10, 17]]])) == []
    assert in_words(np.array([0.5, 0.5]), [], []) == []
