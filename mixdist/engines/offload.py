"""Optimiser states in CPU memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Offloaded:
    """Copies of tensors in CPU memory, which optimisers step in their place: so their states are there, too.

    Values and gradients go there before a step and new values come back: a tensor is written to by others as well, such
    as initialisers. Beside CUDA the memory is pinned, so that copies run at the full speed of the bus. On a CPU it is a
    copy all the same: there it saves nothing, and shows what a device would compute.

    Args:
        tensors: on any device.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.copies = {tensor: _copy(tensor) for tensor in tensors}
        self.devices = {tensor.device for tensor in self.copies if tensor.is_cuda}

    @torch.no_grad()
    def fetch(self) -> None:
        """Bring values and gradients to CPU memory."""
        for tensor, copy in self.copies.items():
            assert tensor.grad is not None
            assert copy.grad is not None
            copy.copy_(tensor, non_blocking=True)
            copy.grad.copy_(tensor.grad, non_blocking=True)
        for device in self.devices:
            torch.cuda.current_stream(device).synchronize()

    @torch.no_grad()
    def put(self) -> None:
        """Bring values back."""
        for tensor, copy in self.copies.items():
            tensor.copy_(copy, non_blocking=True)


def check_steps_on_cpu(*optimizers: Optimizer) -> None:
    """Check that optimisers can step in CPU memory.

    Raises:
        ValueError: one cannot.
    """
    if any(optimizer.defaults.get("capturable") for optimizer in optimizers):
        raise ValueError(
            "engine.offload (optimizer) has optimizers step in CPU memory, where one with capturable cannot: leave "
            "capturable or offload out"
        )


def _copy(tensor: Tensor) -> nn.Parameter:
    copy = nn.Parameter(torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda))
    copy.grad = torch.empty_like(copy, pin_memory=tensor.is_cuda)
    return copy
