"""What is made in Python is checked as a config's is: one line with key, value and what was expected."""

from __future__ import annotations

import collections.abc
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau

import mixdist.data
import mixdist.experts
import mixdist.gates
import mixdist.nets
from mixdist.arguments import check_argument
from mixdist.competition import Competition, Discriminators, Elbo, Rounds
from mixdist.data import Augment, Blobs, Dataset, Digits, Pairs, Shards, Source
from mixdist.experts import VAE, Compute, Expert
from mixdist.gates import GMM, Consistent, Gate, Softmax, VaDE
from mixdist.mixtures import MMVAE, MVAE, ClusterStart, Context, KLBalance, MoPoE, PoEMVAE, Soft, SoftMinLoss, TopK
from mixdist.nets import MLP, Network
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
IDS, X = torch.arange(4), torch.rand(4, 6)
Y = Field((), torch.uint8, num_classes=2)
PARTS: dict[str, tuple[Callable[[], Any], str]] = {
    "a latent as text": (lambda: VAE(SPEC, "2"), "VAE's latent ('2') whole number"),  # type: ignore[arg-type]
    "half a latent": (lambda: VAE(SPEC, 2.5), "VAE's latent (2.5) whole number"),  # type: ignore[arg-type]
    "the class of a network": (lambda: VAE(SPEC, 2, MLP), "VAE's network (the class MLP) Network"),  # type: ignore[arg-type]
    "a layer": (lambda: VAE(SPEC, 2, nn.Linear(6, 2)), "VAE's network (a Linear) Network None: give one"),  # type: ignore[arg-type]
    "a likelihood": (lambda: VAE(SPEC, likelihood="gausian"), "VAE's likelihood ('gausian') gaussian, laplace"),  # type: ignore[arg-type]
    "a scale": (lambda: VAE(SPEC, scale="x"), "VAE's scale ('x') a number or learned"),  # type: ignore[arg-type]
    "a mean": (lambda: VAE(SPEC, mean="x"), "VAE's mean ('x') sigmoid or identity"),  # type: ignore[arg-type]
    "no spec": (lambda: VAE(None, 2), "VAE's spec (None) Mapping"),  # type: ignore[arg-type]
    "a temperature": (lambda: Softmax(SPEC, 3, temperature="1"), "Softmax's temperature ('1')"),  # type: ignore[arg-type]
    "a covariance": (lambda: GMM(SPEC, 3, covariance="full "), "GMM's covariance ('full ') diag or full"),  # type: ignore[arg-type]
    "a start": (lambda: GMM(SPEC, 3, start="EM"), "GMM's start ('EM') none or em"),  # type: ignore[arg-type]
    "a latent of a gate": (lambda: VaDE(SPEC, 3, latent="x"), "VaDE's latent ('x')"),  # type: ignore[arg-type]
    "a gate in a gate": (lambda: Consistent(SPEC, 3, Softmax(SPEC, 3)), "Consistent's gate (a Softmax) its class"),  # type: ignore[arg-type]
    "a width": (lambda: MLP(3), "MLP's hidden (3) a list"),  # type: ignore[arg-type]
    "a width as text": (lambda: MLP(["a"]), "MLP's hidden (a list) whole number"),  # type: ignore[list-item]
    "an activation": (lambda: MLP([3], "rellu"), "MLP's activation ('rellu') relu"),  # type: ignore[arg-type]
    "rows as text": (lambda: Blobs(rows="9"), "Blobs' rows ('9') whole number"),  # type: ignore[arg-type]
    "half a row": (lambda: Blobs(rows=2.5), "Blobs' rows (2.5) whole number"),  # type: ignore[arg-type]
    "a root": (lambda: Shards(3), "Shards' root (3) text"),  # type: ignore[arg-type]
    "an order": (lambda: Shards("x", order="random"), "Shards' order ('random') blocks or full"),  # type: ignore[arg-type]
    "sources as a list": (lambda: Pairs([Digits(), Digits()]), "Pairs' sources (a list) dict"),  # type: ignore[arg-type]
    "a source as text": (lambda: Pairs({"a": "x", "b": Digits()}), "Pairs' sources (a dict) Source"),  # type: ignore[dict-item]
    "a flip": (lambda: Augment(flip="yes"), "augment.flip ('yes') True or False"),  # type: ignore[arg-type]
    "no rows": (lambda: Dataset(None, SPEC), "rows (None) dict"),  # type: ignore[arg-type]
    "no spec of rows": (lambda: Dataset({"id": IDS, "x": X}, None), "spec (None) Mapping"),  # type: ignore[arg-type]
    "names in one word": (lambda: Dataset({"id": IDS, "y": IDS % 2}, {"y": Y}, "y", "ab"), "class_names ('ab') tuple"),  # type: ignore[arg-type]
    "densities in a list": (
        lambda: Dataset({"id": IDS, "x": X}, SPEC, log_density_N=[0.0] * 4),
        "log_density_N Tensor",
    ),  # type: ignore[arg-type]
    "a scale as text": (
        lambda: Dataset({"id": IDS, "x": X}, {"x": Field((6,), torch.float32, scale="1")}),  # type: ignore[arg-type]
        "field 'x': scale ('1') number",
    ),
    "half a class": (
        lambda: Dataset({"id": IDS, "y": IDS.byte() % 2}, {"y": Field((), torch.uint8, num_classes=2.5)}),  # type: ignore[arg-type]
        "field 'y': num_classes (2.5) whole number",
    ),
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


@pytest.mark.parametrize(("make", "words"), [*FIXTURES.values(), *PARTS.values()], ids=[*FIXTURES, *PARTS])
def test_an_argument_of_another_kind_is_told(make: Callable[[], Any], words: str) -> None:
    error_of(make, *words.split())


@pytest.mark.parametrize(
    "package", [mixdist.data, mixdist.experts, mixdist.gates, mixdist.nets], ids=lambda one: one.__name__
)
def test_every_constructor_of_ours_checks_its_arguments(package: Any) -> None:
    """Nothing is left out: each class that a config can name refuses an object for its last argument with a type."""
    bases = (Source, Gate, Expert, Network)
    for kind in (getattr(package, name) for name in package.__all__):
        if not inspect.isclass(kind) or not issubclass(kind, bases) or kind in bases or "__init__" not in vars(kind):
            continue
        named = inspect.signature(kind).parameters
        given: dict[str, Any] = {"spec": SPEC, "num_experts": 3}
        given = {name: given.get(name) for name in named}
        if last := [name for name in named if name not in ("spec", "num_experts")][-1:]:
            line = error_of(partial(kind, **{**given, last[0]: object()}))
            assert line.startswith(f"{kind.__name__}'"), line


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
