"""One purpose a use: no block of the generator serves twice, whatever a run and its evaluation draw."""

from __future__ import annotations

import dataclasses
import itertools
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mixdist.competition import Competition, Discriminators, Elbo, Fixed, Likelihood, Random, Rounds, Score
from mixdist.data import Augment, Bananas, Blobs, Dataset, Digits, Epoch, Parabolas
from mixdist.data.order import shuffled_blocks
from mixdist.data.sources.splits import choose_splits, load_splits
from mixdist.evaluation.density import kernel_density
from mixdist.evaluation.evaluate import evaluate
from mixdist.experts import VAE, Modality
from mixdist.gates import Consistent, Softmax
from mixdist.mixtures import MMVAE, Context, Mixture, MoPoE, PoEMVAE, Soft, WeightedLoss
from mixdist.mixtures.context import Context as Maker
from mixdist.mixtures.ensemble import Ensemble
from mixdist.mixtures.routing import TopK
from mixdist.nets import MLP
from mixdist.noise import EVALUATION_PHASE, TRIAL_PHASE, Draw, Kind, Moment, Purpose, derive, draws, hashes, philox
from mixdist.parallel.wire import Wire
from mixdist.terms import Batch, Field
from mixdist.training.phases import Phase
from mixdist.training.trainer import Trainer
from mixdist.training.upcycled import perturb
from tests.parity import SEED, mesh_of

SPEC = {"x": Field((1, 4, 4), torch.uint8, 1 / 255), "label": Field((), torch.uint8, num_classes=3)}


class Blocks:
    """Every block of the generator that was drawn, with the place in the code that drew it."""

    def __init__(self) -> None:
        self.drawn: list[np.ndarray] = []
        self.places: list[str] = []

    def philox(self, counter: Any, key: Any) -> Any:
        words = PHILOX(counter, key)
        columns = torch.broadcast_tensors(*(torch.as_tensor(word) for word in (*counter, *key)))
        c0, c1, c2, c3, k0, k1 = (column.reshape(-1).numpy().astype(np.uint64) for column in columns)
        half = np.uint64(32)
        self.drawn.append(np.stack([k0 << half | k1, c0 << half | c1, c2 << half | c3], axis=1))
        codes = [(Path(frame.f_code.co_filename), frame.f_code.co_name) for frame, _ in traceback.walk_stack(None)]
        named = [f"{path.stem}.{name}" for path, name in codes if "mixdist" in path.parts and "noise" not in path.parts]
        self.places.append(" < ".join(named[:6]))
        return words

    def twice(self) -> list[str]:
        """Return the places that drew a block which was drawn before, with the place that drew it first."""
        if not self.drawn:
            return []
        names = itertools.product(Purpose, (TRIAL_PHASE,), range(3), Kind)
        trials = [k0 << 32 | k1 for k0, k1 in (derive(SEED, *name) for name in names)]
        blocks = np.concatenate(self.drawn)
        of = np.repeat(np.arange(len(self.drawn)), [len(part) for part in self.drawn])
        _, first, inverse = np.unique(blocks, axis=0, return_index=True, return_inverse=True)
        first_N = first[inverse.reshape(-1)]
        of_runs = ~np.isin(blocks[:, 0], np.array(trials, dtype=np.uint64))  # trials do the same thing several times
        again = np.flatnonzero((first_N != np.arange(len(blocks))) & of_runs)
        pairs = {(self.places[of[first_N[i]]], self.places[of[i]]) for i in again}
        return [f"{one} / {other}" for one, other in sorted(pairs)]


PHILOX = philox.philox


@contextmanager
def recorded() -> Iterator[Blocks]:
    """Record all that is drawn; no block may be drawn twice."""
    blocks = Blocks()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draws, "philox", blocks.philox)
        patch.setattr("mixdist.data.sources.digits.philox", blocks.philox)
        yield blocks
    assert blocks.drawn
    assert blocks.twice() == []


class Blocky(Dataset):
    """Samples in memory that have what those in shards have: an order by blocks, and augmentation."""

    in_memory = False  # type: ignore[assignment]

    def ordered(self, positions: Tensor, epoch: Epoch, batch_size: int) -> Tensor:
        return shuffled_blocks(positions, epoch, 4, 2, batch_size)

    def start(
        self, index: Tensor, epoch: Epoch | None = None, fields: Sequence[str] | None = None
    ) -> Callable[[], Batch]:
        rows = super().start(index, epoch, fields)()
        if epoch is not None and "x" in rows:
            rows["x"] = Augment(flip=True, shift=1)(rows["x"], rows["id"], epoch)
        return lambda: rows


