"""Runs the reward on labels before training and returns a verdict for each.

A label that the reward cannot read drops its whole group in every epoch, and a label that does not
equal itself can never be earned. Both are found here by the comparison that training uses, in the
same worker processes with the same limits.
"""

import asyncio
import concurrent.futures
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from openrlhf_alp.data.sources import DataError
from openrlhf_alp.rewards.labels import LabelNotParsableError
from openrlhf_alp.rewards.math import LABEL_NOT_PARSABLE, MathReward
from openrlhf_alp.rewards.protocol import RewardUnavailable
from openrlhf_alp.rewards.verify import label_text

_PLAIN_DIGITS = 100
"""A whole number of fewer digits equals itself in every form; it needs no worker."""

_TIMEOUT_S = 20.0
"""Time limit of one comparison; longer than in training, to allow for a busy machine."""


class ComparisonError(DataError):
    """The worker processes that check labels could not be started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """An answer and the label that should reward it."""

    answer: str
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result of one comparison."""

    equal: bool
    """Whether the answer equals the label, even if a sum in it is not evaluated."""

    unavailable: str | None = None
    """Why there was no reward: a name from `MathReward.counts`."""

    detail: str = ""


def check_labels(
    labels: Sequence[Any],
    *,
    num_workers: int,
    timeout_s: float = _TIMEOUT_S,
    on_done: Callable[[], None] = lambda: None,
) -> list[Verdict]:
    """Returns for each label of a data set whether its own text earns the reward, in order.

    Equal labels are compared once, and whole numbers not at all, so that this takes seconds for
    tens of thousands of rows. `on_done` is called once for each label.

    Raises:
        ComparisonError: the worker processes do not start.
    """
    texts = [_text_or_verdict(label) for label in labels]
    # Labels repeat: 7,474 rows of MATH have about 1,900 that are no plain number.
    distinct = list(dict.fromkeys(text for text in texts if isinstance(text, str)))
    for _ in range(len(texts) - len(distinct)):
        on_done()
    verdicts = compare(
        [Comparison(answer=text, label=text) for text in distinct],
        num_workers=num_workers,
        timeout_s=timeout_s,
        on_done=on_done,
    )
    by_text = dict(zip(distinct, verdicts, strict=True))
    return [by_text[text] if isinstance(text, str) else text for text in texts]


def _text_or_verdict(label: Any) -> str | Verdict:
    """The label's text, or a verdict that needs no comparison."""
    try:
        text = label_text(label)
    except LabelNotParsableError as error:
        return Verdict(equal=False, unavailable=LABEL_NOT_PARSABLE, detail=str(error))
    is_integer = text.isascii() and text.isdigit() and len(text) < _PLAIN_DIGITS
    return Verdict(equal=True) if is_integer else text


def compare(
    comparisons: Sequence[Comparison],
    *,
    num_workers: int,
    timeout_s: float = _TIMEOUT_S,
    on_done: Callable[[], None] = lambda: None,
) -> list[Verdict]:
    """Returns one verdict per comparison, in order; `on_done` is called after each.

    Raises:
        ComparisonError: the worker processes do not start.
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
                # The form that the prompt templates ask for.
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
