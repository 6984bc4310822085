"""Reads one mathematical expression in normalised LaTeX into an exact sympy expression.

Decimals become rationals, so that nothing is rounded. Powers, factorials and exponentials are
bounded while they are built: a tower of powers is refused before any digit of it is computed.
What it does not know, such as integrals, is unreadable here; `verify.py` says what happens then.
"""

import functools
import re
from collections.abc import Callable
from fractions import Fraction

import sympy

from openrlhf_alp.rewards.bounded import (
    CONSTANTS,
    FUNCTIONS,
    INVERSE,
    MAX_FACTORIAL,
    NAMED,
    NO_SYMBOL,
    UnreadableError,
    check_size,
    exact_integer,
    exact_number,
    power,
    product,
)

_MAX_DEPTH = 60

_TOKEN = re.compile(r"\s*(?:\d+(?:\.\d*)?|\.\d+|\\(?:[A-Za-z]+|[{}|%])|\S)")

_APPLIED = re.compile(r"[fghFGHINPTuvyV]")
"""Letters that are read as functions before a bracket; `x(x+1)` is a product."""

_BRACKETS = {"(": ")", "[": "]", "\\{": "\\}", "{": "}"}
_HALF_BRACKETS = {
    "\\lfloor": ("\\rfloor", sympy.floor), "\\lceil": ("\\rceil", sympy.ceiling),
    "|": ("|", sympy.Abs), "\\|": ("\\|", sympy.Abs),
}  # fmt: skip


