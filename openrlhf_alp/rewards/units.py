"""Splits a unit, a currency or a percent sign from the number it belongs to.

A label rarely repeats the unit that its problem asks for, so a unit on one side only does not
matter. Two different known units on the two sides do: 5 km is not 5 m.
"""

import re

_WRAPPED = (
    r"\\(?:text|textrm|textbf|textnormal|mbox|hbox|mathrm|mathbf|operatorname|rm)\s*"
    r"\{(?:[^{}]|\{[^{}]*\})*\}"
)
_POWER = r"(?:\s*\^\s*(?:\{\s*-?\d+\s*\}|-?\d+))?"

_SIGNS = r"\\?\$|[\u00a2-\u00a5\u20a0-\u20bf]|\\pounds|\\euro"
_CODES = r"USD|EUR|GBP|JPY|INR|CHF|CNY|CAD|AUD|SEK|NOK|DKK|Rs\.?|kr\.?"
_CURRENCY = re.compile(
    rf"^([-+]?)\s*((?:US|AU?|CA?|HK|NT|NZ|R|S)?\s?(?:{_SIGNS})|{_CODES})\s*([-+]?)\s*(?=[\d.\\({{])"
)
_CURRENCY_NAMES = {
    "$": "dollar", "US$": "dollar", "USD": "dollar", "\u20ac": "euro", "\\euro": "euro",
    "EUR": "euro", "\u00a3": "pound", "\\pounds": "pound", "GBP": "pound", "\u00a5": "yen",
    "JPY": "yen", "\u20b9": "rupee", "INR": "rupee", "Rs": "rupee", "Rs.": "rupee",
}  # fmt: skip

_CURRENCY_BEHIND = re.compile(rf"(?<=[\d.)}}])\s*({_SIGNS}|{_CODES})$")

_PERCENT = re.compile(
    r"\s*(?:\\?%|(?:percent|per\s?cent|pct|percentage(?: points?)?)"
    r"|\\(?:text|mbox|mathrm)\s*\{\s*(?:\\?%|percent|per cent|pct)\s*\})$"
)
_DEGREE = re.compile(
    r"\s*\\degree\s*(?:\\?(?:text|mathrm|mbox)?\s*\{?\s*([CFK])\s*\}?|[CF])?$|"
    r"\s*(?:\\(?:text|mbox|mathrm)\s*\{\s*)?(?:degrees?|deg)(?:\s+(?:Celsius|Fahrenheit))?\s*\}?$"
)
_ARC = re.compile(r"(?<=\d)\s*('{1,2})$")
_WRAPPED_PART = rf"{_WRAPPED}{_POWER}"
_WRAPPED_UNIT = re.compile(
    rf"^(.*?[\w)}}\].%])\s*[\\ ]*((?:(?:\\frac\s*\{{{_WRAPPED_PART}\}}\s*\{{{_WRAPPED_PART}\}}"
    rf"|{_WRAPPED_PART})(?:[\s/*.]|\\cdot|\\times)*)+)$",
    re.DOTALL,
)
_PLAIN_UNIT = re.compile(
    r"^([-+]?(?:[\d.,]+|\\frac\{\d+\}\{\d+\}|\d+\s+\d+/\d+|[\d.]+\s?\\cdot 10\^\{?-?\d+\}?"
    r"|\d+\s*/\s*\d+))(\s*)"
    rf"([A-Za-z\u00b5\u03bc\\\u00c5](?:[A-Za-z.' /*-]|\\AA|\\mu|\\cdot|\\Omega|{_POWER})*)$"
)

