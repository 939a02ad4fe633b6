"""Gates without parameters: the bag, and the oracle that reads the label.

Shape letters: B rows on this rank, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixdist.gates.gate import Gate
from mixdist.terms import Batch, Gating, Spec


class Uniform(Gate):
    """Every expert is responsible for every row alike, q(e|x) = 1/E: a bag of experts."""

    fields = ()

    def __init__(self, spec: Spec, num_experts: int) -> None:
        super().__init__()
        # Zeros are exact in any dtype that the module is moved to; their log-softmax is taken there.
        self.zeros_E: Tensor
        self.register_buffer("zeros_E", torch.zeros(num_experts), persistent=False)

    def forward(self, rows: Batch, eps: Tensor | None) -> Gating:
        return Gating(torch.log_softmax(self.zeros_E, dim=0).expand(rows["id"].shape[0], -1))


class LabelOracle(Gate):
    """Class c goes to expert c: the "cheating" baseline of seed document 000.

    Args:
        spec: the data set's fields.
        num_experts: at least the number of classes.
        field: the label.

    Raises:
        ValueError: no such label, or more classes than experts.
    """

    def __init__(self, spec: Spec, num_experts: int, field: str = "y") -> None:
        super().__init__()
        num_classes = spec[field].num_classes if field in spec else None
        if num_classes is None:
            labels = [name for name, f in spec.items() if f.num_classes is not None]
            has = f"labels {labels}" if labels else "no labels"
            raise ValueError(
                f"LabelOracle needs the label {field!r}, but the data has {has}: choose another gate or data"
            )
        if num_classes > num_experts:
            raise ValueError(
                f"LabelOracle has {num_classes} classes for {num_experts} experts: set num_experts to {num_classes}"
            )
        self.field, self.fields = field, (field,)
        self.log_one_hot: Tensor
        self.register_buffer("log_one_hot", torch.eye(num_experts)[:num_classes].log(), persistent=False)

    def forward(self, rows: Batch, eps: Tensor | None) -> Gating:
        return Gating(self.log_one_hot[rows[self.field]])
