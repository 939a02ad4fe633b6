"""An expert without a loss, for a gate that is trained alone."""

from __future__ import annotations

import torch
from torch import Tensor

from mixdist.arguments import check_arguments
from mixdist.experts.expert import Expert
from mixdist.terms import Batch, ExpertTerms, Spec


class Silent(Expert):
    """An expert that models nothing: the gate trains alone, as a clustering model or a density of its own.

    It reads no field and has no parameters. Needs an objective that reads no losses:
    :class:`mixdist.mixtures.GateLoss` or :class:`mixdist.mixtures.Information`.

    Args:
        spec: the data set's fields.

    Examples:
        >>> import torch
        >>> from mixdist.experts import Silent
        >>> Silent({})({"id": torch.arange(2)}, None).loss_R
        tensor([0., 0.])
    """

    fields = ()
    has_loss = False

    def __init__(self, spec: Spec) -> None:
        check_arguments(Silent.__init__, locals(), "Silent's ")
        super().__init__()
        self.zero: Tensor
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self, rows: Batch, eps: Tensor | None) -> ExpertTerms:
        return ExpertTerms(self.zero.expand(len(rows["id"])))
