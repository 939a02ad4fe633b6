"""What is made in Python is checked as a config's is: one line with key, value and what was expected."""

from __future__ import annotations

import collections.abc
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau

from mixdist.arguments import check_argument
from mixdist.competition import Competition, Discriminators, Elbo, Rounds
from mixdist.data import Blobs, Dataset
from mixdist.experts import VAE, Compute
from mixdist.gates import Softmax
from mixdist.mixtures import MMVAE, MVAE, ClusterStart, Context, KLBalance, MoPoE, PoEMVAE, Soft, SoftMinLoss, TopK
from mixdist.nets import MLP
from mixdist.parallel.wire import Wire
from mixdist.terms import Field, Spec
from mixdist.training import Upcycled
from mixdist.training.phases import Phase
from mixdist.training.trainer import Trainer
from tests.errors import error_of
from tests.parity import mesh_of

SPEC: Spec = {"x": Field((6,), torch.float32)}
MAKE = lambda spec: VAE(spec, 2, MLP([4]))  # noqa: E731
MADE = VAE(SPEC, 2, MLP([4]))


def rows() -> Dataset:
    return Dataset({"id": torch.arange(40), "x": torch.rand(40, 6)}, SPEC)


def soft(**options: Any) -> Soft:
    return Soft(**{"gate": Softmax, "expert": MAKE, "num_experts": 3, **options})


def hard(**options: Any) -> Competition:
    return Competition(**{"expert": MAKE, "num_experts": 3, "score": Elbo(), "rounds": 1, **options})


def program(mixture: Any = None, data: Any = None, phases: Any = None, **phase: Any) -> Trainer | Rounds:
    """Return what would train, of wrong parts."""
    mixture = soft() if mixture is None else mixture
    mixture.setup(Context(7, torch.float32, SPEC, mesh_of(3, 1, 1), Wire(torch.device("cpu"))))
    made = [Phase(**{"epochs": 1, "batch_size": 16, **phase})] if phases is None else phases
    return (Rounds if isinstance(mixture, Competition) else Trainer)(mixture, rows() if data is None else data, made)


FIXTURES: dict[str, tuple[Callable[[], Any], str]] = {
    "half an expert": (lambda: soft(num_experts=2.5), "mixture.num_experts (2.5) whole number"),
    "experts as text": (lambda: soft(num_experts="3"), "mixture.num_experts ('3') whole number"),
    "true experts": (lambda: soft(num_experts=True), "mixture.num_experts (True) whole number"),
    "routing as a number": (lambda: soft(routing=2), "mixture.routing (2) TopK None"),
    "a word that is none": (lambda: soft(execution="lop"), "mixture.execution ('lop') auto, loop or stacked"),
    "options as a dict": (lambda: soft(compute={"bf16": True}), "mixture.compute (a dict) Compute"),
    "a gate that is made": (lambda: soft(gate=Softmax(SPEC, 3)), "mixture.gate (a Softmax) class or a function"),
    "an expert that is made": (lambda: soft(expert=MADE), "mixture.expert (a VAE) its class"),
    "experts that are made": (
        lambda: soft(expert=[MADE] * 3, num_experts=None),
        "mixture.expert (a list) a list, each",
    ),
    "a path": (lambda: soft(expert="mixdist.experts.VAE"), "mixture.expert ('mixdist.experts.VAE') class"),
    "a switch as text": (lambda: soft(one_way="yes"), "mixture.one_way ('yes') True or False"),
    "a start as text": (lambda: soft(expert_start="pca"), "mixture.expert_start ('pca') ExpertStart"),
    "half a k": (lambda: TopK(1.5), "TopK's k (1.5) whole number"),  # type: ignore[arg-type]
    "half a row": (lambda: Compute(micro_batch=2.5), "compute.micro_batch (2.5)"),  # type: ignore[arg-type]
    "half a round": (lambda: hard(rounds=1.5), "mixture.rounds (1.5) whole number"),
    "a start that is none": (lambda: hard(start="x"), "mixture.start ('x') all, split, table or clusters"),
    "a delivery that is none": (lambda: hard(delivery="post"), "mixture.delivery ('post') read or wire"),
    "a rule that is none": (lambda: hard(strated="all"), "mixture.strated start, table"),
    "the class of a score": (lambda: hard(score=Elbo), "mixture.score (the class Elbo) Score object"),
    "epochs of a discriminator": (lambda: Discriminators(epochs=1.5), "Discriminators' epochs (1.5)"),  # type: ignore[arg-type]
    "no list": (lambda: MMVAE(MADE), "mixture.expert (a VAE) list"),  # type: ignore[arg-type]
    "a gradient": (lambda: MMVAE([MAKE], gradient="x"), "mixture.gradient ('x') dreg"),  # type: ignore[arg-type, list-item]
    "half a subset": (lambda: PoEMVAE([MAKE], subsets=0.5), "mixture.subsets (0.5)"),  # type: ignore[arg-type, list-item]
    "a latent as text": (lambda: MoPoE([MAKE], latent="3"), "mixture.latent ('3')"),  # type: ignore[arg-type, list-item]
    "a sum": (lambda: MVAE(kl="total"), "mixture.kl ('total') mean or sum"),  # type: ignore[arg-type]
    "a temperature": (lambda: SoftMinLoss(temperature="1"), "SoftMinLoss's temperature ('1')"),  # type: ignore[arg-type]
    "a balance": (lambda: SoftMinLoss(balance=0.1), "SoftMinLoss's balance (0.1) Balance"),  # type: ignore[arg-type]
    "a weight": (lambda: KLBalance("1"), "KLBalance's weight ('1') number"),  # type: ignore[arg-type]
    "clusters": (lambda: ClusterStart("x"), "mixture.expert_start.clusters ('x') kmeans"),  # type: ignore[arg-type]
    "a run": (lambda: Upcycled(3), "mixture.expert_start.run (3) text"),  # type: ignore[arg-type]
}
PHASES: dict[str, tuple[dict[str, Any], str]] = {
    "no epoch": ({"epochs": 0}, "train.epochs (0) above 0"),
    "half an epoch": ({"epochs": 1.5}, "train.epochs (1.5) whole number"),
    "epochs as text": ({"epochs": "2"}, "train.epochs ('2') whole number"),
    "no row": ({"batch_size": 0}, "train.batch_size (0) above 0"),
    "half a row": ({"batch_size": 2.5}, "train.batch_size (2.5)"),
    "no part": ({"accumulate": 0}, "train.accumulate (0) above 0"),
    "trains all": ({"trains": "all"}, "train.trains ('all') both, gate or experts"),
    "stage": ({"stage": None}, "train.stage (None) text"),
    "a norm below 0": ({"clip_norm": -1.0}, "train.clip_norm (-1.0) above 0"),
    "a norm that is no number": ({"clip_norm": float("nan")}, "train.clip_norm (nan) above 0"),
    "an average": ({"ema": "0.9"}, "train.ema ('0.9')"),
    "an optimiser as text": ({"optimizer": "Adam"}, "train.optimizer ('Adam') class or a function"),
    "an optimiser that is made": ({"optimizer": torch.optim.Adam([torch.zeros(1)])}, "train.optimizer (an Adam) class"),
    "LBFGS": ({"optimizer": torch.optim.LBFGS}, "train.optimizer closure element torch.optim.Adam"),
    "a schedule's argument": ({"schedule": ExponentialLR}, "train.schedule gamma"),
    "a schedule by a metric": ({"schedule": ReduceLROnPlateau}, "train.schedule metric"),
}


