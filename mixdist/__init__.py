"""mixdist: expert-parallel training of mixtures of variational autoencoders."""

from __future__ import annotations

from os import PathLike
from typing import Any, Literal

__all__ = ["load"]


def load(run: str | PathLike[str], weights: Literal["best", "newest"] = "best", ema: bool = False) -> Any:
    """Return the trained mixture of a run's directory, on one process: responsibilities, reconstructions, samples.

    Args:
        run: the directory.
        weights: of the best checkpoint, where the run's ``select`` monitors a figure, else of the newest good one; or
            of the newest good one in any case.
        ema: take the moving averages of weights of a run that was trained with ``train.ema``.

    Raises:
        ValueError: the directory holds no run, or no good checkpoint, or no averages.
    """
    # Imported here, so that `import mixdist` stays light and modules of the package may be imported alone.
    from mixdist.model import load as load_model

    return load_model(run, weights, ema)


def __getattr__(name: str) -> Any:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("mixdist")
