"""One training run in miniature, on any layout: what every parity test compares.

`run` is called on every rank with a `Case`; `merge` joins what the ranks report; `differences` holds two reports
against each other by the rule max|a - b| <= tolerance * max|b| for each tensor (absolutely where b is 0).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mixdist.data import Dataset, Loader
from mixdist.engines import FSDP, DeepSpeed, Engine, EngineFactory, Native
from mixdist.evaluation.evaluate import evaluate
from mixdist.experts import VAE, Centroid, Classifier, Component, Compute, Expert, Modality, Regressor, Silent
from mixdist.gates import DMVAE, GMM, Consistent, Gate, LabelOracle, LatentGMM, Softmax, Uniform, VaDE
from mixdist.mixtures import (
    DHSIC,
    MMD,
    MMVAE,
    MVAE,
    W2,
    Context,
    ExpertEvaluation,
    ExpertStart,
    MakeExpert,
    Masks,
    Mixture,
    MoPoE,
    MutualPosterior,
    PCAStart,
    PoEMVAE,
    Soft,
)
from mixdist.mixtures.multimodal import Multimodal
from mixdist.mixtures.objectives import (
    Balance,
    GateLoss,
    KLBalance,
    Objective,
    SoftMinLoss,
    VarianceBalance,
    WeightedLoss,
)
from mixdist.mixtures.routing import TopK
from mixdist.nets import MLP, Conv, Deconv, LinearPaths, Text
from mixdist.noise import Draw, Moment, Purpose
from mixdist.parallel.launch import Launch
from mixdist.parallel.mesh import Mesh, Placement
from mixdist.parallel.wire import Wire
from mixdist.stats import Step, Warmup
from mixdist.terms import Batch, Field, Gating, Spec
from mixdist.training import Upcycled
from tests.two_stage import TwoStage

SEED = 11
NUM_ROWS = 45


@dataclass(frozen=True)
class Case:
    """What is compared. The layout, the execution and the accumulation must not matter; all else names a problem."""

    ranks: int = 1
    ep_size: int = 1
    execution: str = "loop"
    accumulate: int = 1
    num_experts: int = 4
    family: str = "soft"
    objective: str = "weighted"
    balance: str = "variance"
    gate: str = "softmax"
    expert: str = "bernoulli"
    routing: str = "dense"
    way: str = "back"
    prefetch: bool = False
    memory: str = "whole"
    trains: str = "both"
    batch_size: int = 16
    optimizer: str = "adam"
    dtype: str = "float64"
    engine: str = "native"
    steps: int = 20

    def reference(self) -> Case:
        """The same problem in one process, by the plainest way."""
        plain = {"execution": "loop", "accumulate": 1, "way": "back", "prefetch": False, "memory": "whole"}
        return replace(self, ranks=1, ep_size=1, **plain)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return "-".join(str(v) for v in vars(self).values())


class Starved(Softmax):
    """A learned gate that never chooses expert 1: it has rows, but no responsibility for any."""

    def forward(self, rows: Batch, eps: Tensor | None) -> Gating:
        logits_BE = self.net(rows["x"].flatten(1))
        mask_E = torch.zeros(logits_BE.shape[1], dtype=logits_BE.dtype)
        mask_E[1] = -torch.inf
        return Gating(torch.log_softmax(logits_BE + mask_E, dim=-1))


class Tied(Softmax):
    """A gate with ties: its logits are whole numbers, and for one row in three all equal."""

    def forward(self, rows: Batch, eps: Tensor | None) -> Gating:
        logits_BE = 3 * self.net(rows["x"].flatten(1))
        # Rounded, with the gradient of what was rounded; else nothing would train it.
        logits_BE = logits_BE + (logits_BE.round() - logits_BE).detach()
        return Gating(torch.log_softmax(logits_BE * (rows["id"] % 3 > 0).to(logits_BE)[:, None], dim=-1))


class Noisy(Softmax):
    """A gate with noise and a loss of its own, as VaDE's and DMVAE's have."""

    noise_shape = (3,)

    def forward(self, rows: Batch, eps: Tensor | None) -> Gating:
        assert eps is not None
        logits_BE = self.net(rows["x"].flatten(1)) + 0.3 * eps.sum(1, keepdim=True) ** 2
        log_resp_BE = torch.log_softmax(logits_BE * (1 + 0.1 * eps[:, :1]), dim=-1)
        return Gating(log_resp_BE, 0.1 * logits_BE.square().sum(1))


@functools.cache
def data() -> Dataset:
    """45 rows: 4x4 images as uint8, a real target, and a label of three classes."""
    draw, ids = Draw(SEED, Purpose.DATA), torch.arange(NUM_ROWS) + 1000
    x = (draw.uniform(ids, [0], (1, 4, 4))[0] * 255).round().to(torch.uint8)
    label = (draw.uniform(ids, [1], ())[0] * 3).floor().to(torch.uint8)
    y = draw.normal(ids, [2], (2,), torch.float32)[0]
    spec = {
        "x": Field((1, 4, 4), torch.uint8, 1 / 255),
        "y": Field((2,), torch.float32),
        "label": Field((), torch.uint8, num_classes=3),
    }
    return Dataset({"id": ids, "x": x, "y": y, "label": label}, spec, "label")


@functools.cache
def views(num: int, absent: bool) -> Dataset:
    """45 rows of up to five views: an image, real numbers, a text with padding, an image, a label; some are absent."""
    draw, ids = Draw(SEED, Purpose.DATA, step=1), torch.arange(NUM_ROWS) + 1000

    def numbers(shape: tuple[int, ...], most: int, dtype: torch.dtype, key: int) -> Tensor:
        return (draw.uniform(ids, [key], shape)[0] * most).floor().to(dtype)

    spec = {
        "x0": Field((1, 4, 4), torch.uint8, 1 / 255),
        "x1": Field((2,), torch.float32),
        "x2": Field((5,), torch.int16, num_classes=6),
        "x3": Field((3, 2, 3), torch.uint8, 1 / 255),
        "x4": Field((), torch.uint8, num_classes=3),
    }
    rows = {
        "x0": numbers((1, 4, 4), 256, torch.uint8, 0),
        "x1": draw.normal(ids, [1], (2,), torch.float32)[0],
        "x2": numbers((5,), 6, torch.int16, 2),
        "x3": numbers((3, 2, 3), 256, torch.uint8, 3),
        "x4": numbers((), 3, torch.uint8, 4),
    }
    kept = list(spec)[:num]
    rows, spec = {"id": ids, **{name: rows[name] for name in kept}}, {name: spec[name] for name in kept}
    if absent:
        present = numbers((num,), 2, torch.uint8, 5)
        present[present.sum(1) == 0] = 1
        rows, spec = {**rows, "present": present}, {**spec, "present": Field((num,), torch.uint8)}
    return Dataset(rows, spec, "x4" if num == 5 else None)  # what is generated is judged by it


def rows_of(case: Case) -> Dataset:
    """What a case trains on; of several modalities, the balance says whether some are absent."""
    return views(case.num_experts, case.balance == "absent") if case.family in MULTIMODAL else data()


def make_expert(case: Case, spec: Spec) -> Expert:
    if case.expert == "silent":
        return Silent(spec)
    if case.expert == "conv":
        return VAE(spec, 3, Conv([2, 3], True, "group"), "logistic", "channel", kl_warmup=10)
    if case.expert == "classifier":
        return Classifier(spec, MLP([7], "tanh"), target="label")
    if case.expert == "regressor":
        return Regressor(spec, MLP([7], "tanh"), "gaussian", "learned")
    if case.expert == "laplace":
        return VAE(spec, 3, MLP([8], "elu"), "laplace", "pixel", "identity", beta=0.7, samples=3)
    if case.expert == "linear":
        return VAE(spec, 2, LinearPaths(MLP([8], "tanh"), 0.25), "gaussian", "decoder", "identity", floor=0.05)
    if case.expert == "gaussian":
        return VAE(
            spec,
            3,
            MLP([8], "tanh"),
            "gaussian",
            "learned",
            kl_warmup=Warmup(epochs=1.5, cycles=2, rise=0.7),
            free_bits=0.05,
        )
    return VAE(spec, 3, MLP([8], "sigmoid"), "bernoulli")


def annealed(spec: Spec, num_experts: int) -> Gate:
    return Softmax(spec, num_experts, MLP([6], "tanh"), 2.0, "x", 0.5, 0.3, 0.0, anneal_steps=15)


def vade(spec: Spec, num_experts: int) -> Gate:
    return VaDE(spec, num_experts, 2, MLP([7], "tanh"), test_samples=2)


MODELS = {
    "gmm": functools.partial(GMM, covariance="diag"),
    "gmm-full": functools.partial(GMM, covariance="full"),
    "vade": vade,
    "vade-consistent": functools.partial(Consistent, gate=vade, shift=1.0),
    "dmvae": lambda spec, k: DMVAE(spec, k, 2, MLP([7], "tanh"), likelihood="gaussian"),
    "dmvae-bound": lambda spec, k: DMVAE(spec, k, 2, Conv([3]), MLP([5]), "logistic", relaxed=False),
}
"""Gates that are models."""


def make_gate(case: Case, spec: Spec) -> Gate:
    if case.gate == "oracle":
        return LabelOracle(spec, case.num_experts, "label")
    if case.gate == "uniform":
        return Uniform(spec, case.num_experts)
    if case.gate == "annealed":
        return annealed(spec, case.num_experts)
    if case.gate == "consistent":
        return Consistent(spec, case.num_experts, annealed, weight=2.0, shift=1.0, warmup_steps=5)
    if case.gate in MODELS:
        return MODELS[case.gate](spec, case.num_experts)
    if case.gate in ("latents", "latents-all"):
        learns: Any = "all" if case.gate == "latents-all" else "clusters"
        return LatentGMM(spec, case.num_experts, 2, MLP([7], "tanh"), temperature=3.0, learns=learns)
    if case.gate == "conv":
        return Softmax(spec, case.num_experts, Conv([3]))
    kind = {"softmax": Softmax, "starved": Starved, "noisy": Noisy, "tied": Tied}[case.gate]
    return kind(spec, case.num_experts, MLP([6], "tanh"))


def make_routing(case: Case) -> TopK | None:
    """ "top2" is dropless, "top2-tight" has a capacity below an even load, "top2-raw" keeps its weights as they are."""
    if case.routing == "dense":
        return None
    name, _, how = case.routing.partition("-")
    return TopK(int(name[3:]), 0.7 if how == "tight" else None, renormalise=how != "raw")


COMPUTE = {"whole": Compute(), "pieces": Compute(micro_batch=2), "recompute": Compute(micro_batch=3, recompute=True)}
COMPUTE |= {"again": Compute(recompute=True), "bf16": Compute(bf16=True)}


def make_objective(case: Case) -> Objective:
    balances: dict[str, Balance | None] = {"none": None, "variance": VarianceBalance(0.1), "kl": KLBalance(2.0, 10)}
    if case.objective == "tempered":
        annealed: dict[str, Any] = {"final_temperature": 0.5, "anneal_steps": 12}
        return SoftMinLoss(balances[case.balance], temperature=3.0, **annealed)
    if case.objective == "sharpened":
        return WeightedLoss(balances[case.balance], entropy_bonus=-0.3, entropy_steps=12)
    kind = {"weighted": WeightedLoss, "mixture": SoftMinLoss, "gate": GateLoss}[case.objective]
    return kind(balances[case.balance])


def make_experts(case: Case) -> MakeExpert | list[MakeExpert]:
    """One for all; or, for "unlike", experts that read other fields, of which some have no bound."""
    if case.expert != "unlike":
        return lambda spec: make_expert(case, spec)
    makers: list[MakeExpert] = [
        lambda spec: make_expert(replace(case, expert="bernoulli"), spec),
        lambda spec: VAE(spec, 2, MLP([5], "tanh"), "gaussian", "learned", "identity", field="y"),
        lambda spec: make_expert(replace(case, expert="classifier"), spec),
        lambda spec: make_expert(replace(case, expert="regressor"), spec),
        lambda spec: Centroid(spec),
    ]
    return makers[: case.num_experts]


@functools.cache
def mesh_of(num_experts: int, ranks: int, ep_size: int) -> Mesh:
    rank = dist.get_rank() if ranks > 1 else 0
    return Mesh(Placement.plan(num_experts, ranks, ep_size), Launch(rank, ranks), torch.device("cpu"), 60.0)


PENALTIES = {
    "none": None,
    "dhsic": DHSIC(20.0),
    "root": DHSIC(2.0, bandwidth="normal", root=True),
    "mmd": MMD(3.0),
    "w2": W2(0.5),
    "mutual": MutualPosterior(2.0),
}


def make_mvae(case: Case) -> MVAE:
    """A mixture with one decoder; its masks are named as the gate, its penalty as the balance."""
    conv = case.expert == "conv"
    kind, rates, off = [*case.gate.split("-"), "", ""][:3]
    options: dict[str, Any] = {"off_above": 0.303, "off_after": 3} if off else {}
    masks = functools.partial(Masks, kind=kind, rates=rates, rate=0.3, kl="sigmoid", **options) if rates else None
    network, features = (Conv([2, 3], activation="tanh"), 8) if conv else (MLP([7], "tanh"), 6)
    return MVAE(
        functools.partial(Component, latent=2, features=features, network=network, label="label" if conv else None),
        case.num_experts,
        Deconv([2, 2, 2], [3, 2], activation="tanh") if conv else MLP([8], "tanh"),
        masks=masks,
        penalty=PENALTIES[case.balance],
        kl="sum" if case.objective == "sum" else "mean",
        execution=case.execution,  # type: ignore[arg-type]
        compute=COMPUTE[case.memory],
    )


MULTIMODAL = {"mmvae": MMVAE, "poe": PoEMVAE, "mopoe": MoPoE}


def make_multimodal(case: Case) -> Multimodal:
    """Several modalities: the gate names gradient and bound, the expert q, the objective private latents."""
    private = 2 if case.objective == "private" else 0
    own: list[dict[str, Any]] = [
        {"network": MLP([6], "tanh"), "scale": "learned"},
        {"network": MLP([5], "tanh"), "likelihood": "gaussian", "mean": "identity"},
        {"network": Text(3, [4]), "likelihood": "categorical", "padding": 0},
        {"network": Conv([3]), "likelihood": "bernoulli"},
        {"network": MLP([4], "tanh"), "likelihood": "categorical"},
    ]
    experts = [functools.partial(Modality, field=f"x{m}", private=private, **own[m]) for m in range(case.num_experts)]
    if case.family == "mopoe":
        return MoPoE(experts, latent=3, samples=2, learn_prior=True)
    if case.family == "poe":
        return PoEMVAE(experts, latent=3, samples=2, subsets=2, beta=0.7)
    gradient, _, bound = case.gate.partition("-")
    how: dict[str, Any] = {"posterior": case.expert, "gradient": gradient, "objective": bound}
    return MMVAE(experts, latent=3, samples=3, learn_prior=case.num_experts != 3, **how)


def start_of(case: Case) -> ExpertStart | None:
    if case.trains == "decoder":
        return Upcycled("nowhere", trains=["decoder"])
    return PCAStart(clusters="own") if case.expert == "linear" else None


def make_mixture(case: Case, mesh: Mesh, wire: Wire) -> Mixture:
    spec, dtype = rows_of(case).spec, getattr(torch, case.dtype)
    if case.family in MULTIMODAL:
        mixture: Mixture = make_multimodal(case)
    elif case.family == "two-stage":
        mixture = TwoStage(case.num_experts)
    elif case.family == "mvae":
        mixture = make_mvae(case)
    else:
        mixture = Soft(
            lambda spec, num_experts: make_gate(case, spec),
            make_experts(case),
            case.num_experts,
            make_routing(case),
            case.way == "ahead",
            case.prefetch,
            case.execution,  # type: ignore[arg-type]
            COMPUTE[case.memory],
            start_of(case),
        )
    mixture.setup(Context(SEED, dtype, spec, mesh, wire))
    if case.trains != "decoder":  # there is no run that they could start from
        mixture.start_experts(rows_of(case))
    return mixture


# A second engine is judged by the same cases: name it here, and run them with Case.engine.
ENGINES: dict[str, EngineFactory] = {
    "native": Native,
    "sharded": functools.partial(Native, shard="optimizer"),
    "offloaded": functools.partial(Native, offload="optimizer"),
    "bf16": functools.partial(Native, bf16_weights=True),
    "bf16-sharded": functools.partial(Native, bf16_weights=True, shard="optimizer"),
    "bf16-offloaded": functools.partial(Native, bf16_weights=True, offload="optimizer"),
    "bf16-sharded-offloaded": functools.partial(Native, bf16_weights=True, shard="optimizer", offload="optimizer"),
    "fsdp": functools.partial(FSDP, unit_bytes=1),
    "fsdp-whole": FSDP,
    "fsdp-offloaded": functools.partial(FSDP, offload="optimizer", unit_bytes=100),
    "sharded-offloaded": functools.partial(Native, shard="optimizer", offload="optimizer"),
    **{f"zero{stage}": functools.partial(DeepSpeed, zero=stage) for stage in (0, 1, 2)},
    "zero1-offloaded": functools.partial(DeepSpeed, zero=1, offload="optimizer", round_robin_gradients=True),
    "zero2-offloaded": functools.partial(DeepSpeed, zero=2, offload="optimizer"),
    "zero2-buckets": functools.partial(
        DeepSpeed, zero=2, overlap_comm=True, reduce_bucket_size=100, use_multi_rank_bucket_allreduce=False
    ),
}


def make_engine(case: Case, mixture: Mixture, mesh: Mesh, wire: Wire) -> Engine:
    make = ENGINES[case.engine]
    if case.optimizer == "clipped-sgd":
        return make(mixture.parts, mesh, wire, lambda p: torch.optim.SGD(p, 0.01, momentum=0.9), clip_norm=0.5)
    if case.optimizer == "scheduled-adamw":
        schedule = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=30)
        return make(mixture.parts, mesh, wire, lambda p: torch.optim.AdamW(p, 1e-2), schedule)
    return make(mixture.parts, mesh, wire, lambda p: torch.optim.Adam(p, 1e-2))


def run(case: Case) -> dict[str, Any]:
    """Train for a few steps on this rank; report the first step's gradients, every step's figures, and the end."""
    mesh = mesh_of(case.num_experts, case.ranks, case.ep_size)
    wire = Wire(mesh.device)
    mixture = make_mixture(case, mesh, wire)
    for owned in mixture.parts.owned():
        if case.trains not in ("both", "decoder", "gate" if owned.expert is None else "experts"):
            owned.module.requires_grad_(False)
    engine = make_engine(case, mixture, mesh, wire)
    loader = Loader(rows_of(case), case.batch_size, SEED, 0, mesh.rank, mesh.world_size)
    report: dict[str, Any] = {"speaks": {}, "copies": {}, "steps": [], "bytes": [], "margin": 1.0}
    upcoming = loader.batch(0, 0)
    for step in range(case.steps):
        for owned in mixture.parts.owned():
            getattr(owned.module, "anneal", lambda step: None)(Step(step, Fraction(step, loader.num_batches)))
        wire.meter.reset()
        shard, upcoming = upcoming, loader.batch(*divmod(step + 1, loader.num_batches))
        engine.zero_grad()
        objective = WeightedLoss() if case.family in ("mvae", *MULTIMODAL) else make_objective(case)
        objective.anneal(step)
        ahead = upcoming if case.prefetch else None
        with engine.accumulating():
            outcome = mixture.backward(shard, objective, Moment(SEED, 0, step), case.accumulate, ahead)
        totals = engine.step(outcome, step)
        report["steps"].append(figures(totals.outcome, totals.grad_norm))
        report["bytes"].append((totals.meter["wire_bytes"], totals.meter["wire_bytes_min"]))
        if step == 0:
            keep(report, mixture, mesh, "gradient", gradient)
    engine.ready()
    keep(report, mixture, mesh, "weight", lambda p: p)
    if isinstance(mixture, MVAE):
        report["decided"] = mixture.masks.on()
    if isinstance(mixture, Soft):
        judge(report, case, mixture)
    if isinstance(mixture, (MVAE, Multimodal)):
        rows = rows_of(case)  # by 14: the last 3 leave a rank of four without rows
        report["figures"] = evaluate(mixture, rows, 14, SEED, num_samples=30, shares_from=rows).figures
    return report


def figures(outcome: Any, grad_norm: float) -> dict[str, Tensor]:
    # Parts are one tensor: near balance the balance term is a small difference of large numbers.
    parts = {"parts": torch.stack(list(outcome.parts.values()))}
    return {"loss": outcome.loss, **outcome.sums, **parts, "grad_norm": torch.tensor(grad_norm, dtype=torch.float64)}


def gradient(parameter: Tensor) -> Tensor | None:
    """Return a parameter's gradient; one that is cut over ranks comes together, which every rank calls for."""
    grad = parameter.grad
    if not parameter.requires_grad or (grad is None and hasattr(parameter, "full_tensor")):
        return torch.zeros(parameter.shape, dtype=parameter.dtype)
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad  # type: ignore[union-attr, no-any-return]


