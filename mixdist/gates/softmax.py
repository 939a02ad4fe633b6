"""The gate of seed document 000: a softmax over a linear map or an MLP."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mixdist.gates.gate import Gate
from mixdist.nets import MLP, ActivationName, flat
from mixdist.terms import Batch, Gating, Spec


class Softmax(Gate):
    """q(e|x) = softmax(f(x) / temperature).

    Args:
        spec: the data set's fields.
        num_experts: the number of experts.
        hidden: widths of the hidden layers of f; none for a linear map.
        activation: of the hidden layers.
        temperature: above 1 softer, below 1 harder.
        field: which field it reads.

    Raises:
        ValueError: a missing field, or a temperature that is not positive.
    """

    def __init__(
        self,
        spec: Spec,
        num_experts: int,
        hidden: Sequence[int] = (),
        activation: ActivationName = "relu",
        temperature: float = 1.0,
        field: str = "x",
    ) -> None:
        super().__init__()
        if field not in spec or spec[field].num_classes is not None:
            raise ValueError(
                f"Softmax reads the field {field!r} of real numbers, but the data has {sorted(spec)}: set field"
            )
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature ({temperature}) must be positive: give 1 for a plain softmax")
        self.field, self.fields, self.temperature = field, (field,), temperature
        self.net = MLP([spec[field].num_values, *hidden, num_experts], activation)

    def forward(self, rows: Batch, eps: Tensor | None) -> Gating:
        logits_BE = self.net(flat(rows[self.field]))
        return Gating(torch.log_softmax(logits_BE / self.temperature, dim=-1))
