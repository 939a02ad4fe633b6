"""What a user writes keeps its contracts, or is told in one line which class and method does not, and what to do.

Faults are checked in this process on a mixture in miniature, some by the command on two ranks; what keeps its contracts
trains as if nobody had looked.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixdist
from mixdist.competition import Competition, Discriminators, Elbo, Rounds, Score
from mixdist.data import Dataset, Samples, Source
from mixdist.data.sources.splits import load_splits
from mixdist.evaluation.evaluate import evaluate
from mixdist.experts import VAE, Compute, Expert
from mixdist.gates import Gate, Softmax
from mixdist.mixtures import Balance, Context, KLBalance, Mixture, Model, Objective, Soft, TopK, WeightedLoss
from mixdist.mixtures.covered import is_covered, is_packaged
from mixdist.nets import MLP, Network
from mixdist.nets.likelihood import Likelihood
from mixdist.noise import Purpose
from mixdist.parallel.wire import Wire
from mixdist.terms import Batch, ExpertTerms, Field, Gating, Outcome, Posterior, Spec
from mixdist.training.loop import Loop
from mixdist.training.phases import Phase
from mixdist.training.trainer import Trainer
from tests.errors import error_of
from tests.launch import SMALL, changed, complaint, here, together, write_config
from tests.parity import mesh_of
from tests.two_stage import TwoStage

NUM_ROWS, NUM_EXPERTS, SIZE = 40, 3, 6
SPEC: Spec = {"x": Field((SIZE,), torch.float32), "y": Field((), torch.uint8, num_classes=3)}


def rows(low: float = 0.0, high: float = 1.0, num_rows: int = NUM_ROWS) -> Dataset:
    generator = torch.Generator().manual_seed(3)
    x = low + (high - low) * torch.rand(num_rows, SIZE, generator=generator)
    ids = torch.arange(num_rows) + 500
    return Dataset({"id": ids, "x": x, "y": (ids % 3).to(torch.uint8)}, SPEC, "y")


# Gates.


class Plain(Gate):
    """A softmax of a linear map; each fault changes what it returns."""

    def __init__(self, spec: Spec, num_experts: int) -> None:
        super().__init__()
        self.net = nn.Linear(SIZE, num_experts)

    def forward(self, rows: Batch, eps: Tensor | None) -> Any:
        return self.out(rows, self.net(rows["x"]))

    def out(self, rows: Batch, logits: Tensor) -> Any:
        return Gating(torch.log_softmax(logits, dim=1))


def gate(out: Callable[..., Any], **members: Any) -> dict[str, Any]:
    """A mixture with a gate of its own, by what it makes of its logits."""
    return {"gate": type("Mine", (Plain,), {"out": out, **members})}


class Normed(Plain):
    def __init__(self, spec: Spec, num_experts: int) -> None:
        super().__init__(spec, num_experts)
        self.net = nn.Sequential(nn.Linear(SIZE, 4), nn.BatchNorm1d(4), nn.Linear(4, num_experts))


class Dropping(Plain):
    def __init__(self, spec: Spec, num_experts: int) -> None:
        super().__init__(spec, num_experts)
        self.net = nn.Sequential(nn.Linear(SIZE, 4), nn.Dropout(0.2), nn.Linear(4, num_experts))


class Frozen(Plain):
    def __init__(self, spec: Spec, num_experts: int) -> None:
        super().__init__(spec, num_experts)
        self.requires_grad_(False)


class Spare(Plain):
    def __init__(self, spec: Spec, num_experts: int) -> None:
        super().__init__(spec, num_experts)
        self.spare = nn.Parameter(torch.zeros(2))


class Counting(Plain):
    def __init__(self, spec: Spec, num_experts: int) -> None:
        super().__init__(spec, num_experts)
        self.register_buffer("count", torch.zeros(()))

    def out(self, rows: Batch, logits: Tensor) -> Any:
        self.count += 1
        return super().out(rows, logits)


class Remembering(Plain):
    calls = 0

    def out(self, rows: Batch, logits: Tensor) -> Any:
        self.calls += 1
        return super().out(rows, logits * self.calls)


class Listed(Plain):
    """Layers that are no modules of its own."""

    def __init__(self, spec: Spec, num_experts: int) -> None:
        super().__init__(spec, num_experts)
        self.net = nn.Identity()
        self.layers = {"all": [nn.Linear(SIZE, 4), nn.Linear(4, num_experts)]}

    def forward(self, rows: Batch, eps: Tensor | None) -> Any:
        for layer in self.layers["all"]:
            rows = {"x": layer(rows["x"])}
        return self.out(rows, rows["x"])


class HalfListed(Plain):
    def __init__(self, spec: Spec, num_experts: int) -> None:
        super().__init__(spec, num_experts)
        self.more = [nn.Linear(num_experts, num_experts)]

    def out(self, rows: Batch, logits: Tensor) -> Any:
        return super().out(rows, self.more[0](logits))


class Shifted(Plain):
    def __init__(self, spec: Spec, num_experts: int) -> None:
        super().__init__(spec, num_experts)
        self.shift = torch.zeros(num_experts, requires_grad=True)

    def out(self, rows: Batch, logits: Tensor) -> Any:
        return super().out(rows, logits + self.shift)


SHIFT = torch.zeros(NUM_EXPERTS, requires_grad=True)


def made(change: Callable[[Plain], Any]) -> dict[str, Any]:
    """A mixture with a gate that does something else as it is made."""

    def __init__(self: Any, spec: Spec, num_experts: int) -> None:
        Plain.__init__(self, spec, num_experts)
        change(self)

    return {"gate": type("Mine", (Plain,), {"__init__": __init__})}


class NoSuper(Gate):
    def __init__(self, spec: Spec, num_experts: int) -> None:
        self.net = nn.Linear(SIZE, num_experts)


class NoCount(Plain):
    def __init__(self, spec: Spec) -> None:
        super().__init__(spec, 3)


class NoGate(nn.Module):
    def __init__(self, spec: Spec, num_experts: int) -> None:
        super().__init__()


def lazy(self: Plain) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        self.net = nn.LazyLinear(NUM_EXPERTS)  # type: ignore[assignment]


def fill(draw: Callable[[], Any]) -> Callable[[Plain], Any]:
    return lambda self: self.net.bias.data.copy_(torch.as_tensor(draw()))


def normal(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=1)


def wider(self: Any, rows: Batch, logits: Tensor) -> Any:
    torch.set_default_dtype(torch.float64)
    return Gating(normal(logits))


def mutate(self: Any, rows: Batch, logits: Tensor) -> Any:
    rows["x"].mul_(2)
    return Gating(normal(logits))


def put(self: Any, rows: Batch, logits: Tensor) -> Any:
    rows["x"] = rows["x"] - 0.5
    return Gating(normal(logits))


def fails(self: Any, rows: Batch, logits: Tensor) -> Any:
    raise IndexError("nothing here")


GATES: dict[str, tuple[dict[str, Any], str]] = {
    "raw logits": (gate(lambda self, rows, z: Gating(z)), "log_resp_BE log_softmax logits"),
    "probabilities": (gate(lambda self, rows, z: Gating(z.softmax(1))), "probabilities log_softmax"),
    "a softmax over rows": (gate(lambda self, rows, z: Gating(torch.log_softmax(z, 0))), "log_resp_BE"),
    "a tensor": (gate(lambda self, rows, z: normal(z)), "Gating tensor"),
    "nothing": (gate(lambda self, rows, z: None), "Gating None"),
    "a dict": (gate(lambda self, rows, z: {"log_resp_BE": normal(z)}), "Gating dict"),
    "one column too many": (gate(lambda self, rows, z: Gating(normal(F.pad(z, (0, 1))))), "(8, 4) (8, 3)"),
    "a column": (gate(lambda self, rows, z: Gating(normal(z)[:, :1])), "(8, 1) (8, 3)"),
    "transposed": (gate(lambda self, rows, z: Gating(normal(z).T)), "(3, 8) (8, 3)"),
    "no number": (gate(lambda self, rows, z: Gating(normal(z) * math.nan)), "not a number"),
    "a loss of one number": (gate(lambda self, rows, z: Gating(normal(z), z.sum())), "loss_B () (8,)"),
    "a loss (B, 1)": (gate(lambda self, rows, z: Gating(normal(z), z[:, :1])), "loss_B (8, 1) (8,)"),
    "double": (gate(lambda self, rows, z: Gating(normal(z).double())), "float64 float32"),
    "half": (gate(lambda self, rows, z: Gating(normal(z).bfloat16())), "bfloat16 float32"),
    "no graph": (gate(lambda self, rows, z: Gating(normal(z).detach())), "graph learns detach"),
    "an argmax": (gate(lambda self, rows, z: Gating(F.one_hot(z.argmax(1), 3).float().log())), "graph learns"),
    "in place": (gate(mutate), "changes copy"),
    "another field": (gate(put), "changes copy"),
    "fails": (gate(fails), "IndexError nothing here test_contracts.py"),
    "batch mean": (gate(lambda self, rows, z: Gating(normal(z - z.mean(0)))), "depends on the other rows"),
    "cumulative": (gate(lambda self, rows, z: Gating(normal(z.cumsum(0)))), "depends on the other rows"),
    "position": (gate(lambda self, rows, z: Gating(normal(z * torch.arange(len(z))[:, None]))), "depends on the other"),
    "BatchNorm": ({"gate": Normed}, "BatchNorm1d net.1 GroupNorm"),
    "Dropout": ({"gate": Dropping}, "Dropout net.1 generator noise_shape"),
    "draws": (gate(lambda self, rows, z: Gating(normal(z + torch.randn_like(z)))), "generator noise_shape"),
    "draws by Python": (gate(lambda self, rows, z: Gating(normal(z * random.random()))), "Python noise_shape"),
    "no noise asked": (
        gate(Plain.out, forward=lambda self, rows, eps: self.out(rows, self.net(rows["x"]) + eps)),
        "TypeError None",
    ),
    "frozen": ({"gate": Frozen}, "2 parameters buffers trains experts"),
    "unused": ({"gate": Spare}, "spare requires_grad_(False)"),
    "counts": ({"gate": Counting}, "changes count"),
    "remembers": ({"gate": Remembering}, "called again"),
    "another mode": (gate(lambda self, rows, z: Gating(normal(z)) if self.eval() else None), "changes training"),
    "batch maximum": (gate(lambda self, rows, z: Gating(normal(z / z.abs().max()))), "depends on the other rows"),
    "sparse": (gate(lambda self, rows, z: Gating(normal(z).to_sparse())), "log_resp_BE sparse to_dense()"),
    "the default dtype": (gate(wider), "changes default dtype"),
    "layers in lists": ({"gate": Listed}, "layers['all'][0].weight nn.ModuleList"),
    "a layer in a list": ({"gate": HalfListed}, "more[0].weight nn.ModuleList"),
    "a tensor that is no parameter": ({"gate": Shifted}, "shift nn.Parameter"),
    "a global tensor": (gate(lambda self, rows, z: Gating(normal(z + SHIFT))), "SHIFT nn.Parameter"),
    "weights by NumPy": (made(fill(lambda: np.random.rand(3))), "Mine.__init__ NumPy torch's"),  # noqa: NPY002
    "weights by Python": (made(fill(lambda: [random.random()] * 3)), "Mine.__init__ Python torch's"),
    "weights by a new generator": (made(fill(lambda: np.random.default_rng().random(3))), "Mine.__init__ bias torch's"),
    "a dtype for all": (made(lambda self: torch.set_default_dtype(torch.float64)), "Mine.__init__ default dtype"),
    "__init__ fails": (made(lambda self: SPEC["nix"]), "Mine.__init__ KeyError 'nix' test_contracts.py"),
    "no super().__init__()": ({"gate": NoSuper}, "NoSuper.__init__ AttributeError super().__init__()"),
    "no number of experts": ({"gate": NoCount}, "NoCount.__init__ TypeError spec experts"),
    "no gate": ({"gate": NoGate}, "NoGate mixdist.gates.Gate"),
    "nothing made": ({"gate": lambda spec, num_experts: None}, "NoneType torch.nn.Module"),
    "without a shape": (made(lazy), "Mine net.weight LazyLinear"),
    "log_px_is": (gate(Plain.out, log_px_is="densty"), "log_px_is 'densty' 'density'"),
    "latent": (gate(Plain.out, latent=2.5), "latent 2.5"),
    "fields": (gate(Plain.out, fields="x"), "fields 'x' ('x',)"),
    "noise_shape": (gate(Plain.out, noise_shape=4), "noise_shape 4"),
}


# Experts.


class Auto(Expert):
    """A linear autoencoder; each fault changes what it returns."""

    noise_shape: Any = (2,)

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(SIZE, 2), nn.Linear(2, SIZE)

    def forward(self, rows: Batch, eps: Any) -> Any:
        error = self.decode(self.encode(rows["x"]) + 0.1 * eps) - rows["x"]
        return self.out(rows, error.square())

    def out(self, rows: Batch, error: Tensor) -> Any:
        return ExpertTerms(error.sum(1))


def expert(out: Callable[..., Any], **members: Any) -> dict[str, Any]:
    return {"expert": type("Mine", (Auto,), {"out": out, **members})}


class NormedExpert(Auto):
    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.encode = nn.Sequential(nn.Linear(SIZE, 2), nn.BatchNorm1d(2, track_running_stats=False))


class NormedByFunction(Auto):
    """No submodule is to blame, least of all the one that runs next."""

    def forward(self, rows: Batch, eps: Any) -> Any:
        z = F.batch_norm(self.encode(rows["x"]), None, None, training=True)
        return self.out(rows, (self.decode(z) - rows["x"]).square())


class FrozenExpert(Auto):
    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.requires_grad_(False)


class ListedExpert(Auto):
    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.more = (nn.Linear(2, 2),)

    def forward(self, rows: Batch, eps: Any) -> Any:
        return self.out(rows, (self.decode(self.more[0](self.encode(rows["x"]))) - rows["x"]).square())


class NoSpec(Auto):
    def __init__(self) -> None:
        super().__init__(SPEC)


class Drawn(Auto):
    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.decode.bias.data.copy_(torch.as_tensor(np.random.rand(SIZE)))  # noqa: NPY002


ENCODE = nn.Linear(SIZE, 2)


class Shared(Auto):
    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.encode = ENCODE


class Stacked(Auto):
    stackable = True


class Wide(Likelihood):
    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        return -(x - output).square()


class OwnLikelihood(VAE):
    def __init__(self, spec: Spec) -> None:
        super().__init__(spec, 2, MLP([4]), "gaussian", mean="identity")
        self.likelihood = Wide("gaussian", 1.0, "identity")


class FlatNorm(nn.Sequential):
    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(nn.Linear(num_in, 4), nn.BatchNorm1d(4), nn.Linear(4, num_out))


class NormedNetwork(Network):
    def encoder(self, shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        return FlatNorm(math.prod(shape), num_outputs)

    def decoder(self, num_inputs: int, shape: tuple[int, ...], num_maps: int = 1) -> nn.Module:
        return nn.Linear(num_inputs, num_maps * math.prod(shape))


class Centring(nn.Parameter):
    """A weight that says itself what a linear layer does with it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result - result.mean(0) if func is nn.functional.linear else result


