"""Judges one answer against one label, in a process that may run out of time or memory.

docs/grading.md states the rules. `answers.py` finds the final answer, `structure.py` reads it and
the label, `compare.py` compares them.

When the label is a plain number, an answer that leaves a sum or a product of numbers to work out is
not an answer: otherwise a policy would earn the reward of "What is 3 + 4?" by repeating "3 + 4".
"""

import re
import resource
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import psutil
import sympy

from openrlhf_alp.rewards.answers import final_answer, leading_expression
from openrlhf_alp.rewards.bounded import UnreadableError
from openrlhf_alp.rewards.compare import readings_equal, readings_near
from openrlhf_alp.rewards.equality import expressions_equal
from openrlhf_alp.rewards.labels import LabelNotParsableError, label_texts
from openrlhf_alp.rewards.latex import read_expression
from openrlhf_alp.rewards.normalize import normalize
from openrlhf_alp.rewards.structure import is_comparable, read
from openrlhf_alp.rewards.values import Items, Quantity, Reading, Relation, Tolerance

_CALCULUS = re.compile(r"\\(?:i*int|oint|sum|prod|lim)(?![A-Za-z])")

_OTHER_UNITS = re.compile(r"(?<=\d)j(?![A-Za-z])|(?<![A-Za-z\\])I(?![A-Za-z_(])")
_MEASURED = re.compile(r"([-+\d.,{}^ ]+(?:\\cdot[-+\d.{}^ ]+)?) (?:\{?[mgshlLNJWVAKCTF]\}?)")

_MAX_ANSWER_CHARS = 50_000
"""No answer is longer; reading it would only cost time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result of one comparison."""

    correct: bool
    """Whether the answer equals the label and is worked out."""

    answered: bool
    """Whether the text holds something that reads as an answer."""

    unevaluated: bool
    """Whether the answer equals the label only once its sums or products are worked out."""

    answer: str | None
    """The final answer as the text spells it; None when there is none."""

    choice: str | None
    """The same in one spelling: a rational number as a fraction, anything else normalised. Answers
    with one choice are one vote of a majority."""


def limit_memory(extra_bytes: int) -> None:
    """Lets this process grow by `extra_bytes` of address space; beyond that, MemoryError."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + extra_bytes, hard_limit))


def judge(response: str, label: Any, tolerance: Tolerance | None = None) -> Verdict:
    """Compares the final answer of `response` with `label`, a text, a number or a list of one.

    Args:
        tolerance: how far a number may be from a numeric label; None: it must be equal.

    Raises:
        LabelNotParsableError: the label is empty, a sentence, an object or several answers.
    """
    # A data set may hold its list of answers as JSON text.
    if not isinstance(label, str) or label.startswith(("[", "{")):
        label = label_text(label)
    gold = read_label(label)
    text = final_answer(response, several=any(isinstance(v, Items) for v in gold.values))
    if text is None:
        return Verdict(correct=False, answered=False, unevaluated=False, answer=None, choice=None)
    if len(text) > max(_MAX_ANSWER_CHARS, 2 * len(label)):
        shown = text[:_MAX_ANSWER_CHARS]
        return Verdict(correct=False, answered=True, unevaluated=False, answer=shown, choice=shown)
    answer = _read_answer(text, gold)
    # Calculus comes last: it may take until the pool's time limit.
    equal = (
        readings_equal(gold, answer)
        or (tolerance is not None and readings_near(gold, answer, tolerance))
        or (_CALCULUS.search(label) is not None and _equal_by_calculus(label, text))
    )
    unevaluated = equal and _is_number(gold) and _has_arithmetic(answer)
    correct = equal and not unevaluated
    return Verdict(
        correct=correct,
        answered=True,
        unevaluated=unevaluated,
        answer=text,
        choice=_one_spelling(answer),
    )


def label_text(value: Any) -> str:
    """Returns the one answer that a label's value stands for.

    Raises:
        LabelNotParsableError: it stands for none, or for several that are not equal.
    """
    texts = label_texts(value)
    if not texts:
        raise LabelNotParsableError("the label is empty; drop the row from the data set")
    first = read(texts[0])
    if not all(readings_equal(first, read(text)) for text in texts[1:]):
        raise LabelNotParsableError(
            f"the label lists {', '.join(map(repr, texts))}, which are not equal, and does not say "
            "whether one of them or all are asked; write one text"
        )
    return texts[0]


def read_label(label: str) -> Reading:
    """Reads a label.

    Raises:
        LabelNotParsableError: the label is empty or a sentence.
    """
    gold = read(label)
    if not is_comparable(gold):
        raise LabelNotParsableError(
            f"the label {label!r} is neither mathematics nor a few words; drop the row from the "
            "data set or write its answer as a number, as LaTeX or as a name"
        )
    return gold


def _read_answer(text: str, gold: Reading) -> Reading:
    """Reads the answer; of a sentence such as "7 apples, as shown" its first expression."""
    if "i" in gold.text and not _OTHER_UNITS.search(gold.text):
        # Python prints 3+4i as (3+4j), sympy as 3 + 4*I.
        text = _OTHER_UNITS.sub("i", text)
    answer = read(text)
    if gold.values and not answer.values and answer.text != gold.text:
        expression = leading_expression(text)
        return answer if expression is None else read(expression)
    if _is_number(gold) and (measured := _MEASURED.fullmatch(answer.spaced)):
        # A letter behind a number is a unit where the label has no letter: 1.6e-19 C.
        return read(measured[1])
    return answer


def _one_spelling(answer: Reading) -> str:
    match answer.values:
        case (Quantity(expression=Fraction() as number, arithmetic=False, unit=unit),):
            # Digits without a limit: `str` refuses integers of more than 4,300.
            return f"{number.numerator:x}/{number.denominator:x} {unit}"
    return answer.text


def _equal_by_calculus(label: str, text: str) -> bool:
    """Compares a label with an integral, a sum or a limit; the pool's time limit bounds this."""
    try:
        return expressions_equal(*(_evaluated(normalize(one)) for one in (label, text)))
    except UnreadableError:
        return False


def _evaluated(text: str) -> sympy.Expr:
    """Returns an expression; integrals, sums and limits as math-verify's parser reads them.

    Raises:
        UnreadableError: it cannot be read.
    """
    if not _CALCULUS.search(text):
        return read_expression(text)[0]
    # Imported here because the parser takes a second to load, and few labels need it.
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

    meaning = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
    try:
        expression = latex2sympy(text, normalization_config=None, conversion_config=meaning).doit()
    except Exception as error:
        raise UnreadableError(f"{type(error).__name__}: {error}") from error
    if not isinstance(expression, sympy.Expr):
        raise UnreadableError("not an expression")
    return expression


def _is_number(gold: Reading) -> bool:
    return any(
        isinstance(value, Quantity)
        and isinstance(value.expression, Fraction)
        and not value.arithmetic
        for value in gold.values
    )


def _has_arithmetic(answer: Reading) -> bool:
    values = [v.sides[-1] if isinstance(v, Relation) else v for v in answer.values]
    return any(isinstance(value, Quantity) and value.arithmetic for value in values)