def rows_of(first: int, count: int) -> Blocky:
    """Images whose halves tell classes apart."""
    ids = torch.arange(first, first + count)
    x = torch.randint(0, 256, (count, 1, 4, 4), generator=torch.Generator().manual_seed(first), dtype=torch.uint8)
    return Blocky({"id": ids, "x": x, "label": (ids % 3).to(torch.uint8)}, SPEC, "label")


TRAIN, TEST = rows_of(0, 45), rows_of(1000, 20)
make_expert = partial(VAE, latent=2, network=MLP([4]), likelihood="gaussian", mean="identity")


def evaluated(mixture: Mixture, pictures: bool) -> None:
    """Draw what is drawn of a trained mixture, once: figures, a kernel density, and pictures or a user's own samples.

    The last two are the same where the seed is: the samples of an expert have numbers.
    """
    evaluation = evaluate(mixture, TEST, 8, SEED, 25, TRAIN)
    assert isinstance(mixture, Ensemble)
    kernel_density(mixture, evaluation, TRAIN, Moment(SEED, EVALUATION_PHASE), 30)
    if pictures:
        mixture.pictures(TEST, evaluation, SEED)
    else:
        mixture.model([]).sample(20, 0, seed=SEED, observed=True)


def phase(batch_size: int, **options: Any) -> Phase:
    """Two epochs."""
    return Phase(2, batch_size, objective=WeightedLoss(), optimizer=torch.optim.Adam, **options)


def gate_of(spec: Any, num_experts: int) -> Consistent:
    return Consistent(spec, num_experts, partial(Softmax, noise=0.5), weight=1.0)


@pytest.mark.parametrize("routing", [None, TopK(2, 0.7)], ids=["dense", "top-2"])
def test_a_soft_mixture_draws_no_block_twice(routing: TopK | None) -> None:
    with recorded():
        mesh = mesh_of(3, 1, 1)
        mixture = Soft(gate_of, make_expert, 3, routing)
        mixture.setup(Context(SEED, torch.float32, SPEC, mesh, Wire(mesh.device)))
        for e, expert in mixture.bank.owned().items():
            perturb(expert, 0.01, SEED, e)
        phases = [phase(10), phase(7, accumulate=2)]
        mixture.tune(TRAIN, phase(45))
        trainer = Trainer(mixture, TRAIN, phases)
        while not trainer.finished:
            trainer.advance()
        trainer.end()
        evaluated(mixture, pictures=True)


@pytest.mark.parametrize(
    "kind", [partial(MMVAE, samples=3), partial(PoEMVAE, subsets=2), MoPoE], ids=["moe", "poe", "all"]
)
def test_a_mixture_of_modalities_draws_no_block_twice(kind: Callable[..., Any]) -> None:
    """Each family in training, and in figures with what is generated for them."""
    with recorded():
        mesh = mesh_of(2, 1, 1)
        own: dict[str, Any] = {"private": 2, "network": MLP([4]), "likelihood": "categorical"}
        mixture = kind(
            [partial(Modality, field="x", private=1, network=MLP([4])), partial(Modality, field="label", **own)]
        )
        mixture.setup(Context(SEED, torch.float32, SPEC, mesh, Wire(mesh.device)))
        mixture.tune(TRAIN, phase(45))
        trainer = Trainer(mixture, TRAIN, [phase(10), phase(7, accumulate=2)])
        while not trainer.finished:
            trainer.advance()
        trainer.end()
        evaluate(mixture, TEST, 8, SEED, 25, TRAIN)


def discriminators(**how: Any) -> Callable[[], Score]:
    return lambda: Discriminators(MLP([4]), batch_size=13, **how)


SCORES: dict[str, Callable[[], Score]] = {
    "fresh": discriminators(epochs=2),
    "kept": discriminators(batches=3, fresh=False),
    "elbo": Elbo,
    "likelihood": lambda: Likelihood(num_samples=25),
    "random": Random,
    "fixed": Fixed,
}


