"""Reads an answer or a label into a value: a number with its unit, words, a list, an interval.

Only the leaves are mathematics for `expressions.py`. Commas, brackets, relation signs, units and
times are read here, because their meaning depends on what stands around them.
"""

import functools
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction

import sympy

from openrlhf_alp.rewards import units
from openrlhf_alp.rewards.bounded import UnreadableError, exact_number
from openrlhf_alp.rewards.latex import read_expression
from openrlhf_alp.rewards.normalize import is_balanced, normalize, words
from openrlhf_alp.rewards.values import (
    Based,
    Clock,
    Interval,
    Items,
    Quantity,
    Reading,
    Relation,
    Union,
    Value,
)

_MAX_CHARS = 4_000
_MAX_DEPTH = 50
_MAX_ITEMS = 400
_MAX_WORDS = 40
"""A label of more words is a sentence, which no answer repeats."""


_NOTHING = ("\\emptyset", "none", "no solution", "no solutions", "empty set", "no real solution")

_LITERAL = re.compile(r"[-+]?[\d.,]+")
"""A number of any length is read."""

_SPACES = re.compile(r"\s+")
_BRACKET = re.compile(r"[(\[{)\]}]")
_SPACE = re.compile(r"\s+|\\text\{\s*\}")
_THOUSANDS = re.compile(r"([-+]?)(\d{1,3}(?:,\d{3})+)(\.\d*)?")
_GROUPED = re.compile(r"[^\d,;()\[\]{}]*\d{1,3}(?:,\d{3})+(?:\.\d*)?[^\d,;()\[\]]*")
"""One number with thousands, with its currency or unit."""
_GROUPS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d)")
_DECIMAL = re.compile(r"([-+]?)\s*(\d+\.?\d*|\.\d+)(?:\s?\\cdot 10\^\{?([-+]?\d{1,4})\}?)?")
_FRACTION = re.compile(r"([-+]?)\s*(?:\\frac\{([-+]?\d+)\}\{([-+]?\d+)\}|(\d+\.?)\s*/\s*(\d+))")
_CLOCK = re.compile(
    r"(\d{1,9})((?:\s?:\s?\d{1,9}){1,3})\s*(?:\\text\{)?\s*([aApP])?\.?\s?(?(3)[mM]\.?)\s*\}?"
)
_BASED = re.compile(r"\(?(-?\d[0-9A-F]*(?:\.[0-9A-F]+)?)\)?_\{?(?:\\text\{)?(\d{1,2}|\w+)\}{0,2}")
_MATRIX = re.compile(
    r"[(\[]?\\begin\{([pbvBV]?matrix|smallmatrix|array)\}(?:\{[clr|]*\})?(.*)\\end\{\1\}[)\]]?(\s?\^\s?\{?\s?(?:T|\\top|\\mathsf\{T\})\}?)?",
    re.DOTALL,
)
_SIGN = re.compile(r"\\(?:leq|geq|neq|approx|in|equiv)(?![A-Za-z])|[<>=]")
_CUP = re.compile(r"\\cup(?![A-Za-z])")
_LETTERS = re.compile(r"[A-Za-z]+")
_ENGLISH = re.compile(r"(?i)(?=[a-z]*[eiou])[a-z]{3,}|[a-z]{5,}|no|on|so|up|us|or|it|is")
_PROSE = re.compile(
    r"(?<![\\A-Za-z_{])(?=[a-z]*[eiou])[A-Za-z]?[a-z]{3,}(?![A-Za-z])"
    r"|\\(?:text|textbf|textit|mbox)\s*\{[^{}]*[A-Za-z]+\s+[A-Za-z]+[^{}]*\}"
)
"""Words between numbers, which are no product of unknowns."""
_BUILDER = re.compile(r"[A-Za-z]\s*(?:\\in\s*\\mathbb\{R\}\s*)?[|:](.*)")
_EVERYTHING = Interval(Quantity(-sympy.oo), Quantity(sympy.oo), True, True)
_SETS: dict[str, Value] = {
    **dict.fromkeys(_NOTHING, Items("set", ())),
    **dict.fromkeys(("\\mathbb{R}", "\\R", "all real numbers", "all reals"), _EVERYTHING),
}


@functools.lru_cache(maxsize=4096)
def read(text: str) -> Reading:
    """Reads an answer or a label. What is no mathematics is words; nothing is raised."""
    text = _SPACES.sub(" ", text)
    if (len(text) > _MAX_CHARS and not _LITERAL.fullmatch(text)) or _depth(text) > _MAX_DEPTH:
        return Reading(text=_SPACE.sub("", text), words="", spaced="", values=())
    normal = normalize(text)
    plain_words = words(text)
    values: list[Value] = [_SETS[plain_words]] if plain_words in _SETS else []
    # "east" is no product of unknowns, or "seat" would equal it.
    if not values and not is_wordy(plain_words):
        for candidate in _candidates(normal):
            try:
                values.append(_value(candidate))
            except (UnreadableError, RecursionError):
                continue
    return Reading(
        text=_SPACE.sub("", normal),
        words=plain_words,
        spaced=normal,
        values=tuple(dict.fromkeys(values)),
    )


