"""The gate of seed document 000: a softmax over the outputs of a network.

Shape letters: B rows on this rank, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mixdist.arguments import check_arguments
from mixdist.gates.gate import Gate
from mixdist.nets.mlp import MLP, Affine, flat
from mixdist.nets.network import Network
from mixdist.stats import Warmup, annealed, check_steps, ramp
from mixdist.terms import Batch, Gating, Spec, real_field


class Softmax(Gate):
    """q(e|x) = softmax((f(x) + s eps_E) / t), with temperature t and, in training alone, noise of standard deviation s.

    Both may be annealed, so that all experts learn before the responsibilities become clear: with
    u = min(1, step / anneal_steps), t = temperature^(1 - u) final_temperature^u and s = (1 - u) noise + u final_noise.
    The step counts from 0 in each phase. Evaluation uses the final temperature and no noise, at any step.
    Noise on the logits before a softmax is that of Shazeer et al. 2017, eq. 4, with a standard deviation that is given.

    Args:
        spec: the data set's fields.
        num_experts: the number of experts.
        network: f; unset, a linear map.
        temperature: above 1 softer, below 1 harder.
        field: which field it reads.
        final_temperature: the temperature after ``anneal_steps``; unset, ``temperature`` stays.
        noise: standard deviation of the noise on the logits, drawn anew for each row and expert at every step.
        final_noise: the standard deviation after ``anneal_steps``; unset, ``noise`` stays.
        anneal_steps: training steps of a phase over which temperature and noise reach their final values; or a
            :class:`mixdist.stats.Warmup`, as ``{epochs: 5}``.

    Raises:
        ValueError: a missing field, a temperature that is not positive, negative noise, or final values without steps.

    Examples:
        >>> import torch
        >>> from mixdist.gates import Softmax
        >>> from mixdist.nets import Conv
        >>> from mixdist.terms import Field
        >>> gate = Softmax({"x": Field((1, 28, 28), torch.uint8, 1 / 255)}, num_experts=10, network=Conv([16, 32]))
        >>> gate({"id": torch.arange(5), "x": torch.zeros(5, 1, 28, 28)}, None).log_resp_BE.shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        spec: Spec,
        num_experts: int,
        network: Network | None = None,
        temperature: float = 1.0,
        field: str = "x",
        final_temperature: float | None = None,
        noise: float = 0.0,
        final_noise: float | None = None,
        anneal_steps: int | Warmup = 0,
    ) -> None:
        check_arguments(Softmax.__init__, locals(), "Softmax's ")
        super().__init__()
        kind = type(self).__name__
        shape = real_field(spec, field, kind).shape
        given = {"temperature": temperature, "final_temperature": final_temperature, "noise": noise}
        given["final_noise"] = final_noise
        _check_schedule(kind, {name: value for name, value in given.items() if value is not None}, anneal_steps)
        self.field, self.fields, self.anneal_steps = field, (field,), anneal_steps
        self.temperatures = temperature, temperature if final_temperature is None else final_temperature
        self.noises = noise, noise if final_noise is None else final_noise
        if max(self.noises):
            self.noise_shape = (num_experts,)
        # In float64 until the module is moved, so that the config's value is rounded once.
        self.temperature: Tensor
        self.noise: Tensor
        self.register_buffer("temperature", torch.tensor(temperature, dtype=torch.float64), persistent=False)
        self.register_buffer("noise", torch.tensor(noise, dtype=torch.float64), persistent=False)
        network = MLP([]) if network is None else network
        if not isinstance(network, MLP):
            # Drawn and dropped: where this class begins with a linear map, the weights of a seed stay what they were.
            Affine(math.prod(shape), num_experts)
        self.net = network.encoder(shape, num_experts)

    def anneal(self, step: int) -> None:
        u, (loud, quiet) = ramp(step, self.anneal_steps), self.noises
        self.temperature.fill_(annealed(step, self.anneal_steps, *self.temperatures))
        self.noise.fill_((1 - u) * loud + u * quiet)

    def logits(self, rows: Batch) -> Tensor:
        """Return f(x), (B, E); override it for another f."""
        return self.net(flat(rows[self.field]))

    def forward(self, rows: Batch, eps: Tensor | None) -> Gating:
        logits_BE = self.logits(rows)
        if not self.training:
            return Gating(torch.log_softmax(logits_BE / self.temperatures[1], dim=-1))
        if self.noise_shape is not None:
            assert eps is not None
            logits_BE = logits_BE + self.noise * eps
        return Gating(torch.log_softmax(logits_BE / self.temperature, dim=-1))


def _check_schedule(kind: str, given: Mapping[str, float], steps: int | Warmup) -> None:
    check_steps(f"{kind}'s anneal_steps", steps)
    for name, value in given.items():
        if "temperature" in name and not 0 < value < math.inf:
            raise ValueError(f"{kind}'s {name} ({value}) must be positive: give 1 for a plain softmax")
        if not 0 <= value < math.inf:
            raise ValueError(f"{kind}'s {name} ({value}) must be a number from 0: give 0 for none")
        if name.startswith("final") and not steps:
            raise ValueError(f"{kind}'s {name} ({value}) is never reached without anneal_steps: set anneal_steps")
    if steps and not given.keys() & {"final_temperature", "final_noise"}:
        raise ValueError(f"{kind}'s anneal_steps ({steps}) has nothing to anneal: set final_temperature or final_noise")