class LinearNetwork(Network):
    """Layers of torch alone, which have no stacks, whatever it says."""

    stackable = True

    def encoder(self, shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(math.prod(shape), num_outputs))

    def decoder(self, num_inputs: int, shape: tuple[int, ...], num_maps: int = 1) -> nn.Module:
        return nn.Linear(num_inputs, num_maps * math.prod(shape))


class CentringNetwork(LinearNetwork):
    def encoder(self, shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        layer = nn.Linear(math.prod(shape), num_outputs)
        layer.weight = Centring(layer.weight.detach())
        return layer


class InPlaceNetwork(LinearNetwork):
    def encoder(self, shape: tuple[int, ...], num_outputs: int) -> nn.Module:
        return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(math.prod(shape), num_outputs))


def vae(execution: str = "loop", **options: Any) -> dict[str, Any]:
    make = lambda spec: VAE(spec, 2, **{"network": MLP([4]), **options})  # noqa: E731
    return {"expert": make, "execution": execution}


EXPERTS: dict[str, tuple[dict[str, Any], str]] = {
    "(R, 1)": (expert(lambda self, rows, e: ExpertTerms(e.sum(1, keepdim=True))), "loss_R (8, 1) (8,)"),
    "(R, D)": (expert(lambda self, rows, e: ExpertTerms(e)), "loss_R (8, 6) (8,)"),
    "a number": (expert(lambda self, rows, e: ExpertTerms(e.mean())), "loss_R () (8,)"),
    "a float": (expert(lambda self, rows, e: ExpertTerms(e.mean().item())), "loss_R float"),
    "no loss": (expert(lambda self, rows, e: ExpertTerms(log_px_R=-e.sum(1))), "loss_R None"),
    "a tensor": (expert(lambda self, rows, e: e.sum(1)), "ExpertTerms tensor"),
    "nothing": (expert(lambda self, rows, e: None), "ExpertTerms None"),
    "a dict": (expert(lambda self, rows, e: {"loss_R": e.sum(1)}), "ExpertTerms dict"),
    "integers": (expert(lambda self, rows, e: ExpertTerms(e.sum(1).long())), "int64 float32"),
    "half": (expert(lambda self, rows, e: ExpertTerms(e.sum(1).half())), "float16 float32"),
    "no graph": (expert(lambda self, rows, e: ExpertTerms(e.detach().sum(1))), "graph learns detach"),
    "no number": (expert(lambda self, rows, e: ExpertTerms(e.sum(1) / 0)), "inf sample scale"),
    "log p (R, D)": (expert(lambda self, rows, e: ExpertTerms(e.sum(1), -e)), "log_px_R (8, 6) (8,)"),
    "KL of one number": (expert(lambda self, rows, e: ExpertTerms(e.sum(1), -e.sum(1), e.sum())), "kl_R ()"),
    "batch mean": (expert(lambda self, rows, e: ExpertTerms(e.sum(1) - e.mean())), "depends on the other rows"),
    "over its rows": (expert(lambda self, rows, e: ExpertTerms(e.sum(1) / len(e))), "depends on the other rows"),
    "draws": (expert(lambda self, rows, e: ExpertTerms(e.sum(1) * torch.rand(()))), "generator noise_shape"),
    "batch_norm as a function": ({"expert": NormedByFunction}, "NormedByFunction.forward batch, so"),
    "BatchNorm": ({"expert": NormedExpert}, "NormedExpert.forward BatchNorm1d encode.1"),
    "BatchNorm in a network": (vae(network=NormedNetwork()), "VAE.forward BatchNorm1d encoder.1"),
    "weights with operations of their own": (vae(network=CentringNetwork()), "VAE.forward other rows Linear encoder"),
    "in place, without another number": (vae(network=InPlaceNetwork()), "VAE.forward changes given"),
    "frozen": ({"expert": FrozenExpert}, "FrozenExpert 4 parameters buffers gate"),
    "half unused": (expert(lambda self, rows, e: ExpertTerms(self.encode(rows["x"]).sum(1))), "decode.weight"),
    "noise of another shape": (expert(Auto.out, noise_shape=(5,)), "(8, 5) RuntimeError"),
    "no noise asked for": (expert(Auto.out, noise_shape=None), "noise None TypeError"),
    "a batch's maximum": (
        expert(lambda self, rows, e: ExpertTerms(e.sum(1) / e.sum(1).detach().max())),
        "depends on the other rows",
    ),
    "log p not finite": (expert(lambda self, rows, e: ExpertTerms(e.sum(1), -e.sum(1) / 0)), "log_px_R -inf sample"),
    "KL no number": (expert(lambda self, rows, e: ExpertTerms(e.sum(1), -e.sum(1), e.sum(1) * math.nan)), "kl_R nan"),
    "no features": (expert(lambda self, rows, e: ExpertTerms(e.sum(1), features=None)), "features None"),  # type: ignore[arg-type]
    "features of one number": (
        expert(lambda self, rows, e: ExpertTerms(e.sum(1), features={"f": e.sum()})),
        "features['f'] () (8, ...)",
    ),
    "features by the batch": (
        expert(lambda self, rows, e: ExpertTerms(e.sum(1), features={"f": e - e.mean(0)})),
        "features['f'] other rows",
    ),
    "a layer in a tuple": ({"expert": ListedExpert}, "more[0].weight nn.ModuleList"),
    "weights by NumPy": ({"expert": Drawn}, "Drawn.__init__ NumPy torch's"),
    "no spec": ({"expert": NoSpec}, "NoSpec.__init__ TypeError spec"),
    "shared by all": ({"expert": Shared}, "expert 1 (Shared) expert 0 encode.weight requires_grad_(False)"),
    "log_px_is": (expert(Auto.out, log_px_is="mas"), "log_px_is 'mas' 'mass'"),
    "levels": (expert(Auto.out, levels="many"), "levels 'many'"),
    "latent_shape": (expert(Auto.out, latent_shape=2), "latent_shape 2"),
    "no stackable network": (vae(network=LinearNetwork(), execution="stacked"), "VAE.forward axis stackable network"),
    "not stackable": ({"expert": Stacked, "execution": "stacked"}, "stackable"),
    "a likelihood (R, D)": ({"expert": OwnLikelihood}, "OwnLikelihood.forward Wide.log_prob (8, 6) (8,)"),
}
BEYOND = {
    "Bernoulli": (vae(), "VAE.forward Likelihood.log_prob bernoulli 'x'"),
    "Gaussian with a sigmoid": (vae(likelihood="gaussian"), "VAE.forward sigmoid 'x'"),
    "Laplace with a sigmoid": (vae(likelihood="laplace"), "VAE.forward sigmoid 'x'"),
}