_NAMES = {
    name: group[0]
    for group in (
        ("m", "meter", "metre"), ("cm", "centimeter", "centimetre"),
        ("km", "kilometer", "kilometre"),
        ("mm", "millimeter", "millimetre"), ("inch", "in", "inches"), ("ft", "foot", "feet"),
        ("yd", "yard"), ("mile", "mi"), ("g", "gram"), ("kg", "kilogram"), ("mg", "milligram"),
        ("lb", "lbs", "pounds of weight"), ("oz", "ounce"), ("s", "sec", "second"),
        ("min", "minute"), ("hour", "hr", "h"), ("day",), ("week",), ("month",), ("year", "yr"),
        ("liter", "litre", "l"), ("ml", "milliliter", "millilitre"), ("gallon", "gal"),
        ("mph", "miles per hour", "mile/hour", "mi/h"),
        ("km/h", "kmh", "kmph", "kilometers per hour"),
        ("m/s", "meters per second"), ("dollar", "usd", "buck"), ("cent", "\u00a2"),
        ("euro", "eur"),
        ("yen", "jpy"), ("rupee", "inr", "rs"), ("pound", "gbp"), ("n", "newton"), ("j", "joule"),
        ("kj",), ("w", "watt"), ("kw",), ("v", "volt"), ("hz", "hertz"), ("khz",), ("mhz",),
        ("pa", "pascal"), ("kpa",), ("atm",), ("mol", "mole"), ("ev",), ("kev",), ("mev",), ("nm",),
        ("erg",), ("k", "kelvin"), ("pc", "parsec"), ("kpc",), ("mpc",), ("au",), ("ns",), ("ms",),
        ("degree", "deg"), ("arcsec",), ("arcmin",), ("radian", "rad"),
    )
    for name in group
}  # fmt: skip
_SPOKEN = frozenset(("square", "squared", "sq", "cubic", "cubed", "per", "units", "unit"))


def split(text: str) -> tuple[str, str, bool]:
    """Returns the number, the unit's name (or an empty string) and whether it is a percentage."""
    text = text.strip()
    unit = ""
    if currency := _CURRENCY.match(text):
        unit = _CURRENCY_NAMES.get(re.sub(r"\\(?=\$)|\s", "", currency[2]), "currency")
        text = currency[1] + currency[3] + text[currency.end() :]
    elif currency := _CURRENCY_BEHIND.search(text):
        unit = _CURRENCY_NAMES.get(
            currency[1].lstrip("\\") if "$" in currency[1] else currency[1], "currency"
        )
        text = text[: currency.start()]
    # A percent sign, a degree and a unit exclude each other; the first found is taken.
    if percent := _PERCENT.search(text):
        return text[: percent.start()].strip(), unit, True
    has_angle = re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text)
    if (degree := _DEGREE.search(text)) and degree.start() > 0 and not has_angle:
        return text[: degree.start()].strip(), "degree", False
    if arc := _ARC.search(text):
        return text[: arc.start()], "arcsec" if len(arc[1]) == 2 else "arcmin", False
    if (wrapped := _WRAPPED_UNIT.match(text)) and not re.fullmatch(r"[A-Za-z]", wrapped[1]):
        return wrapped[1].strip(), unit or name(wrapped[2]), False
    if (plain := _PLAIN_UNIT.match(text)) and _is_unit(plain[3], spaced=bool(plain[2])):
        return plain[1].strip(), unit or name(plain[3]), False
    return text, unit, False


def conflict(first: str, second: str) -> bool:
    """Whether both are known units and differ."""
    return first != second and _is_known(first) and _is_known(second)


def name(text: str) -> str:
    """Returns one name for the spellings of a unit: `\\text{ square feet}` is ft^2."""
    text = re.sub(
        r"\\(?:text|textrm|textbf|textnormal|mbox|hbox|mathrm|mathbf|operatorname|rm)", "", text
    )
    text = re.sub(r"[{}\\]", "", text).replace("AA", "angstrom")
    text = re.sub(r"\s+", " ", text).strip(" .*").lower()
    power = ""
    for words, exponent in (("square|squared|sq\\.?", "^2"), ("cubic|cubed|cu\\.?", "^3")):
        shorter = re.sub(rf"\b(?:{words})\b\s*", "", text).strip()
        if shorter != text and shorter:
            text, power = shorter, exponent
    if match := re.fullmatch(r"(.*?)\s*\^\s*(-?\d+)", text):
        text, power = match[1], f"^{match[2]}"
    return _NAMES.get(text, _NAMES.get(text.removesuffix("s"), text)) + power


def _is_known(unit: str) -> bool:
    return unit.partition("^")[0] in _NAMES


def _is_unit(text: str, *, spaced: bool) -> bool:
    """Whether letters behind a number are a unit and not a product of unknowns."""
    if re.search(r"\\(?!AA|mu|cdot|Omega)", text):
        return False
    base = name(text).partition("^")[0]
    # 12m is twelve times an unknown; verify.py takes a lone letter for a unit where it may.
    if len(re.sub(r"[^A-Za-z]", "", text)) == 1:
        return False
    if base in _NAMES:
        return True
    first = re.split(r"[ /^*.-]", text)[0]
    return spaced and (len(first) >= 3 or first.lower() in _SPOKEN)
