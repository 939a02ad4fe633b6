"""The base class of experts.

Shape letters: R rows routed here, E experts on this rank, D features of a row, L latent.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from mixdist.nets.principal import LinearGaussian
from mixdist.terms import Batch, ExpertTerms, Posterior


class Expert(nn.Module):
    """Base of all experts: subclass it, set ``fields`` and ``noise_shape``, and return :class:`ExpertTerms`.

    An expert is pure: it draws no random numbers (its noise is an argument, keyed by row) and does not communicate
    (the dispatch sends it its rows). The first argument of ``__init__`` is the data set's :data:`mixdist.terms.Spec`;
    all others come from ``init_args`` in a config.

    Attributes:
        fields: the fields of a row that it needs; only those cross the wire.
        noise_shape: the standard normal numbers that ``forward`` needs for a row, or None.
        stackable: True when ``forward`` also accepts parameters with a leading expert axis (see mixdist/nets/mlp.py),
            with noise of shape (E, R, ...) and results of shape (E, R).
        log_px_is: whether ``log_px_R`` is the log of a density of real numbers or of a probability mass of discrete
            ones; None where the class does not say. Only figures of the same kind can be compared.
        has_loss: False where the loss is always 0 and means nothing, as of :class:`mixdist.experts.Silent`.
        levels: of a mass over the numbers k / (levels - 1), how many: on rows with other values it is neither.

    Examples:
        >>> import torch
        >>> from mixdist.experts import Expert
        >>> from mixdist.terms import ExpertTerms
        >>> class Constant(Expert):
        ...     def __init__(self, spec, value=0.0):
        ...         super().__init__()
        ...         self.value = torch.nn.Parameter(torch.tensor(value))
        ...     def forward(self, rows, eps):
        ...         return ExpertTerms((rows["x"] - self.value).square())
        >>> Constant({}, 1.0)({"x": torch.tensor([0.0, 3.0])}, None).loss_R.detach()
        tensor([1., 4.])
    """

    fields: tuple[str, ...] = ("x",)
    noise_shape: tuple[int, ...] | None = None
    stackable: bool = False
    log_px_is: Literal["density", "mass"] | None = None
    levels: int | None = None
    has_loss: bool = True

    def forward(self, rows: Batch, eps: Tensor | None) -> ExpertTerms:
        """Return the terms of R rows of real numbers, given standard normal noise (R, *noise_shape)."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    @property
    def latent_shape(self) -> tuple[int, ...] | None:
        """The standard normal numbers of one draw of z, which other methods take; unless it is set, noise_shape."""
        shape: tuple[int, ...] | None = self.__dict__.get("_latent_shape", self.noise_shape)
        return shape

    @latent_shape.setter
    def latent_shape(self, shape: tuple[int, ...] | None) -> None:
        self.__dict__["_latent_shape"] = shape

    def can(self, ability: str) -> bool:
        """Return whether this class implements an optional method of the base class, such as ``can("sample")``."""
        return getattr(type(self), ability) is not getattr(Expert, ability)

    def anneal(self, step: int) -> None:
        """Set the values of schedules, such as KL warm-up, for training step ``step`` of the phase (from 0)."""

    def check_linear(self) -> int:
        """Return the latent dimensions of an expert that can begin as a linear Gaussian model.

        Raises:
            ValueError: it cannot.
        """
        raise ValueError(f"{type(self).__name__} cannot begin as a linear model: take mixdist.experts.VAE")

    def begin_linear(self, model: LinearGaussian, each: bool) -> None:
        """Set the parameters so that p(x), and q(z|x), are those of a linear Gaussian model.

        Args:
            model: with as many numbers and dimensions as the expert.
            each: noise for each number by itself, :meth:`mixdist.nets.principal.LinearGaussian.value_noise`;
                else s^2 for all.
        """
        raise NotImplementedError(f"{type(self).__name__} has no begin_linear")

    def reconstruct(self, rows: Batch) -> Tensor:
        """Return the reconstruction of each row, without noise: (R, *shape of x)."""
        raise NotImplementedError(f"{type(self).__name__} does not reconstruct")

    def sample(self, eps: Tensor) -> Tensor:
        """Return the mean of p(x|z) for standard normal z (R, *latent_shape): (R, *shape of x)."""
        raise NotImplementedError(f"{type(self).__name__} does not sample")

    def draw(self, eps: Tensor, uniform: Tensor) -> Tensor:
        """Return samples of this expert's p(x), with the noise of p(x|z): (R, *shape of x).

        Args:
            eps: independent standard normal numbers (R, *latent_shape).
            uniform: independent numbers, uniform on (0, 1), (R, *shape of x).
        """
        raise NotImplementedError(f"{type(self).__name__} does not draw")

    def log_weights(self, rows: Batch, eps: Tensor) -> Tensor:
        """Return log p(x, z) - log q(z|x) for S posterior samples of each row: (R, S) nats, eps (R, S, *latent_shape).

        Their log-mean-exp over S estimates log p(x) (importance sampling; Burda et al. 2016, eq. 8).
        """
        raise NotImplementedError(f"{type(self).__name__} has no importance weights")

    def posterior(self, rows: Batch) -> Posterior:
        """Return mean and KL of q(z|x) for each row and latent dimension, (R, L) each, L the numbers of latent_shape.

        From it come the KL by dimension and the active units (Burda et al. 2016, section 5.3) of an evaluation.
        """
        raise NotImplementedError(f"{type(self).__name__} has no posterior")

    def predict(self, rows: Batch) -> Tensor:
        """Return the target's mean for each row: (R, *shape of y)."""
        raise NotImplementedError(f"{type(self).__name__} does not predict")
