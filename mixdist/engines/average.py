"""Averages of trained weights, kept by the optimiser that steps them.

An average is a state of the optimiser, beside momentum and the like. So it is where its parameter is stepped (cut,
owned by one rank, in CPU memory), goes with an expert that moves, and is in checkpoints, on any engine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from mixdist.engines.engine import OptimizerFactory

AVERAGE = "ema"
"""Its key among the states of a parameter."""


def averaged(make: OptimizerFactory, decay: float, parameters: Any) -> Optimizer:
    """Make an optimiser that also averages what it steps: a_1 = w_1, a_t = d a_(t-1) + (1 - d) w_t.

    w_t are the weights after step t of the phase, d the decay; the same as :class:`torch.optim.swa_utils.AveragedModel`
    with ``get_ema_multi_avg_fn(d)``.

    Args:
        make: makes the optimiser.
        decay: d.
        parameters: what it steps.

    Raises:
        ValueError: a decay that is not above 0 and below 1, or what is made has no hooks.

    Examples:
        >>> import torch
        >>> from mixdist.engines.average import averaged
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = averaged(lambda ps: torch.optim.SGD(ps, lr=1.0), 0.75, [weight])
        >>> for _ in range(3):  # the weight is 1, 2, 3
        ...     weight.grad = torch.full((1,), -1.0)
        ...     optimizer.step()
        >>> optimizer.state[weight]["ema"]  # 3/4 (3/4 * 1 + 1/4 * 2) + 1/4 * 3
        tensor([1.6875])
    """
    check_decay(decay)
    optimizer = make(parameters)
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"train.ema ({decay}) needs an optimiser of torch, and {type(optimizer).__name__} is none: leave ema out"
        )

    @torch.no_grad()
    def average(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        known, stepped = [], []
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            state = optimizer.state[parameter]
            if AVERAGE in state:
                known.append(state[AVERAGE])
                stepped.append(parameter.detach())
            else:
                state[AVERAGE] = parameter.detach().clone(memory_format=torch.preserve_format)
        if known:
            torch._foreach_lerp_(known, stepped, 1.0 - decay)

    optimizer.register_step_post_hook(average)
    optimizer.defaults[AVERAGE] = True  # its state depends on it: ``state.kind``
    return optimizer


def check_decay(decay: float, key: str = "train.ema") -> None:
    """Check a decay.

    Raises:
        ValueError: it is not above 0 and below 1.
    """
    if not 0 < decay < 1:
        raise ValueError(
            f"{key} ({decay}) must be above 0 and below 1: give 0.999 for a usual average, or leave it out"
        )
