"""What a mixture makes of rows outside training.

Shape letters: B rows on this rank, E all experts.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scores(NamedTuple):
    """What a mixture makes of B rows.

    Args:
        log_resp_BE: log responsibilities.
        losses_BE: each expert's loss, as in training, nats.
        elbo_BE: each expert's ELBO, log p(x|z) - KL at one posterior sample, or its log p where that is exact, nats;
            NaN for an expert without one, None where no expert has one.
        exact_BE: log p(x), or log p(y|x) of supervised experts, where it is exact; NaN and None as above.
        gate_loss_B: the gate's own loss, nats; None where it has none.
    """

    log_resp_BE: Tensor
    losses_BE: Tensor
    elbo_BE: Tensor | None
    exact_BE: Tensor | None
    gate_loss_B: Tensor | None = None
