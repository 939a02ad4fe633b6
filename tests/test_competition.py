"""Hard assignment is the same run on any layout, to the last bit where no expert has replicas (contract 1)."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mixdist.data.loader import share
from mixdist.parallel.mesh import Placement
from mixdist.parallel.wire import Wire
from tests.contest import (
    COUNTS,
    Contest,
    Steps,
    follow,
    make_mixture,
    make_rounds,
    merge,
    records_of,
    run,
    skewed,
    tensors,
)
from tests.covering import Row, combined, covering, marked, wanted
from tests.parity import mesh_of
from tests.pool import Pool

TOLERANCE = 1e-10  # of means over ranks
STEP = 1e-12  # of a step's loss and gradients, from the same weights
DECIDED = ("step", "phase", "round", "epoch", "counts", "changed", "objective_rose", "starved", "starved_rule")
DECIDED += ("e_steps", "temperature")

# Every pair of these is covered by some case; every value by one that runs by default.
OPTIONS: dict[str, Sequence[Any]] = {
    "layout": ((2, 2), (3, 3), (4, 4), (4, 2), (2, 1)),
    "score": ("fresh", "kept", "elbo", "normalised", "likelihood", "oracle", "random", "fixed"),
    "given": ("score", "text", "shares", "drawn"),
    "num_experts": (4, 5),
    "start": ("all", "split", "table"),
    "starved": ("none", "freeze", "reseed"),
    "delivery": ("read", "wire"),
    "placement": ("fixed", "load"),
    "piece_bytes": (1 << 28, 1000),
    "expert": ("bernoulli", "gaussian", "conv", "unlike"),
    "optimizer": ("adam", "clipped"),
    "batch_size": (10, 3, 100),
    "block": (16, 7, 100),
    "micro_batch": (None, 4),
    "rounds": (2, 3),
    "engine": ("native", "sharded", "offloaded", "sharded-offloaded"),
}


def case_of(layout: tuple[int, int], **options: Any) -> Contest:
    return Contest(ranks=layout[0], ep_size=layout[1], **options)


@functools.cache
def reference(case: Contest) -> dict[str, Any]:
    return merge([run(case)])


def differences(got: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """Give max|a - b| / max|b| of each tensor, max|a - b| where b is 0; equal infinities do not differ."""
    a, b = tensors(got), tensors(wanted)
    assert a.keys() == b.keys(), f"not in both: {sorted(a.keys() ^ b.keys())}"
    result = {}
    for name in b:
        assert a[name].shape == b[name].shape, name
        assert not b[name].isnan().any(), name
        if not b[name].numel():
            continue
        largest = b[name].abs().max().item()
        difference = (a[name] - b[name]).abs().max().item() if b[name].isfinite().all() else float("nan")
        result[name] = difference / (largest or 1.0)
    return result


FOLLOWED: dict[tuple[Contest, str], tuple[dict[str, Any], dict[str, float]]] = {}


def along(case: Contest, steps: Steps) -> tuple[dict[str, Any], dict[str, float]]:
    """Follow the steps of a run; those that another delivery or placement took too, bit for bit, only once."""
    digest = hashlib.sha256()
    for name, taken in sorted(steps.items()):
        for when, step in taken:
            digest.update(f"{name} {when} {step.loss.hex()} {step.grads.shape} ".encode() + step.grads.tobytes())
    key = case.reference(), digest.hexdigest()
    if key not in FOLLOWED:
        FOLLOWED[key] = follow(case, steps)
    return FOLLOWED[key]


def check(pool: Callable[[int], Pool], case: Contest) -> None:
    """Hold a case against one process, bit for bit, and its bytes against the least.

    Replicas cut batches, so that sums are taken in another order, and hundreds of steps make of that what they like:
    one process goes along their steps, each of its own from the same weights, and rounds otherwise in the last digits.
    """
    got, steps = merge(pool(case.ranks).run("tests.contest:run", case)), dict[str, float]()
    if case.ranks == case.ep_size:
        wanted = reference(case.reference())
    else:
        alone, steps = along(case, got["steps"])
        wanted = merge([alone])
        assert len(steps) > case.num_experts
    assert got["tables"] == wanted["tables"]
    for mine, theirs in zip(got["records"], wanted["records"], strict=True):
        assert [mine.get(k) for k in DECIDED] == [theirs.get(k) for k in DECIDED]
        assert mine["wire_bytes"] == mine["wire_bytes_min"]
    for name, value in (differences(got, wanted) | steps).items():
        assert value <= (STEP if name in steps else TOLERANCE if name.startswith("record") else 0.0), (name, value)


COVERING = covering(OPTIONS)


@pytest.mark.parametrize("case", marked(COVERING, case_of))
def test_every_layout_is_the_same_competition(pool: Callable[[int], Pool], case: Contest) -> None:
    check(pool, case)


def test_a_step_that_differs_is_seen(pool: Callable[[int], Pool]) -> None:
    """The judge judges: a loss of one step in the twelfth digit, a gradient in the eleventh."""
    case = case_of((2, 1), rounds=1)
    steps = merge(pool(2).run("tests.contest:run", case))["steps"]
    assert max(follow(case, steps)[1].values()) <= STEP
    when, last = steps["expert 2"][-1]
    loss, grads = last._replace(loss=last.loss * (1 + 3e-12)), last._replace(grads=last.grads * (1 + 1e-11))
    for wrong, name in ((loss, "loss"), (grads, "gradient")):
        found = follow(case, {**steps, "expert 2": [*steps["expert 2"][:-1], (when, wrong)]})[1]
        assert {n.split()[2] for n, value in found.items() if value > STEP} == {name}
    with pytest.raises(IndexError):  # and a step that was not taken
        follow(case, {**steps, "expert 2": steps["expert 2"][:-1]})


def test_the_covering_cases_cover_every_pair() -> None:
    assert wanted(OPTIONS) <= set().union(*(combined(row, 2) for row in COVERING))


TRIPLES = {name: OPTIONS[name] for name in ("layout", "num_experts", "start", "starved", "delivery", "placement")}
TRIPLES["score"] = ("fresh", "kept", "elbo", "oracle")


@pytest.mark.slow
@pytest.mark.parametrize("row", covering(TRIPLES, strength=3), ids=str)
def test_every_three_options_together_are_the_same_competition(pool: Callable[[int], Pool], row: Row) -> None:
    # Two rounds: what the first decides acts in the second.
    check(pool, case_of(rounds=2, epochs=1, **row))


# What acts in the cases above really acts.


@pytest.mark.parametrize("layout", [(2, 2), (3, 3), (4, 2)], ids=str)
def test_experts_move_with_all_that_is_theirs(pool: Callable[[int], Pool], layout: tuple[int, int]) -> None:
    case = case_of(layout, start="table", placement="load", score="kept", optimizer="clipped", num_experts=5)
    check(pool, case)
    first, *_ = homes = [r["homes"] for r in merged(pool, case)["records"] if "homes" in r]
    assert first != [list(Placement(5, *layout).experts_of(member)) for member in range(layout[1])]
    assert all(sorted(e for experts in home for e in experts) == list(range(5)) for home in homes)
    assert all(all(home) for home in homes)  # nobody is without an expert
    counts = COUNTS[5]
    assert max(sum(counts[e] for e in experts) for experts in first) == max(20, -(-45 // layout[1]))


def merged(pool: Callable[[int], Pool], case: Contest) -> dict[str, Any]:
    return merge(pool(case.ranks).run("tests.contest:run", case))


@pytest.mark.parametrize("score", ["elbo", "kept"])
def test_a_starved_expert_waits_or_begins_anew(score: str) -> None:
    asleep, anew, left = (
        reference(case_of((1, 1), start="table", score=score, rounds=1, starved=rule))
        for rule in ("freeze", "reseed", "none")
    )
    # Of 28, 14, 3 and 0 samples the last two are less than half of an even share. Freezing acts before the round.
    rounds = [r["records"][-1] for r in (asleep, anew, left)]
    assert [[loss is None for loss in r["expert_loss"]] for r in rounds] == [
        [False, False, True, True],
        [False, False, False, True],
        [False, False, False, True],
    ]
    assert [asleep["experts"][f"{e} steps"][0].item() for e in range(4)] == [2 * 3, 2 * 2, 0, 0]
    assert [left["experts"][f"{e} steps"][0].item() for e in range(4)] == [2 * 3, 2 * 2, 2, 0]
    assert anew["tables"] == left["tables"]  # after the last round nobody would train on a new split
    assert rounds[1]["starved"] == [e for e, count in enumerate(rounds[1]["counts"]) if count < 45 / 4 / 2]
    assert [record["starved_rule"] for record in rounds] == ["freeze", "none", "none"]


def test_an_expert_that_began_anew_is_trained_before_the_end() -> None:
    """It may get the very samples that it had, so that nothing moves: the run would end with one that knows nothing."""
    case = case_of((1, 1), start="table", score="oracle", starved="reseed")
    made = make_rounds(case, mesh_of(4, 1, 1), Wire(torch.device("cpu")))
    made.rules = replace(made.rules, stop_below=0.01)
    rounds = [record for record in records_of(made) if "round" in record]
    assert [record["changed"] == 0 for record in rounds] == [False, True, False]
    assert [record["starved"] for record in rounds] == [[3]] * 3
    assert [record["starved_rule"] for record in rounds] == ["reseed", "reseed", "none"]


def test_the_loss_is_a_mean_over_rows() -> None:
    first = reference(case_of((1, 1), start="table", rounds=1))["records"][0]
    rows, losses = COUNTS[4], first["expert_loss"]
    assert [loss is None for loss in losses] == [count == 0 for count in rows]
    assert first["loss"] == pytest.approx(
        sum(n * loss for n, loss in zip(rows, losses, strict=True) if n) / 45, rel=1e-12
    )


def test_reseeding_gives_new_weights_and_the_worst_samples() -> None:
    one, two = (
        reference(case_of((1, 1), start="table", score="oracle", starved="reseed", rounds=rounds)) for rounds in (1, 2)
    )
    first, second = (record for record in two["records"] if "round" in record)
    assert one["records"][-1]["counts"][3] == 0  # no class is left for the fourth expert
    assert first["starved"] == [3]
    assert first["counts"][3] == 12
    fresh = make_mixture(case_of((1, 1)), mesh_of(4, 1, 1), Wire(torch.device("cpu"))).make_expert(3, 2)
    assert two["experts"]["3 steps"][0].item() == 2 * 2  # two epochs of its 12 samples, from the first step on
    for name, begun in fresh.named_parameters():
        # Adam moves a weight by little more than its learning rate, 0.01, in a step.
        ended = two["experts"][f"3 expert/model/{name}"]
        assert (ended - begun).abs().max() < 0.05
        if name.endswith("weight"):  # biases all begin at 0
            assert (ended - one["experts"][f"3 expert/model/{name}"]).abs().max() > 0.1
    assert second["expert_loss"][3] is not None


def test_scores_are_shares_of_the_training_set() -> None:
    """exp(s_j) sums to 1 over all samples for each expert: Z is over the whole set, on any layout."""
    made = make_rounds(case_of((1, 1), score="fresh", rounds=1), mesh_of(4, 1, 1), Wire(torch.device("cpu")))
    kept: list[torch.Tensor] = []
    decide = made.scoring._decide
    made.scoring._decide = lambda scores, *rest: kept.append(scores) or decide(scores, *rest)  # type: ignore
    list(records_of(made))
    assert len(kept) == 2
    for scores_NE in kept:
        assert scores_NE.shape == (45, 4)
        torch.testing.assert_close(scores_NE.exp().sum(0), torch.ones(4).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("by_shares", [False, True])
@pytest.mark.parametrize("score", ["fresh", "normalised", "likelihood"])
def test_the_objective_with_shares_is_equation_3(score: str, by_shares: bool) -> None:
    """sum_j alpha_j KL(P_d^j || P_j) by a plain loop; where scores are log p_j, the classification likelihood."""
    made = make_rounds(case_of((1, 1), score=score, rounds=2), mesh_of(4, 1, 1), Wire(torch.device("cpu")))
    made.mixture.rules = made.rules = replace(made.rules, by_shares=by_shares)
    kept: list[tuple[torch.Tensor, Any]] = []
    decide = made.scoring._decide
    made.scoring._decide = lambda scores, homes, log_z, table, round: (  # type: ignore
        kept.append((scores, table)) or decide(scores, homes, log_z, table, round)
    )
    rounds = [(record, made.table) for record in records_of(made) if "round" in record]
    assert len(rounds) == len(kept) == 3
    for (record, table), (scores_NE, before_N) in zip(rounds, kept, strict=True):
        expert_N, total = table.expert_N.tolist(), 0.0
        before_E = np.bincount(range(4) if before_N is None or not by_shares else before_N, minlength=4)
        for j in range(4):
            own = [n for n, e in enumerate(expert_N) if e == j]
            for n in own:
                assert all(
                    scores_NE[n, j] + np.log(before_E[j]) >= scores_NE[n, i] + np.log(before_E[i]) - 1e-12
                    for i in range(4)
                    if before_E[i]
                )
                density = 1 / len(own) if made.rules.score.normalized else len(expert_N) / len(own)
                total += len(own) / len(expert_N) / len(own) * (math.log(density) - scores_NE[n, j].item())
        assert record["objective_with_shares"] == pytest.approx(total, rel=1e-10)
        assert record["objective_with_shares"] == pytest.approx(
            record["objective"] + record["share_entropy"], rel=1e-12
        )
        if record["objective_trained"] is not None and not by_shares:
            assert record["objective"] <= record["objective_trained"] + 1e-12


@pytest.mark.parametrize("score", ["fresh", "elbo", "likelihood"])
def test_blocks_only_bound_memory(score: str) -> None:
    whole, pieces = (reference(case_of((1, 1), score=score, block=block)) for block in (1000, 13))
    assert whole["tables"] == pieces["tables"]
    assert max(differences(whole, pieces).values()) <= TOLERANCE


def test_a_fixed_split_is_judged_as_it_is() -> None:
    report = reference(case_of((1, 1), score="fixed", start="split"))
    rounds = [record for record in report["records"] if "round" in record]
    assert [record["changed"] for record in rounds] == [0.0] * 3
    assert all(record["objective"] == record["objective_trained"] for record in rounds)
    assert len({tuple(table) for table in report["tables"]}) == 1


# Bytes, counted by hand.


@pytest.mark.parametrize("layout", [(2, 2), (3, 3), (4, 2)], ids=str)
def test_bytes_are_those_that_must_cross(pool: Callable[[int], Pool], layout: tuple[int, int]) -> None:
    case = case_of(layout, start="table", delivery="wire", score="kept", starved="freeze", rounds=1)
    report, (ranks, ep_size) = merged(pool, case), layout
    table, placement, row = skewed(4).expert_N, Placement(4, *layout), 16 + 8
    reads = np.repeat(np.arange(ranks), [len(share(45, rank, ranks)) for rank in range(ranks)])
    pretrain = [record["wire_bytes"] for record in report["records"] if "round" not in record]
    within = [np.array([p in placement.experts_of(m) for p in table]) for m in range(ep_size)]
    if ranks == ep_size:  # else a batch is shared among replicas: counted below by its total
        an_epoch = sum(int((within[rank] & (reads != rank)).sum()) for rank in range(ranks))
        assert pretrain == [row * an_epoch] * 2
        awake = sum(int((within[r] & (reads != r) & (table < 2)).sum()) for r in range(ranks))
        # One block of rows serves the three batches of the discriminators: batches 3 to 5 of 20, 20 and 5 samples.
        judged = 45 * (ranks - 1)
        scored = 45 * (ranks - 1)
        columns = sum((45 - len(share(45, p, ep_size))) * len(placement.experts_of(p)) for p in range(ep_size)) * 8
        assert report["records"][-1]["wire_bytes"] == row * (2 * awake + judged + scored) + columns
    assert all(record["wire_bytes"] == record["wire_bytes_min"] > 0 for record in report["records"])


def test_nothing_crosses_in_epochs_where_ranks_read_for_themselves(pool: Callable[[int], Pool]) -> None:
    report = merged(pool, case_of((2, 2), score="kept"))
    assert [r["wire_bytes"] for r in report["records"] if "round" not in r] == [0, 0]
    # A score for each sample that another rank decides, for each expert here.
    assert [r["wire_bytes"] for r in report["records"] if "round" in r] == [45 * 2 * 8] * 4
