"""What is known of an expert on every rank, wherever it lives."""

from __future__ import annotations

import math
from typing import NamedTuple

from mixdist.experts import Expert


class Facts(NamedTuple):
    """What every rank knows of an expert, wherever it lives; names are None where it has no such thing.

    Args:
        fields: the fields of a row that it reads.
        reconstructs: the field that it reconstructs.
        samples: the field that it samples, as means of p(x|z).
        draws: the field that it draws, with the noise of p(x|z).
        predicts: the field that it predicts.
        weighs: whether it has importance weights.
        num_latent: latent dimensions of its posterior; 0 where it shows none.
        log_px_is: density or mass, as the expert says.
        levels: of a mass over levels, how many.
        has_loss: whether its loss means anything.
    """

    fields: tuple[str, ...]
    reconstructs: str | None
    samples: str | None
    draws: str | None
    predicts: str | None
    weighs: bool
    num_latent: int = 0
    log_px_is: str | None = None
    levels: int | None = None
    has_loss: bool = True

    @staticmethod
    def of(expert: Expert) -> Facts:
        """Read them from an expert."""
        field, noisy = str(getattr(expert, "field", "x")), expert.latent_shape is not None
        return Facts(
            tuple(expert.fields),
            field if expert.can("reconstruct") and field in expert.fields else None,
            field if expert.can("sample") and noisy else None,
            field if expert.can("draw") and noisy else None,
            getattr(expert, "target", None) if expert.can("predict") else None,
            expert.can("log_weights") and noisy,
            math.prod(expert.latent_shape or ()) if expert.can("posterior") and noisy else 0,
            expert.log_px_is,
            expert.levels,
            expert.has_loss,
        )
