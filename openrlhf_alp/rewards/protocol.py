"""Defines what episodes and rewards know of each other."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


class RewardUnavailable(Exception):
    """No reward could be computed. This is not 0.0: drop the episode's group and count it.

    Attributes:
        reason: short stable name that is used as a metric, for example `timeout`.
    """

    def __init__(self, *, reason: str, detail: str) -> None:
        super().__init__(f"reward unavailable ({reason}): {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[object, ...]:
        # Ray pickles exceptions, and keyword-only arguments do not survive the default way.
        return (_rebuild_unavailable, (self.reason, self.detail))


def _rebuild_unavailable(reason: str, detail: str) -> RewardUnavailable:
    return RewardUnavailable(reason=reason, detail=detail)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardResult:
    """The score of one answer."""

    value: float
    """Finite; math rewards are 1.0 for right and 0.0 for wrong."""

    detail: Mapping[str, float] = field(default_factory=dict)
    """Named numbers for metrics: every result has the same names in the same order."""

    answer: str | None = None
    """The final answer that was found in the text; None when there is none."""

    choice: str | None = None
    """The same in one spelling, for a majority vote."""


class Reward(Protocol):
    """Scores one answer."""

    async def score(self, *, prompt: str, response: str, label: str) -> RewardResult:
        """Returns the score of `response`, the policy's own text, against the gold `label`.

        Raises:
            RewardUnavailable: the score could not be computed.
        """
        ...
