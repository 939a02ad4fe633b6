"""From responsibilities to decisions. Pure. In dense routing every expert sees every row, and nothing is decided but
which expert is the most responsible."""

from __future__ import annotations

import torch
from torch import Tensor


def responsible(log_resp_BE: Tensor) -> Tensor:
    """Give each row's most responsible expert (B,); ties go to the lowest number.

    torch's argmax does not promise which of several equal maxima it gives, hence the detour.

    Raises:
        ValueError: a responsibility is not a number.
    """
    if log_resp_BE.isnan().any():
        bad = int(log_resp_BE.isnan().any(1).sum())
        raise ValueError(f"the gate's output is not a number for {bad} rows: look for bad rows, or train anew")
    num_experts = log_resp_BE.shape[1]
    is_best = log_resp_BE == log_resp_BE.max(dim=1, keepdim=True).values
    ids = torch.arange(num_experts, device=log_resp_BE.device)
    return torch.where(is_best, ids, num_experts).min(dim=1).values