# Objectives.


def objective(rows: Callable[..., Any], base: type[Objective] = Objective, **members: Any) -> dict[str, Any]:
    return {"objective": type("Mine", (base,), {"expert_rows": rows, **members})()}


class Wrong(Balance):
    def __init__(self, term: Callable[[Tensor], Any]) -> None:
        self.term = term

    def __call__(self, resp_sum_E: Tensor, num_rows: int) -> Any:
        return self.term(resp_sum_E)


class Tempered(WeightedLoss, nn.Module):
    """An objective that would learn."""

    linear = False

    def __init__(self, balance: Balance | None = None) -> None:
        nn.Module.__init__(self)
        WeightedLoss.__init__(self, balance)
        self.temperature = nn.Parameter(torch.ones(()))

    def expert_rows(self, log_resp_BE: Tensor, losses_BE: Tensor) -> Tensor:
        return super().expert_rows(log_resp_BE, losses_BE) * self.temperature


class Remembered(Balance):
    calls = 0

    def __call__(self, resp_sum_E: Tensor, num_rows: int) -> Any:
        self.calls += 1
        return resp_sum_E.var() * self.calls


def balanced(term: Callable[[Tensor], Any], **members: Any) -> dict[str, Any]:
    made = Wrong(term)
    vars(made).update(members)
    return {"objective": WeightedLoss(made)}


def own_rows(self: Any, log_resp_BE: Tensor, losses_BE: Tensor) -> Tensor:
    return -(log_resp_BE - losses_BE).logsumexp(1)


def weighted(self: Any, log_resp_BE: Tensor, losses_BE: Tensor) -> Tensor:
    return (log_resp_BE.exp() * losses_BE).sum(1)


WEIGHT = torch.ones((), requires_grad=True)
PARTED = type("Mine", (Objective,), {"rows": own_rows, "expert_rows": weighted})()
LINEAR_ROWS = type("Mine", (WeightedLoss,), {"rows": own_rows})()
OBJECTIVES: dict[str, tuple[dict[str, Any], str]] = {
    "a number": (objective(lambda self, r, loss: (r.exp() * loss).sum()), "expert_rows () (8,)"),
    "a mean": (objective(lambda self, r, loss: (r.exp() * loss).sum(1).mean()), "expert_rows () (8,)"),
    "(B, 1)": (objective(lambda self, r, loss: (r.exp() * loss).sum(1, keepdim=True)), "expert_rows (8, 1) (8,)"),
    "(B, E)": (objective(lambda self, r, loss: r.exp() * loss), "expert_rows (8, 3) (8,)"),
    "over rows": (objective(lambda self, r, loss: (r.exp() * loss).sum(0)), "expert_rows (3,) (8,)"),
    "nothing": (objective(lambda self, r, loss: None), "expert_rows None"),
    "not by row": (objective(lambda self, r, loss: (loss - loss.mean()).sum(1)), "depends on the other rows"),
    "no graph": (objective(lambda self, r, loss: (r.exp() * loss).sum(1).detach()), "losses_BE trains gate"),
    "no gradient for experts": (objective(lambda self, r, loss: (r.exp() * loss.detach()).sum(1)), "losses_BE trains"),
    "no gradient for the gate": (objective(lambda self, r, loss: loss.min(1).values), "log_resp_BE trains"),
    "in place": (objective(lambda self, r, loss: loss.detach().mul_(2).sum(1) + r.sum(1)), "changes"),
    "linear that is not": (objective(lambda self, r, loss: -(r - loss).logsumexp(1), WeightedLoss), "linear false"),
    "a gate's part of one number": (
        {"objective": type("Mine", (WeightedLoss,), {"gate_rows": lambda self, r: r.mean()})()},
        "gate_rows () (8,)",
    ),
    "rows of its own beside linear parts": ({"objective": LINEAR_ROWS}, "Mine.rows expert_rows linear false"),
    "rows of its own with top-k": (
        {"objective": PARTED, "routing": TopK(2)},
        "Mine.rows gate_rows top-k expert_rows",
    ),
    "no parts with top-k": (
        {"objective": type("Mine", (Objective,), {"rows": own_rows})(), "routing": TopK(2)},
        "Mine.expert_rows NotImplementedError",
    ),
    "no number for experts that do not see a row": (
        {**objective(lambda self, r, loss: (r.exp() * (loss + r)).sum(1)), "routing": TopK(2)},
        "Mine.expert_rows nan -inf",
    ),
    "no number": (objective(lambda self, r, loss: weighted(self, r, loss) * math.nan), "expert_rows nan losses clamp"),
    "infinite": (objective(lambda self, r, loss: weighted(self, r, loss) / 0), "expert_rows inf losses"),
    "losses that it does not read": (
        {**objective(weighted, reads_losses=False), "trains": "gate"},
        "reads_losses true",
    ),
    "experts that would not learn": (objective(weighted, reads_losses=False), "train.trains both Mine gate"),
    "a parameter": ({"objective": Tempered()}, "Tempered temperature optimiser"),
    "a tensor that would learn": (
        objective(lambda self, r, loss: weighted(self, r, loss) * self.weight, weight=WEIGHT),
        "Mine.rows requires optimiser",
    ),
    "a balance with a weight that would learn": (
        balanced(lambda r: r.var(), weights=[torch.ones(1, requires_grad=True)]),
        "Wrong weights[0] optimiser",
    ),
    "a balance that draws": (balanced(lambda r: r.var() * torch.rand(())), "Wrong.__call__ draws generator"),
    "a balance that draws by Python": (balanced(lambda r: r.var() * random.random()), "Wrong.__call__ draws Python"),
    "a balance that remembers": ({"objective": WeightedLoss(Remembered())}, "Remembered.__call__ called again"),
    "a balance without graph": (balanced(lambda r: r.detach().var()), "Wrong.__call__ graph resp_sum_E detach"),
    "a balance that is no number": (balanced(lambda r: r.var() * math.nan), "Wrong.__call__ nan clamp"),
    "a balance in place": (balanced(lambda r: r.mul_(2).var()), "Wrong.__call__ changes copy"),
    "balance (E,)": ({"objective": WeightedLoss(Wrong(lambda r: r))}, "Wrong.__call__ (3,) ()"),
    "a balance of Python": ({"objective": WeightedLoss(Wrong(lambda r: 1.0))}, "Wrong.__call__ float"),
    "a balance that fails": ({"objective": WeightedLoss(Wrong(lambda r: r[5]))}, "Wrong.__call__ index 5"),
}


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 1e-2)


