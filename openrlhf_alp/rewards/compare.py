"""Compares what an answer means with what a label means; `equality.py` compares the numbers."""

import itertools
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

import sympy

from openrlhf_alp.rewards import units
from openrlhf_alp.rewards.equality import expressions_equal, quantities_equal, within
from openrlhf_alp.rewards.structure import is_wordy
from openrlhf_alp.rewards.values import (
    Based,
    Clock,
    Interval,
    Items,
    Quantity,
    Reading,
    Relation,
    Tolerance,
    Union,
    Value,
)

_FLIPPED = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq", "=": "=", "\\neq": "\\neq"}
_CHOICE = re.compile(
    r"(?:option|choice|answer|case)[:\s]+\(?([a-j])\)?|\(?([a-j])(?:\)\s*[.:]?|[.:])(?:\s+\S.*)?",
    re.DOTALL,
)
_LEAST_NAMED_PERCENT = 1

_INFINITY = Quantity(sympy.oo)
_MINUS_INFINITY = Quantity(-sympy.oo)


def readings_equal(gold: Reading, answer: Reading) -> bool:
    """Whether the answer is the label, in text, as words or by value."""
    # Most right answers end here, before any mathematics is compared.
    if gold.text and gold.text == answer.text:
        return True
    if gold.words == answer.words and (not gold.values or gold.words.isalpha()):
        return bool(gold.words)
    if not gold.values and is_wordy(gold.words):
        # "Alice and Bob" are "Bob, Alice".
        return _names_in(gold.words) == _names_in(answer.words)
    if len(gold.words) == 1 and (choice := _CHOICE.fullmatch(answer.words)):
        return (choice[1] or choice[2]).upper() == gold.words
    # Only a label may be taken in two ways; an answer that is right in one of two is a guess.
    return any(values_equal(value, a) for value in gold.values for a in answer.values[:1])


def readings_near(gold: Reading, answer: Reading, tolerance: Tolerance) -> bool:
    """Whether label and answer are numbers that differ by no more than `tolerance`."""
    for label in gold.values:
        for given in answer.values[:1]:
            pair = _unwrapped(label, given)
            match pair:
                case Quantity(), Quantity():
                    if _same_scale(*pair) and within(*pair, tolerance):
                        return True
    return False


def _same_scale(gold: Quantity, answer: Quantity) -> bool:
    # As in `_same_quantity`: 35 answers 35 %, and 0.35 % does not answer 0.35.
    return gold.is_percent >= answer.is_percent and not units.conflict(gold.unit, answer.unit)


def _names_in(words: str) -> list[str]:
    return sorted(name.strip() for name in re.split(r"\band\b|[,;]", words) if name.strip())


def values_equal(gold: Value, answer: Value) -> bool:
    """Whether an answer's value is the label's. The label decides how an equation is taken."""
    gold, answer = _unwrapped(gold, answer)
    match gold, answer:
        case Quantity(), Quantity():
            return _same_quantity(gold, answer)
        case Clock(), Clock():
            return _same_clock(gold, answer)
        case Based(), Based():
            return gold == answer
        case Based(), Quantity():
            # The problem names the base, so that `2516` answers `2516_8`.
            return _is_integer(answer, gold.number)
        case Relation(), Relation():
            return _same_relation(gold, answer)
        case Items(), Items():
            return _same_items(gold, answer)
        case Items(kind="matrix"), Interval(low, high, False, False):
            return _same_items(gold, Items("tuple", (low, high)))
        case Clock(parts=(top, bottom)), Quantity():
            return bool(bottom) and _same_quantity(Quantity(Fraction(top, bottom)), answer)
        case _, Items(kind="list", items=(_, _, *_)) if not isinstance(gold, Union):
            # `15 \\frac{1}{2} or \\frac{31}{2}` gives one answer in two forms.
            return all(values_equal(gold, item) for item in answer.items) or _same_set(gold, answer)
    return _same_set(gold, answer)


def _unwrapped(gold: Value, answer: Value) -> tuple[Value, Value]:
    """Takes `x = 4` for 4 where the other side is no equation, and a column for a vector."""
    if isinstance(answer, Relation) and answer.signs == ("=",):
        # `m \\in [2, \\infty)` answers `m \\geq 2`.
        if not isinstance(gold, Relation) or (gold.signs != ("=",) and _is_set(answer.sides[1])):
            answer = answer.sides[1]
    elif (
        isinstance(gold, Relation)
        and _is_assignment(gold)
        and not (isinstance(answer, Relation) and not _is_set(gold.sides[1]))
    ):
        gold = gold.sides[1]
    if isinstance(answer, Relation) and set(answer.signs) == {"\\approx"}:
        answer = _exact_part(answer)
    if isinstance(gold, Relation) and set(gold.signs) == {"\\approx"}:
        gold = _exact_part(gold)
    return gold, answer


