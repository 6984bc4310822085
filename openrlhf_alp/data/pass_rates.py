"""Which problems a policy solves now and then: those that it can learn from.

A group of answers that are all right or all wrong has no advantage, so its problem costs rollouts
and gives no gradient. The rates come from an evaluation of the policy, before training.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRates:
    """Share of right answers of each problem, and which shares are wanted."""

    of: Mapping[str, float]
    """Share, 0 to 1, by `prepare.problem_key` of the problem."""

    bounds: tuple[float, float] | None = None
    """Lowest and highest share, both wanted; None: every one between 0 and 1, but not these."""

    def fault_of(self, share: float) -> str:
        """Why a problem with this share is not wanted; empty when it is."""
        if self.bounds is None:
            return "" if 0.0 < share < 1.0 else f"{share:.0%} of the answers are right"
        low, high = self.bounds
        if low <= share <= high:
            return ""
        return f"{share:.0%} of the answers are right, wanted: {low:.0%} to {high:.0%}"
