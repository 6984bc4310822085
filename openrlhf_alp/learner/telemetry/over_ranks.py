"""Reduces a step's telemetry over the data-parallel ranks: fixed sizes, to rank 0 alone."""

from __future__ import annotations

import torch
from torch import Tensor

from openrlhf_alp.objective.telemetry import RatioTelemetry, figures


def ratio_metrics(telemetry: RatioTelemetry) -> dict[str, float]:
    """The ratio metrics of all ranks on rank 0, whose status the trainer logs. Collective.

    Returns:
        The metrics; empty on the other ranks.
    """
    maxima = telemetry.maxima().to(torch.cuda.current_device())
    torch.distributed.all_reduce(maxima, op=torch.distributed.ReduceOp.MAX)
    sums = sum_on_rank_0(telemetry.sums(maxima))
    return {} if sums is None else figures(maxima, sums)


def sum_on_rank_0(own: Tensor) -> Tensor | None:
    """The sum over ranks of a tensor of one shape, on rank 0; None on the others. Collective."""
    total = own.to(torch.cuda.current_device())
    torch.distributed.reduce(total, dst=0)
    return total if torch.distributed.get_rank() == 0 else None
