"""Row-keyed noise: published vectors, the laws of a pure function, and the distributions it should have."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from mixdist.noise import Draw, Kind, Purpose, derive, permutation, weights_seed
from mixdist.noise.philox import compiled, philox, rounds
from tests.errors import error_of

ONES = 0xFFFFFFFF
VECTORS = [  # Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
IDS = torch.arange(100)
DRAW = Draw(seed=7, purpose=Purpose.POSTERIOR, phase=1, step=5)


def test_philox_gives_the_published_words_and_broadcasts_counters_and_keys() -> None:
    for counter, key, words in VECTORS:
        c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
        for keys in (key, (torch.tensor(key[0]), torch.tensor(key[1]))):
            assert tuple(word.item() for word in philox((c0, c1, c2, c3), keys)) == words
    counters = torch.tensor([vector[0] for vector in VECTORS]).unbind(1)
    k0, k1 = torch.tensor([vector[1] for vector in VECTORS]).unbind(1)
    words = torch.stack(philox(counters, (k0[:, None], k1[:, None])))  # type: ignore[arg-type]
    assert (words.shape, words.dtype) == ((4, 3, 3), torch.int64)
    assert words.diagonal(dim1=1, dim2=2).T.tolist() == [list(vector[2]) for vector in VECTORS]


def test_derive_is_philox_of_the_names() -> None:
    seed = 2**64 - 3
    for purpose, first in ((Purpose.GATE, Kind.NORMAL), (Purpose.ORDER, Kind.HASH), (Purpose.AUGMENT, Kind.UNIFORM)):
        for kind in (None, *Kind):  # 0 for the kind that a purpose had before there were kinds
            counter = tuple(torch.tensor(word) for word in (int(purpose), 4, 9, 0 if kind in (None, first) else kind))
            words = [word.item() for word in philox(counter, (seed & ONES, seed >> 32))]  # type: ignore[arg-type]
            assert derive(seed, purpose, 4, 9, kind) == (words[0], words[1])


def test_keys_and_weight_seeds_are_all_different() -> None:
    names = list(itertools.product((0, 1, 2**32, 2**64 - 1), Purpose, (0, 1, 2), range(20)))
    assert len({derive(*name) for name in names}) == len(names)
    seeds = [weights_seed(seed, purpose, e) for seed in (0, 1, 2**63) for purpose in Purpose for e in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    for seed in seeds:
        torch.Generator().manual_seed(seed)


def test_purposes_keep_their_numbers() -> None:
    names = "WEIGHTS POSTERIOR GATE ORDER PRIOR DATA IMPORTANCE RIVAL OBSERVATION DISCRIMINATOR CHANCE BLOCKS AUGMENT "
    names += "SPLIT MOSAIC DEQUANTISE START MIXING MASK DECODER PRIVATE SUBSET JUDGE CLONE BINARISE EXPLORATION"
    assert {purpose.name: purpose.value for purpose in Purpose} == {n: i + 1 for i, n in enumerate(names.split())}


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    error_of(lambda: Draw(seed, Purpose.PRIOR).normal(IDS, [0], (2,)), f"seed ({seed})")
    error_of(lambda: permutation(seed, 0, 0, 3), f"seed ({seed})")


@pytest.mark.parametrize("kind", ["normal", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_is_drawn_the_same_in_any_company(kind: str, dtype: torch.dtype) -> None:
    draw = getattr(DRAW, kind)
    whole = draw(IDS, range(6), (3, 2), dtype)
    assert whole.shape == (6, 100, 3, 2)
    assert whole.dtype == dtype
    assert whole.is_contiguous()
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(IDS[order], range(6), (3, 2), dtype), whole[:, order])
    assert torch.equal(draw(IDS, [4, 1], (3, 2), dtype), whole[[4, 1]])
    for start, length, expert in ((0, 1, 0), (17, 2, 5), (31, 7, 3), (99, 1, 2)):
        alone = draw(IDS[start : start + length], [expert], (3, 2), dtype)
        assert torch.equal(alone[0], whole[expert, start : start + length])
    longer = draw(IDS, range(6), (11,), dtype)
    assert torch.equal(longer[:, :, :6], whole.flatten(2))


def test_rows_of_many_steps_are_drawn_as_step_by_step() -> None:
    parts = [(5, IDS[:3]), (6, IDS), (2**32 + 1, IDS[:7])]
    ids, steps = torch.cat([ids for _, ids in parts]), torch.cat([torch.full_like(ids, step) for step, ids in parts])
    alone = [Draw(7, Purpose.POSTERIOR, 1, step).normal(ids, [0, 3], (10,)) for step, ids in parts]
    assert torch.equal(DRAW.normal(ids, [0, 3], (10,), steps_R=steps), torch.cat(alone, dim=1))


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_empty_and_scalar_shapes(kind: str) -> None:
    draw = getattr(DRAW, kind)
    assert draw(IDS[:0], [0, 1], (4,)).shape == (2, 0, 4)
    assert draw(IDS, [0, 1], (3, 0)).shape == (2, 100, 3, 0)
    assert draw(IDS, [], (4,)).shape == (0, 100, 4)
    scalar = draw(IDS, [0, 1], ())
    assert scalar.shape == (2, 100)
    assert torch.equal(scalar, draw(IDS, [0, 1], (1,))[..., 0])


def test_the_numbers_are_those_of_the_formula() -> None:
    sample, step, expert = 2**40 + 3, 2**32 + 9, 2
    counter = tuple(torch.tensor(word) for word in (1, 3, 2**8, 9))
    kinds = Kind.UNIFORM, Kind.NORMAL
    keys = [derive(11, Purpose.DATA, 1, expert, kind) for kind in kinds]
    u, v = ([(word.item() + 0.5) / 2**32 for word in philox(counter, key)] for key in keys)  # type: ignore[arg-type]
    draw, ids = Draw(11, Purpose.DATA, 1, step), torch.tensor([sample])
    assert draw.uniform(ids, [expert], (8,), torch.float64)[0, 0, 4:].tolist() == u
    expected = []
    for a, b in ((v[0], v[1]), (v[2], v[3])):
        radius = math.sqrt(-2 * math.log(a))
        expected += [radius * math.cos(2 * math.pi * b), radius * math.sin(2 * math.pi * b)]
    normal = draw.normal(ids, [expert], (8,), torch.float64)[0, 0, 4:]
    torch.testing.assert_close(normal, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_precisions_see_the_same_numbers(kind: str) -> None:
    draw = getattr(DRAW, kind)
    exact = draw(IDS, range(4), (50,), torch.float64)
    assert torch.equal(draw(IDS, range(4), (50,)), exact.float())
    torch.testing.assert_close(draw(IDS, range(4), (50,), torch.bfloat16).double(), exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_uniform_stays_inside_the_open_interval(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    edges = torch.tensor([0, ONES])[:, None, None]
    monkeypatch.setattr(Draw, "_words", lambda *_: (edges, edges, edges, edges))
    numbers = DRAW.uniform(IDS[:1], [0, 1], (4,), dtype)
    assert (numbers > 0).all()
    assert (numbers < 1).all()
    assert DRAW.normal(IDS[:1], [0, 1], (4,), dtype).isfinite().all()


@pytest.mark.parametrize("sources", ["rows", "experts", "numbers"])
def test_kolmogorov_and_smirnov(sources: str) -> None:
    rows, experts, numbers = {"rows": (40000, 1, 1), "experts": (10, 4000, 1), "numbers": (10, 1, 4000)}[sources]
    draw = Draw(3, Purpose.PRIOR)
    normal = draw.normal(torch.arange(rows), range(experts), (numbers,), torch.float64).flatten().numpy()
    uniform = draw.uniform(torch.arange(rows), range(experts), (numbers,), torch.float64).flatten().numpy()
    assert stats.kstest(normal, "norm").pvalue > 1e-3
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    assert abs(normal.mean()) < 5 / math.sqrt(len(normal))
    assert abs(normal.var() - 1) < 5 * math.sqrt(2 / len(normal))


def _normals(seed: int, purpose: Purpose, phase: int, step: int, first_id: int, expert: int) -> Tensor:
    ids = torch.arange(first_id, first_id + 2000)
    return Draw(seed, purpose, phase, step).normal(ids, [expert], (10,), torch.float64).flatten()


def _uncorrelated(numbers: Tensor) -> None:
    """Check series (streams, n) against 5 / sqrt(n), five standard deviations of a correlation."""
    correlation = np.corrcoef(numbers.numpy()) - np.eye(len(numbers))
    assert np.abs(correlation).max() < 5 / math.sqrt(numbers.shape[1])


def test_streams_are_uncorrelated() -> None:
    # Every two streams differ in one name at least.
    base: tuple[int, ...] = (0, Purpose.POSTERIOR, 0, 0, 0, 0)
    names = [base]
    seeds, purposes, phases = [1, 2**32, 2**63], list(Purpose)[2:], [1, 2]
    steps, first_ids, experts = [1, 2, 2**31], [2000, 2**32, 2**40], [1, 2, 3]
    changes: list[Sequence[int]] = [seeds, purposes, phases, steps, first_ids, experts]
    for place, others in enumerate(changes):
        names += [(*base[:place], other, *base[place + 1 :]) for other in others]
    samples = torch.stack([_normals(*name) for name in names])  # type: ignore[arg-type]
    _uncorrelated(samples)
    _uncorrelated(samples.square())


def test_neighbouring_rows_and_numbers_are_uncorrelated() -> None:
    numbers = DRAW.normal(torch.arange(20000), [0], (12,), torch.float64)[0]
    _uncorrelated(numbers.T)
    for lag in (1, 2, 100):
        _uncorrelated(torch.stack([numbers[:-lag].flatten(), numbers[lag:].flatten()]))


def test_both_halves_of_an_id_count() -> None:
    ids = torch.tensor([0, 1, 2**31, 2**32, 2**32 + 1, 2**33, 2**62, 2**63 - 1])
    numbers = DRAW.uniform(ids, [0], (), torch.float64)[0]
    assert len(numbers.unique()) == len(ids)


@pytest.mark.parametrize("size", [0, 1, 2, 1797, 70000])
def test_a_permutation_holds_each_position_once(size: int) -> None:
    order = permutation(3, 0, 0, size)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(size))
    assert torch.equal(order, permutation(3, 0, 0, size))


def test_permutations_differ_by_seed_phase_and_epoch() -> None:
    names = [(0, 0, 0), (1, 0, 0), (2**40, 0, 0), (0, 1, 0), (0, 2, 0), (0, 0, 1), (0, 0, 2)]
    _uncorrelated(torch.stack([*(permutation(*name, 2000) for name in names), torch.arange(2000)]))


def test_a_permutation_does_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = permutation(5, 1, 2, 1000)
    monkeypatch.setattr("mixdist.noise.draws._CHUNK", 7)
    assert torch.equal(permutation(5, 1, 2, 1000), whole)


def test_every_order_is_as_likely() -> None:
    firsts = [tuple(permutation(seed, 0, epoch, 3).tolist()) for seed in range(60) for epoch in range(50)]
    counts = [firsts.count(order) for order in itertools.permutations(range(3))]
    assert sum(counts) == 3000
    assert stats.chisquare(counts).pvalue > 1e-3


# One operator in place of 120, for CUDA devices.


def refusing(graph: torch.fx.GraphModule, _: Sequence[Any]) -> Any:
    raise RuntimeError("no Triton")


def miscounting(graph: torch.fx.GraphModule, _: Sequence[Any]) -> Any:
    return lambda *inputs: [graph(*inputs)[0] + 1, *graph(*inputs)[1:]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_rounds_that_cannot_be_compiled_or_have_other_bits_stay_as_they_are() -> None:
    with pytest.warns(UserWarning, match="noise is not compiled on cpu .*no Triton"):
        assert compiled(torch.device("cpu"), refusing) is rounds
    assert compiled(torch.device("cpu"), miscounting) is rounds
    assert compiled(torch.device("cpu"), "eager") is not rounds


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's compiler calls what torch warns of
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here, which torch's needs on a CPU")
def test_compiled_rounds_have_the_same_bits() -> None:
    made = compiled(torch.device("cpu"))
    assert made is not rounds
    for experts, rows, blocks in [(3, 17, 2), (1, 1, 1), (5, 8, 3), (2, 100, 16)]:
        for step in (0, 5, ONES):
            words = torch.randint(0, ONES + 1, (4, experts, rows), generator=torch.Generator().manual_seed(step))
            counter = (torch.arange(blocks), words[0][..., None], words[1][..., None], step)
            key = (words[2, :, :1, None], words[3, :, :1, None])
            found, wanted = made(counter, key), rounds(counter, key)  # type: ignore[arg-type]
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), (experts, rows, blocks, step)
