"""Means over seeds with Student's t intervals, and paired differences. Pure functions.

Seeds are few, so the interval is mean +- t(n - 1) * s / sqrt(n), at 95 %: 12.7 standard errors with
two seeds, 4.3 with three. One seed has no interval.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.special import stdtrit

LEVEL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over `num` seeds. `low` and `high` are None for one seed."""

    mean: float
    low: float | None
    high: float | None
    num: int

    @property
    def half(self) -> float | None:
        """Half of its width."""
        return None if self.high is None else self.high - self.mean

    @property
    def excludes_zero(self) -> bool:
        """Whether the data tell the sign, at the level of the interval."""
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high


def over_seeds(values: Sequence[float]) -> Interval | None:
    """The mean of one value per seed; None without a finite one."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    mean, num = fmean(finite), len(finite)
    if num == 1:
        return Interval(mean=mean, low=None, high=None, num=1)
    half = float(stdtrit(num - 1, 0.5 + LEVEL / 2)) * stdev(finite) / math.sqrt(num)
    return Interval(mean=mean, low=mean - half, high=mean + half, num=num)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """The mean of ours minus theirs over the seeds that both have; None without such a seed.

    Pairs with the same seed share prompts, their order and the sampling seeds, so what the seed
    itself does cancels.
    """
    shared = sorted(ours.keys() & theirs.keys())
    return over_seeds([ours[seed] - theirs[seed] for seed in shared])
