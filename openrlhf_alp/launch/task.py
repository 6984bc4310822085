"""What a demo teaches: its questions, its budgets, and whether the policy has a tool."""

from collections.abc import Callable
from dataclasses import dataclass

from openrlhf_alp.data.tasks import QuestionSplit, split_additions, split_products

METHODS = ("seq-alp", "token-alp", "seq-bypass", "token-bypass")
"""Values of `--method`; the first is the default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoTask:
    """One of the demos' tasks."""

    noun: str
    """What a question asks for, in the plural: "sums"."""

    split: Callable[[int], QuestionSplit]
    """Questions for a seed."""

    max_new_tokens: int
    """Budget of an episode after its prompt, observations included."""

    uses_tool: bool
    """The policy may run Python, and gets a supervised warm-up first."""


SUMS = DemoTask(
    noun="sums",
    split=lambda seed: split_additions(seed=seed),
    max_new_tokens=20,
    uses_tool=False,
)
"""One-digit sums, which a 135M model learns to answer by itself."""

PRODUCTS = DemoTask(
    noun="products",
    split=lambda seed: split_products(seed=seed),
    max_new_tokens=120,
    uses_tool=True,
)
"""Products of two-digit numbers, which it does not."""