def keep(report: dict[str, Any], mixture: Mixture, mesh: Mesh, kind: str, get: Any) -> None:
    """Keep a tensor of every parameter under its global name, as the owner's or as a copy's; None is left out."""
    for owned in mixture.parts.owned():
        speaks = mesh.speaks_for(owned.expert)
        for name, parameter in owned.module.named_parameters():
            if (value := get(parameter)) is not None:
                report["speaks" if speaks else "copies"][f"{kind} {owned.name} {name}"] = value.detach().clone()


def judge(report: dict[str, Any], case: Case, mixture: Soft) -> None:
    """Evaluate, and keep how far the gate was from deciding otherwise."""
    evaluation = evaluate(mixture, data(), case.batch_size, SEED, num_samples=3 if case.gate in MODELS else None)
    assert isinstance(evaluation, ExpertEvaluation)
    report["decided"] = evaluation.expert_N.tolist()
    report["figures"] = evaluation.figures
    if case.gate not in ("oracle", "uniform", "noisy", "tied", *MODELS):
        with torch.no_grad():
            values = mixture.values(data().rows, mixture.gate.fields)
            best = mixture.gate.eval()(values, None).log_resp_BE.exp().sort(dim=1, descending=True).values
        chosen = mixture.routing.k if mixture.routing else 1
        report["margin"] = (best[:, :chosen] - best[:, 1 : chosen + 1]).min().item()


