"""Decides whether two numbers or expressions are equal; never by an absolute error.

* Rational numbers are compared as fractions.
* Constants built from rationals by roots are compared with so many digits that a difference other
  than zero must show (separation bound of Burnikel, Fleischer, Mehlhorn and Schirra, "A strong and
  easily computable separation bound for arithmetic expressions involving radicals", 2000).
* Other constants (with pi, e, logarithms) are compared with 100 digits more than their text has.
* Expressions with unknowns are compared at fixed rational points, positive and negative.
* A decimal stands for a number without a finite decimal form when it is that number, rounded or cut
  at its last digit, with a relative error of at most 1e-6.
"""

import math
from collections.abc import Iterator
from fractions import Fraction

import mpmath
import sympy

from openrlhf_alp.rewards.values import Quantity, Tolerance

_DECIMAL_ERROR = Fraction(1, 10**6)
"""Relative error of a decimal that stands for a number without a finite decimal form."""

_DOUBLE_DIGITS = 15
_DOUBLE_ERROR = Fraction(1, 10**15)
_SHORT_DIGITS = 12
"""A program prints a double with 15 to 17 digits, and 0.1 + 0.2 as 0.30000000000000004. That may
stand for a number of few digits, not for another one of fifteen."""

_CONSTANT_DIGITS = 100
_ENOUGH_DIGITS = 2_000
"""Sums of many roots have bounds of millions of digits; a coincidence of this many is none."""
_MAX_DIGITS = 6_000
"""Digits to which constants are computed; costs about 0.1 s."""

_WHOLE = (sympy.floor, sympy.ceiling, sympy.factorial, sympy.binomial)
"""Functions that are meant for whole numbers."""

_POINT_DIGITS = 60
_NUM_POINTS = 4
_MAX_TRIES = 24


def quantities_equal(gold: Quantity, answer: Quantity) -> bool:
    """Whether two quantities have the same value. Units are not looked at."""
    first, second = gold.expression, answer.expression
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return first == second or _close_decimals(gold, answer)
    if gold.places is not None or answer.places is not None:
        return _decimal_stands_for(gold, answer)
    return expressions_equal(_sympy(first), _sympy(second))


def within(gold: Quantity, answer: Quantity, tolerance: Tolerance) -> bool:
    """Whether two numbers are nearer than `tolerance`. Units are not looked at."""
    label, given = _sympy(gold.expression), _sympy(answer.expression)
    if not (label.is_number and given.is_number and label.is_real and given.is_real):
        return False
    # The sizes are computed to 30 digits: a difference at the edge must not depend on rounding.
    distance, size = abs(label - given).evalf(30), abs(label).evalf(30)
    allowed = max(sympy.Float(tolerance.absolute, 30), sympy.Float(tolerance.relative, 30) * size)
    return bool(distance.is_finite and distance <= allowed * (1 + sympy.Float("1e-12", 30)))


def expressions_equal(first: sympy.Expr, second: sympy.Expr) -> bool:
    """Whether two expressions have the same value wherever both are defined."""
    if first == second:
        return True
    # oo - oo is not a number, so a difference cannot decide here.
    if first.has(sympy.oo) or second.has(sympy.oo):
        return False
    if first.is_number != second.is_number and not (first.free_symbols | second.free_symbols):
        return False
    if not first.free_symbols and not second.free_symbols:
        return is_zero(first - second)
    return _equal_at_points(first, second)


def is_zero(constant: sympy.Expr) -> bool:
    """Whether an expression without unknowns is zero."""
    if constant.is_Rational:
        return bool(constant == 0)
    digits = _deciding_digits(constant)
    if digits > _MAX_DIGITS:
        # Not decided: wrong is the safe side, as a policy learns what is paid by mistake.
        return False
    try:
        value = constant.evalf(4, maxn=digits, strict=True)
    except sympy.core.evalf.PrecisionExhausted:
        # No digit is certain although that many were computed: the value is below the bound.
        return True
    return bool(value == 0)


def _deciding_digits(constant: sympy.Expr) -> int:
    """The digits to compute until a constant that shows none is zero."""
    # The digits before the point are lost first when large terms cancel.
    magnitude = max((_magnitude(node) for node in sympy.preorder_traversal(constant)), default=0)
    if (bound := _separation(constant)) is not None:
        return magnitude + min(math.ceil(bound.digits), _ENOUGH_DIGITS) + 20
    return magnitude + _written_digits(constant) + _CONSTANT_DIGITS


