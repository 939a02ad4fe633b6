"""The experts of one rank, run one after another or as one stack.

Shape letters: R rows routed here, E experts on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mixdist.experts.expert import Expert
from mixdist.terms import Batch, ExpertTerms

Execution = Literal["loop", "stacked"]


class ExpertBank(nn.Module):
    """Experts of one rank by their global numbers; every one of them sees all rows handed in.

    In stacked execution each kind of parameter of all experts lies in one tensor with a leading expert axis, and each
    expert's own parameter and gradient are views of it: optimisers and checkpoints see one set for each expert, the
    forward pass one batched product. So move experts to their device and dtype before, zero gradients in place, and
    freeze all experts or none.

    Args:
        experts: global expert number to expert, in ascending order.
        execution: loop or stacked.

    Raises:
        ValueError: stacked execution of experts that cannot be stacked.
    """

    def __init__(self, experts: Mapping[int, Expert], execution: Execution = "loop") -> None:
        super().__init__()
        assert experts
        assert list(experts) == sorted(experts)
        self.experts = nn.ModuleDict({str(e): expert for e, expert in experts.items()})
        self.execution = execution
        self.stack: dict[str, Tensor] = {}
        if execution == "stacked":
            self._stack()

    @property
    def ids(self) -> list[int]:
        """Global numbers of the experts here."""
        return [int(e) for e in self.experts]

    def owned(self) -> dict[int, Expert]:
        """The experts by their global numbers."""
        return {int(e): cast(Expert, expert) for e, expert in self.experts.items()}

    @property
    def template(self) -> Expert:
        """One of the experts: what it needs, all need."""
        return next(iter(self.owned().values()))

    def _stack(self) -> None:
        if not self.template.stackable:
            kind = type(self.template).__name__
            raise ValueError(f"execution 'stacked' needs stackable experts, and {kind} is not: set execution to 'loop'")
        for name, _ in self.template.named_parameters():
            own = [expert.get_parameter(name) for expert in self.owned().values()]
            stacked = torch.stack([p.detach() for p in own]).requires_grad_()
            stacked.grad = torch.zeros_like(stacked)
            for i, p in enumerate(own):
                p.data, p.grad = stacked.detach()[i], stacked.grad[i]
            self.stack[name] = stacked

    def forward(self, rows: Batch, eps: Tensor | None) -> ExpertTerms:
        """Give every expert's terms for every row.

        Args:
            rows: R rows of real numbers.
            eps: noise (E, R, *noise_shape) or None.

        Returns:
            terms with fields (R, E, ...).
        """
        if self.execution == "loop":
            terms = [expert(rows, None if eps is None else eps[i]) for i, expert in enumerate(self.experts.values())]
            return _map(lambda *fields: torch.stack(fields, dim=1), *terms)
        for name, stacked in self.stack.items():
            stacked.requires_grad_(self.template.get_parameter(name).requires_grad)
        result: ExpertTerms = functional_call(self.template, self.stack, (rows, eps))
        return _map(lambda field: field.transpose(0, 1), result)


def _map(change: Callable[..., Tensor], *terms: ExpertTerms) -> ExpertTerms:
    """Change each field that is there, given that field of all terms."""
    loss, *rest = (None if f[0] is None else change(*f) for f in zip(*terms, strict=True))
    assert loss is not None
    return ExpertTerms(loss, *rest)
