"""Gates without parameters: equal responsibilities, and the label's own.

Shape letters: B rows on this rank, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixdist.arguments import check_arguments
from mixdist.gates.gate import Gate
from mixdist.terms import Batch, Gating, Spec, label_classes


class Uniform(Gate):
    """Equal responsibilities, q(e|x) = 1/E: a bag of experts.

    Examples:
        >>> import torch
        >>> from mixdist.gates import Uniform
        >>> Uniform({}, num_experts=4)({"id": torch.arange(1)}, None).log_resp_BE.exp()
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """

    fields = ()

    def __init__(self, spec: Spec, num_experts: int) -> None:
        check_arguments(Uniform.__init__, locals(), "Uniform's ")
        super().__init__()
        # Zeros are exact in any dtype that the module is moved to; their log-softmax is taken there.
        self.zeros_E: Tensor
        self.register_buffer("zeros_E", torch.zeros(num_experts), persistent=False)

    def forward(self, rows: Batch, eps: Tensor | None) -> Gating:
        return Gating(torch.log_softmax(self.zeros_E, dim=0).expand(rows["id"].shape[0], -1))


class LabelOracle(Gate):
    """Responsibility 1 of expert c for class c: the "cheating" baseline of seed document 000.

    Args:
        spec: the data set's fields.
        num_experts: at least the number of classes.
        field: the label.

    Raises:
        ValueError: no such label, or more classes than experts.

    Examples:
        >>> import torch
        >>> from mixdist.gates import LabelOracle
        >>> from mixdist.terms import Field
        >>> gate = LabelOracle({"y": Field((), torch.uint8, num_classes=2)}, num_experts=3)
        >>> gate({"y": torch.tensor([1, 0])}, None).log_resp_BE.exp()
        tensor([[0., 1., 0.],
                [1., 0., 0.]])
    """

    def __init__(self, spec: Spec, num_experts: int, field: str = "y") -> None:
        check_arguments(LabelOracle.__init__, locals(), "LabelOracle's ")
        super().__init__()
        num_classes = label_classes(spec, field, "LabelOracle", num_experts)
        self.field, self.fields = field, (field,)
        self.log_one_hot: Tensor
        self.register_buffer("log_one_hot", torch.eye(num_experts)[:num_classes].log(), persistent=False)

    def forward(self, rows: Batch, eps: Tensor | None) -> Gating:
        return Gating(self.log_one_hot[rows[self.field]])
