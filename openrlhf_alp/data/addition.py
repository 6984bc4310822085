"""The demo's task: "What is a + b?" for small a and b, with sums that training never sees."""

from openrlhf_alp.data.questions import Question, QuestionSplit, split_pairs


def split_additions(
    *, max_operand: int = 9, test_share: float = 0.2, seed: int = 0
) -> QuestionSplit:
    """All sums a + b with a, b in 1..max_operand, split so that the test is really unseen.

    Args:
        max_operand: the largest a and b; 9 gives 81 questions.
        test_share: share of the unordered pairs that is held out; at least one pair is.
        seed: of the split and of the order.

    Raises:
        ValueError: a part would be empty.
    """
    pairs = [(a, b) for a in range(1, max_operand + 1) for b in range(a, max_operand + 1)]
    num_test = max(1, round(test_share * len(pairs)))
    return split_pairs(pairs, num_test=num_test, ask=_ask, seed=seed)


def _ask(a: int, b: int) -> Question:
    return Question(question=f"What is {a} + {b}?", label=str(a + b))