class _Reader:
    """A recursive-descent parser over the tokens of one expression."""

    def __init__(self, text: str, plus_minus: int) -> None:
        self._tokens = [match[0].strip() for match in _TOKEN.finditer(text)]
        self._position = 0
        self._last_was_power = False
        self._depth = 0
        self._plus_minus = plus_minus
        self.arithmetic = False
        """Whether a sum or a product of numbers was met outside exponents and functions."""

    def read(self) -> sympy.Expr:
        expression = self._sum()
        if self._position < len(self._tokens):
            raise UnreadableError(f"unexpected {self._peek()!r}")
        return expression

    def _peek(self, ahead: int = 0) -> str:
        index = self._position + ahead
        return self._tokens[index] if index < len(self._tokens) else ""

    def _next(self) -> str:
        token = self._peek()
        if not token:
            raise UnreadableError("ends too early")
        self._position += 1
        return token

    def _take(self, *tokens: str) -> bool:
        if self._peek() in tokens and self._peek():
            self._position += 1
            return True
        return False

    def _expect(self, token: str) -> None:
        if not self._take(token):
            raise UnreadableError(f"{token!r} is missing")

    def _sum(self) -> sympy.Expr:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise UnreadableError("nested too deeply")
        # Terms are added at once: sympy would sort the sum again for each of them.
        terms = [self._term()]
        while (sign := self._sign()) is not None:
            terms.append(sign * self._term())
        self.arithmetic |= len(terms) > 1
        self._depth -= 1
        return sympy.Add(*terms)

    def _sign(self) -> int | None:
        signs = {"+": 1, "-": -1, "\\pm": self._plus_minus, "\\mp": -self._plus_minus}
        return signs[self._next()] if self._peek() in signs else None

    def _term(self) -> sympy.Expr:
        sign = 1
        while (another := self._sign()) is not None:
            sign *= another
        factors = [self._factor()]
        num_integers = int(self._is_plain_integer(factors[0]))
        while True:
            if self._take("/"):
                divisor = self._factor(signed=True)
                if divisor == 0:
                    raise UnreadableError("division by zero")
                factors.append(1 / divisor)
            elif self._take("*", "\\cdot", "\\times", "\\ast") or self._starts_factor():
                factors.append(self._factor(signed=True))
                num_integers += self._is_plain_integer(factors[-1])
            else:
                break
        self.arithmetic |= num_integers > 1
        return product([sympy.Integer(sign), *factors])

    def _is_plain_integer(self, factor: sympy.Expr) -> bool:
        """Whether the factor just read is an integer that was written as one, such as 3 or (4)."""
        last = self._tokens[self._position - 1]
        plain = last[0].isdigit() or last in (")", "}")
        follows_power = self._position > 1 and self._tokens[self._position - 2] == "^"
        is_literal = factor.is_Integer and abs(factor) > 1 and plain and not follows_power
        return bool(is_literal) and not self._last_was_power

    def _starts_factor(self) -> bool:
        token = self._peek()
        if not token or token in ("|", "\\|"):
            return False
        if token[0].isdigit() or token[0] == ".":
            # "3 4" is not a product: it is garbage, or a list without its commas.
            return not self._tokens[self._position - 1][-1].isdigit()
        if token[0] == "\\":
            name = token[1:]
            return token in FUNCTIONS or token in _HALF_BRACKETS or token in ("\\{",) or (
                name in ("frac", "sqrt", "binom", "log") or self._is_symbol(name)
            )  # fmt: skip
        return token[0].isalpha() or token in ("(", "[", "{")

    @staticmethod
    def _is_symbol(name: str) -> bool:
        return name.isalpha() and NO_SYMBOL.fullmatch(name) is None

    def _factor(self, *, signed: bool = False) -> sympy.Expr:
        if signed and (sign := self._sign()) is not None:
            return sign * self._factor(signed=True)
        outer = self.arithmetic
        base = self._atom()
        while self._take("!"):
            is_small = base.is_Integer and 0 <= base <= MAX_FACTORIAL
            if not is_small and (base.is_number or base.has(sympy.factorial, sympy.Pow)):
                raise UnreadableError("a factorial that is too large to compute")
            base = sympy.factorial(base)
        while self._take("\\degree"):
            base = base * sympy.pi / 180
        self._last_was_power = False
        if not self._take("^"):
            return base
        self._last_was_power = True
        # 2^{3+4} is a form of a number, so its sum does not count as work that is left.
        exponent = self._quiet(self._script)
        self.arithmetic = outer
        self._last_was_power = True
        return power(base, exponent)

    def _quiet(self, read: Callable[[], sympy.Expr]) -> sympy.Expr:
        """Reads something whose sums are a form of a number: `2^{3+4}`, `\\sqrt{9+7}`."""
        outer = self.arithmetic
        result = read()
        self.arithmetic = outer
        return result

    def _script(self) -> sympy.Expr:
        if self._peek() == "{":
            return self._group()
        return self._factor(signed=True)

    def _group(self) -> sympy.Expr:
        opening = self._next()
        expression = self._sum()
        self._expect(_BRACKETS[opening])
        return expression

    def _argument(self) -> sympy.Expr:
        """One argument of a LaTeX command: `{...}`, one digit or one letter."""
        if self._peek() == "{":
            return self._group()
        token = self._peek()
        if token[:1].isdigit() and len(token) > 1:
            # LaTeX takes one digit: \\frac12 is one half.
            self._tokens[self._position] = token[1:]
            return sympy.Integer(token[0])
        return self._atom()

    def _atom(self) -> sympy.Expr:
        token = self._next()
        if token[0].isdigit() or token[0] == ".":
            # A decimal becomes a rational number here, so that nothing is rounded later.
            return self._number(token)
        if token in ("(", "[", "{", "\\{"):
            self._position -= 1
            return self._group()
        if token in _HALF_BRACKETS:
            closing, function = _HALF_BRACKETS[token]
            inner = self._quiet(self._sum)
            self._expect(closing)
            return function(inner)
        if token[0] == "\\":
            return self._command(token)
        if token.isalpha():
            return self._letter(token)
        raise UnreadableError(f"unexpected {token!r}")

    def _number(self, token: str) -> sympy.Expr:
        value = exact_number(token)
        if self._peek() == "\\overline" and "." in token:
            value += self._repeating(token)
        number = sympy.Rational(value.numerator, value.denominator)
        return number + self._mixed_part() if value.denominator == 1 else number

    def _repeating(self, token: str) -> Fraction:
        self._next()
        self._expect("{")
        digits = self._next()
        self._expect("}")
        if not digits.isdigit():
            raise UnreadableError("a repeating decimal repeats digits")
        places = len(token.partition(".")[2])
        return Fraction(exact_integer(digits), (10 ** len(digits) - 1) * 10**places)

    def _mixed_part(self) -> sympy.Expr:
        """The fraction of `2\\frac{1}{2}` or `2 2/3`, otherwise 0."""
        ahead = [self._peek(i) for i in range(8)]
        if ahead[0] == "\\frac":
            text = "".join(ahead)
            match = re.match(r"\\frac\{(\d+)\}\{(\d+)\}|\\frac(\d)(\d)(?!\d)", text)
            if match is None:
                return sympy.Integer(0)
            top, bottom = (int(digits) for digits in match.groups() if digits)
            self._position += 7 if ahead[1] == "{" else 2
        elif ahead[0].isdigit() and ahead[1] == "/" and ahead[2].isdigit():
            top, bottom = int(ahead[0]), int(ahead[2])
            self._position += 3
        else:
            return sympy.Integer(0)
        if bottom == 0:
            raise UnreadableError("division by zero")
        return sympy.Rational(top, bottom)

    def _command(self, token: str) -> sympy.Expr:
        if token in CONSTANTS:
            return CONSTANTS[token]
        if token == "\\frac":
            return self._fraction()
        if token == "\\sqrt":
            return self._quiet(self._root)
        if token == "\\binom":
            top, bottom = self._quiet(self._argument), self._quiet(self._argument)
            if top.is_number and not (top.is_Integer and abs(top) <= MAX_FACTORIAL):
                raise UnreadableError("a binomial coefficient that is too large to compute")
            return sympy.binomial(top, bottom)
        if token in FUNCTIONS:
            return self._quiet(lambda: self._function(token))
        name = token[1:]
        if NAMED.fullmatch(name):
            return self._name(token)
        if not self._is_symbol(name):
            raise UnreadableError(f"{token} is not known")
        return self._subscripted(name)

    def _fraction(self) -> sympy.Expr:
        # `dM/dt` is no quotient: with d cancelled it would equal M/t.
        is_derivative = self._peek(1) == "d" and (self._peek(2).isalpha() or self._peek(2) == "^")
        top = self._argument()
        is_derivative &= self._peek(1) == "d" and self._peek(2).isalpha()
        bottom = self._argument()
        if bottom == 0:
            raise UnreadableError("division by zero")
        return top / bottom * (sympy.Symbol("derivative") if is_derivative else 1)

    def _root(self) -> sympy.Expr:
        degree = sympy.Integer(2)
        if self._take("["):
            degree = self._sum()
            self._expect("]")
        # Unlike an argument of \\frac, \\sqrt13 is meant as the root of 13.
        radicand = self._group() if self._peek() in ("{", "(") else self._atom()
        if degree == 0:
            raise UnreadableError("a root of degree 0")
        return power(radicand, 1 / degree)

    def _function(self, token: str) -> sympy.Expr:
        function = FUNCTIONS[token]
        exponent = base = None
        while self._peek() in ("^", "_"):
            if self._next() == "^":
                exponent = self._script()
            else:
                base = self._argument()
        value = self._function_argument()
        # The exponent of a function is a power, only -1 means the inverse function.
        if exponent == -1 and function in INVERSE:
            return INVERSE[function](value)
        if function is sympy.exp:
            result = power(sympy.E, value)
        else:
            result = function(value) if base is None else sympy.log(value, base)
        return result if exponent is None else power(result, exponent)

    def _function_argument(self) -> sympy.Expr:
        """`\\sin(2t)`, or the product that follows: `\\sin 2x` is sin(2x)."""
        if self._peek() in ("(", "{", "[", "|"):
            return self._atom()
        sign = self._sign() or 1
        factors = [self._factor()]
        while self._starts_factor() and self._peek() not in ("(", "[", *FUNCTIONS):
            factors.append(self._factor())
        if self._peek() == "/" and self._peek(1)[:1].isdigit() and factors[-1] == sympy.pi:
            self._next()
            factors.append(1 / self._factor())
        return sympy.Mul(sign, *factors)

    def _name(self, token: str) -> sympy.Expr:
        """A name of several letters, such as `\\mathrm{MR}` or `\\overline{AB}`."""
        if self._peek() != "{":
            return self._subscripted(f"{token} {self._next()}")
        self._next()
        parts = []
        while self._peek() != "}":
            parts.append(self._next())
            if parts[-1] == "{":
                raise UnreadableError(f"{token} with a nested group")
        self._next()
        if not re.fullmatch(r"[\w.'+\\-]*", "".join(parts)):
            raise UnreadableError(f"{token} with a sentence")
        upright = token[1:] in ("text", "textbf", "textit", "textrm", "mbox", "mathrm", "mathit")
        return self._subscripted("".join(parts) if upright else f"{token} {''.join(parts)}")

    def _letter(self, letter: str) -> sympy.Expr:
        # With a subscript, e_1 and i_1 are unknowns.
        if letter in CONSTANTS and self._peek() not in ("_", "'"):
            return CONSTANTS[letter]
        symbol = self._subscripted(letter)
        if self._peek() == "(" and _APPLIED.fullmatch(letter) and self._is_call(letter):
            self._next()
            arguments = [self._quiet(self._sum)]
            while self._take(","):
                arguments.append(self._quiet(self._sum))
            self._expect(")")
            return sympy.Function(symbol.name)(*arguments)
        return symbol

    def _is_call(self, letter: str) -> bool:
        argument = self._peek(1)
        return letter in "fghFGH" or (argument[:1].isalnum() and self._peek(2) in (")", ","))

    def _subscripted(self, name: str) -> sympy.Symbol:
        while self._peek() in ("_", "'"):
            if self._next() == "'":
                name += "'"
                continue
            name += "_"
            if not self._take("{"):
                name += self._next()
                continue
            depth = 1
            while depth:
                token = self._next()
                depth += {"{": 1, "}": -1}.get(token, 0)
                name += token if depth else ""
        return sympy.Symbol(name)


@functools.lru_cache(maxsize=2048)
def read_expression(text: str, plus_minus: int = 1) -> tuple[sympy.Expr, bool]:
    """Returns the expression, and whether it leaves sums or products of numbers to work out.

    Args:
        text: normalised LaTeX.
        plus_minus: which sign `\\pm` stands for; `\\mp` stands for the other one.

    Raises:
        UnreadableError: the text is not a finite expression, or it is too large to compute.
    """
    reader = _Reader(text, plus_minus)
    try:
        expression = reader.read()
    except (ArithmeticError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UnreadableError(f"{type(error).__name__}: {error}") from error
    if not isinstance(expression, sympy.Expr) or expression.has(sympy.nan, sympy.zoo):
        raise UnreadableError("not a finite expression")
    check_size(expression)
    return expression, reader.arithmetic
