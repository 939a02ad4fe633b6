"""The data types that packages pass to each other: rows, outputs of gates and experts, modules of a mixture.

Shape letters: B rows on this rank, R rows routed here, E experts. The row axis comes first, so that dispatch can move
any field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

STORED_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
STORED_REALS = (torch.float16, torch.float32, torch.float64)
"""The types that rows may be stored in."""

DEQUANTISED = "dequantised"
"""How ``Field.drawn`` begins where level k of n is stored as k + u, u uniform on (0, 1), with scale 1/n."""

Batch = dict[str, Tensor]
"""Named fields of rows, each with the row axis first; "id" (int64) names the samples."""


@dataclass(frozen=True)
class Field:
    """The storage and the meaning of one field of a row.

    A field without classes holds real numbers, ``value = stored * scale + offset``; one with ``num_classes`` holds
    class indices from 0 to ``num_classes - 1``. Rows are sent as stored and converted by the expert.

    Args:
        shape: of one row: ``(channels, height, width)`` for images, ``(features,)`` for vectors, ``()`` for labels.
        dtype: the stored type, as ``torch.uint8``.
        scale: multiplies the stored number.
        offset: is added after scaling.
        num_classes: the number of classes of a label; None for real numbers.
        words: what the classes of a text's tokens stand for, or empty.
        drawn: how stored numbers were drawn from a source's own, such as dequantised; empty where they are its own.

    Examples:
        >>> import torch
        >>> from mixdist.terms import Field
        >>> pixels = Field((1, 8, 8), torch.uint8, scale=1 / 255)
        >>> pixels.num_values, pixels.num_bytes
        (64, 64)
        >>> pixels.values(torch.tensor([0, 51, 255], dtype=torch.uint8), torch.float32)
        tensor([0.0000, 0.2000, 1.0000])
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    scale: float = 1.0
    offset: float = 0.0
    num_classes: int | None = None
    words: tuple[str, ...] = field(default=(), repr=False)
    drawn: str = ""

    @property
    def num_values(self) -> int:
        """Return how many numbers one row of this field has."""
        return int(torch.Size(self.shape).numel())

    @property
    def num_bytes(self) -> int:
        """Return how many bytes one stored row of this field takes."""
        return self.num_values * self.dtype.itemsize

    @property
    def dequantised(self) -> bool:
        """Return whether numbers are levels with uniform noise."""
        return self.drawn.startswith(DEQUANTISED)

    def values(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the values of stored rows: ``stored * scale + offset`` in ``dtype``, or int64 class indices."""
        if self.num_classes is not None:
            return stored.long()
        values = stored.to(dtype)
        if values is stored and (self.scale != 1.0 or self.offset):
            values = values.clone()  # the stored tensor must not change
        if self.scale != 1.0:
            values.mul_(self.scale)
        return values.add_(self.offset) if self.offset else values


Spec = Mapping[str, Field]
"""The fields of a data set by name, without "id"."""


def real_field(spec: Spec, name: str, asked_by: str) -> Field:
    """Return the field ``name`` of real numbers.

    Raises:
        ValueError: the data set has no such field, or it holds classes.
    """
    if name not in spec:
        raise ValueError(
            f"{asked_by} needs the field {name!r}, but the data has {sorted(spec)}: set its field argument"
        )
    field = spec[name]
    if field.num_classes is not None:
        raise ValueError(
            f"{asked_by} needs real numbers, but the field {name!r} holds {field.num_classes} classes: set its field "
            f"argument"
        )
    return field


def label_classes(spec: Spec, name: str, asked_by: str, num_experts: int | None = None) -> int:
    """Return the number of classes of the label ``name``.

    Raises:
        ValueError: the data set has no such label, or the label has more classes than ``num_experts``, where given.
    """
    labels = {n: f.num_classes for n, f in spec.items() if f.num_classes is not None and f.shape == ()}
    if name not in labels:
        has = f"labels {sorted(labels)}" if labels else "no labels"
        raise ValueError(f"{asked_by} needs the label {name!r}, but the data has {has}: set field, or choose another")
    num_classes = labels[name]
    if num_experts is not None and num_classes > num_experts:
        raise ValueError(
            f"{asked_by} has {num_classes} classes for {num_experts} experts: set num_experts to {num_classes}"
        )
    return num_classes


class Gating(NamedTuple):
    """The output of a gate for B rows.

    Args:
        log_resp_BE: log q(e|x), the log responsibilities; ``logsumexp`` over E is 0.
        loss_B: the gate's own loss for each row in nats (the negative ELBO of a VaDE gate), or None.
    """

    log_resp_BE: Tensor
    loss_B: Tensor | None = None


class ExpertTerms(NamedTuple):
    """What an expert computes for R rows; every field has the row axis first, and any may be absent.

    Args:
        loss_R: the loss to be minimised for each row, in nats for likelihoods.
        log_px_R: log p(x|z) or log p(y|x), nats.
        kl_R: KL(q(z|x) || p(z)), nats, without beta, warm-up or free bits.
        features: any other fields of a row by name, of any width, such as a feature map for a shared decoder.
    """

    loss_R: Tensor | None = None
    log_px_R: Tensor | None = None
    kl_R: Tensor | None = None
    features: Mapping[str, Tensor] = {}


class Posterior(NamedTuple):
    """What q(z|x) is for R rows, by latent dimension.

    Args:
        mean_RL: E_q[z].
        kl_RL: KL(q(z_l|x) || p(z_l)), nats.
    """

    mean_RL: Tensor
    kl_RL: Tensor


class Outcome(NamedTuple):
    """What one step of a mixture leaves on this rank; every tensor is a sum over its rows.

    Summed over ranks each field is the global figure: local losses sum to the global loss, never average.

    Args:
        loss: this rank's part of the global loss.
        parts: the loss's named parts, of the same kind.
        sums: other sums over rows that the family wants of the whole batch, by name, of any shape.
        faults: rows with a value that is not finite, by the name of that value, such as "the gate's output". Where the
            count is a vector, the name has ``{}`` for the place in it, such as "the loss of expert {}".
    """

    loss: Tensor
    parts: dict[str, Tensor]
    sums: Mapping[str, Tensor] = {}
    faults: Mapping[str, Tensor] = {}


class Owned(NamedTuple):
    """A module with its name in checkpoints and messages, and its expert's number if it belongs to an expert."""

    name: str
    module: nn.Module
    expert: int | None = None


@dataclass(frozen=True)
class Parts:
    """The modules of a mixture on this rank.

    Args:
        shared: replicated on every rank: the gate, a shared decoder; by name.
        experts: this rank's experts by global number.
        stack: if experts run as one stack, the tensors that their parameters are slices of, by the parameter's name;
            the leading axis is that of ``experts``.
        micro_batch: rows that an expert runs at once, so that its replicas may run it unequally often; None for all.
        bf16: experts run under bfloat16 autocast.

    Raises:
        ValueError: a shared module's name that cannot name a file of a checkpoint.
    """

    shared: dict[str, nn.Module]
    experts: dict[int, nn.Module] = field(default_factory=dict)
    stack: dict[str, Tensor] = field(default_factory=dict)
    micro_batch: int | None = None
    bf16: bool = False

    def __post_init__(self) -> None:
        for name in self.shared:
            if not re.fullmatch(r"[A-Za-z]\w*", name) or name in ("expert", "discriminator"):
                raise ValueError(
                    f"the shared module {name!r} cannot name a file of a checkpoint: give letters, digits and _, but "
                    f"neither expert nor discriminator"
                )

    def owned(self) -> list[Owned]:
        """Return all modules, shared ones first, experts in ascending order."""
        experts = [Owned(f"expert {e}", module, e) for e, module in self.experts.items()]
        return [Owned(name, module) for name, module in self.shared.items()] + experts


def misfit(given: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> str | None:
    """Return the first name in which tensors given for a module differ from those that it needs, in words, or None.

    Examples:
        >>> import torch
        >>> from mixdist.terms import misfit
        >>> misfit({"bias": torch.zeros(2)}, {"bias": torch.zeros(3)})
        'bias has shape (2,), expected (3,)'
    """
    one, other = ({name: tuple(tensor.shape) for name, tensor in found.items()} for found in (given, needed))
    wrong = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    return f"{wrong[0]} has shape {one.get(wrong[0])}, expected {other.get(wrong[0])}" if wrong else None


def places(mask: Tensor, count: int) -> Tensor:
    """Return where a mask is True, as indices of the flat mask in ascending order, (count,).

    A device need not be asked how many there are: ``nonzero`` would wait for it.

    Examples:
        >>> import torch
        >>> from mixdist.terms import places
        >>> places(torch.tensor([[True, False], [False, True]]), 2)
        tensor([0, 3])
    """
    flat = mask.flatten()
    if mask.device.type == "cpu":
        return flat.nonzero()[:, 0]
    return flat.to(torch.uint8).sort(descending=True, stable=True).indices[:count]


@lru_cache(maxsize=256)
def constant(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor of a device, to which they are sent once: a copy in every step would cost its time.

    Examples:
        >>> import torch
        >>> from mixdist.terms import constant
        >>> constant((1.0, 2.0), torch.float32, torch.device("cpu"))
        tensor([1., 2.])
    """
    return torch.tensor(numbers, dtype=dtype, device=device)
