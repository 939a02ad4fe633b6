"""mixdist: expert-parallel training of mixtures of variational autoencoders."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from mixdist.version import __version__

if TYPE_CHECKING:
    from mixdist.model import Model

__all__ = ["__version__", "load"]


def load(run: str | PathLike[str]) -> Model:
    """Give the trained mixture of a run's directory, on one process: responsibilities, reconstructions, samples.

    Raises:
        ValueError: the directory holds no run, or no good checkpoint.
    """
    # Imported here, so that `import mixdist` stays light and modules of the package may be imported alone.
    from mixdist.model import load as load_model

    return load_model(run)
