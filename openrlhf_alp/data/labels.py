"""Turns the label forms of published problem sets into one bare expression, and names its kind."""

import re
from enum import StrEnum
from typing import Any

from openrlhf_alp.rewards import labels
from openrlhf_alp.rewards.normalize import unwrap

_SOLUTION_MARK = "####"
"""GSM8K ends a worked solution with this and the answer."""

_MATH_PIECES = re.compile(r"\s*\$[^$]*\$(?:\s*,\s*\$[^$]*\$)*\s*\.?\s*")
"""`$1$` or `$1$,$2$`: dollar signs around each answer of a list, and nothing else."""

_SCIENTIFIC = re.compile(r"([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d+)")


def label_texts(value: Any) -> tuple[str, ...]:
    """The answer as a bare expression, or each of several; empty when there is none.

    145.0 is 145. A box, math delimiters and the text before `####` are removed. Whether the members
    of a list are forms of one answer (Minerva) or parts of it, the list does not say.

    Raises:
        LabelNotParsableError: an object, a truth value or another value without a plain meaning.
    """
    texts = (_bare(text) for text in labels.label_texts(value))
    return tuple(dict.fromkeys(text for text in texts if text))


def _bare(text: str) -> str:
    text = unwrap(text.rpartition(_SOLUTION_MARK)[2])
    # A currency sign and a negative thin space carry no value.
    text = text.replace("\\$", "").replace("\\!", "")
    if _MATH_PIECES.fullmatch(text):
        text = ", ".join(piece.strip() for piece in text.split("$")[1::2])
    if number := _SCIENTIFIC.fullmatch(text.strip()):
        # As LaTeX, 7e37 is 7 times Euler's number times 37.
        return f"{number[1]} \\times 10^{{{int(number[2])}}}"
    return text.strip()


class LabelKind(StrEnum):
    """The form of a label; only the summary uses it."""

    INTEGER = "integer"
    DECIMAL = "decimal"
    FRACTION = "fraction"
    CHOICE = "choice"
    """One capital letter: the problem may be a multiple-choice question."""
    EQUATION = "equation"
    TUPLE = "tuple or interval"
    SEVERAL = "several answers"
    TEXT = "text"
    EXPRESSION = "expression"


_KINDS = (
    (LabelKind.INTEGER, re.compile(r"[-+]?(?:\d+|\d{1,3}(?:,\d{3})+)")),
    (LabelKind.DECIMAL, re.compile(r"[-+]?\d*\.\d+(?:[eE][-+]?\d+)?")),
    (LabelKind.FRACTION, re.compile(r"-?(?:\d+/\d+|\\[dt]?frac\s*(?:\{-?\d+\}|\d)(?:\{\d+\}|\d))")),
    (LabelKind.CHOICE, re.compile(r"(?:\\text(?:bf)?\{)?\(?[A-F]\)?\}?")),
    (LabelKind.EQUATION, re.compile(r"[^=]+=[^=]+", re.DOTALL)),
    (LabelKind.TUPLE, re.compile(r"(?:\\left)?\s*[(\[][^()]*,[^()]*[)\]]", re.DOTALL)),
    (LabelKind.SEVERAL, re.compile(r".*,.*", re.DOTALL)),
    (LabelKind.TEXT, re.compile(r"\\text\{[^}]*\}|[A-Za-z][A-Za-z ]+")),
)


def label_kind(label: str) -> LabelKind:
    """Returns the kind of a bare label."""
    for kind, pattern in _KINDS:
        if pattern.fullmatch(label):
            return kind
    return LabelKind.EXPRESSION