def make(
    gate: Any = Plain,
    expert: Any = Auto,
    objective: Objective | None = None,
    data: Dataset | None = None,
    trains: Any = "both",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Trainer:
    """A trainer of a soft mixture before its first step."""
    data, mesh = data or rows(), mesh_of(NUM_EXPERTS, 1, 1)
    mixture = Soft(gate, expert, NUM_EXPERTS, **{"execution": "loop", **options})
    mixture.setup(Context(7, dtype, data.spec, mesh, Wire(mesh.device)))
    return Trainer(mixture, data, [Phase(1, 16, objective=objective or WeightedLoss(), trains=trains, optimizer=adam)])


def told(options: dict[str, Any], words: str) -> str:
    """Begin a run that must end before its first step, with one line that has these words."""
    return error_of(lambda: make(**options).begin(), *words.split())


TABLE = {**{f"gate: {n}": one for n, one in GATES.items()}, **{f"expert: {n}": one for n, one in EXPERTS.items()}}
TABLE |= {f"objective: {n}": one for n, one in OBJECTIVES.items()}


@pytest.mark.parametrize("name", TABLE)
def test_a_broken_contract_is_told_before_the_first_step(name: str) -> None:
    options, words = TABLE[name]
    line = told(options, words)
    assert name.partition(":")[0] in line
    kind = next(iter(options.values()))
    kind = getattr(kind, "balance", None) or kind
    named = getattr(kind, "__name__", type(kind).__name__)
    assert named in line or named == "<lambda>", line


@pytest.mark.parametrize("name", [name for name, (_, words) in TABLE.items() if "nn." in words])
def test_what_is_no_parameter_is_told_in_any_dtype(name: str) -> None:
    """What is not registered is not moved to float64 either, so that it fails before there is a gradient."""
    options, words = TABLE[name]
    told({**options, "dtype": torch.float64}, words)


@pytest.mark.parametrize("name", BEYOND)
def test_values_that_a_likelihood_cannot_model_are_told(name: str) -> None:
    options, words = BEYOND[name]
    line = told({**options, "data": rows(0.0, 300.0)}, words)
    assert "to 298.333," in line
    assert "learning rate" not in line
    outlier = rows()
    outlier.rows["x"][NUM_ROWS // 2 :] = 300.0
    assert "to 300," in told({**options, "data": outlier}, words)
    make(**options).begin()


def test_what_gate_and_expert_share_is_told() -> None:
    net = nn.Linear(SIZE, NUM_EXPERTS)

    class Lender(Plain):
        def __init__(self, spec: Spec, num_experts: int) -> None:
            super().__init__(spec, num_experts)
            self.net = net

    class Borrower(Auto):
        def __init__(self, spec: Spec) -> None:
            super().__init__(spec)
            self.encode = net

    class View(Auto):
        """Parameters of its own that lie in the same memory."""

        def __init__(self, spec: Spec) -> None:
            super().__init__(spec)
            self.encode.weight = nn.Parameter(net.weight[:2])

    told({"gate": Lender}, "mixture.gate made once more (Lender) share net.weight")
    told({"gate": Lender, "expert": [Auto, Borrower, Auto]}, "expert 1 (Borrower) gate (Lender) encode.weight")
    told({"expert": [Auto, View, View]}, "expert 2 (View) expert 1 (View) encode.weight")
    net.requires_grad_(False)  # a frozen feature extractor may serve all
    make(expert=[Auto, View, Auto]).begin()


def test_a_stack_under_autocast_is_held_against_its_experts_without() -> None:
    """Rounding to bfloat16 is no other way to compute: such a run used to be refused, or to fail when it was over."""

    class Own(VAE):
        """A class of the package is not looked at."""

    own = {"expert": lambda spec: Own(spec, 2, MLP([4]), likelihood="gaussian", mean="identity")}
    trainer = make(**own, execution="stacked", compute=Compute(bf16=True))
    trainer.begin()
    assert isinstance(trainer.mixture, Soft)
    assert trainer.mixture.bank.compute.bf16


# A rule that is broken only where not every expert sees every row, and rows that a rank does not have.


def test_what_fails_without_rows_is_told_where_there_may_be_none() -> None:
    class Reshaping(Auto):
        def out(self, rows: Batch, error: Tensor) -> Any:
            return ExpertTerms(error.view(len(error), -1).sum(1))

    make(expert=Reshaping).begin()
    told({"expert": Reshaping, "routing": TopK(2)}, "Reshaping.forward (0, 6) RuntimeError")


@pytest.mark.parametrize(
    ("trains", "broken"),
    [("gate", {"expert": FrozenExpert}), ("experts", {"gate": Frozen}), ("gate", {"expert": Auto})],
)
def test_what_is_not_to_train_needs_no_gradient(trains: str, broken: dict[str, Any]) -> None:
    make(**broken, trains=trains).begin()


def test_a_later_phase_is_checked_too() -> None:
    class Later(Auto):
        def anneal(self, step: int) -> None:
            self.late = step == 0 and getattr(self, "begun", False)
            self.begun = step > 0

        def out(self, rows: Batch, error: Tensor) -> Any:
            return ExpertTerms(error if self.late else error.sum(1))

    trainer = make(expert=Later)
    trainer.phases.append(trainer.phases[0])
    trainer.begin()
    for _ in range(3):
        trainer.advance()
    assert trainer.position.phase == 1
    line = error_of(trainer.advance, "Later.forward", "loss_R", "(8, 6)")
    assert line.startswith("in train: mixture.expert: ")  # the phase has the name of its key


def annealed(anneal: Callable[..., Any]) -> Any:
    return type("Mine", (Auto,), {"anneal": anneal})


def later(self: Any, step: int) -> None:
    if step == 2:
        raise KeyError("nix")


ANNEALED: dict[str, tuple[Callable[..., Any], str]] = {
    "takes no step": (lambda self: None, "step 0 TypeError anneal(self, step)"),
    "fails": (lambda self, step: SPEC["nix"], "step 0 KeyError nix test_contracts.py"),
    "fails later": (later, "step 2 KeyError nix"),
}


@pytest.mark.parametrize("name", ANNEALED)
def test_a_schedule_that_fails_is_told(name: str) -> None:
    anneal, words = ANNEALED[name]

    def run(trainer: Trainer | Rounds) -> None:
        trainer.begin()
        while not trainer.finished:
            trainer.advance()

    told_by = "Mine.anneal", *words.split()
    error_of(lambda: run(make(expert=annealed(anneal))), "mixture.expert", *told_by)
    error_of(lambda: run(make(gate=type("Mine", (Plain,), {"anneal": anneal}))), "mixture.gate", *told_by)
    error_of(lambda: run(make(**objective(weighted, anneal=anneal))), "objective", *told_by)
    error_of(lambda: run(compete(Elbo(), annealed(anneal))), "mixture.expert", *told_by)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (WeightedLoss, "class WeightedLoss()"),
        (object(), "object mixdist.mixtures.WeightedLoss()"),
        ({"class_path": "mine.Loss"}, "dict WeightedLoss()"),
        (type("Mine", (Objective,), {"__init__": lambda self: None})(), "Mine balance super().__init__()"),
    ],
)
def test_what_is_no_objective_is_told(given: Any, words: str) -> None:
    error_of(lambda: make(objective=given), "train.objective", *words.split())


