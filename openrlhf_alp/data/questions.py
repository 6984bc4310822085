"""The demos' tasks as rows: a question, a number that answers it, and what is held out.

A row is one JSON line in OpenRLHF's prompt format: `--data.input_key input`,
`--data.label_key label`, `--data.apply_chat_template`.
"""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

INPUT_KEY = "input"
LABEL_KEY = "label"

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
    """Questions to train on and questions to test with; no pair of operands is in both."""

    train: tuple[Question, ...]
    test: tuple[Question, ...]


def split_pairs(
    pairs: Sequence[Pair], *, num_test: int, ask: Callable[[int, int], Question], seed: int
) -> QuestionSplit:
    """Questions about unordered pairs: when (3, 4) is in the test, (4, 3) is too.

    Both parts are shuffled; the same arguments always give the same split.

    Args:
        pairs: each unordered pair once.
        num_test: of the pairs.
        ask: the question about a and b, in this order.

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
        ordered = sorted({both for a, b in part for both in ((a, b), (b, a))})
        order.shuffle(ordered)
        return tuple(ask(a, b) for a, b in ordered)

    return QuestionSplit(train=questions(shuffled[num_test:]), test=questions(shuffled[:num_test]))


def repeat_rows(rows: Sequence[Question], *, count: int, seed: int = 0) -> list[Question]:
    """`count` rows: as many passes over `rows` as needed, each in an order of its own."""
    order = random.Random(seed)
    repeated: list[Question] = []
    while len(repeated) < count:
        repeated += order.sample(rows, k=len(rows))
    return repeated[:count]


def write_rows(path: Path, rows: Iterable[Question]) -> None:
    """Writes a dataset file, one JSON object a line."""
    path.write_text("".join(row.to_json() + "\n" for row in rows), encoding="utf-8")
