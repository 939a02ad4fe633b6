"""Ways from rows to VAEs on other ranks and back: mixdist's dispatch, a token-style layer, DeepSpeed's MoE layer.

All carry the same experts, with the same weights, and choose by the same linear map of the pixels. A step is a forward
and a backward pass; no optimiser steps, and nothing is reduced over ranks but what the way itself needs.

mixdist    rows as stored, with their ids, to each rank that has an expert for them; a loss and its gradient return.
token      float32 rows to experts in buffers of one capacity, reconstructions back, the gradient of these out again:
           three moves of equal size, since pixels need no gradient.
deepspeed  ``deepspeed.moe.layer.MoE``: the same three moves, its own gate, its own all-to-all, counted where it is
           called. Its choice of k experts has a capacity; with k = K it is dense.

An expert in the last two returns its reconstruction; its KL is added to the loss of the rank that it is on.
"""

from __future__ import annotations

import logging
import math
import os
from typing import Any

import torch
from dispatch import Even
from rivals import SEED, ExpertParallel, Problem, Rival
from torch import Tensor, nn

from mixdist.data import Dataset
from mixdist.experts import VAE
from mixdist.gates import Softmax
from mixdist.mixtures import TopK
from mixdist.mixtures.routing import admitted, demand
from mixdist.nets import MLP
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import Wire


def choices(problem: Problem, dataset: Dataset) -> Tensor:
    """Return the map that all ways choose by, (K, D): blind to brightness, so that experts get about as many rows."""
    size = dataset.spec["x"].num_values
    map_KD = torch.randn(problem.num_experts, size, generator=torch.Generator().manual_seed(SEED))
    return (map_KD - map_KD.mean(1, keepdim=True)) / size**0.5


class Ours(ExpertParallel):
    """mixdist's dispatch.

    Args:
        k: experts that see a row; None for all.
        problem: what it carries.
        dataset: of the problem.
        mesh: the ranks.
    """

    def __init__(self, k: int | None, problem: Problem, dataset: Dataset, mesh: Mesh) -> None:
        routing = None if k is None else TopK(k, renormalise=False)
        super().__init__(problem, dataset, mesh, routing=routing, gate=lambda spec, num: Softmax(spec, num, MLP([])))
        with torch.no_grad():
            next(p for p in self.mixture.gate.parameters() if p.dim() == 2).copy_(choices(problem, dataset).T)

    def step(self, timed: bool = False) -> None:
        self.backward(timed)
        self.done += 1

    def dropped(self) -> float:
        """Return the part of choices that no expert served: none."""
        return 0.0

    def sent(self) -> int:
        """Return the bytes that left this rank in the last step."""
        return self.wire.meter.wire_bytes + self.wire.meter.sync_bytes


class Bent(nn.Module):
    """A VAE as an expert of a token layer: flat rows in, its output for them out; the KL of the rows is kept.

    Args:
        vae: the expert.
    """

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae, self.kl = vae, torch.zeros(())

    def forward(self, rows: Tensor) -> Tensor:
        x = rows.reshape(-1, rows.shape[-1])
        mean, log_var = self.vae.encode({"x": x.view(-1, *self.vae.shape)})
        z = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
        self.kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum()
        return self.vae.decoder(z).reshape(rows.shape)


