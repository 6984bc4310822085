"""Whether answers can be rewarded, asked of the reward itself.

A label that math-verify cannot read drops its whole group in every epoch, and a label that does not
even equal itself can never be earned. Both are found here, before training, by the very comparison
that training uses, in its worker processes with their limits.
"""

import asyncio
import concurrent.futures
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from openrlhf_alp.data.errors import ComparisonError
from openrlhf_alp.rewards.math import MathReward
from openrlhf_alp.rewards.protocol import RewardUnavailable

_TIMEOUT_S = 20.0
"""For one comparison: more than training allows, as a busy machine is no fault of the label."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Does the answer earn the reward of the label?"""

    answer: str
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the reward said."""

    equal: bool
    """The answer is the label, even if a sum in it is left to work out."""

    unavailable: str | None = None
    """Why there was no reward: a name of `MathReward.counts`."""

    detail: str = ""


def compare(
    comparisons: Sequence[Comparison],
    *,
    num_workers: int,
    timeout_s: float = _TIMEOUT_S,
    on_done: Callable[[], None] = lambda: None,
) -> list[Verdict]:
    """One verdict per comparison, in order; `on_done` is called after each.

    Raises:
        ComparisonError: there are no worker processes.
    """
    if not comparisons:
        return []
    reward = MathReward(num_workers=num_workers, timeout_s=timeout_s)
    try:
        return asyncio.run(_compare(comparisons, reward, on_done))
    finally:
        reward.close()


async def _compare(
    comparisons: Sequence[Comparison], reward: MathReward, on_done: Callable[[], None]
) -> list[Verdict]:
    async def verdict(comparison: Comparison) -> Verdict:
        try:
            result = await reward.score(
                # As a policy that does what its prompt says would write it.
                prompt="",
                response=f"The answer is $\\boxed{{{comparison.answer.strip('$')}}}$.",
                label=comparison.label,
            )
        except RewardUnavailable as error:
            if isinstance(error.__cause__, concurrent.futures.BrokenExecutor):
                raise ComparisonError(
                    f"the processes that check labels do not start: {error.__cause__}. See above "
                    "for their traceback; a script needs a file and `if __name__ == '__main__'`"
                ) from error
            return Verdict(equal=False, unavailable=error.reason, detail=error.detail)
        finally:
            on_done()
        return Verdict(equal=result.value == 1.0 or result.detail["unevaluated"] == 1.0)

    return await asyncio.gather(*map(verdict, comparisons))
