"""Makes the demos' tasks: sums of small numbers, and products for the tool-integrated demo.

A row is one JSON line in OpenRLHF's prompt format: `--data.input_key input`,
`--data.label_key label`, `--data.apply_chat_template`. Products of two-digit numbers are beyond a
small model without a tool. `sample_dialogues` also yields examples for a short supervised warm-up:
a third of them call the tool and the others guess a number, so that the policy can do both and
reinforcement learning has to find out which one is rewarded.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from openrlhf_alp.data.templates import INPUT_KEY, LABEL_KEY

_SMALLEST, _LARGEST = 12, 99
_NUM_PAIRS, _NUM_TEST_PAIRS = 120, 6

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question and its answer."""

    question: str
    label: str
    """The answer as a decimal number."""

    def to_json(self) -> str:
        """One line of the dataset file."""
        return json.dumps({INPUT_KEY: self.question, LABEL_KEY: self.label})


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionSplit:
    """Training and test questions; no pair of operands is in both."""

    train: tuple[Question, ...]
    test: tuple[Question, ...]


def split_pairs(
    pairs: Sequence[Pair], *, num_test: int, ask: Callable[[int, int], Question], seed: int
) -> QuestionSplit:
    """Splits questions by unordered pairs: when (3, 4) is in the test, (4, 3) is too.

    Both parts are shuffled; the same arguments always give the same split.

    Args:
        pairs: each unordered pair once.
        num_test: number of pairs that are held out.
        ask: makes the question about a and b, in this order.

    Raises:
        ValueError: a part would be empty.
    """
    if not 0 < num_test < len(pairs):
        raise ValueError(
            f"{len(pairs)} pairs of operands, of which {num_test} are held out: nothing is left to "
            "train on, or nothing to test with. Use larger operands or another share"
        )
    order = random.Random(seed)
    shuffled = order.sample(pairs, k=len(pairs))

    def questions(part: Iterable[Pair]) -> tuple[Question, ...]:
        # Sorted before the shuffle: the order of a set is not the same in every process.
        ordered = sorted({both for a, b in part for both in ((a, b), (b, a))})
        order.shuffle(ordered)
        return tuple(ask(a, b) for a, b in ordered)

    return QuestionSplit(train=questions(shuffled[num_test:]), test=questions(shuffled[:num_test]))


def repeat_rows(rows: Sequence[Question], *, count: int, seed: int = 0) -> list[Question]:
    """Returns `count` rows: as many passes over `rows` as needed, each in a new random order."""
    order = random.Random(seed)
    repeated: list[Question] = []
    while len(repeated) < count:
        repeated += order.sample(rows, k=len(rows))
    return repeated[:count]


def write_rows(path: Path, rows: Iterable[Question]) -> None:
    """Writes a data set file with one JSON object per line."""
    path.write_text("".join(row.to_json() + "\n" for row in rows), encoding="utf-8")


def split_additions(
    *, max_operand: int = 9, test_share: float = 0.2, seed: int = 0
) -> QuestionSplit:
    """Returns all sums a + b with a, b in 1..max_operand, split so that the test is unseen.

    Args:
        max_operand: the largest a and b; 9 gives 81 questions.
        test_share: share of the unordered pairs that is held out; at least one pair is.
        seed: seed of the split and of the order.

    Raises:
        ValueError: a part would be empty.
    """
    pairs = [(a, b) for a in range(1, max_operand + 1) for b in range(a, max_operand + 1)]
    num_test = max(1, round(test_share * len(pairs)))
    return split_pairs(pairs, num_test=num_test, ask=_sum, seed=seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """One worked example, turn by turn."""

    question: str
    call: str | None
    """The turn that calls the tool; None for a guess."""
    output: str
    """What the tool prints."""
    answer: str
    """The last turn."""


def split_products(*, seed: int = 0) -> QuestionSplit:
    """Returns products of two two-digit numbers; held-out pairs are never trained on."""
    numbers = random.Random(seed)
    # A set, because a pair that is drawn twice could be in both parts.
    pairs: set[tuple[int, int]] = set()
    while len(pairs) < _NUM_PAIRS:
        a, b = sorted((_operand(numbers), _operand(numbers)))
        pairs.add((a, b))
    return split_pairs(sorted(pairs), num_test=_NUM_TEST_PAIRS, ask=_product, seed=seed)


def sample_dialogues(*, seed: int) -> Iterator[Dialogue]:
    """Yields dialogues forever: every third one calls the tool, the others guess wrong."""
    numbers = random.Random(seed)
    while True:
        for calls in (True, False, False):
            a, b = _operand(numbers), _operand(numbers)
            product = a * b
            guess = product if calls else _wrong(product, numbers)
            yield Dialogue(
                question=_product(a, b).question,
                call=f"```python\nprint({a} * {b})\n```\n" if calls else None,
                output=str(product),
                answer=f"The answer is \\boxed{{{guess}}}.",
            )


def _operand(numbers: random.Random) -> int:
    return numbers.randint(_SMALLEST, _LARGEST)


def _wrong(product: int, numbers: random.Random) -> int:
    """Draws another number of the same length."""
    length = len(str(product))
    while True:
        guess = numbers.randrange(10 ** (length - 1), 10**length)
        if guess != product:
            return guess


def _sum(a: int, b: int) -> Question:
    return Question(question=f"What is {a} + {b}?", label=str(a + b))


def _product(a: int, b: int) -> Question:
    return Question(question=f"What is {a} * {b}?", label=str(a * b))
