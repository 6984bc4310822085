"""The tool-integrated demo's task: products of two-digit numbers, beyond a small model's head.

`sample_dialogues` also writes what a short supervised warm-up reads. A third of its dialogues call
the tool and the others guess a number, so that the policy can do both and does not know yet which
one pays: that is left to reinforcement learning.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from openrlhf_alp.data.questions import Question, QuestionSplit, split_pairs

_SMALLEST, _LARGEST = 12, 99
_NUM_PAIRS, _NUM_TEST_PAIRS = 120, 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """One worked example, by turns."""

    question: str
    call: str | None
    """The turn that calls the tool; None for a guess."""
    output: str
    """What the tool prints."""
    answer: str
    """The last turn."""


def split_products(*, seed: int = 0) -> QuestionSplit:
    """Products of two numbers of two digits; held-out pairs are never trained on."""
    numbers = random.Random(seed)
    pairs: set[tuple[int, int]] = set()
    while len(pairs) < _NUM_PAIRS:
        a, b = sorted((_operand(numbers), _operand(numbers)))
        pairs.add((a, b))
    return split_pairs(sorted(pairs), num_test=_NUM_TEST_PAIRS, ask=_ask, seed=seed)


def sample_dialogues(*, seed: int) -> Iterator[Dialogue]:
    """An endless mix of dialogues: every third one calls the tool, the others guess wrong."""
    numbers = random.Random(seed)
    while True:
        for calls in (True, False, False):
            a, b = _operand(numbers), _operand(numbers)
            product = a * b
            guess = product if calls else _wrong(product, numbers)
            yield Dialogue(
                question=_ask(a, b).question,
                call=f"```python\nprint({a} * {b})\n```\n" if calls else None,
                output=str(product),
                answer=f"The answer is \\boxed{{{guess}}}.",
            )


def _operand(numbers: random.Random) -> int:
    return numbers.randint(_SMALLEST, _LARGEST)


def _wrong(product: int, numbers: random.Random) -> int:
    """Another number of the same length."""
    length = len(str(product))
    while True:
        guess = numbers.randrange(10 ** (length - 1), 10**length)
        if guess != product:
            return guess


def _ask(a: int, b: int) -> Question:
    return Question(question=f"What is {a} * {b}?", label=str(a * b))