def _exact_part(relation: Relation) -> Value:
    r"""Of `\frac{2}{3} \approx 0.67` the first part, if the other one is near it."""
    first, last = relation.sides[0], relation.sides[-1]
    if isinstance(first, Quantity) and isinstance(last, Quantity):
        exact, rounded = (sympy.sympify(one.expression) for one in (first, last))
        if exact.free_symbols:
            return last
        if abs((exact - rounded).evalf(10)) <= abs(exact.evalf(10)) / 20:
            return first
    return relation


def _is_set(value: Value) -> bool:
    return isinstance(value, (Interval, Union, Items))


def _is_assignment(value: Value) -> bool:
    """Whether a relation names a value: `x = 4`, `f(2) = 4`, `D = (0, 2)`."""
    if not (isinstance(value, Relation) and value.signs == ("=",)):
        return False
    left = value.sides[0]
    return isinstance(left, Quantity) and isinstance(
        left.expression, (sympy.Symbol, sympy.core.function.AppliedUndef)
    )


def _same_quantity(gold: Quantity, answer: Quantity) -> bool:
    if units.conflict(gold.unit, answer.unit):
        return False
    if (gold.is_percent and answer.unit) or (answer.is_percent and gold.unit):
        return False
    if quantities_equal(gold, answer):
        # 35 answers 35 %, and 35 % answers 35; but 0.35 % does not answer 0.35.
        return gold.is_percent or not answer.is_percent or _is_at_least_one(gold)
    if gold.is_percent != answer.is_percent:
        percent, plain = (gold, answer) if gold.is_percent else (answer, gold)
        return quantities_equal(plain, _hundredth(percent))
    return False


def _hundredth(percent: Quantity) -> Quantity:
    value = percent.expression / 100
    places = None if percent.places is None else percent.places + 2
    return Quantity(value, places=places, digits=percent.digits)


def _is_at_least_one(gold: Quantity) -> bool:
    value = gold.expression
    return not isinstance(value, Fraction) or abs(value) >= _LEAST_NAMED_PERCENT


def _same_clock(gold: Clock, answer: Clock) -> bool:
    if gold.half and answer.half and gold.half != answer.half:
        return False
    if gold.parts == answer.parts:
        return True
    # 2:4 is the ratio 1:2. A time has two digits behind the colon and is no ratio.
    if gold.half or answer.half or len(gold.parts) != len(answer.parts) or not all(gold.parts):
        return False
    factors = {Fraction(a, g) for g, a in zip(gold.parts, answer.parts, strict=True)}
    return len(factors) == 1 and min(len(str(part)) for part in gold.parts[1:]) < 2


def _is_integer(answer: Quantity, digits: str) -> bool:
    is_plain = digits.isdigit() and not answer.unit and not answer.is_percent
    return is_plain and answer.expression == Fraction(int(digits))


def _same_relation(gold: Relation, answer: Relation) -> bool:
    if _is_assignment(gold) and _is_assignment(answer) and _names(gold) == _names(answer):
        return values_equal(gold.sides[1], answer.sides[1])
    if gold.signs == ("=",) == answer.signs:
        return _same_equation(gold, answer)
    if (first := _as_interval(gold)) is not None and (second := _as_interval(answer)) is not None:
        return _variable(gold) == _variable(answer) and _same_set(first, second)
    # 2 < x is x > 2.
    for one in (answer, _flip(answer)):
        if one.signs == gold.signs and len(one.signs) > 1:
            return all(map(values_equal, gold.sides, one.sides))
        if one.signs == gold.signs and _is_multiple(one, gold, positive=True):
            return True
    return False


def _flip(relation: Relation) -> Relation:
    signs = tuple(_FLIPPED.get(sign, sign) for sign in reversed(relation.signs))
    return Relation(signs, tuple(reversed(relation.sides)))


def _names(relation: Relation) -> object:
    left = relation.sides[0]
    return left.expression if isinstance(left, Quantity) else None


def _same_equation(gold: Relation, answer: Relation) -> bool:
    """Whether two equations have the same solutions because one is a multiple of the other."""
    if all(isinstance(side, Quantity) for side in (*gold.sides, *answer.sides)):
        return _is_multiple(answer, gold, positive=False)
    return all(map(values_equal, gold.sides, answer.sides))


def _is_multiple(answer: Relation, gold: Relation, *, positive: bool) -> bool:
    first, second = _difference(gold), _difference(answer)
    if first is None or second is None or first == 0 or second == 0:
        return False
    if not first.free_symbols or first.free_symbols != second.free_symbols:
        return False
    factor = sympy.Rational(1)
    point = {
        symbol: sympy.Rational(37 + 11 * index, 13 + index)
        for index, symbol in enumerate(sorted(first.free_symbols, key=lambda s: s.name))
    }
    divisor = first.xreplace(point)
    if not divisor.is_number or divisor == 0:
        return False
    factor = second.xreplace(point) / divisor
    if factor == 0 or (positive and not factor.evalf(15).is_positive):
        return False
    return expressions_equal(second, factor * first)


def _difference(relation: Relation) -> sympy.Expr | None:
    left, right = relation.sides[0], relation.sides[-1]
    if not (isinstance(left, Quantity) and isinstance(right, Quantity)):
        return None
    return sympy.sympify(left.expression) - sympy.sympify(right.expression)