def test_a_score_that_would_learn_is_told() -> None:
    made: Any = Mark()
    made.weight = [nn.Parameter(torch.ones(()))]
    error_of(compete(made).begin, "mixture.score", "Mark", "weight[0]", "optimiser")


# Families.


class Law(TwoStage):
    """A family that takes a loss and a remainder of its own."""

    def total(self, batch: Any, h_BH: Tensor) -> Tensor:
        return (self.decoder(h_BH) - self.x_of(batch.rows)).square().sum() / batch.total

    def backward(self, batch: Any, objective: Any, at: Any, num_parts: int = 1, upcoming: Any = None) -> Any:
        weights_BE, h_BH = self.through(batch, at)
        return self.finish(batch, self.total(batch, h_BH), weights_BE)

    def finish(self, batch: Any, loss: Tensor, weights_BE: Tensor) -> Any:
        loss.backward()
        return Outcome(loss.detach(), {"rows": loss.detach()})


def family(**members: Any) -> type[Mixture]:
    return type("Mine", (Law,), members)


def more_on_rank_1(self: Any, batch: Any, loss: Tensor, weights_BE: Tensor) -> Any:
    loss.backward()
    return Outcome(loss.detach(), {"more": loss.detach()} if self.context.mesh.rank else {})


def extra_setup(self: Any, context: Context) -> None:
    Law.setup(self, context)
    self.extra = context.make(lambda: nn.Linear(SIZE, SIZE), Purpose.GATE)


def unlisted(self: Any, batch: Any, h_BH: Tensor) -> Tensor:
    return (self.extra(self.decoder(h_BH)) - self.x_of(batch.rows)).square().sum() / batch.total


def astray_setup(self: Any, context: Context) -> None:
    Law.setup(self, context)
    self.decoder.more = [nn.Linear(SIZE, SIZE)]


def astray(self: Any, batch: Any, h_BH: Tensor) -> Tensor:
    return (self.decoder.more[0](self.decoder(h_BH)) - self.x_of(batch.rows)).square().sum() / batch.total


def step_by_parts(self: Any, batch: Any, objective: Any, at: Any, num_parts: int = 1, upcoming: Any = None) -> Any:
    done = []
    for part in batch.split(num_parts):
        loss = self.total(part, self.through(part, at)[1])  # over the part's rows, not the batch's
        loss.backward()
        done.append(loss.detach())
    return Outcome(torch.stack(done).sum(), {})


FAMILIES: dict[str, tuple[type[Mixture], str]] = {
    "nothing": (family(finish=lambda self, batch, loss, w: loss.backward()), "Outcome None"),
    "a loss": (family(finish=lambda self, batch, loss, w: loss), "Outcome tensor"),
    "a float": (family(finish=lambda self, batch, loss, w: Outcome(loss.item(), {})), "loss float"),
    "rows": (family(finish=lambda self, batch, loss, w: Outcome(loss.detach().expand(8), {})), "loss (8,) ()"),
    "parts": (family(finish=lambda self, batch, loss, w: Outcome(loss.detach(), {"w": w})), "parts['w'] (8, 3) ()"),
    "no gradient": (family(finish=lambda self, batch, loss, w: Outcome(loss.detach(), {})), "no gradient backward()"),
    "half a gradient": (
        family(total=lambda self, batch, h: self.decoder[0].weight.sum() * 0 + h.square().sum()),
        "0.bias decoder requires_grad_(False)",
    ),
    "unlisted": (family(total=unlisted, setup=extra_setup), "extra parts"),
    "draws": (family(total=lambda self, b, h: Law.total(self, b, h) * torch.rand(())), "generator at.draw"),
    "a layer in a list": (family(total=astray, setup=astray_setup), "more[0].weight decoder nn.ModuleList"),
    "fails": (family(total=lambda self, b, h: h.nothing), "AttributeError nothing test_contracts.py"),
    "parts that do not sum": (family(backward=step_by_parts), "num_parts batch.total"),
}


def begin(kind: type[Mixture], ranks: int = 1) -> Trainer:
    mixture, mesh = kind(NUM_EXPERTS if ranks == 1 else 2), mesh_of(NUM_EXPERTS if ranks == 1 else 2, ranks, ranks)
    mixture.setup(Context(7, torch.float32, SPEC, mesh, Wire(mesh.device)))
    trainer = Trainer(mixture, rows(), [Phase(1, 16, objective=WeightedLoss(), optimizer=adam)])
    trainer.begin()
    return trainer


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_that_breaks_its_contract_is_told(name: str) -> None:
    kind, words = FAMILIES[name]
    error_of(lambda: begin(kind), "Mine.backward", *words.split())


def local_mean(self: Any, batch: Any, h_BH: Tensor) -> Tensor:
    return (self.decoder(h_BH) - self.x_of(batch.rows)).square().sum() / batch.size


def plain_statistic(self: Any, batch: Any, h_BH: Tensor) -> Tensor:
    """A square of a rank's own sum, in place of that over the batch."""
    return Law.total(self, batch, h_BH) + h_BH.sum(0).square().sum() / batch.total


RANK_FAMILIES = {
    "a mean over a rank's rows": (family(total=local_mean), "times as large batch.total"),
    "a statistic of a rank's rows": (family(total=plain_statistic), "times as large over_batch"),
    "other shapes on another rank": (family(finish=more_on_rank_1), "rank 1 parts['more']"),
}


def begun_on_ranks(name: str) -> str:
    """Begin a family on this rank; return what is told."""
    kind = TwoStage if name == "right" else RANK_FAMILIES[name][0]
    try:
        begin(kind, 2)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["right", *RANK_FAMILIES])
def test_a_family_is_held_to_the_law_of_ranks(name: str, pool: Callable[..., Any]) -> None:
    lines = pool(2).run("tests.test_contracts:begun_on_ranks", name)
    assert lines[0] == lines[1]
    words = "" if name == "right" else RANK_FAMILIES[name][1]
    assert bool(lines[0]) == bool(words)
    assert all(word in lines[0] for word in words.split()), lines[0]


# Sources.


class Own(Source):
    def __init__(self, made: Callable[[], Any]) -> None:
        self.made = made

    def load(self) -> Any:
        return self.made()


class Rows(Samples):
    """Samples of one's own; each fault changes what they are or return."""

    def __init__(self, first: int = 0, **changes: Any) -> None:
        self.whole, self.changes = Dataset(renumbered(first), SPEC, "y"), changes
        self.spec: Spec = changes.get("spec", SPEC)
        self.label, self.class_names, self.log_density_N = "y", (), None
        self.attribute, self.attribute_names = None, ()
        if "without" in changes:
            delattr(self, changes["without"])

    @property
    def ids(self) -> Tensor:
        ids: Tensor = self.changes.get("ids", self.whole.ids)
        return ids

    @property
    def fingerprint(self) -> str:
        return self.whole.fingerprint

    def start(self, index: Tensor, epoch: Any = None, fields: Any = None) -> Callable[[], Batch]:
        taken = self.whole.take(index)
        return lambda: self.changes.get("rows", dict)(taken) or taken

    def first(self, num_rows: int) -> Samples:
        return self


def renumbered(first: int) -> Batch:
    return {**rows().rows, "id": torch.arange(first, first + NUM_ROWS)}


def own(**changes: Any) -> Callable[[], Any]:
    return lambda: (Rows(0, **changes), Rows(NUM_ROWS))


def stored(x: Tensor, **field: Any) -> Callable[[], Any]:
    """Two data sets of one field, stored as told."""
    described = {"shape": tuple(x.shape[1:]), "dtype": x.dtype, **field}
    return lambda: [
        Dataset({"id": torch.arange(first, first + len(x)), "x": x}, {"x": Field(**described)}) for first in (0, 99)
    ]


