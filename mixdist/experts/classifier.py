"""The classifying expert of the supervised mixture (seed document 001, section 4): a label from x.

Shape letters: R rows, E experts (leading, only in a stack), C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixdist.arguments import check_arguments
from mixdist.experts.expert import Expert
from mixdist.nets.mlp import MLP, flat
from mixdist.nets.network import Network
from mixdist.terms import Batch, ExpertTerms, Spec, label_classes, real_field


class Classifier(Expert):
    """p(y|x) = softmax(f(x))_y with f a network.

    loss = -log p(y|x), nats: the categorical cross entropy. With :class:`mixdist.mixtures.SoftMinLoss` the
    mixture minimises -log sum_k q(k|x) p(y|x, k); the weighted mean of ``predict`` is p(y|x) = sum_k q(k|x) p(y|x, k)
    (seed document 001, section 4).

    Args:
        spec: the data set's fields.
        network: f; unset, an affine map.
        input: the field x, real numbers.
        target: the field y, a label.

    Raises:
        ValueError: a field that is missing; an input that holds classes; a target that is no label.

    Examples:
        >>> import torch
        >>> from mixdist.experts import Classifier
        >>> from mixdist.nets import MLP
        >>> from mixdist.terms import Field
        >>> spec = {"x": Field((6,), torch.float32), "y": Field((), torch.uint8, num_classes=3)}
        >>> Classifier(spec, network=MLP([16])).predict({"x": torch.zeros(5, 6)}).shape
        torch.Size([5, 3])
    """

    log_px_is = "mass"

    def __init__(self, spec: Spec, network: Network | None = None, input: str = "x", target: str = "y") -> None:
        check_arguments(Classifier.__init__, locals(), "Classifier's ")
        super().__init__()
        x = real_field(spec, input, "Classifier")
        self.input, self.target, self.fields = input, target, (input, target)
        self.num_classes = label_classes(spec, target, "Classifier")
        network = MLP([]) if network is None else network
        self.input_shape, self.stackable = x.shape, network.stackable
        self.net = network.encoder(x.shape, self.num_classes)

    def forward(self, rows: Batch, eps: Tensor | None) -> ExpertTerms:
        log_p = self.log_probs(rows)
        label = rows[self.target].long().expand(log_p.shape[:-1])
        log_py = log_p.gather(-1, label.unsqueeze(-1)).squeeze(-1)
        return ExpertTerms(-log_py, log_py)

    def log_probs(self, rows: Batch) -> Tensor:
        """Return log p(y|x) of every class, nats: (R, C) or (E, R, C)."""
        return torch.log_softmax(self.net(flat(rows[self.input], self.input_shape)), dim=-1)

    def predict(self, rows: Batch) -> Tensor:
        """Return p(y|x) of every class: (R, C)."""
        return self.log_probs(rows).exp()