def _same_items(gold: Items, answer: Items) -> bool:
    if gold.kind == "matrix" or answer.kind == "matrix":
        rows, other_rows = _entries(gold), _entries(answer)
        return len(rows) == len(other_rows) and all(map(_same_row, rows, other_rows))
    if {gold.kind, answer.kind} == {"list", "tuple"} and gold.kind == "tuple":
        answer = _without_names(answer)
    items, others = gold.items, answer.items
    if "set" in (gold.kind, answer.kind):
        items, others = _distinct(items), _distinct(others)
    if len(items) != len(others):
        return False
    # A bare list may answer a tuple, but only in its order.
    if "tuple" in (gold.kind, answer.kind):
        return all(map(values_equal, items, others))
    return _match(items, others, values_equal)


def _entries(value: Items) -> list[Items]:
    """The rows of a matrix; a tuple is a column."""
    if value.kind == "matrix":
        rows = [row for row in value.items if isinstance(row, Items)]
        return rows
    return [Items("tuple", (item,)) for item in value.items]


def _same_row(gold: Items, answer: Items) -> bool:
    return len(gold.items) == len(answer.items) and all(map(values_equal, gold.items, answer.items))


def _without_names(answer: Items) -> Items:
    """`x = 1, y = 2` answers (1, 2)."""
    if not all(_is_assignment(item) for item in answer.items):
        return answer
    return Items("list", tuple(item.sides[1] for item in answer.items))  # type: ignore[union-attr]


def _distinct(items: Sequence[Value]) -> tuple[Value, ...]:
    kept: list[Value] = []
    for item in items:
        if not any(values_equal(one, item) for one in kept):
            kept.append(item)
    return tuple(kept)


def _match(
    items: Sequence[Value], others: Sequence[Value], same: Callable[[Value, Value], bool]
) -> bool:
    """Whether two lists of one length hold the same values in any order."""
    left = list(others)
    for item in items:
        for index, other in enumerate(left):
            if same(item, other):
                del left[index]
                break
        else:
            return False
    return True


def _same_set(gold: Value, answer: Value) -> bool:
    """Compares intervals and their unions, also when one side is written with < and >."""
    firsts, seconds = _parts(gold), _parts(answer)
    if firsts is None or seconds is None or len(firsts) != len(seconds):
        return False
    return _match(firsts, seconds, _same_part)


def _same_part(gold: Value, answer: Value) -> bool:
    if isinstance(gold, Interval) and isinstance(answer, Interval):
        return (
            gold.low_open == answer.low_open
            and gold.high_open == answer.high_open
            and values_equal(gold.low, answer.low)
            and values_equal(gold.high, answer.high)
        )
    if isinstance(gold, Interval) or isinstance(answer, Interval):
        return False
    return isinstance(gold, Items) and isinstance(answer, Items) and _same_items(gold, answer)


def _parts(value: Value) -> list[Value] | None:
    """The intervals and sets of a union; None for what is no set of numbers."""
    match value:
        case Interval():
            return [value]
        case Union():
            parts = [_parts(part) for part in value.parts]
        case Items(kind="tuple", items=(low, high)):
            # At this point (a, b) is compared with an interval.
            return [Interval(low, high, True, True)]
        case Items(kind="set"):
            return [value]
        case Items(kind="list"):
            parts = [_parts(part) for part in value.items if isinstance(part, Relation)]
            if len(parts) != len(value.items):
                return None
        case Relation():
            interval = _as_interval(value)
            return _parts(interval) if interval is not None else None
        case _:
            return None
    if any(part is None for part in parts):
        return None
    return list(itertools.chain.from_iterable(part for part in parts if part is not None))


def _variable(relation: Relation) -> sympy.Symbol | None:
    """The single unknown of `x < 3` or `1 < x < 3`."""
    symbols = [
        side.expression
        for side in relation.sides
        if isinstance(side, Quantity) and isinstance(side.expression, sympy.Symbol)
    ]
    return symbols[0] if len(symbols) == 1 else None


def _as_interval(relation: Relation) -> Interval | Union | None:
    """The numbers that an inequality in one unknown allows."""
    variable = _variable(relation)
    if variable is None or not set(relation.signs) <= {"<", ">", "\\leq", "\\geq", "\\neq"}:
        return None
    if relation.signs[0] in (">", "\\geq"):
        relation = _flip(relation)
    places = [isinstance(side, Quantity) and side.expression == variable for side in relation.sides]
    opens = [sign == "<" for sign in relation.signs]
    match places, relation.signs:
        case [True, False], ["\\neq"] | ("\\neq",):
            bound = relation.sides[1]
            below = Interval(_MINUS_INFINITY, bound, True, True)
            return Union((below, Interval(bound, _INFINITY, True, True)))
        case [True, False], _:
            return Interval(_MINUS_INFINITY, relation.sides[1], True, opens[0])
        case [False, True], _:
            return Interval(relation.sides[0], _INFINITY, opens[0], True)
        case [False, True, False], (first, second) if {first, second} <= {"<", "\\leq"}:
            return Interval(relation.sides[0], relation.sides[2], *opens)
    return None