def _magnitude(node: sympy.Expr) -> int:
    """The number of digits before the point."""
    value = abs(node.evalf(3))
    if not value.is_Float:
        return 0
    _, _, exponent, bits = value._mpf_
    return max(0, math.ceil((exponent + bits) / 3.32))


class _Bound:
    """Logarithms (base 10) of the numbers u and l of the separation bound, and the degree."""

    def __init__(self, upper: float, lower: float, degree: int) -> None:
        self.upper, self.lower, self.degree = upper, lower, degree

    @property
    def digits(self) -> float:
        """A value that is not zero is larger than 10 ** -digits."""
        return (self.degree - 1) * self.upper + self.lower + 5


def _separation(constant: sympy.Expr) -> _Bound | None:
    """The bound of an expression of rationals, sums, products and roots, else None."""
    sizes = _sizes(constant)
    roots = {(node.base, int(node.exp.q)) for node in constant.atoms(sympy.Pow)} if sizes else set()
    degree = math.prod(root for _, root in roots)
    return (
        None if sizes is None else _Bound(*sizes, degree * 2 if constant.has(sympy.I) else degree)
    )


def _sizes(node: sympy.Expr) -> tuple[float, float] | None:
    if node.is_Rational:
        return _log(abs(int(node.p))), _log(int(node.q))
    if node == sympy.I:
        return 0.0, 0.0
    if not (node.is_Add or node.is_Mul or (node.is_Pow and node.exp.is_Rational)):
        return None
    if node.is_Pow:
        base = _sizes(node.base)
        if base is None:
            return None
        upper, lower = base if node.exp > 0 else (base[1], base[0])
        return _power_sizes(upper, lower, abs(int(node.exp.p)), int(node.exp.q))
    sizes = [_sizes(argument) for argument in node.args]
    if any(size is None for size in sizes):
        return None
    lower = sum(size[1] for size in sizes if size)
    if node.is_Mul:
        return sum(size[0] for size in sizes if size), lower
    largest = max(size[0] + lower - size[1] for size in sizes if size)
    return largest + _log(len(sizes)), lower


def _power_sizes(upper: float, lower: float, exponent: int, root: int) -> tuple[float, float]:
    upper, lower = upper * exponent, lower * exponent
    # A root keeps one of the two whole, so that the bound stays an algebraic integer's.
    return (upper / root + lower * (root - 1) / root, lower) if root > 1 else (upper, lower)


def _log(number: int) -> float:
    return math.log10(number) if number > 1 else 0.0


def _written_digits(constant: sympy.Expr) -> int:
    numbers = constant.atoms(sympy.Rational)
    return int(sum(_log(abs(int(n.p))) + _log(int(n.q)) for n in numbers)) + len(numbers)


def _sympy(value: Fraction | sympy.Expr) -> sympy.Expr:
    if isinstance(value, Fraction):
        return sympy.Rational(value.numerator, value.denominator)
    return value


def _close_decimals(gold: Quantity, answer: Quantity) -> bool:
    """Whether a decimal and a fraction without a decimal form, or two printed doubles, agree."""
    first, second = gold.expression, answer.expression
    assert isinstance(first, Fraction) and isinstance(second, Fraction)
    if first == 0 or second == 0 or (gold.places is None and answer.places is None):
        return False
    error = abs(first - second) / abs(first)
    for decimal, exact in ((answer, first), (gold, second)):
        if decimal.places is None:
            continue
        digits = _finite_digits(exact)
        if _is_double(decimal, error) and (digits is None or digits <= _SHORT_DIGITS):
            return True
        if digits is None:
            return error <= _DECIMAL_ERROR and _is_within_last_digit(decimal, exact)
    return False


def _is_double(decimal: Quantity, error: Fraction) -> bool:
    """Whether a decimal looks like a double that a program printed."""
    assert decimal.places is not None
    has_length = decimal.places > 0 and decimal.digits in range(_DOUBLE_DIGITS, 18)
    return has_length and error < _DOUBLE_ERROR


def _is_within_last_digit(decimal: Quantity, exact: Fraction) -> bool:
    assert decimal.places is not None and isinstance(decimal.expression, Fraction)
    return abs(decimal.expression - exact) * Fraction(10) ** decimal.places < 1


def _finite_digits(value: Fraction) -> int | None:
    """Number of significant digits of a fraction as a decimal; None when they never end."""
    denominator, places = value.denominator, 0
    for prime in (2, 5):
        power = 0
        while denominator % prime == 0:
            denominator //= prime
            power += 1
        places = max(places, power)
    if denominator != 1:
        return None
    # Not converted to text: Python refuses integers of more than 4,300 digits.
    integer = abs(value.numerator) * 10**places // value.denominator
    while integer % 10 == 0 and 0 < integer.bit_length() < 4_000:
        integer //= 10
    return int(integer.bit_length() / 3.32) + 1


