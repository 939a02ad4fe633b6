"""A mixture of convolutional VAEs trained three ways: by one process, by DDP, by mixdist.

Every rival starts from the same weights, takes the same rows in the same order, and steps fused Adam.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from mixdist.data import Dataset, Loader, RankBatch
from mixdist.engines import EngineFactory, Native
from mixdist.experts import VAE, Compute, Expert
from mixdist.gates import Gate, Softmax
from mixdist.mixtures import Context, KLBalance, Soft, TopK, WeightedLoss
from mixdist.nets import Conv
from mixdist.noise import Moment, Purpose, weights_seed
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import Wire
from mixdist.terms import Field, Outcome, Spec

SEED = 7
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"network": Conv([8, 8]), "latent": 4},
    "small": {"network": Conv([16, 32, 64, 128]), "latent": 16},
    "large": {"network": Conv([64, 128, 256, 512]), "latent": 160},
}
"""Of one expert; 0.29 and 7.0 million parameters on 64x64 for small and large."""


@dataclass(frozen=True)
class Problem:
    """What all rivals train: K experts of a size and a gate on synthetic colour images.

    Args:
        size: a key of SIZES.
        num_experts: K.
        batch_size: rows of the global batch.
        image: height and width.
        balance: weight of the KL balance term; 0 for none.
        num_batches: of an epoch.
    """

    size: str
    num_experts: int
    batch_size: int
    image: int = 64
    balance: float = 1.0
    num_batches: int = 8

    def data(self) -> Dataset:
        """Return smooth noise as uint8 images, the same on every rank."""
        draw = torch.Generator().manual_seed(SEED)
        num_rows = self.num_batches * self.batch_size
        coarse = torch.rand(num_rows, 3, 4, 4, generator=draw)
        x = nn.functional.interpolate(coarse, (self.image, self.image), mode="bilinear")
        field = Field((3, self.image, self.image), torch.uint8, 1 / 255)
        return Dataset({"id": torch.arange(num_rows), "x": (255 * x).to(torch.uint8)}, {"x": field})

    def expert(self, number: int, dataset: Dataset) -> Expert:
        """Make one, with the weights that belong to its number."""
        torch.manual_seed(weights_seed(SEED, Purpose.WEIGHTS, number))
        return self.make_expert(dataset.spec)

    def make_expert(self, spec: Spec) -> Expert:
        """Make one with weights from torch's generator."""
        return VAE(spec, **SIZES[self.size])

    def gate(self, dataset: Dataset) -> Gate:
        """Make the gate."""
        torch.manual_seed(weights_seed(SEED, Purpose.GATE))
        return make_gate(dataset.spec, self.num_experts)

    def objective(self) -> WeightedLoss:
        """Return sum_e r_e l_e and the balance term."""
        return WeightedLoss(KLBalance(self.balance) if self.balance else None)


def make_gate(spec: Spec, num_experts: int) -> Gate:
    """Make a gate with weights from torch's generator."""
    return Softmax(spec, num_experts, Conv([16, 32]))


def adam(parameters: Iterable[Tensor]) -> Optimizer:
    """Make the optimiser of every rival."""
    return torch.optim.Adam(parameters, lr=1e-3, fused=True)


class Rival:
    """Something that trains: what each way has in common.

    Args:
        problem: what it trains.
        dataset: of the problem.
        rank: whose share of a batch it takes.
        world_size: of how many.
        device: where it computes.
    """

    def __init__(self, problem: Problem, dataset: Dataset, rank: int, world_size: int, device: torch.device) -> None:
        self.problem, self.dataset, self.device = problem, dataset, device
        self.loader = Loader(dataset, problem.batch_size, SEED, 0, rank, world_size)
        self.number = 0
        self.first_loss: float | None = None

    def take(self) -> RankBatch:
        """Return the next rows."""
        self.number += 1
        return self.loader.batch(*divmod(self.number - 1, self.loader.num_batches)).to(self.device)

    def run(self, steps: int) -> None:
        """Train for some steps."""
        for _ in range(steps):
            self.step()

    def step(self, timed: bool = False) -> None:
        """Train for one step."""
        raise NotImplementedError

    def bytes_held(self) -> dict[str, int]:
        """Return the bytes on this rank of the experts' parameters, and of the whole optimiser state."""
        raise NotImplementedError


class Everything(nn.Module):
    """Gate and all experts in one module, the loss written plainly; what a user writes for one process or for DDP.

    The balance term is taken over the rows at hand; under DDP that is a rank's share, not the batch.
    """

    def __init__(self, problem: Problem, dataset: Dataset) -> None:
        super().__init__()
        self.gate = problem.gate(dataset)
        self.experts = nn.ModuleList(problem.expert(e, dataset) for e in range(problem.num_experts))
        self.latent, self.balance = SIZES[problem.size]["latent"], problem.balance

    def forward(self, stored: Tensor) -> Tensor:
        rows = {"x": stored.float() * (1 / 255)}
        log_resp_BE = self.gate(rows, None).log_resp_BE
        eps = torch.randn(len(self.experts), len(stored), self.latent, device=stored.device)
        losses_BE = torch.stack([expert(rows, eps[e]).loss_R for e, expert in enumerate(self.experts)], dim=1)
        resp_BE = log_resp_BE.exp()
        loss = (resp_BE * losses_BE).sum(1).mean()
        if self.balance:
            mean_E = resp_BE.mean(0)
            loss = loss + self.balance * (mean_E * (mean_E * len(self.experts)).log()).sum()
        return loss


