"""Quantiles from counts in fixed bins: counts of ranks and micro-batches add up, values would not.

A value x falls into bin round(asinh(x / UNIT) / STEP). That is even near 0 and logarithmic beyond,
so a quantile is exact to 0.5 % of itself, or to 5e-9 when it is smaller than UNIT.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

STEP = 0.01
"""Width of a bin in asinh(x / UNIT): bins far from 0 are 1 % wide."""

UNIT = 1e-6
"""Below it bins are even. Log-ratios of equal weights in float32 are about as large."""

LIMIT = 1e4
"""Values beyond +-LIMIT count as +-LIMIT."""

_HALF = math.ceil(math.asinh(LIMIT / UNIT) / STEP)

NUM_BINS = 2 * _HALF + 1


def bins_of(values: Tensor) -> Tensor:
    """Bin of each value, int64 in [0, NUM_BINS), in the shape of `values`; NaN is no value."""
    scaled = torch.asinh(values.detach().double() / UNIT) / STEP
    return scaled.round().clamp(-_HALF, _HALF).long() + _HALF


def quantiles(counts: Tensor, probabilities: Sequence[float]) -> list[float]:
    """Quantiles of the counted values, interpolated between neighbours as NumPy does.

    Args:
        counts: (NUM_BINS,) how many values each bin holds.
        probabilities: each in [0, 1].

    Returns:
        One number each; 0.0 when nothing was counted.
    """
    cumulative = counts.detach().double().cpu().cumsum(0)
    total = round(cumulative[-1].item())
    if total == 0:
        return [0.0] * len(probabilities)
    places = torch.tensor([p * (total - 1) for p in probabilities], dtype=torch.float64)
    # The k-th smallest value, from 0, is in the first bin up to which more than k values lie.
    low, high = (
        _centre(torch.searchsorted(cumulative, place, right=True))
        for place in (places.floor(), places.ceil())
    )
    return (low + (high - low) * (places - places.floor())).tolist()


def _centre(bins: Tensor) -> Tensor:
    return UNIT * torch.sinh(STEP * (bins.clamp(max=NUM_BINS - 1) - _HALF).double())
