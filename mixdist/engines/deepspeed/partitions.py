"""What each rank steps under ZeRO 1 and 2: a part of all numbers that a group holds, laid one after another.

DeepSpeed lays the parameters of a group of ranks one after another and cuts them into equal parts, one a rank; a
parameter may begin on one rank and end on the next. Its optimiser knows the part alone, a copy of it in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mixdist.engines.copies import bring
from mixdist.engines.deepspeed.library import cut
from mixdist.engines.engine import OptimizerFactory
from mixdist.parallel import costs
from mixdist.parallel.wire import Group, Wire


class Piece(NamedTuple):
    """Where a part of a parameter lies: ``size`` numbers from ``start`` on are at ``place`` of the part of a group."""

    group: int
    place: int
    start: int
    size: int


class Partitions:
    """Parts of parameters, gradients and states that this rank has, and what it steps.

    Args:
        engine: DeepSpeed's.
        optimizer: makes an optimiser for parameters.
        parts: what all ranks hold, and what replicas hold; their number of members.
    """

    sharded = True

    def __init__(
        self, engine: Any, optimizer: OptimizerFactory, parts: Sequence[tuple[Sequence[nn.Parameter], int]]
    ) -> None:
        self.engine, self.zero = engine, engine.optimizer
        # With offload the library insists on a norm, of as many reductions over all ranks as a rank has groups.
        self.zero.compute_grad_norm = False
        for hook in self.zero._grad_acc_hooks:
            # They would reduce a gradient as soon as it is there; a mixture may add to it several times.
            hook.remove()
        flat = self.zero.single_partition_of_fp32_groups
        self.optimizer: Optimizer = optimizer(flat)
        self.optimizer.param_groups[:] = cut(self.optimizer, [[part] for part in flat])
        self.zero.optimizer = self.optimizer
        self.pieces = {p: piece for group in range(len(flat)) for p, piece in self._pieces(group)}
        counts = [(sum(p.numel() for p in held), ranks) for held, ranks in parts]
        ways = 2 if self.zero.use_multi_rank_bucket_allreduce else 1  # there and back, or there alone
        self.reduced_bytes = sum(costs.reduction(4 * numbers, ranks) * ways // 2 for numbers, ranks in counts)
        self.spread_bytes = sum(4 * (ranks - 1) * costs.partition(numbers, ranks) for numbers, ranks in counts)

    def _pieces(self, group: int) -> list[tuple[nn.Parameter, Piece]]:
        """Find what this rank has of the parameters of a group, in their order there."""
        zero = self.zero
        size = int(zero.partition_size[group])
        first, found = size * dist.get_rank(zero.real_dp_process_group[group]), []
        for parameter, offset in zip(
            zero.round_robin_bit16_groups[group], zero.round_robin_bit16_offsets[group], strict=True
        ):
            begin, end = max(offset, first), min(offset + parameter.numel(), first + size)
            if begin < end:
                found.append((parameter, Piece(group, begin - first, begin - offset, end - begin)))
        return found

    def reduce(self) -> None:
        """Sum gradients at whoever steps them; elsewhere they are gone."""
        with self.engine.coalesce_grad_reduction():
            pass  # gradients are there: what it does at its end
        if self.zero.cpu_offload:
            self.zero._wait_for_offload_copies()  # gradients are read before it steps

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Return what this rank has of each parameter's summed gradient."""
        found = {}
        own = {group: iter(parts or ()) for group, parts in self.zero.averaged_gradients.items()}
        for parameter, piece in self.pieces.items():
            if self.zero.cpu_offload:
                whole = self.zero.single_partition_of_fp32_groups[piece.group].grad
                found[parameter] = whole.narrow(0, piece.place, piece.size)
            else:
                found[parameter] = next(own[piece.group])
        return found

    def step(self) -> None:
        """Step parameters by their gradients, from the values that they have now, and send them to who holds copies."""
        self.zero.refresh_fp32_params()
        self.zero.step()

    def drop(self) -> None:
        """Forget reduced gradients."""
        zero = self.zero
        zero.zero_grad()
        zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)
        zero.micro_step_id = -1
        if zero.cpu_offload:
            zero.reset_cpu_buffers()

    def close(self) -> None:
        """Let go of what is here: the library refers to itself, and would keep it until Python looks for such."""
        self.optimizer.state.clear()
        self.zero.single_partition_of_fp32_groups.clear()
        self.pieces.clear()

    def state(self, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return what this rank has of the states of named parameters: "<start> <parameter>.<key>" to numbers."""
        state = {}
        for name, parameter in named.items():
            if (piece := self.pieces.get(parameter)) is None:
                continue
            for key, value in self.optimizer.state.get(self._flat(piece), {}).items():
                value = torch.as_tensor(value)
                if value.dim():
                    state[f"{piece.start} {name}.{key}"] = value.narrow(0, piece.place, piece.size)
                elif piece.start == 0:
                    state[f"0 {name}.{key}"] = value
        return state

    def gather(self, named: Mapping[str, nn.Parameter], group: Group, wire: Wire) -> dict[str, Tensor]:
        """Return the states of named parameters on the first member of a group, "<parameter>.<key>" to tensor."""
        whole: dict[str, Tensor] = {}
        for place, value in bring(self.state(named), group, wire).items():
            start, _, name = place.partition(" ")
            parameter = named[name.rpartition(".")[0]]
            if not value.dim():
                whole[name] = value
                continue
            flat = whole.setdefault(name, torch.empty(parameter.shape, dtype=value.dtype, device=value.device))
            flat.view(-1)[int(start) : int(start) + value.numel()] = value
        return whole

    def load(self, named: Mapping[str, nn.Parameter], state: dict[str, Tensor]) -> None:
        """Put states of named parameters in place, as far as they are here."""
        own = {name: (named[name.rpartition(".")[0]], name.rpartition(".")[2], value) for name, value in state.items()}
        single = {"step"} | {key for parameter, key, value in own.values() if parameter.dim() and not value.dim()}
        fused = any(group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups)
        for parameter, key, value in own.values():
            if (piece := self.pieces.get(parameter)) is None:
                continue
            flat = self._flat(piece)
            here = self.optimizer.state[flat]
            if key in single:
                here[key] = value.to(flat.device if fused else value.device, copy=True)
            else:
                here.setdefault(key, torch.zeros_like(flat, dtype=value.dtype))
                part = value.reshape(-1).narrow(0, piece.start, piece.size)
                here[key].narrow(0, piece.place, piece.size).copy_(part)

    def _flat(self, piece: Piece) -> Tensor:
        """Return this rank's part of a group, as the optimiser knows it."""
        flat: Tensor = self.optimizer.param_groups[piece.group]["params"][0]
        return flat