def _depth(text: str) -> int:
    """The depth of its brackets, closed or not."""
    depth = deepest = 0
    for bracket in _BRACKET.findall(text):
        depth += 1 if bracket in "([{" else -1
        deepest = max(deepest, depth)
    return deepest


def is_wordy(text: str) -> bool:
    """Whether a text is words: `east` is not the product of four unknowns, but `xy` is one."""
    if _LETTERS.fullmatch(text):
        return _ENGLISH.fullmatch(text) is not None
    return bool(re.fullmatch(r"[^\W\d_]{2,}(?:[ ,.'-]+[^\W\d_]+)+", text)) and bool(
        re.search(r"[^\W\d_]{3}", text)
    )


def is_comparable(label: Reading) -> bool:
    """Whether an answer can be compared with this label at all."""
    if label.values:
        return True
    return bool(re.search(r"\w", label.words)) and len(label.words.split()) <= _MAX_WORDS


def _candidates(text: str) -> list[str]:
    """The text, and a second form of `108,135`: a number, or a list of two."""
    is_ambiguous = text.count(",") == 1 and _THOUSANDS.fullmatch(text)
    return [text, text.replace(",", ", ")] if is_ambiguous else [text]


def _value(text: str) -> Value:
    text = text.strip()
    if not text or not is_balanced(text):
        raise UnreadableError("empty, or with braces that are not closed")
    if (constant := _SETS.get(text)) is not None:
        return constant
    # Before anything that reads a colon as division: 11:00 would divide by zero.
    if (clock := _CLOCK.fullmatch(text)) is not None:
        numbers = tuple(map(int, re.findall(r"\d+", text)))
        return Clock(numbers, f"{clock[3].lower()}m" if clock[3] else "")
    if (based := _BASED.fullmatch(text)) is not None:
        return Based(based[1].lower(), based[2])
    parts = _items(text)
    if len(parts) > 1:
        return _list(parts)
    if (relation := _relation(text)) is not None:
        return relation
    return _compound(text) or _plus_minus(text)


def _compound(text: str) -> Value | None:
    """Reads a matrix, a union or what stands in brackets; None for anything else."""
    if (matrix := _MATRIX.fullmatch(text)) is not None:
        rows = _matrix(matrix[2])
        return _transposed(rows) if matrix[3] else rows
    unions = _split(text, _CUP)
    if len(unions) > 1:
        return Union(tuple(_value(part) for part in unions))
    return _bracketed(text)


def _plus_minus(text: str) -> Value:
    if "\\pm" in text or "\\mp" in text:
        return Items("list", (_quantity(text, plus_minus=1), _quantity(text, plus_minus=-1)))
    return _quantity(text)


