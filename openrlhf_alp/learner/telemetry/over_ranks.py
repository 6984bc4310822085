"""Reduces a step's telemetry over the data-parallel ranks: fixed sizes, to rank 0 alone.

Rank 0's status is the one that the trainer logs, so the others need no result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openrlhf_alp.objective.metric_names import CUTS, SIGNS
from openrlhf_alp.objective.telemetry import RatioTelemetry, cut_shares, figures


def ratio_metrics(ratios: RatioTelemetry, cuts: Tensor) -> dict[str, float]:
    """The ratio metrics and the shares of each cut, of all ranks. Collective.

    Args:
        ratios: of this rank.
        cuts: `cut_counts` of this rank, with the names of CUTS.

    Returns:
        The metrics on rank 0; empty on the others.
    """
    maxima = ratios.maxima().to(torch.cuda.current_device())
    torch.distributed.all_reduce(maxima, op=torch.distributed.ReduceOp.MAX)
    own = ratios.sums(maxima)
    total = sum_on_rank_0(torch.cat([own, cuts.to(own.device).flatten()]))
    if total is None:
        return {}
    sums, counts = total.split([own.numel(), cuts.numel()])
    return figures(maxima, sums) | cut_shares(list(CUTS), counts.view(len(SIGNS), -1))


def sum_on_rank_0(own: Tensor) -> Tensor | None:
    """The sum over ranks of a tensor of one shape, on rank 0; None on the others. Collective."""
    # A copy also on the same device: the reduction works in place.
    total = own.to(torch.cuda.current_device(), copy=True)
    torch.distributed.reduce(total, dst=0)
    return total if torch.distributed.get_rank() == 0 else None