def _decimal_stands_for(gold: Quantity, answer: Quantity) -> bool:
    """Whether the one that is a decimal is the other one, rounded or cut at its last digit."""
    decimal, exact = (gold, answer) if gold.places is not None else (answer, gold)
    expression = _sympy(exact.expression)
    if expression.free_symbols or expression.has(sympy.oo) or decimal.expression == 0:
        return False
    value = expression.evalf(decimal.digits + 25)
    if not value.is_Float:
        return False
    rational = sympy.Rational(value)
    value = Fraction(int(rational.p), int(rational.q))
    error = abs(decimal.expression - value) / abs(decimal.expression)
    if _is_double(decimal, error):
        return True
    return bool(error <= _DECIMAL_ERROR) and _is_within_last_digit(decimal, value)


def _equal_at_points(first: sympy.Expr, second: sympy.Expr) -> bool:
    symbols = sorted(first.free_symbols | second.free_symbols, key=lambda symbol: symbol.name)
    functions = {
        call: sympy.Symbol(f"value of {call}")
        for call in first.atoms(sympy.core.function.AppliedUndef)
        | second.atoms(sympy.core.function.AppliedUndef)
    }
    if functions:
        first, second = first.xreplace(functions), second.xreplace(functions)
        symbols = sorted(first.free_symbols | second.free_symbols, key=lambda symbol: symbol.name)
    if first == second:
        return True
    whole = any(one.has(*_WHOLE) or _alternates(one) for one in (first, second))
    agreed = 0
    for point in _points(symbols, whole):
        same = _equal_at(first.xreplace(point), second.xreplace(point), first.has(sympy.I))
        if same is False:
            return False
        agreed += same is True
        if agreed == (2 * _NUM_POINTS if whole else _NUM_POINTS):
            break
    return agreed > 1


def _alternates(expression: sympy.Expr) -> bool:
    return any(node.base == -1 for node in expression.atoms(sympy.Pow))


def _points(
    symbols: list[sympy.Symbol], whole: bool
) -> Iterator[dict[sympy.Symbol, sympy.Rational]]:
    """Rational points: all positive, all negative, of mixed signs; or whole numbers only.

    A generator of its own: sympy and Python may change theirs, and the reward must not.
    """
    state = 20_260_319
    for attempt in range(_MAX_TRIES):
        point = {}
        for index, symbol in enumerate(symbols):
            state = (state * 6_364_136_223_846_793_005 + 1_442_695_040_888_963_407) % 2**64
            value = sympy.Rational(state >> 40, 1 << 23) + sympy.Rational(1, 97)
            is_negative = attempt % 3 == 1 or (attempt % 3 == 2 and index % 2 == attempt // 3 % 2)
            point[symbol] = -value if is_negative else value
            if whole:
                point[symbol] = sympy.Integer(1 + (attempt + 5 * index + (state >> 40) % 2) % 12)
        yield point


def _equal_at(first: sympy.Expr, second: sympy.Expr, is_complex: bool) -> bool | None:
    """Whether two constants agree to 60 digits; None where the first is not defined or not real."""
    if first.has(sympy.nan, sympy.zoo, sympy.oo) or second.has(sympy.nan, sympy.zoo, sympy.oo):
        return None
    if first.is_Rational and second.is_Rational:
        return bool(first == second)
    try:
        values = [_value(one) for one in (first, second)]
        if values[0].imag and not is_complex:
            return None
    except (TypeError, ValueError, ArithmeticError, sympy.core.evalf.PrecisionExhausted):
        return is_zero(first - second) if first.is_number and second.is_number else None
    with mpmath.workdps(_POINT_DIGITS):
        size = max(map(abs, values))
        return bool(abs(values[0] - values[1]) <= size * mpmath.mpf(10) ** (10 - _POINT_DIGITS))


def _value(expression: sympy.Expr) -> mpmath.mpc:
    """The value of a constant. Raises PrecisionExhausted when it may be zero."""
    value = expression.evalf(_POINT_DIGITS, maxn=4 * _POINT_DIGITS, strict=True)
    with mpmath.workdps(_POINT_DIGITS):
        real, imaginary = value.as_real_imag()
        return mpmath.mpc(mpmath.mpf(str(real)), mpmath.mpf(str(imaginary)))
