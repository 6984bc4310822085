"""Defines what an answer or a label can mean: numbers, times, lists, intervals, relations."""

from dataclasses import dataclass
from fractions import Fraction

import sympy


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number or an expression, with what is written behind it."""

    expression: Fraction | sympy.Expr
    places: int | None = None
    """Power of ten of the last digit of a decimal literal, negated; None for anything else."""

    digits: int = 0
    """Significant digits of a decimal literal."""

    is_percent: bool = False
    unit: str = ""
    arithmetic: bool = False
    """It leaves sums or products of numbers to work out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far a number may be from a numeric label and still answer it. Zero: it must be equal."""

    relative: float = 0.0
    """Share of the label's absolute value."""

    absolute: float = 0.0


@dataclass(frozen=True, slots=True)
class Clock:
    """A time of day or a duration, `11:00`; also a ratio, such as `3:4`."""

    parts: tuple[int, ...]
    half: str
    """`am`, `pm` or nothing."""


@dataclass(frozen=True, slots=True)
class Based:
    """Digits with their base, `1010_2`."""

    number: str
    base: str


@dataclass(frozen=True, slots=True)
class Items:
    """Several values. `kind` is `list` (bare commas), `set`, `tuple` or `matrix` (of rows)."""

    kind: str
    items: tuple["Value", ...]


@dataclass(frozen=True, slots=True)
class Interval:
    """An interval with a square bracket at one end at least; `(a, b)` is read as a tuple."""

    low: "Value"
    high: "Value"
    low_open: bool
    high_open: bool


@dataclass(frozen=True, slots=True)
class Union:
    """A union of intervals and sets."""

    parts: tuple["Value", ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """`sides[0] signs[0] sides[1] ...`, with the signs =, <, >, \\leq, \\geq, \\neq, \\approx."""

    signs: tuple[str, ...]
    sides: tuple["Value", ...]


Value = Quantity | Clock | Based | Items | Interval | Union | Relation


@dataclass(frozen=True, slots=True)
class Reading:
    """What a text may mean."""

    text: str
    """Normalised, without spaces: equal texts are equal answers."""

    words: str
    spaced: str
    """Normalised, with its spaces."""

    values: tuple[Value, ...]
    """Usually one. More when the text is ambiguous, none when it is words only."""
