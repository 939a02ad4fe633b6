"""What optimisers step in place of parameters: copies in CPU memory, and float32 masters of bfloat16 weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from mixdist.terms import Parts


class Masters:
    """Copies that optimisers step in place of tensors: so their states are where these are.

    Values and gradients go there before a step and new values come back: a tensor is written to by others as well, such
    as initialisers. A copy of bfloat16 weights stays float32 and is not written to between: what a step adds to it is
    kept, also where it is less than bfloat16 can tell.

    Beside CUDA, CPU memory is pinned, so that copies run at the full speed of the bus. On a CPU it is a copy all the
    same: there it saves nothing, and shows what a device would compute.

    Args:
        tensors: on any device.
        offload: copies are in CPU memory; else beside their tensors.
    """

    def __init__(self, tensors: Iterable[Tensor], offload: bool) -> None:
        self.copies, self.offload = {tensor: _copy(tensor, offload) for tensor in tensors}, offload
        self.devices = {tensor.device for tensor in self.copies if tensor.is_cuda and offload}

    @torch.no_grad()
    def fetch_values(self) -> None:
        """Bring the values of tensors to their copies, but those of bfloat16 weights."""
        for tensor, copy in self.copies.items():
            if tensor.dtype == copy.dtype:
                copy.copy_(tensor, non_blocking=True)

    @torch.no_grad()
    def fetch(self) -> None:
        """Bring values and gradients to the copies."""
        self.fetch_values()
        for tensor, copy in self.copies.items():
            assert tensor.grad is not None
            if not self.offload:
                copy.grad = tensor.grad
                continue
            if copy.grad is None:
                copy.grad = torch.empty_like(copy, pin_memory=tensor.is_cuda)
            copy.grad.copy_(tensor.grad, non_blocking=True)
        for device in self.devices:
            torch.cuda.current_stream(device).synchronize()

    @torch.no_grad()
    def put(self) -> None:
        """Bring values back; bfloat16 weights become the nearest to them."""
        for tensor, copy in self.copies.items():
            tensor.copy_(copy, non_blocking=True)
            if not self.offload:
                copy.grad = None  # it is the tensor's


class Bfloat16Weights:
    """Weights that are bfloat16 while steps are taken, and float32 between: in evaluations and saves.

    Autocast rounds them in each pass anyway, so a pass is the same. Gradients are float32, and so are sums of them over
    passes and ranks.

    Args:
        named: by names for messages; in float32, each once.
    """

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self.named, self.rounded = dict(named), False
        self._written: dict[str, int] = {}

    def round(self) -> None:
        """Make the weights bfloat16."""
        self._become(torch.bfloat16)
        self.mark()

    def widen(self) -> None:
        """Make the weights float32, of the values that they have."""
        self._become(torch.float32)

    def _become(self, dtype: torch.dtype) -> None:
        for tensor in self.named.values():
            tensor.data = tensor.data.to(dtype)
            tensor.grad_dtype = torch.float32
        self.rounded = dtype == torch.bfloat16

    def mark(self) -> None:
        """Take the values as they are: what is written from here on is no step's."""
        self._written = {name: tensor._version for name, tensor in self.named.items()}

    def check(self) -> None:
        """Check that nobody wrote to a weight since ``mark``, as its master would not know.

        Raises:
            ValueError: somebody did.
        """
        for name, tensor in self.named.items():
            if tensor._version != self._written[name]:
                raise ValueError(
                    f"engine.bf16_weights (true) has float32 masters of weights while steps are taken, which do not "
                    f"know what else writes to them, and {name} was written to between two steps, as in anneal: leave "
                    f"bf16_weights out"
                )


def bfloat16_weights(parts: Parts) -> Bfloat16Weights:
    """Return the weights of this rank's experts that autocast rounds in each pass.

    Raises:
        ValueError: experts do not run under bfloat16 autocast, have another dtype than float32, or run as one stack; or
            this torch has no gradients of another dtype than their parameters'.
    """
    if not hasattr(torch.Tensor, "grad_dtype"):
        raise ValueError(
            f"engine.bf16_weights (true) needs grad_dtype of torch's Tensor, and torch {torch.__version__} has none: "
            f"install torch 2.10 or newer, or leave bf16_weights out"
        )
    if not parts.bf16:
        raise ValueError(
            "engine.bf16_weights (true) needs experts that compute in bfloat16: set mixture.compute.bf16 to true, "
            "where the family has it, or leave bf16_weights out"
        )
    if parts.stack:
        raise ValueError(
            "mixture.execution (stacked) cannot be used with engine.bf16_weights (true), which rounds each expert's "
            "own weights: set it to loop, or leave bf16_weights out"
        )
    named: dict[str, Tensor] = {}
    for e, expert in parts.experts.items():
        rounded = _autocast(expert)
        named |= {f"{name} of expert {e}": p for name, p in expert.named_parameters() if p in rounded}
    for name, tensor in named.items():
        if tensor.dtype != torch.float32:
            raise ValueError(
                f"engine.bf16_weights (true) needs experts in float32, and {name} is in "
                f"{str(tensor.dtype).removeprefix('torch.')}: set dtype to float32, or leave bf16_weights out"
            )
    return Bfloat16Weights(named)


def _autocast(expert: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of layers that autocast runs in bfloat16, of those that all learn and no other module has.

    The layers are torch's linear and convolutional ones, and modules that say so by ``autocast_weights``; none that a
    hook is called before, which may compute its weight from others, as ``torch.nn.utils.spectral_norm`` does.
    """
    layers: list[nn.Module] = []
    others: set[nn.Parameter] = set()
    for module in expert.modules():
        torchs = isinstance(module, nn.Linear | _ConvNd) and type(module).__module__.startswith("torch.nn.modules.")
        if (torchs or getattr(module, "autocast_weights", False)) and not module._forward_pre_hooks:
            layers.append(module)
        else:
            others.update(module.parameters(recurse=False))
    parameters = [list(layer.parameters(recurse=False)) for layer in layers]
    return {p for own in parameters if all(p.requires_grad and p not in others for p in own) for p in own}


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


def _copy(tensor: Tensor, offload: bool) -> nn.Parameter:
    if not offload:
        return nn.Parameter(torch.empty_like(tensor))
    return nn.Parameter(torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda))
