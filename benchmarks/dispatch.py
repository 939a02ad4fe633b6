"""Bytes and time of each routing: mixdist's dispatch against a token-style mixture layer.

    torchrun --standalone --nproc-per-node 2 benchmarks/dispatch.py

W ranks with b rows each (uint8 colour images), K experts in even blocks; responsibilities are drawn, so no gate runs.
An expert is one product a pixel, x w_e, and its loss sum (x w_e - x)^2: what is timed is the way of rows and results.
Routings: dense (every expert sees every row), top-1 (hard), top-2.

mixdist     rows go once to each rank that has an expert for them, as stored, with their 8-byte ids; one loss returns
            for each (row, expert), and one gradient goes out. Dropless: every choice is served. Where rows go to some
            experts only, ranks first tell each other how many come (sync; it is counted here).
token       what token-mixture layers do around experts of any kind: float32 rows, one copy for each (row, expert), in
            buffers padded to a capacity that is the same for all: ceil(k b / K) rows from each rank for each expert
            (capacity factor 1; b when dense), what is above it dropped. Experts return reconstructions, float32 of the
            row's width, in buffers of the same size. The backward pass moves the gradient of the reconstructions out
            and the gradient of the rows back: four moves of equal size.

Bytes leave a rank in one step, mean over ranks; a rank's own part is not counted for either. ratio is mixdist's bytes
over the token style's. Three kinder counts of the token style, computed from the same buffers: rows_need_no_gradient
(three moves: pixels need none), forward_alone (two moves), bfloat16_forward_alone (two moves of half the size).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from turns import figures, ms, parser_of, plain, positive, ratio, run, take_turns, tell

from mixdist.mixtures.routing import TopK, admitted, demand, lay_out
from mixdist.parallel.agreement import gather_json
from mixdist.parallel.dispatch import Dispatch
from mixdist.parallel.launch import Launch
from mixdist.parallel.mesh import Mesh
from mixdist.parallel.wire import Wire
from mixdist.terms import Batch, Field

SEED = 5


class Even(torch.autograd.Function):
    """An all-to-all of equal parts, (W, ...) to (W, ...), which is its own adjoint."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, wire: Wire, group: Any) -> Tensor:
        ctx.wire, ctx.group = wire, group
        return move(parts, wire, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return move(grads[0].contiguous(), ctx.wire, ctx.group), None, None


def move(parts: Tensor, wire: Wire, group: Any) -> Tensor:
    """Send part w to rank w."""
    if group is None:
        return parts
    sizes = [parts[0].numel()] * len(parts)
    wire.meter.wire_bytes -= parts[0].numel() * parts.element_size()  # its own part does not leave the rank
    return wire.all_to_all(parts.reshape(-1), sizes, sizes, group).wait().view_as(parts)


class Work:
    """What both ways do in a step: rows, weights, which experts see which rows.

    Args:
        k: experts that see a row; None for all.
        mesh: the ranks.
        options: of the command line.
    """

    def __init__(self, k: int | None, mesh: Mesh, options: argparse.Namespace) -> None:
        self.k, self.mesh, self.wire = k, mesh, Wire(mesh.device)
        self.num_rows, self.num_experts = options.batch // mesh.world_size, options.experts
        shape = (3, options.image, options.image)
        self.field = Field(shape, torch.uint8, 1 / 255)
        draw = torch.Generator().manual_seed(SEED + mesh.rank)
        ids = mesh.rank * self.num_rows + torch.arange(self.num_rows)
        x = torch.randint(0, 256, (self.num_rows, *shape), dtype=torch.uint8, generator=draw)
        self.rows: Batch = {"id": ids.to(mesh.device), "x": x.to(mesh.device)}
        uniform = torch.rand(self.num_rows, self.num_experts, generator=draw)
        # Gumbel noise: without skew every expert is as likely to be first.
        logits_BE = -(-uniform.log()).log() - options.skew * torch.arange(self.num_experts)
        self.log_resp_BE = logits_BE.log_softmax(1).to(mesh.device)
        self.routed_BE = torch.ones_like(self.log_resp_BE, dtype=torch.bool)
        self.choices_BK = torch.arange(self.num_experts, device=mesh.device).expand(self.num_rows, -1)
        if k is not None:
            self.choices_BK = TopK(k).choices(self.log_resp_BE)
            self.routed_BE = lay_out(self.log_resp_BE, self.choices_BK, self.choices_BK < self.num_experts).routed_BE
        self.weights = torch.full((len(mesh.experts), self.field.num_values), 0.9, device=mesh.device)
        self.weights.requires_grad_()

    def run(self, steps: int) -> None:
        """Do some steps."""
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        """Do one step, forward and backward."""
        self.wire.meter.reset()
        self.weights.grad = None
        resp_BE = self.log_resp_BE.exp().requires_grad_()
        loss = self.loss(resp_BE)
        if loss.requires_grad:
            loss.backward()

    def loss(self, resp_BE: Tensor) -> Tensor:
        """Return the weighted loss of this rank's rows."""
        raise NotImplementedError

    def bytes_sent(self) -> float:
        """Return the bytes that left a rank in the last step, mean over ranks."""
        meter = self.wire.meter
        counted = gather_json(meter.wire_bytes + meter.sync_bytes, self.mesh.world)
        return sum(counted) / len(counted)


class Ours(Work):
    """mixdist's dispatch, dropless."""

    def loss(self, resp_BE: Tensor) -> Tensor:
        dispatch = Dispatch(self.mesh, self.wire, {"x": self.field})
        if self.k is None:
            route = dispatch.send(self.rows, ("x",), [self.num_rows] * self.mesh.world_size)
        else:
            counts = dispatch.arrivals([self.routed_BE])[0]
            route = dispatch.send_some(self.rows, ("x",), self.routed_BE, counts)
        x = self.field.values(route.rows()["x"], torch.float32).flatten(1)
        columns = []
        for e, weight in enumerate(self.weights):
            places = slice(None) if route.mask_Re is None else route.mask_Re[:, e].nonzero()[:, 0]
            losses = (x[places] * weight - x[places]).square().sum(1)
            columns.append(losses if route.mask_Re is None else losses.new_zeros(len(x)).index_put((places,), losses))
        losses_BE = dispatch.combine(torch.stack(columns, 1), route)
        return (resp_BE * self.routed_BE * losses_BE).sum()


class Token(Work):
    """One float32 copy for each (row, expert) out, one reconstruction back, padded to an even capacity."""

    def __init__(self, k: int | None, mesh: Mesh, options: argparse.Namespace) -> None:
        super().__init__(k, mesh, options)
        asked = self.num_experts if k is None else min(k, self.num_experts)
        self.capacity = math.ceil(asked * self.num_rows / self.num_experts)
        demand_1KE = demand(self.choices_BK, self.num_experts)[None]
        self.kept_BK = admitted(self.choices_BK, demand_1KE, 0, self.capacity)
        self.dropped = 1 - self.kept_BK.float().mean().item()

    def loss(self, resp_BE: Tensor) -> Tensor:
        ranks, per_rank = self.mesh.world_size, self.num_experts // self.mesh.world_size
        x = self.field.values(self.rows["x"], torch.float32).flatten(1).requires_grad_()
        kept_BE = torch.zeros_like(self.routed_BE).scatter(1, self.choices_BK, self.kept_BK)
        row_T, expert_T = kept_BE.nonzero(as_tuple=True)
        place_T = (kept_BE.cumsum(0) - 1)[row_T, expert_T]
        out = x.new_zeros(self.num_experts, self.capacity, x.shape[1]).index_put((expert_T, place_T), x[row_T])
        arrived = Even.apply(out.view(ranks, per_rank, self.capacity, -1), self.wire, self.mesh.world)
        made = arrived * self.weights[None, :, None]
        back = Even.apply(made, self.wire, self.mesh.world).view(self.num_experts, self.capacity, -1)
        losses_T = (back[expert_T, place_T] - x.detach()[row_T]).square().sum(1)
        return (resp_BE[row_T, expert_T] * losses_T).sum()


def measure(options: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    """Run both ways in turns; return what is written. Every rank calls it."""
    for name, value in (("experts", options.experts), ("batch", options.batch)):
        if value % mesh.world_size:
            raise ValueError(
                f"{name} ({value}) must be a multiple of the {mesh.world_size} ranks: the buffers are even"
            )
    routings: dict[str, int | None] = {"dense": None, "top-1": 1, "top-2": 2}
    works = {
        (routing, way): kind(k, mesh, options)
        for routing, k in routings.items()
        for way, kind in (("mixdist", Ours), ("token", Token))
    }
    seconds, _ = take_turns({" ".join(key): work.run for key, work in works.items()}, options, mesh)
    result = {
        routing: hold(routing, works[routing, "mixdist"], works[routing, "token"], seconds) for routing in routings
    }
    show(result, mesh)
    return {"routings": result}


def read_options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__, turns=11, steps=5)
    parser.add_argument("--experts", type=positive, default=2 * Launch.read().world_size, help="K; unset, two a rank")
    parser.add_argument("--batch", type=positive, default=64, help="rows of the global batch")
    parser.add_argument("--image", type=positive, default=64, help="height and width of the images")
    parser.add_argument("--skew", type=float, default=0.0, help="expert e's logit is lower by skew e")
    return parser.parse_args(words)


def hold(routing: str, ours: Work, token: Work, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Compare one way with the other; every rank calls it."""
    assert isinstance(token, Token)
    sent, padded = ours.bytes_sent(), token.bytes_sent()
    kinder = {"rows_need_no_gradient": 3 / 4, "forward_alone": 2 / 4, "bfloat16_forward_alone": 1 / 4}
    dropped = gather_json(token.dropped, token.mesh.world)
    mine, theirs = seconds[f"{routing} mixdist"], seconds[f"{routing} token"]
    return {
        "bytes": {"mixdist": sent, "token": padded},
        "ratio": sent / padded if padded else None,
        "ratio_to_kinder": {name: sent / (padded * part) if padded else None for name, part in kinder.items()},
        "least_bytes_equal": ours.wire.meter.wire_bytes == ours.wire.meter.wire_bytes_min,
        "token_dropped": sum(dropped) / len(dropped),
        "seconds": {"mixdist": figures(mine), "token": figures(theirs)},
        "seconds_ratio": ratio(mine, theirs),
    }


def show(result: dict[str, Any], mesh: Mesh) -> None:
    """Print the table, on rank 0."""
    head = ["routing", "mixdist kB", "token kB", "ratio", "to bf16 forward alone", "token drops"]
    head += ["mixdist ms", "token ms", "time ratio"]
    lines = [
        [
            routing,
            *(f"{told['bytes'][way] / 1e3:.1f}" for way in ("mixdist", "token")),
            "-" if told["ratio"] is None else f"{told['ratio']:.4f}",
            "-" if told["ratio"] is None else f"{told['ratio_to_kinder']['bfloat16_forward_alone']:.4f}",
            f"{100 * told['token_dropped']:.0f}%",
            *(ms(told["seconds"][way]) for way in ("mixdist", "token")),
            plain(told["seconds_ratio"]),
        ]
        for routing, told in result.items()
    ]
    tell(head, lines, mesh)


if __name__ == "__main__":
    run(read_options, measure)