def _items(text: str) -> list[str]:
    """Splits a list at its commas; those inside a number such as `1,234` are no separators."""
    if _GROUPED.fullmatch(text) or (";" not in text and "," not in text):
        return [text]
    # In "1,5; 2,5" the commas are decimal, the semicolons separate.
    if ";" in text and len(parts := _split(text, re.compile(";"))) > 1:
        return parts
    # In "1,000, 2,000" only the commas before a space separate.
    commas = _split(text, re.compile(","))
    spaced = _split(text, re.compile(r",\s"))
    if 1 < len(spaced) < len(commas) and all(
        "," not in part or _THOUSANDS.fullmatch(part) for part in spaced
    ):
        return spaced
    # "3 \text{ m}, ": an empty part is a comma too many.
    return [part for part in commas if part] or [text]


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Splits where the separator stands outside all brackets."""
    parts, start, depth = [], 0, 0
    pattern = re.compile(rf"(?P<separator>{separator.pattern})|\\begin|\\end|\\?[(\[{{)\]}}]")
    for match in pattern.finditer(text):
        if match["separator"] is not None:
            if depth <= 0:
                parts.append(text[start : match.start()].strip())
                start = match.end()
        elif match[0] == "\\begin" or match[0][-1] in "([{":
            depth += 1
        else:
            depth -= 1
    if len(parts) > _MAX_ITEMS:
        raise UnreadableError(f"more than {_MAX_ITEMS} items")
    return [*parts, text[start:].strip()]


def _list(parts: list[str]) -> Value:
    first = _relation(parts[0])
    if (
        isinstance(first, Relation)
        and first.signs == ("=",)
        and not any(_SIGN.search(part) for part in parts[1:])
    ):
        # `n = 3, 5, 7` says what n may be, not that n is 3.
        items = Items("list", (first.sides[1], *_flat(map(_value, parts[1:]))))
        return Relation(("=",), (first.sides[0], items))
    return Items("list", tuple(_flat(map(_value, parts))))


def _flat(values: Iterable[Value]) -> Iterator[Value]:
    """`1 \\pm 2, 5` lists three numbers."""
    for value in values:
        if isinstance(value, Items) and value.kind == "list":
            yield from value.items
        else:
            yield value


def _relation(text: str) -> Relation | None:
    sides = _split(text, _SIGN)
    if len(sides) < 2:
        return None
    signs = [match[0] for match in _SIGN.finditer(_outside_brackets(text))]
    if len(signs) != len(sides) - 1 or not all(sides):
        raise UnreadableError("a relation with an empty side")
    signs = ["=" if sign in ("\\in", "\\equiv") else sign for sign in signs]
    if set(signs) == {"="}:
        # Of "3 + 4 = 5 + 2 = 7" only the ends matter.
        signs, sides = ["="], [sides[0], sides[-1]]
    return Relation(tuple(signs), tuple(_value(side) for side in sides))


def _outside_brackets(text: str) -> str:
    kept, depth = [], 0
    for token in re.findall(r"\\begin|\\end|\\?[(\[{)\]}]|\\[A-Za-z]+|.", text, re.DOTALL):
        if token == "\\begin" or token[-1] in "([{":
            depth += 1
        elif token == "\\end" or token[-1] in ")]}":
            depth -= 1
        elif depth <= 0:
            kept.append(token)
    return "".join(kept)


def _matrix(body: str) -> Items:
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?|\\cr", body) if row.strip()]
    return Items(
        "matrix",
        tuple(
            Items("tuple", tuple(_value(cell) for cell in row.replace("\\hline", "").split("&")))
            for row in rows
        ),
    )


def _transposed(rows: Items) -> Items:
    columns = zip(*(row.items for row in rows.items if isinstance(row, Items)), strict=False)
    return Items("matrix", tuple(Items("tuple", column) for column in columns))


def _bracketed(text: str) -> Value | None:
    """Reads `(a, b)`, `[a, b)` and `\\{a, b\\}`; None for anything else."""
    match = re.fullmatch(r"(\\\{|[(\[])(.*?)(\\\}|[)\]])", text, re.DOTALL)
    if match is None or not _encloses(text):
        return None
    opening, inner, closing = match[1], match[2].strip(), match[3]
    parts = [part for part in _split(inner, re.compile("[,;]")) if part]
    if opening == "\\{" and (builder := _BUILDER.fullmatch(inner)) is not None:
        return _value(builder[1])
    if opening == "\\{" or closing == "\\}":
        if opening[-1] != "{" or closing[-1] != "}" or "|" in inner:
            return None
        return Items("set", tuple(_flat(map(_value, parts))))
    # (a, b) may be a point or an open interval: it stays a tuple until it is compared.
    if len(parts) == 2 and (opening == "[" or closing == "]"):
        low, high = map(_value, parts)
        return Interval(low, high, opening == "(", closing == ")")
    if len(parts) > 1:
        return Items("tuple", tuple(map(_value, parts)))
    return _value(inner) if opening == "(" and inner != text else None


def _encloses(text: str) -> bool:
    """Whether the first bracket is closed by the last one: not so in `(a+1)(b+1)`."""
    depth = 0
    brackets = list(re.finditer(r"\\?[(\[{)\]}]", text))
    for bracket in brackets:
        depth += 1 if bracket[0][-1] in "([{" else -1
        if depth == 0:
            return bracket is brackets[-1] and bracket.end() == len(text)
    return False


def _quantity(text: str, plus_minus: int = 1) -> Quantity:
    number, unit, is_percent = units.split(text)
    number = _GROUPS.sub(lambda match: match[0].replace(",", ""), number)
    if _PROSE.search(number):
        raise UnreadableError("words")
    if (match := _DECIMAL.fullmatch(number)) is not None:
        return _decimal(match, unit, is_percent)
    if (match := _FRACTION.fullmatch(number)) is not None:
        top, bottom = match[2] or match[4], match[3] or match[5]
        if exact_number(bottom.lstrip("+-")) == 0:
            raise UnreadableError("division by zero")
        signs = (match[1] + top + bottom).count("-")
        value = exact_number(top.lstrip("+-")) / exact_number(bottom.lstrip("+-"))
        return Quantity((-1) ** signs * value, is_percent=is_percent, unit=unit)
    expression, arithmetic = read_expression(number, plus_minus)
    if expression.is_Rational:
        expression = Fraction(int(expression.p), int(expression.q))
    return Quantity(expression, is_percent=is_percent, unit=unit, arithmetic=arithmetic)


def _decimal(match: re.Match[str], unit: str, is_percent: bool) -> Quantity:
    sign, literal, exponent = match[1], match[2], int(match[3] or 0)
    value = exact_number(literal) * Fraction(10) ** exponent
    # Only a literal with a point or an exponent may have been rounded by who wrote it.
    places = digits = None
    if "." in literal.rstrip(".") or match[3]:
        places = len(literal.partition(".")[2]) - exponent
        digits = len(literal.replace(".", "").lstrip("0"))
    return Quantity(
        -value if sign == "-" else value,
        places=places, digits=digits or 0, is_percent=is_percent, unit=unit,
    )  # fmt: skip