class TokenStyle(Rival):
    """What token layers do: float32 copies out, reconstructions back, in buffers padded to an even capacity.

    Args:
        k: experts that see a row; None for all.
        problem: what it carries.
        dataset: of the problem.
        mesh: the ranks.
    """

    def __init__(self, k: int | None, problem: Problem, dataset: Dataset, mesh: Mesh) -> None:
        super().__init__(problem, dataset, mesh.rank, mesh.world_size, mesh.device)
        self.mesh, self.wire, self.k = mesh, Wire(mesh.device), k or problem.num_experts
        self.field, self.num_rows = dataset.spec["x"], problem.batch_size // mesh.world_size
        self.served = 1.0
        self.likelihood = problem.expert(0, dataset).likelihood  # type: ignore[union-attr]
        self.model = self.make().to(mesh.device)

    def make(self) -> nn.Module:
        """Make gate and experts."""
        self.bent = [Bent(self.problem.expert(e, self.dataset)) for e in self.mesh.experts]  # type: ignore[arg-type]
        self.gate = nn.Linear(self.field.num_values, self.problem.num_experts, bias=False)
        self.gate.weight.data = choices(self.problem, self.dataset)
        return nn.ModuleList([self.gate, *self.bent])

    def step(self, timed: bool = False) -> None:
        self.wire.meter.reset(timed)
        self.model.zero_grad(set_to_none=True)
        x = self.field.values(self.take().rows["x"], torch.float32).flatten(1)
        loss = self.loss(x) + sum(bent.kl for bent in self.bent) / self.num_rows
        loss.backward()
        self.first_loss = loss.item()

    def loss(self, x_BD: Tensor) -> Tensor:
        """Return the loss of this rank's rows, but for KL."""
        resp_BE = self.gate(x_BD).softmax(1)
        choices_BK = TopK(self.k).choices(resp_BE)
        capacity = math.ceil(self.k * len(x_BD) / self.problem.num_experts)
        kept_BK = admitted(choices_BK, demand(choices_BK, self.problem.num_experts)[None], 0, capacity)
        self.served = kept_BK.float().mean().item()
        kept_BE = torch.zeros_like(resp_BE, dtype=torch.bool).scatter(1, choices_BK, kept_BK)
        row_T, expert_T = kept_BE.nonzero(as_tuple=True)
        place_T = (kept_BE.cumsum(0) - 1)[row_T, expert_T]
        out = x_BD.new_zeros(self.problem.num_experts, capacity, x_BD.shape[1])
        out = out.index_put((expert_T, place_T), x_BD[row_T])
        parts = Even.apply(out.view(self.mesh.world_size, len(self.bent), capacity, -1), self.wire, self.mesh.world)
        made = torch.stack([bent(parts[:, i]) for i, bent in enumerate(self.bent)], dim=1)
        back = Even.apply(made, self.wire, self.mesh.world).view(self.problem.num_experts, capacity, -1)
        log_px_T = self.likelihood.log_prob(x_BD[row_T], back[expert_T, place_T])
        return -(resp_BE[row_T, expert_T] * log_px_T).sum() / len(x_BD)

    def dropped(self) -> float:
        """Return the part of this rank's choices that no expert served in the last step."""
        return 1 - self.served

    def sent(self) -> int:
        """Return the bytes that left this rank in the last step."""
        return self.wire.meter.wire_bytes


class DeepSpeedStyle(TokenStyle):
    """DeepSpeed's own layer, as it is; the weighted mean of reconstructions is what it returns."""

    def make(self) -> nn.Module:
        os.environ["DS_ACCELERATOR"] = self.device.type
        import deepspeed
        from deepspeed.moe import layer, sharded_moe

        deepspeed.utils.logger.setLevel(logging.ERROR)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled at the first start
        deepspeed.init_distributed(dist_backend="gloo" if self.device.type == "cpu" else "nccl", verbose=False)
        self.counted, inner = 0, sharded_moe.dist.all_to_all_single

        def counting(output: Tensor, flat: Tensor, *args: Any, **named: Any) -> Any:
            ranks = self.mesh.world_size
            self.counted += flat.numel() * flat.element_size() * (ranks - 1) // ranks  # its own part stays
            return inner(output, flat, *args, **named)

        self.counting = counting
        size, num_experts = self.field.num_values, self.problem.num_experts
        first = Bent(self.problem.expert(0, self.dataset))  # type: ignore[arg-type]
        how: dict[str, Any] = {"min_capacity": 1, "use_rts": False, "top2_2nd_expert_sampling": False}
        moe = layer.MoE(size, first, num_experts, self.mesh.world_size, self.k, **how)
        moe.set_deepspeed_parallelism()
        self.bent = list(moe.deepspeed_moe.experts.deepspeed_experts)
        for e, bent in zip(self.mesh.experts, self.bent, strict=True):
            bent.vae.load_state_dict(self.problem.expert(e, self.dataset).state_dict())
        moe.deepspeed_moe.gate.wg.weight.data = choices(self.problem, self.dataset)
        self.module = sharded_moe
        return moe

    def step(self, timed: bool = False) -> None:
        self.counted, inner = 0, self.module.dist.all_to_all_single
        self.module.dist.all_to_all_single = self.counting
        try:
            super().step(timed)
        finally:
            self.module.dist.all_to_all_single = inner

    def loss(self, x_BD: Tensor) -> Tensor:
        output_BD, balance, counts_E = self.model(x_BD)
        capacity = math.ceil(self.k * len(x_BD) / self.problem.num_experts)
        self.served = (counts_E.clamp(max=capacity).sum() / counts_E.sum()).item()
        return 0.01 * balance - self.likelihood.log_prob(x_BD, output_BD).mean()

    def sent(self) -> int:
        return self.counted