@pytest.mark.parametrize("name", FIXTURES)
def test_an_argument_of_another_kind_is_told(name: str) -> None:
    make, words = FIXTURES[name]
    error_of(make, *words.split())


@pytest.mark.parametrize("mixture", [soft, hard], ids=["Soft", "Competition"])
@pytest.mark.parametrize("name", PHASES)
def test_a_phase_of_python_is_checked_as_a_config_s_is(name: str, mixture: Callable[[], Any]) -> None:
    options, words = PHASES[name]
    error_of(lambda: program(mixture(), **options), *words.split())


@pytest.mark.parametrize("mixture", [soft, hard], ids=["Soft", "Competition"])
def test_what_a_program_is_made_of_is_told(mixture: Callable[[], Any]) -> None:
    for phases, words in (
        ([], "phases (none) Phase"),
        ([None], "train (None) a Phase"),
        ([{}, {}], "pretrain[0] a dict"),
    ):
        error_of(lambda p=phases: program(mixture(), phases=p), *words.split())  # type: ignore[misc]
    for data in (3, torch.rand(40, 6), Blobs(), Blobs().load()):
        error_of(lambda d=data: program(mixture(), data=d), f"dataset (a {type(data).__name__})", "Dataset")
    kind = Rounds if isinstance(mixture(), Competition) else Trainer
    error_of(lambda: kind(mixture(), rows(), [Phase(1)]), "setup(context)")


def test_a_competition_has_its_default_score_in_python() -> None:
    assert isinstance(Competition(MAKE, 3).rules.score, Discriminators)


def test_what_fits_an_annotation_is_left_alone() -> None:
    """Numbers of NumPy, whole numbers for real ones, functions, classes, tuples; what says nothing takes anything."""
    for hint, value in (
        (int, np.int64(3)),
        (float, 3),
        (float, np.float32(0.5)),
        (float | None, None),
        (Literal["a", "b"], "b"),
        (collections.abc.Callable[[int], Any], partial(int, 3)),
        (collections.abc.Callable[[int], Any], nn.Linear),
        (list[int] | int, [1, 2]),
        (collections.abc.Sequence[int], (1, 2)),
        (nn.Module, nn.Identity()),
        (Any, object()),
        (dict[str, int], {"a": 1}),
    ):
        check_argument("it", value, hint)
    for hint, value in (
        (list[int], "12"),
        (list[int], [1, "2"]),
        (bool, 1),
        (Literal["a"], ["a"]),
        (dict[str, int], []),
    ):
        error_of(lambda h=hint, v=value: check_argument("it", v, h), "it (")  # type: ignore[misc]
