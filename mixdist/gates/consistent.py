"""A gate around another gate, trained to give the same responsibilities for an image and for a moved copy of it.

Shape letters: B rows on this rank, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mixdist.arguments import check_arguments
from mixdist.gates.gate import Gate
from mixdist.stats import Warmup, check_steps, ramp
from mixdist.terms import Batch, Gating, Spec, constant

NUM_VIEW = 6
"""Standard normal numbers that determine a view: shift and scale in x and y, rotation, shear."""


class Consistent(Gate):
    """q(e|x) of another gate, with the loss w KL(q(e|x) || q(e|x')) in training, nats, x' a random view of x.

    The view is an affine map of the image, drawn anew for each row at every step, with each of its parameters uniform
    within the limits given. With mutual information (:class:`mixdist.mixtures.Information`) this is a discriminative
    clusterer: IMSAT (Hu et al. 2017, eq. 5 with affine maps as T), except that the gradient flows through both sides of
    the divergence. The experts read the rows unchanged; so does the gate in evaluation.

    Args:
        spec: the data set's fields.
        num_experts: the number of experts.
        gate: class of mixdist.gates, or your own Gate, that computes the responsibilities.
        weight: w; where it is too large, the gate gives all images the same responsibilities, for which this loss is 0.
        shift: largest move along each axis, pixels.
        rotation: largest rotation, degrees.
        scale: largest scaling along each axis: factors lie between 1 / (1 + scale) and 1 + scale.
        shear: largest shear, pixels a pixel.
        padding: values outside of an image: zeros, or its border or reflection.
        field: the image, (channels, height, width).
        warmup_steps: training steps of a phase over which w rises linearly from 0, so that the responsibilities become
            clear first; or a :class:`mixdist.stats.Warmup`, as ``{epochs: 2}``.

    Raises:
        ValueError: a field that is no image or that the inner gate does not read; a negative or infinite limit.

    Examples:
        >>> import torch
        >>> from mixdist.gates import Consistent, Softmax
        >>> from mixdist.terms import Field
        >>> gate = Consistent({"x": Field((1, 8, 8), torch.float32)}, num_experts=3, gate=Softmax)
        >>> gating = gate({"x": torch.zeros(5, 1, 8, 8)}, torch.randn(5, *gate.noise_shape))
        >>> gating.log_resp_BE.shape, gating.loss_B.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self,
        spec: Spec,
        num_experts: int,
        gate: Callable[[Spec, int], Gate],
        weight: float = 1.0,
        shift: float = 3.0,
        rotation: float = 15.0,
        scale: float = 0.2,
        shear: float = 0.25,
        padding: Literal["zeros", "border", "reflection"] = "zeros",
        field: str = "x",
        warmup_steps: int | Warmup = 0,
    ) -> None:
        check_arguments(Consistent.__init__, locals(), "Consistent's ")
        super().__init__()
        if field not in spec or spec[field].num_classes is not None or len(spec[field].shape) != 3:
            has = {name: f.shape for name, f in spec.items()}
            raise ValueError(
                f"Consistent needs an image (channels, height, width), not {field!r}: the data has {has}: set field"
            )
        limits = {"weight": weight, "shift": shift, "rotation": rotation, "scale": scale, "shear": shear}
        check_steps("Consistent's warmup_steps", warmup_steps)
        for name, value in limits.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"Consistent's {name} ({value}) must be a number from 0: give 0 for none")
        self.gate = gate(spec, num_experts)
        if field not in self.gate.fields:
            reads = f"{type(self.gate).__name__} reads {list(self.gate.fields)}"
            raise ValueError(f"Consistent's field is {field!r}, but {reads}: set the same field for both")
        self.field, self.fields, self.padding = field, self.gate.fields, padding
        self.weight, self.warmup_steps = weight, warmup_steps
        # In float64 until the module is moved, so that the config's value is rounded once.
        self.weight_now: Tensor
        self.register_buffer("weight_now", torch.tensor(weight, dtype=torch.float64), persistent=False)
        self.shift, self.rotation, self.scale, self.shear = shift, rotation, scale, shear
        self.noise_shape = (NUM_VIEW + math.prod(self.gate.noise_shape or (0,)),)

    def anneal(self, step: int) -> None:
        self.weight_now.fill_(self.weight * ramp(step, self.warmup_steps))
        self.gate.anneal(step)

    @property
    def model(self) -> Gate:
        return self.gate.model

    def _inner(self, eps: Tensor | None) -> Tensor | None:
        """Return the inner gate's part of the noise."""
        if eps is None or self.gate.noise_shape is None:
            return None
        return eps[:, NUM_VIEW:].reshape(-1, *self.gate.noise_shape)

    def forward(self, rows: Batch, eps: Tensor | None) -> Gating:
        inner = self._inner(eps)
        gating = self.gate(rows, inner)
        if not self.training:
            return gating
        assert eps is not None
        moved = {**rows, self.field: self.view(rows[self.field], eps[:, :NUM_VIEW])}
        # With the same noise in the inner gate, so that only the view differs.
        loss_B = self.weight_now * _divergence(gating.log_resp_BE, self.gate.log_responsibilities(moved, inner))
        return Gating(gating.log_resp_BE, loss_B if gating.loss_B is None else gating.loss_B + loss_B)

    def log_responsibilities(self, rows: Batch, eps: Tensor | None) -> Tensor:
        return self.gate.log_responsibilities(rows, self._inner(eps))

    def view(self, x: Tensor, eps: Tensor) -> Tensor:
        """Return images (B, C, H, W) moved by the affine maps of standard normal numbers (B, 6)."""
        if not len(x):  # affine_grid refuses no rows
            return x
        height, width = x.shape[-2:]
        u = torch.erf(eps / math.sqrt(2.0))  # uniform on (-1, 1)
        shift, size = self.shift * u[:, 0:2], (1.0 + self.scale) ** u[:, 2:4]
        angle, shear = math.radians(self.rotation) * u[:, 4], self.shear * u[:, 5]
        cos, sin = angle.cos(), angle.sin()
        # Where an output pixel is read: rotation, shear and scaling about the centre, in pixels.
        across = torch.stack([cos, shear * cos - sin], -1) * size
        down = torch.stack([sin, shear * sin + cos], -1) * size
        # affine_grid measures both axes from -1 to 1, so the pixels of an image that is not square are not square.
        half = constant((width / 2, height / 2), x.dtype, x.device)
        turn = torch.stack([across / half[0], down / half[1]], 1) * half
        grid = F.affine_grid(torch.cat([turn, (shift / half)[..., None]], -1), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode=self.padding, align_corners=False)


def _divergence(log_q_BE: Tensor, log_p_BE: Tensor) -> Tensor:
    """Return KL(q || p) over E, nats, with 0 log 0 = 0."""
    absent = log_q_BE == -math.inf
    ratio = log_q_BE.masked_fill(absent, 0.0) - log_p_BE.masked_fill(absent, 0.0)
    return (log_q_BE.exp().masked_fill(absent, 0.0) * ratio).sum(-1)
