"""The base class of gates, which the seed documents call managers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from mixdist.terms import Batch, Gating


class Gate(nn.Module):
    """Base of all gates: subclass it, set ``fields``, and return :class:`mixdist.terms.Gating`.

    A gate is replicated on every rank and sees only that rank's rows, never the experts. The first two arguments of
    ``__init__`` are the data set's :data:`mixdist.terms.Spec` and the number of experts; all others come from
    ``init_args`` in a config. A gate that is a model of its own has a loss, and may have the methods below ``anneal``.

    Attributes:
        fields: the fields of a row that it reads.
        noise_shape: the standard normal numbers that it needs for a row, or None.
        stages: what a phase's ``stage`` may be, the last one by default; a gate learns other parts in each.
        latent: the dimensions of z of a gate with latent variables, or None.
        num_drawn: the standard normal numbers that ``sample`` needs for a row.
        log_px_is: whether ``log_weights`` are of a density or of a probability mass; None where the class does not say.

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
    stages: tuple[str, ...] = ("joint",)
    latent: int | None = None
    num_drawn: int = 0
    log_px_is: Literal["density", "mass"] | None = None

    def forward(self, rows: Batch, eps: Tensor | None) -> Gating:
        """Return log responsibilities (B, E) for B rows of real numbers, given noise (B, *noise_shape)."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def anneal(self, step: int) -> None:
        """Set the values of schedules for training step ``step`` of the phase (from 0)."""

    def can(self, ability: str) -> bool:
        """Return whether this class implements an optional method of the base class, such as ``can("sample")``."""
        return getattr(type(self), ability) is not getattr(Gate, ability)

    @property
    def model(self) -> Gate:
        """The gate that has the stages and methods below: itself, or the one that it is around."""
        return self

    def log_responsibilities(self, rows: Batch, eps: Tensor | None) -> Tensor:
        """Return what ``forward`` does as responsibilities, without its loss."""
        return self(rows, eps).log_resp_BE

    # Stages and starts

    def take_model(self, tensors: Mapping[str, Tensor]) -> None:
        """Set parameters from those of a trained expert, by their names there, in place, before training.

        :class:`mixdist.training.Upcycled` calls it on every rank where a gate has it.

        Raises:
            ValueError: they do not fit.
        """
        raise NotImplementedError(f"{type(self).__name__} takes nothing from experts")

    def enter(self, stage: str) -> None:
        """Prepare for a phase of training: freeze, by ``requires_grad_(False)``, what does not learn in it."""

    def starts_at(self, stage: str) -> bool:
        """Return whether ``start`` is to be called before the first step of the run's first phase of a stage."""
        return False

    def start_options(self) -> dict[str, Any]:
        """Return, as JSON, what a start depends on beside rows, seed and weights: a resume with others is refused."""
        names = {"start": "begins", "start_rows": "start_rows", "em_steps": "em_steps", "min_variance": "min_variance"}
        return {told: getattr(self, name) for told, name in names.items() if hasattr(self, name)}

    def check_rows(self, num_rows: int) -> None:
        """Check that so many training rows are enough for it.

        Raises:
            ValueError: they are not.
        """

    def check_start(self, num_rows: int) -> None:
        """Check that ``start`` can be made from so many training rows.

        Raises:
            ValueError: there are too few.
        """

    def seen(self, rows: Batch) -> Tensor:
        """Return the numbers of each row that ``start`` is to be given, (B, M)."""
        raise NotImplementedError(f"{type(self).__name__} has no start")

    def start(self, seen: Tensor, seed: int) -> None:
        """Set parameters from what ``seen`` returned for many rows (N, M), in place; called on rank 0 alone.

        A pure function of its arguments; the other ranks then get all parameters and buffers.
        """
        raise NotImplementedError(f"{type(self).__name__} has no start")

    @property
    def em_steps(self) -> int:
        """Steps of closed-form EM over all training rows, after ``start``."""
        return 0

    def statistics(self, rows: Batch) -> Tensor:
        """Return the sufficient statistics of rows for one step of EM: a float64 tensor that adds up over rows."""
        raise NotImplementedError(f"{type(self).__name__} has no statistics")

    def maximise(self, statistics: Tensor) -> None:
        """Set parameters to those of highest likelihood under the statistics of all rows, in place.

        Raises:
            ValueError: there are none.
        """
        raise NotImplementedError(f"{type(self).__name__} has no statistics")

    # A model of its own

    def embed(self, rows: Batch) -> Tensor:
        """Return the mean of q(z|x) of each row, (B, L); x itself of a gate without latents."""
        raise NotImplementedError(f"{type(self).__name__} does not embed")

    def reconstruct(self, rows: Batch) -> Tensor:
        """Return the reconstruction of each row, without noise: (B, *shape of x)."""
        raise NotImplementedError(f"{type(self).__name__} does not reconstruct")

    def sample(self, cluster: Tensor, eps: Tensor) -> Tensor:
        """Return rows of clusters (S,), as means of p(x|z) where there are latents: (S, *shape of x).

        Args:
            cluster: the number of each.
            eps: standard normal numbers, (S, num_drawn).
        """
        raise NotImplementedError(f"{type(self).__name__} does not sample")

    def log_pi(self) -> Tensor:
        """Return the log weights of the clusters in p(x), (K,)."""
        raise NotImplementedError(f"{type(self).__name__} has no log_pi")

    def draw(self, cluster: Tensor, eps: Tensor, uniform: Tensor) -> Tensor:
        """Return x ~ p(x|z) of clusters (S,), noise and all, for the z of ``sample``: (S, *shape of x).

        Args:
            cluster: the number of each.
            eps: as of ``sample``.
            uniform: independent numbers, uniform on (0, 1), in the shape of the result.
        """
        raise NotImplementedError(f"{type(self).__name__} does not draw")

    def log_weights(self, rows: Batch, eps: Tensor | None) -> Tensor:
        """Return log p(x, z) - log q(z|x) for S posterior samples of each row: (B, S) nats, eps (B, S, L).

        Their log-mean-exp over S estimates log p(x). A gate without latents is given None and returns log p(x), (B, 1).
        """
        raise NotImplementedError(f"{type(self).__name__} has no importance weights")
