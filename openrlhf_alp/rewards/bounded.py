"""Exact arithmetic that refuses what would take too long, and the names that LaTeX has for it."""

import decimal
import re
from collections.abc import Iterable
from fractions import Fraction

import sympy

MAX_BITS = 200_000
"""Size of the largest integer that is computed, about 60,000 digits."""
MAX_FACTORIAL = 10_000
_MAX_RADICAND_BITS = 1_200
_MAX_EXPONENT = 10_000
"""Of a sum or of anything else that sympy may expand."""


CONSTANTS = {
    "\\pi": sympy.pi, "\\infty": sympy.oo, "e": sympy.E, "i": sympy.I, "\\mathbb{R}": sympy.S.Reals,
}  # fmt: skip

FUNCTIONS = {
    "\\sin": sympy.sin, "\\cos": sympy.cos, "\\tan": sympy.tan, "\\cot": sympy.cot,
    "\\sec": sympy.sec, "\\csc": sympy.csc, "\\arcsin": sympy.asin, "\\arccos": sympy.acos,
    "\\arctan": sympy.atan, "\\sinh": sympy.sinh, "\\cosh": sympy.cosh, "\\tanh": sympy.tanh,
    "\\coth": sympy.coth, "\\arccot": sympy.acot, "\\arcsec": sympy.asec, "\\arccsc": sympy.acsc,
    "\\ln": sympy.log, "\\log": sympy.log, "\\exp": sympy.exp, "\\lg": lambda x: sympy.log(x, 10),
    "\\floor": sympy.floor, "\\ceil": sympy.ceiling, "\\cbrt": sympy.cbrt,
    "\\Re": sympy.re, "\\Im": sympy.im, "\\arg": sympy.arg, "\\abs": sympy.Abs,
}  # fmt: skip

INVERSE = {
    sympy.sin: sympy.asin, sympy.cos: sympy.acos, sympy.tan: sympy.atan, sympy.cot: sympy.acot,
    sympy.sec: sympy.asec, sympy.csc: sympy.acsc, sympy.sinh: sympy.asinh, sympy.cosh: sympy.acosh,
    sympy.tanh: sympy.atanh,
}  # fmt: skip


NAMED = re.compile(
    r"text(?:bf|it|rm)?|mbox|math(?:rm|bf|it|cal|bb|frak|sf)|operatorname|vec|hat|overline|bar"
    r"|tilde|d?dot|overrightarrow|widehat|underline|boldsymbol"
)
"""Commands whose argument is part of a name."""

NO_SYMBOL = re.compile(
    r"i*int|sum|prod|lim|oint|partial|nabla|to|mapsto|[cl]?dots|approx|equiv|sim|perp|parallel|cup"
    r"|cap|in|subset|forall|exists|quad|begin|end|pm|mp|leq|geq|neq|emptyset|setminus|degree|frac"
    r"|sqrt|binom|log|not|r[a-gi-z]*"
)
"""Commands that are neither a name nor a number; the last ones are right-hand brackets."""


class UnreadableError(ValueError):
    """The text is no expression that can be read in bounded time."""


def exact_integer(digits: str) -> int:
    """Converts digits of any number; `int` alone refuses more than 4,300."""
    return int(digits) if len(digits) < 4000 else int(decimal.Decimal(digits))


def exact_number(literal: str) -> Fraction:
    """Converts a decimal literal such as `12`, `.5`, `17.` without rounding."""
    integer, _, places = literal.partition(".")
    return Fraction(exact_integer(integer + places or "0"), 10 ** len(places))


def power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    """Returns base ** exponent.

    Raises:
        UnreadableError: the result would be too large.
    """
    if exponent.is_number and base.is_number and not exponent.has(sympy.oo):
        size = abs(exponent.evalf(5))
        if base.is_Rational:
            bits = max(abs(int(base.p)).bit_length(), int(base.q).bit_length())
            too_large = abs(base) != 1 and base != 0 and size * bits > MAX_BITS
            # sympy looks for factors of the radicand.
            too_large |= not exponent.is_Integer and bits > _MAX_RADICAND_BITS
        else:
            too_large = size > _MAX_EXPONENT
        if too_large:
            raise UnreadableError("a power that is too large to compute")
    elif exponent.is_number and abs(exponent) > _MAX_EXPONENT:
        raise UnreadableError("a power that is too large to compute")
    elif exponent.has(sympy.factorial) or any(
        p.exp.free_symbols for p in exponent.atoms(sympy.Pow)
    ):
        # `9^{9^x}` is computed when a number is put in for x.
        raise UnreadableError("a tower of powers with unknowns")
    return base**exponent


def check_size(expression: sympy.Expr) -> None:
    """Refuses powers that simplification has made too large: `(x^{9999})^{9999}`."""
    exponents = [power.exp for power in expression.atoms(sympy.Pow) if power.exp.is_Rational]
    if any(abs(exponent) > _MAX_EXPONENT for exponent in exponents):
        raise UnreadableError("a power that is too large to compute")


def product(factors: Iterable[sympy.Expr]) -> sympy.Expr:
    """Returns the product.

    Raises:
        UnreadableError: the result would be too large.
    """
    number = sympy.Integer(1)
    others = []
    for factor in factors:
        if not factor.is_Rational:
            others.append(factor)
            continue
        number *= factor
        if max(abs(int(number.p)), int(number.q)).bit_length() > MAX_BITS:
            raise UnreadableError("a product that is too large to compute")
    return sympy.Mul(number, *others)
