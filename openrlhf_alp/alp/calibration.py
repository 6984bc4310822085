"""Choosing sigma0: as much noise as the training-inference mismatch, not more.

Theorem 1 of the paper (arXiv 2603.19470) bounds the KL divergence of rollout and perturbed policy
by two terms: one falls as sigma covers the mismatch, one grows as sigma distorts the policy. They
balance where the noise moves the log-probabilities by as much as the mismatch does. Both sides can
be measured on served tokens before the first update:

    mismatch   k3_kl(clean learner,     rollout engine)   = target
    noise      k3_kl(perturbed learner, clean learner)    ~ sigma**2 while sigma is small
"""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Outcome of `calibrate_sigma0`; KL divergences in nats per token."""

    sigma0: float
    reached_kl: float
    """KL of the noise at sigma0."""
    target_kl: float
    """KL of the mismatch times whatever factor the caller chose."""
    evaluations: int
    """Perturbed forward measurements made."""
    at_bound: str | None
    """`sigma_min` or `sigma_max` when the target lies beyond it and sigma0 was set to the bound."""


def calibrate_sigma0(
    perturbed_kl: Callable[[float], float],
    target_kl: float,
    *,
    sigma_min: float,
    sigma_max: float,
    start: float = 0.01,
    tolerance: float = 0.05,
    max_evaluations: int = 10,
) -> Calibration:
    """Find the sigma whose noise reaches `target_kl`.

    Secant steps on log KL against log sigma, where KL ~ sigma**2 is a line of slope 2, kept inside
    the bracket found so far; three to five evaluations are usual.

    Args:
        perturbed_kl: sigma -> KL of perturbed against clean. Use the same noise at every call
            (one `update` number), which makes it smooth in sigma.
        target_kl: > 0, the mismatch to cover.
        sigma_min: >= 0, lower bound of the answer; 0 is searched down to 1e-9 * sigma_max.
        sigma_max: upper bound of the answer.
        start: first guess.
        tolerance: relative error of the KL that ends the search.
        max_evaluations: the best sigma so far is taken after as many.

    Raises:
        ValueError: the target or a measured KL is not a positive finite number, or the bounds are
            out of order.
    """
    if not (0 <= sigma_min < sigma_max < math.inf):
        raise ValueError(f"bounds [{sigma_min}, {sigma_max}] must hold 0 <= sigma_min < sigma_max")
    if not (0 < target_kl < math.inf):
        raise ValueError(
            f"the measured mismatch is {target_kl}; calibration needs a positive finite KL. "
            "Without any mismatch there is nothing to cover: give --alp.sigma0 a number"
        )
    search = _Search(target_kl, max(sigma_min, sigma_max * 1e-9), sigma_max)
    sigma = min(max(start, search.low), search.high)
    while True:
        search.record(sigma, perturbed_kl(sigma))
        best_sigma, best_kl = search.best()
        # Each evaluation is a forward pass of the model, so stop as soon as it is close enough.
        close = abs(best_kl / target_kl - 1) <= tolerance
        bound = search.stuck_at()
        if close or bound or len(search.points) >= max_evaluations:
            break
        sigma = search.propose()
    return Calibration(
        sigma0=best_sigma,
        reached_kl=best_kl,
        target_kl=target_kl,
        evaluations=len(search.points),
        at_bound=None if close else bound,
    )


# One step changes sigma by a factor of 100 at most: a KL of zero, which noise below the model's
# rounding gives, says nothing about the distance.
_MAX_LOG_STEP = math.log(100)


class _Search:
    """Bracketed secant search for log KL(log sigma) = log target. Points are (sigma, kl)."""

    def __init__(self, target_kl: float, low: float, high: float) -> None:
        self.target_kl = target_kl
        self.low = low
        self.high = high
        self.points: list[tuple[float, float]] = []

    def record(self, sigma: float, kl: float) -> None:
        if not 0 <= kl < math.inf:
            raise ValueError(
                f"the perturbed forward at sigma {sigma:.3g} gave a KL of {kl}; it must be finite. "
                "Lower --alp.sigma_max"
            )
        self.points.append((sigma, kl))

    def best(self) -> tuple[float, float]:
        """The point whose KL is nearest to the target in ratio."""
        return min(self.points, key=lambda point: abs(self._excess(point[1])))

    def stuck_at(self) -> str | None:
        """The bound just measured if the target lies beyond it."""
        sigma, kl = self.points[-1]
        if sigma >= self.high and kl < self.target_kl:
            return "sigma_max"
        if sigma <= self.low and kl > self.target_kl:
            return "sigma_min"
        return None

    def propose(self) -> float:
        sigma, kl = self.points[-1]
        step = -self._excess(kl) / self._slope()
        guess = sigma * math.exp(min(max(step, -_MAX_LOG_STEP), _MAX_LOG_STEP))
        below = [s for s, k in self.points if k < self.target_kl]
        above = [s for s, k in self.points if k >= self.target_kl]
        low = max(below, default=self.low)
        high = min(above, default=self.high)
        # A secant step out of the bracket would repeat what is known: halve it in log sigma.
        if below and above and not low < guess < high:
            guess = math.sqrt(low * high)
        return min(max(guess, self.low), self.high)

    def _slope(self) -> float:
        """d log KL / d log sigma from the last two points; 2 by theory before there are two."""
        usable = [(s, k) for s, k in self.points if k > 0][-2:]
        if len(usable) < 2 or usable[0][0] == usable[1][0]:
            return 2.0
        (sigma_a, kl_a), (sigma_b, kl_b) = usable
        slope = math.log(kl_b / kl_a) / math.log(sigma_b / sigma_a)
        # Two measurements close together may give any slope by rounding; the theory says 2.
        return min(max(slope, 0.5), 4.0)

    def _excess(self, kl: float) -> float:
        """log(KL / target), bounded below for a KL of zero."""
        return math.log(max(kl, self.target_kl * 1e-12) / self.target_kl)
