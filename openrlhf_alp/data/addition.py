"""The demo's task: "What is a + b?" for small a and b, with sums that training never sees.

A row is one JSON line in OpenRLHF's prompt format: `--data.input_key input`,
`--data.label_key label`, `--data.apply_chat_template`.
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

INPUT_KEY = "input"
LABEL_KEY = "label"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdditionRow:
    """One question and its answer."""

    question: str
    label: str
    """The sum as a decimal number."""

    def to_json(self) -> str:
        """One line of the dataset file."""
        return json.dumps({INPUT_KEY: self.question, LABEL_KEY: self.label})


@dataclass(frozen=True, slots=True, kw_only=True)
class AdditionSplit:
    """Questions to train on and questions to test with; no pair of operands is in both."""

    train: tuple[AdditionRow, ...]
    test: tuple[AdditionRow, ...]


def split_additions(
    *, max_operand: int = 9, test_share: float = 0.2, seed: int = 0
) -> AdditionSplit:
    """All sums a + b with a, b in 1..max_operand, split so that the test is really unseen.

    The split is over unordered pairs: when 3 + 4 is in the test, 4 + 3 is too. Both parts are
    shuffled; the same arguments always give the same split.

    Args:
        max_operand: the largest a and b; 9 gives 81 questions.
        test_share: share of the unordered pairs that is held out; at least one pair is.
        seed: of the split and of the order.

    Raises:
        ValueError: a part would be empty.
    """
    pairs = [(a, b) for a in range(1, max_operand + 1) for b in range(a, max_operand + 1)]
    num_test = max(1, round(test_share * len(pairs)))
    if len(pairs) <= num_test:
        raise ValueError(
            f"max_operand={max_operand} gives {len(pairs)} pairs, of which test_share={test_share} "
            f"holds out {num_test}: nothing is left to train on. Use larger operands or a smaller "
            "share"
        )
    order = random.Random(seed)
    order.shuffle(pairs)
    return AdditionSplit(
        train=_questions(pairs[num_test:], order), test=_questions(pairs[:num_test], order)
    )


def repeat_rows(rows: Sequence[AdditionRow], *, count: int, seed: int = 0) -> list[AdditionRow]:
    """`count` rows: as many passes over `rows` as needed, each in an order of its own."""
    order = random.Random(seed)
    repeated: list[AdditionRow] = []
    while len(repeated) < count:
        repeated += order.sample(rows, k=len(rows))
    return repeated[:count]


def write_rows(path: Path, rows: Iterable[AdditionRow]) -> None:
    """Writes a dataset file, one JSON object a line."""
    path.write_text("".join(row.to_json() + "\n" for row in rows), encoding="utf-8")


def _questions(pairs: Iterable[tuple[int, int]], order: random.Random) -> tuple[AdditionRow, ...]:
    ordered = sorted({(a, b) for a, b in pairs} | {(b, a) for a, b in pairs})
    order.shuffle(ordered)
    return tuple(AdditionRow(question=f"What is {a} + {b}?", label=str(a + b)) for a, b in ordered)
