"""The base class of gates, which the seed documents call managers."""

from __future__ import annotations

from torch import Tensor, nn

from mixdist.terms import Batch, Gating


class Gate(nn.Module):
    """Base of all gates: subclass it, set ``fields``, and return :class:`mixdist.terms.Gating`.

    A gate is replicated on every rank and sees only that rank's rows, never the experts. The first two arguments of
    ``__init__`` are the data set's :data:`mixdist.terms.Spec` and the number of experts; all others come from
    ``init_args`` in a config.

    Attributes:
        fields: the fields of a row that it reads.
        noise_shape: the standard normal numbers that it needs for a row, or None.

    Examples:
        >>> import torch
        >>> from mixdist.gates import Gate
        >>> from mixdist.terms import Gating
        >>> class Sign(Gate):
        ...     def forward(self, rows, eps):
        ...         logits_BE = torch.stack([rows["x"], -rows["x"]], dim=1)
        ...         return Gating(torch.log_softmax(logits_BE, dim=1))
        >>> Sign()({"x": torch.tensor([-1.0, 0.0, 5.0])}, None).log_resp_BE.exp()
        tensor([[1.1920e-01, 8.8080e-01],
                [5.0000e-01, 5.0000e-01],
                [9.9995e-01, 4.5398e-05]])
    """

    fields: tuple[str, ...] = ("x",)
    noise_shape: tuple[int, ...] | None = None

    def forward(self, rows: Batch, eps: Tensor | None) -> Gating:
        """Return log responsibilities (B, E) for B rows of real numbers, given noise (B, *noise_shape)."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def anneal(self, step: int) -> None:
        """Set the values of schedules for training step ``step`` of the phase (from 0)."""
