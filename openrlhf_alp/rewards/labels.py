"""Turns the values that data sets hold as labels into text, or says why one cannot be read."""

import json
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any


class LabelNotParsableError(ValueError):
    """The label is empty, an object, a sentence, or does not say what is right."""


def label_texts(value: Any) -> tuple[str, ...]:
    """Returns the label as text, or each different member of a list; nothing when there is none.

    145.0 becomes 145. Whether the members of a list are forms of one answer or parts of it, the
    list does not say: `single_label_text` takes only lists of equal members.

    Raises:
        LabelNotParsableError: the value, or a member of a list, has no plain meaning as an answer.
    """
    value = _plain(value)
    members = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(text for text in map(_text, members) if text))


def _plain(value: Any) -> Any:
    """Python's own type for numpy's scalars and arrays, and for JSON lists kept as text."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (tuple, set, frozenset)):
        return list(value)
    if isinstance(value, str) and value.lstrip()[:2] in ('["', "['", '{"'):
        try:
            # Skywork-OR1 writes the list of its answers as JSON text.
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _text(value: Any) -> str:
    match _plain(value):
        case None:
            return ""
        case str() as text:
            return text.strip()
        case bool():
            raise LabelNotParsableError(
                f"the label is the truth value {value}, which does not say how an answer spells "
                "it; write it as text, for example Yes"
            )
        case float() as number if not math.isfinite(number):
            raise LabelNotParsableError(f"the label is {number}, which is no number")
        case float() as number if number.is_integer():
            return str(int(number))
        case int() | float() | Decimal() | Fraction() as number:
            return str(number)
        case bytes() as data:
            try:
                return data.decode().strip()
            except UnicodeDecodeError as error:
                raise LabelNotParsableError("the label is bytes that are no text") from error
        case dict() as fields:
            raise LabelNotParsableError(
                f"the label is an object with the fields {', '.join(map(str, fields))}; name the "
                "one that holds the answer as the label's field, for example answer.value"
            )
        case other:
            raise LabelNotParsableError(
                f"the label {other!r} is a {type(other).__name__}; write it as text or as a number"
            )