@pytest.mark.parametrize(
    ("score", "start", "pretrained"),
    [
        ("fresh", "all", True),
        ("kept", "split", False),
        ("fresh", "split", False),
        ("kept", "all", True),
        ("elbo", "all", True),
        ("likelihood", "split", True),
        ("random", "split", True),
        ("fixed", "split", False),
    ],
)
def test_a_competition_draws_no_block_twice(score: str, start: str, pretrained: bool) -> None:
    made: Counter[tuple[Purpose, int, int]] = Counter()
    make = Maker.make

    def counted(self: Maker, call: Any, purpose: Purpose, number: int = 0, round: int = 0, key: str = "") -> Any:
        made[purpose, number, round] += 1
        return make(self, call, purpose, number, round)

    with recorded(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Maker, "make", counted)
        mesh, rules = mesh_of(3, 1, 1), {"starved": "reseed", "starved_below": 1.0, "rounds": 3, "block": 16}
        if score in ("elbo", "kept"):
            rules |= {"temperature": 2.0, "anneal_rounds": 3}
        mixture = Competition(make_expert, 3, score=SCORES[score](), start=start, **rules)
        mixture.setup(Context(SEED, torch.float32, SPEC, mesh, Wire(mesh.device)))
        rounds = Rounds(mixture, TRAIN, [*([phase(10)] if pretrained else []), phase(7)])
        restarted = 0
        while not rounds.finished:
            record = rounds.advance().record
            restarted += bool(record and record.get("starved") and record["starved_rule"] == "reseed")
        rounds.end()
        assert restarted or score == "fixed"
        evaluated(mixture, pictures=start == "split")
    if score in ("fresh", "kept"):
        made[Purpose.DISCRIMINATOR, 0, 0] = 1  # others are made to see that they can be
    made[Purpose.WEIGHTS, 0, 0] = 1  # one is made twice, to see that it is the same
    assert max(made.values()) == 1  # modules made anew have weights of their own


@pytest.mark.parametrize("source", [Bananas(5, 60, 20), Blobs(rows=60), Parabolas(60, 20), Digits()], ids=type)
def test_a_data_set_draws_no_block_twice(source: Any) -> None:
    with recorded() as blocks:
        ids = load_splits(source, 0.2).train.ids.numpy()
        choose_splits("here", {"train": ids}, "train", None, 0.2)
    assert len(blocks.drawn) >= 2


def test_a_block_that_serves_twice_is_seen() -> None:
    """The judge judges: also where the same rows are drawn among others, and in another order."""
    draw = Draw(SEED, Purpose.POSTERIOR)

    def two() -> None:
        with recorded():
            draw.normal(torch.arange(5), [0, 1], (9,))
            draw.normal(torch.tensor([8, 4]), [2, 1], (3,))

    with pytest.raises(AssertionError, match="assert"):
        two()
    with recorded():
        draw.normal(torch.arange(5), [0, 1], (9,))
        draw.normal(torch.tensor([8, 4]), [2], (3,))
        dataclasses.replace(draw, step=1).normal(torch.arange(5), [0, 1], (9,))
        draw.uniform(torch.arange(5), [0, 1], (9,))
        hashes(SEED, 0, 0, torch.arange(5), purpose=Purpose.POSTERIOR)


def test_every_kind_of_every_purpose_has_keys_of_its_own() -> None:
    names = list(itertools.product(Purpose, (0, 1, EVALUATION_PHASE), (0, 1), Kind))
    assert len({derive(SEED, *name) for name in names}) == len(names)


def test_normal_and_uniform_numbers_of_one_draw_are_independent() -> None:
    ids = torch.arange(4000)
    for purpose in Purpose:
        draw = Draw(SEED, purpose)
        normal, uniform = (kind(ids, [0], (2,), torch.float64)[0] for kind in (draw.normal, draw.uniform))
        radius = torch.exp(-normal.square().sum(1) / 2)  # which is the uniform number that a pair is made of
        series = torch.stack([radius, uniform[:, 0], uniform[:, 1], normal[:, 0], normal[:, 1]]).numpy()
        correlation = np.corrcoef(series) - np.eye(5)
        assert np.abs(correlation[:, 1:3]).max() < 5 / np.sqrt(len(ids)), purpose
