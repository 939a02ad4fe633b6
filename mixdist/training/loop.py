"""What every training loop shares."""

from __future__ import annotations

import resource
import sys
from typing import Any, Protocol

import torch


class Recorder(Protocol):
    """Receives a record of each logged step, on rank 0."""

    def write(self, record: dict[str, Any]) -> None:
        """Keep one record."""

    def close(self) -> None:
        """Finish."""


def peak_memory(device: torch.device) -> int:
    """The most memory held so far, bytes: allocated on a CUDA device, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
