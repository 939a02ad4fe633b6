"""The table of hard assignment, and what is decided about it: pure functions."""

from __future__ import annotations

import io
import json
from itertools import product

import numpy as np
import pytest

from mixdist.competition.history import in_words, table_files
from mixdist.competition.placement import load_balanced
from mixdist.competition.table import Assignment, reseeded, starved, winners


@pytest.mark.parametrize(("num_samples", "num_experts"), [(1000, 7), (12, 12), (5, 1), (600, 300)])
def test_a_uniform_split_is_even(num_samples: int, num_experts: int) -> None:
    table = Assignment.uniform(num_samples, num_experts, "data", seed=3)
    assert len(table) == num_samples
    assert table.counts_E.max() - table.counts_E.min() <= 1
    assert table.counts_E.sum() == num_samples
    assert table.share_E.sum() == pytest.approx(1)
    assert table.expert_N.dtype == (np.uint8 if num_experts <= 256 else np.uint16)
    places = np.concatenate([table.positions(e).numpy() for e in range(num_experts)])
    assert sorted(places) == list(range(num_samples))


def test_a_uniform_split_is_random_and_belongs_to_the_seed() -> None:
    one, again, other = (Assignment.uniform(3000, 3, "data", seed) for seed in (0, 0, 1))
    assert one.changed(again) == 0
    assert abs(one.changed(other) - 2 / 3) < 0.05
    # Neighbours are as likely in one part as any two samples: chi-squared of 9 cells, at most 30 in 1 of 5,000 tables.
    pairs = np.bincount(one.expert_N[:-1].astype(int) * 3 + one.expert_N[1:], minlength=9)
    assert ((pairs - 2999 / 9) ** 2 / (2999 / 9)).sum() < 30


def test_a_table_comes_back() -> None:
    table = Assignment.of(np.arange(50) % 5, 5, "data", round=1)
    about = json.loads(json.dumps(table.describe()))
    again = Assignment.read("t", table.to_bytes(), about, "data", 50, 5)
    assert again.round == 1
    assert again.describe() == table.describe()
    assert again.changed(table) == 0
    assert about["counts"] == [10] * 5


def test_a_table_is_left_complete_with_what_it_is() -> None:
    table = Assignment.uniform(50, 5, "data", 0)
    files = table_files(table)
    assert sorted(files) == ["assignments/round-0000.json", "assignments/round-0000.npy"]
    found = np.load(io.BytesIO(files["assignments/round-0000.npy"]), allow_pickle=False)
    assert np.array_equal(found, table.expert_N)
    assert json.loads(files["assignments/round-0000.json"]) == table.describe()


def test_ties_go_to_the_lowest_expert() -> None:
    scores = np.array([[1.0, 1.0, 1.0], [0.0, 2.0, 2.0], [-np.inf, -np.inf, 3.0], [0.0, -0.0, -1.0]])
    assert winners(scores).tolist() == [0, 1, 2, 0]
    assert winners(np.zeros((0, 3))).tolist() == []
    assert winners(np.array([[0.0, np.inf]])).tolist() == [1]
    with pytest.raises(ValueError, match=r"^the score of expert 2 is not a number for some samples: lower"):
        winners(np.array([[0.0, 1.0, np.nan]]))
    with pytest.raises(ValueError, match=r"^every expert's score is minus infinity for some samples: lower"):
        winners(np.array([[0.0, 1.0], [-np.inf, -np.inf]]))


def test_few_is_less_than_a_part_of_an_even_share() -> None:
    counts = np.array([50, 0, 10, 9, 31])  # an even share is 20
    assert starved(counts, 0.5) == [1, 3]
    assert starved(counts, 0.0) == []
    assert starved(np.array([5, 5]), 1.0) == []


def test_the_worst_samples_are_dealt_in_turn() -> None:
    best = np.array([5.0, -1.0, 3.0, -1.0, 0.0, 7.0, 8.0, 9.0])
    table = reseeded(np.zeros(8, dtype=np.int64), best, [1, 3], 4)
    # Two each: of the four worst, equal ones by place, the first and third go to expert 1.
    assert table.tolist() == [0, 1, 3, 3, 1, 0, 0, 0]
    # Never more than half of all, however many are starved_experts.
    assert (reseeded(np.zeros(8, dtype=np.int64), best, [1, 2, 3], 4) > 0).sum() == 4
    assert reseeded(np.zeros(8, dtype=np.int64), best, [1, 2, 3], 4).tolist() == [0, 1, 1, 2, 3, 0, 0, 0]


def makespan(load: np.ndarray, placed: list[list[int]]) -> float:
    return max(sum(load[e] for e in experts) for experts in placed)


@pytest.mark.parametrize("num_members", [1, 2, 3, 4])
def test_placement_is_within_a_third_of_the_best(num_members: int) -> None:
    generator = np.random.default_rng(num_members)
    for num_experts in range(num_members, 8):
        load = generator.integers(0, 30, num_experts).astype(float)
        placed = load_balanced(load, num_members)
        assert sorted(e for experts in placed for e in experts) == list(range(num_experts))
        assert all(experts == sorted(experts) for experts in placed)
        assert all(placed)  # nobody without an expert, even where loads are 0
        ways = product(range(num_members), repeat=num_experts)
        best = min(np.bincount(way, load, num_members).max() for way in ways)
        assert makespan(load, placed) <= (4 / 3 - 1 / (3 * num_members)) * best + 1e-9  # Graham 1969


def test_the_longest_goes_first() -> None:
    assert load_balanced(np.array([1.0, 5.0, 4.0, 3.0, 3.0]), 2) == [[1, 4], [0, 2, 3]]
    assert load_balanced(np.ones(5), 2) == [[0, 2, 4], [1, 3]]
    assert load_balanced(np.zeros(3), 3) == [[0], [1], [2]]


def test_a_round_in_words() -> None:
    record = {"round": 3, "counts": [5, 0], "changed": 0.25, "objective": -1.5, "objective_rose": True}
    line = in_words({**record, "starved": [1], "starved_rule": "freeze"})
    told = "round 3: 5 0 rows, 25.00% moved, objective -1.5000 (it rose in training); expert 1 is starved"
    assert line == f"{told} and does not train"
    first = {**record, "changed": None, "objective": None, "objective_rose": False, "starved": []}
    assert in_words({**first, "starved_rule": "none"}) == "round 3: 5 0 rows"
    again = in_words({**first, "starved": [0], "starved_rule": "reseed"})
    assert again == "round 3: 5 0 rows; expert 0 is starved and starts anew with the samples modelled worst"
    at_the_end = in_words({**first, "starved": [0], "starved_rule": "none"})
    assert at_the_end == "round 3: 5 0 rows; expert 0 is starved"
