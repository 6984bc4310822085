"""The estimators: avg@n, pass@k, majority@n, and their intervals. Pure functions of counts.

A problem is the unit of every interval: its n answers are not independent, so they form one cluster
and count as one observation. Nothing here returns NaN.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from scipy.special import stdtrit

LEVEL = 0.95
"""Coverage of every interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over problems, with its interval. All four lie in [0, 1]."""

    value: float
    stderr: float
    """Standard error clustered by problem; 0.0 for a single problem."""

    low: float
    high: float


def average(right: Sequence[int], n: int) -> Estimate:
    """avg@n: the mean share of right answers.

    Args:
        right: number of right answers of each problem, out of `n`.

    Raises:
        ValueError: there is no problem, or a count is not in 0..n.
    """
    _check(right, n)
    return mean_estimate([count / n for count in right], num_answers=n)


def pass_at_k(num_right: int, n: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of the n answers, drawn without replacement,
    hold a right one. Unbiased for every k <= n (Chen et al., arXiv 2107.03374, equation 1).

    Raises:
        ValueError: k is not in 1..n, or c not in 0..n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} answers: k must be in 1..{n}")
    _check([num_right], n)
    # Whole numbers divided once: exact to the last digit, unlike a product of n floats.
    return 1 - math.comb(n - num_right, k) / math.comb(n, k)


def pass_at(right: Sequence[int], n: int, k: int) -> Estimate:
    """The mean of `pass_at_k` over problems; arguments as for `average`."""
    _check(right, n)
    return mean_estimate([pass_at_k(count, n, k) for count in right], num_answers=n)


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4 ... below n, and n itself: the k of a pass@k curve."""
    if n < 1:
        raise ValueError(f"n is {n}; at least one answer per problem is needed")
    return [*(2**i for i in range((n - 1).bit_length())), n]


def majority(votes: Sequence[tuple[Hashable | None, bool]]) -> float:
    """majority@n of one problem: whether the most frequent answer is right.

    Args:
        votes: of each answer, what it says (None: nothing, no vote) and whether it is right. Right
            answers are one choice, however they are spelled, because all of them equal the label.

    Returns:
        1.0 or 0.0; where several choices are equally frequent, the chance that a fair draw among
        them is right.
    """
    right = object()
    counts = Counter(right if is_right else said for said, is_right in votes if said is not None)
    most = max(counts.values(), default=0)
    winners = [choice for choice, times in counts.items() if times == most]
    return winners.count(right) / len(winners) if winners else 0.0


def mean_estimate(values: Sequence[float], *, num_answers: int = 1) -> Estimate:
    """Mean of one value per problem, each in [0, 1], with a 95 % interval.

    The interval is Wilson's score interval with the effective sample size p (1 - p) / stderr^2 and
    Student's quantile for the number of problems (Dean and Pagano 2015, doi 10.1093/jssam/smv024).
    It stays in [0, 1], and it does not shrink to a point when every answer is right or wrong.

    Args:
        num_answers: answers behind each value; bounds the effective sample size.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("there is no problem to average over")
    num = len(values)
    mean = fmean(values)
    if num == 1:
        # Student's quantile without a degree of freedom is infinite: one problem of a set says
        # nothing about the others.
        return Estimate(value=mean, stderr=0.0, low=0.0, high=1.0)
    stderr = math.sqrt(variance(values) / num)
    spread = mean * (1 - mean)
    # Between "a problem's answers are all alike" and "all answers are independent".
    size = float(num) if spread <= 0 else num * num_answers
    if spread > 0 and stderr > 0:
        size = min(spread / stderr**2, size)
    low, high = _wilson(mean, size, float(stdtrit(num - 1, 0.5 + LEVEL / 2)))
    return Estimate(value=mean, stderr=stderr, low=min(low, mean), high=max(high, mean))


def _wilson(mean: float, size: float, z: float) -> tuple[float, float]:
    centre = (mean + z * z / (2 * size)) / (1 + z * z / size)
    half = z / (1 + z * z / size) * math.sqrt(mean * (1 - mean) / size + z * z / (4 * size * size))
    return max(0.0, centre - half), min(1.0, centre + half)


def _check(right: Sequence[int], n: int) -> None:
    if n < 1:
        raise ValueError(f"n is {n}; at least one answer per problem is needed")
    wrong = [count for count in right if not 0 <= count <= n]
    if wrong:
        raise ValueError(f"{wrong[0]} right answers out of {n}: a problem was counted twice")