WIDER: Spec = {**SPEC, "x": Field((SIZE + 1,), torch.float32)}
SOURCES: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (lambda: None, "NoneType Splits(train,"),
    "one data set": (rows, "Dataset Splits(train,"),
    "tensors": (lambda: (torch.zeros(3), torch.zeros(3)), "Tensor Splits(train,"),
    "three without names": (lambda: (Rows(), Rows(NUM_ROWS), Rows(2 * NUM_ROWS)), "Rows, Rows, Rows Splits(train,"),
    "ids in both": (lambda: (rows(), rows()), "id 500 2 times"),
    "an id twice": (own(ids=torch.zeros(NUM_ROWS, dtype=torch.int64)), "id 0 40 times"),
    "ids of another type": (own(ids=torch.arange(40.0)), "ids float32 int64"),
    "ids as a list": (own(ids=list(range(40))), "ids list int64"),
    "no label": (own(without="label"), "Rows label None"),
    "another spec": (lambda: (Rows(), Rows(NUM_ROWS, spec={"x": SPEC["x"]})), "'y' differs"),
    "wider than said": (lambda: (Rows(spec=WIDER), Rows(NUM_ROWS, spec=WIDER)), "Rows.start 'x' (1, 6) (1, 7)"),
    "a field is missing": (own(rows=lambda r: {"id": r["id"], "x": r["x"]}), "Rows.start 'y' missing"),
    "doubles": (own(rows=lambda r: {**r, "x": r["x"].double()}), "Rows.start 'x' float64 float32"),
    "other rows": (own(rows=lambda r: {**r, "id": r["id"] + 1}), "Rows.start other ids"),
    "no numbers": (own(rows=lambda r: {**r, "x": r["x"] * math.nan}), "Rows.start 'x' sample 0 nan"),
    "no class": (own(rows=lambda r: {**r, "y": r["y"] + 9}), "Rows.start 'y' sample 0 to 2"),
    "start fails": (own(rows=lambda r: r["z"]), "Rows.start KeyError 'z' test_contracts.py"),
    "load fails": (lambda: {}["x"], "KeyError 'x' test_contracts.py"),
    "bfloat16": (stored(torch.zeros(4, 2, dtype=torch.bfloat16)), "'x' bfloat16 float32"),
    "complex": (stored(torch.zeros(4, 2, dtype=torch.complex64)), "'x' complex64 float32"),
    "uint16": (stored(torch.zeros(4, 2).to(torch.uint16)), "'x' uint16 int32"),
    "a shape of one number": (stored(torch.zeros(4, 2), shape=2), "'x' shape 2 tuple"),
    "scale 0": (stored(torch.zeros(4, 2), scale=0.0), "'x' scale 0.0"),
    "scale nan": (stored(torch.zeros(4, 2), scale=math.nan), "'x' scale nan"),
    "offset inf": (stored(torch.zeros(4, 2), offset=math.inf), "'x' offset inf"),
    "classes as floats": (stored(torch.zeros(4), num_classes=3), "'x' float32 uint8"),
    "inf": (stored(torch.full((4, 2), math.inf)), "'x' inf sample 0"),
    "an array": (
        lambda: Dataset({"id": torch.arange(4), "x": torch.zeros(4).numpy()}, {"x": SPEC["x"]}),
        "'x' ndarray",
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_that_breaks_its_contract_is_told(name: str) -> None:
    made, words = SOURCES[name]
    error_of(lambda: load_splits(Own(made), None), "Own.load", *words.split())


def test_a_source_s_own_words_are_left_as_they_are() -> None:
    def refuse() -> None:
        raise ValueError("no disk here: mount it")

    assert error_of(lambda: load_splits(Own(refuse), None)) == "no disk here: mount it"
    assert load_splits(Own(lambda: (Rows(), Rows(NUM_ROWS))), None).valid is None


def test_rows_that_turn_bad_later_are_told_at_the_first_batch() -> None:
    class Turning(Rows):
        def start(self, index: Tensor, epoch: Any = None, fields: Any = None) -> Callable[[], Batch]:
            taken = self.whole.take(index)
            return lambda: {**taken, "x": taken["x"].flip(1) / 0} if len(index) > 1 else taken

    train, *_ = load_splits(Own(lambda: (Turning(), Rows(NUM_ROWS))), None)
    trainer = make(data=train)
    error_of(trainer.begin, "'x'", "inf", "finite")


# Scores and discriminators.


class Mark(Score):
    """The bound of a linear autoencoder; each fault changes what it returns."""

    def column(self, e: int, expert: Any, discriminator: Any, rows: Batch, at: Any, dtype: torch.dtype) -> Any:
        return self.out(-(expert.decode(expert.encode(rows["x"])) - rows["x"]).square())

    def out(self, fit: Tensor) -> Any:
        return fit.sum(1)


class Drawing(Auto):
    """An expert that discriminators can train against."""

    def draw(self, eps: Tensor, uniform: Tensor) -> Tensor:
        return self.decode(eps)


def score(out: Callable[..., Any]) -> Score:
    kind: Any = type("Mine", (Mark,), {"out": out})
    return kind()


SCORES: dict[str, tuple[Score, str]] = {
    "(R, D)": (score(lambda self, fit: fit), "Mine.column (8, 6) (8,)"),
    "(R, 1)": (score(lambda self, fit: fit.sum(1, keepdim=True)), "Mine.column (8, 1) (8,)"),
    "a number": (score(lambda self, fit: fit.sum()), "Mine.column () (8,)"),
    "nothing": (score(lambda self, fit: None), "Mine.column None"),
    "doubles": (score(lambda self, fit: fit.sum(1).double()), "Mine.column float64 float32"),
    "by the batch": (score(lambda self, fit: fit.sum(1) - fit.sum(1).logsumexp(0)), "Mine.column other rows"),
    "draws": (score(lambda self, fit: fit.sum(1) + torch.rand(len(fit))), "Mine.column generator"),
    "a loss": (score(lambda self, fit: -fit.sum(1)), "Mine.column higher minus"),
    "fails": (score(lambda self, fit: fit.nothing), "Mine.column AttributeError test_contracts.py"),
    "BatchNorm": (Discriminators(NormedNetwork()), "Discriminator.forward BatchNorm1d net.1"),
}


def compete(score: Score, expert: Any = Drawing, data: Dataset | None = None) -> Rounds:
    data, mesh = data or rows(), mesh_of(NUM_EXPERTS, 1, 1)
    mixture = Competition(expert, NUM_EXPERTS, rounds=2, score=score)
    mixture.setup(Context(7, torch.float32, SPEC, mesh, Wire(mesh.device)))
    return Rounds(mixture, data, [Phase(1, 16, objective=WeightedLoss(), optimizer=adam)] * 2)


@pytest.mark.parametrize("name", SCORES)
def test_a_score_that_breaks_its_contract_is_told(name: str) -> None:
    made, words = SCORES[name]
    error_of(compete(made).begin, "mixture.score", *words.split())


@pytest.mark.parametrize("name", EXPERTS)
def test_an_expert_of_a_competition_is_checked_as_in_a_soft_mixture(name: str) -> None:
    options, words = EXPERTS[name]
    if "execution" in options:  # a competition has no stack
        return
    if name == "frozen":  # found before: each expert has an optimiser of its own
        error_of(lambda: compete(Elbo(), FrozenExpert), "FrozenExpert", "4 parameters", "buffers")
        return
    error_of(lambda: compete(Elbo(), options["expert"]).begin(), "expert", *words.split())


def test_each_round_is_checked() -> None:
    class Later(Drawing):
        late = False

        def out(self, rows: Batch, error: Tensor) -> Any:
            return ExpertTerms(error if self.late else error.sum(1))

    rounds = compete(Mark(), Later)
    rounds.begin()
    while rounds.position.round < 2:
        rounds.advance()
    for entrant in rounds.entrants.values():
        entrant.expert.late = True  # type: ignore[assignment]
    assert error_of(rounds.advance, "Later.forward", "(8, 6)").startswith("in round 2: mixture.expert")


@pytest.mark.parametrize("part", ["pretrain[0]", "pretrain[1]", "train"])
@pytest.mark.parametrize(("kind", "words"), [("schedule", "step 1"), ("loss", "not finite")])
def test_what_goes_wrong_in_a_phase_names_it(part: str, kind: str, words: str) -> None:
    """A step is that of the phase or of the run: alone it says too little."""

    class Late(Auto):
        phase, last = -1, 0

        def anneal(self, step: int) -> None:
            self.phase += step == 0 < self.last or self.phase < 0
            self.last = step
            if kind == "schedule" and self.bad:
                raise KeyError("nix")

        @property
        def bad(self) -> bool:
            return self.last == 1 and self.phase == ["pretrain[0]", "pretrain[1]", "train"].index(part)

        def out(self, rows: Batch, error: Tensor) -> Any:
            return ExpertTerms(error.sum(1) * (math.nan if self.bad else 1))

    trainer = make(expert=Late)
    trainer.phases.extend(trainer.phases * 2)
    assert error_of(Loop(trainer, trainer.mesh).fit, words).startswith(f"in {part}: ")


# What is right.


def trajectory(looked_at: bool, monkeypatch: pytest.MonkeyPatch, run: Callable[[], list[Tensor]]) -> list[Tensor]:
    with monkeypatch.context() as patch:
        if not looked_at:
            patch.setattr("mixdist.training.trainer.inspect", lambda *args: None)
            patch.setattr("mixdist.competition.rounds.inspect_entrants", lambda *args: None)
        torch.manual_seed(5)
        return [*run(), torch.get_rng_state()]


def soft() -> list[Tensor]:
    trainer = make(expert=lambda spec: VAE(spec, 2, MLP([4])), gate=Softmax, routing=TopK(2))
    trainer.begin()
    while not trainer.finished:
        trainer.advance()
    return [p.detach().clone() for owned in trainer.mixture.owned() for p in owned.module.parameters()]


def two_stage() -> list[Tensor]:
    trainer = begin(TwoStage)
    trainer.advance()
    return [p.detach().clone() for owned in trainer.mixture.owned() for p in owned.module.parameters()]


def competition() -> list[Tensor]:
    rounds = compete(Discriminators(MLP([4])), lambda spec: VAE(spec, 2, MLP([4]), kl_warmup=3))
    rounds.begin()
    while not rounds.finished:
        rounds.advance()
    return [p.detach().clone() for e in rounds.entrants.values() for o in e.owned() for p in o.module.parameters()]


@pytest.mark.parametrize("run", [soft, two_stage, competition])
def test_a_run_that_is_looked_at_is_the_same_bit_for_bit(
    run: Callable[[], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, checked = (trajectory(looked_at, monkeypatch, run) for looked_at in (False, True))
    assert len(plain) == len(checked) > 1
    assert all(torch.equal(a, b) for a, b in zip(plain, checked, strict=True))


def test_a_check_leaves_no_gradient_and_no_buffer() -> None:
    trainer = make(expert=lambda spec: VAE(spec, 2, MLP([4]), kl_warmup=3), gate=Softmax)
    modules = [owned.module for owned in trainer.mixture.owned()]
    trainer.engine.zero_grad()
    trainer._anneal()
    before = [b.clone() for m in modules for b in m.buffers()]
    trainer.begin()
    assert all(p.grad is None for m in modules for p in m.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, (b for m in modules for b in m.buffers()), strict=True))
    assert all("log_prob" not in vars(m) and not m._forward_hooks for one in modules for m in one.modules())


def test_what_parity_tests_run_is_called_once_and_all_else_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of a user's own, a layer that mixes rows, a hook or a method of the instance may be anywhere inside."""
    spec = {"x": Field((6,), torch.float32, scale=1 / 16)}
    made = [VAE(spec, 2, MLP([4])) for _ in range(7)]
    plain = (*made, Softmax(spec, 3), nn.Sequential(nn.Linear(6, 2), nn.ReLU()))
    assert all(is_covered(one) for one in plain)
    every = nn.modules.module.register_module_forward_hook(lambda one, given, output: None)
    assert not any(is_covered(one) for one in plain)
    every.remove()
    with monkeypatch.context() as later:
        later.setattr(VAE, "encode", lambda self, rows: VAE.encode(self, rows))
        assert not any(is_covered(one) for one in made)
    assert all(is_packaged(one) for one in (WeightedLoss(), WeightedLoss(KLBalance()), Soft(Softmax, VAE, 2)))
    given = WeightedLoss()
    given.expert_rows = lambda log_resp_BE, losses_BE: losses_BE.mean(0)  # type: ignore[method-assign]
    assert not is_packaged(given)
    made[0].encoder.add_module("norm", nn.BatchNorm1d(4))
    made[1].decoder.add_module("drop", nn.Dropout())
    made[2].encoder.register_forward_hook(lambda one, given, output: output)
    made[3].log_prob = lambda x, output: output  # type: ignore[assignment]
    nn.utils.parametrizations.spectral_norm(next(m for m in made[4].modules() if hasattr(m, "weight")))
    made[5], made[6] = VAE(spec, 2, NormedNetwork()), VAE(spec, 2, CentringNetwork())
    assert not any(is_covered(one) for one in (*made, Auto(spec), nn.Sequential(nn.Softmax(dim=0))))


def test_a_stack_is_held_against_its_experts_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(**vae(network=LinearNetwork(), execution="auto"))
    monkeypatch.setattr("mixdist.mixtures.ensemble.time_executions", lambda *args: pytest.fail("timed"))
    error_of(lambda: trainer.mixture.tune(rows(), Phase(1, 16, objective=WeightedLoss())), "VAE.forward", "stackable")


def test_what_only_rounding_changes_is_no_fault() -> None:
    """Discrete decisions and long sums differ in the last digits between batches of other sizes."""

    class Coarse(Auto):
        def out(self, rows: Batch, error: Tensor) -> Any:
            code = (error.detach() * 1e4).round() / 1e4
            return ExpertTerms(((error + code - error.detach()) * 1e6).sum(1))

    class Float32Inside(Auto):
        def out(self, rows: Batch, error: Tensor) -> Any:
            return ExpertTerms(error.float().sum(1).to(error.dtype))

    for kind in (Coarse, Float32Inside):
        make(expert=kind).begin()


# Evaluation.


def ability(**methods: Any) -> Any:
    return type("Mine", (Auto,), methods)


ABILITIES: dict[str, tuple[Any, str]] = {
    "reconstruct": (ability(reconstruct=lambda self, rows: rows["x"][:, :3]), "Mine.reconstruct (8, 3) (8, 6)"),
    "sample": (ability(sample=lambda self, eps: eps), "Mine.sample (8, 2) (8, 6)"),
    "sample by the batch": (ability(sample=lambda self, eps: self.decode(eps - eps.mean(0))), "Mine.sample other rows"),
    "draw": (ability(draw=lambda self, eps, uniform: torch.rand_like(uniform)), "Mine.draw generator"),
    "log_weights": (ability(log_weights=lambda self, rows, eps: eps.sum((1, 2))), "Mine.log_weights (8,) (8, 2)"),
    "no posterior": (ability(posterior=lambda self, rows: self.encode(rows["x"])), "Mine.posterior Posterior tensor"),
    "posterior of another size": (
        ability(posterior=lambda self, rows: Posterior(self.encode(rows["x"]), rows["x"])),
        "Mine.posterior kl_RL (8, 6) (8, 2)",
    ),
    "posterior of the batch": (
        ability(posterior=lambda self, rows: Posterior(self.encode(rows["x"]), self.encode(rows["x"]).sum())),
        "Mine.posterior kl_RL () (8, 2)",
    ),
    "posterior without KL": (
        ability(posterior=lambda self, rows: (self.encode(rows["x"]), None)),
        "Mine.posterior kl_RL None",
    ),
    "predict": (
        ability(predict=lambda self, rows: rows["x"], target="y", fields=("x", "y")),
        "Mine.predict (8, 6) (8, 3)",
    ),
}


@pytest.mark.parametrize("name", ABILITIES)
def test_an_optional_method_is_checked_before_an_evaluation(name: str) -> None:
    kind, words = ABILITIES[name]
    trainer = make(expert=kind)

    def run() -> None:
        trainer.begin()  # which calls reconstruct too: it finds duplicates by it
        assert name != "reconstruct"
        evaluate(trainer.mixture, rows(), 16, 0)

    error_of(run, *words.split())


def model_gate(**methods: Any) -> Any:
    return type("Mine", (Plain,), {"num_drawn": 2, **methods})


GATE_ABILITIES: dict[str, tuple[Any, str]] = {
    "reconstruct": (model_gate(reconstruct=lambda self, rows: rows["x"][:, :3]), "Mine.reconstruct (8, 3) (8, 6)"),
    "embed": (model_gate(latent=4, embed=lambda self, rows: rows["x"]), "Mine.embed (8, 6) (8, 4)"),
    "log_weights": (model_gate(log_weights=lambda self, rows, eps: rows["x"].sum(1)), "Mine.log_weights (8,) (8, 1)"),
    "log_weights of z": (
        model_gate(latent=2, log_weights=lambda self, rows, eps: eps.sum((1, 2))),
        "Mine.log_weights (8,) (8, 2)",
    ),
    "sample": (model_gate(sample=lambda self, cluster, eps: eps), "Mine.sample (8, 2) (8, 6)"),
    "draw": (model_gate(draw=lambda self, cluster, eps, uniform: torch.rand_like(uniform)), "Mine.draw generator"),
    "log_pi of another size": (model_gate(log_pi=lambda self: self.net.bias[:2]), "Mine.log_pi (2,) (3,)"),
    "weights": (model_gate(log_pi=lambda self: torch.ones(3)), "Mine.log_pi sum to 8.155 log_softmax"),
}


@pytest.mark.parametrize("name", GATE_ABILITIES)
def test_an_optional_method_of_a_gate_is_checked_too(name: str) -> None:
    kind, words = GATE_ABILITIES[name]
    trainer = make(gate=kind)
    trainer.begin()
    error_of(lambda: evaluate(trainer.mixture, rows(), 16, 0), "mixture.gate", *words.split())


def test_an_evaluation_checks_gate_and_experts_as_they_are_there() -> None:
    class Raw(Plain):
        def out(self, rows: Batch, logits: Tensor) -> Any:
            return super().out(rows, logits) if self.training else Gating(logits)

    trainer = make(gate=Raw)
    trainer.begin()
    line = error_of(lambda: evaluate(trainer.mixture, rows(), 16, 0), "Raw.forward", "log_softmax")
    assert line.startswith("in evaluation: mixture.gate: ")


def test_what_measures_a_family_is_checked() -> None:
    for measure, words in (
        (lambda self, batch, at: None, "Mine.measure None"),
        (lambda self, batch, at: {"error": "large"}, "Mine.measure str"),
        (lambda self, batch, at: batch.nothing, "Mine.measure AttributeError"),
    ):
        trainer = begin(type("Mine", (TwoStage,), {"measure": measure}))
        error_of(lambda t=trainer: evaluate(t.mixture, rows(), 16, 0), *words.split())


# In Python.

LEVELS: Spec = {"x": Field((SIZE,), torch.uint8, scale=1 / 16)}


@pytest.fixture(scope="module")
def model() -> Model:
    mixture, mesh = Soft(Softmax, lambda spec: VAE(spec, 2, MLP([4])), 2), mesh_of(2, 1, 1)
    mixture.setup(Context(7, torch.float32, LEVELS, mesh, Wire(mesh.device)))
    made: Model = mixture.model(())
    return made


STORED = torch.arange(2 * SIZE).reshape(2, SIZE)
CALLS: dict[str, tuple[Callable[[Model], Any], str]] = {
    "int64 beyond the levels": (lambda m: m.assign(STORED * 23), "'x' 0 to 253 0.0625 15.8125 0 to 16"),
    "uint8 beyond the levels": (lambda m: m.terms((STORED * 23).to(torch.uint8), 0), "'x' 253 0 to 16"),
    "uint16 beyond the levels": (lambda m: m.assign((STORED * 23).numpy().astype(np.uint16)), "'x' 253 0 to 16"),
    "a list beyond the levels": (lambda m: m.assign((STORED + 10).tolist()), "'x' 10 to 21 0 to 16"),
    "two experts": (lambda m: m.reconstruct(STORED, [0, 1]), "expert [0, 1] 0 to 1"),
    "half an expert": (lambda m: m.reconstruct(STORED, 0.5), "expert 0.5 0 to 1"),
    "an expert by name": (lambda m: m.terms(STORED, "0"), "expert '0' 0 to 1"),
    "no expert": (lambda m: m.terms(STORED, None), "expert None 0 to 1"),
    "half a sample": (lambda m: m.sample(2.5, 0), "num_samples (2.5)"),
    "samples by name": (lambda m: m.sample("x", 0), "num_samples ('x')"),
    "half a seed": (lambda m: m.sample(2, 0, seed=1.5), "seed (1.5)"),
    "a large seed": (lambda m: m.sample(2, 0, seed=2**70), "seed"),
    "sparse": (lambda m: m.assign((STORED / 16).to_sparse()), "'x' sparse dense"),
    "masked": (lambda m: m.assign(np.ma.masked_array((STORED / 16).numpy(), STORED > 3)), "'x' masked"),
    "no run": (lambda m: mixdist.load(None), "run (None)"),
    "a number for a run": (lambda m: mixdist.load(3), "run (3)"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_model_says_what_it_cannot_take(name: str, model: Model) -> None:
    call, words = CALLS[name]
    error_of(lambda: call(model), *words.split())


def test_real_numbers_beyond_the_likelihood_are_told_how_to_come_back() -> None:
    mixture, mesh = Soft(Softmax, lambda spec: VAE(spec, 2, MLP([4])), 2), mesh_of(2, 1, 1)
    mixture.setup(Context(7, torch.float32, SPEC, mesh, Wire(mesh.device)))
    made = mixture.model(())
    error_of(lambda: made.assign(3 * torch.ones(2, SIZE)), "'x'", "3 to 3", "0 to 1", "scale of the rows")
    error_of(lambda: made.assign(math.nan * torch.ones(2, SIZE)), "'x'", "nan", "no number")


def test_a_model_takes_numbers_of_any_type(model: Model) -> None:
    as_numbers = model.assign(STORED / 16)
    for given in (STORED, STORED.numpy().astype(np.uint16), STORED.tolist(), (STORED / 16).numpy()):
        assert torch.equal(model.assign(given), as_numbers)
    model.assign((STORED > 3).long())  # 0 and 1 are levels too
    assert model.reconstruct(STORED, np.int64(1)).shape == model.sample(np.int32(2), torch.tensor(0)).shape == (2, SIZE)


# By the command, on one rank and on two.

OWN = '''
import torch
from torch import nn
from mixdist.gates import Softmax
from mixdist.experts import VAE
from mixdist.mixtures import Balance, Mixture
from mixdist.nets import MLP
from mixdist.terms import Gating


class Raw(Softmax):
    def forward(self, rows, eps):
        return Gating(self.logits(rows))


class Failing(VAE):
    def __init__(self, spec):
        super().__init__(spec, spec["nix"])


class FailingBalance(Balance):
    def __init__(self):
        {}["nix"]


class FailingFamily(Mixture):
    """Fails where it is told to."""

    def __init__(self, num_experts: int, where: str):
        self.num_experts, self.where = num_experts, where
        self.reach("init")

    def reach(self, where):
        if where == self.where:
            self.nothing

    def setup(self, context):
        super().setup(context)
        self.reach("setup")

    @property
    def parts(self):
        self.reach("parts")

    def backward(self, *args):
        pass


class Second(VAE):
    """Right as expert 0, wrong as expert 1."""

    def __init__(self, spec, wrong: bool = False):
        super().__init__(spec, 2, MLP([4]))
        self.wrong = wrong

    def forward(self, rows, eps):
        terms = super().forward(rows, eps)
        return terms._replace(loss_R=terms.loss_R[:, None]) if self.wrong else terms
'''
SECOND = [{"class_path": "own_faults.Second", "init_args": {"wrong": wrong}} for wrong in (False, True)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gate": {"class_path": "own_faults.Raw"}}, "Raw.forward log_softmax"),
        ({"expert": SECOND}, "mixture.expert[1] Second.forward (8, 1) (8,)"),
    ],
    ids=["gate", "an expert of the second rank"],
)
def test_one_line_on_any_layout_and_nothing_left(
    changes: dict[str, Any], words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "own_faults.py").write_text(OWN)
    monkeypatch.syspath_prepend(folder)
    config = write_config(folder / "c.yaml", changed(SMALL, num_experts=2, **changes))
    alone = complaint(here("train", "--config", config, "--out", "run"))
    ended = together("train", "--config", config, "--out", "run", ranks=2, folder=folder)
    on_two = [line for line in ended.err.splitlines() if line.startswith("mixdist: ")]
    assert len(on_two) == 1, ended.err
    assert "Traceback" not in ended.err
    assert on_two[0].removeprefix("mixdist: ").removeprefix("rank 1: ") == alone
    assert all(word in alone for word in words.split()), alone
    assert not (folder / "run").exists()


def failing(where: str) -> dict[str, Any]:
    init_args = {"num_experts": 2, "where": where}
    return {**changed(SMALL), "mixture": {"class_path": "own_faults.FailingFamily", "init_args": init_args}}


BALANCE = changed(SMALL, train__objective__init_args__balance={"class_path": "own_faults.FailingBalance"})
MADE: dict[str, tuple[dict[str, Any], str]] = {
    "an expert": (
        changed(SMALL, expert={"class_path": "own_faults.Failing"}),
        "mixture.expert: Failing.__init__ KeyError 'nix' own_faults.py line",
    ),
    "a balance": (BALANCE, "FailingBalance.__init__ KeyError 'nix' own_faults.py line"),
    "a family": (failing("init"), "FailingFamily.__init__ AttributeError 'nothing' own_faults.py line"),
    "a family's setup": (failing("setup"), "FailingFamily.setup AttributeError 'nothing' own_faults.py line"),
    "a family's parts": (failing("parts"), "FailingFamily.parts AttributeError 'nothing' own_faults.py line"),
}


@pytest.mark.parametrize("name", MADE)
def test_what_cannot_be_made_is_told_in_one_line(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "own_faults.py").write_text(OWN)
    monkeypatch.syspath_prepend(folder)
    config, words = MADE[name]
    line = complaint(here("train", "--config", write_config(folder / "c.yaml", config), "--out", "run"))
    assert all(word in line for word in words.split()), line
    assert not (folder / "run").exists()
