"""What every gate is: a module that says which expert is responsible for each row. The seeds call it the manager."""

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
    """

    fields: tuple[str, ...] = ("x",)
    noise_shape: tuple[int, ...] | None = None

    def forward(self, rows: Batch, eps: Tensor | None) -> Gating:
        """Return log responsibilities (B, E) for B rows of real numbers, given noise (B, *noise_shape)."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def anneal(self, step: int) -> None:
        """Set what a schedule changes, before training step ``step`` of the phase (from 0)."""
