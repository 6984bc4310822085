"""One answer against one label with math-verify, in a process that may hang or eat memory.

What counts as the answer is math-verify's rule. A `\\boxed{}` or "the final answer is" wins;
otherwise the last number or formula of the text is the answer, so "7 or 8" answers 8 and "8 or 7"
answers 7.

One thing is stricter than math-verify alone. It finds "3 + 4" equal to 7, so a policy could earn
the reward of "What is 3 + 4?" by repeating the question. When the label is a plain number, an
answer that still has a sum or a product of numbers to work out is not an answer.
"""

import logging
import re
import resource
from dataclasses import dataclass

import psutil
import sympy
from math_verify import parse, verify

_WORDS_ONLY = re.compile(r"(?=.*[A-Za-z]{2})[A-Za-z][A-Za-z ,.'-]+")
"""math-verify reads `hello` as the product of five unknowns; such a label is not mathematics.
Single letters are: `p - q`, `D, E`."""

_CURRENCY = "\\$"
"""math-verify takes it for the begin of a formula and then finds nothing in `\\$32`."""

_MARKED_AS_MATH = re.compile(r"\$|\\boxed|\\\(|\\\[")


class LabelNotParsableError(ValueError):
    """The gold label holds nothing that math-verify can compare with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the comparison found."""

    correct: bool
    """The answer equals the label and is worked out."""

    answered: bool
    """The text holds something that reads as an answer."""

    unevaluated: bool
    """The answer equals the label only once its sums or products are worked out."""


def limit_memory(extra_bytes: int) -> None:
    """Lets this process grow by `extra_bytes` of address space; beyond that, MemoryError."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + extra_bytes, hard_limit))
    # math-verify warns on every call that its own timer is off; the pool's timer replaces it.
    logging.getLogger("math_verify").setLevel(logging.ERROR)


def judge(response: str, label: str) -> Verdict:
    """Compares the final answer of `response` with `label`.

    Raises:
        LabelNotParsableError: the label is empty or is not mathematics.
        Exception: whatever math-verify and sympy raise on an expression that they cannot compare.
    """
    gold = _parse_label(label)
    # math-verify's own time limit cannot interrupt C code; the pool's limit kills the process.
    answer = parse(response.replace(_CURRENCY, ""), parsing_timeout=None, raise_on_error=True)
    if not answer:
        return Verdict(correct=False, answered=False, unevaluated=False)
    equal = bool(verify(gold, answer, timeout_seconds=None, raise_on_error=True))
    unevaluated = equal and _is_number(gold[0]) and _has_arithmetic(answer[0])
    return Verdict(correct=equal and not unevaluated, answered=True, unevaluated=unevaluated)


def _parse_label(label: str) -> list[object]:
    """Reads a bare label as LaTeX: as plain text `2\\sqrt{3}+1` would be read as 2."""
    text = label.replace(_CURRENCY, "").strip()
    marked = text if _MARKED_AS_MATH.search(text) else f"${text}$"
    gold = [] if _WORDS_ONLY.fullmatch(text) else parse(marked, parsing_timeout=None)
    if not gold:
        raise LabelNotParsableError(
            f"math-verify finds no mathematics in the label {label!r}; drop the row from the "
            "dataset or write its answer as a number or as LaTeX"
        )
    return gold


def _is_number(expression: object) -> bool:
    return isinstance(expression, sympy.Number)


def _has_arithmetic(expression: object) -> bool:
    """Whether numbers are left to add or multiply; 3/4, 2^10 and 3 * 10^8 are forms of a number."""
    while isinstance(expression, sympy.Equality):
        expression = expression.rhs
    if isinstance(expression, sympy.Add):
        return True
    if not isinstance(expression, sympy.Mul):
        return False
    factors = [f for f in expression.args if isinstance(f, sympy.Integer) and abs(int(f)) > 1]
    return len(factors) > 1 or any(_has_arithmetic(factor) for factor in expression.args)