class Replicated(Rival):
    """Every process holds gate and all experts: one process alone, or DDP over the ranks.

    Args:
        problem: what it trains.
        dataset: of the problem.
        mesh: the ranks; None for a process alone.
        device: where it computes.
    """

    def __init__(self, problem: Problem, dataset: Dataset, mesh: Mesh | None, device: torch.device) -> None:
        rank, world_size = (0, 1) if mesh is None else (mesh.rank, mesh.world_size)
        super().__init__(problem, dataset, rank, world_size, device)
        self.whole = Everything(problem, dataset).to(device)
        self.model: nn.Module = self.whole
        if mesh is not None and mesh.world is not None:
            # No buffer here ever changes; torch 2.13 has a new name for not sending them in every step.
            new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
            still: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
            self.model = DistributedDataParallel(self.whole, gradient_as_bucket_view=True, static_graph=True, **still)
        self.optimizer = adam(self.model.parameters())

    def step(self, timed: bool = False) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(self.take().rows["x"])
        loss.backward()
        self.optimizer.step()
        loss_now = loss.item()  # every way looks at its loss in every step
        if self.first_loss is None:
            self.first_loss = loss_now

    def bytes_held(self) -> dict[str, int]:
        return {"experts": num_bytes(self.whole.experts.parameters()), "optimizer": state_bytes([self.optimizer])}


class ExpertParallel(Rival):
    """mixdist: each rank holds its own experts; the engine's own totals and checks are part of its step.

    Args:
        problem: what it trains.
        dataset: of the problem.
        mesh: the ranks.
        one_way: send the gradients of the losses ahead.
        prefetch: send a step's rows during the step before.
        micro_batch: rows that an expert runs at once.
        routing: which experts see a row; None for all.
        wire: the collectives.
        engine: makes the engine.
        gate: makes the gate.
    """

    def __init__(
        self,
        problem: Problem,
        dataset: Dataset,
        mesh: Mesh,
        one_way: bool = False,
        prefetch: bool = False,
        micro_batch: int | None = None,
        routing: TopK | None = None,
        wire: Wire | None = None,
        engine: EngineFactory = Native,
        gate: Callable[[Spec, int], Gate] = make_gate,
    ) -> None:
        super().__init__(problem, dataset, mesh.rank, mesh.world_size, mesh.device)
        self.mesh, self.wire = mesh, wire or Wire(mesh.device)
        how: dict[str, Any] = {"routing": routing, "one_way": one_way, "prefetch": prefetch, "execution": "loop"}
        compute = Compute(micro_batch)
        self.mixture = Soft(gate, problem.make_expert, problem.num_experts, **how, compute=compute)
        self.mixture.setup(Context(SEED, torch.float32, dataset.spec, mesh, self.wire))
        self.mixture.twin = None  # an expert made once more, for checks that are not made here
        self.engine = engine(self.mixture.parts, mesh, self.wire, adam, None, None)
        self.objective = problem.objective()
        self.upcoming: RankBatch | None = None
        self.meter: dict[str, int] = {}
        self.done = 0

    def step(self, timed: bool = False) -> None:
        totals = self.engine.step(self.backward(timed), self.done)
        self.meter = totals.meter
        if self.first_loss is None:
            self.first_loss = totals.outcome.loss.item()
        self.done += 1

    def backward(self, timed: bool = False) -> Outcome:
        """Do all of a step but the engine's part: what dispatch, gate and experts do."""
        self.wire.meter.reset(timed)
        for owned in self.mixture.parts.owned():
            getattr(owned.module, "anneal", lambda step: None)(self.done)
        self.objective.anneal(self.done)
        shard = self.upcoming or self.take()
        self.upcoming = self.take() if self.mixture.prefetch else None
        self.engine.zero_grad()
        with self.engine.accumulating():
            return self.mixture.backward(shard, self.objective, Moment(SEED, 0, self.done), 1, self.upcoming)

    def bytes_held(self) -> dict[str, int]:
        experts = (p for module in self.mixture.parts.experts.values() for p in module.parameters())
        return {"experts": num_bytes(experts), "optimizer": state_bytes(self.engine.optimizers.values())}


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def state_bytes(optimizers: Iterable[Optimizer]) -> int:
    """Return the bytes of the tensors in the optimisers' states."""
    return num_bytes(
        v for o in optimizers for state in o.state.values() for v in state.values() if isinstance(v, Tensor)
    )


def on_rank_0(rival: Callable[[int], Any] | None, threads: int) -> Callable[[int], None]:
    """Let rank 0 run alone with some threads; the others have None."""

    def run(steps: int) -> None:
        if rival is None:
            return
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        rival(steps)
        torch.set_num_threads(before)

    return run