def merge(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Join what ranks report: every parameter once, every copy held against it, bit for bit."""
    merged = reports[0] | {"speaks": {}}
    for report in reports:
        merged["speaks"] |= report["speaks"]
    for rank, report in enumerate(reports):
        for name, copy in report["copies"].items():
            assert torch.equal(copy, merged["speaks"].setdefault(name, copy)), f"rank {rank}'s copy of {name} differs"
        for mine, first in zip(report["steps"], reports[0]["steps"], strict=True):
            assert all(torch.equal(mine[name], first[name]) for name in first), f"rank {rank} has other figures"
    return merged


def tensors(report: dict[str, Any]) -> dict[str, Tensor]:
    """Everything of a report that is compared by the rule."""
    steps = {f"step {i} {name}": value for i, step in enumerate(report["steps"]) for name, value in step.items()}
    judged = {f"evaluation {k}": torch.tensor(v, dtype=torch.float64) for k, v in report.get("figures", {}).items()}
    return {**report["speaks"], **steps, **judged}


def differences(got: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """Give max|a - b| / max|b| of each tensor, max|a - b| where b is 0."""
    a, b = tensors(got), tensors(wanted)
    assert a.keys() == b.keys(), f"not in both: {sorted(a.keys() ^ b.keys())}"
    result = {}
    for name in b:
        assert a[name].shape == b[name].shape, name
        assert b[name].isfinite().all(), f"{name} is not finite"
        largest = b[name].abs().max().item()
        result[name] = (a[name] - b[name]).abs().max().item() / (largest or 1.0)
    return result
